"""Anderson acceleration against least squares by QR, and against its theory on affine maps."""

from __future__ import annotations

import dataclasses

import problems
import pytest
import torch
from problems import TanhCell, spectral
from torch import Tensor

import equipoise as eq


class Recorder:
    """Calls a map and keeps the points it was called at."""

    def __init__(self, f: object) -> None:
        self.f, self.points = f, []

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        self.points.append(z.clone())
        return self.f(z, *inputs)


def anderson_by_least_squares(f: object, z: Tensor, memory: int, mixing: float, num_steps: int) -> list[Tensor]:
    """Points of one sample `(D,)`: weights that sum to one, of least residual, by `lstsq` on differences."""
    points, images = [z], [f(z[None])[0]]
    while len(points) < num_steps:
        window = range(max(0, len(points) - memory), len(points))
        residuals = torch.stack([images[i] - points[i] for i in window], dim=1)  # (D, m)
        moved = torch.stack([points[i] + mixing * (images[i] - points[i]) for i in window], dim=1)
        if len(window) == 1:
            points.append(moved[:, 0])
        else:
            theta = torch.linalg.lstsq(residuals[:, 1:] - residuals[:, :-1], residuals[:, -1:]).solution
            points.append(moved[:, -1] - ((moved[:, 1:] - moved[:, :-1]) @ theta)[:, 0])
        images.append(f(points[-1][None])[0])
    return points


@pytest.mark.parametrize(("memory", "mixing"), [(5, 1.0), (3, 1.0), (4, 0.6), (2, 0.9), (1, 0.7)])
def test_points_are_those_of_least_squares_also_when_the_memory_wraps_around(memory: int, mixing: float) -> None:
    cell = TanhCell(d=12, norm=1.1)
    x = torch.randn(3, 12)
    solver = eq.Anderson(memory=memory, mixing=mixing, max_steps=9, rtol=0.0)
    with torch.no_grad():
        recorder = Recorder(cell)
        eq.fixed_point(recorder, torch.zeros(3, 12), x, solver=solver, params=())
        for row in range(3):
            expected = anderson_by_least_squares(lambda z, r=row: cell(z, x[[r]]), torch.zeros(12), memory, mixing, 9)
            found = [point[row] for point in recorder.points]
            torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=1e-8)


def test_an_affine_map_is_solved_after_as_many_steps_as_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, x = spectral(6, 3.0, generator), torch.randn(4, 6)
    expected = torch.linalg.solve(torch.eye(6) - a, x.T).T
    # Equivalent to GMRES: six dimensions, one step to start with, one evaluation to see that it is right.
    solver = eq.Anderson(memory=8, max_steps=8, rtol=1e-8, growth=1e6)
    solution = eq.fixed_point(lambda z, x: z @ a.T + x, torch.zeros(4, 6), x, solver=solver, params=())
    torch.testing.assert_close(solution.raise_for_status().value, expected, rtol=1e-6, atol=1e-7)


def test_a_residual_that_grows_too_much_sends_back_to_the_picard_step_of_the_best_point() -> None:
    lengths = torch.tensor([4.0, 1.0, 2.0, 500.0, 1.0])
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.clone())
        direction = torch.nn.functional.one_hot(torch.tensor(len(seen) % 5), 5)
        return z + lengths[len(seen) - 1] * direction

    with torch.no_grad():
        eq.fixed_point(f, torch.zeros(1, 5), solver=eq.Anderson(max_steps=5, rtol=0.0, growth=10.0))
    image_of_best = seen[1] + torch.nn.functional.one_hot(torch.tensor(2), 5)
    torch.testing.assert_close(seen[4], image_of_best.to(seen[4].dtype))


def test_scaling_a_block_does_not_change_the_weights() -> None:
    """With blocks, a state whose second part is measured in thousandths has the same iterates."""
    problem = problems.affine(batch=3)
    scale = torch.tensor([1.0, 1.0, 1.0, 1e3, 1e3, 1e3])

    def scaled(z: Tensor, x: Tensor) -> Tensor:
        return problem.f(z / scale, x) * scale

    def points(f: object) -> Tensor:
        recorder = Recorder(f)
        fmap = eq.Map(recorder, problem.z0, problem.inputs, params=(), blocks=(3, 3))
        eq.Anderson(max_steps=7, rtol=0.0).solve(fmap, problem.z0)
        return torch.stack(recorder.points)

    torch.testing.assert_close(points(scaled) / scale, points(problem.f), rtol=1e-7, atol=1e-9)


def test_the_tolerance_does_not_change_what_the_ridge_means() -> None:
    """A map in other units takes the same number of steps: the ridge is relative."""
    cell, x = TanhCell(d=10, norm=0.95), torch.randn(4, 10)
    solver = eq.Anderson(max_steps=100, rtol=1e-9, ridge=1e-6)
    counts = [
        eq.fixed_point(lambda z, x, s=s: s * cell(z / s, x).detach(), 0 * x, x, solver=solver, params=()).num_steps
        for s in (1e-12, 1.0, 1e9)
    ]
    assert counts[0].tolist() == counts[1].tolist() == counts[2].tolist()
    bare = dataclasses.replace(solver, ridge=0.0)
    assert int(eq.fixed_point(cell, 0 * x, x, solver=bare).num_steps.max()) < int(
        eq.fixed_point(cell, 0 * x, x, solver=eq.Picard(max_steps=400, rtol=1e-9)).raise_for_status().num_steps.max()
    )
