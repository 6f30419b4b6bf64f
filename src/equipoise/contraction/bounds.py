"""Lipschitz constants of layers and chains of layers, in the Euclidean norm of one sample."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from equipoise.nn.dropout import VariationalDropout

# Constants of torch's layers and of dropout, as functions of the layer and of `training`.
BOUNDS: dict[type[nn.Module], Callable[[Any, bool], float]] = {
    nn.Sequential: lambda chain, training: math.prod(lipschitz_bound(layer, training=training) for layer in chain),
    nn.LeakyReLU: lambda layer, training: max(1.0, abs(layer.negative_slope)),
    nn.Linear: lambda layer, training: float(torch.linalg.matrix_norm(layer.weight.detach().double(), ord=2)),
    VariationalDropout: lambda layer, training: 1 / (1 - layer.p) if training else 1.0,
    **dict.fromkeys(
        (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.PixelShuffle, nn.PixelUnshuffle, nn.Flatten),
        lambda layer, training: 1.0,
    ),
}
# Reason and remedy for layers without a useful constant; the last entry takes every module.
UNBOUNDED: dict[type[nn.Module] | tuple[type[nn.Module], ...], str] = {
    nn.modules.conv._ConvNd: "its norm is not bounded, and depends on the size of the image; use CappedConv2d",
    nn.modules.batchnorm._BatchNorm: "batch statistics make a sample depend on its batch; use MeanOnlyGroupNorm",
    (nn.GroupNorm, nn.LayerNorm): "a division by the standard deviation has no useful constant; use MeanOnlyGroupNorm",
    nn.Module: "no Lipschitz constant is known; use layers of equipoise.contraction, or define "
    "lipschitz_bound(training)",
}


class UnknownConstant(ValueError):
    """Error for a layer without a Lipschitz constant, or without a known one.

    Args:
        module: the layer.
        reason: reason and remedy.
    """

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(f"{type(module).__name__.removeprefix('Parametrized')}: {reason}")
        self.module = module
        self.reason = reason


def lipschitz_bound(module: nn.Module, *, training: bool = False) -> float:
    """Bound the Lipschitz constant of a layer or chain of layers at its present weights.

    Args:
        module: a layer of `equipoise.contraction`, a linear layer, a non-expansive activation, `VariationalDropout`, a
            `Sequential` of these, or any module with a method `lipschitz_bound(training)`.
        training: count dropout as in training, which scales up the kept values.

    Returns:
        An upper bound, valid for images up to the size that the layer was built for.

    Raises:
        UnknownConstant: a layer of another kind, without a finite constant, or with a constant inherited from a class
            whose `forward` it overrides.

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
    for kind, bound in BOUNDS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:  # a subclass may add a skip connection
            return bound(module, training)
    raise UnknownConstant(module, next(reason for kinds, reason in UNBOUNDED.items() if isinstance(module, kinds)))


def require_own(module: nn.Module, name: str) -> None:
    """Check that a bound belongs to the module's own forward pass.

    Args:
        module: has the method.
        name: name of the method that bounds `forward`.

    Raises:
        UnknownConstant: a subclass overrides `forward` and inherits the bound.
    """
    # A wrapper, such as a compiled module, defines neither: it forwards the method of the wrapped module.
    kind = next((kind for kind in type(module).__mro__ if {name, "forward"} & vars(kind).keys()), nn.Module)
    if kind is not nn.Module and name not in vars(kind):
        raise UnknownConstant(module, f"it overrides forward and inherits {name}; define {name}(training), too")


def require_one_parametrization(module: nn.Module) -> None:
    """Check that no second parametrization of the weight undoes a bound.

    Raises:
        UnknownConstant: there is another one.
    """
    if parametrize.is_parametrized(module, "weight") and len(module.parametrizations["weight"]) > 1:  # type: ignore[index]
        raise UnknownConstant(module, "another parametrization, such as weight_norm, undoes its bound; remove it")
