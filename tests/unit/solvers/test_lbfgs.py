"""L-BFGS: its inverse against dense BFGS, its line search, points outside the domain, nonconvex objectives."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from problems import dense_bfgs, minimize, quadratic, recorded, rosenbrock
from torch import Tensor

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.solvers import base

Objective = Callable[[Tensor], Tensor]
Recorded = recorded(eq.LBFGS)


def record(h: Objective, start: list[float], **fields: Any) -> tuple[list[Any], list[Any], eq.Solution[Tensor]]:
    """All evaluations of one sample, and those whose trial was accepted."""
    z0, solver = torch.tensor([start]), Recorded(rtol=0, **fields)
    solution = solver.solve(DescentMap(h, z0, params=()), z0, trace=True)
    return solver.log, [seen for seen in solver.log if not torch.equal(seen.before.base, seen.after.base)], solution


def pair(seen: Any) -> tuple[Tensor, Tensor]:
    return (seen.after.base - seen.before.base)[0], (seen.before.residual - seen.after.residual)[0]


# --- the inverse -----------------------------------------------------------------------------------------------------


def two_loop(pairs: list[tuple[Tensor, Tensor]], scaled: bool, q: Tensor) -> Tensor:
    s, y = pairs[-1]
    gamma, weights = (s @ y / (y @ y) if scaled else 1.0), []
    for s, y in reversed(pairs):
        weights.append(s @ q / (s @ y))
        q = q - weights[-1] * y
    q = gamma * q
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        q = q + (weight - y @ q / (s @ y)) * s
    return q


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("memory", [1, 4, 60])
@pytest.mark.thorough
def test_dense_bfgs(memory: int, scaled: bool) -> None:
    start = [-1.2, 1.0, -1.2, 1.0, 0.5, 2.0]
    _, steps, _ = record(rosenbrock, start, memory=memory, scaled=scaled, max_steps=60, atol=1e-9)
    assert len(steps) > (30 if scaled else 8)
    probe = torch.randn(6)
    for k, seen in enumerate(steps, start=1):
        pairs = [pair(old) for old in steps[max(0, k - memory) : k]]
        (s, y), inverse, expected = pairs[-1], seen.dense, dense_bfgs(pairs, scaled)
        near = {"rtol": 0, "atol": 1e-10 * float(expected.norm())}
        torch.testing.assert_close(inverse @ y, s, rtol=1e-10, atol=1e-10 * float(s.norm()))
        torch.testing.assert_close(inverse, expected, **near)
        torch.testing.assert_close(inverse, inverse.T, **near)
        torch.testing.assert_close(inverse @ probe, two_loop(pairs, scaled, probe), **near)
        assert bool((torch.linalg.eigvalsh(inverse) > 0).all())


@pytest.mark.thorough
def test_evicted_pairs() -> None:
    """Those evicted since the best iterate are lost, and no others."""
    some = 0
    for max_steps in range(6, 40, 4):
        log, steps, solution = record(rosenbrock, [-1.2, 1.0, 0.3], max_steps=max_steps, memory=3, atol=0.0)
        best = log[int(solution.trace[:, 0].argmin())]
        survivors = [pair(seen) for seen in steps[-3:] if seen.after.absorbed <= best.after.absorbed]
        some += 0 < len(survivors) < 3
        expected = dense_bfgs(survivors, scaled=True) if survivors else torch.eye(3)
        torch.testing.assert_close(solution.inverse.dense()[0], expected, rtol=1e-10, atol=1e-10)
        assert solution.inverse.rank.tolist() == [2 * len(survivors)]
    assert some > 0


# --- the search ------------------------------------------------------------------------------------------------------


def wavy(z: Tensor) -> Tensor:
    return torch.cos(3 * z).sum(dim=1) + 0.1 * z.square().sum(dim=1)


@pytest.mark.parametrize("wolfe", [0.1, 0.9])
@pytest.mark.parametrize(("h", "start"), [(rosenbrock, [-1.2, 1.0, -1.2, 1.0]), (wavy, [4.0, -2.0, 1.0])])
def test_wolfe_conditions(h: Objective, start: list[float], wolfe: float) -> None:
    """An accepted step meets both; a trial that does meet them is accepted."""
    log, steps, _ = record(h, start, max_steps=80, wolfe=wolfe, atol=1e-5)
    assert len(steps) > 3
    for seen in log[1:]:
        z, new, slack = seen.before.base, seen.point.z, 1e-12
        g, g_new = -seen.before.residual, torch.autograd.functional.jacobian(lambda z: h(z).sum(), new)
        torch.testing.assert_close(g_new, -seen.point.residual, rtol=1e-9, atol=1e-9)
        slope, end = float((g * (new - z)).sum()), float((g_new * (new - z)).sum())
        drop = float(h(new) - h(z)) - 1e-4 * slope
        if any(seen is step for step in steps):
            assert drop <= slack
            assert abs(end) <= wolfe * abs(slope) + slack
        else:
            assert drop > -slack or abs(end) > wolfe * abs(slope) - slack


@pytest.mark.parametrize("max_trials", [1, 2, 20])
def test_few_trials(max_trials: int) -> None:
    h, _, minimizer = quadratic(10, 30.0)
    solution = minimize(h, torch.zeros(1, 10), max_trials=max_trials).raise_for_status()
    torch.testing.assert_close(solution.value[0], minimizer, rtol=0, atol=1e-7)


class _Coarse(torch.autograd.Function):
    """Rounds values to steps of 1e-3, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 1e3).round() / 1e3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@pytest.mark.parametrize("value", ["cancelled", "offset", "coarse"])
