"""Integration to the steady state: accuracy of the steps, stability, exact counts, rows that go their own ways."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise.solvers import BS3, VCAB3, Euler, SteadyState, Stepper, Tsit5

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdiffeq import odeint

STEPPERS = [VCAB3(), BS3(), Tsit5(), Euler()]
EVALUATIONS = {VCAB3: 1, BS3: 3, Tsit5: 6, Euler: 1}  # per attempted step


def name(stepper: Any) -> str:
    return type(stepper).__name__


every_stepper = pytest.mark.parametrize("stepper", STEPPERS, ids=name)


def solve(f: Callable[..., Tensor], z0: Tensor, *inputs: Tensor, solver: SteadyState, **options: bool) -> eq.Solution:
    return eq.fixed_point(f, z0, *inputs, solver=solver, params=(), **options)


def follow(solver: SteadyState, field: Callable[[Tensor], Tensor], z: Tensor, points: int) -> list[Any]:
    """The track of an integration after each of its points; the loop's statuses are left out."""
    rows, memory, tracks, f = torch.arange(len(z)), None, [], eq.FunctionMap(field, z)
    for _ in range(points):
        r = field(z)
        point = eq.Point(z, z + r, r, rows, torch.ones_like(rows, dtype=torch.bool), f)
        memory = memory or solver.init(point)
        z = solver.propose(memory, point)
        tracks.append(dataclasses.replace(memory, slopes=memory.slopes.clone()))
    return tracks


# Accuracy of the steps


