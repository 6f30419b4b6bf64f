"""The adjoint by Krylov methods: refined from SHINE to a tolerance, exact, and differentiable again."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import VANILLA, Toy, broyden, median, toy
from torch import Tensor

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.core.linalg import InverseEstimate
from equipoise.fixed_point import solve_map
from equipoise.gradients.adjoint import AdjointMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartAlone(eq.Shine):
    """SHINE's vector without its matrix."""

    def warm_start(
        self, adjoint: AdjointMap, g: Tensor, solution: eq.Solution[Tensor]
    ) -> tuple[Tensor, InverseEstimate | None]:
        return self.cotangent(adjoint, g, solution), None


ALONE = StartAlone(fallback_ratio=math.inf)


def gmres(products: int) -> eq.GMRES:
    """The residual at the start, so many products, and the verification."""
    return eq.GMRES(max_steps=1 if products == 0 else products + 2, memory=max(products, 1), rtol=0)


def quadratic(problem: Toy) -> Toy:
    """`z -> W z + b` with a symmetric `W` of spectral norm below one."""
    return dataclasses.replace(problem, w=(problem.w + problem.w.mT) / 2, linear=True)


# --- published figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "variant", "errors"),
    [
        (0.9, "fresh", (0.27, 0.075, 0.022, 5.6e-4, 9.2e-7)),
        (0.9, "gmres", (0.27, 0.078, 0.022, 5.7e-4, 8.7e-7)),
        (0.9, "gmres, preconditioned", (0.27, 0.077, 0.022, 5.5e-4, 5.8e-7)),
        (3.0, "fresh", (0.71, 0.56, 0.42, 0.20, 0.081)),
        (3.0, "gmres", (0.71, 0.56, 0.44, 0.22, 0.084)),
        (3.0, "gmres, preconditioned", (0.71, 0.53, 0.39, 0.081, 5.0e-3)),
    ],
)
def test_error_after_refining(rho: float, variant: str, errors: tuple[float, ...]) -> None:
    # After 0, 1, 2, 5, 10 products from SHINE's vector. The rows of Broyden's method with SHINE's matrix, from g and
    # from zero are in `test_shine.py`.
    problem = toy(rho)
    start = VANILLA if "preconditioned" in variant else ALONE
    for products, expected in zip((0, 1, 2, 5, 10), errors, strict=True):
        solver = broyden(steps=products + 1) if variant == "fresh" else gmres(products)
        answer = problem.solve(broyden(1e-4), eq.Implicit(solver=solver, start=start))
        assert median(answer.error) == pytest.approx(expected, rel=0.05), products


# --- refinement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [VANILLA, eq.Shine(), eq.JacobianFree(), None], ids=["shine", "guarded", "jf", "g"])
def test_gmres_is_exact_after_as_many_products_as_dimensions(start: eq.Gradient | None) -> None:
    for linear in (True, False):
        problem = toy(3.0, linear=linear, d=10)
        answer = problem.solve(broyden(1e-8), eq.Implicit(solver=gmres(10), start=start))
        assert float(answer.error.max()) < 1e-8
    few = toy(3.0, d=10).solve(broyden(1e-8), eq.Implicit(solver=gmres(4), start=start))
    assert float(few.error.max()) > 1e-4


def test_cg_is_exact_after_as_many_products_as_dimensions_where_the_jacobian_is_symmetric() -> None:
    problem = quadratic(toy(0.9, d=10))
    for start in (eq.JacobianFree(), None):
        solver = eq.CG(max_steps=12, rtol=0)
        assert float(problem.solve(broyden(1e-8), eq.Implicit(solver=solver, start=start)).error.max()) < 1e-9


@pytest.mark.parametrize("rho", [0.9, 3.0])
def test_the_residual_is_never_larger_than_that_of_shine_and_falls(rho: float) -> None:
    problem, solver = toy(rho, d=50), broyden(1e-4)
    before = problem.solve(solver).adjoint_residual
    for products in (0, 1, 2, 4, 8):
        after = problem.solve(solver, eq.Implicit(solver=gmres(products), start=VANILLA)).adjoint_residual
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after


