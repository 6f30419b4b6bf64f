"""Bilevel optimization of quadratic problems, whose hypergradient and optimum are known in closed form."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
from torch import Tensor

import equipoise as eq
from equipoise.bilevel import Exact, InnerLoss, OuterStatus, OuterStep

VANILLA = eq.Shine(fallback_ratio=math.inf)
CLOSE = eq.Implicit(solver=eq.LBFGS(max_steps=100, memory=50))
BOUNDS = (-12.0, 12.0)


def data(rows: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out features and targets of each row, `(rows, n, 6)` and `(rows, n)`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 40, 6, generator=generator)
    y = torch.einsum("bni,i->bn", x, torch.linspace(-1, 1, 6)) + 2 * torch.randn(rows, 40, generator=generator)
    return x[:, :20], y[:, :20], x[:, 20:], y[:, 20:]


def squares(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (torch.einsum("bni,bi->bn", x, z) - y).square().sum(1)


def penalty(z: Tensor, hyper: Tensor) -> Tensor:
    return 0.5 * (hyper.exp() * z.square()).sum(1)


def problem(rows: int = 1) -> tuple[InnerLoss, object]:
    x, y, x_val, y_val = data(rows)
    return InnerLoss(lambda z: squares(z, x, y), penalty), lambda z, hyper: squares(z, x_val, y_val)


def closed_form(hyper: Tensor, rows: int = 1) -> tuple[Tensor, Tensor]:
    """The held-out loss and its gradient in the logarithms of the penalties, by dense algebra."""
    x, y, x_val, y_val = data(rows)
    total, slope = torch.zeros(()), torch.zeros_like(hyper)
    for row in range(rows):
        hessian = x[row].T @ x[row] + torch.diag(hyper.exp().expand(6))
        z = torch.linalg.solve(hessian, x[row].T @ y[row])
        error = x_val[row] @ z - y_val[row]
        q = torch.linalg.solve(hessian, x_val[row].T @ error)
        total = total + 0.5 * error.square().sum()
        slope = slope + (-hyper.exp() * z * q).sum_to_size(hyper.shape)
    return total, slope


def test_one_penalty_reaches_the_optimum_of_the_closed_form() -> None:
    inner, outer = problem()
    best = scipy.optimize.minimize_scalar(lambda t: float(closed_form(torch.tensor([t]))[0]), bounds=BOUNDS)
    for gradient in (CLOSE, VANILLA):
        solution = eq.minimize_outer(
            outer, inner, z0=torch.zeros(1, 6), hyper0=torch.zeros(1), bounds=BOUNDS, gradient=gradient
        )
        assert solution.status is OuterStatus.CONVERGED
        assert solution.value == pytest.approx(best.fun, rel=1e-5)
        assert float(solution.hyper[0]) == pytest.approx(best.x, abs=5e-2)


def test_the_first_hypergradient_is_that_of_the_closed_form() -> None:
    inner, outer = problem(rows=3)
    for hyper in (torch.tensor([0.3]), torch.linspace(-1, 1, 6)):
        steps: list[OuterStep] = []
        eq.minimize_outer(
            outer, inner, z0=torch.zeros(3, 6), hyper0=hyper, gradient=CLOSE, tolerance=Exact(), max_steps=1,
            observe=steps.append,
        )  # fmt: skip
        value, slope = closed_form(hyper, rows=3)
        assert steps[0].value == pytest.approx(float(value), rel=1e-9)
        assert steps[0].gradient_norm == pytest.approx(float(slope.norm()), rel=1e-8)
