"""Broyden's method: against its dense textbook form, the secant equation, the published figures of its restarts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import spectral
from torch import Tensor

import equipoise as eq

Field = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(eq.Broyden):
    """Notes each point of the batch, and the inverse as it is when the point has been absorbed."""

    log: list[tuple[Tensor, Tensor, eq.InverseEstimate]] = dataclasses.field(default_factory=list)

    def propose(self, memory: Any, point: eq.Point) -> Tensor:
        proposal = super().propose(memory, point)
        part = self.inverse(memory, torch.full((len(point.z),), memory.absorbed))
        # The vectors are views of a buffer that goes on changing.
        inverse = eq.InverseEstimate.of(part.gamma, part.basis.clone(), part.core.clone())
        self.log.append((point.z, point.residual, inverse))
        return proposal


def record(f: Field, z0: Tensor, **fields: Any) -> list[tuple[Tensor, Tensor, eq.InverseEstimate]]:
    solver = Recorder(rtol=0, **fields)
    solution = solver.solve(eq.FunctionMap(f, z0), z0)
    assert solution.inverse is not None
    # Where the last point is the best, all that was learned is returned, the pair of the last step included.
    newest = (solution.value == solver.log[-1][0]).all(dim=1)
    torch.testing.assert_close(solution.inverse.dense()[newest], solver.log[-1][2].dense()[newest])
    return solver.log


def textbook(f: Field, z: Tensor, steps: int, memory: int) -> list[tuple[Tensor, Tensor]]:
    """Points and matrices `B` of `I - J` for one sample: `B += (y - B s) s^T / s^T s`, and `B s = r` is solved."""
    eye = torch.eye(len(z))
    matrix, updates, r = eye, 0, f(z[None])[0] - z
    seen = [(z, matrix)]
    for _ in range(steps - 1):
        s = torch.linalg.solve(matrix, r)
        z = z + s
        r, before = f(z[None])[0] - z, r
        if updates == memory:
            matrix, updates = eye, 0
        else:
            matrix = matrix + torch.outer(before - r - matrix @ s, s) / (s @ s)
            updates += 1
        seen.append((z, matrix))
    return seen


def tanh_map(d: int, norm: float) -> Field:
    weight, b = spectral(d, norm, torch.Generator().manual_seed(5)), torch.linspace(-1, 1, d)
    return lambda z: torch.tanh(z @ weight.T + b)


@pytest.mark.parametrize("norm", [0.9, 3.0])
@pytest.mark.parametrize("memory", [1, 3, 40])
def test_points_and_inverse_are_those_of_the_dense_method(memory: int, norm: float) -> None:
    f, z0, steps = tanh_map(8, norm), torch.randn(3, 8), 12
    log = record(f, z0, memory=memory, max_steps=steps)
    assert len(log) == steps
    probe = torch.randn(3, 8)
    for row in range(3):
        for (z, _, inverse), (expected, matrix) in zip(log, textbook(f, z0[row], steps, memory), strict=True):
            dense = torch.linalg.inv(matrix)
            near = {"rtol": 1e-8, "atol": 1e-10 * float(dense.norm())}
            torch.testing.assert_close(z[row], expected, **near)
            torch.testing.assert_close(inverse.dense()[row], dense, **near)
            torch.testing.assert_close(inverse.mv(probe)[row], dense @ probe[row], **near)
            torch.testing.assert_close(inverse.rmv(probe)[row], dense.T @ probe[row], **near)


@pytest.mark.parametrize("norm", [0.9, 3.0])
@pytest.mark.parametrize("memory", [4, 40])
def test_the_inverse_meets_the_secant_equation_and_its_products_are_adjoint(memory: int, norm: float) -> None:
    log = record(tanh_map(30, norm), torch.randn(5, 30), memory=memory, max_steps=25)
    x, held = torch.randn(5, 30), 0
    for (z, r, _), (z_new, r_new, inverse) in itertools.pairwise(log):
        s, y = z_new - z, r - r_new
        left, right = (inverse.rmv(x) * y).sum(1), (x * inverse.mv(y)).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10 * float(x.norm() * y.norm()))
        if int(inverse.rank[0]):
            held += 1
            assert bool(((inverse.mv(y) - s).norm(dim=1) <= 1e-10 * s.norm(dim=1) + 1e-14).all())
        else:
            torch.testing.assert_close(inverse.mv(y), y, rtol=0, atol=0)  # it was emptied: the identity again
    # The memory is filled, and the next point empties it: `memory` of each `memory + 1` points taught something.
    assert held == sum((k + 1) % (memory + 1) != 0 for k in range(24))


def test_a_scalar_affine_map_is_inverted_by_one_update() -> None:
    slope = torch.tensor([[-4.0], [0.5], [0.999], [3.0]])
    solution = eq.fixed_point(
        lambda z, a: a * z + 1, torch.zeros(4, 1), slope, solver=eq.Broyden(rtol=1e-12), params=()
    ).raise_for_status()
    assert solution.inverse is not None
    assert solution.num_steps.tolist() == [3] * 4
    torch.testing.assert_close(solution.value, 1 / (1 - slope), rtol=1e-10, atol=0)
    torch.testing.assert_close(solution.inverse.mv(torch.ones(4, 1)), 1 / (1 - slope), rtol=1e-10, atol=0)


def toy(d: int, rho: float) -> tuple[Tensor, Tensor]:
    """The published draw for seeds 0 to 19: weights `(20, d, d)` of spectral norm `rho` and biases `(20, d)`."""
    draws = []
    for seed in range(20):
        state = np.random.RandomState(seed)
        w, b = state.randn(d, d), state.randn(d)
        draws.append((torch.tensor(w * (rho / np.linalg.norm(w, 2))), torch.tensor(b)))
    w, b = zip(*draws, strict=True)
    return torch.stack(w), torch.stack(b)


def solve_toy(d: int, rho: float, solver: eq.Broyden, *, linear: bool = False) -> eq.Solution[Tensor]:
    def f(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
        u = torch.bmm(w, z[:, :, None])[:, :, 0] + b
        return u if linear else torch.tanh(u)

    w, b = toy(d, rho)
    return eq.fixed_point(f, torch.zeros_like(b), w, b, solver=solver, params=())


@pytest.mark.parametrize(("d", "most"), [(5, 10), (10, 19), (20, 26)])
def test_affine_maps_end_within_twice_the_dimension_as_published(d: int, most: int) -> None:
    """Gay's theorem bounds the steps by 2d; the inverse is still far from exact then."""
    solver = eq.Broyden(max_steps=200, memory=200, rtol=0, atol=1e-12)
    solution = solve_toy(d, 0.9, solver, linear=True).raise_for_status()
    w, b = toy(d, 0.9)
    exact = torch.linalg.inv(torch.eye(d) - w)
    torch.testing.assert_close(solution.value, torch.bmm(exact, b[:, :, None])[:, :, 0], rtol=0, atol=1e-10)
    assert int(solution.num_steps.max()) - 1 == most <= 2 * d  # the start is evaluated, too
    assert solution.inverse is not None
    error = torch.linalg.matrix_norm(solution.inverse.dense() - exact) / torch.linalg.matrix_norm(exact)
    assert 0.2 < float(error.median()) < 0.4


