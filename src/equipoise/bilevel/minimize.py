"""The outer loop: solve the inner problem, follow the hypergradient, let the step rule decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from equipoise.bilevel.hyper import Bound
from equipoise.bilevel.inner import Inner
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.steps import StepRule
from equipoise.bilevel.tolerances import Exponential, Tolerance
from equipoise.bilevel.trust_region import TrustRegion
from equipoise.bilevel.walk import Walk
from equipoise.gradients import Gradient, Shine
from equipoise.solvers import Solver


def minimize_outer(
    outer: Callable[..., Tensor],
    inner: Inner | Callable[..., Tensor],
    *,
    z0: Any,
    hyper0: Tensor | Sequence[Tensor],
    bounds: tuple[Bound, Bound] | None = None,
    solver: Solver | None = None,
    gradient: Gradient = Shine(fallback_ratio=math.inf),
    tolerance: Tolerance = Exponential(),
    step: StepRule = TrustRegion(),
    max_steps: int = 30,
    max_evals: int | None = None,
    observe: Callable[[OuterStep, Any], None] | None = None,
) -> OuterSolution:
    r"""Minimize an outer loss of the solution of an inner problem over hyperparameters.

    $$ \min_\theta \sum_b L(z^*_b(\theta), \theta), \qquad
       z^*(\theta) = \arg\min_z\ \ell(z) + P(z, \theta) \quad \text{or} \quad z^* = f(z^*, \theta) $$

    Each outer step solves the inner problem, from the last solution and to a tolerance that decreases from step to
    step, and takes one hypergradient. The adjoint solve of `Implicit` follows the same tolerance and, without a start
    of its own, begins at the last adjoint vector.

    Args:
        outer: $L$, called as `outer(z, *hyper)`; one number for each row of the state, `(B,)`.
        inner: `InnerLoss` or `InnerMap`; a function is taken as the loss `inner(z, *hyper)`. What L-BFGS learned is
            carried from step to step only if `InnerLoss` tells the penalty apart; without it `Shine` knows little once
            inner solves take few steps, and `Implicit()` or a solver with a `cadence` is safer.
        z0: first start of the inner solve, a tensor, tuple, list or dict of tensors `(B, ...)`. All rows share the
            hyperparameters.
        hyper0: the first hyperparameters, a tensor or a tuple of tensors; strengths are best given by their logarithm.
        bounds: pair of the least and the largest values: numbers, or tensors that fit the hyperparameters.
        solver: of the inner problem; its tolerances are replaced at each step. None: `LBFGS(max_steps=1000, memory=60)`
            for a loss, `AdjointBroyden(max_steps=200, memory=240, cadence=5)` for an `InnerMap`. With a `cadence` it is
            told the outer loss; its own `outer` must be None.
        gradient: how the solution is differentiated.
        tolerance: schedule of the inner tolerance: of the gradient's norm, relative to that at `z0` and `hyper0` and to
            how strongly the outer loss depends on it; for `InnerMap`, of the residual relative to the state.
        step: the rule that accepts points and proposes the next one.
        max_steps: largest number of outer steps.
        max_evals: no step begins once `gradient_evals` has reached this number.
        observe: called as `observe(step, z)` with each `OuterStep` and the state found.

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
        if not isinstance(value, kind) and not (value is solver is None):
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
