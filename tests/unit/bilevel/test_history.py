"""Error estimates, history and best point, on evaluations written by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.bilevel import OuterStatus, Trial
from equipoise.bilevel.error_estimate import ErrorEstimate
from equipoise.bilevel.history import History
from equipoise.bilevel.problem import Evaluation
from equipoise.core.map import Counts
from equipoise.core.solution import Solution, Status


def evaluation(value: float = 10.0, status: Status = Status.CONVERGED, *adjoint: Tensor, **fields: Any) -> Evaluation:
    statuses, residual = torch.tensor([Status.CONVERGED, status]), torch.tensor([3e-3, 4e-3])
    z, x = torch.zeros(2, 1), torch.tensor([0.5])
    solution = Solution(value=z, status=statuses, residual=residual, num_steps=statuses, num_evals=1, num_vjps=0)
    given = {"x": x, "hyper": (x,), "leaves": (x,), "tolerance": 1e-3, "z": z, "counts": Counts(3, 2), **fields}
    return Evaluation(**given, solution=solution, total=torch.tensor(value), record=[adjoint] if adjoint else [])


def trial(value: float, gradient: Tensor | None = None) -> Trial:
    return Trial(x=torch.zeros(1), value=value, noise=0.0, tolerance=1e-3, gradient=gradient)


@pytest.mark.parametrize("status", Status)
def test_value(status: Status) -> None:
    failed = status in (Status.DIVERGED, Status.NONFINITE)
    value = evaluation(status=status).value
    assert math.isnan(value) if failed else value == 10


def test_error() -> None:
    w, r = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.01], [0.0]])
    estimate = ErrorEstimate()
    first = evaluation(10.0, Status.CONVERGED, w, r)
    assert estimate.tolerance_factor == 1
    gradient = torch.ones(1)
    estimate, corrected = estimate.updated(estimate.trial(first), first, gradient)
    assert estimate.first == estimate.last == 5
    assert estimate.noise == pytest.approx(3)
    assert (corrected.value, corrected.noise) == (pytest.approx(10.03), pytest.approx(0.03))
    assert corrected.gradient is gradient
    found = estimate.trial(first)  # the residual has norm 5e-3
    assert (found.value, found.noise, found.tolerance, found.gradient) == (10, pytest.approx(0.015), 1e-3, None)
    assert found.x is first.x
    longer, _ = estimate.updated(found, evaluation(10.0, Status.CONVERGED, 2 * w, r), gradient)
    assert (longer.first, longer.last, longer.tolerance_factor) == (5, 10, 0.5)
    shorter, _ = estimate.updated(found, evaluation(10.0, Status.CONVERGED, w / 2, r), gradient)
    assert (shorter.first, shorter.last, shorter.tolerance_factor) == (5, 2.5, 1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", [10.0, -10.0])
def test_errors_are_limited(sign: int, value: float) -> None:
    w = torch.tensor([[sign * 1.0], [0.0]])
    point = evaluation(value, Status.CONVERGED, w, 50 * w.abs())
    estimate, corrected = ErrorEstimate().updated(ErrorEstimate().trial(point), point, torch.ones(1))
    assert (corrected.value, corrected.noise) == (value + sign, 1)
    assert estimate.noise == 1
    assert ErrorEstimate(noise=1e6).trial(point).noise == 1


def test_no_adjoint() -> None:
    old, point = ErrorEstimate(2.0, 3.0, 4.0), evaluation()
    estimate, corrected = old.updated(old.trial(point), point, torch.ones(1))
    assert estimate == old
    assert (corrected.value, corrected.noise) == (10, 0)


def test_steps() -> None:
    seen: list[tuple[Any, Tensor]] = []
    history = History(lambda step, z: seen.append((step, z)))
    first = evaluation()
    history.add(first, trial(10.0, torch.tensor([3.0, 4.0])), accepted=True)
    history.add(evaluation(9.0, tolerance=1e-4), trial(9.0), accepted=False)
    one, two = history.steps
    assert seen[0] == (one, first.z)
    assert (one.step, one.value, one.tolerance, one.gradient_norm, one.accepted) == (1, 10, 1e-3, 5, True)
    assert one.hyper == first.hyper
    assert (one.num_evals, one.num_vjps, one.gradient_evals) == (3, 2, 7)
    assert (two.step, two.value, two.tolerance, two.accepted, two.inner_converged) == (2, 9, 1e-4, False, True)
    assert math.isnan(two.gradient_norm)
    assert (two.num_evals, two.num_vjps, two.gradient_evals) == (6, 4, 14)
    assert 0 <= one.seconds <= two.seconds < 60
    solution = history.solution(OuterStatus.MAX_STEPS)
    assert (solution.num_evals, solution.num_vjps, solution.gradient_evals) == (6, 4, 14)
    assert solution.value == 10  # an accepted point comes before a lower one that was rejected
    assert not solution.converged


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(3, 3, 0, True), (2, 2, 0, True), (4, 4, 0, True)], 1),
        ([(3, 3, 0, True), (3, 3, 0, True)], 0),
        ([(3, 3, 0, True), (1, 5, 0, True)], 0),  # corrected to a higher value
        ([(3, 3, 0, True), (4, 1, 0, True)], 0),  # corrected to a lower one
        ([(1, 1, 1, True), (3, 3, 0, True)], 1),  # the inner solve did not converge
        ([(1, 1, 1, True), (3, 3, 0, False)], 1),
        ([(1, math.nan, 0, True), (3, 3, 0, True)], 1),
        ([(3, 3, 0, False), (4, 4, 0, True)], 1),
    ],
)
def test_best_point(points: list[tuple[float, float, int, bool]], best: int) -> None:
    history = History()
    for value, corrected, status, accepted in points:
        history.add(evaluation(float(value), status=Status(status)), trial(float(corrected)), accepted=accepted)
    assert history.solution(OuterStatus.CONVERGED).value == points[best][0]


@pytest.mark.parametrize("status", OuterStatus)
def test_inner_status(status: OuterStatus) -> None:
    for inner in (Status.CONVERGED, Status.MAX_STEPS):
        history = History()
        history.add(evaluation(status=inner), trial(10.0), accepted=True)
        kept = inner is Status.CONVERGED or status is OuterStatus.NONFINITE
        assert history.solution(status).status is (status if kept else OuterStatus.INNER)
