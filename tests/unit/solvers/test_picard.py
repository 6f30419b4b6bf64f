"""Picard iteration: its exact counts on linear maps, damping, Banach's bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import spectral
from torch import Tensor

import equipoise as eq


def solve(slope: Tensor, x: Tensor, solver: eq.Picard, **options: Any) -> eq.Solution[Tensor]:
    """z = slope z + x, one number per sample, from zero."""
    return eq.fixed_point(lambda z, a, x: a * z + x, torch.zeros_like(x), slope, x, solver=solver, params=(), **options)


@pytest.mark.parametrize("damping", [1.0, 0.6, 0.25])
def test_errors_follow_the_closed_form(damping: float) -> None:
    slope, x = torch.tensor([[-0.9], [0.1], [0.5], [0.9]]), torch.tensor([[1.0], [-2.0], [3.0], [1e-3]])
    exact = x / (1 - slope)
    rate = 1 - damping * (1 - slope)  # of the error, in every step
    for steps in (1, 2, 7):
        solution = solve(slope, x, eq.Picard(damping=damping, max_steps=steps, rtol=0), trace=True)
        assert solution.trace is not None
        k = torch.arange(steps)[:, None]
        torch.testing.assert_close(solution.trace, (1 - slope.T) * exact.T.abs() * rate.T.abs() ** k)
        torch.testing.assert_close(solution.value, exact * (1 - rate ** (steps - 1)))


def test_counts_are_those_of_the_linear_rate() -> None:
    slope, x, atol = torch.tensor([[0.1], [0.5], [0.9], [0.97]]), torch.ones(4, 1), 1e-6
    solution = solve(slope, x, eq.Picard(max_steps=1000, rtol=0, atol=atol)).raise_for_status()
    expected = [1 + math.ceil(math.log(atol) / math.log(a)) for a in slope[:, 0].tolist()]  # |r_k| = a^k
    # At 0.1 the last residual is the tolerance itself, up to rounding.
    assert solution.num_steps.tolist()[1:] == expected[1:]
    assert int(solution.num_steps[0]) in (expected[0], expected[0] + 1)


def test_damping_tames_an_oscillation_that_diverges_without() -> None:
    slope, x = torch.tensor([[-1.5], [-2.9]]), torch.ones(2, 1)
    wild = solve(slope, x, eq.Picard(max_steps=100))
    assert wild.status.tolist() == [eq.Status.DIVERGED] * 2
    # |r_k| = a^k: the first evaluation that exceeds 1e8 times the first one.
    assert wild.num_steps.tolist() == [2 + math.floor(8 / math.log10(a)) for a in (1.5, 2.9)]
    tame = solve(slope, x, eq.Picard(damping=0.5, max_steps=500, rtol=1e-10)).raise_for_status()
    torch.testing.assert_close(tame.value, x / (1 - slope), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("radius", "status"), [(1.0, eq.Status.MAX_STEPS), (1.5, eq.Status.DIVERGED)])
def test_a_rotation_is_not_solved_and_keeps_its_best_iterate(radius: float, status: eq.Status) -> None:
    turn = radius * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    x = torch.randn(3, 2)
    solution = eq.fixed_point(
        lambda z, x: z @ turn.T + x, 0 * x, x, params=(), solver=eq.Picard(max_steps=60, rtol=0, atol=1e-9)
    )
    assert solution.status.tolist() == [status] * 3
    assert bool((solution.residual <= x.norm(dim=1) * (1 + 1e-12)).all())


@pytest.mark.parametrize("lipschitz", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_the_bound_holds_for_the_error_and_not_only_for_the_residual(lipschitz: float, damping: float) -> None:
    weight, x = spectral(6, lipschitz, torch.Generator().manual_seed(3)), torch.randn(5, 6)
    weight = (weight + weight.T) / 2
    weight *= lipschitz / torch.linalg.matrix_norm(weight, 2) if lipschitz else 1.0
    exact = torch.linalg.solve(torch.eye(6) - weight, x.T).T
    solver = eq.Picard(lipschitz=lipschitz, damping=damping, max_steps=5000, rtol=1e-3, atol=1e-4)
    solution = eq.fixed_point(lambda z, x: z @ weight.T + x, 0 * x, x, params=(), solver=solver).raise_for_status()
    image = solution.value @ weight.T + x
    allowed = 1e-4 + 1e-3 * image.norm(dim=1)
    assert bool(((solution.value - exact).norm(dim=1) <= allowed).all())
    assert bool((solution.residual <= (1 - lipschitz) * allowed * (1 + 1e-12)).all())
    # The same tolerance for the residual stops earlier, and its error is larger than asked for.
    without = eq.Picard(damping=damping, max_steps=5000, rtol=1e-3, atol=1e-4)
    crude = eq.fixed_point(lambda z, x: z @ weight.T + x, 0 * x, x, params=(), solver=without)
    if lipschitz >= 0.9:
        assert bool((crude.num_steps < solution.num_steps).all())
        assert bool(((crude.value - exact).norm(dim=1) > allowed).any())


def test_banachs_bound_is_attained_by_a_scaling_and_so_stops_no_later_than_it_must() -> None:
    slope, x, atol = torch.full((1, 1), 0.9), torch.ones(1, 1), 1e-3
    solution = solve(slope, x, eq.Picard(lipschitz=0.9, max_steps=500, rtol=0, atol=atol)).raise_for_status()
    error = float((solution.value - 10).abs())
    assert 0.9 * atol < error <= atol


def test_a_step_from_two_constants_is_never_longer_than_that_of_the_map() -> None:
    slope, x = torch.tensor([[-0.5], [0.5]]), torch.ones(2, 1)  # both have these constants; a step of 2 would diverge
    solver = eq.Picard(lipschitz=0.5, one_sided=0.5, max_steps=60, rtol=1e-10)
    assert solver.step == 1
    torch.testing.assert_close(solve(slope, x, solver).raise_for_status().value, x / (1 - slope), rtol=1e-9, atol=0)


def one_sided_map(mu: float, lipschitz: float) -> Tensor:
    """The plane's scaled rotation that attains both constants: <A d, d> = mu |d|^2 and |A d| = L |d| for every d."""
    turn = math.sqrt(lipschitz**2 - mu**2)
    return torch.tensor([[mu, -turn], [turn, mu]])


