"""Optimize inputs of an equilibrium while it is still being solved for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.constraints import Constraint, Proximal
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs.joint import JointModule, Rows
from equipoise.inputs.schedules import Joint, Nested, Schedule
from equipoise.map import Map
from equipoise.solution import Solution
from equipoise.solvers import GMRES, Anderson, Solver
from equipoise.state import InputLayout, Layout

FAST = 0.5  # contraction of a layer below which two inner steps beat acceleration of all three
PROBES = 3  # slopes whose change gives the curvature
NUDGE = 1e-3  # length of a probing step, relative


@dataclasses.dataclass(frozen=True)
class InputSolution(Solution[tuple[Any, Any, Any]]):
    r"""Optimized inputs and all that the solve told about them; `value` is $(z, \mu, x)$.

    Attributes:
        cost: `(B,)` what is minimized, at the equilibrium that was solved for once more at the answer `x`.
        joint_cost: `(B,)` the same at the joint iterate `z`; where they differ, the iterate is no equilibrium.
        stationarity: `(B,)` $\|x - P(x - \alpha \nabla)\| / \alpha$ at the answer, zero at an optimum.
        step_size: `(B,)` $\alpha$ of each sample.
        infeasible_start: `(B,)` whether `x0` lay outside of the constraint and was projected.
        schedule: that was followed.
    """

    cost: Tensor = dataclasses.field(kw_only=True)
    joint_cost: Tensor = dataclasses.field(kw_only=True)
    stationarity: Tensor = dataclasses.field(kw_only=True)
    step_size: Tensor = dataclasses.field(kw_only=True)
    infeasible_start: Tensor = dataclasses.field(kw_only=True)
    schedule: Schedule = dataclasses.field(kw_only=True)


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
    step_size: float | None = None,
    solver: Solver = Anderson(memory=5, max_steps=100, rtol=1e-4),
    schedule: Schedule | None = None,
    gradient: Gradient = Implicit(solver=GMRES(max_steps=200, rtol=0.0, atol=1e-6)),
    params: Sequence[Tensor] | None = None,
    equilibrium: Solver = Anderson(max_steps=50, rtol=1e-5),
) -> InputSolution:
    r"""Minimize a cost of an equilibrium over the layer's input, and find the equilibrium at the same time.

    $$ \min_{x \in X} \; c(z^*(x), x) + r(x) \quad \text{subject to} \quad z^* = f(z^*, x) $$

    State, adjoint and input are one fixed point, which any solver finds; an evaluation of it is one of the cell and one
    reverse pass (see `Joint` and `Nested`). Each is a block that converges by itself:

    $$ z = f(z, x), \qquad \mu = J_z^\top \mu + \nabla_z c, \qquad
       x = P_X(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    The answer is a stationary point: a minimum if the iteration is a descent, which a saddle is not; look at `cost`.

    Args:
        cell: `f(z, x, *inputs)`, a module or a function.
        z0: start of the state, a tensor or a container of tensors `(B, ...)`.
        x0: start of the input, likewise; it is projected if it is not feasible.
        cost: `c(z, x, *targets) -> (B,)`, a sum over all but the batch.
        inputs: tensors `(B, ...)` that the cell takes, too.
        targets: tensors `(B, ...)` that the cost takes.
        regularizer: `r(x) -> (B,)`.
        constraint: the set $X$ (`L2Ball`, `LInfBall`, `Box`), or a `Proximal` penalty; then `x0` is one tensor.
        step_size: $\alpha$; None: the inverse of the curvature, measured for each sample before the solve.
        solver: of the joint fixed point; its tolerance holds for each block.
        schedule: None: `Nested()` if the layer is seen to contract fast, else `Joint()`.
        gradient: of `value` in parameters, inputs and targets. `Implicit()` is exact, active constraints included;
            `Envelope()` if the outer loss is a multiple of this cost; `FirstOrder()` holds the input constant.
        params: tensors that cell, cost or regularizer depend on and that are to receive gradients. None: the parameters
            of those that are modules; functions must then depend on no other.
        equilibrium: solver by which the answer's equilibrium is found once more, for `cost`.

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

    Source: Gurumurthy, Bai, Manchester and Kolter (2021), Joint inference and input optimization; the blocks converge
    separately here, iterates obey the constraint, and training has the exact gradient.
    """
    _check(step_size, schedule, constraint, x0)
    states = Layout.of(z0), Layout.of(x0, "x0")
    start = states[0].pack(z0, "z0", _dtype(z0)), states[1].pack(x0, "x0", _dtype(z0), cast=True)
    batch = len(start[0])
    layouts = []
    tensors: list[Tensor] = []
    for given in (inputs, targets):
        listed, layout = InputLayout.flatten(given, batch)
        tensors += listed
        layouts.append(layout)
    if isinstance(constraint, Constraint):
        tensors += [_rows(t, batch) for t in constraint.tensors().values()]
    joint = JointModule(cell, cost, regularizer, constraint, states, layouts[0], layouts[1], schedule or Joint())
    step = start[0].new_ones(batch, 1) * (step_size or 0.0)
    given = tuple(t.requires_grad for t in tensors)
    own = tuple(p for p in joint.parameters()) if params is None else tuple(params)
    z, x = (part.detach() for part in start)
    v0 = (z, torch.zeros_like(z), x)
    f = Map(
        joint,
        v0,
        (step, *tensors),
        params=own,
        blocks=(z.shape[1], z.shape[1], x.shape[1]),
        projection=joint.project if isinstance(constraint, Constraint) else None,
    )
    plain = tuple(t.detach() for t in tensors)
    outside = torch.zeros(batch, dtype=torch.bool, device=z.device)
    if isinstance(constraint, Constraint):
        rows = Rows(joint, plain)
        with torch.no_grad():
            outside = rows.constraint.violation(rows.input(x)) > 1e-6
    v = f.project(torch.cat(v0, dim=1)) if not any(given) else f.on([step, *plain]).project(torch.cat(v0, dim=1))
    with torch.no_grad():
        spent = f.counts.evals
        if schedule is None:
            joint.schedule = schedule = _choose(f, joint, v)
        if step_size is None:
            step, v = _curvature_step(f, joint, v)
            f.tensors[0] = step
        spent = f.counts.evals - spent
    solution = solver.solve(f, v)
    return _finish(f, joint, v, solution, gradient, schedule, equilibrium, outside, spent)


def _finish(
    f: Map,
    joint: JointModule,
    start: Tensor,
    solution: Solution[Tensor],
    gradient: Gradient,
    schedule: Schedule,
    equilibrium: Solver,
    outside: Tensor,
    spent: int,
) -> InputSolution:
    """Cost and slope at the answer, and the answer as a function of what it depends on."""
    n, _, p = f.blocks or (0, 0, 0)
    step, *tensors = f.tensors
    rounds = solution.num_evals + spent
    final = copy.copy(f)
    final.f = joint.variant(Joint())  # the same fixed point, and no more graph than that needs
    with torch.no_grad(), final.session():
        z, mu, x = solution.value.split((n, n, p), dim=1)
        rows = Rows(joint, [t.detach() for t in tensors])
        moved = final.on([step, *(t.detach() for t in tensors)]).call(solution.value)[:, 2 * n :]
        joint_cost = rows.objective(z, x)
        layer = Map(lambda z, x, *given: Rows(joint, given).image(z, x), z, (x, *rows.tensors), params=())
        honest = equilibrium.solve(layer, z)
        cost = rows.objective(honest.value, x)
    attached = gradient.attach(final, start, solution)
    flat = attached.value.split((n, n, p), dim=1)
    value = joint.states[0].unpack(flat[0]), joint.states[0].unpack(flat[1]), joint.states[1].unpack(flat[2])
    facts = {field.name: getattr(attached, field.name) for field in dataclasses.fields(Solution)}
    facts |= {
        "value": value,
        "num_evals": rounds * schedule.num_evals,
        "num_vjps": rounds * schedule.num_vjps,
        "map": f,
    }
    return InputSolution(
        **facts,
        cost=cost,
        joint_cost=joint_cost,
        stationarity=torch.linalg.vector_norm(moved - x, dim=1) / step[:, 0],
        step_size=step[:, 0],
        infeasible_start=outside,
        schedule=schedule,
    )


def _running(f: Map, joint: JointModule, step: Tensor) -> Map:
    """The map of a variant of its system, untracked, with the masks and counts of this one."""
    chosen = f.on([step, *(t.detach() for t in f.tensors[1:])])
    chosen.f = joint
    return chosen


def _choose(f: Map, joint: JointModule, v: Tensor) -> Schedule:
    """By the contraction that six steps of the state alone show, at the slowest sample."""
    n, _, p = f.blocks or (0, 0, 0)
    trial = _running(f, joint.variant(Joint()), torch.zeros_like(f.tensors[0]))
    with trial.session():
        sizes = []
        for _ in range(6):
            moved = trial.call(v)
            sizes.append(torch.linalg.vector_norm((moved - v)[:, :n], dim=1))
            v = moved
    ratios = (sizes[-1] / sizes[1].clamp_min(torch.finfo(v.dtype).tiny)) ** (1 / 4)
    return Nested() if bool((ratios < FAST).all()) else Joint()


def _curvature_step(f: Map, joint: JointModule, v: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse curvature of the reduced cost for each sample `(b, 1)`, by power iteration on changes of its slope.

    State and adjoint are solved for at the start and at points near it, by the accelerated iteration with the input
    held. Returns the start with them, too.
    """
    n, _, p = f.blocks or (0, 0, 0)
    free = joint.variant(Joint(), free=True)
    held, stepping = (_running(f, free, torch.full_like(f.tensors[0], size)) for size in (0.0, 1.0))
    held.projection = stepping.projection = None
    warm = Anderson(memory=5, max_steps=25, rtol=1e-4)

    def slope(v: Tensor) -> tuple[Tensor, Tensor]:
        settled = warm.solve(held, v).value
        with stepping.session():
            return settled, v[:, 2 * n :] - stepping.call(settled)[:, 2 * n :]

    v, first = slope(v)
    x = v[:, 2 * n :]
    length = NUDGE * (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True))
    direction = first
    curvature = torch.zeros_like(length)
    for _ in range(PROBES):
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        unit = torch.where(norm > 0, direction / norm.clamp_min(torch.finfo(v.dtype).tiny), 0.0)
        probe = torch.cat([v[:, : 2 * n], x + length * unit], dim=1)
        direction = (slope(probe)[1] - first) / length
        curvature = torch.maximum(curvature, torch.linalg.vector_norm(direction, dim=1, keepdim=True))
    usable = curvature.isfinite() & (curvature > torch.finfo(v.dtype).eps)
    fallback = length / NUDGE / torch.linalg.vector_norm(first, dim=1, keepdim=True).clamp_min(1e-12)
    return torch.where(usable, 1 / curvature.clamp_min(torch.finfo(v.dtype).tiny), fallback.clamp_max(1.0)), v


def _check(step_size: float | None, schedule: Schedule | None, constraint: Any, x0: Any) -> None:
    if step_size is not None and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size={step_size!r}: must be positive and finite, or None to measure it")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a schedule such as Joint() or Nested(), got {schedule!r}")
    if constraint is not None and not isinstance(constraint, (Constraint, Proximal)):
        raise TypeError(
            f"constraint must be one of equipoise.constraints such as L2Ball(radius=1.0), got {constraint!r}"
        )
    if constraint is not None and not isinstance(x0, Tensor):
        raise TypeError(f"a constraint needs x0 as one tensor, got {type(x0).__name__}")


def _dtype(state: Any) -> torch.dtype:
    first = state if isinstance(state, Tensor) else next(iter(state.values() if isinstance(state, dict) else state))
    dtype: torch.dtype = first.dtype
    return dtype


def _rows(bound: Tensor, batch: int) -> Tensor:
    """A bound that follows the rows."""
    return bound if bound.ndim and bound.shape[0] == batch else bound.expand(batch, *bound.shape[1:])
