"""The loop: boundaries of tolerance and divergence, failures in a row, blocks, and memories that are split."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import equipoise as eq
from equipoise.solvers.rows import split_rows


def scripted(lengths: list[float], solver: eq.Solver, **options: Any) -> eq.Solution[Tensor]:
    """A solve whose residuals, whatever the state, are these in turn: one sample of two numbers, from zero."""
    rest = iter(lengths)
    f = eq.FunctionMap(lambda z: z + torch.tensor([[next(rest), 0.0]]), torch.zeros(1, 2), **options)
    return solver.solve(f, torch.zeros(1, 2), trace=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrying(eq.Picard):
    """Goes back to zero after each point."""

    retries: ClassVar[int] = 2

    def propose(self, memory: Any, point: eq.Point) -> Tensor:
        return torch.zeros_like(point.z)


BEYOND = math.nextafter(1e8, math.inf)


@pytest.mark.parametrize(
    ("lengths", "fields", "status", "steps"),
    [
        # A residual as large as the tolerance is within it: atol + rtol |f(z)|, from zero of |f(z)| = |r|.
        ([2.0], {"atol": 2.0}, "CONVERGED", 1),
        ([math.nextafter(2.0, 3.0), 2.0], {"atol": 2.0}, "CONVERGED", 2),
        ([2.0, 1.0], {"rtol": 0.25, "atol": 0.25}, "CONVERGED", 2),
        ([2.0, 1.001, 1.0], {"rtol": 0.25, "atol": 0.25}, "CONVERGED", 3),
        ([2.0, 1.0], {"rtol": 0.25, "atol": 0.249}, "MAX_STEPS", 2),
        # Up to 1e8 times the first residual is no divergence.
        ([1.0, 1e8, 1e8], {}, "MAX_STEPS", 3),
        ([1.0, BEYOND], {}, "DIVERGED", 2),
        ([1.0, math.nan], {}, "NONFINITE", 2),
        ([math.inf], {}, "NONFINITE", 1),
        ([math.nan], {"retries": True}, "NONFINITE", 1),
        # Two failures in a row are forgiven, as often as they come; the third is named after its kind.
        ([1.0, BEYOND, math.nan, 1.0, math.nan, BEYOND, 0.0], {"retries": True}, "CONVERGED", 7),
        ([1.0, BEYOND, math.nan, BEYOND], {"retries": True}, "DIVERGED", 4),
        ([1.0, BEYOND, BEYOND, math.inf], {"retries": True}, "NONFINITE", 4),
        # Two evaluations without a better point, where another as good is none.
        ([3.0, 2.0, 2.0, 3.0], {"patience": 2}, "STALLED", 4),
        ([3.0, 2.0, 2.0, 1.0, 1.0], {"patience": 2}, "MAX_STEPS", 5),
        ([3.0, 2.0, 2.0, 0.0], {"patience": 2}, "CONVERGED", 4),
    ],
)
def test_boundaries(lengths: list[float], fields: dict[str, Any], status: str, steps: int) -> None:
    kind = Retrying if "retries" in fields else eq.Picard
    numbers = {name: value for name, value in fields.items() if name != "retries"}
    solution = scripted(lengths, kind(max_steps=len(lengths), **{"rtol": 0.0, **numbers}))
    assert (eq.Status(int(solution.status)).name, int(solution.num_steps)) == (status, steps)
    assert solution.trace[:, 0].tolist() == pytest.approx(lengths[:steps], nan_ok=True)


@pytest.mark.parametrize(("blocks", "best"), [(None, 1.0), ((1, 1), 10.0)])
def test_blocks_may_move_apart(blocks: tuple[int, int] | None, best: float) -> None:
    """|f(z)| grows faster than the residual: up to ten times the first one of a map with blocks may be the best."""
    solution = scripted([1.0, 10.0, 10.001], eq.Picard(max_steps=3), blocks=blocks)
    assert float(solution.residual) == best


def test_within() -> None:
    """A residual meets the tolerance in the norm of the whole, or in that of each block; one may rest at zero."""
    r, fz = torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]]), torch.tensor([[6.0, 8.0, 0.0], [0.6, 0.8, 2.0]])
    solver = eq.Picard(rtol=0.25, atol=0.5)
    assert solver.within(r, fz, None).tolist() == solver.within(r, fz, (2, 1)).tolist() == [False, True]
    assert eq.Picard(rtol=0.5).within(r, fz, (2, 1)).tolist() == [True, True]
    assert eq.Picard(rtol=0.4).within(r, fz, None).tolist() == [False, True]


class Pair(NamedTuple):
    a: Tensor
    count: int


@dataclasses.dataclass
class Memory:
    history: Tensor
    parts: list[Tensor]
    none: None = None
    count: int = 5


def test_split_rows() -> None:
    """Of nested memories; what is no tensor goes to both."""
    keep, gone, x = torch.tensor([0, 3]), torch.tensor([1, 2, 4]), torch.arange(5.0)
    memory = Memory(torch.arange(60.0).view(5, 3, 4), [x, x.view(5, 1).expand(5, 2)])
    expected = memory.history.clone()
    stays, leaves = split_rows(memory, keep, gone)
    for part, rows in ((stays, keep), (leaves, gone)):
        assert torch.equal(part.history, expected[rows])
        assert [t.tolist() for t in part.parts] == [x[rows].tolist(), [[v, v] for v in x[rows].tolist()]]
        assert (type(part), type(part.parts), part.none, part.count) == (Memory, list, None, 5)
    assert stays.history.data_ptr() == memory.history.data_ptr(), "histories are not held twice"
    assert [part[0].tolist() for part in split_rows((x, None), keep, gone)] == [[0.0, 3.0], [1.0, 2.0, 4.0]]