CONSTANTS = [(0.0, 1.5), (0.5, 2.0), (-1.0, 3.0), (0.9, 1.0), (-0.4, 0.5), (0.2, 0.5), (0.4, 0.5), (0.0, 0.9)]


@pytest.mark.parametrize(("mu", "lipschitz"), CONSTANTS)
def test_one_sided_damping_has_the_step_that_is_best_and_contracts_as_promised(mu: float, lipschitz: float) -> None:
    step = eq.Picard(one_sided=mu, lipschitz=lipschitz).step
    # The worst |(1 - t) d + t A d| / |d|, by brute force over steps.
    rates = lambda t: ((1 - t) ** 2 + 2 * t * (1 - t) * mu + (t * lipschitz) ** 2).sqrt()  # noqa: E731
    grid = torch.linspace(0, 1, 100_001)
    assert step == pytest.approx(float(grid[rates(grid).argmin()]), abs=2e-5)
    if mu <= lipschitz**2:
        rate = math.sqrt(1 - (1 - mu) ** 2 / (1 - 2 * mu + lipschitz**2))
    else:
        rate = lipschitz
    assert float(rates(torch.tensor(step))) == pytest.approx(rate)
    # The scaled rotation attains this rate in every step.
    a, x = one_sided_map(mu, lipschitz), torch.tensor([[1.0, 2.0]])
    solver = eq.Picard(one_sided=mu, lipschitz=lipschitz, max_steps=6, rtol=0)
    trace = eq.fixed_point(lambda z, x: z @ a.T + x, 0 * x, x, params=(), solver=solver, trace=True).trace
    assert trace is not None
    torch.testing.assert_close(trace[1:] / trace[:-1], torch.full((5, 1), rate), rtol=1e-6, atol=1e-9)


def test_the_example_of_the_specification_contracts_by_083() -> None:
    step = eq.Picard(one_sided=0.0, lipschitz=1.5).step
    assert step == pytest.approx(1 / 3.25)
    assert math.sqrt(1 - step) == pytest.approx(0.83, abs=5e-3)


