"""What a model is trained for: a task builds the model and the objective that turns a batch into a loss."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.core.solution import Solution
from equipoise.models import build
from equipoise.solvers import Solver

if TYPE_CHECKING:
    from equipoise.train.config import TrainConfig
    from equipoise.train.data import Splits

COMMON = ("count", "loss", "steps", "converged", "residual", "penalty")
SCORES = {  # all that a task may score, as people read it
    "accuracy": "accuracy",
    "robust_accuracy": "accuracy under attack",
    "psnr": "PSNR in dB",
}


class Moment(NamedTuple):
    """Where in the training a batch is taken; a tuple, which Fabric's precision plugins can pass on.

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
    def forward(self, images: Tensor, labels: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`.
            moment: place in the training; None in evaluation.

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
    """What a model is trained for.

    Attributes:
        scores: names of the scores of an evaluation, of those in `SCORES`; the first is the one that counts.
    """

    scores: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def check(self, config: TrainConfig) -> None:
        """Refuse a configuration that does not fit the task.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """

    @abc.abstractmethod
    def forward_solver(self, config: TrainConfig) -> Solver:
        """The solver of an equilibrium alone, in evaluation."""

    @abc.abstractmethod
    def objective(self, model: Any, config: TrainConfig) -> Objective:
        """The objective of a model."""

    def build(self, config: TrainConfig) -> Any:
        """A model with weights drawn at random."""
        return build(config.model, solver=config.solver, gradient=config.gradient)

    def check_data(self, config: TrainConfig, splits: Splits) -> None:
        """Refuse data that does not fit the task, once it is read.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        if len(splits.train) < config.batch_size:
            raise ValueError(
                f"batch_size={config.batch_size} exceeds the {len(splits.train)} training images; lower it"
            )


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
