"""Complete configuration of a training run."""

import dataclasses
from typing import Any, Literal

from equipoise.core.checks import check_ranges
from equipoise.data import Data
from equipoise.gradients import Gradient, Implicit
from equipoise.solvers import Anderson, Solver
from equipoise.train.model import ModelConfig
from equipoise.train.optim import Adam, LRSchedule, Optimizer
from equipoise.train.task import Objective, Task


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
    """Images and labels: source, split, augmentation."""
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
        counts = "epochs", "batch_size", "eval_batch_size", "devices", "num_nodes", "log_every"
        check_ranges(self, **dict.fromkeys(counts, ">= 1"))
        check_ranges(
            self,
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
