"""Broyden's methods on the problems of the published runs."""

import pytest
import torch
from problems import toy

import equipoise as eq


@pytest.mark.parametrize(("d", "most"), [(5, 10), (10, 19), (20, 26)])
def test_affine_maps(d: int, most: int) -> None:
    """Gay's theorem bounds the steps by 2d; the inverse is still far from exact then."""
    problem = toy(0.9, linear=True, d=d)
    solution = problem.solve(eq.Broyden(max_steps=200, memory=200, rtol=0, atol=1e-12)).solution.raise_for_status()
    exact = torch.linalg.inv(torch.eye(d) - problem.w)
    torch.testing.assert_close(solution.value, torch.bmm(exact, problem.b[:, :, None])[:, :, 0], rtol=0, atol=1e-10)
    assert int(solution.num_steps.max()) - 1 == most <= 2 * d  # the start is evaluated, too
    error = torch.linalg.matrix_norm(solution.inverse.dense() - exact) / torch.linalg.matrix_norm(exact)
    assert 0.2 < float(error.median()) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [eq.Broyden, eq.AdjointBroyden])
@pytest.mark.parametrize("rho", [2.0, 3.0])
@pytest.mark.parametrize("memory", [10, 20])
def test_restarts(kind: type[eq.Solver], memory: int, rho: float) -> None:
    solution = toy(rho).solve(kind(max_steps=300, memory=memory, rtol=0, atol=1e-4)).solution.raise_for_status()
    assert int(solution.num_steps.max()) > memory + 1, "a sample must restart for this test to say something"
