"""The outer loop: solve the inner problem, follow the hypergradient, let the step rule decide."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.hyper import Bound, HyperLayout
from equipoise.bilevel.inner import Inner, InnerLoss, InnerMap
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.steps import StepRule, Trial
from equipoise.bilevel.tolerances import Exponential, Tolerance
from equipoise.bilevel.trust_region import TrustRegion
from equipoise.fixed_point import solve_map
from equipoise.gradients import Gradient, Implicit, Shine, Unrolled
from equipoise.gradients.base import AdjointMap
from equipoise.solution import Solution, Status
from equipoise.solvers import LBFGS, Solver

MOST_MISSING = 0.1  # of the outer loss: what may be put down to an inexact inner solve


def minimize_outer(
    outer: Callable[..., Tensor],
    inner: Inner | Callable[..., Tensor],
    *,
    z0: Any,
    hyper0: Tensor | Sequence[Tensor],
    bounds: tuple[Bound, Bound] | None = None,
    solver: Solver = LBFGS(max_steps=1000, memory=30),
    gradient: Gradient = Shine(fallback_ratio=math.inf),
    tolerance: Tolerance = Exponential(),
    step: StepRule = TrustRegion(),
    max_steps: int = 30,
    max_evals: int | None = None,
    observe: Callable[[OuterStep], None] | None = None,
) -> OuterSolution:
    r"""Minimize an outer loss of the solution of an inner problem over hyperparameters.

    $$ \min_\theta \sum_b L(z^*_b(\theta), \theta), \qquad
       z^*(\theta) = \arg\min_z\ \ell(z) + P(z, \theta) \quad \text{or} \quad z^* = f(z^*, \theta) $$

    Each outer step solves the inner problem, from the last solution and to a tolerance that decreases from step to
    step, and takes one hypergradient. The adjoint solve of `Implicit` follows the same tolerance and, without a start
    of its own, begins at the last adjoint vector.

    Args:
        outer: $L$, called as `outer(z, *hyper)`; one number for each row of the state, `(B,)`.
        inner: `InnerLoss` or `InnerMap`; a function is taken as the loss `inner(z, *hyper)`.
        z0: first start of the inner solve, a tensor, tuple, list or dict of tensors `(B, ...)`. All rows share the
            hyperparameters.
        hyper0: the first hyperparameters, a tensor or a tuple of tensors; strengths are best given by their logarithm.
        bounds: pair of the least and the largest values: numbers, or tensors that fit the hyperparameters.
        solver: of the inner problem; its tolerances are replaced at each step.
        gradient: how the solution is differentiated.
        tolerance: schedule of the inner tolerance: of the gradient's norm, relative to that at `z0` and `hyper0` and to
            how strongly the outer loss depends on it; for `InnerMap`, of the residual relative to the state.
        step: the rule that accepts points and proposes the next one.
        max_steps: largest number of outer steps.
        max_evals: no step begins once `gradient_evals` has reached this number.
        observe: called with each `OuterStep`.

    Returns:
        `OuterSolution` with the best point seen; its `status` says how the walk ended.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, or shapes do not fit.

    Example:
        >>> import torch, equipoise as eq
        >>> target = torch.tensor([[3.0, 1.0]])
        >>> ridge = lambda z, log_alpha: (z - target).square().sum(1) + log_alpha.exp() * z.square().sum(1)
        >>> held_out = lambda z, log_alpha: (z - target / 2).square().sum(1)
        >>> solution = eq.minimize_outer(held_out, ridge, z0=torch.zeros(1, 2), hyper0=torch.tensor(2.0))
        >>> round(solution.hyper[0].exp().item(), 2)
        1.0

    Source: Pedregosa (2016), algorithm 1 (HOAG); Ramzi et al. (2022), section 3.1, for SHINE.
    """
    for name, value, kind in (
        ("solver", solver, Solver), ("gradient", gradient, Gradient), ("tolerance", tolerance, Tolerance),
        ("step", step, StepRule),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be >= 1, got {max_steps!r}")
    if max_evals is not None and max_evals < 1:
        raise ValueError(f"max_evals must be >= 1, or None for no limit, got {max_evals!r}")
    walk = Walk(outer, inner, z0, hyper0, solver, gradient, observe)
    low, high = walk.layout.box(bounds)
    memory = step.init(low, high)
    x, tighten = walk.layout.flat(walk.layout.like), 1.0
    status = OuterStatus.MAX_STEPS
    for number in range(1, max_steps + 1):
        if max_evals is not None and walk.gradient_evals >= max_evals:
            status = OuterStatus.MAX_EVALS
            break
        walk.solve(x, tolerance.at(number) * tighten)
        trial = walk.judge(step, memory)
        if trial.gradient is None and number == 1:
            status = OuterStatus.NONFINITE
            break
        proposal = step.propose(memory, trial)
        tighten *= proposal.tighten
        if proposal.x is None:
            status = proposal.status
            break
        x = proposal.x
    return walk.solution(status)


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
        solver: Solver,
        gradient: Gradient | None,
        observe: Callable[[OuterStep], None] | None,
    ) -> None:
        if not callable(outer):
            raise TypeError(f"outer must be a function outer(z, *hyper) that returns (B,), got {outer!r}")
        self.outer, self.inner = outer, inner if isinstance(inner, Inner) else InnerLoss(inner)
        self.solver, self.gradient, self.observe = solver, gradient, observe
        self.layout = HyperLayout.of(hyper0)
        self.z = z0  # where the next inner solve starts
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
            with torch.no_grad(), f.session():
                rows = torch.arange(f.batch, device=f.device)
                first = f.evaluate(start, rows, torch.ones_like(rows, dtype=torch.bool))
            self.scale = float(torch.linalg.vector_norm(first.r)) / math.sqrt(f.batch)
        self.watched: list[tuple[Tensor, Tensor]] = []
        solver = self._inner_solver(f.dtype)
        gradient = Unrolled() if self.gradient is None else self._watched(self.gradient)
        with torch.set_grad_enabled(self.gradient is not None):
            self.inner_solution = solve_map(f, self.z, solver=solver, gradient=gradient)
            values = self.outer(self.inner_solution.value, *self.hyper)
        if not isinstance(values, Tensor) or values.shape != (f.batch,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"outer must return one number for each row of the state, ({f.batch},), got {shape}")
        self.total, self.counts = values.sum(), f.counts

    def _inner_solver(self, dtype: torch.dtype) -> Solver:
        least = 1e3 * torch.finfo(dtype).eps
        if isinstance(self.inner, InnerMap):
            return dataclasses.replace(self.solver, rtol=max(self.tolerance, least), atol=0.0)
        # The error that a residual r leaves in the outer loss is w . r to first order, w the adjoint vector. Where the
        # penalty rules the Hessian, this is the factor exp(l - l_0) of the published code.
        share = 1.0 if self.sensitivity is None else self.sensitivity[0] / max(self.sensitivity[1], 1e-300)
        relative = min(max(self.tolerance * share, least), 0.1)
        return dataclasses.replace(self.solver, rtol=0.0, atol=relative * self.scale)

    def _watched(self, gradient: Gradient) -> Gradient:
        if isinstance(gradient, Unrolled):  # has no adjoint vector
            return gradient
        if isinstance(gradient, Implicit):
            solver = dataclasses.replace(gradient.solver, rtol=0.0, atol=self.tolerance)
            start = self.adjoint if gradient.start is None else gradient.start
            gradient = dataclasses.replace(gradient, solver=solver, start=start)
        return _Watched(gradient=gradient, seen=self.watched)

    def judge(self, step: StepRule, memory: Any) -> Trial:
        """Let the step rule see the value; if it accepts, take the hypergradient, else return to the last point."""
        residual = float(torch.linalg.vector_norm(self.inner_solution.residual))
        value = self._value()
        trial = Trial(x=self.x, value=value, noise=self._within(value, self.noise * residual), tolerance=self.tolerance)
        gradient = self._gradient() if step.accepts(memory, trial) else None
        if gradient is not None:
            # To first order the residual lowers the outer loss by w . r below that of the exact inner solution; points
            # solved at different tolerances compare only without this.
            missing = self._within(value, self.missing)
            trial = dataclasses.replace(trial, gradient=gradient, value=value + missing, noise=abs(missing))
            self.z = _detached(self.inner_solution.value)
        self.record(trial)
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
        for w, r in self.watched:
            size = float(torch.linalg.vector_norm(w))
            self.adjoint = w
            self.sensitivity = (self.sensitivity[0] if self.sensitivity else size, size)
            self.missing = float((w * r).sum())
            self.noise = abs(self.missing) / max(float(torch.linalg.vector_norm(r)), 1e-300)
        return gradient

    def record(self, trial: Trial) -> None:
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
            accepted=gradient is not None,
            seconds=time.perf_counter() - self.began,
        )
        self.history.append(line)
        key = (not converged, gradient is None, trial.value if math.isfinite(trial.value) else math.inf)
        if self.best is None or key < self.best[0]:
            self.best = (key, line, _detached(self.inner_solution.value))
        if self.observe is not None:
            self.observe(line)

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


def _detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {key: part.detach() for key, part in state.items()}
    return type(state)(part.detach() for part in state)
