"""Answers of input optimization: closed forms, the nested optimum, and independence of the options.

The names C1, C2, ... are those of the checks in the specification of joint inference and input optimization.
"""

import dataclasses
from typing import Any

import pytest
import torch
from input_problems import Cell, Fitting, fitting, optimize
from torch import Tensor

import equipoise as eq
from equipoise.constraints import Box, Constraint, L2Ball, LInfBall, Proximal
from equipoise.inputs import GaussSeidel, InputSolution, Joint, Nested, UpdateScheme

TIGHT = eq.Anderson(memory=10, max_steps=400, rtol=1e-11)
SCHEMES: list[UpdateScheme] = [Joint(), Joint(damping=0.8, adjoint_damping=0.6), GaussSeidel(), Nested()]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def scalar(w: float = 0.5, **options: Any) -> InputSolution:
    """Minimize `(z - 3)^2 / 2 + x^2 / 4` at `z = w z + x`."""
    return optimize(
        lambda z, x: w * z + x,
        z0=torch.zeros(1, 1),
        x0=torch.zeros(1, 1),
        cost=lambda z, x: 0.5 * (z - 3).square().sum(1),
        regularizer=lambda x: 0.25 * x.square().sum(1),
        params=(),
        solver=TIGHT,
        **options,
    )


@schemes
@pytest.mark.parametrize("step_size", [0.1, None])
def test_c1_scalar(scheme: UpdateScheme, step_size: float | None) -> None:
    solution = scalar(scheme=scheme, step_size=step_size).raise_for_status()
    found = [float(t) for t in (*solution.value, solution.cost, solution.joint_cost)]
    assert found == pytest.approx([8 / 3, -2 / 3, 4 / 3, 0.5, 0.5], rel=1e-9)


@pytest.mark.parametrize(("scheme", "factor"), [(Nested(), 1.5), (GaussSeidel(), 1.0), (Joint(), 0.5)], ids=str)
@pytest.mark.parametrize(
    ("w", "curvature"),
    [
        (0.02, 1 / 0.98**2 + 0.5),  # of phi(x) = (x / (1 - w) - 3)^2 / 2 + x^2 / 4
        (0.5, 1.5**2 + 0.5),  # a slower layer responds in two steps by x + w x, and so does the adjoint
    ],
)
def test_measured_step(scheme: UpdateScheme, factor: float, w: float, curvature: float) -> None:
    assert float(scalar(w, scheme=scheme).step_size) == pytest.approx(factor / curvature, rel=1e-3)


@pytest.mark.parametrize("scheme", [Joint(), Nested(steps=3)], ids=str)
def test_c2_linear_quadratic(scheme: UpdateScheme) -> None:
    problem = fitting(n=10, p=3, rows=4, norm=0.8, rho=0.3, linear=True)
    w, u, b, c = (t.detach() for t in (problem.cell.gain, problem.cell.u, problem.cell.b, problem.cost.c))
    gain = c @ w @ u
    x = -torch.linalg.solve(gain.T @ gain + 0.3 * torch.eye(3), gain.T @ (c @ w @ b - problem.y).T).T
    z = (x @ u.T + b) @ w.T
    solution = problem.solve(solver=eq.Anderson(memory=23, max_steps=200, rtol=1e-12), scheme=scheme)
    expected = (z, (z @ c.T - problem.y) @ c @ w, x)
    torch.testing.assert_close(solution.raise_for_status().value, expected, rtol=1e-9, atol=1e-9)
    if scheme == Joint():
        assert int(solution.num_steps.max()) <= 2 * 10 + 3 + 12


