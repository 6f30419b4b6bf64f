"""Adjoint Broyden's method: its left condition, the dense matrices, restarts, counts, and rows that stop or break."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import spectral, toy
from torch import Tensor

import equipoise as eq
from equipoise.core.linalg import InverseEstimate

Field = Callable[[Tensor], Tensor]
Loss = Callable[[Any, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(eq.AdjointBroyden):
    """Notes each point of the batch, and the inverse as it is when the point has been absorbed."""

    log: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)

    def propose(self, memory: Any, point: eq.Point) -> Tensor:
        proposal = super().propose(memory, point)
        part = self.inverse(memory, torch.full((len(point.z),), memory.absorbed))
        self.log.append((point.z, point.residual, InverseEstimate.of(part.gamma, part.basis, part.core).dense()))
        return proposal


def record(f: Field, z0: Tensor, **fields: Any) -> tuple[list[tuple[Tensor, Tensor, Tensor]], eq.Solution[Tensor]]:
    solver = Recorder(rtol=0, **fields)
    return solver.log, solver.solve(eq.FunctionMap(f, z0), z0)


def jacobian(f: Field, z: Tensor) -> Tensor:
    """Of one sample, `(d, d)`."""
    return torch.autograd.functional.jacobian(lambda z: f(z[None])[0], z)


def textbook(
    f: Field, z: Tensor, steps: int, memory: int, outer: Callable[[Tensor], Tensor], outer_every: int | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Points, the Jacobian there and matrices `B` of `I - J` for one sample, from `B += s s^T (I - J - B) / s^T s`."""
    eye = torch.eye(len(z))
    matrix, updates, seen = eye, 0, []
    for n in range(steps):
        r, slope = f(z[None])[0] - z, jacobian(f, z)
        if n > 0:
            aware = outer_every is not None and n % outer_every == 0
            if updates + 1 + aware > memory:
                matrix, updates = eye, 0
            for number in range(1 + aware):
                sigma = r if number == 0 else torch.linalg.solve(matrix.T, torch.func.grad(outer)(z))
                matrix = matrix + torch.outer(sigma, sigma @ (eye - slope - matrix)) / (sigma @ sigma)
                updates += 1
        seen.append((z, slope, matrix))
        z = z + torch.linalg.solve(matrix, r)
    return seen


def tanh_map(d: int, norm: float) -> Field:
    weight, b = spectral(d, norm, torch.Generator().manual_seed(5)), torch.linspace(-1, 1, d)
    return lambda z: torch.tanh(z @ weight.T + b)


def quartic(target: Tensor) -> Loss:
    return lambda z, rows: (z - target[rows]).pow(4).sum(1) / 4


