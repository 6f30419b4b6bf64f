"""The task of reasoning: every place of a puzzle right, at the equilibrium."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.data import Data
from equipoise.data.base import generator
from equipoise.gradients import Gradient, Unrolled
from equipoise.solvers import Picard
from equipoise.train import BatchResult, ModelConfig, Objective, StepInfo, Task
from equipoise.zoo.base import check_kinds, precise
from equipoise.zoo.reasoning.model import Reasoner, ReasonerConfig
from equipoise.zoo.reasoning.puzzles import PrefixSums

NONE = Picard(max_steps=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reason(Task):
    r"""Solve puzzles: cross-entropy of each place, after free steps without and a few steps with gradient.

    $$ z_n = \operatorname{sg}[f^n(z_0)], \quad z = f^k(z_n), \quad
       L = \mathrm{CE}(\mathrm{head}(z), y) + \gamma \operatorname{mean} |f(z) - z|^2,
       \qquad 0 \le n \le \text{free}, \; 1 \le k \le \text{unrolled} $$

    Both counts are drawn for each batch, and starts for each sample, from the seed of the run and the number of the
    step: the answer must not depend on how long the map was applied, nor on where it began. In evaluation the solver of
    the run finds the equilibrium.

    Raises:
        ValueError: a field is out of range.

    Source: the random counts after Bansal et al. (2022), End-to-end algorithm synthesis with recurrent networks, and
    Anil et al. (2022).
    """

    scores: ClassVar[tuple[str, ...]] = ("exact", "accuracy")

    free: int = 14
    """Most steps without gradient."""
    unrolled: int = 10
    """Most steps with gradient."""
    random_starts: float = 0.5
    """Share of samples that start from random numbers instead of zeros."""
    settling: float = 0.1
    """Weight of the mean square of the residual after these steps."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.", free=">= 0", unrolled=">= 1", random_starts=">= 0 and <= 1", settling=">= 0")

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        check_kinds(self, model, ReasonerConfig, data, PrefixSums)
        assert isinstance(model, ReasonerConfig)
        if data.shape != (model.input_channels, model.length):
            raise ValueError(
                f"the data has puzzles of shape {data.shape}, the model takes "
                f"{(model.input_channels, model.length)}; set model.length to data.length"
            )

    def loss(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> BatchResult:
        """Return loss and scores of a batch of puzzles.

        Args:
            objective: model, solvers and gradient.
            images: puzzles, `(B, input_channels, n)`.
            labels: `(B, n)` answers.
            info: position in the training; None in evaluation.
        """
        model = objective.model
        penalty: Tensor | float = 0.0
        if info is None:
            with model.deq.using(solver=objective.solver_at(info)):
                logits, solution = model.answer(images)
        else:
            z0, steps = self._begin(model, images, info)
            with model.deq.using(solver=NONE, gradient=Unrolled(steps=steps)):
                logits, solution = model.answer(images, z0=z0)
            if self.settling:
                z = solution.value
                penalty = self.settling * (model.deq.cell(z, images) - z).square().mean()
        right = logits.argmax(1) == labels
        scores = {"exact": right.all(1).sum(), "accuracy": right.double().mean(1).sum()}
        return BatchResult(F.cross_entropy(precise(logits), labels), solution, scores, penalty)

    def _begin(self, model: Reasoner, puzzles: Tensor, info: StepInfo) -> tuple[Tensor, int]:
        """Return the state after the free steps of a batch, and its number of steps with gradient."""
        source = generator(info.seed, info.step, 5)
        ranges = (0, self.free), (1, self.unrolled)
        free, unrolled = (int(torch.randint(low, high + 1, (), generator=source)) for low, high in ranges)
        z0 = model.start(puzzles)
        chosen = torch.rand(len(z0), 1, 1, generator=source).to(z0) < self.random_starts
        z0 = torch.where(chosen, torch.randn(z0.shape, generator=source).to(z0), z0)
        if free:
            # The last iterate and not the best, as a solver would give: an oscillation must cost something.
            with torch.no_grad(), model.deq.using(solver=NONE, gradient=Unrolled(steps=free)):
                z0 = model.deq(puzzles, z0=z0)
        return z0, unrolled