@pytest.mark.thorough
def test_rounded_values(value: str) -> None:
    """Values that lost their digits to cancellation or to an offset, or that mislead, do not end the descent."""
    h, _, minimizer = quadratic(20, 1e2)
    least = float(h(minimizer[None]))
    shown = {"cancelled": lambda x: x - least, "offset": lambda x: x - least + 1e6, "coarse": _Coarse.apply}[value]
    solution = minimize(lambda z: shown(h(z)), torch.zeros(1, 20)).raise_for_status()
    torch.testing.assert_close(solution.value[0], minimizer, rtol=0, atol=1e-7)


def test_slopes_alone() -> None:
    """They solve symmetric systems in hardly more evaluations."""
    h, hessian, minimizer = quadratic(20, 1e2)
    z0, solver = torch.zeros(1, 20), eq.LBFGS(max_steps=200, rtol=0, atol=1e-10)
    f = eq.FunctionMap(lambda z: z - (z @ hessian - hessian @ minimizer), z0, params=())
    alone = solver.solve(f, z0).raise_for_status()
    torch.testing.assert_close(alone.value[0], minimizer, rtol=0, atol=1e-9)
    assert alone.num_evals <= minimize(h, z0, atol=1e-10).num_evals + 5


def test_no_gradient_map() -> None:
    """No theorem holds there; a nearly symmetric map is solved all the same, and any other ends with a status."""
    b = torch.randn(3, 6)
    for strength, statuses in [(0.02, {eq.Status.CONVERGED}), (1.0, set(eq.Status))]:
        weight = torch.diag(torch.linspace(-0.9, 0.5, 6)) + strength * torch.randn(6, 6)
        f = eq.FunctionMap(lambda z, b, w=weight: z @ w.T + b, torch.zeros(3, 6), (b,), params=())
        solution = eq.LBFGS(max_steps=100, rtol=1e-6, patience=50).solve(f, torch.zeros(3, 6))
        assert set(solution.status.tolist()) <= statuses
        assert bool(solution.value.isfinite().all())


# --- rows in different phases of their searches ----------------------------------------------------------------------

