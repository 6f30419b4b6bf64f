"""Step rules and tolerance schedules, driven with functions whose minima are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.bilevel import HoagStep, OuterStatus, StepRule, Tolerance, Trial, TrustRegion
from equipoise.bilevel.trust_region import quadratic_minimum

Problem = Callable[[Tensor], tuple[float, Tensor]]


def walk(
    rule: StepRule, f: Problem, x0: Tensor, low: float, high: float, num: int
) -> tuple[list[Trial], OuterStatus | None]:
    """What a rule visits on a function without noise, with tolerances 2^-k."""
    memory = rule.init(torch.full_like(x0, low), torch.full_like(x0, high))
    x, trials = x0, []
    for step in range(1, num + 1):
        value, gradient = f(x)
        trial = Trial(x=x, value=value, noise=0.0, tolerance=2.0**-step)
        accepted = math.isfinite(value) and (step == 1 or rule.accepts(memory, trial))
        if accepted and bool(gradient.isfinite().all()):
            trial = Trial(x=x, value=value, noise=0.0, tolerance=2.0**-step, gradient=gradient)
        trials.append(trial)
        proposal = rule.propose(memory, trial)
        if proposal.x is None:
            return trials, proposal.status
        x = proposal.x
        assert bool(((low <= x) & (x <= high)).all()), "a rule never leaves the box"
    return trials, None


def best(trials: list[Trial]) -> Trial:
    return min((trial for trial in trials if trial.gradient is not None), key=lambda trial: trial.value)


def by_autograd(f: Callable[[Tensor], Tensor]) -> Problem:
    def problem(x: Tensor) -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        return value.item(), torch.autograd.grad(value, leaf)[0]

    return problem


# --- tolerances ----------------------------------------------------------------------------------------------------


def test_tolerances_are_those_of_the_formulas() -> None:
    for k in (1, 2, 7, 29):
        assert Tolerance(1e-3, 0.78)(k) == pytest.approx(1e-3 * 0.78 ** (k - 1), rel=1e-12)
        assert Tolerance(1e-2, 1, 2)(k) == pytest.approx(1e-2 / k**2, rel=1e-12)
        assert Tolerance(1e-2, 1, 3)(k) == pytest.approx(1e-2 / k**3, rel=1e-12)
        assert Tolerance(1e-12)(k) == 1e-12
    assert Tolerance(1e-3, 0.1)(50) == Tolerance(power=3)(10**6) == 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tolerance(0.0),
        lambda: Tolerance(1e-3, 1.5),
        lambda: Tolerance(2.0),
        lambda: HoagStep(growth=0.0),
        lambda: HoagStep(slack=-1.0),
        lambda: TrustRegion(radius=0.0),
        lambda: TrustRegion(radius=1.0, least_radius=2.0),
        lambda: TrustRegion(rtol=math.nan),
    ],
)
def test_fields_out_of_range_are_named(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


# --- Pedregosa's rule ----------------------------------------------------------------------------------------------


def replay(f: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, num: int) -> list[np.ndarray]:
    """The rule in NumPy: one step an iteration; the length in the test is that of the step made."""
    visited, old, old_value, old_gradient, old_eps = [], None, math.inf, None, math.inf
    lipschitz = math.nan
    for k in range(1, num + 1):
        visited.append(x)
        value, gradient = f(x)
        eps = 2.0**-k
        if old is None:
            norm = np.linalg.norm(gradient)
            lipschitz = norm / math.sqrt(len(x)) if norm > 1e-3 else 1.0
        else:
            length = np.linalg.norm(x - old)
            bound = old_value + 0.25 * eps + old_eps * 1.25 * length - lipschitz * length**2
            if value <= bound:
                lipschitz *= 0.95
            elif value >= 1.2 * old_value:
                lipschitz *= 2
                x = np.clip(old - old_gradient / lipschitz, -12, 12)
                continue
        old, old_value, old_gradient, old_eps = x, value, gradient, eps
        x = np.clip(x - gradient / lipschitz, -12, 12)
    return visited


@pytest.mark.parametrize(
    "f",
    [
        lambda x: 1 + (x - 3).square().sum(),
        lambda x: 1 + (torch.arange(1.0, 1 + len(x)) * (x - 14).square()).sum(),  # ends at the bound
        lambda x: 1 + x.pow(4).sum() + 30 * (3 * x).cos().sum().exp(),  # steps are taken back
        lambda x: 5 + 1e-5 * x.sum(),  # the gradient is nearly zero
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_hoag_steps_are_those_of_the_rule(f: Callable[[Tensor], Tensor], size: int) -> None:
    x0 = torch.linspace(-1, 1.5, size)
    trials, _ = walk(HoagStep(), by_autograd(f), x0, -12, 12, 25)

    def numpy(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = by_autograd(f)(torch.tensor(x))
        return value, gradient.numpy()

    for trial, x in zip(trials, replay(numpy, x0.numpy(), 25), strict=True):
        np.testing.assert_allclose(trial.x.numpy(), x, rtol=1e-12)


def test_a_hoag_step_that_is_taken_back_halves_the_tolerance() -> None:
    rule = HoagStep()
    memory = rule.init(torch.tensor([-12.0]), torch.tensor([12.0]))
    first = Trial(x=torch.zeros(1), value=1.0, noise=0.0, tolerance=1e-3, gradient=torch.ones(1))
    assert rule.propose(memory, first).x == torch.tensor([-1.0])
    worse = Trial(x=torch.tensor([-1.0]), value=1.3, noise=0.0, tolerance=1e-3)
    assert not rule.accepts(memory, worse)
    proposal = rule.propose(memory, worse)
    assert proposal.tighten == 0.5
    assert proposal.x == torch.tensor([-0.5])


def test_hoag_stays_at_a_zero_gradient() -> None:
    trials, _ = walk(HoagStep(), lambda x: (1.0, torch.zeros_like(x)), torch.ones(2), -12, 12, 3)
    assert all(bool((trial.x == 1).all()) for trial in trials)


# --- trust region --------------------------------------------------------------------------------------------------


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A convex quadratic with condition up to 1e4, and a box around zero, some bounds of which are zero."""
    size, seed = draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    hessian = q @ torch.diag(10 ** (4 * torch.rand(size, generator=generator))) @ q.T
    g = 10 ** draw(st.integers(-3, 4)) * torch.randn(size, generator=generator)
    low, high = ((torch.rand(size, generator=generator) - 0.2).clamp_min(0) for _ in range(2))
    return g, (hessian + hessian.T) / 2, -low, high


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes())
def test_the_quadratic_minimum_meets_the_optimality_conditions(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    g, hessian, low, high = problem
    s = quadratic_minimum(g, hessian, low, high)
    assert bool(((low <= s) & (s <= high)).all())
    slope = g + hessian @ s
    wrong = torch.where(s <= low, slope.clamp_max(0), torch.where(s >= high, slope.clamp_min(0), slope))
    wrong = torch.where(low == high, 0.0, wrong)
    assert float(wrong.abs().max()) <= 1e-8 * float(g.abs().max())


def test_the_quadratic_minimum_of_many_components_is_that_of_scipy() -> None:
    size = 200
    factor = torch.randn(size, size)
    hessian, g = factor.T @ factor + torch.eye(size), 100 * torch.randn(size)
    low, high = -torch.rand(size), torch.rand(size)
    s = quadratic_minimum(g, hessian, low, high)
    root = torch.linalg.cholesky(hessian, upper=True)
    target = -torch.linalg.solve_triangular(root.T, g[:, None], upper=False)[:, 0]
    theirs = scipy.optimize.lsq_linear(root.numpy(), target.numpy(), (low.numpy(), high.numpy()), tol=1e-12)
    np.testing.assert_allclose(s.numpy(), theirs.x, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_the_region_reaches_the_minimum_of_a_quadratic_in_a_box(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    hessian = q @ torch.diag(10 ** torch.rand(size, generator=generator)) @ q.T
    centre = 4 * torch.randn(size, generator=generator)
    f = by_autograd(lambda x: 1 + (x - centre) @ hessian @ (x - centre) / 2)
    trials, status = walk(TrustRegion(rtol=1e-10), f, torch.zeros(size), -3, 3, 200)
    assert status is OuterStatus.CONVERGED
    bounds = [(-3, 3)] * size
    theirs = scipy.optimize.minimize(
        lambda x: f(torch.tensor(x))[0],
        np.zeros(size),
        jac=lambda x: f(torch.tensor(x))[1].numpy(),
        bounds=bounds,
        options={"ftol": 1e-14, "gtol": 1e-9},
    )
    assert best(trials).value == pytest.approx(theirs.fun, rel=1e-7)


def test_one_hyperparameter_takes_few_steps() -> None:
    for centre, steepness in ((3.3, 1.0), (-7.0, 0.2), (0.4, 3.0)):
        f = by_autograd(lambda x, c=centre, s=steepness: 1 + (s * (x - c)).cosh().log().sum())
        trials, status = walk(TrustRegion(), f, torch.zeros(1), -12, 12, 30)
        assert status is OuterStatus.CONVERGED
        assert best(trials).value == pytest.approx(1.0, abs=1e-4)
        assert len(trials) <= 12


@pytest.mark.parametrize(("high", "minimum"), [(2.0, 0.0), (0.5, 0.25)])
def test_rosenbrock_in_a_box(high: float, minimum: float) -> None:
    f = by_autograd(lambda x: 1 + (1 - x[0]).square() + 100 * (x[1] - x[0].square()).square())
    trials, status = walk(TrustRegion(rtol=1e-9), f, torch.tensor([-1.2, high / 2]), -2, high, 200)
    assert status is OuterStatus.CONVERGED
    assert best(trials).value == pytest.approx(1 + minimum, abs=1e-5)


def test_points_without_a_finite_value_or_gradient_are_left() -> None:
    def f(x: Tensor) -> tuple[float, Tensor]:
        if float(x) > 1.5:
            return math.nan, torch.full_like(x, math.nan)
        if float(x) > 1.2:
            return float((x - 2).square()), torch.full_like(x, math.inf)
        return float((x - 2).square()), 2 * (x - 2)

    for rule in (TrustRegion(), HoagStep()):
        trials, _ = walk(rule, f, torch.zeros(1), -12, 12, 40)
        assert 1.0 < float(best(trials).x) <= 1.2
        assert any(trial.gradient is None for trial in trials)


def test_a_gradient_of_the_wrong_sign_stalls_and_goes_nowhere_worse() -> None:
    trials, status = walk(TrustRegion(), lambda x: (float(x.square()), -2 * x), torch.ones(1), -12, 12, 40)
    assert status is OuterStatus.STALLED
    assert float(best(trials).x) == 1.0
    assert len(trials) < 15


def test_noise_is_no_reason_to_go_back() -> None:
    rule = TrustRegion()
    memory = rule.init(torch.tensor([-12.0]), torch.tensor([12.0]))
    first = Trial(x=torch.zeros(1), value=1.0, noise=0.05, tolerance=1e-3, gradient=torch.tensor([1e-2]))
    proposal = rule.propose(memory, first)
    assert proposal.x is not None
    assert proposal.tighten < 1, "the values are to be known better than they differ"
    assert rule.accepts(memory, Trial(x=proposal.x, value=1.02, noise=0.05, tolerance=1e-3))
    assert not rule.accepts(memory, Trial(x=proposal.x, value=1.2, noise=0.05, tolerance=1e-3))
