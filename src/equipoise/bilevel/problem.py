"""Evaluation of a bilevel problem at one point: inner solve, outer loss and hypergradient."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.hyper import HyperLayout, flatten
from equipoise.bilevel.inner import Inner, InnerLoss
from equipoise.core.function_map import FunctionMap
from equipoise.core.map import Counts
from equipoise.core.solution import Solution, Status
from equipoise.fixed_point import solve_map
from equipoise.gradients import Gradient, Implicit, JacobianFree, Unrolled
from equipoise.gradients.adjoint import AdjointMap
from equipoise.solvers import LBFGS, AdjointBroyden, Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recorded(Gradient):
    """A gradient that records its adjoint solution and the residual there."""

    gradient: Gradient
    record: list[tuple[Tensor, Tensor]]

    @property
    def uses_inverse(self) -> bool:  # type: ignore[override]
        return self.gradient.uses_inverse

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        w = self.gradient.cotangent(adjoint, g, solution)
        self.record.append((w.detach(), (adjoint.fz - adjoint.z).detach()))
        return w


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Start of an inner solve.

    Attributes:
        z: the state.
        pairs: L-BFGS pairs of the solve that found it, if there was one.
        pair_hyper: the hyperparameters at which these pairs hold.
        adjoint: `(B, D)` start of the adjoint solve.
    """

    z: Any
    pairs: tuple[Tensor, Tensor] | None = None
    pair_hyper: tuple[Tensor, ...] = ()
    adjoint: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Outer loss at one point, and the inner solution behind it.

    Attributes:
        x: `(p,)` float64, the hyperparameters as one vector.
        hyper: the hyperparameters, detached.
        leaves: the hyperparameters in the graph of `total`.
        tolerance: relative tolerance of the inner solve.
        z: inner solution, detached.
        solution: record of the inner solve.
        total: outer loss, summed over the rows.
        counts: evaluations and vector-Jacobian products, those of a later hypergradient included.
        record: `adjoint`, as the hypergradient leaves it.
    """

    x: Tensor
    hyper: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    tolerance: float
    z: Any
    solution: Solution[Any]
    total: Tensor
    counts: Counts
    record: list[tuple[Tensor, Tensor]]

    @property
    def value(self) -> float:
        """Outer loss; NaN if the inner solve diverged or met a number that is not finite."""
        failed = (self.solution.status == Status.NONFINITE) | (self.solution.status == Status.DIVERGED)
        return math.nan if bool(failed.any()) else float(self.total.detach())

    def hypergradient(self) -> Tensor | None:
        """Return the gradient of the outer loss, `(p,)` float64; None if it is not finite."""
        if not self.total.requires_grad:
            return torch.zeros_like(self.x)
        gradient = flatten(torch.autograd.grad(self.total, self.leaves, materialize_grads=True))
        return gradient if bool(gradient.isfinite().all()) else None

    @property
    def adjoint(self) -> tuple[Tensor, Tensor] | None:
        """Adjoint solution and inner residual, each `(B, D)`; None without an adjoint solve."""
        return self.record[0] if self.record else None


class OuterProblem:
    """Outer loss of the solution of an inner problem, as a function of the hyperparameters.

    Args:
        outer: as in `minimize_outer`.
        inner: as in `minimize_outer`.
        hyper0: as in `minimize_outer`.
        solver: as in `minimize_outer`.
        gradient: as in `minimize_outer`; None: no hypergradients.
    """

    def __init__(
        self,
        outer: Callable[..., Tensor],
        inner: Inner | Callable[..., Tensor],
        hyper0: Tensor | Sequence[Tensor],
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        if not callable(outer):
            raise TypeError(f"outer must be a function outer(z, *hyper) that returns (B,), got {outer!r}")
        if isinstance(solver, (AdjointBroyden, LBFGS)) and solver.outer_loss is not None:
            name = type(solver).__name__
            raise ValueError(
                f"solver={name}(outer_loss=...): the outer loss of this problem takes its place; give "
                f"{name}(outer_every=...) alone"
            )
        self.outer, self.inner = outer, inner if isinstance(inner, Inner) else InnerLoss(inner)
        self.solver = self.inner.solver if solver is None else solver
        self.gradient = gradient
        self.layout = HyperLayout.of(hyper0)
        self.scale = 0.0  # norm of the first residual that is not zero: the unit of the tolerances

    def evaluate(self, x: Tensor, tolerance: float, start: Start, factor: float = 1.0) -> Evaluation:
        """Solve the inner problem and evaluate the outer loss.

        Args:
            x: `(p,)` the hyperparameters.
            tolerance: relative tolerance of the inner and of the adjoint solve.
            start: where both begin.
            factor: on the tolerance of the inner solve of an `InnerLoss`.

        Raises:
            ValueError: `outer` does not return `(B,)`.
        """
        leaves = self.layout.unflatten(x)
        hyper = tuple(leaf.detach() for leaf in leaves)
        f = self.inner.map(start.z, leaves)
        solver = self._warm_solver(f, hyper, start)
        least = 1e3 * torch.finfo(f.dtype).eps  # rounding leaves no smaller tolerance within reach
        if self.inner.relative:
            solver = dataclasses.replace(solver, rtol=max(tolerance, least), atol=0.0)
        else:
            atol = max(tolerance * factor, least) * self._unit(f, start.z)
            solver = dataclasses.replace(solver, rtol=0.0, atol=atol)
        record: list[tuple[Tensor, Tensor]] = []
        gradient = self._recorded_gradient(max(tolerance, least), start.adjoint, record)
        with torch.set_grad_enabled(self.gradient is not None):
            solution = solve_map(f, start.z, solver=solver, gradient=gradient)
            values = self.outer(solution.value, *leaves)
        if not isinstance(values, Tensor) or values.shape != (f.batch,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"outer must return one number for each row of the state, ({f.batch},), got {shape}")
        return Evaluation(
            x=x,
            hyper=hyper,
            leaves=leaves,
            tolerance=tolerance,
            z=f.unpack(f.pack(solution.value).detach()),
            solution=solution,
            total=values.sum(),
            counts=f.counts,
            record=record,
        )

    def start_at(self, evaluation: Evaluation) -> Start:
        """Return the start of later inner and adjoint solves: the solutions of this evaluation."""
        pairs = LBFGS.pairs_of(evaluation.solution) if isinstance(self.solver, LBFGS) else None
        return Start(evaluation.z, pairs, evaluation.hyper, evaluation.adjoint and evaluation.adjoint[0])

    def _unit(self, f: FunctionMap, z0: Any) -> float:
        """Return the norm of the first residual, per row; 0 if it is not finite."""
        if self.scale == 0:
            with torch.no_grad(), f.solve_context():
                rows = torch.arange(f.batch, device=f.device)
                point = f.evaluate(f.pack(z0), rows, torch.ones_like(rows, dtype=torch.bool))
            norm = float(torch.linalg.vector_norm(point.residual)) / math.sqrt(f.batch)
            self.scale = norm if math.isfinite(norm) else 0.0
        return self.scale

    def _warm_solver(self, f: FunctionMap, hyper: Sequence[Tensor], start: Start) -> Solver:
        """Return the solver with the outer loss as a probe and with the pairs of the last solve."""
        solver = self.solver
        if isinstance(solver, (AdjointBroyden, LBFGS)) and solver.outer_every is not None:
            solver = dataclasses.replace(solver, outer_loss=lambda z, rows: self.outer(z, *hyper))
        if isinstance(solver, LBFGS) and start.pairs is not None:
            # The Hessian changed by that of the penalty: y + (P''(new) - P''(old)) s is the pair of the new objective.
            s, y = start.pairs
            change = self.inner.hessian_change(f, f.pack(start.z), s, start.pair_hyper, hyper)
            if change is not None:
                solver = dataclasses.replace(solver, pairs=(s, y + change))
        return solver

    def _recorded_gradient(self, atol: float, adjoint: Tensor | None, record: list[tuple[Tensor, Tensor]]) -> Gradient:
        """Return the gradient with a record; an adjoint solve takes the tolerance and the last adjoint solution."""
        gradient = self.gradient
        if gradient is None:
            return JacobianFree()
        if isinstance(gradient, Unrolled):  # it has no adjoint solution
            return gradient
        if isinstance(gradient, Implicit):
            solver = dataclasses.replace(gradient.solver, rtol=0.0, atol=atol)
            start = adjoint if gradient.start is None else gradient.start
            gradient = dataclasses.replace(gradient, solver=solver, start=start)
        return _Recorded(gradient=gradient, record=record)
