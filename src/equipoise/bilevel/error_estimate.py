"""First-order estimate of the error that an inexact inner solve leaves in the outer loss."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from equipoise.bilevel.problem import Evaluation
from equipoise.bilevel.steps import Trial

LARGEST = 0.1  # estimates may be far off themselves: no error larger than this share of the outer loss is believed


@dataclasses.dataclass(frozen=True)
class ErrorEstimate:
    r"""Error $w^\top r$ of the outer loss, with the adjoint solution $w$ and the inner residual $r$.

    Attributes:
        noise: $|w^\top r| / \|r\|$ at the last accepted point.
        first: norm of the first adjoint solution; 0 if there is none yet.
        last: norm of the last one.
    """

    noise: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def tolerance_factor(self) -> float:
        """Factor on the inner tolerance that keeps the error of the outer loss level.

        The longer the adjoint solution grew, the smaller the residual must be. If the penalty dominates the Hessian,
        this is the factor exp(l - l_0) of the published code. It never exceeds one, or z need not move at all.
        """
        return self.first / self.last if self.last > self.first else 1.0

    def trial(self, evaluation: Evaluation) -> Trial:
        """Return the point and its value for the step rule, without gradient."""
        value = evaluation.value
        residual = float(torch.linalg.vector_norm(evaluation.solution.residual))
        noise = _limited(self.noise * residual, value)
        return Trial(x=evaluation.x, value=value, noise=noise, tolerance=evaluation.tolerance)

    def updated(self, trial: Trial, evaluation: Evaluation, gradient: Tensor) -> tuple[ErrorEstimate, Trial]:
        """Return the estimate at an accepted point, and the trial with its gradient and its corrected value."""
        estimate, error = self, 0.0
        if evaluation.adjoint is not None:
            w, r = evaluation.adjoint
            error, last = float((w * r).sum()), float(torch.linalg.vector_norm(w))
            noise = abs(error) / max(float(torch.linalg.vector_norm(r)), 1e-300)
            estimate = ErrorEstimate(noise, self.first or max(last, 1e-300), last)
        # To first order the residual lowers the outer loss by w . r below that of the exact inner solution; points
        # solved at different tolerances compare only with this correction.
        error = _limited(error, trial.value)
        return estimate, dataclasses.replace(trial, gradient=gradient, value=trial.value + error, noise=abs(error))


def _limited(error: float, value: float) -> float:
    most = LARGEST * abs(value)
    return min(max(error, -most), most)
