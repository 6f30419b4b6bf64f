"""The complete configuration of a training run."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from equipoise.gradients import Gradient, Implicit
from equipoise.models import ModelConfig
from equipoise.solvers import Anderson, Solver
from equipoise.train.data import ImageData
from equipoise.train.penalties import JacobianPenalty, Pretraining, SkipPenalty
from equipoise.train.tasks import Classify, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """How parameters follow their gradients."""

    lr: float = 1e-3
    """Learning rate at the end of the warm-up, from which the cosine descends."""
    weight_decay: float = 0.0
    """Weight decay."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr={self.lr!r}: must be > 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay!r}: must be >= 0")

    @abc.abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer of some parameters."""


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
class Schedule:
    """Learning rate over the run: linear warm-up, then a cosine, both by step."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    final_lr: float = 1e-6
    """Learning rate at the end of the run."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps!r}: must be >= 0")
        if not self.final_lr >= 0:
            raise ValueError(f"schedule.final_lr={self.final_lr!r}: must be >= 0")

    def lr(self, step: int, total: int, peak: float) -> float:
        """Learning rate of step number `step`, counted from zero, of a run of `total` steps."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.final_lr + (peak - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete training run.

    Everything that decides the result is here; where the run is kept is an argument of `fit`.

    Raises:
        ValueError: a field is out of range, or two fields do not fit each other.

    Example:
        >>> import dataclasses
        >>> from equipoise.train import recipes
        >>> config = dataclasses.replace(recipes.mdeq_digits(), seed=1, epochs=2)
        >>> config.data.shape
        (1, 8, 8)
    """

    name: str = "custom"
    """Name of the recipe; new run folders are called after it."""
    data: ImageData
    """Images and labels: source, split, augmentation."""
    model: ModelConfig
    """Shape of the model."""
    task: Task = Classify()
    """What the model is trained for."""
    solver: Solver = Anderson()
    """Finds the equilibrium; in tasks that optimize inputs, state, adjoint and input together."""
    gradient: Gradient = Implicit()
    """Differentiates what the solver found."""
    eval_solver: Solver | None = None
    """Takes the solver's place in evaluation; None: the same solver."""
    pretraining: Pretraining = Pretraining()
    """Fixed-depth steps at the beginning."""
    penalty: JacobianPenalty = JacobianPenalty()
    """Jacobian penalty."""
    skip: SkipPenalty = SkipPenalty()
    """Penalty on the distance of the equilibrium from the start of its solve."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    optimizer: Optimizer = Adam()
    """Optimizer."""
    schedule: Schedule = Schedule()
    """Learning rate over the run."""
    epochs: int = 10
    """Passes over the training images."""
    stop_after: int | None = None
    """Optimizer steps after which training ends if the epochs are not over; the schedule is shortened accordingly."""
    batch_size: int = 64
    """Images per optimizer step, over all devices together."""
    eval_batch_size: int = 250
    """Images per evaluation batch, over all devices together."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None: not clipped."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights that is evaluated and saved; None: no average."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, augmentation, dropout and probes."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Arithmetic: 32-bit, bfloat16 inside the map with 32-bit weights, or 64-bit."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int = 1
    """Devices per machine; under `torchrun`, which knows them, left alone."""
    num_nodes: int = 1
    """Machines; under `torchrun`, which knows them, left alone."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices share the work."""
    channels_last: bool = False
    """Whether convolutions keep their channels last in memory."""
    compile_cell: bool = False
    """Whether the cell is compiled by `torch.compile`."""
    deterministic: bool = False
    """Whether only deterministic kernels are used on devices; the CPU's always are."""
    log_every: int = 20
    """Steps between two lines of the log; on devices also between two readings of the loss."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints within an epoch; None: one at the end of each epoch."""
    tensorboard: bool = True
    """Whether TensorBoard events are written."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "devices", "num_nodes", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be >= 1")
        for name in ("stop_after", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: must be >= 1, or None")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing!r}: must lie in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm!r}: must be > 0, or None for no clipping")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r}: must lie in [0, 1), or None for no average")
        expected = (self.model.image_channels, self.model.image_size, self.model.image_size)
        if self.data.shape != expected:
            raise ValueError(
                f"the data has images of shape {self.data.shape}, the model takes {expected}; set model.image_size and "
                "model.image_channels, or data.image_size"
            )
        if self.gradient.uses_inverse and not self.solver.keeps_inverse:
            raise ValueError(
                f"gradient {type(self.gradient).__name__} reads the inverse estimate of the forward solver, and "
                f"{type(self.solver).__name__} keeps none; use the solver Broyden, or the gradient Implicit"
            )
        self.task.check(self)
