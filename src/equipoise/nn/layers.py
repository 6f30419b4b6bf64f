"""Layers that are safe inside a fixed point."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from equipoise.map import SeededLayer


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


def weight_norm(module: nn.Module, name: str = "weight", dim: int = 0) -> nn.Module:
    r"""Weight normalisation $W = g\,v / \|v\|$, computed once per solve.

    Args:
        module: layer that owns the weight; changed in place.
        name: of the weight.
        dim: dimension of the output channels, each of which has its own $g$.

    Returns:
        The same module.

    Raises:
        ValueError: the weight is parametrized already, say capped.
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"weight_norm({type(module).__name__.removeprefix('Parametrized')}): its {name} is parametrized already, "
            "and weight normalisation would undo a cap; use one of them"
        )
    parametrize.register_parametrization(module, name, _WeightNorm(dim))
    return module


class _WeightNorm(nn.Module):
    """The formula itself: the fused kernel of `torch.nn.utils` has wrong second derivatives (seen in torch 2.13)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, self.dim))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.norm_except_dim(weight, 2, self.dim), weight


def spectral_norm(module: nn.Module, name: str = "weight", n_power_iterations: int = 1) -> nn.Module:
    r"""Divide a weight, as a matrix, by its largest singular value; computed once per solve.

    Power iterations are made in training mode, at each use of the weight, that is, once per solve. For convolutions
    this is the norm of the reshaped kernel, not that of the operator.

    Args:
        module: layer that owns the weight; changed in place.
        name: of the weight.
        n_power_iterations: per use of the weight.

    Returns:
        The same module.
    """
    return parametrizations.spectral_norm(module, name=name, n_power_iterations=n_power_iterations)
