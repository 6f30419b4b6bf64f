"""What is found: closed forms, the nested optimum, and what may not change it.

The names C1, C2, ... are those of the checks in the specification of joint inference and input optimization.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from input_problems import Cell, fitting
from torch import Tensor

import equipoise as eq
from equipoise.constraints import Box, L2Ball, LInfBall, Proximal
from equipoise.inputs import GaussSeidel, Joint, Nested, Schedule

TIGHT = eq.Anderson(memory=10, max_steps=400, rtol=1e-11)
SCHEDULES: list[Schedule] = [Joint(), Joint(damping=0.8, adjoint_damping=0.6), GaussSeidel(), Nested()]


def scalar(w: Tensor | float = 0.5, **options: object) -> eq.inputs.InputSolution:
    given = {"step_size": 0.1, "solver": TIGHT, "params": (w,) if isinstance(w, Tensor) else ()} | options
    return eq.optimize_inputs(
        lambda z, x: w * z + x,
        z0=torch.zeros(1, 1),
        x0=torch.zeros(1, 1),
        cost=lambda z, x: 0.5 * (z - 3).square().sum(1),
        regularizer=lambda x: 0.25 * x.square().sum(1),
        **given,
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("step_size", [0.1, None])
def test_c1_scalar(schedule: Schedule, step_size: float | None) -> None:
    solution = scalar(schedule=schedule, step_size=step_size).raise_for_status()
    z, mu, x = solution.value
    assert float(x) == pytest.approx(4 / 3, rel=1e-9)
    assert float(z) == pytest.approx(8 / 3, rel=1e-9)
    assert float(mu) == pytest.approx(-2 / 3, rel=1e-9)
    assert solution.cost is not None
    assert float(solution.cost) == pytest.approx(0.5, rel=1e-9)
    assert float(solution.joint_cost) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(("schedule", "stride"), [(Nested(), 1.5), (GaussSeidel(), 1.0), (Joint(), 0.5)], ids=str)
@pytest.mark.parametrize(
    ("w", "curvature"),
    [
        (0.02, 1 / 0.98**2 + 0.5),  # of phi(x) = (x / (1 - w) - 3)^2 / 2 + x^2 / 4
        (0.5, 1.5**2 + 0.5),  # a slower layer answers in two steps no more than x + w x, and so does the adjoint
    ],
)
def test_the_measured_step_is_in_units_of_the_inverse_curvature(
    schedule: Schedule, stride: float, w: float, curvature: float
) -> None:
    found = scalar(w, step_size=None, schedule=schedule)
    assert float(found.step_size) == pytest.approx(stride / curvature, rel=1e-3)


@pytest.mark.parametrize("schedule", [Joint(), Nested(steps=3)], ids=str)
def test_c2_linear_cell_and_quadratic_cost(schedule: Schedule) -> None:
    problem = fitting(n=10, p=3, rows=4, norm=0.8, rho=0.3, linear=True)
    cell, fit = problem.cell, problem.cost
    gain = fit.c.detach() @ cell.gain @ cell.u.detach()
    rest = fit.c.detach() @ cell.gain @ cell.b.detach() - problem.y
    x_exact = -torch.linalg.solve(gain.T @ gain + 0.3 * torch.eye(3), gain.T @ rest.T).T
    z_exact = (x_exact @ cell.u.T + cell.b).detach() @ cell.gain.T
    solver = eq.Anderson(memory=23, max_steps=200, rtol=1e-12)
    solution = eq.optimize_inputs(cell, **problem.arguments, solver=solver, schedule=schedule).raise_for_status()
    z, mu, x = solution.value
    torch.testing.assert_close(x, x_exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(z, z_exact, rtol=1e-10, atol=1e-10)
    slope = (z_exact @ fit.c.T - problem.y) @ fit.c
    torch.testing.assert_close(mu, (slope @ cell.gain).detach(), rtol=1e-9, atol=1e-9)
    if schedule == Joint():
        assert int(solution.num_steps.max()) <= 2 * 10 + 3 + 12


@pytest.mark.parametrize(
    "solver", [eq.Picard(max_steps=2000, rtol=1e-10), eq.Anderson(max_steps=400, rtol=1e-10)], ids=str
)
@pytest.mark.parametrize("step_size", [0.05, None])
@pytest.mark.parametrize("kind", [L2Ball, LInfBall])
def test_c3_linear_cost_in_a_ball(kind: type, step_size: float | None, solver: eq.Solver) -> None:
    cell = Cell(10, 4, 0.8, linear=True)
    a = torch.randn(3, 10)
    g = a @ cell.gain @ cell.u.detach()
    center = torch.randn(3, 4)
    solution = eq.optimize_inputs(
        cell,
        z0=torch.zeros(3, 10),
        x0=center + 5,
        cost=lambda z, x, a: -(a * z).sum(1),
        targets=(a,),
        constraint=kind(radius=0.7, center=center),
        step_size=step_size,
        solver=solver,
        params=(),
    ).raise_for_status()
    z, _, x = solution.value
    assert bool(solution.infeasible_start.all())
    if kind is L2Ball:
        exact, gain = g / g.norm(dim=1, keepdim=True), g.norm(dim=1)
        assert float((x - center).norm(dim=1).max()) <= 0.7 * (1 + 1e-6)
    else:
        exact, gain = g.sign(), g.abs().sum(1)
        assert float((x - center).abs().max()) <= 0.7 * (1 + 1e-6)
    torch.testing.assert_close(x - center, 0.7 * exact, rtol=1e-7, atol=1e-7)
    at_center = (a * ((center @ cell.u.T + cell.b).detach() @ cell.gain.T)).sum(1)
    torch.testing.assert_close((a * z).sum(1) - at_center, 0.7 * gain, rtol=1e-7, atol=1e-7)
    assert solution.stationarity is not None
    assert float(solution.stationarity.max()) < 1e-6


@pytest.mark.parametrize("memory", [2, 5, 20])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 40])
def test_c3_no_answer_leaves_its_set_however_the_solve_ends(memory: int, steps: int) -> None:
    problem = fitting()
    for constraint in (
        L2Ball(radius=0.3),
        LInfBall(radius=0.2),
        Box(lower=-0.1, upper=0.3),
        L2Ball(radius=0.3, lower=-0.1),
    ):
        with torch.no_grad():
            solution = eq.optimize_inputs(
                problem.cell,
                **problem.arguments | {"x0": torch.full((3, 4), 2.0)},
                constraint=constraint,
                step_size=3.0,
                solver=eq.Anderson(memory=memory, max_steps=steps),
                equilibrium=None,
            )
        x = solution.value[2]
        torch.testing.assert_close(constraint.project(x), x, rtol=0.0, atol=0.0)


def nested(problem: object, steps: int = 4000, step: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient descent on the reduced cost, its slope by implicit differentiation in dense algebra."""
    cell, fit, y = problem.cell, problem.cost, problem.y  # type: ignore[attr-defined]
    x = torch.zeros(len(y), cell.u.shape[1])
    z = torch.zeros(len(y), len(cell.w))
    with torch.no_grad():
        for _ in range(steps):
            for _ in range(8):
                z = cell(z, x)
            jacobian = (1 - z.square())[:, :, None] * cell.w
            eye = torch.eye(len(cell.w))
            slope = (z @ fit.c.T - y) @ fit.c
            mu = torch.linalg.solve((eye - jacobian).mT, slope)
            gx = (mu * (1 - z.square())) @ cell.u + fit.rho * x
            x = x - step * gx
    return z, mu, x


