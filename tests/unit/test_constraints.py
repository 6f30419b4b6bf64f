"""Projections against independent oracles: SciPy's constrained minimizer, bisection in NumPy, and closed forms."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.constraints import Box, Constraint, L2Ball, LInfBall, Proximal

CENTER = torch.tensor([[0.1, 0.9, 0.5, 0.0, 1.0], [0.3, 0.2, 0.7, 1.0, 0.6]], dtype=torch.float64)
SETS: list[Constraint] = [
    Box(lower=-0.5, upper=0.7),
    Box(lower=CENTER - 0.2),
    LInfBall(radius=0.4),
    LInfBall(radius=0.4, center=CENTER, lower=0.0, upper=1.0),
    L2Ball(radius=0.8),
    L2Ball(radius=0.8, center=CENTER),
    L2Ball(radius=0.8, center=CENTER, lower=0.0, upper=1.0),
    L2Ball(radius=0.8, center=CENTER, upper=1.0),
]


def label(constraint: Constraint) -> str:
    changed = [f.name for f in dataclasses.fields(constraint) if getattr(constraint, f.name) is not f.default]
    return "-".join([type(constraint).__name__, *changed])


@pytest.mark.parametrize("constraint", SETS, ids=label)
def test_the_projection_is_the_nearest_point_that_scipy_finds(constraint: Constraint) -> None:
    x = 2 * torch.randn(2, 5)
    projected = constraint.project(x)
    low, high = (
        np.broadcast_to(torch.as_tensor(getattr(constraint, name)).numpy(), (2, 5)) for name in ("lower", "upper")
    )
    center = np.broadcast_to(torch.as_tensor(getattr(constraint, "center", 0.0)).numpy(), (2, 5))
    radius = getattr(constraint, "radius", math.inf)
    for row in range(2):
        limits, ball = (low[row], high[row]), []
        if isinstance(constraint, LInfBall):
            limits = (np.maximum(limits[0], center[row] - radius), np.minimum(limits[1], center[row] + radius))
        if isinstance(constraint, L2Ball):
            ball = [{"type": "ineq", "fun": lambda y, c=center[row]: radius**2 - ((y - c) ** 2).sum()}]
        target = x[row].numpy()
        oracle = scipy.optimize.minimize(
            lambda y, t=target: 0.5 * ((y - t) ** 2).sum(),
            np.clip(center[row], *limits),
            jac=lambda y, t=target: y - t,
            bounds=list(zip(*limits, strict=True)),
            constraints=ball,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        np.testing.assert_allclose(projected[row].numpy(), oracle.x, atol=2e-6)


@pytest.mark.parametrize("constraint", SETS, ids=label)
def test_a_point_of_the_set_stays_and_no_other_point_does(constraint: Constraint) -> None:
    x = 3 * torch.randn(2, 5)
    projected = constraint.project(x)
    assert not torch.equal(projected, x)
    torch.testing.assert_close(constraint.project(projected), projected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("constraint", SETS, ids=label)
def test_projections_are_differentiable_in_the_point_and_in_the_set(constraint: Constraint) -> None:
    x = (2 * torch.randn(2, 5)).requires_grad_()
    tensors = [t.clone().requires_grad_() for t in constraint.tensors().values()]
    assert torch.autograd.gradcheck(lambda x, *given: constraint.on(given).project(x), (x, *tensors))
    inside = (torch.as_tensor(getattr(constraint, "center", 0.1)).expand(2, 5) + 1e-3 * torch.rand(2, 5)).clamp(
        1e-3, 0.999
    )
    assert torch.autograd.gradcheck(constraint.project, inside.clone().requires_grad_())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 3.0, 40.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_leaves_a_ball_in_single_precision(seed: int, radius: float, ranged: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(3, 2, 50, generator=generator, dtype=torch.float32)
    x = center + 10 * radius * torch.randn(3, 2, 50, generator=generator, dtype=torch.float32)
    limits = {"lower": 0.0, "upper": 1.0} if ranged else {}
    for constraint in (
        L2Ball(radius=radius, center=center, **limits),
        LInfBall(radius=radius, center=center, **limits),
    ):
        projected = constraint.project(x)
        assert projected.dtype == torch.float32
        d = (projected.double() - center.double()).flatten(1)
        norm = d.norm(dim=1) if isinstance(constraint, L2Ball) else d.abs().amax(dim=1)
        assert float(norm.max()) <= radius * (1 + 1e-6)
        if ranged:
            assert float(projected.min()) >= 0.0
            assert float(projected.max()) <= 1.0
        elif radius > 1e-2:
            torch.testing.assert_close(norm, torch.full_like(norm, radius), rtol=1e-4, atol=0.0)


def dykstra(x: Tensor, ball: Constraint, box: Constraint, rounds: int = 3000) -> Tensor:
    """Projection onto an intersection by alternating projections with corrections (Boyle and Dykstra, 1986)."""
    p, q = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(rounds):
        y = ball.project(x + p)
        p = x + p - y
        x = box.project(y + q)
        q = y + q - x
    return x


def test_a_ball_within_a_range_is_what_dykstra_finds() -> None:
    center = torch.rand(20, 12)
    x = center + torch.randn(20, 12)
    exact = L2Ball(radius=0.6, center=center, lower=0.0, upper=1.0).project(x)
    torch.testing.assert_close(
        exact, dykstra(x, L2Ball(radius=0.6, center=center), Box(lower=0.0, upper=1.0)), rtol=1e-6, atol=1e-6
    )
    clipped = (exact == 0) | (exact == 1)
    assert bool(clipped.any())
    assert not bool(clipped.all())


def test_a_corner_within_the_ball_is_reached() -> None:
    constraint = L2Ball(radius=5.0, center=torch.full((1, 3), 0.5), lower=0.0, upper=1.0)
    assert constraint.project(torch.tensor([[9.0, -9.0, 0.25]])).tolist() == [[1.0, 0.0, 0.25]]


def test_sets_of_rows_and_shapes() -> None:
    lower = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    box = Box(lower=lower, upper=2.0)
    assert list(box.tensors()) == ["lower"]
    second = box.on([lower[1:]])
    assert second.project(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]
    images = L2Ball(radius=1.0).project(torch.ones(2, 3, 4, 4))
    torch.testing.assert_close(images.flatten(1).norm(dim=1), torch.ones(2))
    narrow = L2Ball(radius=1.0, center=torch.zeros(2, 1, dtype=torch.float64)).project(
        torch.ones(2, 4, dtype=torch.float32)
    )
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(lower=1.0, upper=0.0), r"Box: a lower bound exceeds the upper one; exchange them"),
        (lambda: Box(lower=torch.ones(2), upper=0.0), r"Box: a lower bound exceeds"),
        (lambda: L2Ball(radius=-1.0), r"L2Ball\(radius=-1.0\): must be a finite number >= 0"),
        (lambda: LInfBall(radius=math.inf), r"LInfBall\(radius=inf\): must be a finite number >= 0"),
        (lambda: LInfBall(radius=math.nan), r"LInfBall\(radius=nan\)"),
        (lambda: L2Ball(radius=torch.ones(2)), r"L2Ball\(radius=tensor"),
        (
            lambda: L2Ball(radius=1.0, center=2.0, upper=1.0),
            r"L2Ball: center must lie between lower and upper; clamp it",
        ),
        (lambda: LInfBall(radius=1.0, lower=1.0, upper=0.0), r"LInfBall: a lower bound exceeds the upper one"),
    ],
)
def test_errors_name_argument_and_remedy(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_proximal_penalty_is_a_value() -> None:
    shrink = Proximal(operator=lambda y, step: y / (1 + step), penalty=lambda x: 0.5 * x.square().sum(1))
    assert shrink == dataclasses.replace(shrink)