@pytest.mark.parametrize(
    "solver", [eq.Picard(max_steps=2000, rtol=1e-10), eq.Anderson(max_steps=400, rtol=1e-10)], ids=str
)
@pytest.mark.parametrize("step_size", [0.05, None])
@pytest.mark.parametrize("kind", [L2Ball, LInfBall])
@pytest.mark.thorough
def test_c3_linear_cost_in_a_ball(kind: type, step_size: float | None, solver: eq.Solver) -> None:
    cell, a, center = Cell(10, 4, 0.8, linear=True), torch.randn(3, 10), torch.randn(3, 4)
    g = a @ cell.gain @ cell.u.detach()
    solution = optimize(
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
    order = 2 if kind is L2Ball else torch.inf
    exact, gain = (g / g.norm(dim=1, keepdim=True), g.norm(dim=1)) if order == 2 else (g.sign(), g.abs().sum(1))
    assert bool(solution.infeasible_start.all())
    assert float(torch.linalg.vector_norm(x - center, order, dim=1).max()) <= 0.7 * (1 + 1e-6)
    torch.testing.assert_close(x - center, 0.7 * exact, rtol=1e-7, atol=1e-7)
    at_center = (a * ((center @ cell.u.T + cell.b).detach() @ cell.gain.T)).sum(1)
    torch.testing.assert_close((a * z).sum(1) - at_center, 0.7 * gain, rtol=1e-7, atol=1e-7)
    assert float(solution.stationarity.max()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("steps", [0, 1, 3, 40])
@pytest.mark.parametrize(
    "constraint",
    [L2Ball(radius=0.3), LInfBall(radius=0.2), Box(lower=-0.1, upper=0.3), L2Ball(radius=0.3, lower=-0.1)],
)
def test_c3_feasible_after_any_number_of_rounds(constraint: Constraint, steps: int) -> None:
    problem, x0 = fitting(), torch.full((3, 4), 2.0)
    for memory in (2, 5, 20):
        solver = eq.Anderson(memory=memory, max_steps=steps)
        found = problem.solve(x0=x0, constraint=constraint, step_size=3.0, solver=solver, verify_solver=None)
        torch.testing.assert_close(constraint.project(found.value[2]), found.value[2], rtol=0.0, atol=0.0)


@torch.no_grad()
def nested(problem: Fitting, steps: int, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient descent on the reduced cost, with implicit differentiation in dense algebra."""
    cell, fit, y = problem.cell, problem.cost, problem.y
    z, x = torch.zeros(len(y), len(cell.w)), torch.zeros(len(y), cell.u.shape[1])
    for _ in range(steps):
        for _ in range(8):
            z = cell(z, x)
        jacobian = (1 - z.square())[:, :, None] * cell.w
        mu = torch.linalg.solve((torch.eye(len(cell.w)) - jacobian).mT, (z @ fit.c.T - y) @ fit.c)
        x = x - step * ((mu * (1 - z.square())) @ cell.u + fit.rho * x)
    return z, mu, x


@pytest.mark.thorough
def test_c4_joint_is_nested() -> None:
    problem = fitting(n=10, p=3, rows=2)
    exact = nested(problem, steps=800, step=0.3)
    for scheme in (Joint(), Nested()):
        solution = problem.solve(solver=TIGHT, scheme=scheme).raise_for_status()
        torch.testing.assert_close(solution.value, exact, rtol=1e-8, atol=1e-8)
        assert int(solution.num_steps.max()) <= 150


@schemes
@pytest.mark.parametrize(("step_size", "memory"), [(0.05, 10), (None, 5)])
@pytest.mark.thorough
def test_c6_independence_of_options(scheme: UpdateScheme, step_size: float | None, memory: int) -> None:
    problem, solver = fitting(linear=True), dataclasses.replace(TIGHT, memory=memory, max_steps=800)
    found = problem.solve(x0=torch.randn(3, 4), scheme=scheme, step_size=step_size, solver=solver)
    reference = problem.solve(solver=TIGHT).value
    torch.testing.assert_close(found.raise_for_status().value, reference, rtol=1e-8, atol=1e-8)


def test_c6_scale_of_the_cost() -> None:
    problem = fitting(norm=0.6, rho=0.3)
    plain = problem.solve(solver=TIGHT).raise_for_status()
    scaled = problem.solve(cost=lambda z, x, y: 1e4 * problem.cost(z, x, y), solver=TIGHT).raise_for_status()
    torch.testing.assert_close(scaled.value[2], plain.value[2], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(scaled.value[1], 1e4 * plain.value[1], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(scaled.step_size, 1e-4 * plain.step_size, rtol=1e-2, atol=0.0)


def test_proximal_penalty() -> None:
    """The answer meets the conditions of the subdifferential."""
    problem, weight = fitting(linear=True, rho=0.0), 0.3
    lasso = Proximal(
        operator=lambda y, step: y.sign() * (y.abs() - weight * step).clamp_min(0),
        penalty=lambda x: weight * x.abs().sum(1),
    )
    solution = problem.solve(constraint=lasso, solver=TIGHT).raise_for_status()
    z, mu, x = (part.detach() for part in solution.value)
    gradient, zero = mu @ problem.cell.u.detach(), x == 0
    assert 0 < zero.double().mean() < 1
    torch.testing.assert_close(gradient[~zero], -weight * x[~zero].sign(), rtol=1e-7, atol=1e-7)
    assert float(gradient[zero].abs().max()) <= weight
    expected = (problem.cost(z, x, problem.y) + weight * x.abs().sum(1)).detach()
    for cost in (solution.cost, solution.joint_cost):
        torch.testing.assert_close(cost, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.slow
def test_c7_cheaper_than_the_inexact_loop() -> None:
    """Evaluations and products to 1 % of the excess cost, at the best step of each method."""
    problem = fitting(n=32, p=6, rows=12, norm=0.9, rho=0.02)
    best = problem.solve(solver=eq.Anderson(memory=10, max_steps=600, rtol=1e-8))
    first = eq.fixed_point(problem.cell, torch.zeros(12, 32), torch.zeros(12, 6), solver=TIGHT).value
    start, step = problem.cost(first, torch.zeros(12, 6), problem.y), float(best.step_size.median())

    def count(scheme: UpdateScheme, solver: eq.Solver) -> int:
        fewest = 10**6
        for factor in (0.5, 1.0, 2.0):
            for rounds in range(8, 200, 8):
                limited = dataclasses.replace(solver, max_steps=rounds)
                found = problem.solve(scheme=scheme, solver=limited, step_size=factor * step, verify_solver=None)
                spent = found.num_evals + found.num_vjps
                if spent >= fewest:
                    break
                state = eq.fixed_point(problem.cell, first, found.value[2], solver=TIGHT).value
                excess = problem.cost(state, found.value[2], problem.y) - best.cost
                if float((excess / (start - best.cost)).mean()) < 1e-2:
                    fewest = spent
        return fewest

    inexact = min(count(Nested(steps=steps), eq.Picard(rtol=1e-6)) for steps in (2, 4))
    assert count(Joint(), eq.Anderson(memory=10, rtol=1e-6)) < inexact
