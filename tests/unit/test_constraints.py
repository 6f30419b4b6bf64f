"""Projections against independent oracles: SciPy's constrained minimizer, Dykstra's algorithm and closed forms."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.constraints import Box, Constraint, L2Ball, LInfBall, Proximal

CENTER = torch.tensor([[0.1, 0.9, 0.5, 0.0, 1.0], [0.3, 0.2, 0.7, 1.0, 0.6]], dtype=torch.float64)
SETS: dict[str, Constraint] = {
    "box": Box(lower=-0.5, upper=0.7),
    "box of tensors": Box(lower=CENTER - 0.2),
    "linf": LInfBall(radius=0.4),
    "linf in a range": LInfBall(radius=0.4, center=CENTER, lower=0.0, upper=1.0),
    "l2": L2Ball(radius=0.8),
    "l2 around a center": L2Ball(radius=0.8, center=CENTER),
    "l2 in a range": L2Ball(radius=0.8, center=CENTER, lower=0.0, upper=1.0),
    "l2 below a bound": L2Ball(radius=0.8, center=CENTER, upper=1.0),
}
sets = pytest.mark.parametrize("constraint", SETS.values(), ids=SETS)


@sets
def test_nearest_point(constraint: Constraint) -> None:
    def rows(name: str, default: float) -> np.ndarray:
        return np.broadcast_to(torch.as_tensor(getattr(constraint, name, default)).numpy(), (2, 5))

    x, radius = 2 * torch.randn(2, 5), getattr(constraint, "radius", math.inf)
    low, high, center = rows("lower", 0.0), rows("upper", 0.0), rows("center", 0.0)
    if isinstance(constraint, LInfBall):
        low, high = np.maximum(low, center - radius), np.minimum(high, center + radius)
    for row, found in enumerate(constraint.project(x).numpy()):
        target = x[row].numpy()
        ball = {"type": "ineq", "fun": lambda y, c=center[row]: radius**2 - ((y - c) ** 2).sum()}
        oracle = scipy.optimize.minimize(
            lambda y, t=target: 0.5 * ((y - t) ** 2).sum(),
            np.clip(center[row], low[row], high[row]),
            jac=lambda y, t=target: y - t,
            bounds=list(zip(low[row], high[row], strict=True)),
            constraints=[ball] if isinstance(constraint, L2Ball) else [],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        np.testing.assert_allclose(found, oracle.x, atol=2e-6)


@sets
def test_idempotence(constraint: Constraint) -> None:
    x = 3 * torch.randn(2, 5)
    projected = constraint.project(x)
    assert not torch.equal(projected, x)
    torch.testing.assert_close(constraint.project(projected), projected, rtol=1e-14, atol=1e-15)


@sets
def test_gradients_in_point_and_set(constraint: Constraint) -> None:
    x = (2 * torch.randn(2, 5)).requires_grad_()
    tensors = [t.clone().requires_grad_() for t in constraint.tensors().values()]
    assert torch.autograd.gradcheck(lambda x, *given: constraint.on(given).project(x), (x, *tensors))
    center = torch.as_tensor(getattr(constraint, "center", 0.1)).expand(2, 5)
    inside = (center + 1e-3 * torch.rand(2, 5)).clamp(1e-3, 0.999)
    assert torch.autograd.gradcheck(constraint.project, inside.requires_grad_())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 3.0, 40.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_balls_in_single_precision(seed: int, radius: float, ranged: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(3, 2, 50, generator=generator, dtype=torch.float32)
    x = center + 10 * radius * torch.randn(3, 2, 50, generator=generator, dtype=torch.float32)
    low, high = (0.0, 1.0) if ranged else (-math.inf, math.inf)
    for kind, order in ((L2Ball, 2), (LInfBall, math.inf)):
        projected = kind(radius=radius, center=center, lower=low, upper=high).project(x)
        assert projected.dtype == torch.float32
        norm = torch.linalg.vector_norm((projected.double() - center.double()).flatten(1), order, dim=1)
        assert float(norm.max()) <= radius * (1 + 1e-6)
        assert low <= float(projected.min()) <= float(projected.max()) <= high
        if radius > 1e-2 and not ranged:
            torch.testing.assert_close(norm, torch.full_like(norm, radius), rtol=1e-4, atol=0.0)


def dykstra(x: Tensor, ball: Constraint, box: Constraint, rounds: int = 500) -> Tensor:
    """Projection onto an intersection by alternating projections with corrections (Boyle and Dykstra, 1986)."""
    p, q = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(rounds):
        y = ball.project(x + p)
        p = x + p - y
        x = box.project(y + q)
        q = y + q - x
    return x


def test_ball_in_a_range() -> None:
    center = torch.rand(20, 12)
    x = center + torch.randn(20, 12)
    exact = L2Ball(radius=0.6, center=center, lower=0.0, upper=1.0).project(x)
    found = dykstra(x, L2Ball(radius=0.6, center=center), Box(lower=0.0, upper=1.0))
    torch.testing.assert_close(exact, found, rtol=1e-6, atol=1e-6)
    assert 0 < ((exact == 0) | (exact == 1)).double().mean() < 1
    corner = L2Ball(radius=5.0, center=torch.full((1, 3), 0.5), lower=0.0, upper=1.0)
    assert corner.project(torch.tensor([[9.0, -9.0, 0.25]])).tolist() == [[1.0, 0.0, 0.25]]


def test_rows_and_shapes() -> None:
    lower = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    box = Box(lower=lower, upper=2.0)
    assert list(box.tensors()) == ["lower"]
    assert box.on([lower[1:]]).project(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]
    images = L2Ball(radius=1.0).project(torch.ones(2, 3, 4, 4))
    torch.testing.assert_close(images.flatten(1).norm(dim=1), torch.ones(2))
    narrow = L2Ball(radius=1.0, center=torch.zeros(2, 1, dtype=torch.float64))
    assert narrow.project(torch.ones(2, 4, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(lower=1.0, upper=0.0), r"Box: a lower bound exceeds the upper one; swap them"),
        (lambda: Box(lower=torch.ones(2), upper=0.0), r"Box: a lower bound exceeds"),
        (lambda: L2Ball(radius=-1.0), r"L2Ball\(radius=-1.0\): must be a finite number >= 0"),
        (lambda: LInfBall(radius=math.inf), r"LInfBall\(radius=inf\): must be a finite number >= 0"),
        (lambda: LInfBall(radius=math.nan), r"LInfBall\(radius=nan\)"),
        (lambda: L2Ball(radius=torch.ones(2)), r"L2Ball\(radius=tensor"),
        (lambda: L2Ball(radius=1.0, center=2.0, upper=1.0), r"L2Ball: center must lie between .*; clamp it"),
        (lambda: LInfBall(radius=1.0, lower=1.0, upper=0.0), r"LInfBall: a lower bound exceeds the upper one"),
    ],
)
def test_messages(make: Callable[[], Constraint], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_proximal_is_a_value() -> None:
    shrink = Proximal(operator=lambda y, step: y / (1 + step), penalty=lambda x: 0.5 * x.square().sum(1))
    assert shrink == dataclasses.replace(shrink)
