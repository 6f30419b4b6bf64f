"""Baselines: grid search and random search."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.error_estimate import ErrorEstimate
from equipoise.bilevel.history import History
from equipoise.bilevel.hyper import Bound, HyperLayout, flatten
from equipoise.bilevel.inner import Inner
from equipoise.bilevel.problem import OuterProblem, Start
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
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
    """Evaluate the outer loss at given hyperparameters; each inner solve starts at the last solution.

    Args:
        outer: as in `minimize_outer`.
        inner: as in `minimize_outer`.
        z0: as in `minimize_outer`.
        grid: points, each a tensor or a tuple of tensors.
        solver: as in `minimize_outer`.
        tolerance: relative tolerance of all inner solves, as in `minimize_outer`.
        observe: as in `minimize_outer`.

    Returns:
        `OuterSolution` with the best point and the counts of all points.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: no point, or points of different shapes.

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
    problem = OuterProblem(outer, inner, points[0], solver)
    start, history = Start(z0), History(observe)
    for point in points:
        x = flatten((point,) if isinstance(point, Tensor) else tuple(point))
        if len(x) != len(flatten(problem.layout.hyper0)):
            raise ValueError("the points of grid must have the same shapes")
        evaluation = problem.evaluate(x, tolerance, start)
        finite = math.isfinite(evaluation.value)
        history.add(evaluation, ErrorEstimate().trial(evaluation), accepted=finite)
        if finite:
            start = problem.start_at(evaluation)
    found = any(step.accepted for step in history.steps)
    return history.solution(OuterStatus.CONVERGED if found else OuterStatus.NONFINITE)


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
    """Evaluate the outer loss at points drawn uniformly between the bounds.

    Args:
        outer: as in `minimize_outer`.
        inner: as in `minimize_outer`.
        z0: as in `minimize_outer`.
        hyper0: hyperparameters of the same shapes within the bounds; not evaluated.
        bounds: as in `minimize_outer`, finite.
        num: number of points.
        seed: seed of the draw.
        solver: as in `grid_search`.
        tolerance: as in `grid_search`.
        observe: as in `minimize_outer`.

    Returns:
        `OuterSolution` with the best point and the counts of all points.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: infinite bounds, `num` below one, or bounds of the wrong shape.
    """
    layout = HyperLayout.of(hyper0)
    low, high = layout.box(bounds)
    if not bool((high - low).isfinite().all()):
        raise ValueError(f"bounds must be finite, got {bounds!r}")
    if num < 1:
        raise ValueError(f"num must be >= 1, got {num!r}")
    draw = torch.rand(num, len(low), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grid = [layout.unflatten(low + (high - low) * share) for share in draw]
    return grid_search(outer, inner, z0=z0, grid=grid, solver=solver, tolerance=tolerance, observe=observe)
