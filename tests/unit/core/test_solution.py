"""Solutions: statuses, and the error that names them."""

import dataclasses
import math

import pytest
import torch

import equipoise as eq
from equipoise.core.solution import REMEDIES


def solution(status: list[int], residual: list[float]) -> eq.Solution[torch.Tensor]:
    steps = torch.ones(len(status), dtype=torch.int64)
    return eq.Solution(torch.zeros(len(status), 2), torch.tensor(status), torch.tensor(residual), steps, 1, 0)


def test_numbers() -> None:
    """They are what `Solution.status` holds, in files as well."""
    assert [status.name for status in eq.Status] == ["CONVERGED", "MAX_STEPS", "STALLED", "DIVERGED", "NONFINITE"]
    assert [int(status) for status in eq.Status] == [0, 1, 2, 3, 4]
    assert solution([0, 1, 2, 3, 4, 0], [0.0] * 6).converged.tolist() == [True, *[False] * 4, True]


def test_all_converged() -> None:
    good = solution([0, 0], [1.0, 2.0])
    assert good.raise_for_status() is good


def test_message() -> None:
    """It names samples, at most eight, the largest residual and the remedy for each status, and no other."""
    status = [3, *[2] * 8, 4, *[1] * 9, 0]
    with pytest.raises(eq.ConvergenceError) as caught:
        solution(status, [float(i) for i in range(18)] + [0.12345, math.inf]).raise_for_status()
    assert str(caught.value) == "; ".join([
        f"MAX_STEPS: 9 of 20 samples (10, 11, 12, 13, 14, 15, 16, 17, ...), largest residual 17; {REMEDIES[1]}",
        f"STALLED: 8 of 20 samples (1, 2, 3, 4, 5, 6, 7, 8), largest residual 8; {REMEDIES[2]}",
        f"DIVERGED: 1 of 20 samples (0), largest residual 0; {REMEDIES[3]}",
        f"NONFINITE: 1 of 20 samples (9), largest residual 9; {REMEDIES[4]}",
    ])  # fmt: skip
    with pytest.raises(eq.ConvergenceError, match=r"^NONFINITE: 1 of 1 samples \(0\), largest residual inf; the map"):
        solution([4], [math.inf]).raise_for_status()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (eq.Status.MAX_STEPS, "raise max_steps, loosen rtol or atol, or take a faster solver"),
        (eq.Status.STALLED, "loosen rtol or atol, raise patience, or solve in float64"),
        (eq.Status.DIVERGED, "the map does not contract: damp the solver"),
        (eq.Status.NONFINITE, "the map returned NaN or Inf: check its inputs"),
    ],
)
def test_remedies(status: eq.Status, remedy: str) -> None:
    assert REMEDIES[status].startswith(remedy)


def test_fields() -> None:
    """A record that cannot be changed, and that prints no states but the value."""
    made = solution([0], [0.5])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_evals = 2  # type: ignore[misc]
    assert (made.inverse, made.trace, made.map, made.start, made.statistics) == (None, None, None, None, {})
    assert not any(name in repr(made) for name in ("inverse", "trace", "map", "start", "statistics"))
