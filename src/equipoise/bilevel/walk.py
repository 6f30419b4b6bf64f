"""One outer step: the inner solve, the outer loss and the hypergradient; and what is known after many of them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.hyper import HyperLayout
from equipoise.bilevel.inner import Inner, InnerLoss, InnerMap
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.steps import StepRule, Trial
from equipoise.core.function_map import FunctionMap
from equipoise.core.solution import Solution, Status
from equipoise.fixed_point import solve_map
from equipoise.gradients import Gradient, Implicit, JacobianFree, Unrolled
from equipoise.gradients.adjoint import AdjointMap
from equipoise.solvers import LBFGS, AdjointBroyden, Solver

MOST_MISSING = 0.1  # of the outer loss: what may be put down to an inexact inner solve


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Watched(Gradient):
    """A gradient whose adjoint vector is kept: the next adjoint solve starts there, and errors are estimated by it."""

    gradient: Gradient
    seen: list[tuple[Tensor, Tensor]]  # w and the residual r, each (B, D)

    @property
    def uses_inverse(self) -> bool:  # type: ignore[override]
        return self.gradient.uses_inverse

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        w = self.gradient.cotangent(adjoint, g, solution)
        self.seen.append((w.detach(), (adjoint.fz - adjoint.z).detach()))
        return w


class Walk:
    """What is known of a bilevel problem at the points visited so far: the best, the history, the counts."""

    def __init__(
        self,
        outer: Callable[..., Tensor],
        inner: Inner | Callable[..., Tensor],
        z0: Any,
        hyper0: Tensor | Sequence[Tensor],
        solver: Solver | None,
        gradient: Gradient | None,
        observe: Callable[[OuterStep, Any], None] | None,
    ) -> None:
        if not callable(outer):
            raise TypeError(f"outer must be a function outer(z, *hyper) that returns (B,), got {outer!r}")
        self.outer, self.inner = outer, inner if isinstance(inner, Inner) else InnerLoss(inner)
        if isinstance(solver, (AdjointBroyden, LBFGS)) and solver.outer is not None:
            name = type(solver).__name__
            raise ValueError(
                f"solver={name}(outer=...): it is told the outer loss of this problem; give {name}(cadence=...) alone"
            )
        self.solver = self.inner.solver if solver is None else solver
        self.gradient, self.observe = gradient, observe
        self.layout = HyperLayout.of(hyper0)
        self.z = z0  # where the next inner solve starts
        self.pairs: tuple[Tensor, Tensor] | None = None  # what L-BFGS learned there, with
        self.taught: tuple[Tensor, ...] = ()  # these hyperparameters
        self.began = time.perf_counter()
        self.num_evals = self.num_vjps = 0
        self.history: list[OuterStep] = []
        self.best: tuple[tuple[bool, bool, float], OuterStep, Any] | None = None
        self.scale = 0.0  # norm of the first residual
        self.adjoint: Tensor | None = None
        self.sensitivity: tuple[float, float] | None = None  # norm of the first adjoint vector and of the last
        self.noise = 0.0  # error of the outer loss per unit of residual
        self.missing = 0.0  # by how much the outer loss of the exact inner solution is larger, to first order

    @property
    def gradient_evals(self) -> int:
        return self.num_evals + 2 * self.num_vjps

    def solve(self, x: Tensor, tolerance: float) -> None:
        """Solve the inner problem at a point, and evaluate the outer loss."""
        self.x, self.tolerance, self.hyper = x, tolerance, self.layout.leaves(x)
        f = self.inner.map(self.z, self.hyper)
        start = f.pack(self.z)
        if self.scale == 0 and not isinstance(self.inner, InnerMap):
            with torch.no_grad(), f.solve_context():
                rows = torch.arange(f.batch, device=f.device)
                first = f.evaluate(start, rows, torch.ones_like(rows, dtype=torch.bool))
            size = float(torch.linalg.vector_norm(first.r)) / math.sqrt(f.batch)
            self.scale = size if math.isfinite(size) else 0.0
        self.watched: list[tuple[Tensor, Tensor]] = []
        solver = self._informed(self._inner_solver(f.dtype), f, start)
        gradient = JacobianFree() if self.gradient is None else self._watched(self.gradient, f.dtype)
        with torch.set_grad_enabled(self.gradient is not None):
            self.inner_solution = solve_map(f, self.z, solver=solver, gradient=gradient)
            values = self.outer(self.inner_solution.value, *self.hyper)
        if not isinstance(values, Tensor) or values.shape != (f.batch,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"outer must return one number for each row of the state, ({f.batch},), got {shape}")
        self.total, self.counts = values.sum(), f.counts

    def _inner_solver(self, dtype: torch.dtype) -> Solver:
        least = _least(dtype)
        if isinstance(self.inner, InnerMap):
            return dataclasses.replace(self.solver, rtol=max(self.tolerance, least), atol=0.0)
        # The error that a residual r leaves in the outer loss is w . r to first order, w the adjoint vector: the longer
        # it grew, the smaller the residual must be. Where the penalty rules the Hessian, this is the factor
        # exp(l - l_0) of the published code; but never above one, for then z need not move at all.
        share = 1.0 if self.sensitivity is None else self.sensitivity[0] / max(self.sensitivity)
        return dataclasses.replace(self.solver, rtol=0.0, atol=max(self.tolerance * share, least) * self.scale)

    def _informed(self, solver: Solver, f: FunctionMap, start: Tensor) -> Solver:
        """The solver with what is known beside the map: the outer loss, and the pairs of the last solve."""
        hyper = tuple(part.detach() for part in self.hyper)
        if isinstance(solver, (AdjointBroyden, LBFGS)) and solver.cadence is not None:
            solver = dataclasses.replace(solver, outer=lambda z, rows: self.outer(z, *hyper))
        if isinstance(solver, LBFGS) and isinstance(self.inner, InnerLoss) and self.pairs is not None:
            # The Hessian changed by that of the penalty: y + (P''(new) - P''(old)) s is the pair of the new objective.
            s, y = self.pairs
            change = self.inner.hessian_change(f, start, s, self.taught, hyper)
            if change is not None:
                solver = dataclasses.replace(solver, pairs=(s, y + change))
        return solver

    def _watched(self, gradient: Gradient, dtype: torch.dtype) -> Gradient:
        if isinstance(gradient, Unrolled):  # has no adjoint vector
            return gradient
        if isinstance(gradient, Implicit):
            solver = dataclasses.replace(gradient.solver, rtol=0.0, atol=max(self.tolerance, _least(dtype)))
            start = self.adjoint if gradient.start is None else gradient.start
            gradient = dataclasses.replace(gradient, solver=solver, start=start)
        return _Watched(gradient=gradient, seen=self.watched)

    def trial(self) -> Trial:
        """The point and its value, without gradient."""
        residual = float(torch.linalg.vector_norm(self.inner_solution.residual))
        value = self._value()
        noise = self._within(value, self.noise * residual)
        return Trial(x=self.x, value=value, noise=noise, tolerance=self.tolerance)

    def move(self) -> None:
        """Start later inner solves here."""
        self.z = _detached(self.inner_solution.value)
        if isinstance(self.solver, LBFGS):
            self.pairs, self.taught = LBFGS.pairs_of(self.inner_solution), tuple(part.detach() for part in self.hyper)

    def judge(self, step: StepRule, memory: Any) -> Trial:
        """Let the step rule see the value; if it accepts, take the hypergradient, else return to the last point."""
        trial = self.trial()
        gradient = self._gradient() if step.accepts(memory, trial) else None
        if gradient is not None:
            # To first order the residual lowers the outer loss by w . r below that of the exact inner solution; points
            # solved at different tolerances compare only without this.
            missing = self._within(trial.value, self.missing)
            trial = dataclasses.replace(trial, gradient=gradient, value=trial.value + missing, noise=abs(missing))
            self.move()
        self.record(trial, accepted=gradient is not None)
        return trial

    @staticmethod
    def _within(value: float, error: float) -> float:
        """An error estimate, but no more of it than a share of the value: estimates may be far off themselves."""
        most = MOST_MISSING * abs(value)
        return min(max(error, -most), most)

    def _value(self) -> float:
        failed = (self.inner_solution.status == Status.NONFINITE) | (self.inner_solution.status == Status.DIVERGED)
        return math.nan if bool(failed.any()) else float(self.total.detach())

    def _gradient(self) -> Tensor | None:
        """The hypergradient, `(p,)`; None if it is not finite."""
        if not self.total.requires_grad:
            return torch.zeros_like(self.x)
        parts = torch.autograd.grad(self.total, self.hyper, materialize_grads=True)
        gradient = self.layout.flat(parts)
        if not bool(gradient.isfinite().all()):
            return None
        self.missing = 0.0
        for w, r in self.watched:  # one pair, or none
            size = float(torch.linalg.vector_norm(w))
            self.adjoint = w
            self.sensitivity = (self.sensitivity[0] if self.sensitivity else max(size, 1e-300), size)
            self.missing = float((w * r).sum())
            self.noise = abs(self.missing) / max(float(torch.linalg.vector_norm(r)), 1e-300)
        return gradient

    def record(self, trial: Trial, accepted: bool) -> None:
        """Add a line to the history, and keep the point if it is the best."""
        self.num_evals += self.counts.evals
        self.num_vjps += self.counts.vjps
        converged = bool(self.inner_solution.converged.all())
        hyper = tuple(part.detach() for part in self.hyper)
        gradient = trial.gradient
        line = OuterStep(
            step=len(self.history) + 1,
            hyper=hyper,
            value=self._value(),
            gradient_norm=math.nan if gradient is None else float(torch.linalg.vector_norm(gradient)),
            tolerance=self.tolerance,
            inner_converged=converged,
            num_evals=self.num_evals,
            num_vjps=self.num_vjps,
            accepted=accepted,
            seconds=time.perf_counter() - self.began,
        )
        self.history.append(line)
        z = _detached(self.inner_solution.value)
        # An inexact solution may have a low outer loss by chance: the higher of both values counts.
        value = max(line.value, trial.value) if math.isfinite(trial.value) else math.inf
        key = (not converged, not accepted, value)
        if self.best is None or key < self.best[0]:
            self.best = (key, line, z)
        if self.observe is not None:
            self.observe(line, z)

    def solution(self, status: OuterStatus) -> OuterSolution:
        """The best point: the lowest value among those whose inner solve converged, if there is one."""
        assert self.best is not None
        _, line, z = self.best
        if not line.inner_converged and status is not OuterStatus.NONFINITE:
            status = OuterStatus.INNER
        return OuterSolution(
            hyper=line.hyper,
            z=z,
            value=line.value,
            status=status,
            history=self.history,
            num_evals=self.num_evals,
            num_vjps=self.num_vjps,
        )


def _least(dtype: torch.dtype) -> float:
    """Smallest relative tolerance that rounding leaves within reach."""
    return 1e3 * torch.finfo(dtype).eps


def _detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {key: part.detach() for key, part in state.items()}
    return type(state)(part.detach() for part in state)
