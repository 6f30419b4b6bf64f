"""Optimizers and the learning-rate schedule."""

import abc
import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import nn

from equipoise.core.checks import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """Update rule of the parameters."""

    lr: float = 1e-3
    """Learning rate at the end of the warm-up, from which the cosine descends."""
    weight_decay: float = 0.0
    """Weight decay."""

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer.", lr="> 0", weight_decay=">= 0")

    @abc.abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the torch optimizer of parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam; its weight decay is the L2 penalty."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov and self.momentum > 0,
            weight_decay=self.weight_decay,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Learning-rate schedule: linear warm-up, then a cosine, both by step."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    final_lr: float = 1e-6
    """Learning rate at the end of the run."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule.", warmup_steps=">= 0", final_lr=">= 0")

    def lr(self, step: int, total: int, peak: float) -> float:
        """Return the learning rate of step number `step`, from zero, of a run of `total` steps."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.final_lr + (peak - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
