"""Truncated series and unrolled applications against the dense adjoint and plain backpropagation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from problems import TanhCell
from torch import Tensor

import equipoise as eq

TIGHT = eq.Anderson(max_steps=200, rtol=1e-13)


@dataclasses.dataclass(frozen=True)
class Case:
    """An equilibrium of a contracting cell, a cotangent, and what dense algebra says about them."""

    cell: TanhCell
    x: Tensor  # (B, d)
    g: Tensor  # (B, d)
    z: Tensor  # (B, d)

    def gradients(self, gradient: eq.gradients.Gradient) -> list[Tensor]:
        """Those of x, w, u and b."""
        z = eq.fixed_point(self.cell, torch.zeros_like(self.z), self.x, solver=TIGHT, gradient=gradient).value
        return list(torch.autograd.grad(z, [self.x, *self.cell.parameters()], self.g))

    @property
    def jacobian(self) -> Tensor:
        return ((1 - self.z**2)[..., None] * self.cell.w).detach()

    def pulled(self, w: Tensor) -> list[Tensor]:
        """`w^T df` in closed form, in the same order."""
        c = w * (1 - self.z**2)
        return [(c @ self.cell.u).detach(), c.T @ self.z, c.T @ self.x.detach(), c.sum(0)]


@pytest.fixture
def case() -> Case:
    cell, x = TanhCell(), torch.randn(4, 6, requires_grad=True)
    z = eq.fixed_point(cell, torch.zeros(4, 6), x, solver=TIGHT).raise_for_status().value
    return Case(cell, x, torch.randn(4, 6), z.detach())


def product(matrices: Tensor, vectors: Tensor) -> Tensor:
    return torch.bmm(matrices, vectors[..., None])[..., 0]


def test_jacobian_free_is_one_differentiable_application(case: Case) -> None:
    expected = torch.autograd.grad(case.cell(case.z, case.x), [case.x, *case.cell.parameters()], case.g)
    torch.testing.assert_close(case.gradients(eq.JacobianFree()), list(expected), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(case.pulled(case.g), list(expected), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
def test_neumann_misses_the_rest_of_the_series(case: Case, steps: int) -> None:
    exact = torch.linalg.solve(torch.eye(6) - case.jacobian.mT, case.g)
    missing = product(torch.linalg.matrix_power(case.jacobian.mT, steps + 1), exact)
    actual = case.gradients(eq.Neumann(steps=steps))
    torch.testing.assert_close(actual, case.pulled(exact - missing), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_phantom_is_the_series_of_the_damped_map(case: Case, steps: int, damping: float) -> None:
    damped = damping * case.jacobian.mT + (1 - damping) * torch.eye(6)
    w = damping * sum(product(torch.linalg.matrix_power(damped, i), case.g) for i in range(steps))
    actual = case.gradients(eq.Phantom(steps=steps, damping=damping))
    torch.testing.assert_close(actual, case.pulled(w), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("gradient", [eq.Neumann(steps=120), eq.Phantom(steps=250, damping=0.5)])
def test_long_series_are_the_implicit_gradient(case: Case, gradient: eq.gradients.Gradient) -> None:
    exact = case.gradients(eq.Implicit(solver=TIGHT))
    torch.testing.assert_close(case.gradients(gradient), exact, rtol=1e-9, atol=1e-10)


def test_phantom_is_backpropagation_through_damped_applications(case: Case) -> None:
    z = case.z
    for _ in range(3):
        z = 0.4 * case.cell(z, case.x) + 0.6 * z
    expected = torch.autograd.grad(z, [case.x, *case.cell.parameters()], case.g)
    torch.testing.assert_close(case.gradients(eq.Phantom(steps=3, damping=0.4)), list(expected))


@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_unrolled_is_plain_backpropagation(solved: bool, closure: bool) -> None:
    cell, x, z0 = TanhCell(), torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    solver = TIGHT if solved else eq.Picard(max_steps=0)
    f, inputs = (lambda z: cell(z, x), ()) if closure else (cell, (x,))
    solution = eq.fixed_point(f, z0, *inputs, solver=solver, gradient=eq.Unrolled(steps=3))
    z = eq.fixed_point(f, z0, *inputs, solver=solver).value.detach() if solved else z0
    for _ in range(3):
        before, z = z, cell(z, x)
    assert torch.equal(solution.value, z)
    torch.testing.assert_close(solution.residual, (z - before).detach().norm(dim=1))
    targets = [x, *cell.parameters(), *(() if solved else (z0,))]
    actual = torch.autograd.grad(solution.value.sin().sum(), targets)
    torch.testing.assert_close(actual, torch.autograd.grad(z.sin().sum(), targets), rtol=1e-12, atol=1e-13)


def test_unrolled_computes_the_same_with_and_without_gradient() -> None:
    cell, x = TanhCell(), torch.randn(4, 6)
    tracked, untracked = [], []
    for mode, results in ((True, tracked), (False, untracked)):
        with torch.set_grad_enabled(mode):
            solution = eq.fixed_point(cell, torch.zeros(4, 6), x, solver=eq.Picard(), gradient=eq.Unrolled(steps=3))
        results += [solution.value.detach(), solution.residual, solution.num_steps, torch.tensor(solution.num_evals)]
    assert all(map(torch.equal, tracked, untracked))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eq.Neumann(steps=-1), r"Neumann\(steps=-1\): must be >= 0"),
        (lambda: eq.Phantom(steps=0), r"Phantom\(steps=0\): must be >= 1"),
        (lambda: eq.Phantom(damping=0.0), r"Phantom\(damping=0.0\): must lie in \(0, 1\]"),
        (lambda: eq.Phantom(damping=1.5), r"Phantom\(damping=1.5\): must lie in \(0, 1\]"),
        (lambda: eq.Phantom(damping=math.nan), r"Phantom\(damping=nan\): must lie in \(0, 1\]"),
        (lambda: eq.Unrolled(steps=0), r"Unrolled\(steps=0\): must be >= 1"),
    ],
)
def test_fields_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
