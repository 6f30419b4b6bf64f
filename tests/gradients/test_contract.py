"""What every gradient promises: right first derivatives for all solvers and states, counts, modes, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import TanhCell
from torch import Tensor, nn

import equipoise as eq
from equipoise.fixed_point import solve_map
from equipoise.map import DescentMap

TIGHT = eq.Anderson(max_steps=200, rtol=1e-13)
SOLVERS = {
    "Picard": eq.Picard(max_steps=300, rtol=1e-13),
    "Anderson": TIGHT,
    "Broyden": eq.Broyden(max_steps=60, memory=60, rtol=1e-13),
    "SteadyState": eq.SteadyState(max_steps=600, rtol=1e-12),
}
INVERTING = SOLVERS["Broyden"]
EXACT = eq.Implicit(solver=TIGHT)
ESTIMATORS = [eq.Shine(), eq.JacobianFree(), eq.Neumann(steps=3), eq.Phantom(steps=3)]
ALL = [EXACT, eq.Implicit(solver=INVERTING, start=eq.Shine()), *ESTIMATORS, eq.Unrolled(steps=4)]

by_name = pytest.mark.parametrize("gradient", ALL, ids=lambda g: type(g).__name__)


def tanh_map(z: Tensor, x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ w.T + x @ u.T + b)


def leaves(batch: int, d: int) -> list[Tensor]:
    """`x, w, u, b` of a contracting `tanh_map`, all wanting gradients."""
    cell = TanhCell(d)
    return [t.detach().clone().requires_grad_() for t in (torch.randn(batch, d), cell.w, cell.u, cell.b)]


def shaped(kind: str, flat: Tensor) -> Any:
    """A state of 4 numbers per sample, as the container asked for."""
    parts = flat[:, :1], flat[:, 1:].reshape(-1, 3, 1)
    return {"tensor": flat, "tuple": parts, "dict": dict(zip("ab", parts, strict=True))}[kind]


def flattened(state: Any) -> Tensor:
    parts = (state,) if isinstance(state, Tensor) else state.values() if isinstance(state, dict) else state
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class CountingCell(TanhCell):
    """Counts its evaluations and the cotangents that come back through it, apart from the library's own counts."""

    def __init__(self, d: int = 6, norm: float = 0.8) -> None:
        super().__init__(d, norm)
        self.evals = self.pulls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evals += 1
        out = super().forward(z, x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, g: Tensor) -> None:
        self.pulls += 1


# --- first derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("name", SOLVERS)
def test_implicit_gradient_equals_finite_differences(name: str, kind: str) -> None:
    solver = SOLVERS[name]

    def equilibrium(x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        solution = eq.fixed_point(
            lambda z, x: shaped(kind, tanh_map(flattened(z), x, w, u, b)),
            shaped(kind, torch.zeros_like(x)),
            x,
            params=(w, u, b),
            solver=solver,
            gradient=eq.Implicit(solver=solver),
        )
        return flattened(solution.raise_for_status().value)

    torch.autograd.gradcheck(equilibrium, leaves(2, 4), fast_mode=name != "Anderson" or kind != "tensor")


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_implicit_gradient_of_a_minimizer_equals_finite_differences(kind: str) -> None:
    solver = eq.LBFGS(max_steps=100, memory=100, rtol=0, atol=1e-11)

    def minimizer(x: Tensor, a: Tensor) -> Tensor:
        def objective(z: Any, x: Tensor) -> Tensor:
            flat = flattened(z)
            return (flat - x).square().sum(1) + nn.functional.softplus(flat @ a.T).sum(1)

        z0 = shaped(kind, torch.zeros_like(x))
        f = DescentMap(objective, z0, (x,), params=(a,))
        backward = eq.LBFGS(max_steps=100, rtol=0, atol=1e-12)
        return flattened(solve_map(f, z0, solver=solver, gradient=eq.Implicit(solver=backward)).value)

    x, a = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    torch.autograd.gradcheck(minimizer, [x, a], fast_mode=True)


@pytest.mark.parametrize("name", ["Anderson", "SteadyState"])
def test_implicit_needs_no_contraction(name: str) -> None:
    # A rotation by a right angle, three times as long: Picard iteration would blow up, forward and backward.
    a = 3 * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    x = torch.randn(3, 2, requires_grad=True)
    solver = SOLVERS[name]
    solution = eq.fixed_point(
        lambda z, x: z @ a.T + x, torch.zeros(3, 2), x, solver=solver, gradient=eq.Implicit(solver=solver), params=()
    )
    g = torch.randn(3, 2)
    (grad,) = torch.autograd.grad(solution.raise_for_status().value, x, g)
    torch.testing.assert_close(grad, torch.linalg.solve(torch.eye(2) - a.T, g.T).T)


@pytest.mark.parametrize(
    ("gradient", "series"),
    [
        (EXACT, lambda q: 1 / (1 - q)),
        (eq.Implicit(solver=INVERTING, start=eq.Shine()), lambda q: 1 / (1 - q)),
        (eq.Neumann(steps=3), lambda q: 1 + q + q**2 + q**3),
        (eq.Phantom(steps=2, damping=0.5), lambda q: 0.5 + 0.5 * (0.5 * q + 0.5)),
        (eq.JacobianFree(), torch.ones_like),
        (eq.Unrolled(steps=3), lambda q: 1 + q + q**2),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_map_of_sums_has_gradients(gradient: eq.gradients.Gradient, series: Callable[[Tensor], Tensor]) -> None:
    # The derivative of a sum is an expanded tensor, which must not be written to.
    x = torch.randn(3, 4, requires_grad=True)
    solution = eq.fixed_point(
        lambda z, x: torch.tanh(x + 0.2 * z.sum(dim=1, keepdim=True)),
        torch.zeros(3, 4), x, params=(), solver=INVERTING, gradient=gradient,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(solution.value.sum(), x)
    slope = 1 - solution.value.detach() ** 2  # J = 0.2 slope 1^T, so J^T 1 = q 1
    torch.testing.assert_close(grad, series(0.2 * slope.sum(1, keepdim=True)) * slope)


def test_an_adjoint_without_solution_is_reported_and_leaves_the_cotangent_alone() -> None:
    # With J = I, J^T w is w itself: adding to it in place would change w, and call the equation solved.
    reports: list[eq.Solution[Tensor]] = []
    x, g = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3)
    for gradient in (eq.Implicit(observe=reports.append), eq.Neumann(steps=3)):
        solution = eq.fixed_point(lambda z, x: z + 0 * x, torch.zeros(2, 3), x, params=(), gradient=gradient)
        torch.autograd.grad(solution.value, x, g)
    assert not reports[0].converged.any()
    torch.testing.assert_close(reports[0].residual, torch.ones(2))
    assert torch.equal(g, torch.ones(2, 3))
