"""Adversarial training of a classifier."""

import dataclasses
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from equipoise.constraints import Constraint, L2Ball, LInfBall
from equipoise.core.checks import check_ranges
from equipoise.data import Data, ImageData
from equipoise.gradients import Gradient
from equipoise.inputs import InputSolution
from equipoise.solvers import Anderson, Solver
from equipoise.train import BatchResult, ModelConfig, Objective, StepInfo
from equipoise.zoo.adversarial.attack import attack
from equipoise.zoo.base import InputTask
from equipoise.zoo.classification import ClassifierConfig, ClassifierTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial(ClassifierTask, InputTask):
    r"""Classify images that an adversary has changed for the worst, within a ball around each.

    $$ L = \max_{\|\delta\| \le \varepsilon,\; 0 \le x + \delta \le 1} \mathrm{CE}(\mathrm{head}(z^*(x + \delta)), y) $$

    The solver of the run finds state, adjoint and changed image together. In training the loss is that of the joint
    iterate, so attack and gradient cost no solve of their own: the adjoint at the end of the attack is that of the
    loss (`Envelope`). In evaluation the scores are of the equilibrium at the changed images, found by another solve.
    Pixels are in [0, 1], and stay there.

    Source: Gurumurthy, Bai, Manchester and Kolter (2021), which have no term of the clean images either.
    """

    scores: ClassVar[tuple[str, ...]] = ("robust_accuracy", "accuracy")
    train_scores: ClassVar[tuple[str, ...] | None] = ("robust_accuracy",)

    radius: float = 1.0
    """Radius of the ball, pixels being in [0, 1]."""
    norm: Literal["l2", "linf"] = "l2"
    """Norm of the ball: Euclidean, or the largest change of a pixel."""
    step_size: float | None = 1.0
    """Step of the image along the gradient of the log odds against its label; None: measured for each image."""
    equilibrium_solver: Solver = Anderson(max_steps=60, rtol=1e-4)
    """Finds the equilibrium alone: of clean images, and of those at the end of the attack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "task.", radius="> 0")

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        super().check(model, data, gradient)
        assert isinstance(model, ClassifierConfig)
        assert isinstance(data, ImageData)
        if model.batch_statistics:
            raise ValueError(
                "the task Adversarial needs a model that treats each image by itself, and the BatchNorm of a "
                f"{type(model).__name__} does not; take a DenseConfig"
            )
        if any(data.mean) or set(data.std) != {1.0}:
            raise ValueError(
                f"data.mean={data.mean} and data.std={data.std} would change the meaning of the radius; set them to "
                "zeros and ones"
            )

    def loss(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> BatchResult:
        model, correct = objective.model, {}
        solution = self.attack(objective, images, labels, info)
        if info is None:
            with model.deq.using(solver=self.equilibrium_solver):
                correct["accuracy"] = (model(images).argmax(1) == labels).sum()
                logits = model(solution.value[2])
        else:
            logits = model.head(solution.value[0])
        correct["robust_accuracy"] = (logits.argmax(1) == labels).sum()
        return BatchResult(F.cross_entropy(logits, labels), solution, correct)

    def attack(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> InputSolution:
        """Attack images, without a solve afterwards."""
        optimizer = self.input_optimizer(objective.solver_at(info), objective.gradient)
        return attack(objective.model, images, labels, constraint=self.constraint(images), optimizer=optimizer)

    def constraint(self, images: Tensor) -> Constraint:
        """Set of the images that the adversary may make."""
        return (L2Ball if self.norm == "l2" else LInfBall)(radius=self.radius, center=images, lower=0.0, upper=1.0)
