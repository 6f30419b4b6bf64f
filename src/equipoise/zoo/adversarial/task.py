"""Attacks, small changes of images that mislead a classifier, and adversarial training."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.constraints import Constraint, L2Ball, LInfBall
from equipoise.core.checks import check_ranges
from equipoise.data import Data, ImageData
from equipoise.gradients import Gradient
from equipoise.inputs import Envelope, InputOptimizer, InputSolution, optimize_inputs
from equipoise.nn import frozen
from equipoise.solvers import Anderson, Picard, Solver
from equipoise.train import BatchResult, ModelConfig, Objective, StepInfo
from equipoise.zoo.base import InputTask
from equipoise.zoo.classification import ClassifierConfig, ClassifierTask, EquilibriumClassifier

ATTACK = InputOptimizer(
    solver=Picard(max_steps=40, rtol=1e-3),
    step_size=1.0,
    gradient=Envelope(),
    verify_solver=Anderson(max_steps=60, rtol=1e-4),
)
"""Default method of an attack; vary it with `dataclasses.replace`."""


def attack(
    model: EquilibriumClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    constraint: Constraint,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    start: Tensor | None = None,
    optimizer: InputOptimizer = ATTACK,
) -> InputSolution:
    r"""Find images near given ones with the worst predictions of a classifier, together with their equilibria.

    $$ \max_{x \in X} \; \ell, \quad \ell = \log \sum_{j \ne y} e^{h_j} - h_y, \quad h = \mathrm{head}(z^*)
       \quad \text{subject to} \quad z^* = f(z^*, \mathrm{stem}((x - m) / s)) $$

    These log odds against the label have the maxima of the cross-entropy, $\log(1 + e^\ell)$. Their gradient
    does not vanish at confident predictions, where an attack by the gradient of the cross-entropy stalls. The model is
    frozen meanwhile: samples are independent, statistics stay, no random numbers are drawn.

    The default is plain iteration with long steps: each step is the projection of a long move, and ends on the border
    of the set, where the maximum is. Anderson's extrapolation of such iterates gains nothing.

    Args:
        model: a classifier.
        images: `(B, C, H, W)`, with values in [0, 1].
        labels: `(B,)` classes that the attack lowers.
        constraint: set of the images, such as `L2Ball(radius=1.0, center=images, lower=0.0, upper=1.0)`.
        mean: of each channel, subtracted before the stem.
        std: of each channel; the divisor.
        start: first iterate; None: the images.
        optimizer: method of the attack; its step is along the gradient of the log odds. `Envelope()` fits a training
            loss that is the cross-entropy, whose gradient is a multiple of that of the log odds for each sample.

    Returns:
        The solution, with `value` $(z, \mu, x)$ and `cost` the negative log odds.

    Example:
        >>> import torch, equipoise as eq
        >>> from equipoise.zoo import DenseClassifier, DenseConfig, attack
        >>> model = DenseClassifier(DenseConfig(image_size=8, image_channels=1, num_classes=10, width=32, cap=0.8))
        >>> images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
        >>> ball = eq.constraints.L2Ball(radius=0.5, center=images, lower=0.0, upper=1.0)
        >>> solution = attack(model, images, labels, constraint=ball)
        >>> _, _, attacked = solution.value
        >>> bool(((attacked - images).flatten(1).norm(dim=1) <= 0.5).all())
        True

    Source: Gurumurthy, Bai, Manchester and Kolter (2021), adversarial training.
    """
    cell = _Pixels(model, images, mean, std)
    with frozen(model):
        with torch.no_grad():
            z0 = model.deq.start(cell.inject(images))
        return optimize_inputs(
            cell,
            z0=z0,
            x0=images if start is None else start,
            cost=_Gain(model.head),
            targets=(labels,),
            constraint=constraint,
            optimizer=optimizer,
        )


class _Pixels(nn.Module):
    """Map of a classifier with the image as its input, pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: EquilibriumClassifier, images: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.stem, self.cell = model.stem, model.deq.cell
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).to(images)[:, None, None])

    def inject(self, x: Tensor) -> Any:
        return self.stem((x - self.mean) / self.std)

    def forward(self, z: Any, x: Tensor) -> Any:
        return self.cell(z, self.inject(x))


class _Gain(nn.Module):
    """Negative log odds against the label, the cost of the attack."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, z: Any, x: Tensor, labels: Tensor) -> Tensor:
        logits, label = self.head(z), labels[:, None]
        others = logits.scatter(1, label, -torch.inf).logsumexp(1)
        return logits.gather(1, label)[:, 0] - others


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
        return attack(
            objective.model,
            images,
            labels,
            constraint=self.constraint(images),
            optimizer=self.input_optimizer(objective.solver_at(info), objective.gradient),
        )

    def constraint(self, images: Tensor) -> Constraint:
        """Set of the images that the adversary may make."""
        return (L2Ball if self.norm == "l2" else LInfBall)(radius=self.radius, center=images, lower=0.0, upper=1.0)
