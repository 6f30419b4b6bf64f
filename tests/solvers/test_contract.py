"""What every solver promises; a new one joins by one line in SOLVERS."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, TanhCell
from torch import Tensor

import equipoise as eq
from equipoise.map import Map

SOLVERS: tuple[eq.Solver, ...] = (
    eq.Picard(),
    eq.Picard(damping=0.7),
    eq.Anderson(),
    eq.Anderson(memory=3, mixing=0.8),
    eq.Broyden(memory=60),
    eq.Broyden(memory=4),
    eq.SteadyState(),
)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
CONTRACTIONS = (problems.affine, problems.two_scales, problems.scalar)
EXPANSIONS_SOLVED_BY = (eq.Anderson(), eq.Broyden(memory=60), eq.SteadyState())


def tight(solver: eq.Solver, rtol: float = 1e-11) -> eq.Solver:
    return dataclasses.replace(solver, max_steps=400, rtol=rtol)


def solve(solver: eq.Solver, problem: Problem, **options: Any) -> eq.Solution[Any]:
    return eq.fixed_point(problem.f, problem.z0, *problem.inputs, solver=solver, params=(), **options)


def flat(state: Any) -> Tensor:
    parts = state if isinstance(state, tuple) else (state,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


class Graded:
    """tanh maps whose samples differ in how fast they converge; counts calls and the rows in them."""

    def __init__(self, batch: int = 8, d: int = 6) -> None:
        self.cell, self.calls, self.rows = TanhCell(d, norm=1.0), 0, 0
        self.z0, self.x = torch.zeros(batch, d), torch.randn(batch, d)
        self.gain = torch.linspace(0.02, 0.97, batch)[:, None]

    def __call__(self, z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(z)
        return torch.tanh(gain * (z @ self.cell.w.T) + x).detach()

    def solve(self, solver: eq.Solver, rows: Any = slice(None), *, closure: bool = False) -> eq.Solution[Tensor]:
        self.calls = self.rows = 0
        z0, x, gain = self.z0[rows], self.x[rows], self.gain[rows]
        if closure:
            with torch.no_grad():  # else one more evaluation asks whether the closure depends on something
                return eq.fixed_point(lambda z: self(z, x, gain), z0, solver=solver)
        return eq.fixed_point(self, z0, x, gain, solver=solver, params=())


# Answers


@every_solver
@pytest.mark.parametrize("make", CONTRACTIONS, ids=lambda make: make.__name__)
def test_finds_the_fixed_point_of_a_contraction(solver: eq.Solver, make: Any) -> None:
    problem = make()
    solution = solve(tight(solver, 1e-10), problem).raise_for_status()
    torch.testing.assert_close(solution.value, problem.expected, rtol=1e-7, atol=1e-8)
    again = problem.f(solution.value, *problem.inputs)
    torch.testing.assert_close(
        solution.residual, (flat(again) - flat(solution.value)).norm(dim=1), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("solver", EXPANSIONS_SOLVED_BY, ids=str)
def test_finds_the_fixed_point_of_an_expanding_rotation(solver: eq.Solver) -> None:
    problem = problems.rotation()
    solution = solve(tight(solver), problem).raise_for_status()
    torch.testing.assert_close(solution.value, problem.expected, rtol=1e-8, atol=1e-9)


def test_a_dict_is_solved_like_the_tuple_of_its_values() -> None:
    problem = problems.two_scales()

    def f(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        u, v = problem.f((z["u"], z["v"]), x)
        return {"u": u, "v": v}

    start = dict(zip("uv", problem.z0, strict=True))
    solution = eq.fixed_point(f, start, *problem.inputs, solver=tight(eq.Anderson()), params=())
    torch.testing.assert_close(solution.value, dict(zip("uv", problem.expected, strict=True)), rtol=1e-8, atol=1e-8)


@every_solver
def test_a_warm_start_is_where_the_solve_begins(solver: eq.Solver) -> None:
    problem = problems.affine()
    cold = solve(tight(solver), problem)
    warm = solve(tight(solver), dataclasses.replace(problem, z0=cold.value))
    assert warm.num_evals == 1
    assert warm.num_steps.tolist() == [1] * len(problem.z0)
    torch.testing.assert_close(warm.value, cold.value, rtol=0, atol=0)


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


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(8)), chosen=st.integers(0, len(SOLVERS) - 1), steps=st.integers(1, 12))
def test_permuting_the_batch_permutes_the_answer(order: list[int], chosen: int, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    graded, solver = Graded(), dataclasses.replace(SOLVERS[chosen], max_steps=steps, rtol=1e-3)
    straight, permuted = graded.solve(solver), graded.solve(solver, order)
    torch.testing.assert_close(permuted.value, straight.value[order], rtol=1e-10, atol=1e-12)
    assert permuted.status.tolist() == straight.status[order].tolist()
    assert permuted.num_steps.tolist() == straight.num_steps[order].tolist()


@every_solver
def test_samples_leave_the_batch_when_inputs_are_named(solver: eq.Solver) -> None:
    graded, solver = Graded(batch=32), tight(solver, 1e-6)
    steps = graded.solve(solver, closure=True).num_steps
    assert graded.calls == int(steps.max())
    assert graded.rows == 32 * graded.calls, "a closure cannot be shown fewer rows"
    named = graded.solve(solver)
    assert named.num_steps.tolist() == steps.tolist()
    # Rows leave when at most half of those present run: less than twice the sum of steps.
    assert int(steps.sum()) <= graded.rows < min(2 * int(steps.sum()), 32 * int(steps.max()))


@every_solver
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_sample_keeps_its_best_finite_iterate_and_disturbs_no_other(
    solver: eq.Solver, poison: float
) -> None:
    graded, solver = Graded(), tight(solver, 1e-6)
    clean = graded.solve(solver)
    broken = torch.zeros(8, 1)
    broken[2] = 1

    def f(z: Tensor, x: Tensor, gain: Tensor, broken: Tensor) -> Tensor:
        inside = z.norm(dim=1, keepdim=True) == 0  # only the first evaluation is finite
        return torch.where((broken == 0) | inside, graded(z, x, gain), poison)

    solution = eq.fixed_point(f, graded.z0, graded.x, graded.gain, broken, solver=solver, params=(), trace=True)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert solution.status[2] == eq.Status.NONFINITE
    torch.testing.assert_close(solution.value[2], torch.zeros(6))
    torch.testing.assert_close(solution.residual[2], torch.tanh(graded.x[2]).norm())
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-10, atol=1e-12)
    assert solution.num_steps[others].tolist() == clean.num_steps[others].tolist()
    with pytest.raises(eq.ConvergenceError, match=r"NONFINITE: 1 of 8 samples \(2\).*check its inputs"):
        solution.raise_for_status()


@every_solver
def test_a_start_that_is_not_finite_is_named(solver: eq.Solver) -> None:
    problem = problems.affine()
    problem.z0[1, 0] = math.nan
    solution = solve(tight(solver), problem)
    assert solution.status.tolist() == [0, eq.Status.NONFINITE, 0, 0, 0]
    torch.testing.assert_close(solution.value[[0, 2, 3, 4]], problem.expected[[0, 2, 3, 4]])
    assert solution.residual[1] == math.inf


# Statuses


@every_solver
def test_running_out_of_steps_is_a_status(solver: eq.Solver) -> None:
    solution = Graded().solve(dataclasses.replace(solver, max_steps=3, rtol=1e-6))
    unfinished = (solution.status == eq.Status.MAX_STEPS).nonzero().flatten().tolist()
    assert unfinished
    assert solution.num_steps[unfinished].tolist() == [3] * len(unfinished)
    with pytest.raises(eq.ConvergenceError, match=rf"MAX_STEPS: {len(unfinished)} of 8 .*raise max_steps"):
        solution.raise_for_status()


@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson(), eq.Broyden(memory=60)], ids=str)
def test_stalled_after_patience_without_a_better_point(solver: eq.Solver) -> None:
    script = Scripted([[3.0, 1.0, *[2.0] * 40]] * 2)
    patient = dataclasses.replace(solver, patience=4, max_steps=40, rtol=0.0, atol=1e-3)
    with torch.no_grad():
        solution = eq.fixed_point(script, torch.zeros(2, 4), solver=patient)
    assert solution.status.tolist() == [eq.Status.STALLED] * 2
    assert solution.num_steps.tolist() == [6, 6]
    with pytest.raises(eq.ConvergenceError, match="STALLED: 2 of 2"):
        solution.raise_for_status()


def test_diverged_keeps_the_best_iterate() -> None:
    problem = problems.rotation(radius=30.0)
    solution = solve(eq.Picard(max_steps=60, rtol=0.0, atol=1e-3), problem)
    assert solution.status.tolist() == [eq.Status.DIVERGED] * 3
    assert solution.num_steps.tolist() == [7] * 3, "30^6 > 1e8 > 30^5"
    torch.testing.assert_close(solution.value, problem.z0)
    with pytest.raises(eq.ConvergenceError, match=r"DIVERGED: 3 of 3 .*does not contract"):
        solution.raise_for_status()


# Counts


@every_solver
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 100])
def test_reported_evaluations_equal_counted_calls(solver: eq.Solver, steps: int) -> None:
    graded = Graded()
    solution = graded.solve(dataclasses.replace(solver, max_steps=steps))
    assert solution.num_evals == graded.calls <= steps
    assert solution.num_vjps == 0
    assert int(solution.num_steps.max()) == graded.calls
    if steps == 0:
        torch.testing.assert_close(solution.value, graded.z0)
        assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 8


@every_solver
def test_converged_means_within_the_tolerance_at_the_returned_point(solver: eq.Solver) -> None:
    graded = Graded()
    solution = graded.solve(dataclasses.replace(solver, max_steps=200, rtol=0.0, atol=1e-5)).raise_for_status()
    found = (graded(solution.value, graded.x, graded.gain) - solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, found)
    assert bool((found <= 1e-5).all())
    relative = graded.solve(dataclasses.replace(solver, max_steps=200, rtol=1e-5)).raise_for_status()
    image = graded(relative.value, graded.x, graded.gain)
    assert bool(((image - relative.value).norm(dim=1) <= 1e-5 * image.norm(dim=1)).all())


# The best iterate


class Scripted:
    """A map whose residual, whatever the state, follows a script of lengths: the best evaluation is known."""

    def __init__(self, lengths: list[list[float]]) -> None:
        self.lengths, self.call, self.seen = torch.tensor(lengths), 0, []

    def __call__(self, z: Tensor) -> Tensor:
        self.seen.append(z.clone())
        self.call += 1
        direction = torch.nn.functional.one_hot(torch.tensor(self.call % z.shape[1]), z.shape[1])
        return z + self.lengths[:, self.call - 1, None] * direction


@every_solver
@torch.no_grad()
def test_the_best_iterate_is_returned_and_not_the_last(solver: eq.Solver) -> None:
    script = Scripted([[4.0, 3.0, 1.0, 5.0, 2.0], [4.0, 0.5, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    solution = eq.fixed_point(script, torch.zeros(3, 4), solver=dataclasses.replace(solver, max_steps=5, rtol=0.0))
    assert solution.residual.tolist() == [1.0, 0.5, 1.0]
    torch.testing.assert_close(solution.value[0], script.seen[2][0])
    torch.testing.assert_close(solution.value[1], script.seen[1][1])
    torch.testing.assert_close(solution.value[2], script.seen[0][2])


def test_best_is_the_least_error_in_units_of_the_tolerance() -> None:
    # |r| = 1 at |f(z)| = 1, then |r| = 2 at |f(z)| = 1000, which alone meets rtol = 0.01.
    def f(z: Tensor) -> Tensor:
        return torch.where(z == 0, 1.0, torch.where(z == 1, 1000.0, torch.where(z == 1000, 1002.0, 2000.0)))

    solution = eq.fixed_point(f, torch.zeros(1, 1), solver=eq.Picard(max_steps=3, rtol=0.01))
    assert solution.status.tolist() == [eq.Status.CONVERGED]
    assert solution.value.item() == 1000.0


@pytest.mark.parametrize("memory", [40, 5], ids=["whole", "restarting"])
def test_the_inverse_belongs_to_the_returned_iterate_sample_by_sample(memory: int) -> None:
    graded = Graded()
    solver = eq.Broyden(max_steps=5, memory=memory, rtol=1e-3)
    solution = graded.solve(solver)
    assert len(set(solution.num_steps.tolist())) > 1
    dense = solution.inverse.dense()
    for row in range(8):
        alone = graded.solve(dataclasses.replace(solver, max_steps=int(solution.num_steps[row])), [row])
        torch.testing.assert_close(dense[row], alone.inverse.dense()[0], rtol=1e-9, atol=1e-10)


def test_the_inverse_is_as_it_was_at_a_best_iterate_in_the_past() -> None:
    graded = Graded()
    early = graded.solve(eq.Broyden(max_steps=4, memory=40, rtol=0.0), [6])
    # From the fifth evaluation on the map is worse than ever: the fourth point stays the best.
    calls = 0

    def f(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return graded(z, x, gain) + (100.0 * calls if calls > 4 else 0.0)

    late = eq.fixed_point(
        f, graded.z0[[6]], graded.x[[6]], graded.gain[[6]], solver=eq.Broyden(max_steps=9, memory=40, rtol=0), params=()
    )
    torch.testing.assert_close(late.value, early.value)
    torch.testing.assert_close(late.inverse.dense(), early.inverse.dense())


def test_the_trace_is_kept_on_request_only() -> None:
    graded = Graded()
    assert graded.solve(eq.Anderson()).trace is None
    solver = eq.Anderson(max_steps=6, rtol=0.0)
    solution = eq.fixed_point(graded, graded.z0, graded.x, graded.gain, solver=solver, params=(), trace=True)
    assert solution.trace.shape == (6, 8)
    torch.testing.assert_close(solution.trace.amin(dim=0), solution.residual)
    torch.testing.assert_close(solution.trace[0], torch.tanh(graded.x).norm(dim=1))


# Modes


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_kept(solver: eq.Solver, dtype: torch.dtype) -> None:
    problem = problems.affine()
    problem = dataclasses.replace(problem, z0=problem.z0.to(dtype), inputs=(problem.inputs[0].to(dtype),))
    solution = solve(tight(solver, 1e-5), problem).raise_for_status()
    assert solution.value.dtype == solution.residual.dtype == dtype
    torch.testing.assert_close(solution.value.double(), problem.expected, rtol=1e-3, atol=1e-3)


@every_solver
def test_under_autocast_the_map_computes_in_bfloat16_and_the_solver_does_not(solver: eq.Solver) -> None:
    cell, seen = TanhCell(norm=0.5).float(), set()

    def f(z: Tensor, x: Tensor) -> Tensor:
        product = z @ cell.w.T
        seen.add((z.dtype, product.dtype))
        return torch.tanh(product + x).detach()

    x = torch.randn(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        solution = eq.fixed_point(
            f, torch.zeros_like(x), x, solver=dataclasses.replace(solver, max_steps=40), params=()
        )
    assert seen == {(torch.float32, torch.bfloat16)}
    assert solution.value.dtype == solution.residual.dtype == torch.float32
    exact = eq.fixed_point(f, torch.zeros_like(x), x, solver=tight(eq.Anderson(), 1e-6), params=())
    torch.testing.assert_close(solution.value, exact.value, rtol=0.02, atol=0.02)


@every_solver
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
        return torch.tanh(0.4 * z.roll(1, 3) - 0.3 * z.roll(1, 1) + x)

    plain, strided = (
        eq.fixed_point(f, torch.zeros_like(t), t, solver=tight(solver), params=()).raise_for_status()
        for t in (x, other)
    )
    torch.testing.assert_close(strided.value, plain.value, rtol=1e-9, atol=1e-10)
    assert strided.num_steps.tolist() == plain.num_steps.tolist()


@pytest.mark.gpu
@every_solver
def test_a_device_gives_the_answers_of_the_host(solver: eq.Solver) -> None:
    problem = problems.affine()
    expected = solve(tight(solver), problem)
    a = torch.stack([problem.f(row[None], torch.zeros(1, 6))[0] for row in torch.eye(6)]).cuda()
    (x,) = (t.cuda() for t in problem.inputs)
    found = eq.fixed_point(lambda z, x: z @ a + x, problem.z0.cuda(), x, solver=tight(solver), params=())
    torch.testing.assert_close(found.value.cpu(), expected.value, rtol=1e-9, atol=1e-10)
    assert found.num_steps.tolist() == expected.num_steps.tolist()


# Blocks and projections


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.supports_projection], ids=str)
def test_every_point_of_a_projected_map_is_feasible(solver: eq.Solver) -> None:
    problem, seen = problems.affine(), []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z)
        return problem.f(z, x).clamp(-0.5, 0.5)

    projected = Map(f, problem.z0, problem.inputs, params=(), projection=lambda z: z.clamp(-0.5, 0.5))
    solution = tight(solver, 1e-9).solve(projected, problem.z0 + 3)
    assert all(bool((z.abs() <= 0.5).all()) for z in seen)
    assert bool((solution.status == eq.Status.CONVERGED).all())
    reference = problem.z0
    for _ in range(300):
        reference = problem.f(reference, *problem.inputs).clamp(-0.5, 0.5)
    torch.testing.assert_close(solution.value, reference, rtol=1e-6, atol=1e-7)


@every_solver
def test_a_sample_converges_when_each_block_does(solver: eq.Solver) -> None:
    problem = problems.two_scales()
    blocks = Map(problem.f, problem.z0, problem.inputs, params=(), blocks=(1, 6))
    solution = tight(solver, 1e-4).solve(blocks, blocks.pack(problem.z0))
    assert bool((solution.status == eq.Status.CONVERGED).all())
    image = problem.f(blocks.unpack(solution.value), *problem.inputs)
    for part, new in zip(blocks.unpack(solution.value), image, strict=True):
        residual, size = (new - part).flatten(1).norm(dim=1), new.flatten(1).norm(dim=1)
        assert bool((residual <= 1e-4 * size).all())


# Bad use


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eq.Anderson(memroy=3), TypeError, "memroy"),
        (lambda: eq.Picard(max_steps=-1), ValueError, r"Picard\(max_steps=-1\): must be an integer >= 0"),
        (lambda: eq.Picard(max_steps=2.5), ValueError, r"max_steps=2.5"),
        (lambda: eq.Anderson(rtol=-1e-3), ValueError, r"Anderson\(rtol=-0.001\): must be >= 0"),
        (lambda: eq.Broyden(atol=math.nan), ValueError, r"Broyden\(atol=nan\)"),
        (lambda: eq.Anderson(patience=0), ValueError, r"patience=0\): must be >= 1"),
        (lambda: eq.Anderson(memory=0), ValueError, r"memory=0\): must be >= 1"),
        (lambda: eq.Anderson(mixing=0.0), ValueError, r"mixing=0.0\): must lie in \(0, 1\]"),
        (lambda: eq.Anderson(ridge=-1.0), ValueError, r"ridge=-1.0"),
        (lambda: eq.Anderson(growth=1.0), ValueError, r"growth=1.0\): must be > 1"),
        (lambda: eq.Picard(damping=1.5), ValueError, r"damping=1.5\): must lie in \(0, 1\]"),
        (lambda: eq.Picard(lipschitz=1.0), ValueError, r"lipschitz=1.0\): must lie in \[0, 1\)"),
        (lambda: eq.Broyden(memory=0), ValueError, r"memory=0"),
        (lambda: eq.Broyden(guard=-1.0), ValueError, r"guard=-1.0"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver="anderson"), TypeError, "such as Anderson"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Anderson), TypeError, "such as Anderson"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(0, 3)), ValueError, "empty"),
        (lambda: eq.fixed_point(lambda z: z[:, :1], torch.zeros(2, 3)), ValueError, r"\(2, 1\).*\(B, 3\)"),
        (lambda: eq.fixed_point(lambda z: z.float(), torch.zeros(2, 3)), (TypeError, ValueError), "float32"),
        (lambda: eq.fixed_point(lambda z: (z, z), torch.zeros(2, 3)), (TypeError, ValueError), "tuple"),
    ],
)
def test_bad_use_is_named(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_broyden_refuses_a_projected_map() -> None:
    problem = problems.affine()
    f = Map(problem.f, problem.z0, problem.inputs, params=(), projection=lambda z: z.clamp(-1, 1))
    with pytest.raises(ValueError, match=r"Broyden cannot follow a projected map; use Anderson or Picard"):
        eq.Broyden().solve(f, problem.z0)
