"""Bilevel optimization of quadratic problems, with hypergradients and optima in closed form."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

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
    OuterSolution,
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
EXACT = Tolerance(1e-12)
ZERO = torch.zeros(1, SIZE, dtype=torch.float64)
PROBES = {"outer_every": 5, "outer_loss": lambda z, rows: z[:, 0]}


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


def minimize(**options: Any) -> OuterSolution:
    """Solve the ridge problem with one penalty, or with what the options change in it."""
    inner, outer = problem()
    given = {"outer": outer, "inner": inner, "z0": ZERO, "hyper0": torch.zeros(1), "bounds": BOUNDS, **options}
    return eq.minimize_outer(given.pop("outer"), given.pop("inner"), **given)


def closed_form(hyper: Tensor, rows: int = 1) -> tuple[Tensor, Tensor]:
    """The held-out loss and its gradient in the logarithms of the penalties, by dense algebra."""
    x, y, x_val, y_val = data(rows)
    hessian = x.mT @ x + torch.diag(hyper.exp().expand(SIZE))
    z = torch.linalg.solve(hessian, torch.einsum("bni,bn->bi", x, y))
    error = torch.einsum("bni,bi->bn", x_val, z) - y_val
    q = torch.linalg.solve(hessian, torch.einsum("bni,bn->bi", x_val, error))
    return 0.5 * error.square().sum(), (-hyper.exp() * z * q).sum(0).sum_to_size(hyper.shape)


def optimum(hyper0: Tensor, rows: int = 1) -> scipy.optimize.OptimizeResult:
    def f(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = closed_form(torch.tensor(x), rows)
        return float(value), slope.numpy()

    options = {"ftol": 1e-14, "gtol": 1e-10}
    return scipy.optimize.minimize(f, hyper0.numpy(), jac=True, bounds=[BOUNDS] * len(hyper0), options=options)


def first_gradient(hyper: Tensor, **options: Any) -> Tensor:
    """The exact first hypergradient, read off the length of tiny steps of the rule that moves along it."""
    given = {"gradient": CLOSE, "tolerance": EXACT, "step": HoagStep(), "bounds": None, **options}
    steps = minimize(hyper0=hyper, max_steps=2, **given).history
    direction = (steps[0].hyper[0] - steps[1].hyper[0]).reshape(-1)
    return direction / direction.norm() * steps[0].gradient_norm


@pytest.mark.parametrize(
    ("gradient", "vjps"), [(CLOSE, 34), (VANILLA, 0), (eq.Implicit(solver=eq.Broyden(memory=30), start=VANILLA), 16)]
)
def test_optimum(gradient: eq.Gradient, vjps: int) -> None:
    solution = minimize(gradient=gradient)
    best = optimum(torch.zeros(1))
    assert solution.status is OuterStatus.CONVERGED
    assert solution.converged
    assert (len(solution.history), solution.num_evals, solution.num_vjps) == (6, 30, vjps)
    assert solution.value == pytest.approx(best.fun, rel=1e-3)
    assert float(closed_form(solution.hyper[0])[0]) == pytest.approx(best.fun, rel=1e-3)
    assert solution.value == pytest.approx(float(problem()[1](solution.z, solution.hyper[0])), rel=1e-12)
    assert float(solution.hyper[0]) == pytest.approx(float(best.x[0]), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [CLOSE, VANILLA, eq.Implicit(solver=eq.Broyden(memory=30), start=VANILLA)])
def test_optimum_of_several(gradient: eq.Gradient) -> None:
    solution = minimize(gradient=gradient, hyper0=torch.zeros(SIZE))
    # There are local optima, which drop features.
    best = optimum(solution.hyper[0])
    assert solution.value == pytest.approx(best.fun, rel=1e-3)
    assert float(closed_form(solution.hyper[0])[0]) == pytest.approx(best.fun, rel=1e-3)


@pytest.mark.parametrize("hyper", [torch.tensor([0.3]), torch.linspace(-1, 1, SIZE)])
def test_first_gradient(hyper: Tensor) -> None:
    inner, outer = problem(3)
    found = first_gradient(hyper.double(), inner=inner, outer=outer, z0=ZERO.expand(3, -1))
    torch.testing.assert_close(found, closed_form(hyper.double(), 3)[1], rtol=1e-8, atol=1e-10)


def test_direct_dependence() -> None:
    hyper = torch.linspace(-1, 1, SIZE)
    slope = first_gradient(hyper, outer=lambda z, t: problem()[1](z, t) + t.pow(3).sum())
    torch.testing.assert_close(slope, closed_form(hyper)[1] + 3 * hyper**2, rtol=1e-8, atol=1e-10)


def test_independent_outer_loss() -> None:
    assert minimize(outer=lambda z, t: torch.ones(1)).history[0].gradient_norm == 0
    solution = minimize(outer=lambda z, t: (1 + (t - 1).square()).sum().expand(1))
    assert float(solution.hyper[0]) == pytest.approx(1, abs=0.01)


def test_map_gradient() -> None:
    weight = 0.4 * torch.randn(SIZE, SIZE) / math.sqrt(SIZE)
    target, hyper = torch.randn(1, SIZE), torch.randn(SIZE)
    tight = eq.Broyden(max_steps=100, memory=100)
    slope = first_gradient(
        hyper,
        outer=lambda z, t: 0.5 * (z - target).square().sum(1),
        inner=InnerMap(lambda z, t: torch.tanh(z @ weight.T + t)),
        solver=tight,
        gradient=eq.Implicit(solver=tight),
    )
    z = torch.zeros(SIZE)
    for _ in range(200):
        z = torch.tanh(weight @ z + hyper)
    local = torch.diag(1 - z**2)
    w = torch.linalg.solve((torch.eye(SIZE) - local @ weight).T, z - target[0])
    torch.testing.assert_close(slope, local @ w, rtol=1e-8, atol=1e-10)


def test_map_default_solver() -> None:
    weight = torch.randn(SIZE, SIZE)  # not symmetric
    weight *= 2.5 / torch.linalg.matrix_norm(weight, 2)
    shift, noise = torch.randn(2, 1, SIZE)

    def f(z: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(t.sigmoid() * (z @ weight.T) + shift)

    def solved(t: float) -> Tensor:
        options = {"solver": eq.Anderson(max_steps=500, rtol=1e-11), "gradient": eq.JacobianFree()}
        return eq.fixed_point(lambda z: f(z, torch.tensor(t)), ZERO, **options).value

    target = solved(0.4) + 0.1 * noise

    def outer(z: Tensor, t: Tensor) -> Tensor:
        return (z - target).square().sum(1)

    best = scipy.optimize.minimize_scalar(lambda t: float(outer(solved(t), t)), bounds=(-4, 3), method="bounded")
    solution = minimize(outer=outer, inner=InnerMap(f), hyper0=torch.tensor(-3.0), bounds=(-4, 3))
    assert solution.converged
    assert solution.hyper[0].item() == pytest.approx(best.x, abs=0.02)
    found = grid_search(outer, InnerMap(f), z0=ZERO, grid=torch.linspace(-2, 2, 5), tolerance=1e-6)
    for line in found.history:
        t = line.hyper[0].item()
        assert line.value == pytest.approx(outer(solved(t), t).item(), rel=1e-4)


@pytest.mark.thorough
def test_folds() -> None:
    inner, outer = problem(4)
    start, hyper = ZERO.expand(4, -1), torch.linspace(-1, 1, SIZE)
    together = first_gradient(hyper, inner=inner, outer=outer, z0=start)
    total = torch.zeros(SIZE)
    for row in range(4):
        x, y, x_val, y_val = (part[row : row + 1] for part in data(4))
        alone = InnerLoss(lambda z, x=x, y=y: squares(z, x, y), penalty)
        total += first_gradient(hyper, inner=alone, outer=lambda z, t, x=x_val, y=y_val: squares(z, x, y))
    torch.testing.assert_close(together, total, rtol=1e-8, atol=1e-10)
    solution = minimize(inner=inner, outer=outer, z0=start, gradient=CLOSE)
    assert solution.value == pytest.approx(optimum(torch.zeros(1), rows=4).fun, rel=1e-3)


@pytest.mark.parametrize(
    ("gradient", "counts"),
    [
        (CLOSE, ((4, 25, 20), (6, 39, 37))),
        (VANILLA, ((3, 19, 0), (6, 39, 0))),
        (eq.JacobianFree(), ((6, 37, 0), (6, 41, 0))),
        (eq.Neumann(steps=2), ((5, 30, 8), (6, 39, 12))),
        (eq.Phantom(), ((5, 30, 16), (6, 39, 24))),
        (eq.Unrolled(steps=2), ((5, 36, 0), (6, 45, 0))),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("step", [TrustRegion(), HoagStep()], ids=["region", "hoag"])
def test_counts(gradient: eq.Gradient, counts: Any, step: eq.bilevel.StepRule) -> None:
    x, y, x_val, y_val = (0.1 * part for part in data())  # eigenvalues below one
    calls = 0

    def loss(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return squares(z, x, y) + 0.1 * penalty(z, t)

    seen: list[tuple[OuterStep, Tensor]] = []
    solution = minimize(
        outer=lambda z, t: squares(z, x_val, y_val),
        inner=loss,
        bounds=(-3, 3),
        gradient=gradient,
        step=step,
        max_steps=6,
        observe=lambda step, z: seen.append((step, z)),
    )
    history = [step for step, _ in seen]
    assert solution.history == history
    assert [line.step for line in history] == [*range(1, len(seen) + 1)]
    assert (len(history), calls, solution.num_vjps) == counts[isinstance(step, HoagStep)]
    assert (solution.num_evals, solution.num_vjps) == (history[-1].num_evals, history[-1].num_vjps)
    assert solution.num_evals == calls
    assert solution.gradient_evals == history[-1].gradient_evals == calls + 2 * solution.num_vjps
    for line, z in seen:
        assert not z.requires_grad
        assert math.isclose(float(squares(z, x_val, y_val)), line.value, rel_tol=1e-12)
    assert solution.value <= history[0].value + 1e-9


def test_adjoint_solves() -> None:
    """They follow the tolerance, and each starts at the last adjoint solution."""
    reports: list[eq.Solution[Tensor]] = []
    solution = minimize(
        hyper0=torch.tensor([2.5]),
        bounds=None,
        gradient=eq.Implicit(solver=eq.CG(max_steps=100), observe=reports.append),
        step=HoagStep(),
        tolerance=Tolerance(1e-3, 0.5),
        max_steps=8,
    )
    assert len(reports) == 8
    for report, line in zip(reports, solution.history, strict=True):
        assert float(report.residual) <= 2 * line.tolerance
    # A new start would need about as many products as the first solve, or more, as the tolerance is tighter.
    steps = [int(report.num_steps) for report in reports]
    assert max(steps[4:]) <= steps[0]


def test_carried_pairs() -> None:
    inner = problem()[0]
    joint = InnerLoss(lambda z, t: inner.loss(z) + penalty(z, t))
    options = {"hyper0": torch.zeros(SIZE), "tolerance": EXACT, "step": HoagStep(), "max_steps": 5}
    carried, fresh = (minimize(inner=case, **options).num_evals for case in (inner, joint))
    assert carried < 0.8 * fresh
    # The corrected pairs are those of the new Hessian.
    f = inner.map(ZERO, (torch.zeros(SIZE),))
    s, after = torch.randn(1, 3, SIZE), torch.linspace(-1, 1, SIZE)
    change = inner.hessian_change(f, ZERO, s, (torch.zeros(SIZE),), (after,))
    torch.testing.assert_close(change, s * (after.exp() - 1))
    linear = InnerLoss(inner.loss, lambda z, t: (t * z).sum(1))
    assert linear.hessian_change(f, ZERO, s, (torch.zeros(SIZE),), (after,)).abs().max() == 0
    assert joint.hessian_change(f, ZERO, s, (), ()) is None
    assert InnerMap(lambda z, t: z).hessian_change(f, ZERO, s, (), ()) is None


def test_inner_solver() -> None:
    """Tolerance, probes and pairs of the inner solver at each step."""
    seen: list[Any] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recorder(eq.LBFGS):
        def solve(self, *args: Any, **options: Any) -> Any:
            seen.append(self)
            return super().solve(*args, **options)

    x, y, x_val, y_val = data()
    scale = float((x.mT @ y[..., None]).norm())  # of the first gradient, at zero
    options = {"max_steps": 3, "step": HoagStep(), "tolerance": Tolerance(1e-3, 0.5)}
    history = minimize(solver=Recorder(max_steps=200, memory=40, outer_every=2), **options).history
    assert [line.tolerance for line in history] == [1e-3, 5e-4, 2.5e-4]
    assert all(line.inner_converged for line in history)
    assert [solver.rtol for solver in seen] == [0, 0, 0]
    assert [solver.atol for solver in seen] == pytest.approx([line.tolerance * scale for line in history], rel=1e-12)
    assert seen[0].pairs is None
    assert all(solver.pairs is not None for solver in seen[1:])
    assert all(solver.outer_loss(ZERO, None).shape == (1,) for solver in seen)
    # The adjoint solution grows as the penalty falls, and the residual must be smaller by the same factor.
    seen.clear()
    history = minimize(solver=Recorder(max_steps=200), hyper0=torch.tensor(4.0), gradient=CLOSE, **options).history
    sizes = []
    for line in history:
        hessian = x[0].T @ x[0] + line.hyper[0].exp() * torch.eye(SIZE)
        z = torch.linalg.solve(hessian, x[0].T @ y[0])
        sizes.append(float(torch.linalg.solve(hessian, x_val[0].T @ (x_val[0] @ z - y_val[0])).norm()))
    factors = [1.0, 1.0, min(1.0, sizes[0] / sizes[1])]  # known after each step
    expected = [line.tolerance * scale * factor for line, factor in zip(history, factors, strict=True)]
    assert [solver.atol for solver in seen] == pytest.approx(expected, rel=1e-2)
    assert factors[2] < 0.9
    seen.clear()
    minimize(solver=Recorder(max_steps=200), tolerance=lambda step: 1e-15 * step, max_steps=1)
    assert seen[0].atol == pytest.approx(1e3 * torch.finfo(torch.float64).eps * scale, rel=1e-12, abs=0)
    assert seen[0].outer_loss is None
    seen.clear()
    minimize(inner=InnerMap(lambda z, t: 0.5 * z + t), solver=Recorder(max_steps=200), gradient=CLOSE, max_steps=1)
    assert (seen[0].rtol, seen[0].atol) == (1e-3, 0)


def test_probes() -> None:
    solution = minimize(solver=eq.LBFGS(max_steps=200, memory=40, outer_every=2))
    assert solution.value == pytest.approx(optimum(torch.zeros(1)).fun, rel=1e-3)


def test_structured_states() -> None:
    inner, outer = problem()

    def loss(z: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        flat = torch.cat([z["a"], z["b"]], dim=1)
        return inner.loss(flat) + penalty(z["a"], a) + penalty(z["b"], b)

    solution = minimize(
        outer=lambda z, a, b: outer(torch.cat([z["a"], z["b"]], dim=1), a),
        inner=loss,
        z0={"a": torch.zeros(1, 2), "b": torch.zeros(1, SIZE - 2)},
        hyper0=(torch.zeros(()), torch.zeros(1, SIZE - 2)),
        bounds=((-12.0, torch.full((SIZE - 2,), -12.0)), 12.0),
        gradient=CLOSE,
        max_steps=8,
    )
    a, b = solution.hyper
    assert (a.shape, b.shape) == ((), (1, SIZE - 2))
    assert solution.value >= optimum(torch.zeros(SIZE)).fun * (1 - 1e-3)
    assert float(closed_form(torch.cat([a.expand(2), b[0]]))[0]) == pytest.approx(solution.value, rel=1e-2)
    assert set(solution.z) == {"a", "b"}


# --- statuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "steps"),
    [
        ({"max_steps": 2}, OuterStatus.MAX_STEPS, 2),
        ({"max_steps": 1}, OuterStatus.MAX_STEPS, 1),
        ({"max_evals": 1}, OuterStatus.MAX_EVALS, 1),
        ({"solver": eq.LBFGS(max_steps=2), "max_steps": 3}, OuterStatus.INNER, 3),
        ({"outer": lambda z, t: z.sum(1) * math.nan}, OuterStatus.NONFINITE, 1),
        ({"inner": lambda z, t: penalty(z, t) * math.nan}, OuterStatus.NONFINITE, 1),
        ({"outer": lambda z, t: (1 + t.square() + 0 * (t - t).sqrt()).sum().expand(1)}, OuterStatus.NONFINITE, 1),
    ],
)
def test_statuses(options: dict[str, Any], status: OuterStatus, steps: int) -> None:
    solution = minimize(**options)
    assert solution.status is status
    assert status.remedy
    assert len(solution.history) == steps
    assert solution.history[0].step == 1


def test_budget() -> None:
    full = minimize(gradient=CLOSE)
    spent = full.history[2].gradient_evals
    for budget, steps in ((spent, 3), (spent + 1, 4)):
        solution = minimize(gradient=CLOSE, max_evals=budget)
        assert solution.status is OuterStatus.MAX_EVALS
        assert len(solution.history) == steps
    assert minimize(gradient=CLOSE, max_evals=full.gradient_evals).converged


def test_walls() -> None:
    outer = problem()[1]
    solution = minimize(outer=lambda z, t: torch.where(t > 1.0, math.nan, outer(z, t)), bounds=None, gradient=CLOSE)
    assert 0 < float(solution.hyper[0]) <= 1
    rejected = [line for line in solution.history if math.isnan(line.value)]
    assert rejected
    assert not any(line.accepted for line in rejected)
    assert all(math.isnan(line.gradient_norm) for line in rejected)


def test_determinism() -> None:
    first, second = (minimize(hyper0=torch.zeros(SIZE), max_steps=4).history for _ in range(2))
    assert [line.value for line in first] == [line.value for line in second]


def test_start_at_the_solution() -> None:
    inner = InnerLoss(lambda z, t: t.exp() * z.square().sum(1))
    solution = minimize(inner=inner, outer=lambda z, t: (1 + t.square()).expand(1), hyper0=torch.ones(()))
    assert solution.value == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hyper0": torch.zeros(1, dtype=torch.int64)}, TypeError, "hyper0"),
        ({"hyper0": 0.0}, TypeError, "hyper0 must be a floating-point tensor"),
        ({"hyper0": torch.tensor([math.nan])}, ValueError, "hyper0 must be finite"),
        ({"hyper0": torch.zeros(0)}, ValueError, "hyper0 is empty"),
        ({"bounds": (1.0, 2.0)}, ValueError, "within the bounds"),
        ({"bounds": (-2.0, -1.0)}, ValueError, "within the bounds"),
        ({"bounds": (2.0, 1.0)}, ValueError, "low <= high"),
        ({"bounds": 3.0}, TypeError, "pair"),
        ({"bounds": (1.0, 2.0, 3.0)}, TypeError, "pair"),
        ({"bounds": (torch.zeros(5) - 1, 1.0)}, ValueError, r"a bound has shape \(5,\), its hyperparameter \(1,\)"),
        ({"bounds": ((-1.0, -1.0), 1.0)}, ValueError, "a bound has 2 parts, hyper0 has 1"),
        ({"solver": "LBFGS"}, TypeError, "solver must be a Solver"),
        ({"gradient": eq.Shine}, TypeError, "gradient must be a Gradient"),
        ({"gradient": None}, TypeError, "gradient"),
        ({"tolerance": 1e-3}, TypeError, "tolerance"),
        ({"step": 0.1}, TypeError, "step"),
        ({"max_steps": 0}, ValueError, "max_steps must be >= 1, got 0"),
        ({"max_evals": 0}, ValueError, "max_evals must be >= 1, got 0"),
        ({"solver": eq.Anderson()}, ValueError, "inverse"),
        (
            {"solver": eq.LBFGS(**PROBES)},
            ValueError,
            r"LBFGS\(outer_every=...\) alone",
        ),
        (
            {"solver": eq.AdjointBroyden(**PROBES)},
            ValueError,
            "AdjointBroyden",
        ),
        ({"outer": lambda z, t: z.sum()}, ValueError, r"one number for each row of the state, \(1,\), got \(\)"),
        ({"outer": lambda z, t: 3.0}, ValueError, "got float"),
        ({"outer": torch.zeros(1)}, TypeError, "outer"),
        ({"inner": torch.zeros(1)}, TypeError, "InnerLoss"),
    ],
)
def test_errors(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        minimize(**options)


def test_inner_errors() -> None:
    with pytest.raises(TypeError, match="InnerLoss"):
        InnerLoss(penalty, 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="InnerMap"):
        InnerMap(torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("end", "bounds"), [(0.3, (0.0, 0.3)), (0.7, (0.7, 1.0))])
def test_bounds_in_single_precision(end: float, bounds: tuple[float, float]) -> None:
    hyper = torch.tensor([end], dtype=torch.float32)  # 0.3 is rounded up, 0.7 down
    solution = minimize(hyper0=hyper, bounds=bounds, solver=eq.LBFGS(max_steps=100), max_steps=2)
    assert solution.hyper[0].dtype == torch.float32
    assert all(torch.tensor(bounds[0]).float() <= line.hyper[0] for line in solution.history)


# --- searches ------------------------------------------------------------------------------------------------------


def test_grid_search() -> None:
    inner, outer = problem()
    grid = torch.linspace(-12, 12, 10)[:, None]
    solution = grid_search(outer, inner, z0=ZERO, grid=grid, tolerance=1e-8)
    values = [float(closed_form(point)[0]) for point in grid]
    assert torch.equal(solution.hyper[0], grid[int(np.argmin(values))])
    np.testing.assert_allclose([line.value for line in solution.history], values, rtol=1e-5)
    assert solution.converged
    assert all(line.accepted for line in solution.history)
    assert (solution.num_vjps, solution.num_evals) == (0, solution.history[-1].num_evals)
    again = grid_search(outer, inner, z0=ZERO, grid=grid[[4, 4, 4]]).history  # each solve starts at the last solution
    assert [line.num_evals - again[0].num_evals for line in again] == [0, 1, 2]
    for points, words in (([], "grid is empty"), ([torch.zeros(1), torch.zeros(2)], "same shapes")):
        with pytest.raises(ValueError, match=words):
            grid_search(outer, inner, z0=ZERO, grid=points)


def test_grid_with_walls() -> None:
    inner, outer = problem()
    grid = torch.tensor([[2.0], [0.0]])
    solution = grid_search(lambda z, t: torch.where(t > 1, math.nan, outer(z, t)), inner, z0=ZERO, grid=grid)
    assert [line.accepted for line in solution.history] == [False, True]
    assert solution.converged
    assert float(solution.hyper[0]) == 0
    solution = grid_search(lambda z, t: z.sum(1) * math.nan, inner, z0=ZERO, grid=torch.zeros(2, 1))
    assert solution.status is OuterStatus.NONFINITE


def test_random_search() -> None:
    inner, outer = problem()
    low, high = torch.linspace(-3, -1, SIZE), torch.linspace(0, 5, SIZE)

    def search(**options: Any) -> OuterSolution:
        given = {"hyper0": torch.zeros(SIZE), "bounds": (low, high), "num": 8, **options}
        return random_search(outer, inner, z0=ZERO, **given)

    solution = search(seed=1)
    assert solution.value == min(line.value for line in solution.history)
    points = torch.stack([line.hyper[0] for line in solution.history])
    generator = torch.Generator().manual_seed(1)
    expected = low + (high - low) * torch.rand(8, SIZE, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(points, expected, rtol=0, atol=0)
    assert not torch.equal(points[0], search(seed=2, num=1).hyper[0])
    assert torch.equal(search(num=1).hyper[0], search(seed=0, num=1).hyper[0])
    for options, words in (({"bounds": (0.0, math.inf)}, "bounds must be finite"), ({"num": 0}, "num must be >= 1")):
        with pytest.raises(ValueError, match=words):
            search(**options)
