"""History of an outer optimization: its steps, its counts and its best point."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from equipoise.bilevel.problem import Evaluation
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.steps import Trial


class History:
    """Outer steps so far, and the best point among them.

    Args:
        observe: as in `minimize_outer`.
    """

    def __init__(self, observe: Callable[[OuterStep, Any], None] | None = None) -> None:
        self.observe = observe
        self.steps: list[OuterStep] = []
        self.began = time.perf_counter()
        self.best: tuple[tuple[bool, bool, float], OuterStep, Any] | None = None

    def add(self, evaluation: Evaluation, trial: Trial, *, accepted: bool) -> None:
        """Record an outer step and keep the point if it is the best."""
        last = self.steps[-1] if self.steps else None
        step = OuterStep(
            step=len(self.steps) + 1,
            hyper=evaluation.hyper,
            value=evaluation.value,
            gradient_norm=math.nan if trial.gradient is None else float(torch.linalg.vector_norm(trial.gradient)),
            tolerance=evaluation.tolerance,
            inner_converged=bool(evaluation.solution.converged.all()),
            num_evals=evaluation.counts.evals + (last.num_evals if last else 0),
            num_vjps=evaluation.counts.vjps + (last.num_vjps if last else 0),
            accepted=accepted,
            seconds=time.perf_counter() - self.began,
        )
        self.steps.append(step)
        # An inexact solution may have a low outer loss by chance: the higher of both values counts.
        value = max(step.value, trial.value) if math.isfinite(trial.value) else math.inf
        rank = (not step.inner_converged, not accepted, value)
        if self.best is None or rank < self.best[0]:
            self.best = (rank, step, evaluation.z)
        if self.observe is not None:
            self.observe(step, evaluation.z)

    def solution(self, status: OuterStatus) -> OuterSolution:
        """Return the point of lowest value, among those with a converged inner solve if there is one."""
        assert self.best is not None
        _, best, z = self.best
        if not best.inner_converged and status is not OuterStatus.NONFINITE:
            status = OuterStatus.INNER
        return OuterSolution(
            hyper=best.hyper,
            z=z,
            value=best.value,
            status=status,
            history=self.steps,
            num_evals=self.steps[-1].num_evals,
            num_vjps=self.steps[-1].num_vjps,
        )
