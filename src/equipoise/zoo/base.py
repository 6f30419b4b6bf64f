"""Bases of the zoo: configurations of models of square images, and tasks that optimize inputs of the equilibrium."""

import dataclasses

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.data import Data
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs import InputOptimizer, Nested, UpdateScheme
from equipoise.solvers import Anderson, Solver
from equipoise.train import ModelConfig, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageModelConfig(ModelConfig):
    """Shape of a model of images; a subclass adds its own fields.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: int
    """Side of the square images in pixels."""
    image_channels: int = 3
    """Channels of the images: 3 for color, 1 for grayscale."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.", image_size=">= 1", image_channels=">= 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of an image."""
        return (self.image_channels, self.image_size, self.image_size)


def check_shapes(model: ImageModelConfig, data: Data) -> None:
    """Check that the data has images of the model's shape.

    Raises:
        ValueError: it has others.
    """
    if data.shape != model.image_shape:
        raise ValueError(
            f"the data has images of shape {data.shape}, the model takes {model.image_shape}; set model.image_size and "
            "model.image_channels, or data.image_size"
        )


def check_kinds(task: Task, model: ModelConfig, model_kind: type, data: Data, data_kind: type) -> None:
    """Check that a task has a model and data of its own kinds.

    Raises:
        ValueError: one is of another kind.
    """
    for value, kind, field in ((model, model_kind, "model"), (data, data_kind, "data")):
        if not isinstance(value, kind):
            raise ValueError(
                f"the task {type(task).__name__} needs a {field} of kind {kind.__name__}, and {type(value).__name__} "
                "is none"
            )


def precise(logits: Tensor) -> Tensor:
    """Return logits in single precision at least, for a loss."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputTask(Task):
    """Base of tasks that optimize inputs: solver and gradient of the run are those of state, adjoint and input.

    Raises:
        ValueError: `step_size` is not positive.
    """

    step_size: float | None = None
    """Step of the inputs in a round; None: measured for each sample."""
    scheme: UpdateScheme = Nested(steps=2)
    """Steps of state and adjoint between two steps of the inputs."""
    equilibrium_solver: Solver = Anderson(max_steps=40, rtol=1e-4)
    """Finds the equilibrium alone, at given inputs."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.", step_size="> 0, or None to measure it")

    def input_optimizer(self, solver: Solver, gradient: Gradient = Implicit()) -> InputOptimizer:
        """Return the method with the solver and gradient of a run, without verification."""
        return InputOptimizer(
            solver=solver, scheme=self.scheme, step_size=self.step_size, gradient=gradient, verify_solver=None
        )
