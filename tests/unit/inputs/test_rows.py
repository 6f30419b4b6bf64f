"""Every sample is a problem of its own; counts, memory, containers, masks, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from input_problems import Cell, fitting
from torch import Tensor, nn

import equipoise as eq
from equipoise.constraints import Box, L2Ball
from equipoise.inputs import GaussSeidel, Joint, Nested

SOLVER = eq.Anderson(memory=6, max_steps=200, rtol=1e-7)


@pytest.mark.parametrize("step_size", [0.1, None])
def test_a_sample_gets_what_it_gets_alone_and_in_any_order(step_size: float | None) -> None:
    problem = fitting(rows=5)
    ball = L2Ball(radius=0.5, center=0.1 * torch.randn(5, 4))
    order = torch.tensor([3, 0, 4, 2, 1])

    def solve(rows: Tensor) -> eq.inputs.InputSolution:
        return eq.optimize_inputs(
            problem.cell,
            z0=torch.zeros(len(rows), 12),
            x0=torch.zeros(len(rows), 4),
            cost=problem.cost,
            targets=(problem.y[rows],),
            constraint=ball.on([ball.center[rows]]),
            step_size=step_size,
            solver=SOLVER,
        )

    whole = solve(torch.arange(5))
    for rows in (order, torch.tensor([2])):
        part = solve(rows)
        for got, wanted in zip(part.value, whole.value, strict=True):
            torch.testing.assert_close(got, wanted[rows], rtol=1e-6, atol=1e-7)
        assert part.num_steps.tolist() == whole.num_steps[rows].tolist()
        torch.testing.assert_close(part.cost, whole.cost[rows])
        torch.testing.assert_close(part.step_size, whole.step_size[rows])


def test_nan_stops_its_row_only() -> None:
    problem = fitting(rows=3, norm=0.5, rho=0.3)
    y = problem.y.clone()
    y[1] = torch.nan
    for step_size in (0.1, None):
        given = problem.arguments | {"step_size": step_size, "solver": SOLVER}
        with torch.no_grad():
            broken = eq.optimize_inputs(problem.cell, **given | {"targets": (y,)})
            sound = eq.optimize_inputs(problem.cell, **given)
        assert broken.status.tolist() == [0, eq.Status.NONFINITE, 0]
        assert bool(broken.value[2].isfinite().all())
        assert bool(broken.step_size.isfinite().all())
        for got, wanted in zip(broken.value, sound.value, strict=True):
            torch.testing.assert_close(got[[0, 2]], wanted[[0, 2]], rtol=1e-6, atol=1e-7)


def test_an_infeasible_start_is_projected_and_reported() -> None:
    problem = fitting(rows=3)
    x0 = torch.stack([torch.zeros(4), torch.full((4,), 9.0), torch.tensor([0.2, 0.0, 0.0, 0.0])])
    seen = []

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.detach())
        return problem.cost(z, x, y)

    given = problem.arguments | {"x0": x0, "cost": cost}
    solution = eq.optimize_inputs(
        problem.cell, **given, constraint=L2Ball(radius=0.5), step_size=0.1, solver=SOLVER, params=(), equilibrium=None
    )
    assert solution.infeasible_start.tolist() == [False, True, False]
    assert all(float(x.norm(dim=1).max()) <= 0.5 * (1 + 1e-6) for x in seen)


def test_a_row_that_ends_above_its_start_gets_it_back() -> None:
    problem = fitting(rows=3, rho=0.0)  # a long step saturates the cell, where there is no slope to come back by
    with torch.no_grad():
        solution = eq.optimize_inputs(
            problem.cell,
            **problem.arguments,
            step_size=1e3,
            solver=eq.Picard(max_steps=12, rtol=0.0),
        )
        start = eq.fixed_point(problem.cell, torch.zeros(3, 12), torch.zeros(3, 4), solver=SOLVER).value
        before = problem.cost(start, torch.zeros(3, 4), problem.y)
    assert solution.cost is not None
    assert bool((solution.cost <= before * (1 + 1e-4)).all())
    back = solution.status == eq.Status.DIVERGED
    assert bool(back.any())
    assert float(solution.value[2][back].abs().max()) == 0.0


def test_a_short_step_does_not_pass_for_convergence() -> None:
    problem = fitting(rows=2, norm=0.5, rho=0.3)
    tiny = eq.optimize_inputs(
        problem.cell, **problem.arguments, step_size=1e-7, solver=eq.Picard(max_steps=150, rtol=1e-2)
    )
    assert tiny.status.tolist() == [eq.Status.STALLED] * 2
    usual = eq.optimize_inputs(problem.cell, **problem.arguments, step_size=0.2, solver=SOLVER)
    assert bool(usual.converged.all())


def test_c11_no_fixed_point_and_expansion() -> None:
    given: dict[str, Any] = {
        "z0": torch.zeros(2, 3),
        "x0": torch.zeros(2, 3),
        "cost": lambda z, x: (z - 1).square().sum(1),
        "params": (),
        "step_size": 0.1,
    }
    lost = eq.optimize_inputs(lambda z, x: z + 1 + 0 * x, **given)
    assert not bool(lost.converged.any())
    assert all(bool(part.isfinite().all()) for part in lost.value)
    blown = eq.optimize_inputs(lambda z, x: 1.5 * z + x + 1, **given, solver=eq.Picard(max_steps=200), equilibrium=None)
    assert blown.status.tolist() == [eq.Status.DIVERGED] * 2
    found = eq.optimize_inputs(
        lambda z, x: 1.5 * z + x + 1, **given, solver=eq.Anderson(memory=9, max_steps=200, rtol=1e-9)
    )
    if bool(found.converged.all()):
        torch.testing.assert_close(found.value[0], torch.ones(2, 3))


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize("schedule", [Joint(), GaussSeidel(), Nested(steps=3)], ids=str)
def test_c7_counts_are_exact(schedule: eq.inputs.Schedule, steps: int) -> None:
    calls = {"cell": 0, "pulls": 0, "cost": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            calls["pulls"] += 1
            return g

    problem = fitting()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        calls["cell"] += 1
        return Counted.apply(problem.cell(z, x))

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        calls["cost"] += 1
        return problem.cost(z, x, y)

    for step_size, equilibrium in ((0.1, None), (None, SOLVER)):
        calls.update(cell=0, pulls=0, cost=0)
        with torch.no_grad():
            solution = eq.optimize_inputs(
                cell,
                **problem.arguments | {"cost": cost},
                params=(),
                step_size=step_size,
                equilibrium=equilibrium,
                schedule=schedule,
                solver=eq.Anderson(max_steps=steps, rtol=0.0),
            )
        assert (solution.num_evals, solution.num_vjps) == (calls["cell"], calls["pulls"])
        if step_size is not None:
            inner = getattr(schedule, "steps", 1)
            assert calls["cell"] == steps * inner
            assert calls["pulls"] == steps * (inner + isinstance(schedule, GaussSeidel))
            assert calls["cost"] == steps + 1  # and once for the cost of the answer


@pytest.mark.slow
def test_c9_no_graph_is_kept_from_round_to_round() -> None:
    problem = fitting()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def cell(z: Tensor, x: Tensor) -> Tensor:
        nonlocal most
        out = problem.cell(z, x)
        alive.append(weakref.ref(out))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return out

    eq.optimize_inputs(
        cell,
        **problem.arguments,
        params=(),
        step_size=0.1,
        equilibrium=None,
        solver=eq.Anderson(max_steps=8, rtol=0.0),
    )
    assert most <= 2


class Noisy(nn.Module):
    """A cell with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = Cell(12, 4, 0.5), eq.nn.VariationalDropout(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.drop(self.inner(z, x))


def test_one_mask_serves_solve_second_look_and_gradient() -> None:
    problem = fitting(rho=0.3)
    cell = Noisy()
    solution = eq.optimize_inputs(
        cell, **problem.arguments, solver=dataclasses.replace(SOLVER, rtol=1e-9)
    ).raise_for_status()
    torch.testing.assert_close(solution.cost, solution.joint_cost, rtol=1e-6, atol=1e-8)
    assert solution.stationarity is not None
    assert float(solution.stationarity.max()) < 1e-5
    z = solution.value[0]
    dropped = z == 0
    assert bool(dropped.any())
    assert not bool(dropped.all())
    z.square().sum().backward()
    assert bool((cell.inner.w.grad != 0).any())


def test_states_and_inputs_may_be_containers() -> None:
    target = torch.randn(2, 3)

    def cell(z: dict[str, Tensor], x: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"a": 0.5 * z["a"] + x[0], "b": 0.3 * z["b"].tanh() + 0.1 * z["a"][:, :, None] + x[1][:, None, None]}

    solution = eq.optimize_inputs(
        cell,
        z0={"a": torch.zeros(2, 3), "b": torch.zeros(2, 3, 2)},
        x0=(torch.zeros(2, 3), torch.zeros(2)),
        cost=lambda z, x, target: (z["a"] - target).square().sum(1) + z["b"].square().sum((1, 2)),
        targets=(target,),
        params=(),
        solver=eq.Anderson(memory=10, max_steps=200, rtol=1e-8),
    ).raise_for_status()
    z, mu, (shift, level) = solution.value
    assert sorted(mu) == ["a", "b"]
    torch.testing.assert_close(2 * shift, z["a"], rtol=1e-5, atol=1e-6)
    assert level.shape == (2,)


def test_an_input_may_be_shared_by_the_states_of_its_task() -> None:
    tasks, images, n, p = 3, 5, 6, 2
    inner = Cell(n, p, 0.6)
    y = torch.randn(tasks, images, n)

    def cell(z: Tensor, context: Tensor) -> Tensor:
        return inner(z, context[:, None].expand(-1, images, -1))

    solution = eq.optimize_inputs(
        cell,
        z0=torch.zeros(tasks, images, n),
        x0=torch.zeros(tasks, p),
        cost=lambda z, x, y: (z - y).square().sum((1, 2)) + 0.1 * x.square().sum(1),
        targets=(y,),
        params=list(inner.parameters()),
        solver=eq.Anderson(memory=10, max_steps=200, rtol=1e-9),
    ).raise_for_status()
    z, _, x = solution.value
    assert x.shape == (tasks, p)
    # Images differ by targets alone, so each task has one state, that of the mean target.
    torch.testing.assert_close(z, z[:, :1].expand_as(z), rtol=1e-6, atol=1e-7)
    mean = eq.optimize_inputs(
        inner,
        z0=torch.zeros(tasks, n),
        x0=torch.zeros(tasks, p),
        cost=lambda z, x, y: images * (z - y).square().sum(1) + 0.1 * x.square().sum(1),
        targets=(y.mean(1),),
        params=(),
        solver=eq.Anderson(memory=10, max_steps=200, rtol=1e-9),
    ).raise_for_status()
    torch.testing.assert_close(x, mean.value[2], rtol=1e-6, atol=1e-7)


def test_a_trace_is_kept_on_request() -> None:
    problem = fitting()
    given = problem.arguments | {"step_size": 0.1, "solver": eq.Anderson(max_steps=6, rtol=0.0), "equilibrium": None}
    assert eq.optimize_inputs(problem.cell, **given).trace is None
    trace = eq.optimize_inputs(problem.cell, **given, trace=True).trace
    assert trace is not None
    assert trace.shape == (6, 3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"step_size": 0.0}, ValueError, r"step_size=0.0: must be positive and finite, or None to measure it"),
        ({"step_size": torch.ones(2)}, ValueError, r"step_size has shape \(2,\); give one number, or"),
        ({"solver": "anderson"}, TypeError, r"solver must be a solver such as Anderson\(\), got 'anderson'"),
        ({"schedule": "joint"}, TypeError, r"schedule must be a schedule such as Joint\(\) or Nested\(\), got 'joint'"),
        ({"gradient": "full"}, TypeError, r"gradient must be a gradient such as Implicit\(\), got 'full'"),
        ({"gradient": eq.Shine()}, ValueError, r"reads the solver's inverse, which is of another map"),
        ({"constraint": 1.0}, TypeError, r"constraint must be one of equipoise.constraints such as L2Ball"),
        ({"constraint": Box(lower=0.0), "x0": (torch.zeros(3, 4),)}, TypeError, r"a constraint needs x0 as one tensor"),
        ({"constraint": Box(lower=torch.zeros(3, 7))}, ValueError, r"the constraint's lower has shape \(3, 7\), which"),
        ({"x0": torch.zeros(2, 4)}, ValueError, r"x0 has 2 rows, z0 has 3; give each sample an input"),
        ({"x0": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, r"x0 must be floating point"),
        ({"cost": lambda z, x, y: z.sum()}, ValueError, r"cost must return one number per sample, \(3,\), got \(\)"),
        (
            {"regularizer": lambda x: x},
            ValueError,
            r"regularizer must return one number per sample, \(3,\), got \(3, 4",
        ),
        ({"targets": (torch.zeros(1, 6),)}, ValueError, r"input 0 has shape \(1, 6\), the state has batch 3"),
    ],
)
def test_errors_name_argument_value_and_remedy(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    problem = fitting()
    with pytest.raises(kind, match=message):
        eq.optimize_inputs(problem.cell, **problem.arguments | options)


@pytest.mark.parametrize("make", [lambda: Joint(damping=0.0), lambda: Joint(adjoint_damping=1.1)])
def test_dampings_lie_within_one(make: Any) -> None:
    with pytest.raises(ValueError, match=r"Joint\((adjoint_)?damping=.*\): must lie in \(0, 1\]"):
        make()


def test_a_round_has_a_step() -> None:
    with pytest.raises(ValueError, match=r"Nested\(steps=1\): must be >= 2; with one step it is Joint"):
        Nested(steps=1)
