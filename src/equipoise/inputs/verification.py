"""Verification of optimized inputs: the equilibrium at the answer, and claims that do not hold there."""

import dataclasses

import torch
from torch import Tensor

from equipoise.core.linalg import can_branch_on
from equipoise.core.solution import Solution, Status
from equipoise.inputs.curvature import inverse_curvature, negative_curvature
from equipoise.inputs.joint import JointMap
from equipoise.inputs.schemes import FixedInput, Joint
from equipoise.solvers import Solver

COST_TOLERANCE = 1e-3  # relative excess of the cost over that at the start, above which the start is returned
STEP_TOLERANCE = 10.0  # factor on the tolerance of the input, when a given step is compared with a measured one
CURVATURE_TOLERANCE = 1e-2  # negative over largest curvature, above which a lower cost is searched
ESCAPE_LENGTHS = [2.0**-k for k in range(7)]  # steps of the input in that search, relative to 1 + |x|
ESCAPE_SHARE = 0.1  # smallest decrease of the cost, relative to that of the quadratic model


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

    A sample that moved by more than its tolerance, to a cost above that of its start, gets the start back. The residual
    of the input is proportional to its step, so a short step passes for convergence: with `step_given` a sample stays
    CONVERGED only if it meets the tolerance also at a step of the inverse curvature.

    A converged sample with negative curvature and a lower cost in that direction is at a saddle point. It moves to the
    lowest cost found there and becomes STALLED: the input can be improved from where it now is.

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
    near = solver.tolerance(torch.linalg.vector_norm(settled[:, -f.size :], dim=1))
    moved = ~(torch.linalg.vector_norm((settled - first)[:, -f.size :], dim=1) <= near)
    worse = moved & ~(cost <= before + COST_TOLERANCE * before.abs()) & before.isfinite()
    value, settled = (torch.where(worse[:, None], first, v) for v in (solution.value, settled))
    status = torch.where(worse & (status != Status.NONFINITE), int(Status.DIVERGED), status)
    claimed = status == Status.CONVERGED
    inverse = f.step / f.f.scheme.step_factor
    if step_given and bool(claimed.any()):
        inverse = inverse_curvature(f, settled, (settled - start)[:, -f.size :])
        longer = torch.maximum(inverse, f.step)
        far = _move(f.with_step(longer), settled) > STEP_TOLERANCE * near
        status = torch.where(claimed & far, int(Status.STALLED), status)
    claimed = status == Status.CONVERGED
    cost = torch.where(worse, before, cost)
    if not can_branch_on(claimed) or bool(claimed.any()):
        settled, cost, escaped = _escape(f, settled, cost, inverse, claimed=claimed, solver=verify_solver)
        value = torch.where(escaped[:, None], settled, value)
        status = torch.where(escaped, int(Status.STALLED), status)
    return Verification(
        value=value,
        status=status.to(solution.status.dtype),
        cost=cost,
        stationarity=_move(f, settled) / f.step[:, 0],
    )


def _escape(
    f: JointMap, settled: Tensor, cost: Tensor, inverse: Tensor, *, claimed: Tensor, solver: Solver
) -> tuple[Tensor, Tensor, Tensor]:
    """Return joint state, cost and a mask: rows with a lower cost, on either side, along negative curvature."""
    fixed = f.with_scheme(FixedInput())
    curvature, direction = negative_curvature(f, settled, inverse)
    suspect = claimed & (curvature < -CURVATURE_TOLERANCE)
    scale = 1 + torch.linalg.vector_norm(settled[:, -f.size :], dim=1)
    best, lowest, escaped = settled, cost, torch.zeros_like(suspect)
    for length in ESCAPE_LENGTHS if bool(suspect.any()) else ():
        for step in (length * scale, -length * scale):
            step = torch.where(suspect, step, 0.0)  # the other rows converge at once
            probe = solver.solve(fixed, f.project(settled + step[:, None] * direction)).value
            there = fixed.call_user(f.f.objective, probe)
            expected = -0.5 * curvature / inverse[:, 0] * step.square()
            lower = suspect & (there < cost - ESCAPE_SHARE * expected) & (there < lowest)
            best, lowest = torch.where(lower[:, None], probe, best), torch.where(lower, there, lowest)
            escaped = escaped | lower
    return best, lowest, escaped


def _move(f: JointMap, v: Tensor) -> Tensor:
    """Return the length of a step of the input, `(b,)`."""
    return torch.linalg.vector_norm((f.with_scheme(Joint()).call(v) - v)[:, -f.size :], dim=1)
