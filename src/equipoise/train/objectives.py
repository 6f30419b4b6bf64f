"""Objectives: modules that turn a batch into a loss and into sums for the log."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.gradients import Unrolled
from equipoise.models import EquilibriumClassifier
from equipoise.nn import frozen, jacobian_penalty, skip_penalty
from equipoise.solution import Solution
from equipoise.solvers import AdjointBroyden, Picard, Solver
from equipoise.train.config import JacobianPenalty, Pretraining, SkipPenalty

SUMS = ("count", "loss", "correct", "steps", "converged", "residual", "penalty")


class Moment(NamedTuple):
    """Where in the training a batch is taken; a tuple, which Fabric's precision plugins can pass on.

    Args:
        step: number of the optimizer step, from zero.
        epoch: number of the epoch, from zero.
        seed: of the run.
    """

    step: int
    epoch: int
    seed: int


class Classification(nn.Module):
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

    def forward(self, images: Tensor, labels: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor]:
        """Loss and sums of a batch.

        Args:
            images: `(B, C, H, W)`.
            labels: `(B,)`.
            moment: place in the training; None in evaluation, which has neither penalty nor fixed-depth steps.

        Returns:
            Scalar loss to differentiate, and the sums over the batch named in `SUMS`, float64 `(7,)`.
        """
        with self._solving(moment, labels):
            logits, solution = self.model.classify(images)
        logits = _precise(logits)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if moment is not None else 0.0)
        count = torch.as_tensor(len(labels), device=loss.device)
        penalty = self._penalties(solution, moment) if moment is not None else torch.zeros_like(loss)
        sums = (
            count,
            loss * count,
            (logits.argmax(1) == labels).sum(),
            solution.num_steps.sum(),
            solution.converged.sum(),
            relative_residual(solution).sum(),
            penalty * count,
        )
        return loss + penalty, torch.stack([value.detach().to(torch.float64) for value in sums])

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


def relative_residual(solution: Solution) -> Tensor:
    """`(B,)` norms of f(z) - z over those of z, at the answer; 0 where no evaluation was finite."""
    size = torch.linalg.vector_norm(solution.map.pack(solution.value).detach().float(), dim=1)
    ratio = solution.residual.float() / size.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(ratio.isfinite(), ratio, 0.0)
