"""Fixed points from map, solver and gradient: the entry to the core."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.guards import warn_once
from equipoise.core.solution import Solution
from equipoise.gradients import Gradient, Implicit
from equipoise.solvers import Anderson, Solver

S = TypeVar("S")


def fixed_point(
    f: Callable[..., S],
    z0: S,
    *inputs: Any,
    solver: Solver = Anderson(),
    gradient: Gradient = Implicit(),
    params: Sequence[Tensor] | None = None,
    coupled: bool | Tensor = False,
    per_part: bool = False,
    trace: bool = False,
) -> Solution[S]:
    r"""Solve $z = f(z, \text{inputs})$ and make the solution differentiable.

    Args:
        f: a module or function; called as `f(z, *inputs)`, it returns a state like `z`.
        z0: start: a tensor, tuple, list or dict of tensors `(B, ...)`.
        inputs: tensors (or containers of tensors) whose first dimension is the batch. Rows of inputs leave the batch
            together with the samples that converged, and receive gradients of any order.
        solver: finds the equilibrium.
        gradient: differentiates it.
        params: further tensors that `f` depends on and that need gradients. None: the parameters of a module; a
            function is then a closure, with first derivatives only, from whose batch no sample leaves early.
        coupled: False: rows of the batch are independent, which is checked when some have converged and others have
            not. True: the batch is one system, such as a graph whose nodes are its rows; inputs may then have any
            shape. `(B,)` integers: the group of each row; a group is one system, with one status and residual.
        per_part: each part of a tuple, list or dict state must meet the tolerance by itself, whatever its scale.
        trace: record the residual of every evaluation.

    Returns:
        `Solution` whose `value` has the structure of `z0`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit; the cell uses batch statistics; `Shine` after a solver that keeps no inverse.

    Example:
        >>> import torch, equipoise as eq
        >>> cell = torch.nn.Linear(3, 3)
        >>> solution = eq.fixed_point(lambda z, x: torch.tanh(cell(z) + x), torch.zeros(2, 3), torch.ones(2, 3))
        >>> solution.converged.all().item()
        True
    """
    check_methods(solver, gradient)
    f_map = FunctionMap(f, z0, inputs, params=params, coupled=coupled, per_part=per_part)
    return solve_map(f_map, z0, solver=solver, gradient=gradient, trace=trace)


def solve_map(f: FunctionMap, z0: S, *, solver: Solver, gradient: Gradient, trace: bool = False) -> Solution[S]:
    """Solve for the fixed point of a map, say of one with blocks and a projection; see `fixed_point`."""
    check_methods(solver, gradient)
    if torch.is_grad_enabled() and gradient.uses_inverse and not solver.keeps_inverse:
        raise ValueError(
            f"gradient {gradient!r} reads the forward solver's inverse, but {type(solver).__name__} keeps none; "
            "use Broyden or LBFGS as solver, or Implicit() as gradient"
        )
    floor = torch.finfo(f.state_dtype).eps / 2
    if 0 < solver.rtol < floor and solver.atol == 0 and solver.max_steps > 0:
        warn_once(
            "tolerance",
            lambda: (
                f"rtol={solver.rtol:g} is below the rounding of {f.state_dtype}, {floor:.2g}: few samples can meet it; "
                "raise it, or keep the state in a finer dtype"
            ),
        )
    start = f.pack(z0)
    solution: Solution[Any] = gradient.attach(f, start, solver.solve(f, start.detach(), trace=trace))
    if f.groups is not None:
        solution = solution.of_rows(f.groups.number)
    return dataclasses.replace(solution, value=f.unpack(solution.value), map=f, start=z0)


def check_methods(solver: Any, gradient: Any) -> None:
    """Check the types of a solver and a gradient."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a solver such as Anderson(), got {solver!r}")
    if not isinstance(gradient, Gradient):
        raise TypeError(f"gradient must be a gradient such as Implicit(), got {gradient!r}")
    if gradient.replaces_solver and solver.max_steps > 0:
        raise ValueError(
            f"{gradient!r} iterates by itself and takes the place of the solver, got {solver!r}; take "
            "solver=Picard(max_steps=0) with it, or another gradient"
        )
