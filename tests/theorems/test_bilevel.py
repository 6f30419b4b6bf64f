"""Penalties of logistic regression on real data, found by hypergradients, against SciPy on exact inner solves."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import logsigmoid

import equipoise as eq
from equipoise.bilevel import HoagStep, InnerLoss, OuterStatus, Tolerance, TrustRegion

SIZE = 30
VANILLA = eq.Shine(fallback_ratio=math.inf)
EXACT = eq.Implicit(solver=eq.CG(max_steps=300))
BOUNDS = (-12.0, 12.0)
GROUPS = torch.arange(SIZE) // 10  # means, standard errors and worst values of ten measurements


@functools.cache
def signed() -> tuple[Tensor, Tensor]:
    """Features times label of both parts: the margins of weights `z` are `z @ signed.T`."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    parts = train_test_split(x * (2.0 * y - 1)[:, None], test_size=0.25, random_state=0, stratify=y)
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def penalty(z: Tensor, hyper: Tensor) -> Tensor:
    strength = hyper.exp() if hyper.ndim == 0 else hyper.exp()[GROUPS]
    return 0.5 * (strength * z.square()).sum(1)


def held_out(z: Tensor, hyper: Tensor) -> Tensor:
    return -logsigmoid(z @ signed()[1].T).sum(1)


INNER = InnerLoss(lambda z: -logsigmoid(z @ signed()[0].T).sum(1), penalty)


def exactly(hyper: np.ndarray) -> tuple[float, np.ndarray]:
    """Held-out loss and hypergradient, by Newton's method and dense algebra."""
    x, x_val = (part.numpy() for part in signed())
    strength = np.exp(hyper)[GROUPS.numpy()] if hyper.size > 1 else np.full(SIZE, np.exp(hyper.item()))
    z = np.zeros(SIZE)
    for _ in range(60):
        p = 1 / (1 + np.exp(np.clip(x @ z, -500, 500)))
        gradient = strength * z - x.T @ p
        hessian = (x.T * (p * (1 - p))) @ x + np.diag(strength)
        step = np.linalg.solve(hessian, gradient)
        z = z - step / max(1.0, np.linalg.norm(step))
    margins = x_val @ z
    q = np.linalg.solve(hessian, -x_val.T @ (1 / (1 + np.exp(margins))))
    parts = -strength * z * q
    slope = parts.sum(keepdims=True) if hyper.size == 1 else np.bincount(GROUPS.numpy(), parts)
    return float(np.logaddexp(0, -margins).sum()), slope


@functools.cache
def optimum() -> scipy.optimize.OptimizeResult:
    return scipy.optimize.minimize_scalar(
        lambda t: exactly(np.array([t]))[0], bounds=(-4, 4), method="bounded", options={"xatol": 1e-8}
    )


def tune(**options: Any) -> eq.bilevel.OuterSolution:
    start = {"z0": torch.zeros(1, SIZE), "hyper0": torch.zeros(()), "bounds": BOUNDS}
    return eq.minimize_outer(held_out, INNER, **{**start, **options})


