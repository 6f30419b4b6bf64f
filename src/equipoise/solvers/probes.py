"""Probes: evaluations from which products with the matrix of an affine map are read."""

import torch
from torch import Tensor

LARGEST = 1e4  # residual of a probe, in units of the first one; the loop calls a solve divergent only far beyond
ASSUMED_NORM = 1e4  # of the matrix, before a product is known


def probe_scale(size: Tensor, length: Tensor, first: Tensor, norm: Tensor) -> Tensor:
    """Return the number of steps from an iterate to the probe, `(b,)`, a power of two: it scales without rounding.

    The probe lies as far from the iterate as the iterate from zero, so that rounding there is small against the
    product, but not so far that its residual looks like divergence. A step that is long enough is taken once: it may
    lead to the answer.

    Args:
        size: `(b,)` norm of the iterate, or of its residual if that is larger.
        length: `(b,)` norm of one step.
        first: `(b,)` norm of the first residual of the solve.
        norm: `(b,)` largest norm ratio of product and step so far, 0 if there is none.
    """
    longest = torch.log2(LARGEST * first / torch.where(norm > 0, norm, ASSUMED_NORM) / length).round()
    wanted = torch.log2(size / length).round()
    scale = torch.exp2(torch.minimum(longest, torch.where(wanted <= 3, 0.0, wanted)))
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
