"""Joint state: equilibrium, adjoint and optimized input as one fixed point; blocks of different scale."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise.fixed_point import solve_map

F64 = torch.float64
Cell = Callable[[Tensor, Tensor], Tensor]


def ball(radius: float, size: int) -> Callable[[Tensor], Tensor]:
    """Projection of the last `size` numbers of a flat state onto an L2 ball."""

    def project(v: Tensor) -> Tensor:
        x = v[:, -size:]
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return torch.cat([v[:, :-size], x * (radius / norm.clamp_min(radius))], dim=1)

    return project


def joint_map(
    f: Cell, cost: Callable[[Tensor, Tensor], Tensor], z0: Tensor, x0: Tensor, step: float, radius: float | None = None
) -> tuple[eq.FunctionMap, tuple[Tensor, Tensor, Tensor]]:
    """The map (z, mu, x) -> (f, J_z^T mu + dc/dz, P(x - step (J_x^T mu + dc/dx)))."""

    def joint(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        z, mu, x = state
        with torch.enable_grad():
            z_in, x_in = z.detach().requires_grad_(), x.detach().requires_grad_()
            fz = f(z_in, x_in)
            gz, gx = torch.autograd.grad((fz * mu).sum() + cost(z_in, x_in).sum(), (z_in, x_in))
        return fz.detach(), gz, x - step * gx

    start = (z0, torch.zeros_like(z0), x0)
    n, p = z0.shape[1], x0.shape[1]
    projection = None if radius is None else ball(radius, p)
    return eq.FunctionMap(joint, start, blocks=(n, n, p), projection=projection), start


def solve(f: eq.FunctionMap, start: tuple[Tensor, Tensor, Tensor], solver: eq.Solver) -> eq.Solution:
    with torch.no_grad():
        return solve_map(f, start, solver=solver, gradient=eq.JacobianFree()).raise_for_status()


def linear_problem(n: int, p: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, n, generator=generator, dtype=F64)
    weight *= 0.8 / torch.linalg.matrix_norm(weight, 2)
    inject = torch.randn(n, p, generator=generator, dtype=F64)
    shift = torch.randn(rows, n, generator=generator, dtype=F64)
    return weight, inject, shift, torch.linalg.inv(torch.eye(n, dtype=F64) - weight)


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["equal-scales", "adjoint-10000-times-larger"])
def test_quadratic_cost(scale: float) -> None:
    n, p, rows, rho = 10, 3, 4, 0.3
    weight, inject, shift, inverse = linear_problem(n, p, rows)
    target = torch.randn(rows, n, generator=torch.Generator().manual_seed(4), dtype=F64)
    # x minimizes |S (U x + b) - y|^2 + rho |x|^2.
    gain = inverse @ inject
    rest = shift @ inverse.T - target
    x_exact = -torch.linalg.solve(gain.T @ gain + rho * torch.eye(p, dtype=F64), gain.T @ rest.T).T
    z_exact = (x_exact @ inject.T + shift) @ inverse.T

    f, start = joint_map(
        lambda z, x: z @ weight.T + x @ inject.T + shift,
        lambda z, x: scale * 0.5 * ((z - target).square().sum(1) + rho * x.square().sum(1)),
        torch.zeros(rows, n, dtype=F64),
        torch.zeros(rows, p, dtype=F64),
        step=0.05 / scale,
    )
    solution = solve(f, start, eq.Anderson(memory=2 * n + p, max_steps=200, rtol=1e-12))
    z, mu, x = solution.value
    torch.testing.assert_close(x, x_exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(z, z_exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mu, scale * (z_exact - target) @ inverse, rtol=1e-9, atol=1e-9 * scale)
    # The scale of the cost is only that of one block: with balanced blocks it changes nothing to speak of.
    assert int(solution.num_steps.max()) <= 2 * n + p + 12


@pytest.mark.parametrize("memory", [1, 3, 10])
@pytest.mark.parametrize("step", [0.03, 0.3])
def test_l2_ball(memory: int, step: float) -> None:
    n, p, rows, radius = 10, 4, 3, 0.7
    weight, inject, shift, inverse = linear_problem(n, p, rows)
    a = torch.randn(rows, n, generator=torch.Generator().manual_seed(5), dtype=F64)
    direction = a @ inverse @ inject  # gradient of a . z*(x)
    exact = radius * direction / direction.norm(dim=1, keepdim=True)
    f, start = joint_map(
        lambda z, x: z @ weight.T + x @ inject.T + shift,
        lambda z, x: -(a * z).sum(1),
        torch.zeros(rows, n, dtype=F64),
        torch.full((rows, p), 5.0, dtype=F64),  # far outside: the start is projected
        step,
        radius,
    )
    solver = eq.Anderson(memory=memory, max_steps=400, rtol=1e-11)
    z, _, x = solve(f, start, solver).value
    assert float(x.norm(dim=1).max()) <= radius * (1 + 1e-6)
    torch.testing.assert_close(x, exact, rtol=1e-8, atol=1e-8)
    at_zero = (a * (shift @ inverse.T)).sum(1)
    torch.testing.assert_close((a * z).sum(1) - at_zero, radius * direction.norm(dim=1), rtol=1e-8, atol=1e-8)

    early = eq.Anderson(memory=memory, max_steps=4, rtol=1e-11)
    with torch.no_grad():
        stopped_early = solve_map(f, start, solver=early, gradient=eq.JacobianFree())
    assert float(stopped_early.value[2].norm(dim=1).max()) <= radius * (1 + 1e-6)


def test_best_iterate_with_a_block_at_zero() -> None:
    f = eq.FunctionMap(lambda v: (v[0] / 2, v[1] / 2 + 1), (torch.zeros(1, 2), torch.zeros(1, 2)), blocks=(2, 2))
    solution = eq.Picard(max_steps=6, rtol=1e-9).solve(f, torch.zeros(1, 4))
    assert float(solution.residual) == pytest.approx(2**0.5 / 2**5)  # of the last point; the first has 2 ** 0.5


def test_residual_may_rise_first() -> None:
    # The second block follows the first, and starts settled: the residual rises from 1 to 3 before it falls.
    f = eq.FunctionMap(lambda v: (0 * v[0] + 1, 3 * v[0] + 1), (torch.zeros(1, 1), torch.ones(1, 1)), blocks=(1, 1))
    solution = eq.Picard(max_steps=2, rtol=1e-9).solve(f, torch.tensor([[0.0, 1.0]]))
    assert solution.value.tolist() == [[1.0, 1.0]]
