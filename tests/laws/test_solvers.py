"""What every solver promises; a new one joins by one line in SOLVERS, or in DESCENT if it is made for objectives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem
from torch import Tensor

import equipoise as eq
from equipoise.core.function_map import DescentMap, FunctionMap

SOLVERS: tuple[eq.Solver, ...] = (
    eq.Picard(),
    eq.Picard(damping=0.7),
    eq.Anderson(),
    eq.Anderson(memory=3, mixing=0.8),
    eq.Broyden(memory=60),
    eq.Broyden(memory=4),
    eq.AdjointBroyden(memory=60),
    eq.AdjointBroyden(memory=4),
    eq.SteadyState(),
)
DESCENT: tuple[eq.Solver, ...] = (eq.LBFGS(memory=60), eq.LBFGS(memory=2))
ALL = (*SOLVERS, *DESCENT)
FOR_OBJECTIVES = tuple(type(solver) for solver in DESCENT)


def label(solver: eq.Solver) -> str:
    """The name of the class and the fields that differ from their defaults."""
    default = type(solver)()
    changed = [f"{name}={value}" for name, value in vars(solver).items() if value != getattr(default, name)]
    return "-".join([type(solver).__name__, *changed])


every_solver = pytest.mark.parametrize("solver", ALL, ids=label)
every_solver_of_maps = pytest.mark.parametrize("solver", SOLVERS, ids=label)
every_solver_with_inverse = pytest.mark.parametrize("solver", [s for s in ALL if s.keeps_inverse], ids=label)
CONTRACTIONS = (problems.affine, problems.two_scales, problems.scalar)
EXPANSIONS_SOLVED_BY = (eq.Anderson(), eq.Broyden(memory=60), eq.AdjointBroyden(), eq.SteadyState())


def tight(solver: eq.Solver, rtol: float = 1e-11) -> eq.Solver:
    return dataclasses.replace(solver, max_steps=400, rtol=rtol)


def solve(solver: eq.Solver, problem: Problem, **options: Any) -> eq.Solution[Any]:
    return eq.fixed_point(problem.f, problem.z0, *problem.inputs, solver=solver, params=(), **options)


def flat(state: Any) -> Tensor:
    parts = state if isinstance(state, tuple) else (state,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


class Graded:
    """Samples that differ in how fast they converge, of a map `f = z - grad h`; the rows of each call are noted.

    Solvers of DESCENT are given the objective `h`, the others the map. States longer than a sample's `limit` meet
    `poison`; `ripple` makes residuals go up and down.
    """

    def __init__(self, batch: int = 8, d: int = 6, device: str = "cpu", ripple: float = 0.0) -> None:
        self.w = problems.spectral(d, 1.0, torch.Generator().manual_seed(2)).to(device)
        self.z0, self.x = torch.zeros(batch, d, device=device), torch.randn(batch, d).to(device)
        self.gain = torch.linspace(0.02, 0.98, batch).to(device)[:, None]
        self.limit = torch.full_like(self.gain, math.inf)
        self.poison, self.ripple = math.nan, ripple
        self.calls: list[int] = []

    def to(self, dtype: torch.dtype) -> Graded:
        for name in ("w", "z0", "x", "gain", "limit"):
            setattr(self, name, getattr(self, name).to(dtype))
        return self

    def f(self, z: Tensor, x: Tensor, gain: Tensor, limit: Tensor) -> Tensor:
        self.calls.append(len(z))
        f = gain * torch.tanh(gain * (z @ self.w.T) + x) @ self.w + self.ripple * gain * torch.sin(20 * z)
        return torch.where(z.norm(dim=1, keepdim=True) > limit, self.poison, f)

    def h(self, z: Tensor, x: Tensor, gain: Tensor, limit: Tensor) -> Tensor:
        self.calls.append(len(z))
        h = z.square().sum(1) / 2 - torch.cosh(gain * (z @ self.w.T) + x).log().sum(1)
        h = h + self.ripple * (gain * torch.cos(20 * z)).sum(1) / 20
        return torch.where(z.norm(dim=1) > limit[:, 0], self.poison, h)

    def residual(self, z: Tensor) -> Tensor:
        return self.f(z, self.x, self.gain, self.limit) - z

    def solve(
        self, solver: eq.Solver, rows: Any = slice(None), *, closure: bool = False, trace: bool = False
    ) -> eq.Solution[Tensor]:
        self.calls = []
        z0, *inputs = (t[rows] for t in (self.z0, self.x, self.gain, self.limit))
        kind, f = (DescentMap, self.h) if isinstance(solver, FOR_OBJECTIVES) else (FunctionMap, self.f)
        wanted = kind(lambda z: f(z, *inputs), z0) if closure else kind(f, z0, inputs, params=())
        return solver.solve(wanted, z0, trace=trace)


# Answers


@every_solver_of_maps
@pytest.mark.parametrize("make", CONTRACTIONS, ids=lambda make: make.__name__)
def test_finds_the_fixed_point_of_a_contraction(solver: eq.Solver, make: Any) -> None:
    problem = make()
    solution = solve(tight(solver, 1e-10), problem).raise_for_status()
    torch.testing.assert_close(solution.value, problem.expected, rtol=1e-7, atol=1e-8)
    again = problem.f(solution.value, *problem.inputs)
    torch.testing.assert_close(
        solution.residual, (flat(again) - flat(solution.value)).norm(dim=1), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("solver", EXPANSIONS_SOLVED_BY, ids=label)
def test_finds_the_fixed_point_of_an_expanding_rotation(solver: eq.Solver) -> None:
    problem = problems.rotation()
    solution = solve(tight(solver), problem).raise_for_status()
    torch.testing.assert_close(solution.value, problem.expected, rtol=1e-8, atol=1e-9)


@every_solver_of_maps
def test_a_dict_is_solved_like_the_tuple_of_its_values(solver: eq.Solver) -> None:
    problem = problems.two_scales()

    def f(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        u, v = problem.f((z["u"], z["v"]), x)
        return {"u": u, "v": v}

    start = dict(zip("uv", problem.z0, strict=True))
    solution = eq.fixed_point(f, start, *problem.inputs, solver=tight(solver), params=()).raise_for_status()
    torch.testing.assert_close(solution.value, dict(zip("uv", problem.expected, strict=True)), rtol=1e-8, atol=1e-8)


@every_solver
def test_a_warm_start_is_where_the_solve_begins(solver: eq.Solver) -> None:
    graded, solver = Graded(), tight(solver, 1e-8)
    cold = graded.solve(solver).raise_for_status()
    graded.z0 = cold.value
    again = graded.solve(solver)
    assert again.num_evals == 1
    assert again.num_steps.tolist() == [1] * 8
    assert torch.equal(again.value, cold.value)
    graded.z0 = cold.value + 1e-6 * torch.randn(8, 6)
    near = graded.solve(solver).raise_for_status()
    torch.testing.assert_close(near.value, cold.value, rtol=1e-6, atol=1e-6)
    assert int(near.num_steps.sum()) < int(cold.num_steps.sum())


@every_solver_of_maps
def test_a_known_inverse_preconditions_what_the_solver_sees_and_not_the_judgment(solver: eq.Solver) -> None:
    problem = problems.affine()
    jacobian = torch.func.jacrev(lambda z: problem.f(z, torch.zeros(6)))(torch.zeros(6))
    exact = torch.linalg.inv(torch.eye(6) - jacobian)
    # M = I + (M - I), its second part written with the columns of I as basis; of the odd samples nothing is known.
    known = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])[:, None, None]
    estimate = eq.InverseEstimate.of(torch.ones(5), torch.eye(6).repeat(5, 1, 1), known * (exact - torch.eye(6)))
    f = FunctionMap(problem.f, problem.z0, problem.inputs, params=())
    bare = tight(solver).solve(f, problem.z0)
    helped = tight(solver).solve(f, problem.z0, preconditioner=estimate).raise_for_status()
    torch.testing.assert_close(helped.value, problem.expected, rtol=1e-9, atol=1e-9)
    residual = (problem.f(helped.value, *problem.inputs) - helped.value).norm(dim=1)
    torch.testing.assert_close(helped.residual, residual, rtol=1e-6, atol=1e-13)
    assert helped.num_steps[1::2].tolist() == bare.num_steps[1::2].tolist()
    assert bool((helped.num_steps[::2] < bare.num_steps[::2]).all())
    if label(solver) in ("Picard", "Anderson", "SteadyState"):  # undamped: the first step is Newton's
        assert helped.num_steps[::2].tolist() == [2] * 3


# One sample and its batch mates


@every_solver
def test_a_sample_does_not_depend_on_its_batch_mates(solver: eq.Solver) -> None:
    graded, solver = Graded(), tight(solver, 1e-6)
    whole = graded.solve(solver)
    assert len(set(whole.num_steps.tolist())) > 3, "the samples must differ for this test to say something"
    for closure in (False, True):
        for rows in ([0], [7], [3], [6, 1], [5, 4, 3, 2, 1, 0, 7, 6]):
            part = graded.solve(solver, rows, closure=closure)
            torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-10, atol=1e-12)
            assert part.num_steps.tolist() == whole.num_steps[rows].tolist()
            assert part.status.tolist() == whole.status[rows].tolist()


@every_solver
@settings(max_examples=4, deadline=None, derandomize=True)
@given(order=st.permutations(range(8)), size=st.integers(1, 8), steps=st.integers(1, 12))
def test_permuting_the_batch_permutes_the_answer(solver: eq.Solver, order: list[int], size: int, steps: int) -> None:
    torch.manual_seed(0)
    graded, solver = Graded(), dataclasses.replace(solver, max_steps=steps, rtol=1e-3)
    straight, permuted = graded.solve(solver), graded.solve(solver, order[:size])
    torch.testing.assert_close(permuted.value, straight.value[order[:size]], rtol=1e-10, atol=1e-12)
    assert permuted.status.tolist() == straight.status[order[:size]].tolist()
    assert permuted.num_steps.tolist() == straight.num_steps[order[:size]].tolist()


@every_solver
def test_samples_leave_the_batch_when_inputs_are_named_so_cost_follows_the_sum_of_steps(solver: eq.Solver) -> None:
    graded, solver = Graded(batch=32), tight(solver, 1e-6)
    steps = graded.solve(solver, closure=True).num_steps
    assert graded.calls == [32] * int(steps.max()), "a closure cannot be shown fewer rows"
    named = graded.solve(solver)
    assert named.num_steps.tolist() == steps.tolist()
    # Rows leave as soon as at most half of those present run.
    expected, present = [], 32
    for k in range(int(steps.max())):
        running = int((steps > k).sum())
        present = running if 2 * running <= present else present
        expected.append(present)
    assert graded.calls == expected
    assert int(steps.sum()) <= sum(graded.calls) < min(2 * int(steps.sum()), 32 * int(steps.max()))


@every_solver
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_sample_keeps_its_best_finite_iterate_and_disturbs_no_other(
    solver: eq.Solver, poison: float
) -> None:
    graded, others = Graded(), [0, 1, 2, 3, 4, 5, 7]
    graded.gain *= 0.8
    solver = dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=1e-6)
    clean = graded.solve(solver)
    # The answer lies where this sample's map is not defined: the solver meets the edge on its way.
    graded.poison, graded.limit[6] = poison, 0.95 * clean.value[6].norm()
    solution = graded.solve(solver, trace=True)
    # Those that back away may not have given up when their steps are over.
    assert solution.status[6] in (eq.Status.NONFINITE, *([eq.Status.MAX_STEPS] if solver.retries else []))
    assert solution.trace is not None
    seen = solution.trace[:, 6]
    assert solution.residual[6] == seen[seen.isfinite()].min() < seen[0]
    torch.testing.assert_close(graded.residual(solution.value)[6].norm(), solution.residual[6])
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-10, atol=1e-12)
    assert solution.num_steps[others].tolist() == clean.num_steps[others].tolist()


@every_solver
def test_a_start_that_is_not_finite_is_named(solver: eq.Solver) -> None:
    graded = Graded()
    clean = graded.solve(tight(solver, 1e-6))
    graded.z0[1, 0] = math.nan
    solution = graded.solve(tight(solver, 1e-6))
    assert solution.status.tolist() == [0, eq.Status.NONFINITE, 0, 0, 0, 0, 0, 0]
    others = [0, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-10, atol=1e-12)
    assert solution.num_steps[1] == 1
    assert solution.residual[1] == math.inf
    with pytest.raises(eq.ConvergenceError, match=r"NONFINITE: 1 of 8 samples \(1\).*check its inputs"):
        solution.raise_for_status()


# Statuses


def residual(z: Tensor, kind: Tensor) -> Tensor:
    """From zero: arrives at one, gets worse with every step, blows up, is NaN and infinite beyond the start; NaN."""
    beyond, size = (z != 0).any(dim=1), z.norm(dim=1)
    fates = [torch.where(beyond, end, 1.0) for end in (1e12, math.nan, math.inf)]
    lengths = torch.stack([0 * size, 1 + size.sqrt(), *fates, torch.full_like(size, math.nan)], dim=1)
    return torch.where((kind == 0)[:, None], 1 - z, lengths.gather(1, kind[:, None]))


def objective(z: Tensor, kind: Tensor) -> Tensor:
    linear = -(residual(z, kind).detach() * z).sum(1)
    return torch.where(kind == 0, (z - 1).square().sum(1) / 2, linear)


FATES = [eq.Status.CONVERGED, eq.Status.STALLED, eq.Status.DIVERGED] + [eq.Status.NONFINITE] * 3


@every_solver
@pytest.mark.parametrize("patience", [None, 6])
@pytest.mark.parametrize("closure", [False, True])
def test_every_way_to_end_has_its_status_and_count(solver: eq.Solver, patience: int | None, closure: bool) -> None:
    kind, z0 = torch.arange(6), torch.zeros(6, 4)
    descent = isinstance(solver, FOR_OBJECTIVES)
    f = objective if descent else lambda z, kind: z + residual(z, kind)
    make = DescentMap if descent else FunctionMap
    wanted = make(lambda z: f(z, kind), z0) if closure else make(f, z0, (kind,), params=())
    solver = dataclasses.replace(solver, max_steps=24, rtol=0.0, atol=1e-2, patience=patience)
    solution = solver.solve(wanted, z0)
    fates = list(FATES)
    if patience is None:
        fates[1] = eq.Status.MAX_STEPS
    unsound = 2 + solver.retries  # the start, and so many points beyond it
    if patience is None or unsound <= 1 + patience:
        assert solution.status.tolist() == fates
        assert solution.num_steps[2:].tolist() == [unsound] * 3 + [1]
    else:  # patience is over before the solver has tried all shorter steps
        assert solution.status[2:].tolist() == [eq.Status.STALLED] * 3 + [eq.Status.NONFINITE]
        assert solution.num_steps[2:].tolist() == [1 + patience] * 3 + [1]
    assert solution.num_steps[1] == (24 if patience is None else 1 + patience)
    torch.testing.assert_close(solution.value[0], torch.ones(4), rtol=0, atol=1e-2)
    assert torch.equal(solution.value[1:], z0[1:])
    assert solution.residual[1:].tolist() == [2.0, 2.0, 2.0, 2.0, math.inf]


@every_solver
def test_an_infinite_residual_is_not_within_a_share_of_an_infinite_image(solver: eq.Solver) -> None:
    kind, z0 = torch.tensor([4, 0]), torch.zeros(2, 4)
    descent = isinstance(solver, FOR_OBJECTIVES)
    f = objective if descent else lambda z, kind: z + residual(z, kind)
    wanted = (DescentMap if descent else FunctionMap)(f, z0, (kind,), params=())
    solution = dataclasses.replace(solver, max_steps=40, rtol=1e-3).solve(wanted, z0)
    assert solution.status.tolist() == [eq.Status.NONFINITE, eq.Status.CONVERGED]
    assert solution.residual[0] == 2.0


def test_the_error_names_samples_residual_and_remedy_for_each_status() -> None:
    kind = torch.arange(6).repeat(10)
    solver = eq.Picard(max_steps=9, rtol=0, atol=1e-6, patience=4)
    solution = eq.fixed_point(lambda z, kind: z + residual(z, kind), torch.zeros(60, 4), kind, solver=solver, params=())
    with pytest.raises(eq.ConvergenceError) as caught:
        solution.raise_for_status()
    parts = str(caught.value).replace("; loosen", ": loosen").split("; ")
    assert parts[0].startswith("STALLED: 10 of 60 samples (1, 7, 13, 19, 25, 31, 37, 43, ...), largest residual 2: loo")
    message = str(caught.value)
    assert "DIVERGED: 10 of 60 samples (2, 8, 14," in message
    assert "the map does not contract: damp the solver" in message
    assert "NONFINITE: 30 of 60 samples (3, 4, 5, 9," in message
    assert "largest residual inf; the map returned NaN or Inf: check its inputs" in message
    assert "MAX_STEPS" not in message
    good = eq.fixed_point(lambda z: 0 * z, torch.zeros(2, 1), solver=solver)
    assert good.raise_for_status() is good


@every_solver
def test_running_out_of_steps_is_a_status(solver: eq.Solver) -> None:
    solution = Graded().solve(dataclasses.replace(solver, max_steps=3, rtol=1e-6))
    unfinished = (solution.status == eq.Status.MAX_STEPS).nonzero().flatten().tolist()
    assert unfinished
    assert solution.num_steps[unfinished].tolist() == [3] * len(unfinished)
    with pytest.raises(eq.ConvergenceError, match=rf"MAX_STEPS: {len(unfinished)} of 8 .*raise max_steps"):
        solution.raise_for_status()


def test_diverged_keeps_the_best_iterate() -> None:
    problem = problems.rotation(radius=30.0)
    solution = solve(eq.Picard(max_steps=60, rtol=0.0, atol=1e-3), problem)
    assert solution.status.tolist() == [eq.Status.DIVERGED] * 3
    assert solution.num_steps.tolist() == [7] * 3, "30^6 > 1e8 > 30^5"
    torch.testing.assert_close(solution.value, problem.z0)


# Counts


@every_solver
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5, 100])
def test_reported_evaluations_equal_counted_calls(solver: eq.Solver, steps: int, closure: bool) -> None:
    graded = Graded()
    solution = graded.solve(dataclasses.replace(solver, max_steps=steps), closure=closure, trace=True)
    assert solution.num_evals == len(graded.calls) <= steps
    assert solution.num_vjps == (max(len(graded.calls) - 1, 0) if solver.uses_vjp else 0)
    assert int(solution.num_steps.max()) == solution.num_evals
    assert solution.trace is not None
    assert solution.trace.shape == (solution.num_evals, 8)
    if steps == 0:
        assert torch.equal(solution.value, graded.z0)
        assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 8
        assert solution.residual.tolist() == [math.inf] * 8


@every_solver
def test_converged_means_within_the_tolerance_at_the_returned_point(solver: eq.Solver) -> None:
    graded = Graded()
    for rtol, atol in [(0.0, 1e-5), (1e-5, 0.0), (1e-5, 1e-4)]:
        solution = graded.solve(dataclasses.replace(solver, max_steps=300, rtol=rtol, atol=atol)).raise_for_status()
        residual = graded.residual(solution.value)
        found, image = residual.norm(dim=1), residual + solution.value
        torch.testing.assert_close(solution.residual, found, rtol=1e-6, atol=1e-14)
        assert bool((found <= (atol + rtol * image.norm(dim=1)) * (1 + 1e-9)).all())


# The best iterate


class Scripted:
    """A map whose residual, whatever the state, follows a script of lengths: the best evaluation is known."""

    def __init__(self, lengths: list[list[float]]) -> None:
        self.lengths, self.seen = torch.tensor(lengths), list[Tensor]()

    def __call__(self, z: Tensor) -> Tensor:
        self.seen.append(z.clone())
        direction = torch.nn.functional.one_hot(torch.tensor(len(self.seen) % z.shape[1]), z.shape[1])
        return z + self.lengths[:, len(self.seen) - 1, None] * direction


@every_solver
def test_the_best_iterate_is_returned_and_not_the_last(solver: eq.Solver) -> None:
    script = Scripted([[4.0, 3.0, 1.0, 5.0, 2.0], [4.0, 0.5, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    with torch.no_grad():
        solution = eq.fixed_point(script, torch.zeros(3, 4), solver=dataclasses.replace(solver, max_steps=5, rtol=0.0))
    torch.testing.assert_close(solution.residual, torch.tensor([1.0, 0.5, 1.0]))
    for row, best in enumerate([2, 1, 0]):
        assert torch.equal(solution.value[row], script.seen[best][row])


def test_best_is_the_least_error_in_units_of_the_tolerance() -> None:
    # |r| = 1 at |f(z)| = 1, then |r| = 999 at |f(z)| = 1000, |r| = 2 at |f(z)| = 1002: this one meets rtol = 0.01.
    def f(z: Tensor) -> Tensor:
        return torch.where(z == 0, 1.0, torch.where(z == 1, 1000.0, torch.where(z == 1000, 1002.0, 2000.0)))

    solution = eq.fixed_point(f, torch.zeros(1, 1), solver=eq.Picard(max_steps=3, rtol=0.01))
    assert solution.status.tolist() == [eq.Status.CONVERGED]
    assert solution.value.item() == 1000.0
    # Not converged, the same order counts, up to the first residual: |r| and |f(z)| are 3, 3; then 2, 5; then 2.5, 7.5.
    lengths = iter([3.0, 2.0, 2.5])
    with torch.no_grad():
        solution = eq.fixed_point(lambda z: z + next(lengths), torch.zeros(1, 1), solver=eq.Picard(max_steps=3))
    assert solution.status.tolist() == [eq.Status.MAX_STEPS]
    assert solution.value.item() == 5.0


def test_a_point_with_a_larger_residual_than_the_start_is_not_better() -> None:
    # On z -> 1.05 z + 1 the residual grows for ever, but relative to f(z) it falls from 1 to 0.05.
    solution = eq.fixed_point(lambda z: 1.05 * z + 1, torch.zeros(1, 1), solver=eq.Picard(max_steps=600))
    assert solution.status.tolist() == [eq.Status.DIVERGED]
    assert (solution.value.item(), solution.residual.item()) == (0.0, 1.0)


@every_solver_with_inverse
@pytest.mark.parametrize("closure", [False, True])
def test_value_and_inverse_are_those_of_a_run_that_stops_at_the_best_point(solver: eq.Solver, closure: bool) -> None:
    graded, older = Graded(ripple=0.2), 0
    memory = max(solver.memory, 9)  # type: ignore[attr-defined]
    solver = dataclasses.replace(solver, max_steps=9, rtol=1e-3, memory=memory)
    together = graded.solve(solver, closure=closure, trace=True)
    assert together.inverse is not None
    assert together.trace is not None
    dense = together.inverse.dense()
    for row in range(8):
        (best,) = (together.trace[:, row] == together.residual[row]).nonzero().flatten().tolist()
        older += best + 1 < int(together.num_steps[row])
        there = graded.solve(dataclasses.replace(solver, max_steps=best + 1), [row])
        assert there.inverse is not None
        torch.testing.assert_close(together.value[row], there.value[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(dense[row], there.inverse.dense()[0], rtol=1e-6, atol=1e-8)
        assert together.inverse.rank[row] == there.inverse.rank[0]
    assert older, "a best point must be older than the last for this test to say something"
    assert len(set(together.num_steps.tolist())) > 1


@every_solver
def test_the_trace_is_kept_on_request_only_and_ends_where_a_sample_stops(solver: eq.Solver) -> None:
    graded, solver = Graded(), tight(solver, 1e-6)
    assert graded.solve(solver).trace is None
    solution = graded.solve(solver, trace=True)
    assert solution.trace is not None
    first = graded.residual(graded.z0).norm(dim=1)
    torch.testing.assert_close(solution.trace[0], first)
    assert solution.trace.isfinite().sum(dim=0).tolist() == solution.num_steps.tolist()
    torch.testing.assert_close(solution.trace[solution.num_steps - 1, torch.arange(8)], solution.residual)


# Modes


@every_solver
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_dtype_is_kept(solver: eq.Solver, dtype: torch.dtype, rtol: float) -> None:
    graded = Graded()
    exact = graded.solve(tight(eq.Anderson(), 1e-13)).raise_for_status().value
    solution = graded.to(dtype).solve(tight(solver, rtol)).raise_for_status()
    assert solution.value.dtype == solution.residual.dtype == dtype
    assert solution.inverse is None or solution.inverse.dense().dtype == dtype
    torch.testing.assert_close(solution.value.double(), exact, rtol=100 * rtol, atol=100 * rtol)


@every_solver
def test_under_autocast_the_map_computes_in_bfloat16_and_the_solver_does_not(solver: eq.Solver) -> None:
    graded = Graded(batch=4).to(torch.float32)
    graded.gain /= 2
    exact = graded.solve(tight(solver, 1e-5)).raise_for_status()
    f, h, seen = graded.f, graded.h, set()

    def watch(z: Tensor) -> None:
        seen.add((z.dtype, (z @ graded.w.T).dtype))

    graded.f = lambda z, *inputs: (watch(z), f(z, *inputs))[1]  # type: ignore[method-assign]
    graded.h = lambda z, *inputs: (watch(z), h(z, *inputs))[1]  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        solution = graded.solve(dataclasses.replace(solver, max_steps=40))
    assert seen == {(torch.float32, torch.bfloat16)}
    assert solution.value.dtype == solution.residual.dtype == torch.float32
    assert solution.inverse is None or solution.inverse.dense().dtype == torch.float32
    torch.testing.assert_close(solution.value, exact.value, rtol=0.03, atol=0.03)


@every_solver_of_maps
def test_a_state_in_half_precision_is_solved_in_float32(solver: eq.Solver) -> None:
    x, seen = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).reshape(3, 4), set()

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.add(z.dtype)
        return -0.25 * z + x

    solution = eq.fixed_point(f, torch.zeros_like(x), x, solver=dataclasses.replace(solver, rtol=0.02), params=())
    assert seen == {torch.bfloat16}
    assert solution.value.dtype == torch.bfloat16
    assert solution.residual.dtype == torch.float32
    torch.testing.assert_close(solution.raise_for_status().value.double(), x.double() / 1.25, rtol=0.05, atol=0.03)


@every_solver_of_maps
@pytest.mark.parametrize("layout", ["strided", "channels_last"])
def test_memory_layout_of_the_state_does_not_matter(solver: eq.Solver, layout: str) -> None:
    x = torch.randn(3, 4, 5, 6)
    other = (
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        if layout == "strided"
        else x.contiguous(memory_format=torch.channels_last)
    )
    assert not other.is_contiguous()

    def f(z: Tensor, x: Tensor) -> Tensor:
        out = torch.tanh(0.4 * z.roll(1, 3) - 0.3 * z.roll(1, 1) + x)
        return out.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else out

    plain, strided = (
        eq.fixed_point(f, torch.zeros_like(t), t, solver=tight(solver, 1e-6), params=()).raise_for_status()
        for t in (x, other)
    )
    torch.testing.assert_close(strided.value, plain.value, rtol=1e-10, atol=1e-12)
    assert strided.num_steps.tolist() == plain.num_steps.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_solver
def test_a_device_gives_the_answers_of_the_host(solver: eq.Solver) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        answers.append(Graded(batch=32, device=device).solve(tight(solver, 1e-6)))
    host, device = answers
    assert device.value.is_cuda
    assert device.status.is_cuda
    torch.testing.assert_close(device.value.cpu(), host.value, rtol=1e-8, atol=1e-10)
    assert device.status.tolist() == host.status.tolist()
    assert device.num_steps.tolist() == host.num_steps.tolist()
    assert device.inverse is None or device.inverse.dense().is_cuda


# Blocks and projections


@pytest.mark.parametrize("solver", [s for s in ALL if s.supports_projection], ids=label)
def test_every_point_of_a_projected_map_is_feasible(solver: eq.Solver) -> None:
    problem, seen = problems.affine(), []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z)
        return problem.f(z, x)

    projected = FunctionMap(f, problem.z0, problem.inputs, params=(), projection=lambda z, x: z.clamp(-0.5, 0.5))
    solution = tight(solver, 1e-9).solve(projected, problem.z0 + 3).raise_for_status()
    assert all(bool((z.abs() <= 0.5).all()) for z in seen)
    reference = problem.z0
    for _ in range(300):
        reference = problem.f(reference, *problem.inputs).clamp(-0.5, 0.5)
    assert bool((reference.abs() == 0.5).any(dim=1).all()), "the constraint must bind"
    torch.testing.assert_close(solution.value, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [s for s in ALL if not s.supports_projection], ids=label)
def test_a_solver_that_cannot_follow_a_projected_map_refuses_it(solver: eq.Solver) -> None:
    problem = problems.affine()
    f = FunctionMap(problem.f, problem.z0, problem.inputs, params=(), projection=lambda z, x: z.clamp(-1, 1))
    with pytest.raises(ValueError, match=rf"{type(solver).__name__} cannot follow a projected map; use Anderson or P"):
        solver.solve(f, problem.z0)


@every_solver_of_maps
def test_a_sample_converges_when_each_block_does(solver: eq.Solver) -> None:
    problem = problems.two_scales()
    blocks = FunctionMap(problem.f, problem.z0, problem.inputs, params=(), blocks=(1, 6))
    solution = tight(solver, 1e-4).solve(blocks, blocks.pack(problem.z0)).raise_for_status()
    image = problem.f(blocks.unpack(solution.value), *problem.inputs)
    for part, new in zip(blocks.unpack(solution.value), image, strict=True):
        residual, size = (new - part).flatten(1).norm(dim=1), new.flatten(1).norm(dim=1)
        assert bool((residual <= 1e-4 * size * (1 + 1e-9)).all())


# Bad use


@pytest.mark.parametrize("solver", {type(s): s for s in ALL}.values(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_step": 3}, TypeError, "max_step"),
        ({"max_steps": -1}, ValueError, r"\(max_steps=-1\): must be an integer >= 0"),
        ({"max_steps": 2.5}, TypeError, r"\(max_steps=2.5\): must be an integer"),
        ({"max_steps": True}, TypeError, r"\(max_steps=True\): must be an integer"),
        ({"rtol": -1e-3}, ValueError, r"\(rtol=-0.001\): must be >= 0"),
        ({"rtol": "1e-3"}, TypeError, r"\(rtol='1e-3'\): must be a number"),
        ({"rtol": None}, TypeError, r"\(rtol=None\): must be a number"),
        ({"atol": math.nan}, ValueError, r"\(atol=nan\): must be >= 0"),
        ({"patience": 0}, ValueError, r"\(patience=0\): must be >= 1, or None"),
        ({"patience": 2.5}, TypeError, r"\(patience=2.5\): must be an integer or None"),
    ],
)
def test_a_bad_option_is_named(solver: eq.Solver, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        type(solver)(**fields)


@pytest.mark.parametrize("solver", [eq.Anderson, eq.Broyden, eq.LBFGS])
@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (0, ValueError, r"\(memory=0\): must be >= 1"),
        (2.5, TypeError, r"\(memory=2.5\): must be an integer"),
        (None, TypeError, r"\(memory=None\): must be an integer"),
    ],
)
def test_a_bad_memory_is_named(solver: Any, memory: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=solver.__name__ + message):
        solver(memory=memory)


def test_options_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        eq.Anderson(5)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        eq.Anderson().memory = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver="anderson"), TypeError, "such as Anderson"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Anderson), TypeError, "such as Anderson"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(0, 3)), ValueError, r"\(0, 3\).*must not be empty"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(2, 3).long()), TypeError, r"torch.int64; convert it"),
        (lambda: eq.fixed_point(lambda z: z[:, :1], torch.zeros(2, 3)), ValueError, r"\(2, 1\).*\(B, 3\).*must return"),
        (lambda: eq.fixed_point(lambda z: z[:1], torch.zeros(2, 3)), ValueError, "1 rows for a state of 2; .*keep"),
        (lambda: eq.fixed_point(lambda z: z.float(), torch.zeros(2, 3)), TypeError, "float32.*float64; convert"),
        (lambda: eq.fixed_point(lambda z: (z, z), torch.zeros(2, 3)), TypeError, "must be a Tensor .*got tuple"),
        (lambda: eq.fixed_point(lambda z, x: z, torch.zeros(2, 3), torch.ones(3, 3)), ValueError, "input 0 .*batch 2"),
    ],
)
def test_bad_use_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
