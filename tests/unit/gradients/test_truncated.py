"""Truncated series and unrolled applications against the dense adjoint and plain backpropagation."""

import dataclasses

import pytest
import torch
from problems import TanhCell, product
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

    @property
    def wanted(self) -> list[Tensor]:
        return [self.x, *self.cell.parameters()]

    def gradients(self, gradient: eq.Gradient) -> tuple[Tensor, ...]:
        """Those of x, w, u and b."""
        return torch.autograd.grad(eq.nn.DEQ(self.cell, solver=TIGHT, gradient=gradient)(self.x), self.wanted, self.g)

    @property
    def jacobian(self) -> Tensor:
        return ((1 - self.z**2)[..., None] * self.cell.w).detach()

    def pulled(self, w: Tensor) -> tuple[Tensor, ...]:
        """`w^T df` in closed form, in the same order."""
        c = w * (1 - self.z**2)
        return (c @ self.cell.u).detach(), c.T @ self.z, c.T @ self.x.detach(), c.sum(0)


@pytest.fixture
def case() -> Case:
    cell, x = TanhCell(), torch.randn(4, 6, requires_grad=True)
    z = eq.fixed_point(cell, torch.zeros(4, 6), x, solver=TIGHT).raise_for_status().value
    return Case(cell, x, torch.randn(4, 6), z.detach())


def test_jacobian_free(case: Case) -> None:
    """One differentiable application."""
    expected = torch.autograd.grad(case.cell(case.z, case.x), case.wanted, case.g)
    for found in (case.gradients(eq.JacobianFree()), case.pulled(case.g)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
def test_neumann(case: Case, steps: int) -> None:
    """It misses the rest of the series."""
    exact = torch.linalg.solve(torch.eye(6) - case.jacobian.mT, case.g)
    missing = product(torch.linalg.matrix_power(case.jacobian.mT, steps + 1), exact)
    actual = case.gradients(eq.Neumann(steps=steps))
    torch.testing.assert_close(actual, case.pulled(exact - missing), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_phantom(case: Case, steps: int, damping: float) -> None:
    """The series of the damped map, and backpropagation through its applications."""
    damped = damping * case.jacobian.mT + (1 - damping) * torch.eye(6)
    w = damping * sum(product(torch.linalg.matrix_power(damped, i), case.g) for i in range(steps))
    actual = case.gradients(eq.Phantom(steps=steps, damping=damping))
    torch.testing.assert_close(actual, case.pulled(w), rtol=1e-10, atol=1e-11)
    z = case.z
    for _ in range(steps):
        z = damping * case.cell(z, case.x) + (1 - damping) * z
    torch.testing.assert_close(actual, torch.autograd.grad(z, case.wanted, case.g))


@pytest.mark.parametrize("gradient", [eq.Neumann(steps=120), eq.Phantom(steps=250, damping=0.5)])
def test_long_series(case: Case, gradient: eq.Gradient) -> None:
    """They are the implicit gradient."""
    exact = case.gradients(eq.Implicit(solver=TIGHT))
    torch.testing.assert_close(case.gradients(gradient), exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solved", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_unrolled(solved: bool, closure: bool) -> None:
    """Plain backpropagation; value, residual and counts are the same with and without gradient."""
    cell, x, z0 = TanhCell(), torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    f, inputs = (lambda z: cell(z, x), ()) if closure else (cell, (x,))
    options = {"solver": TIGHT if solved else eq.Picard(max_steps=0), "gradient": eq.Unrolled(steps=3)}
    solution = eq.fixed_point(f, z0, *inputs, **options)
    z = eq.fixed_point(f, z0, *inputs, solver=TIGHT).value.detach() if solved else z0
    for _ in range(3):
        before, z = z, cell(z, x)
    assert torch.equal(solution.value, z)
    torch.testing.assert_close(solution.residual, (z - before).detach().norm(dim=1))
    targets = [x, *cell.parameters(), *(() if solved else (z0,))]
    actual, expected = (torch.autograd.grad(v.sin().sum(), targets) for v in (solution.value, z))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        untracked = eq.fixed_point(f, z0, *inputs, **options)
    for name in ("value", "residual", "num_steps"):
        assert torch.equal(getattr(untracked, name), getattr(solution, name))
    assert untracked.num_evals == solution.num_evals
    assert solved or solution.num_steps.tolist() == [3] * 4
