"""Step rules and tolerances: their formulas, and functions with known minima."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.bilevel import HoagStep, OuterStatus, Proposal, StepRule, Tolerance, Trial, TrustRegion
from equipoise.bilevel.trust_region import quadratic_minimum

Problem = Callable[[Tensor], tuple[float, Tensor]]


def walk(
    rule: StepRule, f: Problem, x: Tensor, num: int, box: tuple[float, float] = (-12, 12)
) -> tuple[list[Trial], Any]:
    """Points that a rule visits on a function without noise, with tolerances 2^-k, and the status at the end."""
    memory = rule.init(torch.full_like(x, box[0]), torch.full_like(x, box[1]))
    trials: list[Trial] = []
    for step in range(1, num + 1):
        value, gradient = f(x)
        options = {"x": x, "value": value, "noise": 0.0, "tolerance": 2.0**-step}
        trial = Trial(**options)
        if math.isfinite(value) and (step == 1 or rule.accepts(memory, trial)) and bool(gradient.isfinite().all()):
            trial = Trial(**options, gradient=gradient)
        trials.append(trial)
        proposal = rule.propose(memory, trial)
        if proposal.x is None:
            return trials, proposal.status
        x = proposal.x
        assert bool(((box[0] <= x) & (x <= box[1])).all()), "a rule never leaves the box"
    return trials, None


def best(trials: list[Trial]) -> Trial:
    return min((trial for trial in trials if trial.gradient is not None), key=lambda trial: trial.value)


def by_autograd(f: Callable[[Tensor], Tensor]) -> Problem:
    def problem(x: Tensor) -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_()
        value = f(leaf)
        return value.item(), torch.autograd.grad(value, leaf)[0]

    return problem


def trial(x: Any, value: float, gradient: Any = None, noise: float = 0.0) -> Trial:
    found = None if gradient is None else torch.tensor(gradient)
    return Trial(x=torch.tensor(x), value=value, noise=noise, tolerance=1e-3, gradient=found)


def started(rule: StepRule, first: Trial, low: float = -12.0, high: float = 12.0) -> tuple[Any, Proposal]:
    memory = rule.init(torch.full_like(first.x, low), torch.full_like(first.x, high))
    return memory, rule.propose(memory, first)


# --- tolerances ----------------------------------------------------------------------------------------------------


def test_tolerances() -> None:
    for k in (1, 2, 7, 29):
        assert Tolerance()(k) == pytest.approx(1e-3 * 0.78 ** (k - 1), rel=1e-12)
        assert Tolerance(1e-2, 1)(k) == 1e-2
        assert Tolerance(1e-2, 1, 2)(k) == 1e-2 / k**2
        assert Tolerance(1e-2, 0.5, 3)(k) == pytest.approx(1e-2 * 0.5 ** (k - 1) / k**3, rel=1e-12)
        assert Tolerance(1e-12)(k) == 1e-12
    assert Tolerance(1e-3, 0.1)(50) == Tolerance(power=3)(10**6) == 1e-12


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (Tolerance, {"first": 0.0}),
        (Tolerance, {"first": 1.0}),
        (Tolerance, {"factor": 1.5}),
        (Tolerance, {"factor": 0.0}),
        (Tolerance, {"power": -1.0}),
        (HoagStep, {"growth": 0.0}),
        (HoagStep, {"growth": 1.5}),
        (HoagStep, {"slack": -1.0}),
        (HoagStep, {"worse": math.nan}),
        (TrustRegion, {"radius": 0.0}),
        (TrustRegion, {"radius": math.inf}),
        (TrustRegion, {"least_radius": 2.0}),
        (TrustRegion, {"least_radius": 0.0}),
        (TrustRegion, {"rtol": math.nan}),
    ],
)
def test_fields(make: Any, fields: dict[str, float]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"{make.__name__}\(.*{name}={value!r}.*must"):
        make(**fields)


def test_limits_of_fields() -> None:
    assert HoagStep(growth=1, slack=0, worse=0).growth == 1
    assert TrustRegion(rtol=0).rtol == 0


# --- Pedregosa's rule ----------------------------------------------------------------------------------------------


def replay(f: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, num: int) -> list[np.ndarray]:
    """The rule in NumPy: one step an iteration; the length in the test is that of the last step."""
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
        lambda x: 1 + (torch.arange(1.0, 1 + len(x)) * (x - 14).square()).sum(),  # ends at the upper bound
        lambda x: 1 + (x + 14).square().sum(),  # ends at the lower bound
        lambda x: 1 + x.pow(4).sum() + 30 * (3 * x).cos().sum().exp(),  # some points are rejected
        lambda x: 5 + 1e-5 * x.sum(),  # the gradient is nearly zero
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_hoag_formula(f: Callable[[Tensor], Tensor], size: int) -> None:
    x0 = torch.linspace(-1, 1.5, size)
    trials, _ = walk(HoagStep(), by_autograd(f), x0, 25)

    def numpy(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = by_autograd(f)(torch.tensor(x))
        return value, gradient.numpy()

    for found, x in zip(trials, replay(numpy, x0.numpy(), 25), strict=True):
        np.testing.assert_allclose(found.x.numpy(), x, rtol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_hoag_rejects(sign: int) -> None:
    rule, value = HoagStep(), sign * 100.0
    memory, proposal = started(rule, trial([0.0], value, [1.0]))
    assert (float(proposal.x), proposal.tighten) == (-1, 1)
    assert not rule.accepts(memory, trial([-1.0], value + 20))  # worse by 0.2, exactly
    assert rule.accepts(memory, trial([-1.0], value + 19.9))
    proposal = rule.propose(memory, trial([-1.0], value + 20))
    assert (float(proposal.x), proposal.tighten) == (-0.5, 0.5)
    proposal = rule.propose(memory, trial([-0.5], value - 1, [2.0]))
    assert (float(proposal.x), proposal.tighten) == (pytest.approx(-0.5 - 2 / 1.9), 1)


def test_hoag_zero_gradient() -> None:
    trials, _ = walk(HoagStep(), lambda x: (1.0, torch.zeros_like(x)), torch.ones(2), 3)
    assert all(bool((found.x == 1).all()) for found in trials)


# --- trust region --------------------------------------------------------------------------------------------------


def test_region_first_step() -> None:
    memory, proposal = started(TrustRegion(radius=1.5), trial([0.0, 0.0], 10.0, [-4.0, 1.0]))
    torch.testing.assert_close(proposal.x, torch.tensor([1.5, -0.375]))  # the model is (4 / 1.5) I
    assert memory.predicted == pytest.approx(0.5 * (4 * 1.5 + 0.375))
    assert proposal.tighten == 1


# The first step from 0 has length 2 and predicts a decrease by 4: value 10, gradient 4, curvature 2.
@pytest.mark.parametrize(
    ("value", "gradient", "radius"),
    [
        (10 - 0.039, None, None),
        (10 - 0.041, 0.0, 1.0),
        (10 - 0.999, 0.0, 1.0),
        (10 - 1.001, 0.0, 2.0),
        (10 - 2.999, 0.0, 2.0),
        (10 - 3.001, 0.0, 4.0),
    ],
)
def test_region_ratio(value: float, gradient: float | None, radius: float | None) -> None:
    rule = TrustRegion()
    memory, _ = started(rule, trial([0.0], 10.0, [4.0]))
    accepted = rule.accepts(memory, trial([-2.0], value))
    assert accepted == (radius is not None)
    if accepted:
        rule.propose(memory, trial([-2.0], value, [gradient]))
        assert memory.radius == radius


def test_region_grows_at_its_boundary_only() -> None:
    rule = TrustRegion()
    memory, proposal = started(rule, trial([0.0], 10.0, [4.0]), low=-1.9)
    assert float(proposal.x) == pytest.approx(-1.9)
    rule.propose(memory, trial([-1.9], 6.0, [0.2]))
    assert memory.radius == 2


@pytest.mark.parametrize(
    ("value", "part"),
    [(9.99, 0.5), (10.0, 0.5), (11.0, 4 / 9), (20.0, 4 / 18), (100.0, 0.1), (math.inf, 0.1), (math.nan, 0.25)],
)
def test_region_shrinks(value: float, part: float) -> None:
    """To the minimum of the parabola through both values: slope -8 over the step, -s / (2 (change + s))."""
    rule = TrustRegion()
    memory, _ = started(rule, trial([0.0], 10.0, [4.0]))
    proposal = rule.propose(memory, trial([-2.0], value))
    assert memory.radius == pytest.approx(2 * part)
    assert float(proposal.x) == pytest.approx(-2 * part)


@pytest.mark.parametrize(("y", "curvature"), [(2.0, 1.0), (-3.0, 0.4), (0.8, 0.4), (0.9, 0.45)])
def test_region_curvature(y: float, curvature: float) -> None:
    """The update has the curvature of the last step, but at least a fifth of the old one."""
    rule = TrustRegion()
    memory, _ = started(rule, trial([0.0], 10.0, [4.0]))
    rule.propose(memory, trial([-2.0], 6.0, [4.0 - y]))
    assert float(memory.hessian) == pytest.approx(curvature)


def test_region_secant() -> None:
    rule = TrustRegion()
    memory, proposal = started(rule, trial([0.0, 0.0], 10.0, [4.0, 2.0]))
    assert proposal.x is not None
    y = torch.tensor([-3.0, -1.0])
    rule.propose(memory, trial(proposal.x.tolist(), 6.0, [1.0, 1.0]))
    torch.testing.assert_close(memory.hessian @ proposal.x, y)
    torch.testing.assert_close(memory.hessian, memory.hessian.T)
    before = memory.hessian
    rule.propose(memory, trial(proposal.x.tolist(), 6.0, [1.0, 1.0]))  # no step was made
    assert memory.hessian is before
    # Negative curvature: y is mixed with the model's own change until it has a fifth of the model's curvature.
    s, y = torch.tensor([1.0, 0.5]), torch.tensor([-3.0, 1.0])
    rule.propose(memory, trial((proposal.x + s).tolist(), 5.0, (y + 1).tolist()))
    image = before @ s
    part = 0.8 * (s @ image) / (s @ image - s @ y)
    torch.testing.assert_close(memory.hessian @ s, part * y + (1 - part) * image)
    assert float(s @ memory.hessian @ s) == pytest.approx(0.2 * float(s @ image))


def test_region_noise() -> None:
    rule = TrustRegion()
    memory, proposal = started(rule, trial([0.0], 1.0, [1e-2], noise=0.05))  # predicts a decrease by 0.01
    assert float(proposal.x) == -2
    assert proposal.tighten == 0.1, "the error of the values must be smaller than their difference"
    assert started(rule, trial([0.0], 1.0, [1e-2], noise=0.005))[1].tighten == 1
    assert started(rule, trial([0.0], 1.0, [1e-2], noise=0.0051))[1].tighten == 0.1
    # (1 - value + 0.1) / (0.01 + 0.1) >= 0.01
    assert rule.accepts(memory, trial([-2.0], 1.0988, noise=0.05))
    assert not rule.accepts(memory, trial([-2.0], 1.0990, noise=0.05))


def test_region_ends() -> None:
    rule = TrustRegion(rtol=0.01)
    for value, ended in ((401.0, True), (400.0, True), (-401.0, True), (399.0, False)):
        _, proposal = started(rule, trial([0.0], value, [4.0]))  # predicts a decrease by 4
        assert (proposal.x is None) == ended
        assert proposal.status is OuterStatus.CONVERGED
    # In a region that was cut, a short step at the boundary is no sign of a minimum.
    memory, _ = started(rule, trial([0.0], 390.0, [4.0]))
    for radius, ended in ((0.5, True), (0.12, False), (0.0009, True)):
        memory.radius, memory.step = 4 * radius, torch.tensor([4 * radius])
        proposal = rule.propose(memory, trial([-2.0], math.nan))
        assert memory.radius == radius
        assert (proposal.x is None) == ended
    assert proposal.status is OuterStatus.STALLED


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
def test_quadratic_optimality(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    g, hessian, low, high = problem
    s = quadratic_minimum(g, hessian, low, high)
    assert bool(((low <= s) & (s <= high)).all())
    slope = g + hessian @ s
    wrong = torch.where(s <= low, slope.clamp_max(0), torch.where(s >= high, slope.clamp_min(0), slope))
    wrong = torch.where(low == high, 0.0, wrong)
    assert float(wrong.abs().max()) <= 1e-8 * float(g.abs().max())


def test_large_quadratic() -> None:
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
def test_region_minimum(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    hessian = q @ torch.diag(10 ** torch.rand(size, generator=generator)) @ q.T
    center = 4 * torch.randn(size, generator=generator)
    f = by_autograd(lambda x: 1 + (x - center) @ hessian @ (x - center) / 2)
    trials, status = walk(TrustRegion(rtol=1e-10), f, torch.zeros(size), 200, (-3, 3))
    assert status is OuterStatus.CONVERGED
    s = quadratic_minimum(-hessian @ center, hessian, torch.full((size,), -3.0), torch.full((size,), 3.0))
    assert best(trials).value == pytest.approx(f(s)[0], rel=1e-7)


@pytest.mark.parametrize(("center", "steepness", "steps"), [(3.3, 1.0, 6), (-7.0, 0.2, 5), (0.4, 3.0, 6)])
def test_region_steps(center: float, steepness: float, steps: int) -> None:
    f = by_autograd(lambda x: 1 + (steepness * (x - center)).cosh().log().sum())
    trials, status = walk(TrustRegion(), f, torch.zeros(1), 30)
    assert status is OuterStatus.CONVERGED
    assert best(trials).value == pytest.approx(1.0, abs=1e-4)
    assert len(trials) == steps


@pytest.mark.parametrize(("high", "minimum"), [(2.0, 0.0), (0.5, 0.25)])
def test_rosenbrock(high: float, minimum: float) -> None:
    f = by_autograd(lambda x: 1 + (1 - x[0]).square() + 100 * (x[1] - x[0].square()).square())
    trials, status = walk(TrustRegion(rtol=1e-9), f, torch.tensor([-1.2, high / 2]), 200, (-2, high))
    assert status is OuterStatus.CONVERGED
    assert best(trials).value == pytest.approx(1 + minimum, abs=1e-5)


@pytest.mark.parametrize("rule", [TrustRegion(), HoagStep()])
def test_walls(rule: StepRule) -> None:
    def f(x: Tensor) -> tuple[float, Tensor]:
        if float(x) > 1.5:
            return math.nan, torch.full_like(x, math.nan)
        if float(x) > 1.2:
            return float((x - 2).square()), torch.full_like(x, math.inf)
        return float((x - 2).square()), 2 * (x - 2)

    trials, _ = walk(rule, f, torch.zeros(1), 40)
    assert 1.0 < float(best(trials).x) <= 1.2
    assert any(found.gradient is None for found in trials)


def test_wrong_sign() -> None:
    trials, status = walk(TrustRegion(), lambda x: (float(x.square()), -2 * x), torch.ones(1), 40)
    assert status is OuterStatus.STALLED
    assert float(best(trials).x) == 1.0
    assert len(trials) < 15