@pytest.mark.parametrize("norm", [0.9, pytest.param(3.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("memory", "outer_every"), [(1, None), (3, None), (40, None), (2, 1), (5, 3), (40, 1), (40, 3)]
)
def test_points_and_inverse_are_those_of_the_dense_method(memory: int, outer_every: int | None, norm: float) -> None:
    f, z0, steps, target = tanh_map(20, norm), torch.randn(2, 20), 10, torch.randn(2, 20)
    outer = None if outer_every is None else quartic(target)
    log, solution = record(f, z0, memory=memory, max_steps=steps, outer_every=outer_every, outer_loss=outer)
    assert len(log) == steps
    for row in range(2):
        goal = target[row]
        expected = textbook(f, z0[row], steps, memory, lambda z, goal=goal: (z - goal).pow(4).sum() / 4, outer_every)
        for (z, _, inverse), (point, _, matrix) in zip(log, expected, strict=True):
            dense = torch.linalg.inv(matrix)
            torch.testing.assert_close(z[row], point, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(inverse[row], dense, rtol=1e-7, atol=1e-8 * float(dense.norm()))
        # The inverse that is returned is the one at the best iterate, with all that this point taught.
        best = int(torch.stack([r[row].norm() for _, r, _ in log]).argmin())
        torch.testing.assert_close(solution.value[row], log[best][0][row], rtol=0, atol=0)
        if memory == 40:
            assert solution.inverse is not None
            torch.testing.assert_close(solution.inverse.dense()[row], log[best][2][row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [0.9, 3.0])
@pytest.mark.parametrize("outer_every", [None, 1, 2])
def test_the_inverse_is_exact_from_the_left_in_the_direction_taught_last(outer_every: int | None, norm: float) -> None:
    f, target = tanh_map(30, norm), torch.randn(2, 30)
    outer = None if outer_every is None else quartic(target)
    log, _ = record(f, torch.randn(2, 30), memory=80, max_steps=15, outer_every=outer_every, outer_loss=outer)
    aware = 0
    for n, (z, r, inverse) in enumerate(log[1:], start=1):
        slope = torch.stack([jacobian(f, row) for row in z])
        sigma = r
        if outer_every is not None and n % outer_every == 0:
            # The direction was M^T grad L of the estimate before; of the one after, M_+^T grad L is what it gives.
            assert outer is not None
            aware += 1
            before = _before_outer_update(log[n - 1][2], r, slope)
            sigma = torch.bmm(before.mT, ((z - target) ** 3)[..., None])[..., 0]
        sigma = sigma / sigma.norm(dim=1, keepdim=True)
        left = sigma - torch.bmm(slope.mT, sigma[..., None])[..., 0]  # (I - J)^T sigma
        product = torch.bmm(inverse.mT, left[..., None])[..., 0]
        torch.testing.assert_close(product, sigma, rtol=0, atol=1e-10)
    assert aware == (0 if outer_every is None else 14 // outer_every)


def _before_outer_update(inverse: Tensor, r: Tensor, slope: Tensor) -> Tensor:
    """`M` after the residual's update alone, densely."""
    matrix = torch.linalg.inv(inverse)
    wanted = torch.eye(r.shape[1]) - slope
    miss = torch.bmm(r[:, None], wanted - matrix) / r.square().sum(1)[:, None, None]
    return torch.linalg.inv(matrix + r[..., None] * miss)


def test_the_length_of_a_direction_does_not_matter() -> None:
    f, z0, target = tanh_map(10, 2.0), torch.randn(3, 10), torch.randn(3, 10)
    one, _ = record(f, z0, memory=40, max_steps=12, outer_every=2, outer_loss=quartic(target))
    other, _ = record(
        f, z0, memory=40, max_steps=12, outer_every=2, outer_loss=lambda z, rows: -1e-100 * quartic(target)(z, rows)
    )
    for (z, _, inverse), (z_other, _, inverse_other) in zip(one, other, strict=True):
        torch.testing.assert_close(z, z_other, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(inverse, inverse_other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rho", [2.0, 3.0])
@pytest.mark.parametrize("memory", [10, 20])
def test_with_restarts_all_published_problems_converge(memory: int, rho: float) -> None:
    solver = eq.AdjointBroyden(max_steps=300, memory=memory, rtol=0, atol=1e-4)
    solution = toy(rho).solve(solver).solution
    assert int(solution.converged.sum()) == 20
    assert int(solution.num_steps.max()) > memory + 1, "a sample must restart for this test to say something"


# Counts


@pytest.mark.parametrize(("steps", "outer_every", "vjps"), [
    (0, None, 0), (1, None, 0), (2, None, 1), (12, None, 11),
    (1, 1, 0), (2, 1, 2), (12, 1, 22), (12, 5, 13), (11, 5, 12),
])  # fmt: skip
def test_each_point_after_the_start_costs_one_product_and_an_outer_update_one_more(
    steps: int, outer_every: int | None, vjps: int
) -> None:
    outer = None if outer_every is None else quartic(torch.ones(3, 8))
    solver = eq.AdjointBroyden(max_steps=steps, rtol=0, outer_every=outer_every, outer_loss=outer)
    solution = solver.solve(eq.FunctionMap(tanh_map(8, 0.9), z0 := torch.randn(3, 8)), z0)
    assert (solution.num_evals, solution.num_vjps) == (steps, vjps)


def test_a_cadence_without_a_loss_costs_and_changes_nothing() -> None:
    f, z0 = tanh_map(8, 2.0), torch.randn(3, 8)
    plain, _ = record(f, z0, max_steps=9)
    same, solution = record(f, z0, max_steps=9, outer_every=2)
    assert solution.num_vjps == 8
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, same, strict=True))


# Rows


@pytest.mark.parametrize("named", [True, False], ids=["named", "closure"])
@pytest.mark.parametrize("memory", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("outer_every", [None, 2])
def test_a_row_gets_the_answer_and_inverse_that_it_gets_alone(
    memory: int, named: bool, outer_every: int | None
) -> None:
    """Rows stop at different steps, the others go on past the memory's end; the loss reads each row's own target."""
    weight = spectral(10, 1.0, torch.Generator().manual_seed(6))
    gain, x, target = torch.logspace(-2, 0.3, 6)[:, None], torch.randn(6, 10), torch.randn(6, 10)

    def f(z: Tensor, gain: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(gain * (z @ weight.T) + x)

    def solve(rows: slice) -> eq.Solution[Tensor]:
        outer = None if outer_every is None else quartic(target[rows])
        solver = eq.AdjointBroyden(max_steps=60, memory=memory, rtol=1e-8, outer_every=outer_every, outer_loss=outer)
        z0 = torch.zeros_like(x[rows])
        if not named:
            return eq.fixed_point(lambda z: f(z, gain[rows], x[rows]), z0, solver=solver)
        return eq.fixed_point(f, z0, gain[rows], x[rows], solver=solver, params=())

    together = solve(slice(None)).raise_for_status()
    assert together.inverse is not None
    assert int(together.num_steps.max()) > 2 * int(together.num_steps.min())
    for row in range(6):
        alone = solve(slice(row, row + 1))
        assert alone.inverse is not None
        assert int(alone.num_steps) == int(together.num_steps[row])
        assert int(alone.inverse.rank) == int(together.inverse.rank[row])
        torch.testing.assert_close(alone.value[0], together.value[row], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(alone.inverse.dense()[0], together.inverse.dense()[row], rtol=1e-6, atol=1e-7)


def test_a_row_that_breaks_leaves_the_others_and_its_own_inverse_alone() -> None:
    f, z0 = tanh_map(6, 0.9), torch.randn(2, 6)
    calls = 0

    def breaks(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.stack([f(z)[0] * (torch.nan if calls >= 4 else 1.0), f(z)[1]])

    solver = eq.AdjointBroyden(max_steps=8, rtol=0)
    solution = eq.fixed_point(breaks, z0, solver=solver)
    assert solution.inverse is not None
    assert solution.status.tolist() == [eq.Status.NONFINITE, eq.Status.MAX_STEPS]
    inverse = solution.inverse.dense()
    assert bool(inverse.isfinite().all())
    early = eq.fixed_point(f, z0, solver=eq.AdjointBroyden(max_steps=3, rtol=0))
    whole = eq.fixed_point(f, z0, solver=solver)
    assert early.inverse is not None
    assert whole.inverse is not None
    torch.testing.assert_close(inverse[0], early.inverse.dense()[0])
    torch.testing.assert_close(inverse[1], whole.inverse.dense()[1])


# Guarded denominators


@pytest.mark.parametrize(("guard", "rank"), [(1e-8, 1), (0.09, 1), (0.11, 0)])
def test_the_guard_is_relative_to_the_direction(guard: float, rank: int) -> None:
    # (I - J) sigma = 0.1 sigma, so the denominator is a tenth of |sigma|^2, whatever the units.
    x = torch.tensor([[1e-6, 0.0], [1e6, 1e6]])
    solver = eq.AdjointBroyden(max_steps=2, min_denominator=guard, rtol=0)
    solution = eq.fixed_point(lambda z, x: 0.9 * z + x, torch.zeros(2, 2), x, solver=solver, params=())
    assert solution.inverse is not None
    assert solution.inverse.rank.tolist() == [rank] * 2


def test_a_singular_direction_teaches_nothing_and_a_constant_map_takes_one_step() -> None:
    solution = eq.fixed_point(lambda z: z + 1, torch.zeros(2, 3), solver=eq.AdjointBroyden(memory=5, rtol=0))
    assert solution.inverse is not None
    torch.testing.assert_close(solution.inverse.dense(), torch.eye(3).expand(2, 3, 3), rtol=0, atol=0)
    solver = eq.AdjointBroyden(outer_every=1, outer_loss=lambda z, rows: z.new_ones(2))
    solution = eq.fixed_point(lambda z: torch.ones_like(z), torch.zeros(2, 3), solver=solver).raise_for_status()
    assert solution.num_steps.tolist() == [2, 2]


# Surroundings


def test_works_without_grad_and_leaves_no_gradient_on_parameters() -> None:
    cell, head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 1)
    solver = eq.AdjointBroyden(max_steps=12, rtol=1e-6, outer_every=2, outer_loss=lambda z, rows: head(z)[:, 0])
    with torch.no_grad():
        solution = eq.fixed_point(cell, torch.zeros(3, 5), solver=solver).raise_for_status()
    assert not solution.value.requires_grad
    assert solution.num_vjps > 0
    assert all(p.grad is None for p in (*cell.parameters(), *head.parameters()))


def test_a_preconditioned_solve_learns_the_preconditioned_map() -> None:
    """With the exact inverse as preconditioner of an affine map the first step is the last."""
    a, x = spectral(6, 0.9, torch.Generator().manual_seed(3)), torch.randn(2, 6)
    f = eq.FunctionMap(lambda z: z @ a.T + x, z0 := torch.zeros(2, 6))
    exact = torch.linalg.inv(torch.eye(6) - a)
    near = exact + 0.3 * spectral(6, 1.0, torch.Generator().manual_seed(4))
    estimate = InverseEstimate.of(torch.zeros(2), torch.eye(6).expand(2, 6, 6), near.expand(2, 6, 6).contiguous())
    solver = Recorder(max_steps=5, rtol=0)
    solver.solve(f, z0, preconditioner=estimate)
    preconditioned = near @ (torch.eye(6) - a)  # of the map z + near (f(z) - z), it is I - J
    assert len(solver.log) == 4
    for _, r, inverse in solver.log[1:]:
        sigma = r / r.norm(dim=1, keepdim=True)
        torch.testing.assert_close(torch.einsum("bi,ij,bjk->bk", sigma, preconditioned, inverse), sigma)


def test_float32_keeps_the_dtype_and_the_left_condition_under_a_tiny_residual() -> None:
    weight = spectral(20, 2.0, torch.Generator().manual_seed(8)).float()
    x = torch.randn(4, 20, dtype=torch.float32)
    scale = 1e-25  # squares of the residual underflow

    def f(z: Tensor) -> Tensor:
        return scale * torch.tanh(z / scale @ weight.T + x)

    log, solution = record(f, torch.zeros_like(x), memory=30, max_steps=10)
    assert solution.value.dtype == torch.float32
    for z, r, inverse in log[1:]:
        slope = torch.stack([jacobian(f, row) for row in z])
        sigma = r / scale
        sigma = sigma / sigma.norm(dim=1, keepdim=True)
        left = sigma - torch.bmm(slope.mT, sigma[..., None])[..., 0]
        product = torch.bmm(inverse.mT, left[..., None])[..., 0]
        torch.testing.assert_close(product, sigma, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"memory": 0}, ValueError, r"AdjointBroyden\(memory=0\): must be >= 1"),
        ({"memory": 1, "outer_every": 3}, ValueError, r"AdjointBroyden\(memory=1\): must be >= 2"),
        ({"min_denominator": -1.0}, ValueError, r"AdjointBroyden\(min_denominator=-1.0\): must be >= 0"),
        ({"outer_every": 0}, ValueError, r"AdjointBroyden\(outer_every=0\): must be >= 1, or None"),
        ({"outer_every": 2.5}, TypeError, r"AdjointBroyden\(outer_every=2.5\): must be an integer or None"),
        ({"outer_loss": 3, "outer_every": 2}, TypeError, r"AdjointBroyden\(outer_loss=3\): must be a function"),
        ({"outer_loss": lambda z, rows: z}, ValueError, "set outer_every, say to 5"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eq.AdjointBroyden(**fields)
