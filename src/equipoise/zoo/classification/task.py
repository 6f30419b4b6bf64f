"""Classification of images by an equilibrium: tasks, and penalties in their loss."""

import contextlib
import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.solution import Solution
from equipoise.data import Data, Splits, derive_seed
from equipoise.gradients import Gradient, Unrolled
from equipoise.nn import frozen, jacobian_penalty, skip_penalty
from equipoise.solvers import AdjointBroyden, Picard
from equipoise.train import BatchResult, ModelConfig, Objective, Pretraining, StepInfo, Task
from equipoise.zoo.base import check_shapes, precise
from equipoise.zoo.classification.model import ClassifierConfig, EquilibriumClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class JacobianPenalty:
    """Penalty on the Jacobian at the equilibrium, on a random share of the steps.

    Source: Bai, Koltun and Kolter (2021), section 4.
    """

    weight: float = 0.0
    """Weight in the loss; 0: no penalty."""
    probability: float = 1.0
    """Share of the steps on which it is evaluated."""
    num_probes: int = 1
    """Random vectors per evaluation."""
    growth: float = 0.0
    """Increase of the weight every `growth_every` steps."""
    growth_every: int = 50_000
    """Steps between two additions."""
    stop_epoch: int | None = None
    """Epoch from which on there is no penalty; None: it stays."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "task.penalty.", weight=">= 0", probability=">= 0 and <= 1", num_probes=">= 1", growth_every=">= 1"
        )

    def at(self, step: int, epoch: int, seed: int) -> float:
        """Weight on one step; 0 on steps that the random draw skips, the same on every device."""
        over = self.stop_epoch is not None and epoch >= self.stop_epoch
        if self.weight == 0 or over or derive_seed(seed, step, 1) / 2**63 >= self.probability:
            return 0.0
        return self.weight + self.growth * (step // self.growth_every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipPenalty:
    """Penalty on the distance of the equilibrium from the start of its solve: Skip DEQ and Skip Reg DEQ.

    Source: Pal, Edelman and Rackauckas (2022).
    """

    weight: float = 0.0
    """Weight in the loss in the first epoch; 0: no penalty."""
    decay: float = 1.0
    """Factor of the weight from one epoch to the next."""
    per_scale: bool = True
    """Whether the means over each part of the state are added; else one mean over all numbers."""
    detach_target: bool = False
    """Whether the penalty moves the start alone, not the equilibrium."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.skip.", weight=">= 0", decay="> 0 and <= 1; 1 keeps the weight")

    def at(self, epoch: int) -> float:
        """Weight in an epoch, counted from zero."""
        return self.weight * self.decay**epoch


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
    r"""Classify images: cross-entropy, penalties, fixed-depth steps.

    $$ L = \mathrm{CE}(\mathrm{model}(x), y) + \gamma \, \frac{1}{D} \|J(z^*)\|_F^2
       + \lambda \operatorname{mean} |z^* - z_0| $$

    In training, a solver with outer-problem awareness, `AdjointBroyden` with `outer_every`, receives the cross-entropy
    of each sample while it solves. The head is frozen meanwhile: its statistics and random numbers are untouched.
    """

    scores: ClassVar[tuple[str, ...]] = ("accuracy",)

    pretraining: Pretraining = Pretraining()
    """Fixed-depth steps at the beginning."""
    penalty: JacobianPenalty = JacobianPenalty()
    """Jacobian penalty."""
    skip: SkipPenalty = SkipPenalty()
    """Penalty on the distance of the equilibrium from the start of its solve; also in fixed-depth steps."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.", label_smoothing=">= 0 and < 1")

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        super().check(model, data, gradient)
        assert isinstance(model, ClassifierConfig)
        if self.skip.weight and not (model.predictor or model.explicit_steps):
            raise ValueError(
                f"task.skip.weight={self.skip.weight!r} would draw the equilibrium to zeros, where its solve begins; "
                "set model.predictor=true (Skip DEQ) or model.explicit_steps=1 (Skip Reg DEQ)"
            )

    def loss(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> BatchResult:
        with self._solving(objective, labels, info):
            logits, solution = objective.model.classify(images)
        logits = precise(logits)
        smoothing, penalty = (0.0, 0.0) if info is None else (self.label_smoothing, self._penalties(solution, info))
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return BatchResult(loss, solution, {"accuracy": (logits.argmax(1) == labels).sum()}, penalty)

    def _penalties(self, solution: Solution, info: StepInfo) -> Tensor:
        total = torch.zeros((), device=solution.residual.device)
        if weight := self.penalty.at(info.step, info.epoch, info.seed):
            total = total + weight * jacobian_penalty(solution, self.penalty.num_probes)
        if weight := self.skip.at(info.epoch):
            distance = skip_penalty(solution, per_scale=self.skip.per_scale, detach_target=self.skip.detach_target)
            total = total + weight * distance
        return total

    def _solving(
        self, objective: Objective, labels: Tensor, info: StepInfo | None
    ) -> contextlib.AbstractContextManager[object]:
        deq, head = objective.model.deq, objective.model.head
        if info is None:
            return deq.using(solver=objective.eval_solver or deq.solver)
        if info.step < self.pretraining.steps:
            return deq.using(solver=Picard(max_steps=0), gradient=Unrolled(steps=self.pretraining.depth))
        if not isinstance(deq.solver, AdjointBroyden) or deq.solver.outer_every is None:
            return contextlib.nullcontext()

        def outer(z: Any, rows: Tensor) -> Tensor:
            with frozen(head):
                logits = precise(head(z))
            return F.cross_entropy(logits, labels[rows], label_smoothing=self.label_smoothing, reduction="none")

        return deq.using(solver=dataclasses.replace(deq.solver, outer_loss=outer))
