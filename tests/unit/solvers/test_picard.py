"""Picard iteration: exact counts on linear maps, damping, and bounds of the error, which Anderson shares."""

import math
from typing import Any

import pytest
import torch
from problems import inverted, solve_linear, spectral
from torch import Tensor

import equipoise as eq


def solve(slope: Tensor, x: Tensor, solver: eq.Picard, **options: Any) -> eq.Solution[Tensor]:
    """z = slope z + x, one number per sample, from zero."""
    return eq.fixed_point(lambda z, a, x: a * z + x, torch.zeros_like(x), slope, x, solver=solver, params=(), **options)


@pytest.mark.parametrize("damping", [1.0, 0.6, 0.25])
def test_closed_form(damping: float) -> None:
    slope, x = torch.tensor([[-0.9], [0.1], [0.5], [0.9]]), torch.tensor([[1.0], [-2.0], [3.0], [1e-3]])
    exact = x / (1 - slope)
    rate = 1 - damping * (1 - slope)  # of the error, in every step
    for steps in (1, 2, 7):
        solution = solve(slope, x, eq.Picard(damping=damping, max_steps=steps, rtol=0), trace=True)
        k = torch.arange(steps)[:, None]
        torch.testing.assert_close(solution.trace, (1 - slope.T) * exact.T.abs() * rate.T.abs() ** k)
        torch.testing.assert_close(solution.value, exact * (1 - rate ** (steps - 1)))


def test_counts() -> None:
    slope, x, atol = torch.tensor([[0.1], [0.5], [0.9], [0.97]]), torch.ones(4, 1), 1e-6
    solution = solve(slope, x, eq.Picard(max_steps=1000, rtol=0, atol=atol)).raise_for_status()
    expected = [1 + math.ceil(math.log(atol) / math.log(a)) for a in slope[:, 0].tolist()]  # |r_k| = a^k
    # At 0.1 the last residual is the tolerance itself, up to rounding.
    assert solution.num_steps.tolist()[1:] == expected[1:]
    assert int(solution.num_steps[0]) in (expected[0], expected[0] + 1)


def test_damping() -> None:
    slope, x = torch.tensor([[-1.5], [-2.9]]), torch.ones(2, 1)
    wild = solve(slope, x, eq.Picard(max_steps=100))
    assert wild.status.tolist() == [eq.Status.DIVERGED] * 2
    # |r_k| = a^k: the first evaluation that exceeds 1e8 times the first one.
    assert wild.num_steps.tolist() == [2 + math.floor(8 / math.log10(a)) for a in (1.5, 2.9)]
    tame = solve(slope, x, eq.Picard(damping=0.5, max_steps=500, rtol=1e-10)).raise_for_status()
    torch.testing.assert_close(tame.value, x / (1 - slope), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("radius", "status"), [(1.0, eq.Status.MAX_STEPS), (1.5, eq.Status.DIVERGED)])
def test_rotation(radius: float, status: eq.Status) -> None:
    x = torch.randn(3, 2)
    solution = solve_linear(one_sided_map(0.0, radius), x, eq.Picard(max_steps=60, rtol=0, atol=1e-9))
    assert solution.status.tolist() == [status] * 3
    assert bool((solution.residual <= x.norm(dim=1) * (1 + 1e-12)).all())


# --- a Lipschitz constant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lipschitz", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("kind", "fields"), [(eq.Picard, {}), (eq.Picard, {"damping": 0.5}), (eq.Anderson, {})], ids=str
)
def test_error_bound(kind: type[eq.Solver], fields: dict[str, float], lipschitz: float) -> None:
    """The tolerance is one of the error, and not only of the residual."""
    weight, x = spectral(6, lipschitz, torch.Generator().manual_seed(3)), torch.randn(5, 6)
    weight = (weight + weight.T) / 2
    weight *= lipschitz / torch.linalg.matrix_norm(weight, 2) if lipschitz else 1.0
    fields = {**fields, "max_steps": 5000, "rtol": 1e-3, "atol": 1e-4}
    solution = solve_linear(weight, x, kind(lipschitz=lipschitz, **fields)).raise_for_status()
    error = (solution.value - inverted(weight, x)).norm(dim=1)
    allowed = 1e-4 + 1e-3 * (solution.value @ weight.T + x).norm(dim=1)
    assert bool((error <= allowed).all())
    assert bool((solution.residual <= (1 - lipschitz) * allowed * (1 + 1e-12)).all())
    # The same tolerance for the residual stops earlier, and its error is larger than asked for.
    if lipschitz >= 0.9 and kind is eq.Picard:
        crude = solve_linear(weight, x, kind(**fields))
        assert bool((crude.num_steps < solution.num_steps).all())
        assert bool(((crude.value - inverted(weight, x)).norm(dim=1) > allowed).any())


def test_bound_is_attained() -> None:
    slope, x, atol = torch.full((1, 1), 0.9), torch.ones(1, 1), 1e-3
    solution = solve(slope, x, eq.Picard(lipschitz=0.9, max_steps=500, rtol=0, atol=atol)).raise_for_status()
    assert 0.9 * atol < float((solution.value - 10).abs()) <= atol


# --- a one-sided bound as well ---------------------------------------------------------------------------------------


