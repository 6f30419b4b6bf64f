"""The baselines: the outer loss at the points of a grid, and at random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.hyper import Bound, HyperLayout
from equipoise.bilevel.inner import Inner
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.walk import Walk
from equipoise.solvers import Solver


def grid_search(
    outer: Callable[..., Tensor],
    inner: Inner | Callable[..., Tensor],
    *,
    z0: Any,
    grid: Iterable[Tensor | Sequence[Tensor]],
    solver: Solver | None = None,
    tolerance: float = 1e-3,
    observe: Callable[[OuterStep, Any], None] | None = None,
) -> OuterSolution:
    """Evaluate the outer loss at given hyperparameters, each inner solve started at the solution before.

    Args:
        outer: as in `minimize_outer`.
        inner: as in `minimize_outer`.
        z0: as in `minimize_outer`.
        grid: the points, each a tensor or a tuple of tensors.
        solver: as in `minimize_outer`.
        tolerance: of all inner solves, relative as in `minimize_outer`.
        observe: as in `minimize_outer`.

    Returns:
        `OuterSolution` with the best point and the counts of all.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: no point, or shapes do not fit.

    Example:
        >>> import torch
        >>> from equipoise.bilevel import grid_search
        >>> ridge = lambda z, log_alpha: (z - 3).square().sum(1) + log_alpha.exp() * z.square().sum(1)
        >>> held_out = lambda z, log_alpha: (z - 1).square().sum(1)
        >>> solution = grid_search(held_out, ridge, z0=torch.zeros(1, 1), grid=torch.linspace(-2, 2, 9))
        >>> solution.hyper[0].item()
        0.5
    """
    points = list(grid)
    if not points:
        raise ValueError("grid is empty: give at least one point")
    walk = Walk(outer, inner, z0, points[0], solver, None, observe)
    for point in points:
        x = walk.layout.flat((point,) if isinstance(point, Tensor) else tuple(point))
        if len(x) != len(walk.layout.flat(walk.layout.like)):
            raise ValueError("the points of grid must have the same shapes")
        walk.solve(x, tolerance)
        trial = walk.trial()
        walk.record(trial, accepted=math.isfinite(trial.value))
        if math.isfinite(trial.value):
            walk.move()
    found = any(line.accepted for line in walk.history)
    return walk.solution(OuterStatus.CONVERGED if found else OuterStatus.NONFINITE)


def random_search(
    outer: Callable[..., Tensor],
    inner: Inner | Callable[..., Tensor],
    *,
    z0: Any,
    hyper0: Tensor | Sequence[Tensor],
    bounds: tuple[Bound, Bound],
    num: int = 10,
    seed: int = 0,
    solver: Solver | None = None,
    tolerance: float = 1e-3,
    observe: Callable[[OuterStep, Any], None] | None = None,
) -> OuterSolution:
    """`grid_search` at points drawn uniformly between the bounds.

    Args:
        outer: as in `minimize_outer`.
        inner: as in `minimize_outer`.
        z0: as in `minimize_outer`.
        hyper0: gives the shapes; it lies within the bounds and is itself not tried.
        bounds: as in `minimize_outer`, finite.
        num: number of points.
        seed: of the draw.
        solver: as in `grid_search`.
        tolerance: as in `grid_search`.
        observe: as in `minimize_outer`.

    Returns:
        `OuterSolution` with the best point and the counts of all.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: infinite bounds, `num` below one, or shapes that do not fit.
    """
    layout = HyperLayout.of(hyper0)
    low, high = layout.box(bounds)
    if not bool((high - low).isfinite().all()):
        raise ValueError(f"random_search needs finite bounds, got {bounds!r}")
    if num < 1:
        raise ValueError(f"num must be >= 1, got {num!r}")
    draw = torch.rand(num, len(low), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grid = [tuple(part.detach() for part in layout.leaves(low + (high - low) * part)) for part in draw]
    return grid_search(outer, inner, z0=z0, grid=grid, solver=solver, tolerance=tolerance, observe=observe)
