"""Integration to the steady state: the steps that are taken, stability, exact counts, points that are not finite."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import follow, tanh_map
from torch import Tensor

import equipoise as eq
from equipoise.solvers import BS3, VCAB3, Euler, SteadyState, Stepper, Tsit5

STEPPERS = [VCAB3(), BS3(), Tsit5(), Euler()]
every_stepper = pytest.mark.parametrize("stepper", STEPPERS, ids=lambda stepper: type(stepper).__name__)


def solve(f: Callable[..., Tensor], x: Tensor, solver: eq.Solver, **options: Any) -> eq.Solution[Tensor]:
    """From zero."""
    return eq.fixed_point(f, torch.zeros_like(x), x, solver=solver, params=(), **options)


def tanh_field(z: Tensor) -> Tensor:
    return tanh_map(5, 1.5)(z) - z


# --- steps -----------------------------------------------------------------------------------------------------------


class Reference:
    """VCAB3 of one row in the recurrences of Hairer, Norsett and Wanner (III.5), the longest step by bisection."""

    def __init__(self, z: Tensor, ratio: float, growth: float, first: float) -> None:
        self.z, self.ratio, self.growth = z, ratio, growth
        self.steps: list[float] = []
        self.stars: list[Tensor] = []  # phi*_i of the step before
        self.h, self.shortened = first, 0
        self.slope = tanh_field(z)

    def terms(self, h: float) -> tuple[Tensor, list[Tensor], float]:
        """The step, the phi*, and the error relative to the allowed one."""
        times = [h, *reversed(self.steps)]  # d_1 = h, d_2 = h_1, ...
        order = min(len(self.steps) + 1, 3)
        phi, stars, beta = self.slope, [self.slope], 1.0
        for i in range(2, order + 1):
            phi = phi - self.stars[i - 2]
            beta *= sum(times[: i - 1]) / sum(times[1:i])
            stars.append(beta * phi)
        c = {(1, q): 1 / q for q in range(1, 4)} | {(2, q): 1 / (q * (q + 1)) for q in range(1, 3)}
        if order == 3:
            c[3, 1] = c[2, 1] - h / (h + times[1]) * c[2, 2]
        parts = [h * c[i + 1, 1] * star for i, star in enumerate(stars)]
        error = float(parts[-1].norm() / (self.ratio * h * self.slope.norm())) if order > 1 else 0.0
        return torch.stack(parts).sum(0), stars, error

    def advance(self) -> None:
        h = self.growth * self.h if self.steps else self.h
        if self.terms(h)[2] > 1:
            self.shortened += 1
            low, high = 0.0, h
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if self.terms(middle)[2] <= 1 else (low, middle)
            h = low
        step, self.stars, _ = self.terms(h)
        self.z, self.h = self.z + step, h
        self.steps.append(h)
        self.slope = tanh_field(self.z)


@pytest.mark.parametrize(
    ("ratio", "growth"), [(0.02, 1.0), (0.02, 1e3), (0.15, 3.0), (0.15, 1e3), (math.inf, 1.1), (math.inf, 1.0)]
)
def test_published_recurrence(ratio: float, growth: float) -> None:
    z0 = torch.randn(1, 5)
    solver, reference = SteadyState(stepper=VCAB3(error_ratio=ratio), growth=growth, first_step=0.5), None
    for state in follow(solver, tanh_field, z0, 10):
        reference = reference or Reference(z0, ratio, growth, 0.5)
        torch.testing.assert_close(state.base, reference.z, rtol=1e-12, atol=1e-13)
        assert int(state.accepted) == len(reference.steps)
        reference.advance()
        assert float(state.step) == pytest.approx(reference.h, rel=1e-9)
        assert int(state.rejected) == reference.shortened


def test_longest_step() -> None:
    """The error of what VCAB3 takes is the allowed one, unless growth limits."""
    stepper, checked = VCAB3(error_ratio=0.05), 0
    states = follow(SteadyState(stepper=stepper, first_step=0.1), tanh_field, torch.randn(3, 5), 12)
    for before, state in itertools.pairwise(states):
        h, third = state.step[:, None], state.phase[:, None] == 3
        terms = h**2 / 2 * state.slopes[:, 1], h**2 * (2 * h + 3 * state.past[:, None]) / 6 * state.slopes[:, 2]
        error = torch.where(third, terms[1], terms[0]).norm(dim=1) / (stepper.error_ratio * state.step * state.size)
        short = state.rejected > before.rejected
        assert bool((error <= 1 + 1e-9).all())
        assert bool((error[short] > 1 - 1e-9).all())
        torch.testing.assert_close(state.step[~short], 3 * before.step[~short])
        checked += int(short.sum())
    assert checked > 5


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_euler_is_damped_picard(damping: float) -> None:
    x, f = torch.randn(4, 6), tanh_map(6, 0.9)
    fixed = SteadyState(stepper=Euler(error_ratio=math.inf), growth=1, first_step=damping, rtol=1e-8, max_steps=300)
    picard = eq.Picard(damping=damping, rtol=1e-8, max_steps=300)
    ours, theirs = (solve(lambda z, x: f(z) + x, x, solver).raise_for_status() for solver in (fixed, picard))
    assert ours.num_steps.tolist() == theirs.num_steps.tolist()
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-13, atol=1e-14)


# --- stability -------------------------------------------------------------------------------------------------------


@every_stepper
@pytest.mark.parametrize("alpha", [-0.9, 0.0, 0.9, -3.0, -30.0, -1e4])
def test_real_eigenvalue(stepper: Stepper, alpha: float) -> None:
    x = torch.tensor([[1.0], [-20.0]])
    solver = SteadyState(stepper=stepper, rtol=1e-6, max_steps=150)
    solution = solve(lambda z, x: alpha * z + x, x, solver).raise_for_status()
    torch.testing.assert_close(solution.value, x / (1 - alpha), rtol=2e-5, atol=0)


@every_stepper
@pytest.mark.thorough
def test_no_steady_state(stepper: Stepper) -> None:
    """An unstable flow, one that ends at a finite time, dz/dt = z^2, and a discontinuous map."""
    solver, x = SteadyState(stepper=stepper, max_steps=500, rtol=0, atol=1e-3), torch.tensor([[1.0], [-2.0]])
    unstable = solve(lambda z, x: 1.1 * z + x, x, solver)
    assert unstable.status.tolist() == [eq.Status.DIVERGED] * 2
    assert unstable.value.tolist() == [[0.0], [0.0]]
    assert unstable.residual.tolist() == [1.0, 2.0]
    explosive = eq.fixed_point(
        lambda z: z + z * z, torch.ones(1, 1), solver=SteadyState(stepper=stepper, max_steps=400)
    )
    assert explosive.status.tolist() == [eq.Status.DIVERGED]
    start, solver = torch.tensor([[0.7], [0.3]]), SteadyState(stepper=stepper, max_steps=100)
    broken = eq.fixed_point(lambda z: -torch.sign(z), start, solver=solver)
    assert set(broken.status.tolist()) <= {eq.Status.MAX_STEPS, eq.Status.STALLED}
    assert bool(broken.value.isfinite().all())


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "away", "steps"),
    [
        (SteadyState(), 1.0, 2),  # the first step is Picard's and arrives
        (SteadyState(stepper=Euler()), 1.0, 2),
        (SteadyState(), 0.0, 1),
        # Euler at a half: the residual halves, and with growth 1 it goes on so: 2^-10 < 1e-3.
        (SteadyState(stepper=Euler(error_ratio=math.inf), first_step=0.5, growth=1), 1.0, 11),
    ],
)
def test_constant_map(solver: SteadyState, away: float, steps: int) -> None:
    x = torch.tensor([[2.0]])
    assert int(eq.fixed_point(lambda z, x: x + 0 * z, x - 2 * away, x, solver=solver, params=()).num_steps) == steps


@every_stepper
def test_attempts(stepper: Stepper) -> None:
    """Each costs its evaluations; what VCAB3 rejects costs none."""
    weight, x = torch.randn(8, 8) / 2, torch.randn(1, 8)
    end = follow(SteadyState(stepper=stepper), lambda z: torch.tanh(z @ weight + x) - 2 * z, torch.zeros(1, 8), 61)[-1]
    attempts = int(end.accepted) + (0 if isinstance(stepper, VCAB3) else int(end.rejected))
    assert attempts == 60 / {VCAB3: 1, BS3: 3, Tsit5: 6, Euler: 1}[type(stepper)]
    assert int(end.rejected) > 0


def test_statistics() -> None:
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    solution = solve(lambda z, x: torch.tanh(z @ weight + x) - z, x, SteadyState(max_steps=300)).raise_for_status()
    assert solution.statistics["accepted"].tolist() == (solution.num_steps - 1).tolist()
    assert int(solution.statistics["rejected"].min()) > 3
    assert solution.statistics.keys() == {"accepted", "rejected"}


@every_stepper
def test_blow_up(stepper: Stepper) -> None:
    """F = -1000 z: the first step makes the residual 999 times as large and is divided by as much."""
    states = follow(SteadyState(stepper=stepper), lambda z: -1000 * z, torch.ones(1, 1), 3)
    assert states[1].base.tolist() == [[1.0]]
    assert int(states[1].rejected) == 1
    second_stage = states[0].tableau[0, 1, 0] if states[0].tableau is not None else 1.0
    assert float(states[1].step) == pytest.approx(1 / abs(1 - 1000 * float(second_stage)))


# --- points that are not finite, and zeros ---------------------------------------------------------------------------


@every_stepper
def test_region_of_nan(stepper: Stepper) -> None:
    """The first step lands beyond 1.1, where the map is not defined; the equilibrium is at 1."""
    x, solver = torch.tensor([[1.0], [0.5]]), SteadyState(stepper=stepper, rtol=1e-6, max_steps=200)
    solution = solve(lambda z, x: torch.where(z > 1.1 * x, torch.nan, x - 3 * (z - x)), x, solver, trace=True)
    assert bool(solution.trace.isnan().any(dim=0).all())
    torch.testing.assert_close(solution.raise_for_status().value, x, rtol=1e-5, atol=0)


@every_stepper
@pytest.mark.thorough
def test_no_tolerance(stepper: Stepper) -> None:
    """Errors and residuals become zeros, by which is divided; the start of the last row is its answer already."""
    x, solver = torch.tensor([[1.0], [-20.0], [0.0]]), SteadyState(stepper=stepper, rtol=0.0, atol=0.0, max_steps=200)
    solution = solve(lambda z, x: -0.5 * z + x, x, solver, trace=True)
    assert set(solution.status.tolist()) <= {eq.Status.CONVERGED, eq.Status.MAX_STEPS}
    assert (int(solution.status[2]), int(solution.num_steps[2])) == (eq.Status.CONVERGED, 1)
    assert bool((solution.converged == (solution.residual == 0)).all())
    assert torch.equal(solution.residual, solution.trace.nan_to_num(nan=math.inf).amin(dim=0))
    torch.testing.assert_close(solution.value, x / 1.5, rtol=1e-10, atol=0)
