"""Rows of input optimization: independence, statuses, counts, memory, containers, masks, and messages."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from input_problems import Cell, fitting, optimize
from torch import Tensor, nn

import equipoise as eq
from equipoise.constraints import Box, L2Ball
from equipoise.core.solution import Status
from equipoise.inputs import GaussSeidel, InputOptimizer, InputSolution, Joint, Nested, UpdateScheme

SOLVER = eq.Anderson(memory=6, max_steps=200, rtol=1e-7)
TIGHT = dataclasses.replace(SOLVER, memory=10, rtol=1e-9)


@pytest.mark.parametrize("rows", [[3, 0, 4, 2, 1], [2]])
@pytest.mark.parametrize("step_size", [0.1, None])
@pytest.mark.thorough
def test_batch_independence(step_size: float | None, rows: list[int]) -> None:
    problem, center = fitting(rows=5), 0.1 * torch.randn(5, 4)

    def solve(rows: list[int]) -> InputSolution:
        part = dataclasses.replace(problem, y=problem.y[rows])
        ball = L2Ball(radius=0.5, center=center[rows])
        return part.solve(constraint=ball, step_size=step_size, solver=SOLVER)

    whole, part = solve(list(range(5))), solve(rows)
    for found, expected in zip(part.value, whole.value, strict=True):
        torch.testing.assert_close(found, expected[rows], rtol=1e-6, atol=1e-7)
    for name in ("num_steps", "cost", "step_size"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows])


@torch.no_grad()
@pytest.mark.parametrize("step_size", [0.1, None])
def test_nan_stops_its_row_only(step_size: float | None) -> None:
    problem = fitting(rows=3, norm=0.5, rho=0.3)
    y = problem.y.clone()
    y[1] = torch.nan
    broken, sound = (problem.solve(targets=(t,), step_size=step_size, solver=SOLVER) for t in (y, problem.y))
    assert broken.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert bool(broken.value[2].isfinite().all())
    assert bool(broken.step_size.isfinite().all())
    for found, expected in zip(broken.value, sound.value, strict=True):
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-7)


def test_infeasible_start() -> None:
    """The start is projected and reported; no input outside of the set reaches the cost."""
    problem, largest = fitting(rows=3), []
    x0 = torch.stack([torch.zeros(4), torch.full((4,), 9.0), torch.tensor([0.2, 0.0, 0.0, 0.0])])

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        largest.append(float(x.detach().norm(dim=1).max()))
        return problem.cost(z, x, y)

    ball = L2Ball(radius=0.5)
    given = {"step_size": 0.1, "solver": SOLVER, "params": (), "verify_solver": None}
    solution = problem.solve(x0=x0, cost=cost, constraint=ball, **given)
    assert solution.infeasible_start.tolist() == [False, True, False]
    assert max(largest) <= 0.5 * (1 + 1e-6)


@torch.no_grad()
def test_worse_answers_return_their_start() -> None:
    problem = fitting(rows=3, rho=0.0)  # a long step saturates the cell, where no gradient leads back
    solution = problem.solve(step_size=1e3, solver=eq.Picard(max_steps=12, rtol=0.0))
    start = eq.fixed_point(problem.cell, torch.zeros(3, 12), torch.zeros(3, 4), solver=SOLVER).value
    before = problem.cost(start, torch.zeros(3, 4), problem.y)
    assert bool((solution.cost <= before * (1 + 1e-4)).all())
    back = solution.status == Status.DIVERGED
    assert bool(back.any())
    assert float(solution.value[2][back].abs().max()) == 0.0


def test_short_steps_stall() -> None:
    problem = fitting(rows=2, norm=0.5, rho=0.3)
    tiny = problem.solve(step_size=1e-7, solver=eq.Picard(max_steps=150, rtol=1e-2))
    assert not bool(tiny.converged.any())
    assert bool(problem.solve(step_size=0.2, solver=SOLVER).converged.all())


@pytest.mark.parametrize(
    ("cell", "solver", "status"),
    [
        (lambda z, x: z + 1 + 0 * x, InputOptimizer().solver, None),  # without a fixed point
        (lambda z, x: 1.5 * z + x + 1, eq.Picard(max_steps=200), Status.DIVERGED),
        (lambda z, x: 1.5 * z + x + 1, eq.Anderson(memory=9, max_steps=200, rtol=1e-9), Status.CONVERGED),
    ],
)
@pytest.mark.thorough
def test_c11_expansive_maps(cell: Callable[..., Tensor], solver: eq.Solver, status: Status | None) -> None:
    found = optimize(
        cell,
        z0=torch.zeros(2, 3),
        x0=torch.zeros(2, 3),
        cost=lambda z, x: (z - 1).square().sum(1),
        params=(),
        step_size=0.1,
        solver=solver,
        verify_solver=None if status == Status.DIVERGED else eq.Anderson(max_steps=50, rtol=1e-5),
    )
    assert all(bool(part.isfinite().all()) for part in found.value)
    if status is None:
        assert not bool(found.converged.any())
    else:
        assert found.status.tolist() == [status] * 2
    if status == Status.CONVERGED:
        torch.testing.assert_close(found.value[0], torch.ones(2, 3))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("scheme", [Joint(), GaussSeidel(), Nested(steps=3)], ids=str)
@pytest.mark.parametrize(("step_size", "verify_solver"), [(0.1, None), (None, SOLVER)])
def test_c7_counts(scheme: UpdateScheme, steps: int, step_size: float | None, verify_solver: eq.Solver | None) -> None:
    problem, calls = fitting(), []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        out = problem.cell(z, x)
        calls.append("cell")
        if out.requires_grad:
            out.register_hook(lambda gradient: calls.append("product"))
        return out

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        calls.append("cost")
        return problem.cost(z, x, y)

    given = {"scheme": scheme, "step_size": step_size, "verify_solver": verify_solver}
    solution = problem.solve(cell, cost=cost, params=(), solver=eq.Anderson(max_steps=steps, rtol=0.0), **given)
    # A closure is evaluated once more to see all rows together, which is not counted.
    assert calls.count("cell") - solution.num_evals == calls.count("product") - solution.num_vjps <= 1
    if step_size is not None:
        inner = getattr(scheme, "steps", 1)
        assert calls.count("cell") == steps * inner
        assert calls.count("product") == steps * (inner + isinstance(scheme, GaussSeidel))
        assert calls.count("cost") == steps + 1  # and once for the cost of the answer


def test_c9_graphs_are_freed() -> None:
    problem, results, alive = fitting(), [], []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        out = problem.cell(z, x)
        results.append(weakref.ref(out))
        gc.collect()  # of what this test made alone
        alive.append(sum(ref() is not None for ref in results))
        return out

    given = {"step_size": 0.1, "verify_solver": None, "solver": eq.Anderson(max_steps=4, rtol=0.0)}
    gc.freeze()
    problem.solve(cell, params=(), **given)
    gc.unfreeze()
    assert max(alive) <= 2


class Noisy(nn.Module):
    """A cell with a dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = Cell(12, 4, 0.5), eq.nn.VariationalDropout(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.drop(self.inner(z, x))


def test_one_mask_for_solve_verification_and_gradient() -> None:
    problem, cell = fitting(rho=0.3), Noisy()
    solution = problem.solve(cell, solver=TIGHT).raise_for_status()
    torch.testing.assert_close(solution.cost, solution.joint_cost, rtol=1e-6, atol=1e-8)
    assert float(solution.stationarity.max()) < 1e-5
    z = solution.value[0]
    assert 0 < (z == 0).double().mean() < 1
    z.square().sum().backward()
    assert bool((cell.inner.w.grad != 0).any())


def test_containers() -> None:
    target, (gain, shift) = torch.randn(2, 3), ({"gain": torch.full((2, 1), 0.5)}, torch.rand(2, 3))

    def cell(z: dict[str, Tensor], x: tuple[Tensor, Tensor], scale: dict[str, Tensor]) -> dict[str, Tensor]:
        b = 0.3 * z["b"].tanh() + 0.1 * z["a"][:, :, None] + x[1][:, None, None]
        return {"a": scale["gain"] * z["a"] + x[0], "b": b}

    solution = optimize(
        cell,
        z0={"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, 2)},
        x0=(torch.zeros(2, 3), torch.zeros(2)),
        inputs=(gain,),
        cost=lambda z, x, t: (z["a"] - t[0] + t[1]).square().sum(1) + z["b"].square().sum((1, 2)),
        targets=((target + shift, shift),),
        params=(),
        solver=TIGHT,
    ).raise_for_status()
    z, mu, (found, level) = solution.value
    assert sorted(mu) == ["a", "b"]
    torch.testing.assert_close(2 * found, z["a"], rtol=1e-5, atol=1e-6)
    assert level.shape == (2,)


def test_shared_input() -> None:
    """One input for several states: they differ by targets alone, so a task has the state of its mean target."""
    tasks, images, n, p = 3, 5, 6, 2
    inner, y = Cell(n, p, 0.6), torch.randn(3, 5, 6)
    given = {"x0": torch.zeros(tasks, p), "params": list(inner.parameters()), "solver": TIGHT}
    z, _, x = optimize(
        lambda z, context: inner(z, context[:, None].expand(-1, images, -1)),
        z0=torch.zeros(tasks, images, n),
        cost=lambda z, x, y: (z - y).square().sum((1, 2)) + 0.1 * x.square().sum(1),
        targets=(y,),
        **given,
    ).value
    torch.testing.assert_close(z, z[:, :1].expand_as(z), rtol=1e-6, atol=1e-7)
    mean = optimize(
        inner,
        z0=torch.zeros(tasks, n),
        cost=lambda z, x, y: images * (z - y).square().sum(1) + 0.1 * x.square().sum(1),
        targets=(y.mean(1),),
        **given,
    ).raise_for_status()
    torch.testing.assert_close(x, mean.value[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trace", [False, True])
def test_trace(trace: bool) -> None:
    solver = eq.Anderson(max_steps=6, rtol=0.0)
    found = fitting().solve(step_size=0.1, solver=solver, verify_solver=None, trace=trace).trace
    assert (found.shape == (6, 3)) if trace else (found is None)


def test_steps_of_samples() -> None:
    steps = torch.tensor([0.05, 0.1, 0.2])
    assert torch.equal(fitting().solve(step_size=steps, solver=SOLVER).step_size, steps)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"step_size": 0.0}, ValueError, r"step_size=0.0: must be positive and finite, or None to measure it"),
        ({"step_size": torch.tensor([1.0, -1.0])}, ValueError, r"step_size=tensor.*: must be positive"),
        ({"step_size": torch.ones(2)}, ValueError, r"step_size has shape \(2,\); give one number, or"),
        ({"solver": "anderson"}, TypeError, r"solver must be a solver such as Anderson\(\), got 'anderson'"),
        ({"scheme": "joint"}, TypeError, r"scheme must be a scheme such as Joint\(\) or Nested\(\), got 'joint'"),
        ({"gradient": "full"}, TypeError, r"gradient must be a gradient such as Implicit\(\), got 'full'"),
        ({"verify_solver": 3}, TypeError, r"verify_solver must be a solver such as Anderson\(\), or None, got 3"),
        ({"gradient": eq.Shine()}, ValueError, r"reads the solver's inverse, which is of another map"),
        ({"constraint": 1.0}, TypeError, r"constraint must be one of equipoise.constraints such as L2Ball"),
        ({"constraint": Box(lower=0.0), "x0": (torch.zeros(3, 4),)}, TypeError, r"a constraint needs x0 as one tensor"),
        ({"constraint": Box(lower=torch.zeros(3, 7))}, ValueError, r"the constraint's lower has shape \(3, 7\), which"),
        ({"x0": torch.zeros(2, 4)}, ValueError, r"x0 has 2 rows, z0 has 3; give each sample an input"),
        ({"x0": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, r"x0 must be floating point"),
        ({"cost": lambda z, x, y: z.sum()}, ValueError, r"cost must return one number per sample, \(3,\), got \(\)"),
        ({"regularizer": lambda x: x}, ValueError, r"regularizer must return one number per sample, \(3,\), got \(3, "),
        ({"targets": (torch.zeros(1, 6),)}, ValueError, r"input 0 has shape \(1, 6\), the state has batch 3"),
    ],
)
def test_messages(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fitting().solve(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Joint(damping=0.0), r"Joint.damping=0.0: must be > 0 and <= 1"),
        (lambda: Joint(adjoint_damping=1.1), r"Joint.adjoint_damping=1.1: must be > 0 and <= 1"),
        (lambda: Nested(steps=1), r"Nested.steps=1: must be >= 2; with one step it is Joint"),
    ],
)
def test_scheme_messages(make: Callable[[], UpdateScheme], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
