"""Verification of optimized inputs: the equilibrium at the answer, and claims that do not hold there."""

import dataclasses

import torch
from torch import Tensor

from equipoise.core.solution import Solution, Status
from equipoise.inputs.curvature import inverse_curvature
from equipoise.inputs.joint import JointMap
from equipoise.inputs.schemes import FixedInput, Joint
from equipoise.solvers import Solver

COST_TOLERANCE = 1e-3  # relative excess of the cost over that at the start, above which the start is returned
STEP_TOLERANCE = 10.0  # factor on the tolerance of the input, when a given step is compared with a measured one


@dataclasses.dataclass(eq=False)
class Verification:
    """Result of a verification; the fields are those of `InputSolution`, the value is flat."""

    value: Tensor
    status: Tensor
    cost: Tensor | None = None
    stationarity: Tensor | None = None


def verify(
    f: JointMap, start: Tensor, solution: Solution[Tensor], *, solver: Solver, verify_solver: Solver, step_given: bool
) -> Verification:
    """Solve for state and adjoint at the answer and at the start, and correct the answer.

    A sample whose cost is above that of its start gets the start back. The residual of the input is proportional to its
    step, so a short step passes for convergence: with `step_given` a sample stays CONVERGED only if it meets the
    tolerance also at a step of the inverse curvature.

    Args:
        f: the joint map, without gradients.
        start: `(B, D)` start of the solve.
        solution: of the joint fixed point.
        solver: solver of the joint fixed point.
        verify_solver: solver of state and adjoint at a fixed input.
        step_given: whether the step was given and not measured.
    """
    fixed, status = f.with_scheme(FixedInput()), solution.status
    settled, first = (verify_solver.solve(fixed, v).value for v in (solution.value, start))
    cost, before = (fixed.call_user(f.f.objective, v) for v in (settled, first))
    worse = ~(cost <= before + COST_TOLERANCE * before.abs()) & before.isfinite()
    value, settled = (torch.where(worse[:, None], first, v) for v in (solution.value, settled))
    status = torch.where(worse & (status != Status.NONFINITE), int(Status.DIVERGED), status)
    claimed = status == Status.CONVERGED
    if step_given and bool(claimed.any()):
        longer = torch.maximum(inverse_curvature(f, settled, (settled - start)[:, -f.size :]), f.step)
        allowed = STEP_TOLERANCE * solver.tolerance(torch.linalg.vector_norm(settled[:, -f.size :], dim=1))
        status = torch.where(claimed & (_move(f.with_step(longer), settled) > allowed), int(Status.STALLED), status)
    return Verification(
        value=value,
        status=status.to(solution.status.dtype),
        cost=torch.where(worse, before, cost),
        stationarity=_move(f, settled) / f.step[:, 0],
    )


def _move(f: JointMap, v: Tensor) -> Tensor:
    """Return the length of a step of the input, `(b,)`."""
    return torch.linalg.vector_norm((f.with_scheme(Joint()).call(v) - v)[:, -f.size :], dim=1)
