"""Conversion between hyperparameter tensors and the flat float64 vector of the step rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Bound = float | Tensor | Sequence[float | Tensor]


def flatten(parts: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one vector `(p,)`, float64 on the CPU."""
    return torch.cat([part.detach().reshape(-1).to("cpu", torch.float64) for part in parts])


@dataclasses.dataclass(frozen=True, eq=False)
class HyperLayout:
    """Shapes, dtypes and devices of the hyperparameters, those of `hyper0`."""

    hyper0: tuple[Tensor, ...]

    @classmethod
    def of(cls, hyper0: Tensor | Sequence[Tensor]) -> HyperLayout:
        """Return the layout of a tensor or a tuple of tensors.

        Raises:
            TypeError: something else, or no floating point.
            ValueError: it is empty, or a number is not finite.
        """
        parts = tuple(hyper0) if isinstance(hyper0, Sequence) else (hyper0,)
        for part in parts:
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise TypeError(f"hyper0 must be a floating-point tensor or a tuple of such, got {part!r}")
            if not bool(part.isfinite().all()):
                raise ValueError(f"hyper0 must be finite, got {part!r}")
        if sum(part.numel() for part in parts) == 0:
            raise ValueError("hyper0 is empty: pass at least one hyperparameter")
        return cls(tuple(part.detach() for part in parts))

    def unflatten(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of a flat vector as leaves that require gradients."""
        sizes = [part.numel() for part in self.hyper0]
        return tuple(
            piece.reshape(part.shape).to(part.device, part.dtype, copy=True).requires_grad_()
            for piece, part in zip(x.split(sizes), self.hyper0, strict=True)
        )

    def box(self, bounds: tuple[Bound, Bound] | None) -> tuple[Tensor, Tensor]:
        """Return both bounds as vectors `(p,)`, infinite without bounds.

        Raises:
            TypeError: `bounds` is no pair.
            ValueError: a bound has the wrong shape, or `hyper0` does not lie between the bounds.
        """
        if bounds is None:
            bounds = (-math.inf, math.inf)
        if not isinstance(bounds, tuple) or len(bounds) != 2:
            raise TypeError(f"bounds must be a pair (low, high) of numbers or tensors, got {bounds!r}")
        low, high = (self._bound(bound) for bound in bounds)
        x = flatten(self.hyper0)
        if not bool((low <= high).all()):
            raise ValueError("bounds must be a pair (low, high) with low <= high")
        if not bool(((low <= x) & (x <= high)).all()):
            raise ValueError(f"hyper0 must lie within the bounds {bounds!r}, got {[*self.hyper0]}")
        return low, high

    def _bound(self, bound: Bound) -> Tensor:
        each = [bound] * len(self.hyper0) if isinstance(bound, (int, float, Tensor)) else list(bound)
        if len(each) != len(self.hyper0):
            raise ValueError(f"a bound has {len(each)} parts, hyper0 has {len(self.hyper0)}")
        expanded = []
        for value, part in zip(each, self.hyper0, strict=True):
            # Rounded as the hyperparameters are: a float32 0.3 is not above a bound of 0.3.
            tensor = torch.as_tensor(value, dtype=part.dtype, device="cpu")
            try:
                expanded.append(tensor.expand(part.shape))
            except RuntimeError:
                raise ValueError(
                    f"a bound has shape {tuple(tensor.shape)}, its hyperparameter {tuple(part.shape)}"
                ) from None
        return flatten(expanded)
