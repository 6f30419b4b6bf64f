"""Broyden's method against the textbook update with matrices, and the published figures of its memory policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import TanhCell, spectral
from torch import Tensor

import equipoise as eq


def solve(
    solver: eq.Broyden, norm: float = 1.2, d: int = 12, batch: int = 3
) -> tuple[eq.Solution[Tensor], list[Tensor]]:
    cell, points = TanhCell(d, norm), []

    def f(z: Tensor, x: Tensor) -> Tensor:
        points.append(z.clone())
        return cell(z, x).detach()

    x = torch.randn(batch, d)
    solution = eq.fixed_point(f, torch.zeros(batch, d), x, solver=solver, params=())
    points = [torch.stack([p, cell(p, x).detach() - p]) for p in points]  # (2, B, D): point, residual
    return solution, points


def textbook(points: list[Tensor], restart: int) -> list[Tensor]:
    """The inverse after each point of one sample, `(2, D)` each: rank-one updates of a matrix that is given up when
    `restart` of them were made."""
    d = points[0].shape[-1]
    matrix, updates, found = torch.eye(d), 0, []
    for before, now in zip([None, *points], points, strict=False):
        if before is not None:
            if updates == restart:
                matrix, updates = torch.eye(d), 0
            else:
                s, y = now[0] - before[0], before[1] - now[1]
                matrix = matrix + torch.outer(s - matrix @ y, s @ matrix) / (s @ matrix @ y)
                updates += 1
        found.append(matrix)
    return found


@pytest.mark.parametrize("memory", [20, 4])
def test_points_are_those_of_the_textbook_update(memory: int) -> None:
    _, points = solve(eq.Broyden(max_steps=11, memory=memory, rtol=0.0))
    for row in range(3):
        mine = [point[:, row] for point in points]
        for inverse, before, now in zip(textbook(mine, memory), mine, mine[1:], strict=False):
            torch.testing.assert_close(now[0], before[0] + inverse @ before[1], rtol=1e-8, atol=1e-9)


def test_the_newest_secant_equation_holds() -> None:
    solution, points = solve(eq.Broyden(max_steps=8, memory=20, rtol=0.0), norm=0.6)
    last, before = points[-1], points[-2]
    torch.testing.assert_close(solution.residual, last[1].norm(dim=1))  # the last point is the best: all is known
    torch.testing.assert_close(solution.inverse.mv(before[1] - last[1]), last[0] - before[0], rtol=1e-9, atol=1e-11)
    assert solution.inverse.rank.tolist() == [7] * 3


def test_the_rank_is_that_of_each_sample() -> None:
    gain = torch.tensor([[0.0], [0.3], [0.9]])
    generator = torch.Generator().manual_seed(0)
    a, x = spectral(8, 1.0, generator), torch.randn(3, 8, generator=generator)
    solution = eq.fixed_point(
        lambda z, gain, x: torch.tanh(gain * (z @ a.T) + x),
        torch.zeros(3, 8),
        gain,
        x,
        solver=eq.Broyden(max_steps=30, memory=30, rtol=1e-6),
        params=(),
    ).raise_for_status()
    # An update is taught by each evaluation but the first.
    assert solution.inverse.rank.tolist() == (solution.num_steps - 1).tolist()
    assert len(set(solution.num_steps.tolist())) == 3


def test_an_update_without_denominator_is_left_out_for_that_sample_only() -> None:
    # r(z) = f(z) - z is constant in the first sample: y = 0, no secant equation can hold.
    shift = torch.tensor([[1.0], [0.0]])

    def f(z: Tensor, shift: Tensor) -> Tensor:
        return torch.where(shift > 0, z + 1.0, 0.5 * z.cos())

    solution = eq.fixed_point(f, torch.zeros(2, 4), shift, solver=eq.Broyden(max_steps=7, rtol=1e-10), params=())
    assert solution.status.tolist() == [eq.Status.MAX_STEPS, eq.Status.CONVERGED]
    assert solution.inverse.rank[0] == 0
    assert bool(solution.value.isfinite().all())
    torch.testing.assert_close(solution.value[1], 0.5 * solution.value[1].cos())


@pytest.mark.parametrize("memory", [10, 20])
def test_with_a_restart_when_the_memory_is_full_all_published_problems_converge(memory: int) -> None:
    """Specification of SHINE, X5: tanh map of spectral norm 3, tolerance 1e-4, 300 iterations: 20 of 20 seeds."""
    weights, offsets = [], []
    for seed in range(20):
        random = np.random.RandomState(seed)
        w = torch.tensor(random.randn(100, 100))
        weights.append(w * 3.0 / torch.linalg.matrix_norm(w, 2))
        offsets.append(torch.tensor(random.randn(100)))
    w, b = torch.stack(weights), torch.stack(offsets)
    solution = eq.fixed_point(
        lambda z, w, b: torch.tanh(torch.bmm(w, z[..., None])[..., 0] + b),
        torch.zeros(20, 100),
        w,
        b,
        solver=eq.Broyden(max_steps=300, memory=memory, rtol=0.0, atol=1e-4),
        params=(),
    )
    assert solution.status.tolist() == [eq.Status.CONVERGED] * 20
