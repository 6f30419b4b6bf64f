"""Broyden's methods, good and adjoint: dense textbook forms, restarts, least denominators, outer-aware updates."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import jacobian, recorded, spectral, tanh_map
from torch import Tensor

import equipoise as eq
from equipoise.core.linalg import InverseEstimate

Field = Callable[[Tensor], Tensor]
both = pytest.mark.parametrize("kind", [eq.Broyden, eq.AdjointBroyden])


def record(kind: type[eq.Solver], f: Field, z0: Tensor, **fields: Any) -> tuple[list[Any], eq.Solution[Tensor]]:
    """Point, residual and inverse after each evaluation, and the solution."""
    solver = recorded(kind)(rtol=0, **fields)
    return solver.log, solver.solve(eq.FunctionMap(f, z0), z0)


def quartic(target: Tensor) -> Callable[[Any, Tensor], Tensor]:
    return lambda z, rows: (z - target[rows]).pow(4).sum(1) / 4


# --- the dense methods: points, matrices `B` of `I - J`, number of updates, and vectors with `a B^{-1} = b` ----------


def good(f: Field, z: Tensor, steps: int, memory: int) -> list[tuple[Tensor, Tensor, int, tuple[Tensor, Tensor]]]:
    """`B += (y - B s) s^T / s^T s`, and `B s = r` is solved."""
    matrix, updates, r, seen = torch.eye(len(z)), 0, f(z[None])[0] - z, []
    seen.append((z, matrix, 0, (z, z)))
    for _ in range(steps - 1):
        s = torch.linalg.solve(matrix, r)
        z = z + s
        r, before = f(z[None])[0] - z, r
        full = updates == memory
        update = torch.outer(before - r - matrix @ s, s) / (s @ s)
        matrix, updates = (torch.eye(len(z)), 0) if full else (matrix + update, updates + 1)
        seen.append((z, matrix, updates, (z, z @ torch.linalg.inv(matrix))))
    return seen


def adjoint(
    f: Field, z: Tensor, steps: int, memory: int, target: Tensor, outer_every: int | None
) -> list[tuple[Tensor, Tensor, int, tuple[Tensor, Tensor]]]:
    """`B += s s^T (I - J - B) / s^T s`: exact from the left in the direction `s` taught last."""
    eye = torch.eye(len(z))
    matrix, updates, seen, left = eye, 0, [], (z, z)
    for n in range(steps):
        r, wanted = f(z[None])[0] - z, eye - jacobian(f, z)
        aware = outer_every is not None and n > 0 and n % outer_every == 0
        if updates + 1 + aware > memory:
            matrix, updates = eye, 0
        for number in range(1 + aware if n else 0):
            sigma = r if number == 0 else torch.linalg.solve(matrix.T, (z - target) ** 3)
            matrix = matrix + torch.outer(sigma, sigma @ (wanted - matrix)) / (sigma @ sigma)
            updates, left = updates + 1, (sigma @ wanted, sigma)
        seen.append((z, matrix, updates, left))
        z = z + torch.linalg.solve(matrix, r)
    return seen


@pytest.mark.parametrize("norm", [0.9, 3.0])
@pytest.mark.parametrize(
    ("kind", "memory", "outer_every"),
    [
        *((eq.Broyden, memory, None) for memory in (1, 3, 40)),
        *((eq.AdjointBroyden, memory, None) for memory in (1, 3, 40)),
        *((eq.AdjointBroyden, *both) for both in [(2, 1), (5, 3), (40, 1), (40, 3)]),
    ],
)
def test_dense_method(kind: type[eq.Solver], memory: int, outer_every: int | None, norm: float) -> None:
    f, z0, steps, target = tanh_map(10, norm), torch.randn(2, 10), 10, torch.randn(2, 10)
    outer = {} if outer_every is None else {"outer_every": outer_every, "outer_loss": quartic(target)}
    log, solution = record(kind, f, z0, memory=memory, max_steps=steps, **outer)
    assert len(log) == steps
    for row in range(2):
        rest = (target[row], outer_every) if kind is eq.AdjointBroyden else ()
        expected = (adjoint if rest else good)(f, z0[row], steps, memory, *rest)
        for seen, (z, matrix, updates, (left, direction)) in zip(log, expected, strict=True):
            dense = torch.linalg.inv(matrix)
            near = {"rtol": 1e-7, "atol": 1e-9 * float(dense.norm())}
            torch.testing.assert_close(seen.point.z[row], z, **near)
            torch.testing.assert_close(seen.inverse.dense()[row], dense, **near)
            torch.testing.assert_close(seen.inverse.rmv(left.expand(2, 10))[row], direction, **near)
            assert int(seen.inverse.rank[row]) == updates
        # The inverse that is returned is the one at the best iterate, with all that this point taught.
        best = log[int(torch.stack([seen.point.residual[row].norm() for seen in log]).argmin())]
        assert torch.equal(solution.value[row], best.point.z[row])
        if memory == 40:
            near = {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(solution.inverse.dense()[row], best.inverse.dense()[row], **near)


# --- what one update learns ------------------------------------------------------------------------------------------


def test_scalar_affine() -> None:
    slope = torch.tensor([[-4.0], [0.5], [0.999], [3.0]])
    solution = eq.fixed_point(
        lambda z, a: a * z + 1, torch.zeros(4, 1), slope, solver=eq.Broyden(rtol=1e-12), params=()
    ).raise_for_status()
    assert solution.num_steps.tolist() == [3] * 4
    torch.testing.assert_close(solution.value, 1 / (1 - slope), rtol=1e-10, atol=0)
    torch.testing.assert_close(solution.inverse.mv(torch.ones(4, 1)), 1 / (1 - slope), rtol=1e-10, atol=0)


@both
@pytest.mark.parametrize(("least", "rank"), [(None, 1), (0.09, 1), (0.11, 0)])
def test_min_denominator(kind: type[eq.Solver], least: float | None, rank: int) -> None:
    """It is relative: the denominator is a tenth of the square of the step, or of the direction, in all units."""
    x = torch.tensor([[1e-6, 0.0], [1e6, 1e6]])
    solver = kind(max_steps=2, rtol=0, **({} if least is None else {"min_denominator": least}))
    solution = eq.fixed_point(lambda z, x: 0.9 * z + x, torch.zeros(2, 2), x, solver=solver, params=())
    assert solution.inverse.rank.tolist() == [rank] * 2


def test_update_left_out() -> None:
    """An update without denominator is left out for that sample alone: the first row has s.y = 0 at each."""
    jacobian = torch.tensor([[[1.0, 0.5], [-0.5, 1.0]], [[0.5, 0.2], [-0.1, 0.3]]])
    x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    solve = functools.partial(
        eq.fixed_point, lambda z, jacobian, x: torch.bmm(jacobian, z[:, :, None])[:, :, 0] + x, params=()
    )
    solver = eq.Broyden(max_steps=8, rtol=0, atol=1e-10)
    pair = solve(torch.zeros(2, 2), jacobian, x, solver=solver)
    # Without anything learned, its steps are Picard's and its inverse the identity.
    picard = solve(torch.zeros(2, 2), jacobian, x, solver=eq.Picard(max_steps=8, rtol=0))
    torch.testing.assert_close(pair.value[0], picard.value[0])
    torch.testing.assert_close(pair.inverse.dense()[0], torch.eye(2), rtol=0, atol=0)
    alone = solve(torch.zeros(1, 2), jacobian[1:], x[1:], solver=solver).raise_for_status()
    torch.testing.assert_close(pair.value[1], alone.value[0], rtol=1e-10, atol=0)
    assert pair.inverse.rank.tolist() == [0, int(alone.num_steps) - 1]


@both
def test_nothing_to_learn(kind: type[eq.Solver]) -> None:
    solution = eq.fixed_point(lambda z: z + 1, torch.zeros(2, 3), solver=kind(memory=5, rtol=0))
    assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 2
    torch.testing.assert_close(solution.inverse.dense(), torch.eye(3).expand(2, 3, 3), rtol=0, atol=0)


def test_best_before_a_restart() -> None:
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
        assert float(solution.residual) < 1.0
        assert solution.inverse.rank.tolist() == [rank]


@both
def test_float32(kind: type[eq.Solver]) -> None:
    """The last update holds to single precision; the adjoint one under a residual whose square underflows."""
    scale = 1e-25 if kind is eq.AdjointBroyden else 1.0
    weight, x = spectral(20, 2.0, torch.Generator().manual_seed(8)).float(), torch.randn(4, 20, dtype=torch.float32)

    def f(z: Tensor) -> Tensor:
        return scale * torch.tanh(z / scale @ weight.T + x[: len(z)])

    log, _ = record(kind, f, torch.zeros_like(x), memory=30, max_steps=10)
    for before, seen in itertools.pairwise(log):
        if kind is eq.Broyden:
            s, y = seen.point.z - before.point.z, before.point.residual - seen.point.residual
            torch.testing.assert_close(seen.inverse.mv(y), s, rtol=1e-3, atol=1e-4 * float(s.norm()))
        else:
            sigma = torch.nn.functional.normalize(seen.point.residual[:1] / scale)
            left = sigma - sigma @ jacobian(f, seen.point.z[0])
            torch.testing.assert_close(seen.inverse.rmv(left.expand(4, 20))[:1], sigma, rtol=1e-3, atol=1e-4)


# --- adjoint Broyden -------------------------------------------------------------------------------------------------


def test_length_of_the_direction() -> None:
    f, z0, target = tanh_map(10, 2.0), torch.randn(3, 10), torch.randn(3, 10)
    outer = quartic(target)
    one, other = (
        record(eq.AdjointBroyden, f, z0, memory=40, max_steps=12, outer_every=2, outer_loss=loss)[0]
        for loss in (outer, lambda z, rows: -1e-100 * outer(z, rows))
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.point.z, b.point.z, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(a.inverse.dense(), b.inverse.dense(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("steps", "outer_every", "vjps"), [(2, 1, 2), (12, 1, 22), (12, 5, 13), (11, 5, 12)])
def test_products(steps: int, outer_every: int, vjps: int) -> None:
    """Each point after the start costs one, an outer-aware update one more."""
    _, solution = record(
        eq.AdjointBroyden, tanh_map(8, 0.9), torch.randn(3, 8), max_steps=steps, outer_every=outer_every,
        outer_loss=quartic(torch.ones(3, 8)),
    )  # fmt: skip
    assert (solution.num_evals, solution.num_vjps) == (steps, vjps)


def test_cadence_without_loss() -> None:
    f, z0 = tanh_map(8, 2.0), torch.randn(3, 8)
    plain, _ = record(eq.AdjointBroyden, f, z0, max_steps=9)
    same, solution = record(eq.AdjointBroyden, f, z0, max_steps=9, outer_every=2)
    assert solution.num_vjps == 8
    assert all(torch.equal(a.point.z, b.point.z) for a, b in zip(plain, same, strict=True))


def test_constant_map() -> None:
    solver = eq.AdjointBroyden(outer_every=1, outer_loss=lambda z, rows: z.new_ones(2))
    solution = eq.fixed_point(lambda z: torch.ones_like(z), torch.zeros(2, 3), solver=solver).raise_for_status()
    assert solution.num_steps.tolist() == [2, 2]


def test_no_gradient_left() -> None:
    cell, head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 1)
    solver = eq.AdjointBroyden(max_steps=12, rtol=1e-6, outer_every=2, outer_loss=lambda z, rows: head(z)[:, 0])
    with torch.no_grad():
        solution = eq.fixed_point(cell, torch.zeros(3, 5), solver=solver).raise_for_status()
    assert not solution.value.requires_grad
    assert solution.num_vjps > 0
    assert all(p.grad is None for p in (*cell.parameters(), *head.parameters()))


def test_preconditioned_map_is_learned() -> None:
    a, x = spectral(6, 0.9, torch.Generator().manual_seed(3)), torch.randn(2, 6)
    near = torch.linalg.inv(torch.eye(6) - a) + 0.3 * spectral(6, 1.0, torch.Generator().manual_seed(4))
    estimate = InverseEstimate.of(torch.zeros(2), torch.eye(6).expand(2, 6, 6), near.expand(2, 6, 6).contiguous())
    solver = recorded(eq.AdjointBroyden)(max_steps=5, rtol=0)
    solver.solve(eq.FunctionMap(lambda z: z @ a.T + x, z0 := torch.zeros(2, 6)), z0, preconditioner=estimate)
    preconditioned = near @ (torch.eye(6) - a)  # of the map z + near (f(z) - z), it is I - J
    assert len(solver.log) == 4
    for seen in solver.log[1:]:
        sigma = torch.nn.functional.normalize(seen.point.residual)
        torch.testing.assert_close(seen.inverse.rmv(sigma @ preconditioned), sigma)