def scheduled(stepper: Stepper, steps: list[float]) -> SteadyState:
    """A solver that makes these steps, whatever their errors."""

    class Scheduled(type(stepper)):  # type: ignore[misc]
        def absorb(self, track: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            landed, rejected, step = super().absorb(track, *arguments)
            number = (track.accepted + (landed & track.size.isfinite())).clamp_max(len(steps) - 1)
            return landed, rejected, torch.where(landed, torch.tensor(steps)[number], step)

    return SteadyState(stepper=Scheduled(error_ratio=math.inf))


def error_on_the_circle(stepper: Stepper, steps: list[float]) -> float:
    """Error at the end of y'' = -y, started on the unit circle."""
    field = lambda z: torch.stack([z[:, 1], -z[:, 0]], dim=1)  # noqa: E731
    points = EVALUATIONS[type(stepper).__mro__[0]] * len(steps) + 1
    end = follow(scheduled(stepper, steps), field, torch.tensor([[1.0, 0.0]]), points)[-1]
    assert int(end.accepted) == len(steps)
    time = sum(steps)
    return float((end.base[0] - torch.tensor([math.cos(time), -math.sin(time)])).norm())


@pytest.mark.parametrize("varying", [pytest.param(False, marks=pytest.mark.slow), True], ids=["constant", "varying"])
@pytest.mark.parametrize(
    ("stepper", "order", "coarse"), [(VCAB3(), 3, 80), (BS3(), 3, 40), (Tsit5(), 5, 12), (Euler(), 1, 160)], ids=str
)
def test_order_of_accuracy(stepper: Stepper, order: int, coarse: int, varying: bool) -> None:
    errors = []
    for count in (coarse, 2 * coarse, 4 * coarse):
        h = 4 / count
        ratios = [1 + 0.4 * math.sin(12 * i * h) if varying else 1.0 for i in range(count)]
        # A multistep method raises its order: its first step must be as small as the errors that are measured.
        start = [h**2] if isinstance(stepper, VCAB3) else []
        errors.append(error_on_the_circle(stepper, start + [h * ratio for ratio in ratios]))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(order - 0.15 < slope < order + 0.6 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("stepper", [VCAB3(error_ratio=3e-4), BS3(error_ratio=1e-5), Tsit5(error_ratio=1e-7)], ids=name)
def test_flow_of_torchdiffeq(stepper: Stepper) -> None:
    weight = torch.randn(6, 6) / 2
    field = lambda z: torch.tanh(z @ weight + 0.5) - z  # noqa: E731
    z0 = torch.randn(1, 6)
    tracks = follow(SteadyState(stepper=stepper, first_step=1e-4), field, z0, 600)
    times, states, before = [0.0], [z0], tracks[0]
    for track in tracks[1:]:
        if int(track.accepted) > int(before.accepted):
            times.append(times[-1] + float(before.step))
            states.append(track.base)
        if times[-1] > 2:
            break
        before = track
    assert times[-1] > 2
    exact = odeint(lambda _, z: field(z), z0, torch.tensor(times), method="dopri8", rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.stack(states), exact, rtol=1e-4, atol=1e-5)


class Reference:
    """VCAB3 of one row in the recurrences of Hairer, Norsett and Wanner (III.5), the longest step by bisection."""

    def __init__(
        self, field: Callable[[Tensor], Tensor], z: Tensor, error_ratio: float, growth: float, first: float
    ) -> None:
        self.field, self.z, self.error_ratio, self.growth = field, z, error_ratio, growth
        self.steps: list[float] = []
        self.stars: list[Tensor] = []  # phi*_i of the step before
        self.h, self.evaluations, self.shortened = first, 1, 0
        self.slope = field(z)

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
        error = float(parts[-1].norm() / (self.error_ratio * h * self.slope.norm())) if order > 1 else 0.0
        return torch.stack(parts).sum(0), stars, error

    def advance(self) -> None:
        h = self.growth * self.h if self.steps else self.h
        if self.terms(h)[2] > 1:
            self.shortened += 1
            low, high = 0.0, h
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if self.terms(middle)[2] <= 1 else (low, middle)
            h = low
        step, self.stars, _ = self.terms(h)
        self.z, self.h = self.z + step, h
        self.steps.append(h)
        self.slope = self.field(self.z)
        self.evaluations += 1


@pytest.mark.parametrize(
    ("error_ratio", "growth"), [(0.02, 1.0), (0.02, 1e3), (0.15, 3.0), (0.15, 1e3), (math.inf, 1.1), (math.inf, 1.0)]
)
def test_vcab3_is_the_published_recurrence(error_ratio: float, growth: float) -> None:
    weight = torch.randn(5, 5) / 3
    field = lambda z: torch.tanh(z @ weight + 1) - z  # noqa: E731
    z0 = torch.randn(1, 5)
    solver = SteadyState(stepper=VCAB3(error_ratio=error_ratio), growth=growth, first_step=0.5)
    reference = Reference(field, z0, error_ratio, growth, 0.5)
    for track in follow(solver, field, z0, 10):
        torch.testing.assert_close(track.base, reference.z, rtol=1e-12, atol=1e-13)
        assert int(track.accepted) == reference.evaluations - 1
        reference.advance()
        assert float(track.step) == pytest.approx(reference.h, rel=1e-9)
        assert int(track.rejected) == reference.shortened


def test_vcab3_takes_the_longest_admitted_step() -> None:
    """The error of what it takes is the allowed one, unless growth limits."""
    weight = torch.randn(5, 5) / 3
    field = lambda z: torch.tanh(z @ weight + 1) - z  # noqa: E731
    stepper = VCAB3(error_ratio=0.05)
    tracks = follow(SteadyState(stepper=stepper, first_step=0.1), field, torch.randn(3, 5), 12)
    checked = 0
    for before, track in itertools.pairwise(tracks):
        order, h = track.phase, track.step[:, None]
        term = torch.where(order[:, None] == 3, 1.0, 0.0)
        last = h**2 / 2 * track.slopes[:, 1] * (1 - term)
        last = last + h**2 * (2 * h + 3 * track.past[:, None]) / 6 * track.slopes[:, 2] * term
        error = last.norm(dim=1) / (stepper.error_ratio * track.step * track.size)
        short = track.rejected > before.rejected
        assert bool((error <= 1 + 1e-9).all())
        assert bool((error[short] > 1 - 1e-9).all())
        torch.testing.assert_close(track.step[~short], 3 * before.step[~short])
        checked += int(short.sum())
    assert checked > 5


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_euler_is_damped_picard(damping: float) -> None:
    weight, x = torch.randn(6, 6) / 6, torch.randn(4, 6)
    f = lambda z, x: torch.tanh(z @ weight + x)  # noqa: E731
    fixed = SteadyState(stepper=Euler(error_ratio=math.inf), growth=1, first_step=damping, rtol=1e-8, max_steps=100)
    picard = eq.Picard(damping=damping, rtol=1e-8, max_steps=100)
    ours, theirs = (solve(f, torch.zeros_like(x), x, solver=solver) for solver in (fixed, picard))
    assert ours.num_steps.tolist() == theirs.num_steps.tolist()
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-13, atol=1e-14)


# Stability


@every_stepper
@pytest.mark.parametrize("alpha", [-0.9, 0.0, 0.9, -3.0, -30.0, -1e4])
def test_real_eigenvalue(stepper: Stepper, alpha: float) -> None:
    x = torch.tensor([[1.0], [-20.0]])
    solver = SteadyState(stepper=stepper, rtol=1e-6, max_steps=150)
    solution = solve(lambda z, x: alpha * z + x, torch.zeros_like(x), x, solver=solver).raise_for_status()
    torch.testing.assert_close(solution.value, x / (1 - alpha), rtol=2e-5, atol=0)


def test_bs3_with_the_error_relative_to_a_rate_leaves_the_region_of_stability() -> None:
    """Why the control of the source is not used: at F = -4z, |e| <= 0.2 |F| admits steps that make z grow."""
    h = 0.65
    k1 = -4.0
    k2 = k1 * (1 - 4 * h / 2)
    k3 = k1 - 4 * h * 3 / 4 * k2
    k4 = k1 - 4 * h * (2 / 9 * k1 + 1 / 3 * k2 + 4 / 9 * k3)
    error = abs(h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8))
    assert error <= 0.2 * abs(k1)
    assert abs(k4) > abs(k1)
    assert error > BS3().error_ratio * h * abs(k1)


