"""Derivatives of higher order: right where a gradient is exact, refused with a remedy where it is an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import TanhCell
from torch import Tensor

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.fixed_point import solve_map

SOLVERS = {
    "Picard": eq.Picard(max_steps=300, rtol=1e-13),
    "Anderson": eq.Anderson(max_steps=200, rtol=1e-13),
    "Broyden": eq.Broyden(max_steps=60, memory=60, rtol=1e-13),
    "SteadyState": eq.SteadyState(max_steps=600, rtol=1e-12),
}
TIGHT = SOLVERS["Anderson"]
INVERTING = SOLVERS["Broyden"]
REFINED = eq.Implicit(solver=INVERTING, start=eq.Shine(fallback_ratio=math.inf))
ESTIMATORS = [eq.Shine(), eq.JacobianFree(), eq.Neumann(steps=50), eq.Phantom(steps=50)]

by_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)

Loss = Callable[..., Tensor]


def problem(batch: int = 2, d: int = 4) -> tuple[TanhCell, list[Tensor]]:
    cell = TanhCell(d)
    return cell, [torch.randn(batch, d, requires_grad=True), *cell.parameters()]


def loss(z: Tensor) -> Tensor:
    return (z.sin() * z).sum()


def gradient_of(cell: TanhCell, tensors: list[Tensor], solver: eq.Solver, gradient: eq.gradients.Gradient) -> Tensor:
    """All first derivatives as one vector, differentiable."""
    z = eq.fixed_point(cell, torch.zeros_like(tensors[0]), tensors[0], solver=solver, gradient=gradient).value
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(z), tensors, create_graph=True)])


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        *((solver, eq.Implicit(solver=solver)) for solver in SOLVERS.values()),
        (INVERTING, REFINED),
        (TIGHT, eq.Implicit(solver=TIGHT, start=torch.ones(2, 4))),
        (eq.Picard(max_steps=0), eq.Unrolled(steps=6)),
    ],
    ids=[*SOLVERS, "refined", "warm start", "Unrolled"],
)
def test_hessian_vector_products_equal_finite_differences(solver: eq.Solver, gradient: eq.gradients.Gradient) -> None:
    cell, tensors = problem()
    directions = [torch.randn_like(t) for t in tensors]
    first = gradient_of(cell, tensors, solver, gradient)
    probe = torch.randn_like(first)
    product = sum(
        (h * v).sum() for h, v in zip(torch.autograd.grad(first @ probe, tensors), directions, strict=True)
    )  # probe^T H v

    def moved(size: float) -> Tensor:
        with torch.no_grad():
            for t, v in zip(tensors, directions, strict=True):
                t.add_(v, alpha=size)
        return gradient_of(cell, tensors, solver, gradient).detach()

    h = 1e-4  # fourth order: h^4 and rounding / h are both far below the tolerance
    values = [moved(h), moved(h), moved(-3 * h), moved(-h)]  # at h, 2h, -h, -2h
    difference = (8 * (values[0] - values[2]) - (values[1] - values[3])) / (12 * h)
    assert abs(float(product - probe @ difference)) <= 1e-6 * float(probe.norm() * difference.norm())


@pytest.mark.parametrize("gradient", [eq.Implicit(solver=TIGHT), eq.Unrolled(steps=5)], ids=["Implicit", "Unrolled"])
def test_gradgradcheck(gradient: eq.gradients.Gradient) -> None:
    solver = TIGHT if isinstance(gradient, eq.Implicit) else eq.Picard(max_steps=0)

    def equilibrium(x: Tensor, w: Tensor) -> Tensor:
        f = lambda z, x: torch.tanh(z @ w.T + x)  # noqa: E731
        return eq.fixed_point(f, torch.zeros_like(x), x, params=(w,), solver=solver, gradient=gradient).value

    w = (0.4 * torch.randn(3, 3)).requires_grad_()
    torch.autograd.gradgradcheck(equilibrium, [torch.randn(2, 3, requires_grad=True), w])


def test_third_derivatives_equal_those_of_a_long_unrolled_iteration() -> None:
    def third(solver: eq.Solver, gradient: eq.gradients.Gradient) -> Tensor:
        a = torch.tensor(0.7, requires_grad=True)
        z = eq.fixed_point(lambda z: a * z.cos(), torch.zeros(1, 1), params=(a,), solver=solver, gradient=gradient)
        d: Tensor = z.value.sum()
        for _ in range(3):
            (d,) = torch.autograd.grad(d, a, create_graph=True)
        return d.detach()

    expected = third(eq.Picard(max_steps=0), eq.Unrolled(steps=150))
    torch.testing.assert_close(third(TIGHT, eq.Implicit(solver=TIGHT)), expected, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_hessian_of_a_minimizer_in_its_data_equals_finite_differences() -> None:
    solver = eq.LBFGS(max_steps=100, memory=100, rtol=0, atol=1e-11)

    def minimizer(x: Tensor, scale: Tensor) -> Tensor:
        def objective(z: Tensor, x: Tensor) -> Tensor:
            return (z - x).square().sum(1) + (scale * z).cosh().sum(1)

        f = DescentMap(objective, torch.zeros(2, 3), (x,), params=(scale,))
        backward = eq.LBFGS(max_steps=100, rtol=0, atol=1e-12)
        return solve_map(f, torch.zeros(2, 3), solver=solver, gradient=eq.Implicit(solver=backward)).value

    x, scale = torch.randn(2, 3, requires_grad=True), torch.tensor(0.6, requires_grad=True)
    torch.autograd.gradgradcheck(minimizer, [x, scale], fast_mode=True)


@pytest.mark.slow
def test_gradient_penalty_trains_like_a_long_unrolled_network() -> None:
    # The usual use: the loss contains a gradient, and .backward() differentiates it.
    def gradients(solver: eq.Solver, gradient: eq.gradients.Gradient) -> list[Tensor]:
        torch.manual_seed(1)
        cell, tensors = problem()
        z = eq.fixed_point(cell, torch.zeros(2, 4), tensors[0], solver=solver, gradient=gradient).value
        (g,) = torch.autograd.grad(loss(z), tensors[0], create_graph=True)
        (loss(z) + g.square().sum()).backward()
        return [t.grad for t in tensors if t.grad is not None]

    implicit = gradients(TIGHT, eq.Implicit(solver=TIGHT))
    unrolled = gradients(eq.Picard(max_steps=0), eq.Unrolled(steps=200))
    assert len(implicit) == 4
    torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_every_equation_of_a_second_derivative_is_preconditioned_with_the_right_transpose() -> None:
    # First w, with J^T; then, to differentiate w, its own adjoint, with J; then the adjoint of z* anew, with J^T.
    state = np.random.RandomState(0)
    w = state.randn(60, 60)
    w, x = torch.tensor(3 * w / np.linalg.norm(w, 2)), torch.tensor(state.randn(1, 60)).requires_grad_()
    solver = eq.Broyden(max_steps=300, memory=300, rtol=1e-10)
    steps = {}
    for start in (None, eq.Shine(fallback_ratio=math.inf)):
        reports: list[eq.Solution[Tensor]] = []
        backward = eq.Implicit(solver=solver, start=start, observe=reports.append)
        f = lambda z, x: torch.tanh(z @ w.T + x)  # noqa: E731
        z = eq.fixed_point(f, torch.zeros(1, 60), x, params=(), solver=solver, gradient=backward).value
        (g,) = torch.autograd.grad(loss(z), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)
        steps[start] = [int(report.raise_for_status().num_steps) for report in reports]
    plain, refined = steps.values()
    assert len(plain) == len(refined) == 3
    assert all(0 < b <= 0.75 * a for a, b in zip(plain, refined, strict=True)), (plain, refined)


@by_estimator
@pytest.mark.parametrize("wanted", ["input", "parameter"])
def test_estimates_refuse_to_be_differentiated_again(estimator: eq.gradients.Gradient, wanted: str) -> None:
    cell, tensors = problem()
    target = tensors[0] if wanted == "input" else cell.w
    z = eq.fixed_point(cell, torch.zeros(2, 4), tensors[0], solver=INVERTING, gradient=estimator).value
    with pytest.raises(RuntimeError, match=rf"{type(estimator).__name__} estimates.*use Implicit\(\) or Unrolled\(\)"):
        torch.autograd.grad(torch.autograd.grad(loss(z), target, create_graph=True)[0].sum(), target)
    z = eq.fixed_point(cell, torch.zeros(2, 4), tensors[0], solver=INVERTING, gradient=estimator).value
    with pytest.raises(RuntimeError, match=r"use Implicit\(\) or Unrolled\(\)"):
        loss(z).backward(create_graph=True)
    assert all(t.grad is None for t in tensors)


@pytest.mark.parametrize("gradient", [eq.Implicit(), *ESTIMATORS], ids=lambda g: type(g).__name__)
def test_closures_refuse_to_be_differentiated_again(gradient: eq.gradients.Gradient) -> None:
    cell, tensors = problem()
    x = tensors[0]
    z = eq.fixed_point(lambda z: cell(z, x), torch.zeros(2, 4), solver=INVERTING, gradient=gradient).value
    with pytest.raises(RuntimeError, match=r"first derivatives only: pass the module itself.*params=\[\.\.\.\]"):
        torch.autograd.grad(torch.autograd.grad(loss(z), x, create_graph=True)[0].sum(), x)


def test_an_unrolled_closure_can_be_differentiated_again() -> None:
    cell, tensors = problem()
    x = tensors[0]
    z = eq.fixed_point(lambda z: cell(z, x), torch.zeros(2, 4), solver=TIGHT, gradient=eq.Unrolled(steps=200)).value
    (g,) = torch.autograd.grad(loss(z), x, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), x)
    named = eq.fixed_point(cell, torch.zeros(2, 4), x, solver=TIGHT, gradient=eq.Implicit(solver=TIGHT)).value
    (g,) = torch.autograd.grad(loss(named), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(g.square().sum(), x)[0])