def one_sided_map(mu: float, lipschitz: float) -> Tensor:
    """The plane's scaled rotation that attains both constants: <A d, d> = mu |d|^2 and |A d| = L |d| for every d."""
    turn = math.sqrt(lipschitz**2 - mu**2)
    return torch.tensor([[mu, -turn], [turn, mu]])


CONSTANTS = [(0.0, 1.5), (0.5, 2.0), (-1.0, 3.0), (0.9, 1.0), (-0.4, 0.5), (0.2, 0.5), (0.4, 0.5), (0.0, 0.9)]


def worst_rate(step: Any, mu: float, lipschitz: float) -> Any:
    """The largest |(1 - t) d + t A d| / |d|."""
    return ((1 - step) ** 2 + 2 * step * (1 - step) * mu + (step * lipschitz) ** 2) ** 0.5


@pytest.mark.parametrize(("mu", "lipschitz"), CONSTANTS)
def test_one_sided_step(mu: float, lipschitz: float) -> None:
    """The step is the best one, and contracts as promised."""
    solver = eq.Picard(one_sided=mu, lipschitz=lipschitz, max_steps=6, rtol=0)
    grid = torch.linspace(0, 1, 100_001)
    assert solver.step == pytest.approx(float(grid[worst_rate(grid, mu, lipschitz).argmin()]), abs=2e-5)
    proved = math.sqrt(1 - (1 - mu) ** 2 / (1 - 2 * mu + lipschitz**2))
    rate = proved if mu <= lipschitz**2 else lipschitz
    assert worst_rate(solver.step, mu, lipschitz) == pytest.approx(rate)
    # The scaled rotation attains this rate in every step.
    trace = solve_linear(one_sided_map(mu, lipschitz), torch.tensor([[1.0, 2.0]]), solver, trace=True).trace
    torch.testing.assert_close(trace[1:] / trace[:-1], torch.full((5, 1), rate), rtol=1e-6, atol=1e-9)


def test_published_example() -> None:
    step = eq.Picard(one_sided=0.0, lipschitz=1.5).step
    assert step == pytest.approx(1 / 3.25)
    assert math.sqrt(1 - step) == pytest.approx(0.83, abs=5e-3)


@pytest.mark.parametrize(("mu", "lipschitz"), CONSTANTS)
def test_one_sided_worst_case(mu: float, lipschitz: float) -> None:
    """No map within its constants is slower, not even reflections, which a step beyond 1 would not solve."""
    t = eq.Picard(one_sided=mu, lipschitz=lipschitz).step
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(300, 2, 2, generator=generator)
    random *= lipschitz / torch.linalg.matrix_norm(random, ord=2)[:, None, None]
    extreme = one_sided_map(mu, lipschitz), min(mu, lipschitz) * torch.eye(2), -lipschitz * torch.eye(2)
    maps = torch.cat([torch.stack(extreme), random])
    maps = maps[torch.linalg.eigvalsh((maps + maps.mT) / 2).amax(dim=1) <= mu + 1e-12]
    found = torch.linalg.matrix_norm((1 - t) * torch.eye(2) + t * maps, ord=2)
    assert float(found.max()) == pytest.approx(worst_rate(t, mu, lipschitz), rel=1e-12)


@pytest.mark.parametrize(("mu", "lipschitz"), [(0.0, 1.5), (0.9, 1.2), (-2.0, 3.0), (0.4, 0.5)])
def test_one_sided_bound(mu: float, lipschitz: float) -> None:
    a, x = one_sided_map(mu, lipschitz), torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    solver = eq.Picard(one_sided=mu, lipschitz=lipschitz, max_steps=5000, rtol=1e-3, atol=1e-5)
    solution = solve_linear(a, x, solver).raise_for_status()
    allowed = 1e-5 + 1e-3 * (solution.value @ a.T + x).norm(dim=1)
    assert bool(((solution.value - inverted(a, x)).norm(dim=1) <= allowed).all())
    assert bool((solution.residual <= (1 - mu) * allowed * (1 + 1e-12)).all())
    # Everywhere on the way |z - z*| <= |f(z) - z| / (1 - mu), which a map that is mu times the identity attains.
    z = torch.randn(50, 2)
    error, residual = z - inverted(a, x[:1]), z @ a.T + x[:1] - z
    assert bool((error.norm(dim=1) <= residual.norm(dim=1) / (1 - mu) * (1 + 1e-12)).all())


@pytest.mark.parametrize("mu", [0.5, 0.625, 0.9])
def test_bound_beyond_the_constant(mu: float) -> None:
    """<f(z) - f(z'), z - z'> <= L |z - z'|^2 anyway; the formula for the step has a pole at mu = (1 + L^2) / 2.

    Both maps have these constants, and a step of 2 would diverge.
    """
    slope, x = torch.tensor([[-0.5], [0.5]]), torch.ones(2, 1)
    solver = eq.Picard(lipschitz=0.5, one_sided=mu, max_steps=60, rtol=1e-10)
    assert solver.step == 1
    torch.testing.assert_close(solve(slope, x, solver).raise_for_status().value, x / (1 - slope), rtol=1e-9, atol=0)
    assert float(solver.tolerance(torch.tensor(1.0))) == pytest.approx(0.5e-10)
