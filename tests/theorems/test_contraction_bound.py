"""Certified contraction: with a proved Lipschitz constant, the stop bounds the error and not only the residual."""

import pytest
import torch

import equipoise as eq


@pytest.mark.parametrize("lipschitz", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_a_posteriori_bound(lipschitz: float, damping: float) -> None:
    torch.manual_seed(0)
    d, rows = 12, 6
    weight = torch.randn(d, d, dtype=torch.float64)
    weight *= lipschitz / torch.linalg.matrix_norm(weight, 2)
    x = torch.randn(rows, d, dtype=torch.float64)

    def f(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ weight.T) + x  # |J| <= |W| = L, and tanh makes the bound strict

    def solve(solver: eq.Solver) -> torch.Tensor:
        return eq.fixed_point(f, torch.zeros_like(x), x, solver=solver, params=()).raise_for_status()

    exact = solve(eq.Picard(max_steps=20_000, rtol=1e-15)).value
    for tolerance in (1e-1, 1e-3, 1e-6):
        solver = eq.Picard(max_steps=20_000, rtol=0, atol=tolerance, lipschitz=lipschitz, damping=damping)
        solution = solve(solver)
        bound = solution.residual / (1 - lipschitz)
        image = f(solution.value, x)
        slack = 1e-12
        assert bool((bound <= tolerance).all())
        assert bool(((solution.value - exact).norm(dim=1) <= bound + slack).all())
        assert bool(((image - exact).norm(dim=1) <= lipschitz * bound + slack).all())
        unaware = solve(eq.Picard(max_steps=20_000, rtol=0, atol=tolerance, damping=damping))
        assert bool((solution.num_steps >= unaware.num_steps).all())


def test_the_bound_is_needed() -> None:
    """Without the constant a residual below the tolerance leaves an error far above it."""
    f = lambda z, x: 0.99 * z + x  # noqa: E731
    x = torch.ones(1, 1, dtype=torch.float64)
    plain = eq.fixed_point(f, 0 * x, x, solver=eq.Picard(max_steps=10_000, rtol=0, atol=1e-2), params=())
    certified = eq.fixed_point(
        f, 0 * x, x, solver=eq.Picard(max_steps=10_000, rtol=0, atol=1e-2, lipschitz=0.99), params=()
    )
    assert abs(float(plain.value) - 100) > 0.5
    assert abs(float(certified.value) - 100) <= 1e-2
