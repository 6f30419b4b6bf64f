"""L-BFGS that probes the direction of an outer loss, and L-BFGS that is given the pairs of an earlier solve."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from problems import BREAST_CANCER, along, dense_bfgs, recorded, rosenbrock
from torch import Tensor
from torch.nn.functional import cosine_similarity

import equipoise as eq
from equipoise.core.function_map import DescentMap

SIZE = BREAST_CANCER.size
Recorded = recorded(eq.LBFGS)

# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("outer_every", [1, 3])
@pytest.mark.thorough
def test_definition(outer_every: int, scaled: bool) -> None:
    """Replayed with dense matrices: when probes come, where they are, what they teach, and what they cost."""
    z0, direction = torch.tensor([[-1.2, 1.0, 0.3, 2.0]]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    solver = Recorded(
        max_steps=150, memory=150, rtol=0, atol=1e-8, scaled=scaled, outer_every=outer_every,
        outer_loss=along(direction[None]),
    )  # fmt: skip
    solution = solver.solve(DescentMap(rosenbrock, z0, params=()), z0).raise_for_status()
    steps: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    residual, current, first, probes, due, trials = solver.log[0].point.residual[0], z0[0], math.nan, 0, False, 0
    dense = torch.eye(4)
    for seen in solver.log[1:]:
        assert bool(seen.before.probing[0]) == due
        assert torch.equal(seen.before.base[0], current)
        s, new = seen.point.z[0] - current, seen.point.residual[0]
        known, moved = (s, residual - new), False
        if due:
            probes += 1
            expected, last = dense @ direction, float(steps[-1].norm())
            first = last if probes == 1 else first
            length = min(last, first / probes**2)
            torch.testing.assert_close(s, expected * length / expected.norm(), rtol=1e-6, atol=1e-10 * length)
        else:
            trials += 1
            rise, slope = float(rosenbrock(seen.point.z) - rosenbrock(current[None])), float(-residual @ s)
            if abs(rise) < 1e-12:
                rise = float(s @ (-residual - new)) / 2
            moved = rise <= 1e-4 * slope and abs(float(new @ s)) <= -0.9 * slope
        if moved:
            steps.append(s)
            current, residual = seen.point.z[0], new
        if moved or (due and known[0] @ known[1] > 0):
            pairs.append(known)
        due = moved and (len(steps) - 1) % outer_every == 0
        if pairs:
            dense, (s, y) = dense_bfgs(pairs, scaled), pairs[-1]
            torch.testing.assert_close(seen.dense, dense, rtol=0, atol=1e-7 * float(dense.norm()))
            torch.testing.assert_close(seen.dense @ y, s, rtol=0, atol=1e-8 * float(s.norm()))
    assert probes == -(-(len(steps) - 1) // outer_every), "none after the step that converged"
    assert probes > (20 if outer_every == 1 else 6)
    assert solution.num_evals == len(solver.log) == 1 + trials + probes, "one evaluation a probe, no other"


STARTS = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [-3.0, 5.0], [1.01, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("loss", [None, lambda z, rows: 0 * z[:, 0], lambda z, rows: z[:, 0] * torch.nan])
@pytest.mark.thorough
def test_no_direction(loss: Any) -> None:
    """Without one there is no probe."""
    f, plain = DescentMap(rosenbrock, STARTS, params=()), eq.LBFGS(max_steps=300, memory=6, rtol=0, atol=1e-8)
    expected = plain.solve(f, STARTS)
    solution = dataclasses.replace(plain, outer_every=2, outer_loss=loss).solve(f, STARTS)
    assert solution.num_steps.tolist() == expected.num_steps.tolist()
    assert torch.equal(solution.value, expected.value)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.thorough
def test_probe_not_finite(poison: float) -> None:
    """It loses only its pair: the steps are those without probes."""
    probes = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Poisoned(eq.LBFGS):
        def propose(self, memory: Any, point: eq.Point) -> Tensor:
            if bool(memory.probing.any()):
                probes.append(memory.absorbed)
                bad = torch.where(memory.probing, poison, 0.0)
                point = dataclasses.replace(point, value=point.value + bad, residual=point.residual + bad[:, None])
            return super().propose(memory, point)

    z0, zero, fields = torch.randn(1, SIZE), torch.zeros(1), {"max_steps": 200, "memory": 100, "rtol": 0, "atol": 1e-6}
    solver = Poisoned(**fields, outer_every=3, outer_loss=along(torch.ones(1, SIZE)))
    solution, plain = (BREAST_CANCER.solve(z0, zero, solver) for solver in (solver, eq.LBFGS(**fields)))
    assert solution.num_evals == plain.num_evals + len(probes)
    assert len(probes) > 5
    torch.testing.assert_close(solution.value, plain.value, rtol=0, atol=1e-12)
    assert solution.inverse.rank.tolist() == plain.inverse.rank.tolist()
    # Sixty steps amplify the rounding that depends on which slots the pairs lie in.
    torch.testing.assert_close(solution.inverse.dense(), plain.inverse.dense(), rtol=1e-2, atol=1e-5)


def test_best_iterate_is_a_probe() -> None:
    """The inverse knows its pair, also when it is not the last point: it is at the minimum in one variable."""
    hessian, found, z0 = torch.diag(torch.tensor([1.0, 10.0, 100.0])), 0, torch.ones(1, 3)
    for max_steps in range(4, 12):
        loss = along(torch.tensor([[-1.0, 0.0, 0.0]]))
        solver = Recorded(max_steps=max_steps, memory=40, rtol=0, atol=0.0, outer_every=1, outer_loss=loss)
        solution = solver.solve(DescentMap(lambda z: 0.5 * ((z @ hessian) * z).sum(1), z0, params=()), z0, trace=True)
        best = solver.log[int(solution.trace[:, 0].argmin())]
        torch.testing.assert_close(solution.value, best.point.z, rtol=0, atol=0)
        torch.testing.assert_close(solution.inverse.dense()[0], best.dense, rtol=1e-12, atol=1e-12)
        if bool(best.before.probing[0]):
            found += 1
            s, y = (x[0, -1] for x in eq.LBFGS.pairs_of(solution))
            torch.testing.assert_close(hessian @ s, y, rtol=1e-8, atol=1e-10)
    assert found > 0


# --- pairs of an earlier solve ---------------------------------------------------------------------------------------

COLD = eq.LBFGS(max_steps=400, memory=100, rtol=0, atol=1e-6, scaled=False)


@dataclasses.dataclass(frozen=True)
class Carried:
    """A solve at l = 0, and its pairs made those of l = 0.2."""

    solution: eq.Solution[Tensor]
    log_lambda: Tensor
    pairs: tuple[Tensor, Tensor]

    @classmethod
    @functools.cache
    def make(cls, rows: int) -> Carried:
        z0 = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(1))
        old, new = torch.zeros(rows), torch.full((rows,), 0.2)
        solution = BREAST_CANCER.solve(z0, old, COLD).raise_for_status()
        s, y = eq.LBFGS.pairs_of(solution)
        return cls(solution, new, (s, y + (new.exp() - old.exp())[:, None, None] * s))


def test_pairs_in_order() -> None:
    """They are those of the accepted steps."""
    solver, z0 = Recorded(max_steps=100, memory=5, rtol=0, atol=1e-8), torch.tensor([[-1.2, 1.0, 0.3]])
    solution = solver.solve(DescentMap(rosenbrock, z0, params=()), z0)
    states = [(seen.before.base[0], -seen.before.residual[0]) for seen in solver.log[1:]]
    states.append((solver.log[-1].point.z[0], -solver.log[-1].point.residual[0]))
    moves = [(b - a, g - f) for (a, f), (b, g) in itertools.pairwise(states) if not torch.equal(a, b)][-5:]
    s, y = eq.LBFGS.pairs_of(solution)
    assert s.shape == y.shape == (1, 5, 3)
    for k, (step, change) in enumerate(moves):
        scale = (step @ change).sqrt()
        torch.testing.assert_close(s[0, k] * scale, step, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(y[0, k] * scale, change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.thorough
def test_inverse_from_pairs(scaled: bool) -> None:
    """It is made again from them; rows learned different numbers of pairs, and some left the batch early."""
    solver = dataclasses.replace(COLD, scaled=scaled, memory=8, atol=1e-4)
    z0 = torch.randn(5, SIZE) * torch.logspace(-3, 1, 5)[:, None]
    solution = BREAST_CANCER.solve(z0, torch.linspace(-2, 6, 5), solver)
    assert len(solution.inverse.parts) > 1
    pairs = eq.LBFGS.pairs_of(solution)
    torch.testing.assert_close((pairs[0] * pairs[1]).sum(2).count_nonzero(1) * 2, solution.inverse.rank)
    for memory in (8, 50):
        again = dataclasses.replace(solver, memory=memory, pairs=pairs, atol=1e9)
        found = BREAST_CANCER.solve(solution.value, torch.zeros(5), again)
        assert found.num_evals == 1
        torch.testing.assert_close(found.inverse.dense(), solution.inverse.dense(), rtol=1e-9, atol=1e-12)
        for mine, other in zip(eq.LBFGS.pairs_of(found), pairs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_warm_solve() -> None:
    """With validated pairs it is cheaper than without, and that than a cold one; one step suffices for the inverse."""
    carried = Carried.make(16)
    start, new, given = carried.solution.value, carried.log_lambda, dataclasses.replace(COLD, pairs=carried.pairs)
    runs = ((torch.zeros_like(start), COLD), (start, COLD), (start, given))
    cold, warm, told = (BREAST_CANCER.solve(z0, new, solver).raise_for_status() for z0, solver in runs)
    assert told.num_steps.sum() < 0.6 * warm.num_steps.sum() < 0.6 * cold.num_steps.sum()
    torch.testing.assert_close(told.value, cold.value, rtol=0, atol=1e-5)
    v = torch.randn(16, SIZE)
    exact = torch.linalg.solve(BREAST_CANCER.hessian(cold.value, new), v)
    short = (BREAST_CANCER.solve(start, new, dataclasses.replace(s, max_steps=2)) for s in (COLD, given))
    bare, known = (float(cosine_similarity(solution.inverse.mv(v), exact).median()) for solution in short)
    assert 1 - known < 0.1 * (1 - bare)
    assert known > 0.99


def test_first_trial_with_pairs() -> None:
    """It is the whole step."""
    carried, points = Carried.make(2), []
    start = carried.solution.value

    def h(z: Tensor) -> Tensor:
        points.append(z.detach())
        return BREAST_CANCER.loss(z, carried.log_lambda)

    dataclasses.replace(COLD, pairs=carried.pairs, max_steps=2).solve(DescentMap(h, start), start)
    gradient = BREAST_CANCER.gradient(start, carried.log_lambda)
    for row in range(2):
        known = [(s, y) for s, y in zip(carried.pairs[0][row], carried.pairs[1][row], strict=True) if s.any()]
        step = -dense_bfgs(known, scaled=False) @ gradient[row]
        torch.testing.assert_close(points[1][row] - start[row], step, rtol=1e-8, atol=1e-10)


def test_pairs_not_convex() -> None:
    """They are not learned."""
    s = torch.eye(3).repeat(2, 1, 1)
    y = torch.tensor([2.0, -1.0, 0.0])[:, None] * s
    y[1] = torch.nan
    f = DescentMap(rosenbrock, torch.zeros(2, 3), params=())
    solution = eq.LBFGS(pairs=(s, y), atol=1e9, scaled=False).solve(f, torch.zeros(2, 3))
    assert solution.inverse.rank.tolist() == [2, 0]
    torch.testing.assert_close(solution.inverse.dense()[0], torch.diag(torch.tensor([0.5, 1.0, 1.0])))


def test_bad_pairs() -> None:
    z0 = torch.zeros(2, 3)
    f = DescentMap(rosenbrock, z0, params=())
    shapes = [((2, 4, 2), (2, 4, 2)), ((2, 3), (2, 3)), ((1, 2, 3), (2, 3)), ((2, 4, 3), (2, 5, 3)), ((1, 4, 3),) * 2]
    for s, y in shapes:
        with pytest.raises(ValueError, match=r"LBFGS\(pairs=.*must be of shape \(2, k, 3\), got \(.*\) and \("):
            eq.LBFGS(pairs=(torch.ones(s), torch.ones(y))).solve(f, z0)
    assert eq.LBFGS.pairs_of(eq.LBFGS(max_steps=0).solve(f, z0)) is None
    with pytest.raises(TypeError, match="must be that of an LBFGS solve, got LowRank"):
        eq.LBFGS.pairs_of(eq.Broyden().solve(eq.FunctionMap(lambda z: z / 2, z0, params=()), z0))
