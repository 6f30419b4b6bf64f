"""Optimize inputs of an equilibrium while it is still being solved for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.constraints import Constraint, Proximal
from equipoise.core.solution import Solution, Status
from equipoise.core.state import InputLayout, Layout
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs.curvature import Probe, measure
from equipoise.inputs.gradients import StateOnly
from equipoise.inputs.joint import JointMap, JointModule
from equipoise.inputs.schedules import Held, Joint, Nested, Schedule
from equipoise.solvers import GMRES, Anderson, Solver

WORSE = 1e-3  # relative excess of the cost over that of the start above which an answer is none
SLACK = 10.0  # by which an answer may miss the tolerance at a step that was measured
OUTSIDE = 1e-6  # relative distance from the set at which a start is called infeasible


@dataclasses.dataclass(frozen=True)
class InputSolution(Solution[tuple[Any, Any, Any]]):
    r"""Optimized inputs and all that the solve told about them; `value` is $(z, \mu, x)$.

    `num_steps` counts rounds of each sample; `num_evals` calls of the cell and `num_vjps` products with its Jacobian,
    those before and after the solve too.

    Attributes:
        joint_cost: `(B,)` what is minimized, at the joint iterate `(z, x)`.
        cost: `(B,)` the same at the equilibrium that was solved for once more at `x`; None if that was not asked for.
            Where the two differ, the iterate is no equilibrium.
        stationarity: `(B,)` $\|x - P(x - \alpha \nabla)\| / \alpha$ there, zero at an optimum; None likewise.
        step_size: `(B,)` $\alpha$ of each sample.
        infeasible_start: `(B,)` whether `x0` lay outside of the constraint and was projected.
    """

    joint_cost: Tensor = dataclasses.field(kw_only=True)
    cost: Tensor | None = dataclasses.field(kw_only=True)
    stationarity: Tensor | None = dataclasses.field(kw_only=True)
    step_size: Tensor = dataclasses.field(kw_only=True)
    infeasible_start: Tensor = dataclasses.field(kw_only=True)


def optimize_inputs(
    cell: Callable[..., Any],
    *,
    z0: Any,
    x0: Any,
    cost: Callable[..., Tensor],
    inputs: Sequence[Any] = (),
    targets: Sequence[Any] = (),
    regularizer: Callable[[Any], Tensor] | None = None,
    constraint: Constraint | Proximal | None = None,
    step_size: float | Tensor | None = None,
    solver: Solver = Anderson(memory=10, max_steps=100, rtol=1e-4, ridge=1e-2),
    schedule: Schedule = Nested(),
    gradient: Gradient = Implicit(solver=GMRES(max_steps=200, rtol=0.0, atol=1e-6)),
    params: Sequence[Tensor] | None = None,
    equilibrium: Solver | None = Anderson(max_steps=50, rtol=1e-5),
    trace: bool = False,
) -> InputSolution:
    r"""Minimize a cost of an equilibrium over the layer's input, and find the equilibrium at the same time.

    $$ \min_{x \in X} \; c(z^*(x), x) + r(x) \quad \text{subject to} \quad z^* = f(z^*, x) $$

    State, adjoint and input are one fixed point, which any solver finds; an evaluation of it is one of the cell and one
    reverse pass (see `Joint` and `Nested`). Each is a block that converges by itself:

    $$ z = f(z, x), \qquad \mu = J_z^\top \mu + \nabla_z c, \qquad
       x = P_X(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    The answer is a stationary point, no worse than the start, and in theory may be a saddle: look at `cost`.

    Args:
        cell: `f(z, x, *inputs)`, a module or a function.
        z0: start of the state, a tensor or a container of tensors `(B, ...)`.
        x0: start of the input, likewise; it is projected if it is not feasible.
        cost: `c(z, x, *targets) -> (B,)`, a sum over all but the batch.
        inputs: tensors `(B, ...)` that the cell takes, too.
        targets: tensors `(B, ...)` that the cost takes.
        regularizer: `r(x) -> (B,)`.
        constraint: the set $X$ (`L2Ball`, `LInfBall`, `Box`), or a `Proximal` penalty; then `x0` is one tensor.
        step_size: $\alpha$, a number or `(B,)`, say the `step_size` of an earlier solution; None: 1.5 over the
            curvature (1 for `GaussSeidel()`, half for `Joint()`), measured for each sample at the start with six
            evaluations and products. With a given one the curvature is measured at the end, and a sample that
            converged only because its step is short is called STALLED.
        solver: of the joint fixed point; its tolerance holds for each block. Where answers lie on the border of a small
            set, `Picard()` ends less often elsewhere.
        schedule: of a round. `Nested()` bears longer steps and ends less often at another stationary point than the
            paper's `Joint()`, whose rounds cost less.
        gradient: of `value` in parameters, inputs and targets. `Implicit()` is exact, active constraints included;
            `Envelope()` if the outer loss is a multiple of this cost; `FirstOrder()` holds the input constant.
        params: tensors that cell, cost or regularizer depend on and that are to receive gradients. None: the parameters
            of those that are modules; if one is a function, all is treated as a closure, as by `fixed_point`: first
            derivatives only, and no sample leaves the batch early.
        equilibrium: finds state and adjoint once more at the answer, for `cost`, `stationarity` and the check of a
            given step. A sample whose cost is above that of its start, say at a maximum, gets the start back, as
            DIVERGED. None: leave all of that out, as in training.
        trace: record the residual of every round.

    Returns:
        `InputSolution`; `value` is differentiable.

    Raises:
        TypeError, ValueError: something is of the wrong kind or shape.

    Example:
        >>> import torch, equipoise as eq
        >>> cell = lambda z, x: 0.5 * z + x
        >>> solution = eq.optimize_inputs(
        ...     cell, z0=torch.zeros(1, 1), x0=torch.zeros(1, 1),
        ...     cost=lambda z, x: 0.5 * (z - 3).square().sum(1), regularizer=lambda x: 0.25 * x.square().sum(1),
        ... )
        >>> z, mu, x = solution.raise_for_status().value
        >>> round(float(x), 3), round(float(z), 3)
        (1.333, 2.667)

    Source: Gurumurthy, Bai, Manchester and Kolter (2021). Beyond the paper: every iterate is projected, blocks are
    balanced and converge separately, steps are measured, gradients are exact.
    """
    _check(constraint, step_size, solver, schedule, gradient, x0)
    states = Layout.of(z0), Layout.of(x0, "x0")
    z = states[0].pack(z0, "z0", _first(z0).dtype).detach()
    x = states[1].pack(x0, "x0", z.dtype, cast=True).detach()
    batch = len(z)
    if len(x) != batch:
        raise ValueError(f"x0 has {len(x)} rows, z0 has {batch}; give each sample an input")
    given, cell_layout = InputLayout.flatten(inputs, batch)
    wanted, cost_layout = InputLayout.flatten(targets, batch)
    bounds = []
    if isinstance(constraint, Constraint):
        bounds = [_broadcast(name, t, x0.shape) for name, t in constraint.tensors().items()]
    joint = JointModule(cell, cost, regularizer, constraint, states, cell_layout, cost_layout, schedule)
    start = (z, torch.zeros_like(z), x)
    step = torch.ones_like(z[:, :1]) * (1.0 if step_size is None else _column(step_size, batch).to(z))
    f = JointMap(joint, start, (step, *given, *wanted, *bounds), params=params)
    free = f.pack(start)
    with torch.no_grad(), f.solve_context():
        v = f.with_inputs([t.detach() for t in f.tensors]).project(free)
        moved, size = (torch.linalg.vector_norm(t[:, -f.size :], dim=1) for t in (v - free, free))
        if step_size is None:
            v, step = measure(f, v)
            f = f.with_step(schedule.stride * step)
        solution = solver.solve(f.variant(schedule), v, trace=trace)
        looked = _look_again(f, v, solution, solver, equilibrium, checked=step_size is not None)
        joint_cost = f.variant(Held()).call_user(joint.objective, looked.value)
    counts = dataclasses.replace(joint.counts)
    solution = dataclasses.replace(solution, value=looked.value, status=looked.status)
    final = f.with_schedule(Held() if isinstance(gradient, StateOnly) else Joint())  # the least graph, same fixed point
    flat = f.unpack(gradient.attach(final, v, solution).value)
    return InputSolution(
        value=(states[0].unpack(flat[0]), states[0].unpack(flat[1]), states[1].unpack(flat[2])),
        status=looked.status,
        residual=solution.residual,
        num_steps=solution.num_steps,
        num_evals=counts.evals,
        num_vjps=counts.vjps,
        trace=solution.trace,
        map=f,
        joint_cost=joint_cost,
        cost=looked.cost,
        stationarity=looked.stationarity,
        step_size=f.tensors[0][:, 0],
        infeasible_start=moved > OUTSIDE * size,
    )


@dataclasses.dataclass(eq=False)
class _Look:
    """The answer as it looks at its equilibrium."""

    value: Tensor
    status: Tensor
    cost: Tensor | None = None
    stationarity: Tensor | None = None


def _look_again(
    f: JointMap, start: Tensor, solution: Solution[Tensor], solver: Solver, equilibrium: Solver | None, *, checked: bool
) -> _Look:
    """Settle state and adjoint at the answer; take back what is worse than the start, or not what it claims to be.

    The input's residual is in proportion to its step: where `checked`, a sample is called converged only if it meets
    the tolerance at a step of one over the curvature, too.
    """
    value, status = solution.value, solution.status
    if equilibrium is None:
        return _Look(value, status)
    held, step = f.variant(Held()), f.tensors[0]
    settled = equilibrium.solve(held, value).value
    cost = held.call_user(f.f.objective, settled)
    first = equilibrium.solve(held, start).value
    before = held.call_user(f.f.objective, first)
    worse = ~(cost <= before + WORSE * before.abs()) & before.isfinite()
    value, settled = (torch.where(worse[:, None], first, t) for t in (value, settled))
    cost = torch.where(worse, before, cost)
    status = torch.where(worse & (status != Status.NONFINITE), int(Status.DIVERGED), status)
    claimed = status == Status.CONVERGED
    if checked and bool(claimed.any()):
        probe = Probe(f, settled)
        longer = torch.maximum(probe.inverse_curvature((settled - start)[:, -f.size :]), step)
        allowed = SLACK * solver.tolerance(torch.linalg.vector_norm(probe.x, dim=1))
        short = torch.linalg.vector_norm(_moved(f, settled, longer), dim=1) > allowed
        status = torch.where(short & claimed, int(Status.STALLED), status)
    stationarity = torch.linalg.vector_norm(_moved(f, settled, step), dim=1) / step[:, 0]
    return _Look(value, status.to(solution.status.dtype), cost, stationarity)


def _moved(f: JointMap, v: Tensor, step: Tensor) -> Tensor:
    """How far a step would lead the input, `(b, p)`."""
    return (f.variant(Joint(), step).call(v) - v)[:, -f.size :]


def _check(
    constraint: Any,
    step_size: float | Tensor | None,
    solver: Any,
    schedule: Any,
    gradient: Any,
    x0: Any,
) -> None:
    steps = torch.as_tensor(1.0 if step_size is None else step_size)
    if not bool(((steps > 0) & steps.isfinite()).all()):
        raise ValueError(f"step_size={step_size!r}: must be positive and finite, or None to measure it")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a schedule such as Joint() or Nested(), got {schedule!r}")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver such as Anderson(), got {solver!r}")
    if not isinstance(gradient, Gradient):
        raise TypeError(f"gradient must be a gradient such as Implicit(), got {gradient!r}")
    if gradient.uses_inverse:
        raise ValueError(f"gradient {gradient!r} reads the solver's inverse, which is of another map; take Implicit()")
    if constraint is not None and not isinstance(constraint, (Constraint, Proximal)):
        raise TypeError(
            f"constraint must be one of equipoise.constraints such as L2Ball(radius=1.0), got {constraint!r}"
        )
    if constraint is not None and not isinstance(x0, Tensor):
        raise TypeError(f"a constraint needs x0 as one tensor, got {type(x0).__name__}")


def _first(state: Any) -> Tensor:
    parts = state.values() if isinstance(state, Mapping) else state
    first: Tensor = state if isinstance(state, Tensor) else next(iter(parts))
    return first


def _column(step_size: float | Tensor, batch: int) -> Tensor:
    step = torch.as_tensor(step_size)
    if step.ndim and step.shape != (batch,):
        raise ValueError(
            f"step_size has shape {tuple(step.shape)}; give one number, or one for each sample, ({batch},)"
        )
    return step.expand(batch)[:, None]


def _broadcast(name: str, bound: Tensor, shape: torch.Size) -> Tensor:
    try:
        return bound.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"the constraint's {name} has shape {tuple(bound.shape)}, which does not broadcast to x0's {tuple(shape)}"
        ) from None
