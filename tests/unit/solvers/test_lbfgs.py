"""L-BFGS: its inverse against dense BFGS, its search against the Wolfe conditions, its counts against SciPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.solvers import base, lbfgs

Objective = Callable[[Tensor], Tensor]


def rosenbrock(z: Tensor) -> Tensor:
    return (100 * (z[:, 1:] - z[:, :-1] ** 2) ** 2 + (1 - z[:, :-1]) ** 2).sum(dim=1)


def quadratic(size: int, condition: float, offset: float = 0.0) -> tuple[Objective, Tensor, Tensor]:
    """An objective, its Hessian and its minimiser."""
    generator = torch.Generator().manual_seed(size)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    hessian = (q * torch.logspace(0, float(np.log10(condition)), size)) @ q.T
    b = torch.randn(size, generator=generator)
    return lambda z: 0.5 * ((z @ hessian) * z).sum(1) - z @ b + offset, hessian, torch.linalg.solve(hessian, b)


def minimise(h: Objective, z0: Tensor, solver: eq.LBFGS, *, closure: bool = False) -> eq.Solution[Tensor]:
    return solver.solve(DescentMap(h, z0, params=None if closure else ()), z0, trace=True)


def gradient_of(h: Objective, z: Tensor) -> Tensor:
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(h(leaf).sum(), leaf)[0]


def scipy_lbfgs(h: Objective, z0: Tensor, memory: int, atol: float) -> tuple[int, Tensor]:
    """Evaluations that SciPy needs until one of them has a gradient below `atol`, and the point."""
    seen: list[tuple[float, np.ndarray]] = []

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        z = torch.tensor(x)[None]
        g = gradient_of(h, z)[0]
        seen.append((float(g.norm()), x.copy()))
        return float(h(z)), g.numpy()

    options = {"maxcor": memory, "ftol": 0.0, "gtol": 0.0, "maxiter": 10_000, "maxfun": 10_000}
    scipy.optimize.minimize(evaluate, z0[0].numpy(), jac=True, method="L-BFGS-B", options=options)
    count = next(i + 1 for i, (norm, _) in enumerate(seen) if norm <= atol)
    return count, torch.tensor(seen[count - 1][1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder(eq.LBFGS):
    """Notes each accepted step of a batch of one: evaluation number, s, y, and the inverse right after it."""

    log: list[tuple[int, Tensor, Tensor, Any]] = dataclasses.field(default_factory=list)

    def propose(self, memory: Any, point: eq.Point) -> Tensor:
        z, r = memory.base, memory.residual
        proposal = super().propose(memory, point)
        if not torch.equal(z, memory.base):
            inverse = self.inverse(memory, torch.tensor([memory.absorbed]))
            dense = eq.InverseEstimate.of(inverse.gamma, inverse.basis, inverse.core).dense()[0]
            self.log.append((memory.absorbed, (memory.base - z)[0], (r - memory.residual)[0], dense))
        return proposal


def dense_bfgs(pairs: list[tuple[Tensor, Tensor]], scaled: bool) -> Tensor:
    s, y = pairs[-1]
    h = torch.eye(len(s)) * (s @ y / (y @ y) if scaled else 1.0)
    for s, y in pairs:
        v = torch.eye(len(s)) - torch.outer(y, s) / (s @ y)
        h = v.T @ h @ v + torch.outer(s, s) / (s @ y)
    return h


def two_loop(pairs: list[tuple[Tensor, Tensor]], scaled: bool, q: Tensor) -> Tensor:
    s, y = pairs[-1]
    gamma = s @ y / (y @ y) if scaled else 1.0
    weights = []
    for s, y in reversed(pairs):
        weights.append(s @ q / (s @ y))
        q = q - weights[-1] * y
    q = gamma * q
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        q = q + (weight - y @ q / (s @ y)) * s
    return q


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("memory", [1, 4, 60])
def test_inverse_is_that_of_dense_bfgs_at_every_step(memory: int, scaled: bool) -> None:
    solver = Recorder(memory=memory, scaled=scaled, max_steps=60, rtol=0, atol=1e-9)
    minimise(rosenbrock, torch.tensor([[-1.2, 1.0, -1.2, 1.0, 0.5, 2.0]]), solver)
    assert len(solver.log) > (30 if scaled else 8)
    probe = torch.randn(6)
    for k, (_, s, y, inverse) in enumerate(solver.log, start=1):
        pairs = [(s, y) for _, s, y, _ in solver.log[max(0, k - memory) : k]]
        torch.testing.assert_close(inverse @ y, s, rtol=1e-10, atol=1e-10 * float(s.norm()))
        expected = dense_bfgs(pairs, scaled)
        tolerance = 1e-10 * float(expected.norm())
        torch.testing.assert_close(inverse, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=tolerance)
        torch.testing.assert_close(inverse @ probe, two_loop(pairs, scaled, probe), rtol=0, atol=tolerance)
        assert bool((torch.linalg.eigvalsh(inverse) > 0).all())


def test_inverse_belongs_to_the_best_iterate() -> None:
    z0 = torch.tensor([[-1.2, 1.0, 0.3]])
    older = 0
    for max_steps in range(3, 36, 3):
        solution = minimise(rosenbrock, z0, eq.LBFGS(max_steps=max_steps, memory=40, rtol=0, atol=0.0))
        assert solution.trace is not None
        assert solution.inverse is not None
        best = int(solution.trace[:, 0].argmin()) + 1
        older += best < max_steps
        there = minimise(rosenbrock, z0, eq.LBFGS(max_steps=best, memory=40, rtol=0, atol=0.0))
        assert there.inverse is not None
        torch.testing.assert_close(solution.inverse.dense(), there.inverse.dense(), rtol=1e-12, atol=1e-12)
    assert older > 3, "the best iterate must often be older than the last for this test to say something"


def test_pairs_evicted_since_the_best_iterate_are_lost_and_no_others() -> None:
    seen = 0
    for max_steps in range(6, 40, 2):
        solver = Recorder(max_steps=max_steps, memory=3, rtol=0, atol=0.0)
        solution = minimise(rosenbrock, torch.tensor([[-1.2, 1.0, 0.3]]), solver)
        assert solution.trace is not None
        assert solution.inverse is not None
        best = int(solution.trace[:, 0].argmin()) + 1
        survivors = [(s, y) for step, s, y, _ in solver.log[-3:] if step <= best]
        seen += 0 < len(survivors) < 3
        expected = dense_bfgs(survivors, scaled=True) if survivors else torch.eye(3)
        torch.testing.assert_close(solution.inverse.dense()[0], expected, rtol=1e-10, atol=1e-10)
        assert solution.inverse.rank.tolist() == [2 * len(survivors)]
    assert seen > 0


@pytest.mark.parametrize("closure", [False, True])
def test_rows_that_stopped_keep_their_inverse(closure: bool) -> None:
    """The others go on for long after, past the memory's end, whether rows leave the batch or not."""
    z0 = torch.tensor([[1.01, 1.0], [-1.2, 1.0], [0.9, 0.8], [1.0, 1.0], [-3.0, 5.0]])
    solver = eq.LBFGS(max_steps=100, memory=4, rtol=0, atol=1e-8)
    together = minimise(rosenbrock, z0, solver, closure=closure)
    assert together.inverse is not None
    assert together.num_steps.max() > 3 * together.num_steps.min()
    for row in range(len(z0)):
        alone = minimise(rosenbrock, z0[row : row + 1], solver)
        assert alone.inverse is not None
        assert together.inverse.rank[row] == alone.inverse.rank[0]
        torch.testing.assert_close(together.inverse.dense()[row], alone.inverse.dense()[0], rtol=1e-8, atol=1e-9)


