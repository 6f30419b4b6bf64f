"""Dropout with one mask per sample and solve."""

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.modules import SeededLayer


class VariationalDropout(SeededLayer):
    """Dropout of whole channels with one mask per sample and solve; the identity in evaluation mode.

    The mask is a function of the sample's seed, one per solve. All evaluations of the map, forward and backward, use
    the same mask, whichever samples are still in the batch. Kept channels are scaled by `1 / (1 - p)`.

    Args:
        p: probability of dropping a channel.

    Raises:
        ValueError: `p` outside [0, 1).
        RuntimeError: called in training mode outside a solve of a module.

    Source: Bai, Koltun and Kolter (2020), after Gal and Ghahramani (2016).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        check_ranges(self, p=">= 0 and < 1")

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...) -> (B, C, ...)`."""
        if self.p == 0 or (self.seeds is None and not self.training):
            return x
        # Seeds give a mask in either mode, so that the backward pass uses the map of the solve.
        if self.seeds is None:
            raise RuntimeError(
                "VariationalDropout in training mode needs the seeds of a solve: give the module itself to "
                "fixed_point(cell, z0, x) or DEQ(cell), not a function that calls it; or call .eval() on it"
            )
        channels = torch.arange(x.shape[1], device=x.device)
        keep = _uniform(self.seeds[:, None], channels) >= self.p
        mask = keep.to(x.dtype) / (1 - self.p)
        return x * mask.view(*mask.shape, *(1,) * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _uniform(seeds: Tensor, counter: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1) from integers alone: a 32-bit finalizer over seed and counter."""
    low = 0xFFFFFFFF
    x = (seeds - counter * 0x61C8864F) & low  # + 0x9E3779B1 * counter modulo 2^32, with a factor that fits an int32
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & low
    x = x ^ (x >> 16)
    return x.to(torch.float64) / 2.0**32
