"""Adversarial training: the classifier sees each image as the adversary of the moment has changed it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.constraints import Constraint, L2Ball, LInfBall
from equipoise.data.base import Data
from equipoise.data.images import ImageData
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs import InputOptimizer, InputSolution, Nested, UpdateScheme
from equipoise.solvers import Anderson, Solver
from equipoise.train.model import ModelConfig
from equipoise.train.task import Objective, StepInfo
from equipoise.zoo.adversarial.attack import attack
from equipoise.zoo.classification import ClassifierConfig, ClassifierTask, EquilibriumClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial(ClassifierTask):
    """Name the class of an image that an adversary has changed, within a ball around it, for the worst.

    `TrainConfig.solver` finds state, adjoint and changed image together. Pixels are in [0, 1], and stay there.
    """

    scores: ClassVar[tuple[str, ...]] = ("robust_accuracy", "accuracy")

    radius: float = 1.0
    """Radius of the ball, pixels being in [0, 1]."""
    norm: Literal["l2", "linf"] = "l2"
    """Norm of the ball: Euclidean, or the largest change of a pixel."""
    step_size: float = 1.0
    """Step of the image along the slope of the log odds against its label."""
    schedule: UpdateScheme = Nested(steps=2)
    """How often state and adjoint move between two steps of the image."""
    equilibrium: Solver = Anderson(max_steps=60, rtol=1e-4)
    """Finds the equilibrium alone: of clean images, and once more of those that the adversary ends with."""

    def __post_init__(self) -> None:
        for name in ("radius", "step_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"task.{name}={getattr(self, name)!r}: must be > 0")

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        super().check(model, data, gradient)
        assert isinstance(model, ClassifierConfig)
        if model.batch_statistics:
            raise ValueError(
                "the task Adversarial needs a model that treats each image for itself, and the BatchNorm of a "
                f"{type(model).__name__} does not; take a DenseConfig"
            )
        if isinstance(data, ImageData) and (any(data.mean) or set(data.std) != {1.0}):
            raise ValueError(
                f"data.mean={data.mean} and data.std={data.std} would change what the radius means; set them to zeros "
                "and ones"
            )

    def build(self, model: ModelConfig, solver: Solver, gradient: Gradient) -> Any:
        return model.build(solver=self.equilibrium, gradient=Implicit())

    def forward_solver(self, solver: Solver, eval_solver: Solver | None) -> Solver:
        return self.equilibrium

    def objective(
        self, model: Any, *, data: Data, solver: Solver, gradient: Gradient, eval_solver: Solver | None
    ) -> Objective:
        return AdversarialClassification(model, self, solver=solver, gradient=gradient, eval_solver=eval_solver)

    def constraint(self, images: Tensor) -> Constraint:
        """What the images may become."""
        kind = L2Ball if self.norm == "l2" else LInfBall
        return kind(radius=self.radius, center=images, lower=0.0, upper=1.0)


class AdversarialClassification(Objective):
    r"""Cross-entropy of a classifier on the images that raise it most.

    $$ L = \max_{\|\delta\| \le \varepsilon,\; 0 \le x + \delta \le 1} \mathrm{CE}(\mathrm{head}(z^*(x + \delta)), y) $$

    In training the loss is that of the joint iterate itself, so the attack and the gradient cost no solve of their own:
    the adjoint that the attack ends with is that of the loss (`Envelope`). In evaluation the equilibrium is solved for
    once more at the changed images, and the scores are of that.

    Args:
        model: classifier of pixels in [0, 1].
        task: radius, step and schedule of the adversary.
        solver: of state, adjoint and image together.
        gradient: of their solution in the parameters.
        eval_solver: in evaluation; None: the same.

    Source: Gurumurthy, Bai, Manchester and Kolter (2021), which have no term of the clean images either.
    """

    def __init__(
        self,
        model: EquilibriumClassifier,
        task: Adversarial,
        *,
        solver: Solver,
        gradient: Gradient,
        eval_solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.solver, self.gradient, self.eval_solver = solver, gradient, eval_solver

    @property
    def scores(self) -> tuple[str, ...]:
        return ("robust_accuracy",) if self.training else Adversarial.scores

    def forward(self, images: Tensor, labels: Tensor, info: StepInfo | None = None) -> tuple[Tensor, Tensor]:
        evaluating = info is None
        solution = self.attack(images, labels, self.eval_solver or self.solver if evaluating else self.solver)
        z, _, attacked = solution.value
        correct = {}
        if evaluating:
            with self.model.deq.using(solver=self.task.equilibrium):
                correct["accuracy"] = self._correct(self.model(images), labels)
                logits = self.model(attacked)
        else:
            logits = self.model.head(z)
        loss = F.cross_entropy(logits, labels)
        correct["robust_accuracy"] = self._correct(logits, labels)
        return loss, self.sums(loss, solution, correct, torch.zeros_like(loss))

    def attack(self, images: Tensor, labels: Tensor, solver: Solver) -> InputSolution:
        """The adversary's answer, without a solve after it."""
        return attack(
            self.model,
            images,
            labels,
            constraint=self.task.constraint(images),
            optimizer=InputOptimizer(
                solver=solver,
                scheme=self.task.schedule,
                step_size=self.task.step_size,
                gradient=self.gradient,
                verify_solver=None,
            ),
        )

    @staticmethod
    def _correct(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels).sum()
