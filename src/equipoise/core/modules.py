"""Modules inside a cell: layers that a map must know, and those that it refuses."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

INTERNAL = set(vars(nn.Module()))  # names of attributes that every module has


class SeededLayer(nn.Module):
    """Base of layers with noise inside a map: the noise is a function of `seeds`, which a solve holds fixed.

    A map draws one seed per sample and solve. It selects the seeds with the rows and keeps them for the backward pass,
    so the map of a sample is the same at every evaluation.
    """

    seeds: Tensor | None = None  # (b,) int64 while a map evaluates, None otherwise


def check_modules(f: nn.Module) -> tuple[list[SeededLayer], list[nn.Module], list[Tensor]]:
    """Raise for layers that make a map depend on the batch or change between evaluations.

    Returns:
        The seeded layers in training mode, the parametrizations, and tensors that require gradients, held as buffers
        or attributes.
    """
    seeded: list[SeededLayer] = []
    parametrizations: list[nn.Module] = []
    attributes: list[Tensor] = []
    for name, module in f.named_modules():
        hooks = module._forward_pre_hooks.values()
        if any(isinstance(hook, SpectralNorm) for hook in hooks) and module.training:
            raise ValueError(
                f"the cell's {name or 'module'} has the old torch.nn.utils.spectral_norm, which changes the weight at "
                "each evaluation: use torch.nn.utils.parametrizations.spectral_norm"
            )
        computed = {getattr(hook, "name", None) for hook in hooks}  # by weight_norm, from parameters, at each call
        values = [value for key, value in vars(module).items() if key not in INTERNAL | computed]
        for value in (*module._buffers.values(), *values):
            attributes += [
                t for t in _tensors(value) if t.requires_grad and not any(t is other for other in attributes)
            ]
        if isinstance(module, SeededLayer):
            if module.training:
                seeded.append(module)
        elif isinstance(module, parametrize.ParametrizationList):
            parametrizations += module.modules()
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or module.running_mean is None:
                raise ValueError(
                    f"the cell's {name or 'module'} is {type(module).__name__} with batch statistics: a sample's "
                    "equilibrium would depend on its batch mates; use GroupNorm inside the cell, or call .eval() on it"
                )
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"the cell's {name or 'module'} is {type(module).__name__}(p={module.p}), which changes from one "
                "evaluation to the next: use equipoise.nn.VariationalDropout, whose mask is fixed during a solve"
            )
    return seeded, parametrizations, attributes


def _tensors(value: Any) -> list[Tensor]:
    """List the tensors that a value is, or holds as a list, tuple or dict."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
