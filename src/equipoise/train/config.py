"""Complete configuration of a training run, with its optimizer and learning-rate schedule."""

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from equipoise.core.checks import check_ranges
from equipoise.data import Data
from equipoise.gradients import Gradient, Implicit
from equipoise.solvers import Anderson, Solver
from equipoise.train.task import ModelConfig, Objective, Task


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Configuration of a training run.

    It determines the result; the folder of the run is an argument of `fit`.

    Raises:
        ValueError: a field is out of range, or two fields do not fit each other.

    Example:
        >>> import dataclasses
        >>> from equipoise import zoo
        >>> config = dataclasses.replace(zoo.mdeq_digits(), seed=1, epochs=2)
        >>> config.data.shape
        (1, 8, 8)
    """

    name: str = "custom"
    """Name of the recipe, and of new run folders."""
    data: Data
    """Samples and labels: source, split, augmentation."""
    model: ModelConfig
    """Shape of the model."""
    task: Task
    """Loss and scores."""
    solver: Solver = Anderson()
    """Finds the equilibrium; in tasks that optimize inputs, state, adjoint and input together."""
    gradient: Gradient = Implicit()
    """Differentiates the result of the solver."""
    eval_solver: Solver | None = None
    """Replaces the solver in evaluation; None: the same solver."""
    optimizer: Optimizer = Adam()
    """Optimizer."""
    schedule: LRSchedule = LRSchedule()
    """Learning rate over the run."""
    epochs: int = 10
    """Passes over the training samples."""
    stop_after: int | None = None
    """Optimizer steps after which training ends if the epochs are not over; the schedule is shortened accordingly."""
    batch_size: int = 64
    """Samples per optimizer step, over all devices together."""
    eval_batch_size: int = 250
    """Samples per evaluation batch, over all devices together."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None: not clipped."""
    ema_decay: float | None = None
    """Decay of the moving average of the weights that is evaluated and saved; None: no average."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples, augmentation, dropout and probes."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Arithmetic: 32-bit, bfloat16 inside the map with 32-bit weights, or 64-bit."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int = 1
    """Devices per machine; `torchrun` overrides it."""
    num_nodes: int = 1
    """Machines; `torchrun` overrides it."""
    strategy: Literal["auto", "ddp"] = "auto"
    """Strategy for several devices."""
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
        check_ranges(
            self,
            **dict.fromkeys(("epochs", "batch_size", "eval_batch_size", "devices", "num_nodes", "log_every"), ">= 1"),
            stop_after=">= 1, or None",
            checkpoint_every=">= 1, or None",
            clip_norm="> 0, or None for no clipping",
            ema_decay=">= 0 and < 1, or None for no average",
        )
        if self.channels_last and not self.data.image_batches:
            raise ValueError(
                f"channels_last=true needs batches of images, and {type(self.data).__name__} has others; set it false"
            )
        if self.gradient.uses_inverse and not self.solver.keeps_inverse:
            raise ValueError(
                f"gradient {type(self.gradient).__name__} reads the inverse estimate of the forward solver, and "
                f"{type(self.solver).__name__} keeps none; use the solver Broyden, or the gradient Implicit"
            )
        if self.gradient.replaces_solver and self.solver.max_steps > 0:
            raise ValueError(
                f"gradient {type(self.gradient).__name__} iterates by itself, and the solver would be idle; use the "
                "solver Picard with solver.max_steps=0, and eval_solver to solve to a tolerance in evaluation"
            )
        self.task.check(self.model, self.data, self.gradient)

    @property
    def forward_solver(self) -> Solver:
        """Solver of the model alone, in evaluation."""
        return self.task.equilibrium_solver or self.eval_solver or self.solver

    def build(self) -> Any:
        """Build the model, with weights drawn at random."""
        if self.task.equilibrium_solver is not None:
            return self.model.build(solver=self.task.equilibrium_solver)
        return self.model.build(solver=self.solver, gradient=self.gradient)

    def objective(self, model: Any) -> Objective:
        """Return the objective of a model."""
        return Objective(
            model,
            self.task,
            data=self.data,
            solver=self.solver,
            gradient=self.gradient,
            eval_solver=self.eval_solver,
        )
