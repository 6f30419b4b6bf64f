"""Interfaces of models and tasks: the loss of a batch, its scores, and the checks that model and data fit."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.core.solution import Solution
from equipoise.data import Data, Splits
from equipoise.gradients import Gradient, Implicit
from equipoise.solvers import Anderson, Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Shape of an equilibrium model; it builds the model.

    A model is a module with this configuration as `config` and its equilibrium, a `DEQ`, as `deq`.
    """

    @abc.abstractmethod
    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> Any:
        """Build the model, with weights drawn at random.

        Args:
            solver: finds the equilibrium.
            gradient: differentiates it.
        """

    @property
    @abc.abstractmethod
    def state_size(self) -> int:
        """Number of elements `D` of one sample's state."""

    @property
    def guesses(self) -> bool:
        """Whether a solve begins at a guess of the equilibrium."""
        return False

    def lipschitz_limit(self, *, training: bool) -> float | None:
        """Largest Lipschitz constant that the layers of the map allow, whatever the weights; None: any.

        Args:
            training: count dropout.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """First steps of training, with the map applied a fixed number of times and plain backpropagation."""

    steps: int = 0
    """Optimizer steps of this kind; 0: none."""
    depth: int = 8
    """Applications of the map."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.pretraining.", steps=">= 0", depth=">= 1")


COMMON = ("count", "loss", "steps", "converged", "residual", "penalty")
SCORES = {  # titles of all scores
    "accuracy": "accuracy",
    "exact": "samples all right",
    "robust_accuracy": "accuracy under attack",
    "psnr": "PSNR in dB",
}


class StepInfo(NamedTuple):
    """Position of a batch in the training; a tuple, which Fabric's precision plugins can pass on.

    Args:
        step: number of the optimizer step, from zero.
        epoch: number of the epoch, from zero.
        seed: of the run.
    """

    step: int
    epoch: int
    seed: int


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """Result of a task on one batch.

    Args:
        loss: mean of the loss over the batch, without penalties.
        solution: the equilibria.
        scores: sum over the batch of each score.
        penalty: mean over the batch of what is added to the loss.
    """

    loss: Tensor
    solution: Solution[Any]
    scores: dict[str, Tensor]
    penalty: Tensor | float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Purpose of a training: loss, scores, checks.

    Attributes:
        scores: names in `SCORES` of the scores in evaluation; the first is the main one.
        train_scores: those in training; None: the same.
    """

    scores: ClassVar[tuple[str, ...]]
    train_scores: ClassVar[tuple[str, ...] | None] = None

    @abc.abstractmethod
    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        """Check that model, data and gradient fit the task.

        Raises:
            ValueError: one does not; the message has the field, its value and the remedy.
        """

    @abc.abstractmethod
    def loss(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> BatchResult:
        """Return loss and scores of a batch.

        Args:
            objective: model, solvers and gradient.
            images: `(B, ...)` as `Data.prepare` returns them.
            labels: `(B, ...)`.
            info: position in the training; None in evaluation.
        """

    def check_data(self, model: ModelConfig, splits: Splits) -> None:  # noqa: B027, many tasks check nothing
        """Check that the data, once read, fits model and task.

        Raises:
            ValueError: it does not; the message has the field, its value and the remedy.
        """

    def solve(self, model: Any, samples: Tensor) -> Solution[Any] | None:
        """Return the equilibria of samples, at which the norm of the Jacobian is measured; None: it is not.

        Args:
            model: of the task.
            samples: a batch as `Data.prepare` returns it.
        """
        return None

    @property
    def equilibrium_solver(self) -> Solver | None:
        """Solver of the model alone, where the solver of the run optimizes inputs; a subclass may have such a field."""
        return None

    @property
    def pretraining(self) -> Pretraining:
        """Fixed-depth steps at the beginning; a subclass may have such a field."""
        return Pretraining()


class Objective(nn.Module):
    """Module from a batch to a loss, and to sums for the log.

    Args:
        model: to train.
        task: computes the loss.
        data: of the run; None where the task does not read it.
        solver: of the run; None: the model's.
        gradient: of the run; None: the model's.
        eval_solver: replaces `solver` in evaluation; None: the same.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        *,
        data: Data | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        eval_solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task, self.data = model, task, data
        self.solver, self.eval_solver = solver or model.deq.solver, eval_solver
        self.gradient = gradient or model.deq.gradient

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sums in the present mode, in their order."""
        return (*COMMON, *((self.training and self.task.train_scores) or self.task.scores))

    def solver_at(self, info: StepInfo | None) -> Solver:
        """Return the solver of a batch."""
        return (info is None and self.eval_solver) or self.solver

    def forward(self, images: Tensor, labels: Tensor, info: StepInfo | None = None) -> tuple[Tensor, Tensor]:
        """Return loss and sums of a batch.

        Args:
            images: `(B, ...)`.
            labels: `(B, ...)`.
            info: position in the training; None in evaluation.

        Returns:
            Scalar loss to differentiate, and the sums over the batch named in `names`, float64.
        """
        found = self.task.loss(self, images, labels, info)
        solution, count = found.solution, len(found.solution.status)
        sums = {
            "count": count,
            "loss": found.loss * count,
            "steps": solution.num_steps.sum(),
            "converged": solution.converged.sum(),
            "residual": relative_residual(solution).sum(),
            "penalty": found.penalty * count,
            **found.scores,
        }
        values = [torch.as_tensor(sums[name], device=found.loss.device).detach().double() for name in self.names]
        return found.loss + found.penalty, torch.stack(values)


def relative_residual(solution: Solution[Any]) -> Tensor:
    """`(B,)` norms of f(z) - z over those of z, at the solution; 0 where no evaluation was finite."""
    parts = [part.detach().float().flatten(1).square().sum(1) for part in _tensors(solution.value)]
    size = torch.stack(parts).sum(0).sqrt()
    ratio = solution.residual.float() / size.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(ratio.isfinite(), ratio, 0.0)


def _tensors(state: Any) -> Iterator[Tensor]:
    """Tensors of a state; that of `optimize_inputs` may be nested."""
    if isinstance(state, Tensor):
        yield state
        return
    for part in state.values() if isinstance(state, Mapping) else state:
        yield from _tensors(part)
