"""Few-shot learning: a task's own images set inputs of the equilibrium, and other images of the task judge them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.data.base import Data
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs import Envelope, InputOptimizer, Joint, UpdateScheme
from equipoise.solvers import Anderson, Solver
from equipoise.train.model import ModelConfig
from equipoise.train.task import Objective, StepInfo, Task
from equipoise.zoo.few_shot.model import FewShotConfig, FewShotLearner
from equipoise.zoo.few_shot.omniglot import Omniglot
from equipoise.zoo.images import check_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(Task):
    """Learn a task of `data.ways` classes from `data.shots` images of each; context and head are optimized inputs."""

    scores: ClassVar[tuple[str, ...]] = ("accuracy",)

    step_size: float | None = 1.0
    """Step of context and head in a round; None: measured for each task."""
    schedule: UpdateScheme = Joint()
    """How often the state moves between two steps of context and head."""
    equilibrium: Solver = Anderson(max_steps=30, rtol=1e-4)
    """Finds the equilibrium of the queries."""

    def __post_init__(self) -> None:
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"task.step_size={self.step_size!r}: must be > 0, or None to measure it")

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        for value, kind, field in ((model, FewShotConfig, "model"), (data, Omniglot, "data")):
            if not isinstance(value, kind):
                raise ValueError(
                    f"the task FewShot needs a {field} of kind {kind.__name__}, and {type(value).__name__} is none"
                )
        assert isinstance(model, FewShotConfig)
        check_shapes(model, data)
        if isinstance(gradient, Envelope):
            raise ValueError(
                "gradient=Envelope() is for an outer loss that is the inner cost, and that of FewShot is of other "
                "images; take Implicit() or FirstOrder()"
            )

    def forward_solver(self, solver: Solver, eval_solver: Solver | None) -> Solver:
        return self.equilibrium

    def build(self, model: ModelConfig, solver: Solver, gradient: Gradient) -> Any:
        return model.build(solver=self.equilibrium, gradient=Implicit())

    def objective(
        self, model: Any, *, data: Data, solver: Solver, gradient: Gradient, eval_solver: Solver | None
    ) -> Objective:
        assert isinstance(data, Omniglot)
        return QueryLoss(model, self, data=data, solver=solver, gradient=gradient, eval_solver=eval_solver)


class QueryLoss(Objective):
    r"""Cross-entropy of the queries, at the context and head that the support images set.

    $$ L = \mathrm{CE}(\mathrm{model}(\text{queries}, x^*), y), \qquad
       x^* = \arg\min_x c(z^*(x), x) + r(x) \text{ on the support} $$

    Args:
        model: a few-shot learner.
        task: step, schedule and the solver of the queries' equilibrium.
        data: ways and shots of a task.
        solver: of state, adjoint and inputs together.
        gradient: through the answer.
        eval_solver: in place of `solver` in evaluation; None: the same.
    """

    def __init__(
        self,
        model: FewShotLearner,
        task: FewShot,
        *,
        data: Omniglot,
        solver: Solver,
        gradient: Gradient,
        eval_solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.ways, self.support = data.ways, data.ways * data.shots
        self.solvers = solver, eval_solver or solver
        self.gradient = gradient

    @property
    def scores(self) -> tuple[str, ...]:
        return FewShot.scores

    def forward(self, images: Tensor, labels: Tensor, info: StepInfo | None = None) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch of tasks.

        Args:
            images: `(B, S + Q, C, H, W)`, the support first.
            labels: `(B, S + Q)`.
            info: position in the training; None in evaluation.

        Returns:
            As every objective; the accuracy of a task is that of its queries.
        """
        found = self.model.adapt(
            images[:, : self.support],
            labels[:, : self.support],
            ways=self.ways,
            optimizer=InputOptimizer(
                solver=self.solvers[info is None],
                scheme=self.task.schedule,
                step_size=self.task.step_size,
                gradient=self.gradient,
                verify_solver=None,
            ),
        )
        logits, _ = self.model.classify(images[:, self.support :], found.value[2])
        wanted = labels[:, self.support :]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        accuracy = (logits.argmax(2) == wanted).double().mean(1).sum()
        return loss, self.sums(loss, found, {"accuracy": accuracy}, torch.zeros_like(loss))