STARTS = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -1.0], [-3.0, 5.0], [0.5, 0.5], [1.01, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "aware"])
@pytest.mark.parametrize("mode", ["named", "closure", "unread"])
@pytest.mark.thorough
def test_batch_independence(mode: str, aware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of Rosenbrock's function never wait for each other, nor on a device, where no value is read."""
    plain = eq.LBFGS(max_steps=300, memory=5, rtol=0, atol=1e-8)

    def solve(rows: list[int], closure: bool = False) -> eq.Solution[Tensor]:
        numbers, z0 = torch.tensor(rows), STARTS[rows]
        loss = lambda z, chosen: (numbers[chosen] + 1) * torch.sin(z[:, 0]) + z[:, 1]  # noqa: E731
        solver = dataclasses.replace(plain, outer_every=2, outer_loss=loss) if aware else plain
        f = DescentMap(rosenbrock, z0, params=None if closure else ())
        return solver.solve(f, z0).raise_for_status()

    order = [3, 0, 1]
    parts = [solve([row]) for row in order]
    if mode == "unread":
        for module in ("base", "lbfgs"):
            monkeypatch.setattr(f"equipoise.solvers.{module}.can_branch_on", lambda x: False)
    whole = solve(order, closure=mode == "closure")
    assert mode == "unread" or whole.num_evals == whole.num_steps.max()
    assert whole.num_steps.tolist() == [int(part.num_steps) for part in parts]
    torch.testing.assert_close(whole.value, torch.cat([part.value for part in parts]), rtol=1e-10, atol=0)
    inverses = torch.cat([part.inverse.dense() for part in parts])
    torch.testing.assert_close(whole.inverse.dense(), inverses, rtol=1e-6, atol=1e-8)


# --- outside the domain ----------------------------------------------------------------------------------------------


def solve_barrier(target: Tensor, weight: float) -> Tensor:
    """With a log barrier: beyond the wall the value is NaN, though not the gradient."""

    def h(z: Tensor, target: Tensor) -> Tensor:
        return -weight * torch.log1p(-z.square()).sum(dim=1) + 100 * (z - target).square().sum(dim=1)

    f = DescentMap(h, torch.zeros_like(target), (target,), params=())
    return eq.LBFGS(max_steps=100, rtol=0, atol=1e-7).solve(f, torch.zeros_like(target)).raise_for_status().value


def test_points_not_finite() -> None:
    """The search backs away from them, and they are no answers."""
    value = solve_barrier(torch.tensor([[0.5, -0.5], [0.999, 0.0]]), weight=1e-3)
    root = scipy.optimize.brentq(lambda x: 1e-3 * 2 * x / (1 - x * x) + 200 * (x - 0.999), 0.5, 1 - 1e-9, xtol=1e-14)
    assert abs(float(value[1, 0]) - root) < 1e-8
    poles = minimize(lambda z: (1 / z.clamp_min(0) + z).sum(1), torch.full((2, 3), 1e-3), atol=1e-7).raise_for_status()
    torch.testing.assert_close(poles.value, torch.ones(2, 3), rtol=0, atol=1e-7)
    # A root of each polynomial lies inside: weight z / (1 - z^2) = 100 (target - z).
    inside = [next(z.real for z in np.roots([100, -100 * t, -100 - 30, 100 * t]) if abs(z) < 1) for t in (3.0, -7.0)]
    value = solve_barrier(torch.tensor([[3.0, -7.0]]), weight=30.0)
    torch.testing.assert_close(value, torch.tensor([inside]), rtol=0, atol=1e-7)


def test_wall_all_around() -> None:
    calls = 0

    def h(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return z.sum(dim=1) * (1.0 if calls == 1 else torch.nan)

    solution = minimize(h, torch.ones(1, 2))
    assert solution.status.tolist() == [eq.Status.NONFINITE]
    assert solution.num_evals == 2 + eq.LBFGS.retries == 22
    torch.testing.assert_close(solution.value, torch.ones(1, 2))


def test_finite_overflow() -> None:
    """Poisson regression on raw features: the first trials have rates of e^60 and more, which is finite."""
    features = 50 * torch.randn(200, 5)
    counts = torch.poisson(torch.exp(features @ torch.randn(5) / 100))

    def h(z: Tensor) -> Tensor:
        logits = z @ features.T
        return (torch.exp(logits) - logits * counts).mean(dim=1) + 5e-4 * z.square().sum(dim=1)

    solution = minimize(h, torch.zeros(1, 5), max_steps=100).raise_for_status()
    assert bool((solution.trace > base.DIVERGED_AT * solution.trace[0]).any())


def test_not_convex() -> None:
    """A well of many minima, one without a minimum, a ridge that falls for ever, a kink."""

    def h(z: Tensor, kind: Tensor) -> Tensor:
        square = z.square().sum(dim=1)
        kinds = torch.stack([torch.cos(3 * z).sum(1) + 0.05 * square, -square, z.sum(1), z.abs().sum(1)], dim=1)
        return kinds.gather(1, kind[:, None])[:, 0]

    z0, kind = torch.randn(8, 3), torch.tensor([0, 1, 2, 3] * 2)
    f = DescentMap(h, z0, (kind,), params=())
    solution = eq.LBFGS(max_steps=120, rtol=0, atol=1e-8, patience=60).solve(f, z0)
    names = [eq.Status(status).name for status in solution.status.tolist()]
    assert names == ["CONVERGED", "DIVERGED", "STALLED", "STALLED"] * 2
    minima = solution.value[::4]
    torch.testing.assert_close(3 * torch.sin(3 * minima), 0.1 * minima, rtol=0, atol=1e-7)
    assert bool((-9 * torch.cos(3 * minima) + 0.1 > 0).all()), "a minimum, not a saddle"
    assert solution.inverse.rank[1] == 0, "no pair with negative curvature is learned"
