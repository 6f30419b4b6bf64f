"""Optimization of inputs of an equilibrium, together with the equilibrium."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.constraints import Constraint, Proximal
from equipoise.core.solution import Solution
from equipoise.core.state import Layout
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs.curvature import measure_at_start
from equipoise.inputs.gradients import StateOnly
from equipoise.inputs.joint import JointMap, JointModule
from equipoise.inputs.schemes import FixedInput, Joint, Nested, UpdateScheme
from equipoise.inputs.verification import Verification, verify
from equipoise.solvers import GMRES, Anderson, Solver

INFEASIBLE = 1e-6  # relative distance from the constraint above which a start is reported as infeasible


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptimizer:
    r"""Method by which `optimize_inputs` finds inputs.

    Args:
        solver: solver of the joint fixed point; its tolerance holds for each block. If the answers lie on the border of
            a small set, `Picard()` ends less often elsewhere.
        scheme: update scheme of a round. `Nested()` allows longer steps and ends less often at another stationary point
            than the paper's `Joint()`, whose rounds are cheaper.
        step_size: $\alpha$, a number or `(B,)`, such as the `step_size` of an earlier solution. None: 1.5 over the
            curvature (1 for `GaussSeidel()`, half for `Joint()`), measured for each sample at the start with six
            evaluations and products. If it is given, the verification measures the curvature, and a sample that
            converged only because its step is short becomes STALLED.
        gradient: gradient of the solution in parameters, inputs and targets. `Implicit()` is exact, also with active
            constraints; `Envelope()` is exact if the outer loss is a multiple of the cost; `FirstOrder()` holds the
            input constant.
        verify_solver: solver of state and adjoint at the answer, for `cost`, `stationarity`, the search for saddle
            points and the test of a given step. A sample whose cost is above that of its start, such as a maximum,
            gets the start back and becomes DIVERGED. None: no verification, as in training.

    Raises:
        TypeError, ValueError: a field is of another kind, or `step_size` is not positive and finite.
    """

    solver: Solver = Anderson(memory=10, max_steps=100, rtol=1e-4, ridge=1e-2)
    scheme: UpdateScheme = Nested()
    step_size: float | Tensor | None = None
    gradient: Gradient = Implicit(solver=GMRES(max_steps=200, rtol=0.0, atol=1e-6))
    verify_solver: Solver | None = Anderson(max_steps=50, rtol=1e-5)

    def __post_init__(self) -> None:
        steps = torch.as_tensor(1.0 if self.step_size is None else self.step_size)
        if not bool(((steps > 0) & steps.isfinite()).all()):
            raise ValueError(f"step_size={self.step_size!r}: must be positive and finite, or None to measure it")
        for name, kind, example in (
            ("solver", Solver, "Anderson()"),
            ("scheme", UpdateScheme, "Joint() or Nested()"),
            ("gradient", Gradient, "Implicit()"),
            ("verify_solver", Solver | None, "Anderson(), or None"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be a {name.split('_')[-1]} such as {example}, got {getattr(self, name)!r}"
                )
        if self.gradient.uses_inverse:
            raise ValueError(
                f"gradient {self.gradient!r} reads the solver's inverse, which is of another map; take Implicit()"
            )


@dataclasses.dataclass(frozen=True)
class InputSolution(Solution[tuple[Any, Any, Any]]):
    r"""Optimized inputs and their convergence record; `value` is $(z, \mu, x)$.

    `num_steps` counts rounds of each sample; `num_evals` and `num_vjps` count evaluations of the cell and products with
    its Jacobian, including those before and after the solve.

    Attributes:
        joint_cost: `(B,)` the minimized cost at the joint iterate `(z, x)`.
        cost: `(B,)` the same at the equilibrium of `x`; None without verification. If the two differ, the iterate is no
            equilibrium.
        stationarity: `(B,)` $\|x - P(x - \alpha \nabla)\| / \alpha$ there, zero at an optimum; None likewise.
        step_size: `(B,)` $\alpha$ of each sample.
        infeasible_start: `(B,)` whether `x0` was outside of the constraint and was projected.
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
    params: Sequence[Tensor] | None = None,
    optimizer: InputOptimizer = InputOptimizer(),
    trace: bool = False,
) -> InputSolution:
    r"""Minimize a cost of an equilibrium over the layer's input, and find the equilibrium at the same time.

    $$ \min_{x \in X} \; c(z^*(x), x) + r(x) \quad \text{subject to} \quad z^* = f(z^*, x) $$

    State, adjoint and input are one fixed point, which any solver finds; an evaluation of it is one of the cell and one
    backward pass (see `Joint` and `Nested`). Each is a block with its own convergence:

    $$ z = f(z, x), \qquad \mu = J_z^\top \mu + \nabla_z c, \qquad
       x = P_X(x - \alpha (J_x^\top \mu + \nabla_x (c + r))) $$

    The answer is a stationary point with a cost no higher than that of the start. A sample at a saddle point moves to a
    lower cost and becomes STALLED; optimize again from there. Twelve products look for the direction and may miss a
    weak one, and a minimum may be local: compare the field `cost` of the solution with that of other starts.

    Args:
        cell: `f(z, x, *inputs)`, a module or a function.
        z0: start of the state, a tensor or a container of tensors `(B, ...)`.
        x0: start of the input, likewise; it is projected if it is not feasible.
        cost: `c(z, x, *targets) -> (B,)`, a sum over all but the batch.
        inputs: further inputs of the cell, tensors `(B, ...)`.
        targets: further arguments of the cost, tensors `(B, ...)`.
        regularizer: `r(x) -> (B,)`.
        constraint: the set $X$ (`L2Ball`, `LInfBall`, `Box`), or a `Proximal` penalty; then `x0` is one tensor.
        params: tensors that cell, cost or regularizer depend on and that are to receive gradients. None: the parameters
            of those that are modules; if one is a function, all is treated as a closure, as by `fixed_point`: first
            derivatives only, and no sample leaves the batch early.
        optimizer: solver, update scheme, step, gradient and verification.
        trace: record the residual of every round.

    Returns:
        `InputSolution`; `value` is differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong kind or shape.

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
    layouts = Layout.of(z0), Layout.of(x0, "x0")
    z = layouts[0].pack(z0, "z0", _dtype(z0)).detach()
    x = layouts[1].pack(x0, "x0", z.dtype, cast=True).detach()
    if len(x) != len(z):
        raise ValueError(f"x0 has {len(x)} rows, z0 has {len(z)}; give each sample an input")
    step, given = _steps(optimizer.step_size, z), (*inputs, *targets, *_bounds(constraint, x0))
    sizes = len(inputs), len(targets)
    joint = JointModule(cell, cost, regularizer, constraint, layouts=layouts, sizes=sizes, scheme=optimizer.scheme)
    start = (z, torch.zeros_like(z), x)
    f = JointMap(joint, start, (*given, step), params=params)
    free = f.pack(start)
    with torch.no_grad(), f.solve_context():
        fixed = f.detached()
        v = fixed.project(free)
        moved, size = (torch.linalg.vector_norm(t[:, -f.size :], dim=1) for t in (v - free, free))
        if optimizer.step_size is None:
            v, inverse = measure_at_start(fixed, v)
            step = optimizer.scheme.step_factor * inverse
            fixed = fixed.with_step(step)
        solution = optimizer.solver.solve(fixed, v, trace=trace)
        found = Verification(solution.value, solution.status)
        if optimizer.verify_solver is not None:
            found = verify(
                fixed,
                v,
                solution,
                solver=optimizer.solver,
                verify_solver=optimizer.verify_solver,
                step_given=optimizer.step_size is not None,
            )
        joint_cost = fixed.call_user(joint.objective, found.value)
    counts = dataclasses.replace(joint.counts)
    solution = dataclasses.replace(solution, value=found.value, status=found.status)
    # All schemes have the same fixed points; these keep the smallest graph.
    scheme = FixedInput() if isinstance(optimizer.gradient, StateOnly) else Joint()
    f = f.with_step(step)
    # The residual is that of another scheme, step or point: not one to compare with in the backward pass.
    unknown = dataclasses.replace(solution, residual=torch.full_like(solution.residual, torch.nan))
    flat = f.unpack(optimizer.gradient.attach(f.with_scheme(scheme), v, unknown).value)
    return InputSolution(
        value=(layouts[0].unpack(flat[0]), layouts[0].unpack(flat[1]), layouts[1].unpack(flat[2])),
        status=found.status,
        residual=solution.residual,
        num_steps=solution.num_steps,
        num_evals=counts.evals,
        num_vjps=counts.vjps,
        trace=solution.trace,
        map=f,
        joint_cost=joint_cost,
        cost=found.cost,
        stationarity=found.stationarity,
        step_size=step[:, 0],
        infeasible_start=moved > INFEASIBLE * size,
    )


def _dtype(state: Any) -> torch.dtype:
    parts = state.values() if isinstance(state, Mapping) else state
    first: Tensor = state if isinstance(state, Tensor) else next(iter(parts))
    return first.dtype


def _steps(step_size: float | Tensor | None, z: Tensor) -> Tensor:
    """Return the step of each sample, `(B, 1)`; ones if it is still to be measured."""
    step = torch.as_tensor(1.0 if step_size is None else step_size)
    if step.ndim and step.shape != z.shape[:1]:
        raise ValueError(
            f"step_size has shape {tuple(step.shape)}; give one number, or one for each sample, ({len(z)},)"
        )
    return torch.ones_like(z[:, :1]) * step.expand(len(z))[:, None].to(z)


def _bounds(constraint: Any, x0: Any) -> list[Tensor]:
    """Return the tensors of a constraint in the shape of the inputs."""
    if constraint is not None and not isinstance(constraint, (Constraint, Proximal)):
        raise TypeError(
            f"constraint must be one of equipoise.constraints such as L2Ball(radius=1.0), got {constraint!r}"
        )
    if constraint is not None and not isinstance(x0, Tensor):
        raise TypeError(f"a constraint needs x0 as one tensor, got {type(x0).__name__}")
    bounds = []
    for name, bound in constraint.tensors().items() if isinstance(constraint, Constraint) else ():
        try:
            bounds.append(bound.expand(x0.shape))
        except RuntimeError:
            raise ValueError(
                f"the constraint's {name} has shape {tuple(bound.shape)}, which does not broadcast to x0's "
                f"{tuple(x0.shape)}"
            ) from None
    return bounds