@pytest.mark.slow
def test_c4_joint_is_nested() -> None:
    problem = fitting(n=20, p=5, rows=2)
    exact = nested(problem, steps=1500, step=0.3)
    for schedule in (Joint(), Nested()):
        solution = eq.optimize_inputs(problem.cell, **problem.arguments, solver=TIGHT, schedule=schedule)
        for found, wanted in zip(solution.raise_for_status().value, exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
        assert int(solution.num_steps.max()) <= 150


@pytest.mark.slow
def test_c6_the_answer_depends_on_no_option() -> None:
    problem = fitting(linear=True)
    reference = None
    for schedule in SCHEDULES:
        for step_size in (0.05, None):
            for solver in (TIGHT, dataclasses.replace(TIGHT, memory=5)):
                given = problem.arguments | {"x0": torch.randn(3, 4)}
                solution = eq.optimize_inputs(
                    problem.cell, **given, schedule=schedule, step_size=step_size, solver=solver
                ).raise_for_status()
                reference = solution.value if reference is None else reference
                torch.testing.assert_close(solution.value, reference, rtol=1e-8, atol=1e-8)


def test_c6_the_scale_of_the_cost_is_that_of_the_adjoint() -> None:
    problem = fitting(norm=0.6, rho=0.3)
    plain = eq.optimize_inputs(problem.cell, **problem.arguments, solver=TIGHT).raise_for_status()
    scaled = eq.optimize_inputs(
        problem.cell,
        **problem.arguments | {"cost": lambda z, x, y: 1e4 * problem.cost(z, x, y)},
        solver=TIGHT,
    ).raise_for_status()
    torch.testing.assert_close(scaled.value[2], plain.value[2], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(scaled.value[1], 1e4 * plain.value[1], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(scaled.step_size, 1e-4 * plain.step_size, rtol=1e-2, atol=0.0)


def test_a_proximal_penalty_gives_what_the_subdifferential_demands() -> None:
    problem = fitting(linear=True, rho=0.0)
    weight = 0.3
    lasso = Proximal(
        operator=lambda y, step: y.sign() * (y.abs() - weight * step).clamp_min(0),
        penalty=lambda x: weight * x.abs().sum(1),
    )
    solution = eq.optimize_inputs(problem.cell, **problem.arguments, constraint=lasso, solver=TIGHT).raise_for_status()
    z, mu, x = (part.detach() for part in solution.value)
    slope = mu @ problem.cell.u.detach()
    zero = x == 0
    assert bool(zero.any())
    assert not bool(zero.all())
    torch.testing.assert_close(slope[~zero], -weight * x[~zero].sign(), rtol=1e-7, atol=1e-7)
    assert float(slope[zero].abs().max()) <= weight
    assert solution.cost is not None
    expected = problem.cost(z, x, problem.y) + weight * x.abs().sum(1)
    torch.testing.assert_close(solution.cost, expected.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.joint_cost, expected.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_c7_an_accelerated_joint_solve_needs_less_than_the_warm_inexact_loop() -> None:
    problem = fitting(n=32, p=6, rows=12, norm=0.9, rho=0.02)
    best = eq.optimize_inputs(
        problem.cell, **problem.arguments, solver=eq.Anderson(memory=10, max_steps=600, rtol=1e-8)
    )
    first = eq.fixed_point(problem.cell, torch.zeros(12, 32), torch.zeros(12, 6), solver=TIGHT).value
    start = problem.cost(first, torch.zeros(12, 6), problem.y).detach()
    step = best.step_size.median()
    assert best.cost is not None

    @torch.no_grad()
    def counts(schedule: Schedule, solver: eq.Solver) -> int:
        fewest = 10**6
        for factor in (0.5, 1.0, 2.0):
            for rounds in range(8, 200, 8):
                found = eq.optimize_inputs(
                    problem.cell,
                    **problem.arguments,
                    schedule=schedule,
                    solver=dataclasses.replace(solver, max_steps=rounds),
                    step_size=factor * step.expand(12),
                    equilibrium=None,
                )
                spent = found.num_evals + found.num_vjps
                if spent >= fewest:
                    break
                state = eq.fixed_point(problem.cell, first, found.value[2], solver=TIGHT).value
                excess = problem.cost(state, found.value[2], problem.y) - best.cost
                if float((excess / (start - best.cost)).mean()) < 1e-2:
                    fewest = spent
        return fewest

    joint = counts(Joint(), eq.Anderson(memory=10, rtol=1e-6))
    inexact = min(counts(Nested(steps=steps), eq.Picard(rtol=1e-6)) for steps in (2, 4))
    assert joint < inexact
