"""Classification of images by an equilibrium."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.core.solution import Solution
from equipoise.gradients import Unrolled
from equipoise.models import ClassifierConfig, EquilibriumClassifier
from equipoise.nn import frozen, jacobian_penalty, skip_penalty
from equipoise.solvers import AdjointBroyden, Picard, Solver
from equipoise.train.penalties import JacobianPenalty, Pretraining, SkipPenalty
from equipoise.train.tasks.base import Moment, Objective, Task

if TYPE_CHECKING:
    from equipoise.train.config import TrainConfig
    from equipoise.train.data import Splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """Name the class of an image."""

    scores: ClassVar[tuple[str, ...]] = ("accuracy",)

    def check(self, config: TrainConfig) -> None:
        model = config.model
        if not isinstance(model, ClassifierConfig):
            raise ValueError(f"the task Classify needs a classifier, and {type(model).__name__} is none")
        if config.skip.weight and not (model.predictor or model.explicit_steps):
            raise ValueError(
                f"skip.weight={config.skip.weight!r} would draw the equilibrium to zeros, where its solve begins; set "
                "model.predictor=true (Skip DEQ) or model.explicit_steps=1 (Skip Reg DEQ)"
            )

    def check_data(self, config: TrainConfig, splits: Splits) -> None:
        super().check_data(config, splits)
        assert isinstance(config.model, ClassifierConfig)
        if len(splits.classes) != config.model.num_classes:
            raise ValueError(
                f"the data has {len(splits.classes)} classes and model.num_classes={config.model.num_classes}; set it "
                f"to {len(splits.classes)}"
            )

    def forward_solver(self, config: TrainConfig) -> Solver:
        return config.eval_solver or config.solver

    def objective(self, model: Any, config: TrainConfig) -> Objective:
        return Classification(
            model,
            label_smoothing=config.label_smoothing,
            penalty=config.penalty,
            skip=config.skip,
            pretraining=config.pretraining,
            eval_solver=config.eval_solver,
        )


class Classification(Objective):
    r"""Cross-entropy of a classifier, with the penalties and the fixed-depth steps of equilibrium training.

    $$ L = \mathrm{CE}(\mathrm{model}(x), y) + \gamma \, \frac{1}{D} \|J(z^*)\|_F^2
       + \lambda \operatorname{mean} |z^* - z_0| $$

    A solver that is aware of the outer problem, `AdjointBroyden` with a `cadence`, is told the cross-entropy of each
    sample while it solves, in training alone. The head is frozen then: its statistics and random numbers are untouched.

    Args:
        model: classifier that tells its solution.
        label_smoothing: share of the target probability that is spread over all classes.
        penalty: weight, frequency and end of the Jacobian penalty.
        skip: weight of the distance from the start of the solve, which is also part of fixed-depth steps.
        pretraining: fixed-depth steps at the beginning.
        eval_solver: solver in evaluation; None: the model's.
    """

    def __init__(
        self,
        model: EquilibriumClassifier,
        *,
        label_smoothing: float = 0.0,
        penalty: JacobianPenalty = JacobianPenalty(),
        skip: SkipPenalty = SkipPenalty(),
        pretraining: Pretraining = Pretraining(),
        eval_solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.penalty = penalty
        self.skip = skip
        self.pretraining = pretraining
        self.eval_solver = eval_solver

    @property
    def scores(self) -> tuple[str, ...]:
        return Classify.scores

    def forward(self, images: Tensor, labels: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor]:
        with self._solving(moment, labels):
            logits, solution = self.model.classify(images)
        logits = _precise(logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if moment is not None else 0.0)
        penalty = self._penalties(solution, moment) if moment is not None else torch.zeros_like(loss)
        correct = (logits.argmax(1) == labels).sum()
        return loss + penalty, self.sums(loss, solution, {"accuracy": correct}, penalty)

    def _penalties(self, solution: Solution, moment: Moment) -> Tensor:
        total = torch.zeros((), device=solution.residual.device)
        weight = self.penalty.at(moment.step, moment.epoch, moment.seed)
        if weight:
            total = total + weight * jacobian_penalty(solution, self.penalty.num_probes)
        weight = self.skip.at(moment.epoch)
        if weight:
            apart = skip_penalty(solution, per_scale=self.skip.per_scale, detach_target=self.skip.detach_target)
            total = total + weight * apart
        return total

    def _solving(self, moment: Moment | None, labels: Tensor) -> contextlib.AbstractContextManager[object]:
        deq = self.model.deq
        if moment is None:
            return deq.using(solver=self.eval_solver) if self.eval_solver is not None else contextlib.nullcontext()
        if moment.step < self.pretraining.steps:
            return deq.using(solver=Picard(max_steps=0), gradient=Unrolled(steps=self.pretraining.depth))
        if not isinstance(deq.solver, AdjointBroyden) or deq.solver.cadence is None:
            return contextlib.nullcontext()

        def outer(z: Any, rows: Tensor) -> Tensor:
            with frozen(self.model.head):
                logits = _precise(self.model.head(z))
            return F.cross_entropy(logits, labels[rows], label_smoothing=self.label_smoothing, reduction="none")

        return deq.using(solver=dataclasses.replace(deq.solver, outer=outer))


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
