"""Moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList


class Average:
    """Exponential moving average of a model's weights and statistics, faster in the first steps.

    Buffers of parametrizations, such as the vectors of power iterations, are copied: their mean is meaningless. This is
    why torch's `AveragedModel`, which averages all buffers or none, does not serve.

    Args:
        model: whose state is averaged.
        decay: of the average once it has warmed up.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.copied = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, ParametrizationList)
            for name, _ in module.named_buffers()
        }

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the present state of the model."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name not in self.copied:
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Exchange the state of the model and the average."""
        for name, value in model.state_dict().items():
            kept = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the average to that of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])
