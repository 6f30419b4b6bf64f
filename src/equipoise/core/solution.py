"""Result of a solve: value, status, residual and counts of each sample."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from equipoise.core.linalg import InverseEstimate

S = TypeVar("S")


class Status(enum.IntEnum):
    """End of the solve of one sample; the numbers are those in `Solution.status`."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4


REMEDIES = {
    Status.MAX_STEPS: "raise max_steps, loosen rtol or atol, or take a faster solver (Anderson, Broyden)",
    Status.STALLED: "loosen rtol or atol, raise patience, or solve in float64: the map's own noise may be the limit",
    Status.DIVERGED: "the map does not contract: damp the solver, take Anderson or Broyden, or regularize the map",
    Status.NONFINITE: "the map returned NaN or Inf: check its inputs and parameters, or lower the learning rate",
}


class ConvergenceWarning(UserWarning):
    """Issued once per call site when an adjoint did not converge, or a tolerance cannot be met."""


class ConvergenceError(RuntimeError):
    """Raised by `Solution.raise_for_status` when a sample did not converge."""


@dataclasses.dataclass(frozen=True)
class Solution(Generic[S]):
    r"""The solution of `z = f(z)` and its convergence record.

    Attributes:
        value: the best iterate of each sample, in the structure of `z0`; differentiable.
        status: `(B,)` integers of `Status`.
        residual: `(B,)` norm of `f(z) - z` at the returned `z`; infinite if no evaluation was finite.
        num_steps: `(B,)` evaluations of `f` for each sample until it stopped, those of the start too.
        num_evals: calls of `f` during the solve, each with all rows still in the batch; those of the start too.
        num_vjps: vector-Jacobian products during the solve.
        inverse: estimate of `(I - J)^{-1}` that belongs to `value`, if the solver keeps one.
        trace: `(T, B)` residual of each sample at each evaluation, on request; NaN after a sample stopped.
        map: the map that was solved, for probes and penalties at `value`.
        start: start of the solve, in the structure of `z0`; differentiable if it was predicted.
        statistics: further counts of the solver, `(B,)` each: accepted and rejected steps of `SteadyState`.
    """

    value: S
    status: Tensor
    residual: Tensor
    num_steps: Tensor
    num_evals: int
    num_vjps: int
    inverse: InverseEstimate | None = dataclasses.field(default=None, repr=False)
    trace: Tensor | None = dataclasses.field(default=None, repr=False)
    map: Any = dataclasses.field(default=None, repr=False)
    start: S | None = dataclasses.field(default=None, repr=False)
    statistics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def converged(self) -> Tensor:
        """`(B,)` booleans: samples that met the tolerance."""
        return self.status == Status.CONVERGED

    def of_rows(self, groups: Tensor) -> Solution[S]:
        """Return the record of each row, from that of its group, `(B,)`."""
        names = ("status", "residual", "num_steps")
        changes: dict[str, Any] = {name: getattr(self, name)[groups] for name in names}
        changes["statistics"] = {name: count[groups] for name, count in self.statistics.items()}
        changes["trace"] = None if self.trace is None else self.trace[:, groups]
        return dataclasses.replace(self, **changes)

    def raise_for_status(self) -> Solution[S]:
        """Return the solution itself if every sample converged.

        Raises:
            ConvergenceError: names the samples that did not converge, their status and the remedy.
        """
        failures = []
        for status, remedy in REMEDIES.items():
            rows = (self.status == status).nonzero().flatten().tolist()
            if rows:
                shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
                worst = float(self.residual[rows].max())
                failures.append(
                    f"{status.name}: {len(rows)} of {len(self.status)} samples ({shown}), "
                    f"largest residual {worst:.3g}; {remedy}"
                )
        if failures:
            raise ConvergenceError("; ".join(failures))
        return self