@pytest.mark.parametrize("hyper0", [0.0, 6.0, pytest.param(-5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", [VANILLA, EXACT], ids=["Shine", "Implicit"])
def test_optimum(gradient: eq.Gradient, hyper0: float) -> None:
    solution = tune(gradient=gradient, hyper0=torch.tensor(hyper0))
    assert solution.status in (OuterStatus.CONVERGED, OuterStatus.STALLED)
    assert solution.value == pytest.approx(optimum().fun, rel=1e-2)
    assert exactly(solution.hyper[0].numpy())[0] == pytest.approx(optimum().fun, rel=1e-2)
    assert len(solution.history) <= 20
    if gradient is EXACT:
        assert float(solution.hyper[0]) == pytest.approx(float(optimum().x), abs=0.1)


def test_cost_of_shine() -> None:
    """SHINE needs less than half of the gradients that adjoint solves need."""
    shine, implicit = (
        next(line.gradient_evals for line in history if line.value <= 1.01 * optimum().fun)
        for history in (tune(gradient=gradient, hyper0=torch.tensor(6.0)).history for gradient in (VANILLA, EXACT))
    )
    assert shine < 0.5 * implicit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient", "memory", "factor"), [(EXACT, 10, 0.9), (VANILLA, 60, 0.78)], ids=["HOAG", "SHINE"]
)
def test_published_methods(gradient: eq.Gradient, memory: int, factor: float) -> None:
    solver, tolerance = eq.LBFGS(max_steps=1000, memory=memory), Tolerance(1e-3, factor)
    solution = tune(gradient=gradient, solver=solver, tolerance=tolerance, step=HoagStep(), max_steps=60)
    assert solution.value == pytest.approx(optimum().fun, rel=1e-2)


def test_first_gradient() -> None:
    hyper = torch.tensor(2.0)
    exact = abs(exactly(hyper.numpy().reshape(1))[1].item())
    found, wrong = (
        tune(gradient=gradient, hyper0=hyper, tolerance=Tolerance(1e-12), max_steps=1).history[0].gradient_norm
        for gradient in (EXACT, eq.JacobianFree())
    )
    assert found == pytest.approx(exact, rel=1e-6)
    assert abs(wrong / exact - 1) > 0.5


@pytest.mark.slow
def test_jacobian_free_ends_elsewhere() -> None:
    solution = tune(gradient=eq.JacobianFree(), step=HoagStep(), tolerance=Tolerance(1e-12), max_steps=25)
    last = float(solution.history[-1].hyper[0])
    assert abs(last - float(optimum().x)) > 0.1
    assert abs(exactly(np.array([last]))[1].item()) > 0.1


@pytest.mark.slow
def test_groups() -> None:
    options = {"ftol": 1e-12, "gtol": 1e-8}
    theirs = scipy.optimize.minimize(exactly, np.zeros(3), jac=True, bounds=[BOUNDS] * 3, options=options)
    assert theirs.fun < 0.99 * optimum().fun, "three penalties are better than one"
    solution = tune(hyper0=torch.zeros(3), gradient=EXACT, max_steps=60)
    value, _ = exactly(solution.hyper[0].numpy())
    assert value == pytest.approx(solution.value, rel=1e-3)
    assert value <= 1.01 * theirs.fun
    assert solution.value < 0.99 * optimum().fun
    assert tune(hyper0=torch.zeros(3), max_steps=60).value < optimum().fun


@pytest.mark.parametrize("hyper0", [-12.0, pytest.param(12.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", [VANILLA, EXACT, eq.JacobianFree()], ids=lambda gradient: type(gradient).__name__)
@pytest.mark.parametrize("step", [TrustRegion(), pytest.param(HoagStep(), marks=pytest.mark.slow)])
def test_extreme_penalties(gradient: eq.Gradient, hyper0: float, step: eq.bilevel.StepRule) -> None:
    solution = tune(gradient=gradient, hyper0=torch.tensor(hyper0), step=step, max_steps=8)
    assert math.isfinite(solution.value)
    assert all(-12 <= float(line.hyper[0]) <= 12 for line in solution.history)
    assert solution.num_evals < 5000
    assert bool(solution.z.isfinite().all())


def test_single_precision() -> None:
    x, x_val = (part.float() for part in signed())
    solution = eq.minimize_outer(
        lambda z, t: -logsigmoid(z @ x_val.T).sum(1),
        InnerLoss(lambda z: -logsigmoid(z @ x.T).sum(1), penalty),
        z0=torch.zeros(1, SIZE, dtype=torch.float32),
        hyper0=torch.zeros((), dtype=torch.float32),
        bounds=BOUNDS,
    )
    assert solution.hyper[0].dtype == solution.z.dtype == torch.float32
    assert solution.value == pytest.approx(optimum().fun, rel=1e-2)