@pytest.mark.parametrize("stepper", [VCAB3(), BS3(), Tsit5()], ids=name)
@pytest.mark.parametrize("turn", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("decay", [0.0, -3.0])
def test_rotation(stepper: Stepper, turn: float, decay: float) -> None:
    """Eigenvalues decay +- i turn, where Picard iteration fails."""
    x = torch.tensor([[1.0, 1.0]])
    matrix = torch.tensor([[decay, -turn], [turn, decay]])
    f = lambda z, x: z @ matrix.T + x  # noqa: E731
    solution = solve(f, torch.zeros_like(x), x, solver=SteadyState(stepper=stepper, max_steps=400)).raise_for_status()
    torch.testing.assert_close(
        solution.value, torch.linalg.solve(torch.eye(2) - matrix, x.T).T, rtol=5e-3, atol=1e-3 / turn
    )
    assert eq.Status.CONVERGED not in solve(f, torch.zeros_like(x), x, solver=eq.Picard(max_steps=400)).status


def stiff(top: float) -> tuple[Callable[..., Tensor], Tensor]:
    rates = torch.logspace(0, math.log10(top), 12)
    return lambda z, x: z + rates * (x - z), torch.ones(1, 12)


@every_stepper
def test_stiff_spectrum(stepper: Stepper) -> None:
    f, x = stiff(30.0)
    solution = solve(f, 0 * x, x, solver=SteadyState(stepper=stepper, max_steps=500))
    torch.testing.assert_close(solution.raise_for_status().value, x, rtol=0, atol=1e-2)
    # Too stiff for an explicit method in so few steps: it says so, and does not grow meanwhile.
    f, x = stiff(1e4)
    solution = solve(f, 0 * x, x, solver=SteadyState(stepper=stepper, max_steps=200), trace=True)
    assert solution.status.tolist() == [eq.Status.MAX_STEPS]
    assert solution.trace is not None
    assert float(solution.trace[100:].max()) < float(solution.trace[0]) / 10


@every_stepper
def test_unstable_flow_is_reported(stepper: Stepper) -> None:
    solver = SteadyState(stepper=stepper, max_steps=500, rtol=0, atol=1e-3)
    x = torch.tensor([[1.0], [-2.0]])
    solution = solve(lambda z, x: 1.1 * z + x, torch.zeros_like(x), x, solver=solver)
    assert solution.status.tolist() == [eq.Status.DIVERGED] * 2
    assert solution.value.tolist() == [[0.0], [0.0]]
    assert solution.residual.tolist() == [1.0, 2.0]


@every_stepper
def test_explosion_is_reported(stepper: Stepper) -> None:
    """dz/dt = z^2 ends at a finite time."""
    solver = SteadyState(stepper=stepper, max_steps=400)
    solution = solve(lambda z, _: z + z * z, torch.ones(1, 1), torch.ones(1, 1), solver=solver)
    assert solution.status.tolist() == [eq.Status.DIVERGED]


@every_stepper
def test_discontinuous_map_ends(stepper: Stepper) -> None:
    solver = SteadyState(stepper=stepper, max_steps=300)
    solution = solve(lambda z, _: -torch.sign(z), torch.tensor([[0.7], [0.3]]), torch.ones(2, 1), solver=solver)
    assert bool(torch.isin(solution.status, torch.tensor([eq.Status.MAX_STEPS, eq.Status.STALLED])).all())
    assert bool(solution.value.isfinite().all())


# Counts


def test_exact_counts() -> None:
    x = torch.tensor([[2.0]])
    constant = lambda z, x: x + 0 * z  # noqa: E731
    for stepper in (VCAB3(), Euler()):  # the first step is Picard's and arrives
        assert int(solve(constant, 0 * x, x, solver=SteadyState(stepper=stepper)).num_steps) == 2
    assert int(solve(constant, x, x, solver=SteadyState()).num_steps) == 1
    assert int(solve(constant, 0 * x, x, solver=SteadyState(max_steps=0)).num_steps) == 0
    # Euler at a half: the residual halves, and with growth 1 it goes on so: 2^-10 < 1e-3.
    halving = SteadyState(stepper=Euler(error_ratio=math.inf), first_step=0.5, growth=1)
    assert int(solve(constant, 0 * x, x, solver=halving).num_steps) == 11


@every_stepper
def test_counts_of_steps_and_evaluations(stepper: Stepper) -> None:
    weight, x = torch.randn(8, 8) / 2, torch.randn(1, 8)
    tracks = follow(SteadyState(stepper=stepper), lambda z: torch.tanh(z @ weight + x) - 2 * z, torch.zeros(1, 8), 61)
    end = tracks[-1]
    attempts = int(end.accepted) + (0 if isinstance(stepper, VCAB3) else int(end.rejected))
    assert attempts == 60 / EVALUATIONS[type(stepper)]
    assert int(end.rejected) > 0


def test_a_rejected_multistep_attempt_costs_no_evaluation() -> None:
    weight, x = torch.randn(8, 8), torch.randn(5, 8)
    calls, tracks = [], []

    class Watched(SteadyState):
        def propose(self, memory: Any, point: eq.Point) -> Tensor:
            z = super().propose(memory, point)
            tracks.append((memory.accepted.clone(), memory.rejected.clone(), point.rows.clone()))
            return z

    def f(z: Tensor, x: Tensor) -> Tensor:
        calls.append(len(z))
        return torch.tanh(z @ weight + x) - z

    solution = solve(f, torch.zeros_like(x), x, solver=Watched(max_steps=200)).raise_for_status()
    assert solution.num_evals == len(calls) == int(solution.num_steps.max())
    for row, steps in enumerate(solution.num_steps.tolist()):
        accepted, rejected = ([t[i][t[2] == row] for t in tracks if row in t[2]] for i in (0, 1))
        assert int(accepted[steps - 2]) == steps - 2  # each evaluation between the first and the last was a step
        assert int(rejected[steps - 2]) > 3
        if len(accepted) >= steps:
            assert int(accepted[-1]) == int(accepted[steps - 1])  # a sample that stopped counts no more


@every_stepper
def test_the_solution_tells_the_steps_of_each_sample_whoever_its_batch_mates(stepper: Stepper) -> None:
    weight, x = torch.randn(8, 8), torch.randn(6, 8) * torch.logspace(-2, 1, 6)[:, None]
    f = lambda z, x: torch.tanh(z @ weight + x) - z  # noqa: E731
    solver = SteadyState(stepper=stepper, max_steps=300)
    together = solve(f, torch.zeros_like(x), x, solver=solver)
    assert set(together.statistics) == {"accepted", "rejected"}
    for row in range(6):
        alone = solve(f, torch.zeros_like(x[:1]), x[row : row + 1], solver=solver)
        for name, counted in together.statistics.items():
            assert int(alone.statistics[name]) == int(counted[row])
    if isinstance(stepper, VCAB3):
        assert together.statistics["accepted"].tolist() == (together.num_steps - 1).tolist()
    assert int(together.statistics["rejected"].sum()) > 0
    none = solve(f, torch.zeros_like(x), x, solver=dataclasses.replace(solver, max_steps=0))
    assert none.statistics["accepted"].tolist() == none.statistics["rejected"].tolist() == [0] * 6


def test_a_blow_up_sends_back_at_the_price_of_one_evaluation() -> None:
    """F = -1000 z: the first step makes the residual 999 times as large and is divided by as much."""
    field = lambda z: -1000 * z  # noqa: E731
    for stepper in STEPPERS:
        tracks = follow(SteadyState(stepper=stepper), field, torch.ones(1, 1), 3)
        assert tracks[1].base.tolist() == [[1.0]]
        assert int(tracks[1].rejected) == 1
        at_second_stage = tracks[0].tableau[0, 1, 0] if tracks[0].tableau is not None else 1.0
        assert float(tracks[1].step) == pytest.approx(1 / abs(1 - 1000 * float(at_second_stage)))


# Rows


def mixed(rows: int = 16, d: int = 24, rho: float = 1.2) -> tuple[Callable[..., Tensor], Tensor]:
    weight = torch.randn(d, d)
    weight *= rho / torch.linalg.matrix_norm(weight, 2)
    return lambda z, x: torch.tanh(z @ weight + x), torch.randn(rows, d) * torch.logspace(-2, 1, rows)[:, None]


@every_stepper
def test_samples_equal_runs_of_one(stepper: Stepper) -> None:
    f, x = mixed(rows=6)
    solver = SteadyState(stepper=stepper, rtol=1e-5, max_steps=250)
    together = solve(f, torch.zeros_like(x), x, solver=solver)
    assert len(together.num_steps.unique()) > 1
    for row in range(len(x)):
        alone = solve(f, torch.zeros_like(x[:1]), x[row : row + 1], solver=solver)
        assert int(alone.num_steps) == int(together.num_steps[row])
        assert int(alone.status) == int(together.status[row])
        torch.testing.assert_close(alone.value[0], together.value[row], rtol=1e-10, atol=1e-12)


@every_stepper
def test_permuting_the_batch_permutes_the_answer(stepper: Stepper) -> None:
    f, x = mixed()
    order = torch.randperm(len(x))
    solver = SteadyState(stepper=stepper, rtol=1e-5, max_steps=200)
    plain, permuted = (solve(f, torch.zeros_like(x), y, solver=solver) for y in (x, x[order]))
    torch.testing.assert_close(permuted.value, plain.value[order], rtol=1e-10, atol=1e-12)
    assert permuted.num_steps.tolist() == plain.num_steps[order].tolist()


@every_stepper
def test_same_equilibrium_as_anderson(stepper: Stepper) -> None:
    f, x = mixed(rows=4, rho=0.9)
    ours = solve(f, torch.zeros_like(x), x, solver=SteadyState(stepper=stepper, rtol=1e-11, max_steps=400))
    exact = eq.fixed_point(f, torch.zeros_like(x), x, solver=eq.Anderson(rtol=1e-13, max_steps=200), params=())
    torch.testing.assert_close(ours.raise_for_status().value, exact.value, rtol=1e-10, atol=1e-10)


@every_stepper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(stepper: Stepper, dtype: torch.dtype) -> None:
    _, x = mixed(rows=3)
    weight = torch.eye(24, dtype=dtype) * -2
    x = x.to(dtype)
    solver = SteadyState(stepper=stepper, rtol=1e-4 if dtype is torch.float32 else 1e-9, max_steps=300)
    solution = solve(lambda z, x: z @ weight + x, torch.zeros_like(x), x, solver=solver).raise_for_status()
    assert solution.value.dtype == dtype
    torch.testing.assert_close(solution.value, x / 3, rtol=2 * solver.rtol, atol=2 * solver.rtol)


def test_projected_map() -> None:
    """The flow of a projected map ends at the projected optimum."""
    target = torch.tensor([[3.0, 4.0]])

    def ball(z: Tensor) -> Tensor:
        return z / z.norm(dim=1, keepdim=True).clamp_min(1)

    for stepper in STEPPERS:
        f = eq.FunctionMap(lambda z: z - 2 * (z - target), target, params=(), projection=ball)
        solution = SteadyState(stepper=stepper, max_steps=200, rtol=1e-6).solve(f, 0 * target).raise_for_status()
        torch.testing.assert_close(solution.value, target / 5, rtol=1e-5, atol=1e-5)
        assert float(solution.value.norm()) <= 1 + 1e-12


# Points that are not finite


@every_stepper
def test_a_region_of_nan_is_backed_away_from(stepper: Stepper) -> None:
    """The first step lands beyond 1.1, where the map is not defined; the equilibrium is at 1."""
    x = torch.tensor([[1.0], [0.5]])
    f = lambda z, x: torch.where(z > 1.1 * x, torch.nan, x - 3 * (z - x))  # noqa: E731
    solver = SteadyState(stepper=stepper, rtol=1e-6, max_steps=200)
    solution = solve(f, torch.zeros_like(x), x, solver=solver, trace=True).raise_for_status()
    assert solution.trace is not None
    assert bool(solution.trace.isnan().any(dim=0).all())
    torch.testing.assert_close(solution.value, x, rtol=1e-5, atol=0)


@every_stepper
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_point_that_is_not_finite_ends_with_a_status(stepper: Stepper, poison: float) -> None:
    x = torch.tensor([[1.0], [2.0], [4.0]])

    def f(z: Tensor, x: Tensor) -> Tensor:
        z = torch.where((x == 2) & (z != 0), poison, z)  # only the start is defined
        return torch.where(x == 4, poison, x - z)  # nowhere

    solution = solve(f, torch.zeros_like(x), x, solver=SteadyState(stepper=stepper, max_steps=100))
    assert solution.status.tolist() == [eq.Status.CONVERGED, eq.Status.NONFINITE, eq.Status.NONFINITE]
    assert solution.num_steps[1:].tolist() == [2 + SteadyState.retries, 1]
    assert solution.value[1:].tolist() == [[0.0], [0.0]]
    assert solution.residual[1].tolist() == 2.0


@every_stepper
def test_tolerances_of_zero_use_all_steps_and_return_the_best_point(stepper: Stepper) -> None:
    """Errors and residuals become zeros, by which is divided; the start of the last row is its answer already."""
    x = torch.tensor([[1.0], [-20.0], [0.0]])
    solver = SteadyState(stepper=stepper, rtol=0.0, atol=0.0, max_steps=300)
    solution = solve(lambda z, x: -0.5 * z + x, torch.zeros_like(x), x, solver=solver, trace=True)
    assert bool(torch.isin(solution.status, torch.tensor([eq.Status.CONVERGED, eq.Status.MAX_STEPS])).all())
    assert int(solution.status[2]) == eq.Status.CONVERGED
    assert int(solution.num_steps[2]) == 1
    assert bool((solution.converged == (solution.residual == 0)).all())
    assert solution.trace is not None
    best = solution.trace.nan_to_num(nan=math.inf).amin(dim=0)
    torch.testing.assert_close(solution.residual, best, rtol=0, atol=0)
    torch.testing.assert_close(solution.value, x / 1.5, rtol=1e-10, atol=0)


# Fields


@pytest.mark.parametrize(
    "make",
    [
        lambda: SteadyState(first_step=0.0),
        lambda: SteadyState(first_step=math.inf),
        lambda: SteadyState(growth=0.5),
        lambda: VCAB3(error_ratio=0.0),
        lambda: BS3(error_ratio=math.nan),
    ],
)
def test_fields_out_of_range(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_fields_of_another_kind() -> None:
    with pytest.raises(TypeError, match="VCAB3"):
        SteadyState(stepper="vcab3")  # type: ignore[arg-type]