@pytest.mark.parametrize("rho", [2.0, 3.0])
@pytest.mark.parametrize("memory", [10, 20])
def test_with_restarts_all_published_problems_converge(memory: int, rho: float) -> None:
    solver = eq.Broyden(max_steps=300, memory=memory, rtol=0, atol=1e-4)
    solution = solve_toy(100, rho, solver)
    assert int(solution.converged.sum()) == 20
    assert int(solution.num_steps.max()) > memory + 1, "a sample must restart for this test to say something"


@pytest.mark.parametrize(
    ("rho", "tolerance", "steps"), [(0.9, 1e-2, 6), (0.9, 1e-5, 12), (3.0, 1e-2, 25), (3.0, 1e-5, 40)]
)
def test_steps_with_the_whole_memory_are_the_published_ones(rho: float, tolerance: float, steps: int) -> None:
    solution = solve_toy(100, rho, eq.Broyden(max_steps=300, memory=300, rtol=0, atol=tolerance)).raise_for_status()
    assert float(np.median(solution.num_steps.numpy())) - 1 == pytest.approx(steps, abs=0.5)


# Guarded denominators


def test_an_update_without_denominator_is_left_out_for_that_sample_alone() -> None:
    # I - J = 1 + skew for the first row is skew: s.y = 0 at every update. The second row is an ordinary one.
    skew = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
    jacobian = torch.stack([torch.eye(2) - skew, torch.tensor([[0.5, 0.2], [-0.1, 0.3]])])
    x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])

    def f(z: Tensor, jacobian: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(jacobian, z[:, :, None])[:, :, 0] + x

    solver = eq.Broyden(max_steps=8, rtol=0, atol=1e-10)
    both = eq.fixed_point(f, torch.zeros(2, 2), jacobian, x, solver=solver, params=())
    picard = eq.fixed_point(f, torch.zeros(2, 2), jacobian, x, solver=eq.Picard(max_steps=8, rtol=0), params=())
    assert both.inverse is not None
    assert bool(both.value.isfinite().all())
    # Without anything learned, its steps are Picard's and its inverse the identity.
    torch.testing.assert_close(both.value[0], picard.value[0])
    torch.testing.assert_close(both.inverse.dense()[0], torch.eye(2), rtol=0, atol=0)
    alone = eq.fixed_point(f, torch.zeros(1, 2), jacobian[1:], x[1:], solver=solver, params=()).raise_for_status()
    assert int(both.num_steps[1]) == int(alone.num_steps)
    torch.testing.assert_close(both.value[1], alone.value[0], rtol=1e-10, atol=0)
    assert both.inverse.rank.tolist() == [0, int(alone.num_steps) - 1]


@pytest.mark.parametrize(("guard", "rank"), [(1e-8, 1), (0.09, 1), (0.11, 0)])
def test_the_guard_is_relative_to_the_step(guard: float, rank: int) -> None:
    # y = 0.1 s, so the denominator is a tenth of |s|^2, whatever the units.
    x = torch.tensor([[1e-6, 0.0], [1e6, 1e6]])
    solver = eq.Broyden(max_steps=2, min_denominator=guard, rtol=0)
    solution = eq.fixed_point(lambda z, x: 0.9 * z + x, torch.zeros(2, 2), x, solver=solver, params=())
    assert solution.inverse is not None
    assert solution.inverse.rank.tolist() == [rank] * 2


def test_a_map_without_derivative_of_its_residual_teaches_nothing() -> None:
    solution = eq.fixed_point(lambda z: z + 1, torch.zeros(2, 3), solver=eq.Broyden(max_steps=30, memory=5, rtol=0))
    assert solution.inverse is not None
    assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 2
    torch.testing.assert_close(solution.inverse.dense(), torch.eye(3).expand(2, 3, 3), rtol=0, atol=0)


# Ranks and rows


def graded(rows: int = 6, d: int = 10) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    weight = spectral(d, 1.0, torch.Generator().manual_seed(6))
    return (
        lambda z, gain, x: torch.tanh(gain * (z @ weight.T) + x),
        torch.logspace(-2, 0.3, rows)[:, None],
        torch.randn(rows, d),
    )


@pytest.mark.parametrize("named", [True, False], ids=["named", "closure"])
@pytest.mark.parametrize("memory", [3, 60])
def test_rows_that_stopped_keep_their_inverse_and_rank(memory: int, named: bool) -> None:
    """The others go on, past the memory's end, whether rows leave the batch or not."""
    f, gain, x = graded()
    solver = eq.Broyden(max_steps=60, memory=memory, rtol=1e-8)
    together = (
        eq.fixed_point(f, torch.zeros_like(x), gain, x, solver=solver, params=())
        if named
        else eq.fixed_point(lambda z: f(z, gain, x), torch.zeros_like(x), solver=solver)
    ).raise_for_status()
    assert together.inverse is not None
    assert int(together.num_steps.max()) > 3 * int(together.num_steps.min())
    # Points after the first teach one column each; the one that finds the memory full empties it.
    assert together.inverse.rank.tolist() == [(steps - 1) % (memory + 1) for steps in together.num_steps.tolist()]
    for row in range(len(x)):
        alone = solver.solve(eq.FunctionMap(f, x[:1], (gain[row : row + 1], x[row : row + 1])), torch.zeros_like(x[:1]))
        assert alone.inverse is not None
        assert int(alone.num_steps) == int(together.num_steps[row])
        torch.testing.assert_close(together.inverse.dense()[row], alone.inverse.dense()[0], rtol=1e-7, atol=1e-8)


def test_of_a_best_iterate_older_than_a_restart_the_rest_is_returned() -> None:
    """Columns that the restart overwrote are lost: what is left is nothing, so the inverse is the identity."""
    z0, calls = torch.randn(1, 8), 0
    base = tanh_map(8, 0.5)

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return base(z) + (100.0 + calls if calls > 3 else 0.0)

    for max_steps, rank in [(3, 2), (5, 2), (6, 0), (8, 0)]:  # the memory of four updates is full at the sixth point
        calls = 0
        solution = eq.fixed_point(f, z0, solver=eq.Broyden(max_steps=max_steps, memory=4, rtol=0))
        assert solution.inverse is not None
        assert float(solution.residual) < 1.0
        assert solution.inverse.rank.tolist() == [rank]


def test_float32_keeps_the_dtype_and_the_secant_equation() -> None:
    weight = spectral(20, 2.0, torch.Generator().manual_seed(8)).float()
    x = torch.randn(4, 20, dtype=torch.float32)
    log = record(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), memory=30, max_steps=10)
    for (z, r, _), (z_new, r_new, inverse) in itertools.pairwise(log):
        s, y = z_new - z, r - r_new
        assert inverse.mv(y).dtype == torch.float32
        torch.testing.assert_close(inverse.mv(y), s, rtol=1e-3, atol=1e-4 * float(s.norm()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": 0}, r"Broyden\(memory=0\): must be >= 1"),
        ({"min_denominator": -1.0}, r"Broyden\(min_denominator=-1.0\): must be >= 0"),
        ({"min_denominator": float("nan")}, r"Broyden\(min_denominator=nan\): must be >= 0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eq.Broyden(**fields)
