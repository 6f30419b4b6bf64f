"""Dropout with one mask per sample and solve."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.core.function_map import SeededLayer


class VariationalDropout(SeededLayer):
    """Dropout of whole channels with one mask per sample and solve; the identity in evaluation mode.

    The mask is a function of the seed that a solve gives each sample, so every evaluation of the map, forward and
    backward, sees the same one, whichever samples are still in the batch. Kept channels are scaled by `1 / (1 - p)`.

    Args:
        p: probability of dropping a channel.

    Raises:
        ValueError: `p` outside [0, 1).
        RuntimeError: called in training mode outside a solve of a module.

    Source: Bai, Koltun and Kolter (2020), after Gal and Ghahramani (2016).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"VariationalDropout(p={p!r}): must lie in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, ...) -> (B, C, ...)`."""
        if self.p == 0 or (self.seeds is None and not self.training):
            return x
        # With seeds there is a mask in either mode: backward meets the map that the solve met.
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
    """Uniform numbers in [0, 1) from integers alone: a 32-bit finaliser over seed and counter."""
    low = 0xFFFFFFFF
    x = (seeds - counter * 0x61C8864F) & low  # modulo 2^32, times 0x9E3779B1, which compilers do not take for an int32
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & low
    x = x ^ (x >> 16)
    return x.to(torch.float64) / 2.0**32
