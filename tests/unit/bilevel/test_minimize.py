"""Bilevel optimization of quadratic problems, whose hypergradient and optimum are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import equipoise as eq
from equipoise.bilevel import (
    HoagStep,
    InnerLoss,
    InnerMap,
    OuterStatus,
    OuterStep,
    Tolerance,
    TrustRegion,
    grid_search,
    random_search,
)

SIZE = 6
VANILLA = eq.Shine(fallback_ratio=math.inf)
CLOSE = eq.Implicit(solver=eq.CG(max_steps=100))
BOUNDS = (-12.0, 12.0)


def data(rows: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out features and targets of each row, `(rows, n, 6)` and `(rows, n)`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 40, SIZE, generator=generator)
    noise = torch.randn(4, 40, generator=generator)
    y = torch.einsum("bni,i->bn", x, torch.linspace(-1, 1, SIZE)) + 2 * noise
    return x[:rows, :20], y[:rows, :20], x[:rows, 20:], y[:rows, 20:]


def squares(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (torch.einsum("bni,bi->bn", x, z) - y).square().sum(1)


def penalty(z: Tensor, hyper: Tensor) -> Tensor:
    return 0.5 * (hyper.exp() * z.square()).sum(1)


def problem(rows: int = 1) -> tuple[InnerLoss, Callable[[Tensor, Tensor], Tensor]]:
    x, y, x_val, y_val = data(rows)
    return InnerLoss(lambda z: squares(z, x, y), penalty), lambda z, hyper: squares(z, x_val, y_val)


def closed_form(hyper: Tensor, rows: int = 1) -> tuple[Tensor, Tensor]:
    """The held-out loss and its gradient in the logarithms of the penalties, by dense algebra."""
    x, y, x_val, y_val = data(rows)
    total, slope = torch.zeros(()), torch.zeros_like(hyper)
    for row in range(rows):
        hessian = x[row].T @ x[row] + torch.diag(hyper.exp().expand(SIZE))
        z = torch.linalg.solve(hessian, x[row].T @ y[row])
        error = x_val[row] @ z - y_val[row]
        q = torch.linalg.solve(hessian, x_val[row].T @ error)
        total = total + 0.5 * error.square().sum()
        slope = slope + (-hyper.exp() * z * q).sum_to_size(hyper.shape)
    return total, slope


def optimum(hyper0: Tensor, rows: int = 1) -> scipy.optimize.OptimizeResult:
    def f(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = closed_form(torch.tensor(x), rows)
        return float(value), slope.numpy()

    options = {"ftol": 1e-14, "gtol": 1e-10}
    return scipy.optimize.minimize(f, hyper0.numpy(), jac=True, bounds=[BOUNDS] * len(hyper0), options=options)


def first_step(outer: Callable[..., Tensor], inner: object, hyper: Tensor, rows: int = 1, **options: object) -> Tensor:
    """The exact first hypergradient, read off the length of tiny steps of the rule that moves along it."""
    chosen = {"gradient": CLOSE, "tolerance": Tolerance(1e-12), "step": HoagStep(), **options}
    z0 = torch.zeros(rows, SIZE)
    steps = eq.minimize_outer(outer, inner, z0=z0, hyper0=hyper, max_steps=2, **chosen).history
    direction = (steps[0].hyper[0] - steps[1].hyper[0]).reshape(-1)
    return direction / direction.norm() * steps[0].gradient_norm


@pytest.mark.parametrize("gradient", [CLOSE, VANILLA, eq.Implicit(solver=eq.Broyden(memory=30), start=VANILLA)])
@pytest.mark.parametrize("size", [1, pytest.param(SIZE, marks=pytest.mark.slow)])
def test_the_optimum_is_that_of_the_closed_form(gradient: eq.Gradient, size: int) -> None:
    inner, outer = problem()
    solution = eq.minimize_outer(
        outer, inner, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(size), bounds=BOUNDS, gradient=gradient
    )
    assert solution.status is OuterStatus.CONVERGED
    # One penalty has one optimum; with several there are local ones, where features are dropped.
    best = optimum(torch.zeros(1) if size == 1 else solution.hyper[0])
    assert solution.value == pytest.approx(best.fun, rel=1e-3)
    assert float(closed_form(solution.hyper[0])[0]) == pytest.approx(best.fun, rel=1e-3)
    assert solution.value == pytest.approx(float(outer(solution.z, solution.hyper[0])), rel=1e-12)
    if size == 1:
        assert float(solution.hyper[0]) == pytest.approx(float(best.x[0]), abs=0.1)


@pytest.mark.parametrize("hyper", [torch.tensor([0.3]), torch.linspace(-1, 1, SIZE)])
def test_the_first_hypergradient_is_that_of_the_closed_form(hyper: Tensor) -> None:
    hyper = hyper.double()
    inner, outer = problem(rows=3)
    torch.testing.assert_close(first_step(outer, inner, hyper, 3), closed_form(hyper, 3)[1], rtol=1e-8, atol=1e-10)


def test_the_outer_loss_may_depend_on_the_hyperparameters_itself() -> None:
    inner, outer = problem()
    hyper = torch.linspace(-1, 1, SIZE)
    slope = first_step(lambda z, t: outer(z, t) + t.pow(3).sum(), inner, hyper)
    torch.testing.assert_close(slope, closed_form(hyper)[1] + 3 * hyper**2, rtol=1e-8, atol=1e-10)


def test_an_inner_map_has_the_hypergradient_of_dense_algebra() -> None:
    weight = 0.4 * torch.randn(SIZE, SIZE) / math.sqrt(SIZE)
    target, hyper = torch.randn(1, SIZE), torch.randn(SIZE)
    tight = eq.Broyden(max_steps=100, memory=100)
    slope = first_step(
        lambda z, t: 0.5 * (z - target).square().sum(1),
        InnerMap(lambda z, t: torch.tanh(z @ weight.T + t)),
        hyper,
        solver=tight,
        gradient=eq.Implicit(solver=tight),
    )
    z = torch.zeros(SIZE)
    for _ in range(200):
        z = torch.tanh(weight @ z + hyper)
    local = torch.diag(1 - z**2)
    w = torch.linalg.solve((torch.eye(SIZE) - local @ weight).T, z - target[0])
    torch.testing.assert_close(slope, local @ w, rtol=1e-8, atol=1e-10)


def test_an_inner_map_whose_jacobian_is_not_symmetric_needs_no_choice_of_a_solver() -> None:
    weight = torch.randn(SIZE, SIZE)
    weight *= 2.5 / torch.linalg.matrix_norm(weight, 2)
    shift, noise = torch.randn(2, 1, SIZE)

    def f(z: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(t.sigmoid() * (z @ weight.T) + shift)

    def solved(t: float) -> Tensor:
        options = {"solver": eq.Anderson(max_steps=500, rtol=1e-11), "gradient": eq.JacobianFree()}
        return eq.fixed_point(lambda z: f(z, torch.tensor(t)), torch.zeros(1, SIZE), **options).value

    target = solved(0.4) + 0.1 * noise

    def outer(z: Tensor, t: Tensor) -> Tensor:
        return (z - target).square().sum(1)

    best = scipy.optimize.minimize_scalar(lambda t: float(outer(solved(t), t)), bounds=(-4, 3), method="bounded")
    options = {"z0": torch.zeros(1, SIZE), "bounds": (-4, 3)}
    solution = eq.minimize_outer(outer, InnerMap(f), hyper0=torch.tensor(-3.0), **options)
    assert solution.converged
    assert solution.hyper[0].item() == pytest.approx(best.x, abs=0.02)
    found = grid_search(outer, InnerMap(f), z0=torch.zeros(1, SIZE), grid=torch.linspace(-2, 2, 5), tolerance=1e-6)
    for line in found.history:
        t = line.hyper[0].item()
        assert line.value == pytest.approx(outer(solved(t), t).item(), rel=1e-4)


def test_folds_solved_together_are_the_sum_of_folds_solved_alone() -> None:
    inner, outer = problem(rows=4)
    hyper = torch.linspace(-1, 1, SIZE)
    together = first_step(outer, inner, hyper, 4)
    total = torch.zeros(SIZE)
    for row in range(4):
        x, y, x_val, y_val = (part[row : row + 1] for part in data(4))
        alone = InnerLoss(lambda z, x=x, y=y: squares(z, x, y), penalty)
        total += first_step(lambda z, t, x=x_val, y=y_val: squares(z, x, y), alone, hyper)
    torch.testing.assert_close(together, total, rtol=1e-8, atol=1e-10)
    best = optimum(torch.zeros(1), rows=4)
    solution = eq.minimize_outer(
        outer, inner, z0=torch.zeros(4, SIZE), hyper0=torch.zeros(1), bounds=BOUNDS, gradient=CLOSE
    )
    assert solution.value == pytest.approx(best.fun, rel=1e-3)


@pytest.mark.parametrize(
    "gradient",
    [CLOSE, VANILLA, eq.JacobianFree(), eq.Neumann(steps=2), eq.Phantom(), eq.Unrolled(steps=2)],
    ids=lambda gradient: type(gradient).__name__,
)
@pytest.mark.parametrize("step", [TrustRegion(), HoagStep()], ids=["region", "hoag"])
def test_every_gradient_runs_and_its_calls_are_counted(gradient: eq.Gradient, step: eq.bilevel.StepRule) -> None:
    x, y, x_val, y_val = (0.1 * part for part in data())  # eigenvalues below one
    calls = 0

    def loss(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return squares(z, x, y) + 0.1 * penalty(z, t)

    seen: list[tuple[OuterStep, Tensor]] = []
    solution = eq.minimize_outer(
        lambda z, t: squares(z, x_val, y_val),
        loss,
        z0=torch.zeros(1, SIZE),
        hyper0=torch.zeros(1),
        bounds=(-3, 3),
        gradient=gradient,
        step=step,
        max_steps=6,
        observe=lambda step, z: seen.append((step, z)),
    )
    history = [step for step, _ in seen]
    assert solution.num_evals == calls == history[-1].num_evals
    assert solution.history == history
    assert [line.step for line in history] == [*range(1, len(seen) + 1)]
    for step, z in seen:
        assert not z.requires_grad
        assert math.isclose(float(squares(z, x_val, y_val)), step.value, rel_tol=1e-12)
    assert math.isfinite(solution.value)
    assert solution.value <= history[0].value + 1e-9
    products = type(gradient) in (eq.Implicit, eq.Neumann, eq.Phantom)
    assert (solution.num_vjps > 0) == products
    assert solution.gradient_evals == solution.num_evals + 2 * solution.num_vjps


def test_the_callers_observer_sees_adjoint_solves_that_follow_the_tolerance_and_start_at_the_last() -> None:
    inner, outer = problem()
    reports: list[eq.Solution[Tensor]] = []
    gradient = eq.Implicit(solver=eq.CG(max_steps=100), observe=reports.append)
    solution = eq.minimize_outer(
        outer, inner, z0=torch.zeros(1, SIZE), hyper0=torch.tensor([2.5]), gradient=gradient, step=HoagStep(),
        tolerance=Tolerance(1e-3, 0.5), max_steps=8,
    )  # fmt: skip
    assert len(reports) == 8
    for report, line in zip(reports, solution.history, strict=True):
        assert float(report.residual) <= 2 * line.tolerance
    # An adjoint solve that started anew would need about as many products as the first one, for it is tighter.
    steps = [int(report.num_steps) for report in reports]
    assert max(steps[4:]) <= steps[0]


def test_what_lbfgs_learned_is_carried_over_and_corrected() -> None:
    inner, outer = problem()
    joint = InnerLoss(lambda z, t: inner.loss(z) + penalty(z, t))
    counts = {}
    for name, case in (("carried", inner), ("fresh", joint)):
        solution = eq.minimize_outer(
            outer, case, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(SIZE), bounds=BOUNDS, tolerance=Tolerance(1e-12),
            step=HoagStep(), max_steps=5,
        )  # fmt: skip
        counts[name] = solution.num_evals
    assert counts["carried"] < 0.8 * counts["fresh"]
    # The corrected pairs are those of the new Hessian.
    f = inner.map(torch.zeros(1, SIZE), (torch.zeros(SIZE),))
    s = torch.randn(1, 3, SIZE)
    after = torch.linspace(-1, 1, SIZE)
    change = inner.hessian_change(f, torch.zeros(1, SIZE), s, (torch.zeros(SIZE),), (after,))
    torch.testing.assert_close(change, s * (after.exp() - 1))


def test_solvers_learn_the_outer_loss() -> None:
    inner, outer = problem()
    solution = eq.minimize_outer(
        outer, inner, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(1), bounds=BOUNDS,
        solver=eq.LBFGS(max_steps=200, memory=40, outer_every=2),
    )  # fmt: skip
    assert solution.value == pytest.approx(optimum(torch.zeros(1)).fun, rel=1e-3)


def test_several_tensors_as_hyperparameters_and_as_state() -> None:
    inner, outer = problem()

    def loss(z: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        flat = torch.cat([z["a"], z["b"]], dim=1)
        return inner.loss(flat) + penalty(z["a"], a) + penalty(z["b"], b)

    solution = eq.minimize_outer(
        lambda z, a, b: outer(torch.cat([z["a"], z["b"]], dim=1), a),
        loss,
        z0={"a": torch.zeros(1, 2), "b": torch.zeros(1, SIZE - 2)},
        hyper0=(torch.zeros(()), torch.zeros(1, SIZE - 2)),
        bounds=((-12.0, torch.full((SIZE - 2,), -12.0)), 12.0),
        gradient=CLOSE,
        max_steps=8,
    )
    a, b = solution.hyper
    assert (a.shape, b.shape) == ((), (1, SIZE - 2))
    best = optimum(torch.zeros(SIZE))
    assert solution.value >= best.fun * (1 - 1e-3)
    assert float(closed_form(torch.cat([a.expand(2), b[0]]))[0]) == pytest.approx(solution.value, rel=1e-2)
    assert set(solution.z) == {"a", "b"}


# --- statuses ------------------------------------------------------------------------------------------------------


def test_statuses_tell_how_it_ended() -> None:
    inner, outer = problem()
    options = {"z0": torch.zeros(1, SIZE), "hyper0": torch.zeros(1), "bounds": BOUNDS}
    assert eq.minimize_outer(outer, inner, max_steps=2, **options).status is OuterStatus.MAX_STEPS
    budget = eq.minimize_outer(outer, inner, max_evals=1, **options)
    assert budget.status is OuterStatus.MAX_EVALS
    assert len(budget.history) == 1
    short = eq.minimize_outer(outer, inner, solver=eq.LBFGS(max_steps=2), max_steps=3, **options)
    assert short.status is OuterStatus.INNER
    broken = eq.minimize_outer(lambda z, t: outer(z, t) * math.nan, inner, **options)
    assert broken.status is OuterStatus.NONFINITE
    sick = eq.minimize_outer(outer, lambda z, t: penalty(z, t) * math.nan, **options)
    assert sick.status is OuterStatus.NONFINITE
    assert all(status.remedy for status in OuterStatus)


def test_regions_without_finite_values_are_left() -> None:
    inner, outer = problem()

    def walled(z: Tensor, t: Tensor) -> Tensor:
        return torch.where(t > 1.0, math.nan, outer(z, t))

    solution = eq.minimize_outer(walled, inner, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(1), gradient=CLOSE)
    assert 0 < float(solution.hyper[0]) <= 1
    assert any(math.isnan(line.value) for line in solution.history)


def test_equal_calls_have_equal_histories() -> None:
    inner, outer = problem()
    runs = [
        eq.minimize_outer(outer, inner, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(SIZE), max_steps=4)
        for _ in range(2)
    ]
    assert [line.value for line in runs[0].history] == [line.value for line in runs[1].history]


def test_a_start_at_the_solution_of_the_inner_problem() -> None:
    inner = InnerLoss(lambda z, t: t.exp() * z.square().sum(1))
    solution = eq.minimize_outer(
        lambda z, t: (1 + t.square()).expand(1), inner, z0=torch.zeros(1, 2), hyper0=torch.ones(())
    )
    assert solution.value == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hyper0": torch.zeros(1, dtype=torch.int64)}, TypeError, "hyper0"),
        ({"hyper0": 0.0}, TypeError, "hyper0 must be a floating-point tensor"),
        ({"hyper0": torch.tensor([math.nan])}, ValueError, "hyper0"),
        ({"hyper0": torch.zeros(0)}, ValueError, "hyper0"),
        ({"bounds": (1.0, 2.0)}, ValueError, "within the bounds"),
        ({"bounds": (2.0, 1.0)}, ValueError, "low <= high"),
        ({"bounds": 3.0}, TypeError, "pair"),
        ({"bounds": (torch.zeros(5) - 1, 1.0)}, ValueError, "shape"),
        ({"bounds": ((-1.0, -1.0), 1.0)}, ValueError, "parts"),
        ({"solver": "LBFGS"}, TypeError, "solver"),
        ({"gradient": eq.Shine}, TypeError, "gradient"),
        ({"tolerance": 1e-3}, TypeError, "tolerance"),
        ({"step": 0.1}, TypeError, "step"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"max_evals": 0}, ValueError, "max_evals"),
        ({"solver": eq.Anderson()}, ValueError, "inverse"),
        (
            {"solver": eq.LBFGS(outer_every=5, outer_loss=lambda z, rows: z[:, 0])},
            ValueError,
            r"give LBFGS\(outer_every=...\) alone",
        ),
        (
            {"solver": eq.AdjointBroyden(outer_every=5, outer_loss=lambda z, rows: z[:, 0])},
            ValueError,
            "AdjointBroyden",
        ),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], error: type[Exception], words: str) -> None:
    inner, outer = problem()
    chosen = {"z0": torch.zeros(1, SIZE), "hyper0": torch.zeros(1), **options}
    with pytest.raises(error, match=words):
        eq.minimize_outer(outer, inner, **chosen)


def test_bounds_are_rounded_as_hyperparameters_are() -> None:
    inner, outer = problem()
    for end, bounds in ((0.3, (0.0, 0.3)), (0.7, (0.7, 1.0))):
        hyper = torch.tensor([end], dtype=torch.float32)  # 0.3 is rounded up, 0.7 down
        solution = eq.minimize_outer(
            outer,
            inner,
            z0=torch.zeros(1, SIZE),
            hyper0=hyper,
            bounds=bounds,
            solver=eq.LBFGS(max_steps=100),
            max_steps=2,
        )
        assert solution.hyper[0].dtype == torch.float32


def test_functions_of_the_wrong_kind_or_shape_are_named() -> None:
    inner, outer = problem()
    options = {"z0": torch.zeros(1, SIZE), "hyper0": torch.zeros(1)}
    with pytest.raises(ValueError, match="one number for each row"):
        eq.minimize_outer(lambda z, t: outer(z, t).sum(), inner, **options)
    with pytest.raises(TypeError, match="outer"):
        eq.minimize_outer(torch.zeros(1), inner, **options)
    with pytest.raises(TypeError, match="InnerLoss"):
        eq.minimize_outer(outer, torch.zeros(1), **options)
    with pytest.raises(TypeError, match="InnerMap"):
        InnerMap(torch.zeros(1))


# --- searches ------------------------------------------------------------------------------------------------------


def test_a_grid_is_searched_for_its_best_point() -> None:
    inner, outer = problem()
    grid = torch.linspace(-12, 12, 10)[:, None]
    solution = grid_search(outer, inner, z0=torch.zeros(1, SIZE), grid=grid, tolerance=1e-8)
    values = [float(closed_form(point)[0]) for point in grid]
    assert torch.equal(solution.hyper[0], grid[int(np.argmin(values))])
    np.testing.assert_allclose([line.value for line in solution.history], values, rtol=1e-5)
    assert solution.converged
    assert solution.num_vjps == 0
    assert solution.num_evals == solution.history[-1].num_evals
    with pytest.raises(ValueError, match="grid"):
        grid_search(outer, inner, z0=torch.zeros(1, SIZE), grid=[])
    with pytest.raises(ValueError, match="same shapes"):
        grid_search(outer, inner, z0=torch.zeros(1, SIZE), grid=[torch.zeros(1), torch.zeros(2)])


def test_random_points_lie_within_the_bounds_and_depend_on_the_seed_alone() -> None:
    inner, outer = problem()
    low, high = torch.linspace(-3, -1, SIZE), torch.linspace(0, 5, SIZE)

    def search(seed: int) -> list[Tensor]:
        solution = random_search(
            outer, inner, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(SIZE), bounds=(low, high), num=8, seed=seed
        )
        assert solution.value == min(line.value for line in solution.history)
        return [line.hyper[0] for line in solution.history]

    points = torch.stack(search(1))
    assert bool(((low <= points) & (points <= high)).all())
    assert bool((points.std(0) > 0.1 * (high - low)).all())
    assert torch.equal(points, torch.stack(search(1)))
    assert not torch.equal(points, torch.stack(search(2)))
    with pytest.raises(ValueError, match="bounds must be finite"):
        random_search(outer, inner, z0=torch.zeros(1, SIZE), hyper0=torch.zeros(1), bounds=(0.0, math.inf))


def test_a_search_without_a_finite_value_says_so() -> None:
    inner, _ = problem()
    solution = grid_search(lambda z, t: z.sum(1) * math.nan, inner, z0=torch.zeros(1, SIZE), grid=torch.zeros(2, 1))
    assert solution.status is OuterStatus.NONFINITE
