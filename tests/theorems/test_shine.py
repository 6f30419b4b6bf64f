"""SHINE: its identities, and the figures of the paper's method on the toy problem of its published re-runs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import VANILLA, broyden, median, spectral, toy
from torch import Tensor
from torch.nn.functional import cosine_similarity

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.fixed_point import solve_map

# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5, 11])
@pytest.mark.parametrize("rho", [0.9, 3.0])
def test_the_inverse_is_that_of_the_dense_broyden_matrix_at_the_best_iterate(rho: float, steps: int) -> None:
    problem = toy(rho, d=20, seeds=6)
    points: list[Tensor] = []

    def watched(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
        points.append(z.detach().clone())
        return problem.f(z, w, b)

    solution = eq.fixed_point(
        watched, torch.zeros_like(problem.b), problem.w, problem.b, solver=broyden(steps=steps), params=()
    )
    assert solution.inverse is not None
    residuals = [problem.f(z, problem.w, problem.b) - z for z in points]
    best = torch.stack([r.norm(dim=1) for r in residuals]).argmin(dim=0)
    matrix = torch.eye(20).expand(6, 20, 20)  # of I - J
    for k in range(steps - 1):
        s, y = points[k + 1] - points[k], residuals[k] - residuals[k + 1]
        miss = y - torch.bmm(matrix, s[..., None])[..., 0]
        update = miss[:, :, None] * s[:, None] / s.square().sum(1)[:, None, None]
        matrix = torch.where((k < best)[:, None, None], matrix + update, matrix)
    last = best == steps - 1  # the secant equation of the last step
    torch.testing.assert_close(solution.inverse.mv(y)[last], s[last], rtol=1e-10, atol=1e-10)
    assert bool(last.all()) or rho > 1
    torch.testing.assert_close(solution.inverse.dense(), torch.linalg.inv(matrix), rtol=1e-9, atol=1e-10)
    x, y = torch.randn(2, 6, 20)
    torch.testing.assert_close((solution.inverse.rmv(x) * y).sum(1), (x * solution.inverse.mv(y)).sum(1))


@pytest.mark.parametrize("rho", [0.9, 3.0])
def test_the_gradient_is_the_transposed_inverse_times_the_cotangent(rho: float) -> None:
    answer = toy(rho, d=20, seeds=6).solve(broyden(1e-6))
    expected = torch.bmm(answer.inverse.dense().mT, answer.g[..., None])[..., 0]
    torch.testing.assert_close(answer.w, expected, rtol=1e-10, atol=1e-10)
    wrong = torch.bmm(answer.inverse.dense(), answer.g[..., None])[..., 0]
    assert bool(((answer.w - wrong).norm(dim=1) > 1e-2 * answer.w.norm(dim=1)).all())


def test_without_updates_it_is_jacobian_free() -> None:
    problem = toy(0.9, d=20, seeds=6)
    shine, free = (problem.solve(broyden(steps=1), gradient) for gradient in (VANILLA, eq.JacobianFree()))
    assert bool((shine.inverse.rank == 0).all())
    assert torch.equal(shine.w, free.w)
    at_solution = dataclasses.replace(problem, b=torch.zeros_like(problem.b))  # tanh(W 0) = 0
    assert torch.equal(at_solution.solve(broyden(1e-6)).w, at_solution.solve(broyden(1e-6), eq.JacobianFree()).w)


def test_a_solve_of_no_steps_has_no_inverse_to_share() -> None:
    with pytest.raises(ValueError, match=r"kept none; use Broyden or LBFGS with max_steps >= 1"):
        toy(0.9, d=20, seeds=6).solve(broyden(steps=0))


def test_it_is_exact_for_affine_scalar_maps() -> None:
    answer = toy(0.9, linear=True, d=1, seeds=8).solve(broyden(1e-12))
    assert bool((answer.inverse.rank >= 1).all())
    torch.testing.assert_close(answer.w, answer.exact, rtol=1e-10, atol=0)


def test_it_is_exact_where_lbfgs_has_learned_all_of_a_quadratic() -> None:
    # The inverse Hessian is symmetric, and exact searches would make it exact; these come close.
    hessian = spectral(5, 1.0, torch.Generator().manual_seed(0))
    hessian = hessian @ hessian.T + 0.5 * torch.eye(5)
    x = torch.randn(3, 5, requires_grad=True)
    f = DescentMap(lambda z, x: 0.5 * ((z @ hessian) * z).sum(1) - (z * x).sum(1), torch.zeros(3, 5), (x,), params=())
    solver = eq.LBFGS(max_steps=60, memory=60, rtol=0, atol=1e-10, wolfe=0.01)
    solution = solve_map(f, torch.zeros(3, 5), solver=solver, gradient=VANILLA)
    g = torch.randn(3, 5)
    (grad,) = torch.autograd.grad(solution.value, x, g)
    assert solution.inverse is not None
    torch.testing.assert_close(grad, torch.bmm(solution.inverse.dense().mT, g[..., None])[..., 0])
    assert float(cosine_similarity(grad, torch.linalg.solve(hessian, g.T).T).min()) > 0.999


# --- fallback ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_norm_guard_acts_sample_by_sample_and_reports() -> None:
    problem, solver = toy(3.0), broyden(1e-4)
    masks: list[Tensor] = []
    vanilla, free = problem.solve(solver), problem.solve(solver, eq.JacobianFree())
    guarded = problem.solve(solver, eq.Shine(fallback_ratio=1.3, observe=masks.append))
    too_long = vanilla.w.norm(dim=1) > 1.3 * vanilla.g.norm(dim=1)
    assert 0 < int(too_long.sum()) < 20
    assert torch.equal(masks[0], too_long)
    assert torch.equal(guarded.w, torch.where(too_long[:, None], free.w, vanilla.w))
    assert torch.equal(problem.solve(solver, eq.Shine(fallback_ratio=0.0)).w, free.w)


def test_an_estimate_that_is_not_finite_falls_back() -> None:
    gamma = torch.tensor([1.0, torch.nan, torch.inf])
    estimate = eq.InverseEstimate.of(gamma, torch.zeros(3, 0, 4), torch.zeros(3, 0, 0))
    value, counts = torch.zeros(3, 4), torch.zeros(3)
    solution = eq.Solution(value, counts, counts, counts, 0, 0, estimate)
    masks: list[Tensor] = []
    g = torch.randn(3, 4)
    w = eq.Shine(fallback_ratio=math.inf, observe=masks.append).cotangent(None, g, solution)  # type: ignore[arg-type]
    assert torch.equal(w, g)
    assert masks[0].tolist() == [False, True, True]


@pytest.mark.slow
def test_figures_of_the_norm_guard() -> None:
    # |w| / |g| over 50 seeds at tolerance 1e-4: median 1.02 and largest 1.07 at rho 0.9; 1.30 and 10.1 at rho 3.
    for rho, middle, largest, above in ((0.9, 1.02, 1.07, (0, 0)), (3.0, 1.30, 10.1, (25, 8))):
        answer = toy(rho, seeds=50).solve(broyden(1e-4))
        ratio = answer.w.norm(dim=1) / answer.g.norm(dim=1)
        assert median(ratio) == pytest.approx(middle, abs=0.005)
        assert float(ratio.max()) == pytest.approx(largest, rel=0.01)
        assert tuple(int((ratio > c).sum()) for c in (1.3, 1.8)) == above


# --- refine --------------------------------------------------------------------------------------------------------


def refine(start: eq.gradients.Gradient | Tensor | None, steps: int) -> eq.Implicit:
    """So many Broyden steps from a start; the evaluation at the start itself comes before them."""
    return eq.Implicit(solver=broyden(steps=steps + 1), start=start)


@pytest.mark.slow
@pytest.mark.parametrize("start", [VANILLA, eq.JacobianFree(), None, "zeros"], ids=["shine", "jf", "g", "zeros"])
def test_refining_a_linear_adjoint_ends_after_twice_the_dimension(start: eq.gradients.Gradient | str | None) -> None:
    # Gay (1979): Broyden's method solves a linear system of d equations in at most 2 d steps.
    problem = toy(0.9, linear=True, d=10)
    begin = torch.zeros_like(problem.b) if isinstance(start, str) else start
    answer = problem.solve(broyden(1e-4), refine(begin, 20))
    assert float(answer.error.max()) < 1e-9
    assert float(problem.solve(broyden(1e-4), refine(begin, 5)).error.max()) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("start", [VANILLA, eq.Shine(), eq.JacobianFree(), eq.Neumann(steps=2), None, "random"])
def test_a_full_adjoint_solve_forgets_its_start(start: eq.gradients.Gradient | str | None) -> None:
    problem = toy(3.0, d=20, seeds=8)
    begin = 10 * torch.randn_like(problem.b) if isinstance(start, str) else start
    answer = problem.solve(broyden(1e-10), refine(begin, 100))
    assert float(answer.error.max()) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.9, 3.0])
def test_refining_never_makes_the_adjoint_residual_larger(rho: float) -> None:
    problem, solver = toy(rho, d=50), broyden(1e-4)
    before = problem.solve(solver).adjoint_residual
    for steps in (0, 1, 2, 4, 8):
        after = problem.solve(solver, refine(VANILLA, steps)).adjoint_residual
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after


@pytest.mark.slow
def test_refining_starts_anew_where_the_estimate_fell_back() -> None:
    problem, solver = toy(3.0), broyden(1e-4)
    masks: list[Tensor] = []
    guarded = problem.solve(solver, refine(eq.Shine(fallback_ratio=1.3, observe=masks.append), 3))
    shine, free = (problem.solve(solver, refine(start, 3)) for start in (VANILLA, eq.JacobianFree()))
    expected = torch.where(masks[0][:, None], free.w, shine.w)
    torch.testing.assert_close(guarded.w, expected, rtol=1e-9, atol=1e-10)


# --- published figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "linear", "tol", "steps", "free", "shine"),
    [
        (0.9, False, 1e-2, 6, 0.9600, 0.9616),
        (0.9, False, 1e-5, 12, 0.9600, 0.9630),
        (0.9, False, 1e-9, 19, 0.9600, 0.9660),
        (3.0, False, 1e-2, 25, 0.6535, 0.6993),
        (3.0, False, 1e-5, 40, 0.6527, 0.7235),
        (3.0, False, 1e-9, 54, 0.6527, 0.7264),
        (0.9, True, 1e-5, 17, 0.8750, 0.9037),
    ],
)
def test_cosine_with_the_exact_adjoint(
    rho: float, linear: bool, tol: float, steps: int, free: float, shine: float
) -> None:
    answer = toy(rho, linear).solve(broyden(tol))
    assert bool(answer.solution.converged.all())
    assert abs(median(answer.solution.num_steps) - 1 - steps) <= 0.5  # evaluations are one more than steps
    assert median(cosine_similarity(answer.g, answer.exact)) == pytest.approx(free, abs=1e-4)
    assert median(cosine_similarity(answer.w, answer.exact)) == pytest.approx(shine, abs=1e-4)


@pytest.mark.parametrize(
    ("rho", "start", "errors"),
    [
        (0.9, "shine", (0.27, 0.075, 0.022, 5.4e-4, 6.8e-7)),
        (0.9, "g", (0.28, 0.083, 0.026, 7.3e-4, 1.3e-6)),
        (0.9, "zeros", (1.0, 0.28, 0.083, 2.5e-3, 4.3e-6)),
        (3.0, "shine", (0.71, 0.53, 0.37, 0.073, 4.9e-3)),
        (3.0, "g", (0.76, 0.62, 0.55, 0.32, 0.11)),
        (3.0, "zeros", (1.0, 0.76, 0.65, 0.38, 0.13)),
    ],
)
def test_error_after_refining(rho: float, start: str, errors: tuple[float, ...]) -> None:
    # After 0, 1, 2, 5, 10 steps; the best iterates by residual.
    problem, solver = toy(rho), broyden(1e-4)
    starts = {"shine": VANILLA, "g": None, "zeros": torch.zeros_like(problem.b)}
    for steps, expected in zip((0, 1, 2, 5, 10), errors, strict=True):
        error = problem.solve(solver, refine(starts[start], steps)).error
        assert median(error) == pytest.approx(expected, rel=0.05), steps


# --- bad use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson(), eq.SteadyState()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("gradient", [eq.Shine(), eq.Implicit(start=eq.Shine())], ids=["Shine", "refine"])
def test_a_solver_without_inverse_is_refused(solver: eq.Solver, gradient: eq.gradients.Gradient) -> None:
    message = rf"{type(gradient).__name__}\(.*{type(solver).__name__} keeps none; use Broyden or LBFGS as solver"
    with pytest.raises(ValueError, match=message):
        eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=solver, gradient=gradient)
    layer = eq.nn.DEQ(torch.nn.Linear(2, 2), solver=solver, gradient=gradient, init=lambda: torch.zeros(1, 2))
    with pytest.raises(ValueError, match=message):
        layer()


@pytest.mark.parametrize("ratio", [-1.0, math.nan])
def test_a_negative_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"Shine\(fallback_ratio={ratio}\): must be >= 0"):
        eq.Shine(fallback_ratio=ratio)
