"""Few-shot learning: optimized inputs of an equilibrium learn a task from a few images."""

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from equipoise.data import Data
from equipoise.gradients import Gradient
from equipoise.inputs import Envelope, Joint, UpdateScheme
from equipoise.solvers import Anderson, Solver
from equipoise.train import BatchResult, ModelConfig, Objective, StepInfo
from equipoise.zoo.base import InputTask, check_kinds, check_shapes
from equipoise.zoo.few_shot.model import FewShotConfig
from equipoise.zoo.few_shot.omniglot import Omniglot


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(InputTask):
    r"""Learn a task of `data.ways` classes from `data.shots` images of each; context and head are optimized inputs.

    The loss is the cross-entropy of the queries, at the context and head that the support images determine:

    $$ L = \mathrm{CE}(\mathrm{model}(\text{queries}, x^*), y), \qquad
       x^* = \arg\min_x c(z^*(x), x) + r(x) \text{ on the support} $$
    """

    scores: ClassVar[tuple[str, ...]] = ("accuracy",)

    step_size: float | None = 1.0
    """Step of context and head in a round; None: measured for each task."""
    scheme: UpdateScheme = Joint()
    """How often the state moves between two steps of context and head."""
    equilibrium_solver: Solver = Anderson(max_steps=30, rtol=1e-4)
    """Finds the equilibrium of the queries."""

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        check_kinds(self, model, FewShotConfig, data, Omniglot)
        assert isinstance(model, FewShotConfig)
        check_shapes(model, data)
        if isinstance(gradient, Envelope):
            raise ValueError(
                "gradient=Envelope() is for an outer loss that is the inner cost, and that of FewShot is of other "
                "images; take Implicit() or FirstOrder()"
            )

    def loss(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> BatchResult:
        """Return loss and scores of a batch of tasks.

        Args:
            objective: model, data, solvers and gradient.
            images: `(B, S + Q, C, H, W)`, the support first.
            labels: `(B, S + Q)`.
            info: position in the training; None in evaluation.

        Returns:
            The accuracy of a task is that of its queries.
        """
        model, data = objective.model, objective.data
        assert isinstance(data, Omniglot)
        support = data.ways * data.shots
        found = model.adapt(
            images[:, :support],
            labels[:, :support],
            ways=data.ways,
            optimizer=self.input_optimizer(objective.solver_at(info), objective.gradient),
        )
        logits, _ = model.classify(images[:, support:], found.value[2])
        wanted = labels[:, support:]
        return BatchResult(
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten()),
            found,
            {"accuracy": (logits.argmax(2) == wanted).double().mean(1).sum()},
        )
