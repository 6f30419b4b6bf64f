"""Few-shot learning: a task's own images set inputs of the equilibrium, and other images of the task judge them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.inputs import Envelope, Joint, Schedule
from equipoise.models import FewShotConfig, FewShotLearner, build
from equipoise.solvers import Anderson, Solver
from equipoise.train.omniglot import Omniglot
from equipoise.train.tasks.base import Moment, Objective, Task

if TYPE_CHECKING:
    from equipoise.train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(Task):
    """Learn a task of `data.ways` classes from `data.shots` images of each; context and head are optimized inputs."""

    scores: ClassVar[tuple[str, ...]] = ("accuracy",)

    step_size: float | None = 1.0
    """Step of context and head in a round; None: measured for each task."""
    schedule: Schedule = Joint()
    """How often the state moves between two steps of context and head."""
    equilibrium: Solver = Anderson(max_steps=30, rtol=1e-4)
    """Finds the equilibrium of the queries."""

    def __post_init__(self) -> None:
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"task.step_size={self.step_size!r}: must be > 0, or None to measure it")

    def check(self, config: TrainConfig) -> None:
        for value, kind, field in ((config.model, FewShotConfig, "model"), (config.data, Omniglot, "data")):
            if not isinstance(value, kind):
                raise ValueError(
                    f"the task FewShot needs a {field} of kind {kind.__name__}, and {type(value).__name__} is none"
                )
        if isinstance(config.gradient, Envelope):
            raise ValueError(
                "gradient=Envelope() is for an outer loss that is the inner cost, and that of FewShot is of other "
                "images; take Implicit() or FirstOrder()"
            )
        if config.channels_last:
            raise ValueError(
                "channels_last=true is for batches of images, and those of FewShot are of tasks; set it false"
            )

    def forward_solver(self, config: TrainConfig) -> Solver:
        return self.equilibrium

    def build(self, config: TrainConfig) -> Any:
        return build(config.model, solver=self.equilibrium)

    def objective(self, model: Any, config: TrainConfig) -> Objective:
        return QueryLoss(model, config)


class QueryLoss(Objective):
    r"""Cross-entropy of the queries, at the context and head that the support images set.

    $$ L = \mathrm{CE}(\mathrm{model}(\text{queries}, x^*), y), \qquad
       x^* = \arg\min_x c(z^*(x), x) + r(x) \text{ on the support} $$

    Args:
        model: a few-shot learner.
        config: of its run.
    """

    def __init__(self, model: FewShotLearner, config: TrainConfig) -> None:
        super().__init__()
        assert isinstance(config.data, Omniglot)
        assert isinstance(config.task, FewShot)
        self.model, self.task = model, config.task
        self.ways, self.support = config.data.ways, config.data.ways * config.data.shots
        self.solvers = config.solver, config.eval_solver or config.solver
        self.gradient = config.gradient

    @property
    def scores(self) -> tuple[str, ...]:
        return FewShot.scores

    def forward(self, images: Tensor, labels: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch of tasks.

        Args:
            images: `(B, S + Q, C, H, W)`, the support first.
            labels: `(B, S + Q)`.
            moment: place in the training; None in evaluation.

        Returns:
            As every objective; the accuracy of a task is that of its queries.
        """
        found = self.model.adapt(
            images[:, : self.support],
            labels[:, : self.support],
            ways=self.ways,
            step_size=self.task.step_size,
            solver=self.solvers[moment is None],
            schedule=self.task.schedule,
            gradient=self.gradient,
        )
        logits, _ = self.model.classify(images[:, self.support :], found.value[2])
        wanted = labels[:, self.support :]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        accuracy = (logits.argmax(2) == wanted).double().mean(1).sum()
        return loss, self.sums(loss, found, {"accuracy": accuracy}, torch.zeros_like(loss))
