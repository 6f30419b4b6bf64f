"""Layers that are safe inside a fixed point."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


def weight_norm(module: nn.Module, name: str = "weight", dim: int = 0) -> nn.Module:
    r"""Weight normalization $W = g\,v / \|v\|$, computed once per solve.

    Args:
        module: layer that owns the weight; changed in place.
        name: of the weight.
        dim: dimension of the output channels, each of which has its own $g$.

    Returns:
        The same module.

    Raises:
        ValueError: the weight is already parametrized, say capped.
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"weight_norm({type(module).__name__.removeprefix('Parametrized')}): its {name} is parametrized already, "
            "and weight normalization would undo a cap; use one of them"
        )
    parametrize.register_parametrization(module, name, _WeightNorm(dim))
    return module


class _WeightNorm(nn.Module):
    """Weight normalization by its formula: the fused kernel of torch 2.13 has wrong second derivatives."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, self.dim))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.norm_except_dim(weight, 2, self.dim), weight


def spectral_norm(module: nn.Module, name: str = "weight", n_power_iterations: int = 1) -> nn.Module:
    r"""Divide a weight, as a matrix, by its largest singular value; computed once per solve.

    In training mode each use of the weight, that is, each solve, makes power iterations. For convolutions this is the
    norm of the reshaped kernel, not that of the operator.

    Args:
        module: layer that owns the weight; changed in place.
        name: of the weight.
        n_power_iterations: per use of the weight.

    Returns:
        The same module.
    """
    return parametrizations.spectral_norm(module, name=name, n_power_iterations=n_power_iterations)
