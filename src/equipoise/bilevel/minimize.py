"""Outer loop: evaluate, accept or reject, propose the next hyperparameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from equipoise.bilevel.error_estimate import ErrorEstimate
from equipoise.bilevel.history import History
from equipoise.bilevel.hyper import Bound, flatten
from equipoise.bilevel.inner import Inner
from equipoise.bilevel.problem import OuterProblem, Start
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.steps import StepRule
from equipoise.bilevel.tolerance import Tolerance
from equipoise.bilevel.trust_region import TrustRegion
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
    tolerance: Callable[[int], float] = Tolerance(),
    step: StepRule = TrustRegion(),
    max_steps: int = 30,
    max_evals: int | None = None,
    observe: Callable[[OuterStep, Any], None] | None = None,
) -> OuterSolution:
    r"""Minimize an outer loss of the solution of an inner problem over hyperparameters.

    $$ \min_\theta \sum_b L(z^*_b(\theta), \theta), \qquad
       z^*(\theta) = \arg\min_z\ \ell(z) + P(z, \theta) \quad \text{or} \quad z^* = f(z^*, \theta) $$

    Each outer step solves the inner problem from the last solution, to a tolerance that decreases from step to step,
    and computes one hypergradient. The adjoint solve of `Implicit` takes the same tolerance and, without a start of its
    own, begins at the last adjoint solution.

    Args:
        outer: $L$, called as `outer(z, *hyper)`; one number for each row of the state, `(B,)`.
        inner: `InnerLoss` or `InnerMap`; a function is taken as the loss `inner(z, *hyper)`. L-BFGS keeps its pairs
            from step to step only if `InnerLoss` has a separate penalty. Without one, `Shine` has a poor inverse once
            inner solves take few steps; `Implicit()` or a solver with an `outer_every` is safer.
        z0: start of the first inner solve, a tensor, tuple, list or dict of tensors `(B, ...)`. All rows share the
            hyperparameters.
        hyper0: first hyperparameters, a tensor or a tuple of tensors. Give a penalty by its logarithm.
        bounds: pair (low, high) of numbers, or of tensors that broadcast to the hyperparameters.
        solver: inner solver; its tolerances are replaced at each step. None: `LBFGS(max_steps=1000, memory=60)` for a
            loss, `AdjointBroyden(max_steps=200, memory=240, outer_every=5)` for an `InnerMap`. A solver with
            `outer_every` probes the outer loss; its own `outer_loss` must be None.
        gradient: gradient of the inner solution.
        tolerance: relative inner tolerance of each outer step, counted from 1; `Tolerance`, or a function. For a loss,
            it bounds the gradient norm, relative to that at `z0` and `hyper0` and to the sensitivity of the outer
            loss; for an `InnerMap`, the residual relative to the state.
        step: step rule, which accepts points and proposes the next one.
        max_steps: largest number of outer steps.
        max_evals: budget in `gradient_evals`; no step begins once it is spent.
        observe: called as `observe(step, z)` with each `OuterStep` and its inner solution.

    Returns:
        `OuterSolution` with the best point.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range, or has the wrong shape.

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
    for name, value, kind in (("solver", solver, Solver), ("gradient", gradient, Gradient), ("step", step, StepRule)):
        if not isinstance(value, kind) and (value is not None or name != "solver"):
            raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
    if not callable(tolerance):
        raise TypeError(f"tolerance must be a function of the step such as Tolerance(), got {tolerance!r}")
    for name, limit in (("max_steps", max_steps), ("max_evals", max_evals)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be >= 1, got {limit!r}")
    problem = OuterProblem(outer, inner, hyper0, solver, gradient)
    low, high = problem.layout.box(bounds)
    memory, history, error = step.init(low, high), History(observe), ErrorEstimate()
    x, start, tighten = flatten(problem.layout.hyper0), Start(z0), 1.0
    for number in range(1, max_steps + 1):
        if max_evals is not None and history.steps and history.steps[-1].gradient_evals >= max_evals:
            return history.solution(OuterStatus.MAX_EVALS)
        evaluation = problem.evaluate(x, tolerance(number) * tighten, start, error.tolerance_factor)
        trial = error.trial(evaluation)
        accepted = math.isfinite(trial.value) and (number == 1 or step.accepts(memory, trial))
        hypergradient = evaluation.hypergradient() if accepted else None
        if hypergradient is not None:
            error, trial = error.updated(trial, evaluation, hypergradient)
            start = problem.start_at(evaluation)
        history.add(evaluation, trial, accepted=hypergradient is not None)
        if hypergradient is None and number == 1:
            return history.solution(OuterStatus.NONFINITE)
        proposal = step.propose(memory, trial)
        if proposal.x is None:
            return history.solution(proposal.status)
        x, tighten = proposal.x, tighten * proposal.tighten
    return history.solution(OuterStatus.MAX_STEPS)
