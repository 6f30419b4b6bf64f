"""Lipschitz constants of layers and chains of layers, in the Euclidean norm of one sample."""

from __future__ import annotations

import math
from typing import TypeGuard, TypeVar

import torch
from torch import nn

from equipoise.nn.dropout import VariationalDropout

M = TypeVar("M", bound=nn.Module)


NONEXPANSIVE = (
    nn.Identity,
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Flatten,
)


class UnknownConstant(ValueError):
    """A layer that has no Lipschitz constant, or none that is known.

    Args:
        module: the layer.
        reason: why, and what to use in its place.
    """

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(f"{type(module).__name__.removeprefix('Parametrized')}: {reason}")
        self.module = module
        self.reason = reason


def lipschitz_bound(module: nn.Module, *, training: bool = False) -> float:
    """Lipschitz constant of a layer or chain of layers, with its present weights.

    Args:
        module: one of the layers of this file, a linear layer, a non-expansive activation, `VariationalDropout`, a
            `Sequential` of these, or any module with a method `lipschitz_bound(training)`.
        training: count dropout as it is in training, where what is kept is enlarged.

    Returns:
        An upper bound of the constant, for images up to the size that the layer was made for.

    Raises:
        UnknownConstant: a layer is of another kind, or has no finite constant, or inherits one that was proved for
            another `forward`.

    Example:
        >>> import torch
        >>> from equipoise.contraction import MeanOnlyGroupNorm, ScaledReLU, lipschitz_bound
        >>> lipschitz_bound(torch.nn.Sequential(MeanOnlyGroupNorm(2, 8), ScaledReLU(0.4)))
        0.4
    """
    own = getattr(module, "lipschitz_bound", None)
    if own is not None:
        require_own(module, "lipschitz_bound")
        return float(own(training))
    if _plain(module, nn.Sequential):
        return math.prod(lipschitz_bound(layer, training=training) for layer in module)
    if _plain(module, *NONEXPANSIVE):
        return 1.0
    if _plain(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if _plain(module, VariationalDropout):
        return 1 / (1 - module.p) if training else 1.0
    if _plain(module, nn.Linear):
        return float(torch.linalg.matrix_norm(module.weight.detach().double(), ord=2))
    if isinstance(module, nn.modules.conv._ConvNd):
        raise UnknownConstant(module, "its norm is not bounded, and depends on the size of the image; use CappedConv2d")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise UnknownConstant(module, "batch statistics have no place in a map; use MeanOnlyGroupNorm")
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        raise UnknownConstant(
            module, "a division by the standard deviation has no useful constant; use MeanOnlyGroupNorm"
        )
    raise UnknownConstant(
        module, "no Lipschitz constant is known; use the layers of equipoise.nn, or give it lipschitz_bound(training)"
    )


def require_own(module: nn.Module, name: str) -> None:
    """Refuse a bound that was proved for the forward pass of a base class.

    Args:
        module: that has the method.
        name: of the method that bounds `forward`.

    Raises:
        UnknownConstant: a subclass has overridden `forward` since.
    """
    for kind in type(module).__mro__:
        if name in vars(kind) or kind is nn.Module:  # the latter: a wrapper passes on the method of what it wraps
            return
        if "forward" in vars(kind):
            raise UnknownConstant(module, f"its forward is its own and {name} inherited; give it {name}(training), too")


def _plain(module: nn.Module, *kinds: type[M]) -> TypeGuard[M]:
    """Whether a module is of one of these kinds and computes what they do: a subclass may add a skip connection."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