@pytest.mark.parametrize(("mu", "lipschitz"), CONSTANTS)
def test_no_map_within_its_constants_is_slower_than_one_sided_damping_promises(mu: float, lipschitz: float) -> None:
    """Among them reflections, which the step beyond 1 of the formula where mu > L^2 would not solve."""
    solver = eq.Picard(one_sided=mu, lipschitz=lipschitz)
    t = solver.step
    rate = math.sqrt((1 - t) ** 2 + 2 * t * (1 - t) * mu + (t * lipschitz) ** 2)
    generator, worst = torch.Generator().manual_seed(1), 0.0
    candidates = [one_sided_map(mu, lipschitz), min(mu, lipschitz) * torch.eye(2), -lipschitz * torch.eye(2)]
    for _ in range(300):
        a = torch.randn(2, 2, generator=generator)
        candidates.append(a * (lipschitz / torch.linalg.matrix_norm(a, ord=2)))
    for a in candidates:
        if float(torch.linalg.eigvalsh((a + a.T) / 2).max()) > mu + 1e-12:
            continue
        found = float(torch.linalg.matrix_norm((1 - t) * torch.eye(2) + t * a, ord=2))
        assert found <= rate * (1 + 1e-12)
        worst = max(worst, found)
    assert worst == pytest.approx(rate)


@pytest.mark.parametrize(("mu", "lipschitz"), [(0.0, 1.5), (0.9, 1.2), (-2.0, 3.0), (0.4, 0.5)])
def test_the_one_sided_bound_is_one_of_the_error(mu: float, lipschitz: float) -> None:
    a, x = one_sided_map(mu, lipschitz), torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    exact = torch.linalg.solve(torch.eye(2) - a, x.T).T
    f = lambda z, x: z @ a.T + x  # noqa: E731
    solver = eq.Picard(one_sided=mu, lipschitz=lipschitz, max_steps=5000, rtol=1e-3, atol=1e-5)
    solution = eq.fixed_point(f, 0 * x, x, params=(), solver=solver).raise_for_status()
    image = f(solution.value, x)
    allowed = 1e-5 + 1e-3 * image.norm(dim=1)
    assert bool(((solution.value - exact).norm(dim=1) <= allowed).all())
    assert bool((solution.residual <= (1 - mu) * allowed * (1 + 1e-12)).all())
    # Everywhere on the way |z - z*| <= |f(z) - z| / (1 - mu), which a map that is mu times the identity attains.
    for z in torch.randn(50, 1, 2):
        assert float((z - exact[:1]).norm()) <= float((f(z, x[:1]) - z).norm()) / (1 - mu) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"one_sided": 0.0}, r"Picard\(one_sided=0.0, lipschitz=None\): needs a Lipschitz constant L"),
        ({"one_sided": 1.0, "lipschitz": 2.0}, r"Picard\(one_sided=1.0, lipschitz=2.0\): .*-L <= one_sided < 1"),
        ({"one_sided": -3.0, "lipschitz": 2.0}, r"Picard\(one_sided=-3.0, lipschitz=2.0\)"),
        ({"one_sided": math.nan, "lipschitz": 2.0}, r"Picard\(one_sided=nan, lipschitz=2.0\)"),
        ({"one_sided": 0.0, "lipschitz": 2.0, "damping": 0.5}, r"damping=0.5\): follows from one_sided and lipschitz"),
        ({"damping": 0.0}, r"Picard\(damping=0.0\): must lie in \(0, 1\]"),
        ({"damping": 1.5}, r"Picard\(damping=1.5\): must lie in"),
        ({"damping": math.nan}, r"Picard\(damping=nan\): must lie in"),
        ({"lipschitz": 1.0}, r"Picard\(lipschitz=1.0\): must lie in \[0, 1\); only a contraction has a bound"),
        ({"lipschitz": -0.1}, r"Picard\(lipschitz=-0.1\): must lie in"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eq.Picard(**fields)


@pytest.mark.parametrize("mu", [0.625, 0.9])
def test_a_one_sided_bound_beyond_the_constant_adds_nothing(mu: float) -> None:
    """<f(z) - f(z'), z - z'> <= L |z - z'|^2 anyway; the formula for the step has a pole at mu = (1 + L^2) / 2."""
    solver = eq.Picard(one_sided=mu, lipschitz=0.5, max_steps=60, rtol=1e-10)
    assert solver.step == 1
    solution = eq.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=solver).raise_for_status()
    torch.testing.assert_close(solution.value, torch.full((1, 1), 2.0))
