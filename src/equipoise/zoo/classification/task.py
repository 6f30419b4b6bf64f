"""Classification of images by an equilibrium: task and objective."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.core.solution import Solution
from equipoise.data.base import Data, Splits
from equipoise.gradients import Gradient, Unrolled
from equipoise.nn import frozen, jacobian_penalty, skip_penalty
from equipoise.solvers import AdjointBroyden, Picard, Solver
from equipoise.train.model import ModelConfig
from equipoise.train.pretraining import Pretraining
from equipoise.train.task import Objective, StepInfo, Task
from equipoise.zoo.classification.model import ClassifierConfig, EquilibriumClassifier
from equipoise.zoo.classification.penalties import JacobianPenalty, SkipPenalty
from equipoise.zoo.images import check_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTask(Task):
    """Base of the tasks that train a classifier of images."""

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        if not isinstance(model, ClassifierConfig):
            raise ValueError(f"the task {type(self).__name__} needs a classifier, and {type(model).__name__} is none")
        check_shapes(model, data)

    def check_data(self, model: ModelConfig, splits: Splits) -> None:
        assert isinstance(model, ClassifierConfig)
        if len(splits.classes) != model.num_classes:
            raise ValueError(
                f"the data has {len(splits.classes)} classes and model.num_classes={model.num_classes}; set it to "
                f"{len(splits.classes)}"
            )

    def solve(self, model: EquilibriumClassifier, samples: Tensor) -> Solution[Any]:
        return model.deq.solve(model.stem(samples))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(ClassifierTask):
    """Name the class of an image."""

    scores: ClassVar[tuple[str, ...]] = ("accuracy",)

    pretraining: Pretraining = Pretraining()
    """Fixed-depth steps at the beginning."""
    penalty: JacobianPenalty = JacobianPenalty()
    """Jacobian penalty."""
    skip: SkipPenalty = SkipPenalty()
    """Penalty on the distance of the equilibrium from the start of its solve."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"task.label_smoothing={self.label_smoothing!r}: must lie in [0, 1)")

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        super().check(model, data, gradient)
        assert isinstance(model, ClassifierConfig)
        if self.skip.weight and not (model.predictor or model.explicit_steps):
            raise ValueError(
                f"task.skip.weight={self.skip.weight!r} would draw the equilibrium to zeros, where its solve begins; "
                "set model.predictor=true (Skip DEQ) or model.explicit_steps=1 (Skip Reg DEQ)"
            )

    def forward_solver(self, solver: Solver, eval_solver: Solver | None) -> Solver:
        return eval_solver or solver

    def objective(
        self, model: Any, *, data: Data, solver: Solver, gradient: Gradient, eval_solver: Solver | None
    ) -> Objective:
        return Classification(model, self, eval_solver=eval_solver)


class Classification(Objective):
    r"""Cross-entropy of a classifier, with the penalties and the fixed-depth steps of equilibrium training.

    $$ L = \mathrm{CE}(\mathrm{model}(x), y) + \gamma \, \frac{1}{D} \|J(z^*)\|_F^2
       + \lambda \operatorname{mean} |z^* - z_0| $$

    In training, a solver that is aware of the outer problem, `AdjointBroyden` with `outer_every`, gets the
    cross-entropy of each sample. The head is frozen meanwhile: its statistics and random numbers are untouched.

    Args:
        model: classifier that tells its solution.
        task: penalties, label smoothing and fixed-depth steps.
        eval_solver: solver in evaluation; None: the model's.
    """

    def __init__(
        self, model: EquilibriumClassifier, task: Classify = Classify(), *, eval_solver: Solver | None = None
    ) -> None:
        super().__init__()
        self.model, self.task, self.eval_solver = model, task, eval_solver

    @property
    def scores(self) -> tuple[str, ...]:
        return Classify.scores

    def forward(self, images: Tensor, labels: Tensor, info: StepInfo | None = None) -> tuple[Tensor, Tensor]:
        with self._solving(info, labels):
            logits, solution = self.model.classify(images)
        logits = _precise(logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.task.label_smoothing if info is not None else 0.0)
        penalty = self._penalties(solution, info) if info is not None else torch.zeros_like(loss)
        correct = (logits.argmax(1) == labels).sum()
        return loss + penalty, self.sums(loss, solution, {"accuracy": correct}, penalty)

    def _penalties(self, solution: Solution, info: StepInfo) -> Tensor:
        total = torch.zeros((), device=solution.residual.device)
        weight = self.task.penalty.at(info.step, info.epoch, info.seed)
        if weight:
            total = total + weight * jacobian_penalty(solution, self.task.penalty.num_probes)
        weight = self.task.skip.at(info.epoch)
        if weight:
            apart = skip_penalty(
                solution, per_scale=self.task.skip.per_scale, detach_target=self.task.skip.detach_target
            )
            total = total + weight * apart
        return total

    def _solving(self, info: StepInfo | None, labels: Tensor) -> contextlib.AbstractContextManager[object]:
        deq = self.model.deq
        if info is None:
            return deq.using(solver=self.eval_solver) if self.eval_solver is not None else contextlib.nullcontext()
        if info.step < self.task.pretraining.steps:
            return deq.using(solver=Picard(max_steps=0), gradient=Unrolled(steps=self.task.pretraining.depth))
        if not isinstance(deq.solver, AdjointBroyden) or deq.solver.outer_every is None:
            return contextlib.nullcontext()

        def outer(z: Any, rows: Tensor) -> Tensor:
            with frozen(self.model.head):
                logits = _precise(self.model.head(z))
            return F.cross_entropy(logits, labels[rows], label_smoothing=self.task.label_smoothing, reduction="none")

        return deq.using(solver=dataclasses.replace(deq.solver, outer_loss=outer))


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