@pytest.mark.parametrize("tolerance", [1e-2, pytest.param(1e-6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_atol_alone_is_the_relative_residual_of_every_sample(scale: float, tolerance: float) -> None:
    problem = toy(3.0, d=30)
    problem = dataclasses.replace(problem, t=scale * problem.t)
    reports: list[eq.Solution[Tensor]] = []
    solver = eq.GMRES(max_steps=80, memory=40, rtol=0, atol=tolerance)
    answer = problem.solve(broyden(1e-8), eq.Implicit(solver=solver, start=VANILLA, observe=reports.append))
    (report,) = reports
    relative = answer.adjoint_residual / answer.g.norm(dim=1)
    torch.testing.assert_close(report.residual, relative, rtol=1e-6, atol=1e-13)
    assert bool((relative <= tolerance * (1 + 1e-9)).all())
    assert bool(report.raise_for_status().converged.all())
    # And it is this number that decides: one product fewer leaves each sample above it.
    for steps in sorted(set(report.num_steps.tolist())):
        if steps > 3:
            fewer = dataclasses.replace(solver, max_steps=steps - 1, atol=0.0)
            before = problem.solve(broyden(1e-8), eq.Implicit(solver=fewer, start=VANILLA)).adjoint_residual
            rows = report.num_steps == steps
            assert bool((before[rows] > tolerance * answer.g.norm(dim=1)[rows]).all())
    assert len(set(report.num_steps.tolist())) > 1


@pytest.mark.parametrize("start", [VANILLA, None], ids=["shine", "g"])
def test_the_certificate_counts_the_products_of_each_sample(start: eq.Gradient | None) -> None:
    problem, reports = toy(3.0, d=30), []
    solver = eq.GMRES(max_steps=80, memory=40, rtol=0, atol=1e-6)
    problem.solve(broyden(1e-8), eq.Implicit(solver=solver, start=start, observe=reports.append))
    assert reports[0].num_vjps == int(reports[0].num_steps.max())
    assert bool((reports[0].num_steps <= 32).all())
    if start is not None:
        plain: list[eq.Solution[Tensor]] = []
        problem.solve(broyden(1e-8), eq.Implicit(solver=solver, observe=plain.append))
        assert median(reports[0].num_steps) < 0.8 * median(plain[0].num_steps)


def test_preconditioned_cg_refines_what_lbfgs_learned_of_a_hessian() -> None:
    # h(z, x) = sum of log cosh(a z - x) + |z|^2 / 50 of rows that differ in scale.
    a = torch.randn(20, 8)
    x = torch.randn(4, 20) * torch.tensor([[0.1], [1.0], [3.0], [10.0]])
    target = torch.randn(4, 8)

    def h(z: Tensor, x: Tensor) -> Tensor:
        return torch.cosh(z @ a.T - x).log().sum(1) + z.square().sum(1) / 50

    def gradient_of(gradient: eq.Gradient) -> Tensor:
        inputs = x.clone().requires_grad_()
        f = DescentMap(h, torch.zeros(4, 8), (inputs,), params=())
        solver = eq.LBFGS(max_steps=60, memory=60, rtol=0, atol=1e-9)
        z = solve_map(f, torch.zeros(4, 8), solver=solver, gradient=gradient).raise_for_status().value
        return torch.autograd.grad((z - target).square().sum(), inputs)[0]

    def products(start: eq.Gradient | None) -> tuple[Tensor, Tensor]:
        reports: list[eq.Solution[Tensor]] = []
        solver = eq.CG(max_steps=60, rtol=0, atol=1e-6)
        gradient = gradient_of(eq.Implicit(solver=solver, start=start, observe=reports.append))
        return gradient, reports[0].raise_for_status().num_steps

    exact = gradient_of(eq.Implicit(solver=eq.Broyden(max_steps=100, memory=100, rtol=1e-12)))
    plain, steps = products(None)
    refined, fewer = products(VANILLA)
    torch.testing.assert_close(plain, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refined, exact, rtol=1e-4, atol=1e-5)
    assert bool((fewer <= steps).all())
    assert int(fewer.sum()) < 0.8 * int(steps.sum())


# --- second derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, VANILLA], ids=["g", "shine"])
@pytest.mark.parametrize("kind", ["CG", "GMRES"])
def test_first_and_second_derivatives_equal_finite_differences(kind: str, start: eq.Gradient | None) -> None:
    w = torch.randn(2, 2) / 4
    w = ((w + w.T) / 2 if kind == "CG" else w).requires_grad_()
    x = torch.randn(1, 2, requires_grad=True)
    options = {"max_steps": 30, "rtol": 0.0, "atol": 1e-12}
    backward = eq.CG(**options) if kind == "CG" else eq.GMRES(**options)
    forward = eq.Broyden(max_steps=60, memory=60, rtol=1e-13)

    def value(x: Tensor, w: Tensor) -> Tensor:
        # The gradient of a function, so that its Jacobian is symmetric: w^T tanh(w z + x) for CG.
        def f(z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ w.T + x) @ w if kind == "CG" else torch.tanh(z @ w.T + x)

        gradient = eq.Implicit(solver=backward, start=start)
        return eq.fixed_point(f, torch.zeros(1, 2), x, solver=forward, gradient=gradient, params=[w]).value

    assert torch.autograd.gradcheck(value, (x, w))
    assert torch.autograd.gradgradcheck(value, (x, w))