def test_a_start_without_steps_has_the_identity_as_inverse() -> None:
    solution = minimise(rosenbrock, torch.ones(2, 4), eq.LBFGS(atol=1e-12))
    assert solution.num_evals == 1
    assert solution.inverse is not None
    torch.testing.assert_close(solution.inverse.dense(), torch.eye(4).expand(2, 4, 4), rtol=0, atol=0)


@pytest.mark.parametrize("start", [[-1.2, 1.0], [2.0, -1.0], [-3.0, 5.0], [-1.2, 1.0] * 5])
def test_rosenbrock_against_scipy(start: list[float]) -> None:
    z0 = torch.tensor([start])
    solution = minimise(rosenbrock, z0, eq.LBFGS(max_steps=200, memory=10, rtol=0, atol=1e-8)).raise_for_status()
    count, minimiser = scipy_lbfgs(rosenbrock, z0, 10, 1e-8)
    torch.testing.assert_close(solution.value[0], minimiser, rtol=0, atol=1e-8)
    torch.testing.assert_close(solution.value, torch.ones_like(z0), rtol=0, atol=1e-8)
    assert solution.num_evals <= 1.1 * count + 3


@pytest.mark.parametrize(
    ("size", "condition"), [(10, 1e2), *(pytest.param(*p, marks=pytest.mark.slow) for p in [(50, 1e2), (30, 1e3)])]
)
def test_quadratics_against_scipy(size: int, condition: float) -> None:
    h, _, minimiser = quadratic(size, condition)
    z0 = torch.zeros(1, size)
    solver = eq.LBFGS(max_steps=500, memory=10, rtol=0, atol=1e-5)
    # SciPy's search gives up where values differ by their rounding only; so counts are compared before that.
    count, _ = scipy_lbfgs(h, z0, 10, 1e-5)
    assert minimise(h, z0, solver).raise_for_status().num_evals <= 1.1 * count + 3
    fine = minimise(h, z0, dataclasses.replace(solver, atol=1e-9)).raise_for_status()
    torch.testing.assert_close(fine.value[0], minimiser, rtol=0, atol=1e-8)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_rounding_of_values_does_not_end_the_descent(offset: float) -> None:
    h, _, minimiser = quadratic(20, 1e2)
    at_best = float(h(minimiser[None]))
    # With the value at the minimum subtracted, values lose all their digits to cancellation.
    solution = minimise(
        lambda z: h(z) - at_best + offset, torch.zeros(1, 20), eq.LBFGS(max_steps=300, rtol=0, atol=1e-9)
    ).raise_for_status()
    torch.testing.assert_close(solution.value[0], minimiser, rtol=0, atol=1e-8)


