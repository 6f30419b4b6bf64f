"""Tasks: a task builds the model, and the objective that turns a batch into a loss."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.core.solution import Solution
from equipoise.data.base import Data, Splits
from equipoise.gradients import Gradient
from equipoise.solvers import Solver
from equipoise.train.model import ModelConfig
from equipoise.train.pretraining import Pretraining

COMMON = ("count", "loss", "steps", "converged", "residual", "penalty")
SCORES = {  # all that a task may score, as people read it
    "accuracy": "accuracy",
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


class Objective(nn.Module, abc.ABC):
    """A module that turns a batch into a loss and into sums for the log.

    Args:
        model: what is trained.
    """

    model: Any

    @property
    @abc.abstractmethod
    def scores(self) -> tuple[str, ...]:
        """Names, of those in `SCORES`, of what is summed beside the common sums in the present mode."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sums, in their order."""
        return (*COMMON, *self.scores)

    @abc.abstractmethod
    def forward(self, images: Tensor, labels: Tensor, info: StepInfo | None = None) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`.
            info: position in the training; None in evaluation.

        Returns:
            Scalar loss to differentiate, and the sums over the batch named in `names`, float64.
        """

    def sums(self, loss: Tensor, solution: Solution[Any], scores: dict[str, Tensor], penalty: Tensor) -> Tensor:
        """The sums of a batch, in the order of `names`.

        Args:
            loss: mean over the batch.
            solution: of the batch.
            scores: sum of each score.
            penalty: mean over the batch of what is added to the loss.
        """
        count = torch.as_tensor(len(solution.status), device=loss.device)
        common = (
            count,
            loss * count,
            solution.num_steps.sum(),
            solution.converged.sum(),
            relative_residual(solution).sum(),
            penalty * count,
        )
        values = (*common, *(scores[name] for name in self.scores))
        return torch.stack([value.detach().to(torch.float64) for value in values])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Purpose of the training: model, loss and scores.

    Attributes:
        scores: names of the scores of an evaluation, of those in `SCORES`; the first is the one that counts.
    """

    scores: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        """Check that model, data and gradient fit the task.

        Raises:
            ValueError: one does not; the message has the field, its value and the remedy.
        """

    @abc.abstractmethod
    def forward_solver(self, solver: Solver, eval_solver: Solver | None) -> Solver:
        """Return the solver of an equilibrium alone, in evaluation.

        Args:
            solver: of the configuration.
            eval_solver: likewise.
        """

    @abc.abstractmethod
    def objective(
        self, model: Any, *, data: Data, solver: Solver, gradient: Gradient, eval_solver: Solver | None
    ) -> Objective:
        """Return the objective of a model.

        Args:
            model: as `build` returns it.
            data: of the configuration, as all that follow.
            solver: in training.
            gradient: of what it finds.
            eval_solver: in evaluation; None: `solver`.
        """

    def build(self, model: ModelConfig, solver: Solver, gradient: Gradient) -> Any:
        """Build the model, with weights drawn at random."""
        return model.build(solver=solver, gradient=gradient)

    def check_data(self, model: ModelConfig, splits: Splits) -> None:  # noqa: B027, many tasks check nothing
        """Check that the data, once read, fits model and task.

        Raises:
            ValueError: it does not; the message has the field, its value and the remedy.
        """

    def solve(self, model: Any, samples: Tensor) -> Solution[Any] | None:
        """Return the equilibria of samples, at which the norm of the Jacobian is measured; None: it is not.

        Args:
            model: as `build` returns it.
            samples: a batch as `Data.prepare` returns it.
        """
        return None

    @property
    def pretraining(self) -> Pretraining:
        """Fixed-depth steps at the beginning; a subclass may have a field of this name."""
        return Pretraining()


def relative_residual(solution: Solution[Any]) -> Tensor:
    """`(B,)` norms of f(z) - z over those of z, at the answer; 0 where no evaluation was finite."""
    size = (
        torch.stack([part.detach().float().flatten(1).square().sum(1) for part in _tensors(solution.value)])
        .sum(0)
        .sqrt()
    )
    ratio = solution.residual.float() / size.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(ratio.isfinite(), ratio, 0.0)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a state; that of `optimize_inputs` holds what may be containers."""
    if isinstance(state, Tensor):
        yield state
        return
    for part in state.values() if isinstance(state, Mapping) else state:
        yield from _tensors(part)
