"""Result of a bilevel optimization: best point, status, counts and steps."""

import dataclasses
import enum
from typing import Any

from torch import Tensor


class OuterStatus(enum.IntEnum):
    """End of an outer optimization."""

    CONVERGED = 0
    MAX_STEPS = 1
    MAX_EVALS = 2
    STALLED = 3
    INNER = 4
    NONFINITE = 5

    @property
    def remedy(self) -> str:
        """Meaning of the status and the remedy."""
        return REMEDIES[self]


REMEDIES = {
    OuterStatus.CONVERGED: "no step within the bounds promises a lower outer loss",
    OuterStatus.MAX_STEPS: "all outer steps were used: raise max_steps if the last ones still lower the outer loss",
    OuterStatus.MAX_EVALS: "the budget was spent: raise max_evals if the last steps still lower the outer loss",
    OuterStatus.STALLED: "short steps along the hypergradient no longer lower the outer loss: tighten the tolerance, "
    "or take a more exact gradient such as Implicit()",
    OuterStatus.INNER: "the inner solve of the returned point did not converge: raise the solver's max_steps, or keep "
    "the hyperparameters within tighter bounds",
    OuterStatus.NONFINITE: "the inner or the outer problem returned NaN or Inf at the first point: check it and hyper0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OuterStep:
    """One outer step: an inner solve, the outer loss and, if the point was accepted, its gradient.

    Attributes:
        step: number of the step, from 1.
        hyper: the hyperparameters.
        value: the outer loss, summed over the rows.
        gradient_norm: Euclidean norm of the hypergradient; NaN at a rejected point and in a search, which compute none.
        tolerance: relative tolerance of the inner solve.
        inner_converged: whether all rows met the tolerance.
        num_evals: evaluations of the inner problem so far.
        num_vjps: products with its Hessian or Jacobian so far.
        accepted: whether the step rule continues from this point.
        seconds: time since the start.
    """

    step: int
    hyper: tuple[Tensor, ...]
    value: float
    gradient_norm: float
    tolerance: float
    inner_converged: bool
    num_evals: int
    num_vjps: int
    accepted: bool
    seconds: float

    @property
    def gradient_evals(self) -> int:
        """Cost so far in gradients of the inner problem; a product counts as two."""
        return self.num_evals + 2 * self.num_vjps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OuterSolution:
    """Solution of a bilevel problem.

    Attributes:
        hyper: the hyperparameters with the lowest outer loss seen, a tuple like `hyper0`.
        z: inner solution at `hyper`.
        value: outer loss at `hyper`, summed over the rows.
        status: end of the optimization; `status.remedy` explains it.
        history: one record for each outer step.
        num_evals: evaluations of the inner problem, gradients or map evaluations.
        num_vjps: products with its Hessian or Jacobian.
    """

    hyper: tuple[Tensor, ...]
    z: Any
    value: float
    status: OuterStatus
    history: list[OuterStep] = dataclasses.field(repr=False)
    num_evals: int
    num_vjps: int

    @property
    def converged(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status is OuterStatus.CONVERGED

    @property
    def gradient_evals(self) -> int:
        """Cost in gradients of the inner problem; a product counts as two."""
        return self.num_evals + 2 * self.num_vjps