class _Coarse(torch.autograd.Function):
    """Rounds values to steps of 1e-3, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 1e3).round() / 1e3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_misleading_values_are_no_longer_heeded() -> None:
    h, _, minimiser = quadratic(20, 1e2)
    solver = eq.LBFGS(max_steps=300, rtol=0, atol=1e-8)
    solution = minimise(lambda z: _Coarse.apply(h(z)), torch.zeros(1, 20), solver).raise_for_status()
    torch.testing.assert_close(solution.value[0], minimiser, rtol=0, atol=1e-7)


def test_slopes_alone_solve_symmetric_systems() -> None:
    h, hessian, minimiser = quadratic(20, 1e2)
    z0 = torch.zeros(1, 20)
    solver = eq.LBFGS(max_steps=200, memory=10, rtol=0, atol=1e-10)
    gradient = hessian @ minimiser
    f = eq.FunctionMap(lambda z: z - (z @ hessian - gradient), z0, params=())
    alone = solver.solve(f, z0).raise_for_status()
    torch.testing.assert_close(alone.value[0], minimiser, rtol=0, atol=1e-9)
    assert alone.num_evals <= minimise(h, z0, solver).num_evals + 5


def test_slopes_alone_on_a_map_that_is_no_gradient() -> None:
    """No theorem holds there; a nearly symmetric map is solved all the same, and any other ends with a status."""
    b = torch.randn(3, 6)
    for strength, statuses in [(0.02, {eq.Status.CONVERGED}), (1.0, set(eq.Status))]:
        weight = torch.diag(torch.linspace(-0.9, 0.5, 6)) + strength * torch.randn(6, 6)
        f = eq.FunctionMap(lambda z, b, w=weight: z @ w.T + b, torch.zeros(3, 6), (b,), params=())
        solution = eq.LBFGS(max_steps=100, rtol=1e-6, patience=50).solve(f, torch.zeros(3, 6))
        assert set(solution.status.tolist()) <= statuses
        assert bool(solution.value.isfinite().all())


STARTS = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, -1.0], [-3.0, 5.0], [0.5, 0.5], [1.01, 1.0]])


@pytest.mark.parametrize("closure", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rows_do_not_depend_on_their_batch(closure: bool) -> None:
    solver = eq.LBFGS(max_steps=200, memory=5, rtol=0, atol=1e-8)
    together = minimise(rosenbrock, STARTS, solver, closure=closure)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = minimise(rosenbrock, STARTS[order], solver, closure=closure)
    assert permuted.num_steps.tolist() == together.num_steps[order].tolist()
    torch.testing.assert_close(permuted.value, together.value[order], rtol=1e-10, atol=0)
    for row in range(len(STARTS)):
        alone = minimise(rosenbrock, STARTS[row : row + 1], solver)
        assert alone.num_steps[0] == together.num_steps[row]
        torch.testing.assert_close(alone.value[0], together.value[row], rtol=1e-10, atol=0)
    assert together.num_evals == together.num_steps.max(), "rows never wait for each other"


def test_same_answers_with_rare_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = eq.LBFGS(max_steps=200, memory=5, rtol=0, atol=1e-8)
    often = minimise(rosenbrock, STARTS, solver)
    for module in (base, lbfgs):
        monkeypatch.setattr(module, "can_branch_on", lambda x: False)
    rarely = minimise(rosenbrock, STARTS, solver)
    assert rarely.num_steps.tolist() == often.num_steps.tolist()
    assert rarely.status.tolist() == often.status.tolist()
    torch.testing.assert_close(rarely.value, often.value, rtol=1e-10, atol=0)
    assert often.inverse is not None
    assert rarely.inverse is not None
    torch.testing.assert_close(rarely.inverse.dense(), often.inverse.dense(), rtol=1e-6, atol=1e-8)


def test_counts_are_those_of_the_calls() -> None:
    calls = []

    def h(z: Tensor) -> Tensor:
        calls.append(len(z))
        return rosenbrock(z)

    solution = minimise(h, STARTS, eq.LBFGS(max_steps=200, rtol=0, atol=1e-8)).raise_for_status()
    assert solution.num_evals == len(calls)
    assert sum(calls) < len(STARTS) * len(calls), "rows that are done leave the batch"
    assert minimise(h, STARTS, eq.LBFGS(max_steps=0)).num_evals == 0


@pytest.mark.parametrize("wolfe", [0.1, 0.9])
def test_accepted_steps_meet_the_wolfe_conditions(wolfe: float) -> None:
    def wavy(z: Tensor) -> Tensor:
        return torch.cos(3 * z).sum(dim=1) + 0.1 * z.square().sum(dim=1)

    for h, start in [(rosenbrock, [-1.2, 1.0, -1.2, 1.0]), (wavy, [4.0, -2.0, 1.0])]:
        solver = Recorder(max_steps=80, wolfe=wolfe, rtol=0, atol=1e-5)
        z = torch.tensor([start])
        minimise(h, z, solver)
        assert len(solver.log) > 3
        for _, s, y, _ in solver.log:
            g, g_new = gradient_of(h, z)[0], gradient_of(h, z + s)[0]
            torch.testing.assert_close(g_new - g, y, rtol=1e-9, atol=1e-9)
            slack = 1e-12
            assert float(h(z + s)) <= float(h(z)) + 1e-4 * float(g @ s) + slack
            assert abs(float(g_new @ s)) <= wolfe * abs(float(g @ s)) + slack
            z = z + s


def solve_barrier(target: Tensor, weight: float = 1e-3) -> eq.Solution[Tensor]:
    """With a log barrier: beyond the wall the value is NaN, though not the gradient."""

    def h(z: Tensor, target: Tensor) -> Tensor:
        return -weight * torch.log1p(-z.square()).sum(dim=1) + 100 * (z - target).square().sum(dim=1)

    f = DescentMap(h, torch.zeros_like(target), (target,), params=())
    return eq.LBFGS(max_steps=100, rtol=0, atol=1e-7).solve(f, torch.zeros_like(target)).raise_for_status()


def test_backs_away_from_points_that_are_not_finite() -> None:
    solution = solve_barrier(torch.tensor([[0.5, -0.5], [0.999, 0.0]]))
    root = scipy.optimize.brentq(lambda x: 1e-3 * 2 * x / (1 - x * x) + 200 * (x - 0.999), 0.5, 1 - 1e-9, xtol=1e-14)
    assert abs(float(solution.value[1, 0]) - root) < 1e-8
    poles = DescentMap(lambda z: (1 / z.clamp_min(0) + z).sum(1), torch.full((2, 3), 1e-3), params=())
    solution = eq.LBFGS(max_steps=100, rtol=0, atol=1e-7).solve(poles, torch.full((2, 3), 1e-3)).raise_for_status()
    torch.testing.assert_close(solution.value, torch.ones(2, 3), rtol=0, atol=1e-7)


def test_points_outside_the_domain_are_no_answers() -> None:
    # A root of each polynomial lies inside: weight z / (1 - z^2) = 100 (target - z).
    solution = solve_barrier(torch.tensor([[3.0, -7.0]]), weight=30.0)
    inside = [next(z.real for z in np.roots([100, -100 * t, -100 - 30, 100 * t]) if abs(z) < 1) for t in (3.0, -7.0)]
    torch.testing.assert_close(solution.value, torch.tensor([inside]), rtol=0, atol=1e-7)


def test_a_wall_all_around_ends_in_nonfinite() -> None:
    solver = eq.LBFGS(max_steps=100)
    calls = 0

    def h(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return z.sum(dim=1) * (1.0 if calls == 1 else torch.nan)

    solution = minimise(h, torch.ones(1, 2), solver)
    assert solution.status.tolist() == [eq.Status.NONFINITE]
    assert solution.num_evals == 2 + solver.retries
    torch.testing.assert_close(solution.value, torch.ones(1, 2))


def test_backs_away_from_finite_overflow() -> None:
    """Poisson regression on raw features: the first trials have rates of e^60 and more, which is finite."""
    features = 50 * torch.randn(200, 5)
    counts = torch.poisson(torch.exp(features @ torch.randn(5) / 100))

    def h(z: Tensor) -> Tensor:
        logits = z @ features.T
        return (torch.exp(logits) - logits * counts).mean(dim=1) + 5e-4 * z.square().sum(dim=1)

    solution = minimise(h, torch.zeros(1, 5), eq.LBFGS(max_steps=100, rtol=0, atol=1e-8)).raise_for_status()
    assert solution.trace is not None
    assert bool((solution.trace > base.DIVERGED_AT * solution.trace[0]).any())


def test_objectives_that_are_not_convex_end_with_a_status() -> None:
    def h(z: Tensor, kind: Tensor) -> Tensor:
        square = z.square().sum(dim=1)
        # A well of many minima, one without a minimum, a ridge that falls for ever, a kink.
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
    assert solution.inverse is not None
    assert solution.inverse.rank[1] == 0, "no pair with negative curvature is learned"


@pytest.mark.parametrize("max_trials", [1, 2, 20])
def test_few_trials_still_descend(max_trials: int) -> None:
    h, _, minimiser = quadratic(10, 30.0)
    solver = eq.LBFGS(max_steps=300, rtol=0, atol=1e-8, max_trials=max_trials)
    solution = minimise(h, torch.zeros(1, 10), solver).raise_for_status()
    torch.testing.assert_close(solution.value[0], minimiser, rtol=0, atol=1e-7)


def test_float32_stays_float32() -> None:
    _, hessian, minimiser = quadratic(10, 100.0)
    hessian, b = hessian.float(), (hessian @ minimiser).float()
    z0 = torch.zeros(2, 10, dtype=torch.float32)
    solution = minimise(
        lambda z: 0.5 * ((z @ hessian) * z).sum(1) - z @ b, z0, eq.LBFGS(max_steps=200, rtol=0, atol=1e-4, memory=20)
    ).raise_for_status()
    assert solution.value.dtype == torch.float32
    torch.testing.assert_close(solution.value[0].double(), minimiser, rtol=0, atol=1e-4)
    assert solution.inverse is not None
    inverse = solution.inverse.dense()[0]
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=1e-5)


def test_structured_states() -> None:
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2, 2)}
    f = DescentMap(lambda z: (z["a"] - 1).pow(4).sum(1) + (z["b"] + 2).square().sum((1, 2)), z0, params=())
    solution = eq.LBFGS(max_steps=100, rtol=0, atol=1e-9).solve(f, f.pack(z0)).raise_for_status()
    found = f.unpack(solution.value)
    torch.testing.assert_close(found["a"], torch.ones(2, 3), rtol=0, atol=1e-2)
    torch.testing.assert_close(found["b"], torch.full((2, 2, 2), -2.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": 0}, r"memory=0"),
        ({"max_trials": 0}, r"max_trials=0"),
        ({"wolfe": 1.0}, r"wolfe=1.0"),
        ({"armijo": 0.9, "wolfe": 0.5}, r"armijo=0.9"),
        ({"min_curvature": -1.0}, r"min_curvature=-1.0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eq.LBFGS(**fields)


def test_a_projected_map_is_refused() -> None:
    f = eq.FunctionMap(lambda z: 0.5 * z, torch.ones(1, 2), params=(), projection=lambda z: z.clamp(-1, 1))
    with pytest.raises(ValueError, match="LBFGS cannot follow a projected map"):
        eq.LBFGS().solve(f, torch.ones(1, 2))
