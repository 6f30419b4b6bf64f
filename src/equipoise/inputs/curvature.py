"""The reduced cost, whose only argument is the input: its slope, curvature, and a step by them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from equipoise.core.map import Map
from equipoise.inputs.joint import JointMap
from equipoise.inputs.schedules import Held, Joint, Nested
from equipoise.solvers import Anderson

NUDGE = 1e-2  # length of a probing step, relative to 1 + |x|
LONGEST = 100.0  # first step of the input at most, relative to 1 + |x|
# What a slow layer answers after many rounds, the first steps of the input do not meet: a step that is measured so is
# cheaper, and no worse, than by the curvature at the equilibrium.
GLANCE = Nested(steps=3)  # of state and adjoint at the start, and once more at a probing step
RESPOND = Anderson(memory=10, max_steps=40, rtol=0.03)  # of their change at a probing step, to judge an answer


def measure(f: JointMap, v: Tensor) -> tuple[Tensor, Tensor]:
    """A few steps of state and adjoint, and by how much the slope that they give differs a short step away.

    Both times they begin at the same values, so what is left of their residuals cancels.

    Args:
        f: the joint map.
        v: `(b, D)` start.

    Returns:
        The start with these steps done, and one over the curvature along the slope, `(b, 1)`.
    """
    glance, size = f.variant(GLANCE), f.size
    parts = _parts(glance, v)
    slope, x = parts[:, -size:], v[:, -size:]
    reach = 1 + torch.linalg.vector_norm(x, dim=1, keepdim=True)
    nudged = torch.cat([v[:, :-size], x + NUDGE * reach * _unit(slope)], dim=1)
    change = (_parts(glance, nudged) - parts)[:, -size:]
    curvature = torch.linalg.vector_norm(change, dim=1, keepdim=True) / (NUDGE * reach)
    settled = torch.cat([parts[:, :-size], x], dim=1)
    return torch.where(settled.isfinite().all(dim=1, keepdim=True), settled, v), _inverse(curvature, slope, reach)


def _parts(f: JointMap, v: Tensor) -> Tensor:
    parts: Tensor = f.call_user(f.f.parts, v)
    return parts


def _unit(direction: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    return torch.where(norm > 0, direction / torch.where(norm > 0, norm, 1.0), 0.0)


def _inverse(curvature: Tensor, slope: Tensor, reach: Tensor) -> Tensor:
    """One over the curvature. Where there is none to speak of, a step many times as long as the input."""
    steepness = torch.linalg.vector_norm(slope, dim=1, keepdim=True)
    step = 1 / torch.maximum(curvature, steepness / (LONGEST * reach))
    return torch.where(step.isfinite(), step, 1.0)


class Probe:
    """The slope of the reduced cost at a joint state, and its changes.

    The reduced cost is that of the equilibrium as a function of the input alone.

    Args:
        f: the joint map.
        v: `(b, D)` state; the better state and adjoint solve their equations, the better the slope.
    """

    def __init__(self, f: JointMap, v: Tensor) -> None:
        self.held, self.joint = f.variant(Held()), f.variant(Joint())
        self.v, self.size = v, f.size
        self.parts = _parts(self.joint, v)

    @property
    def slope(self) -> Tensor:
        return self.parts[:, -self.size :]

    @property
    def x(self) -> Tensor:
        return self.v[:, -self.size :]

    def product(self, direction: Tensor) -> Tensor:
        """Its Hessian times the unit vector along `direction`, `(b, p)`, by a difference over a short step.

        State and adjoint follow the step by their own equations, so what is left of their residuals cancels.
        """
        length = NUDGE * self.reach
        start = torch.zeros_like(self.v)
        start[:, -self.size :] = length * _unit(direction)
        image = torch.cat([self.parts[:, : -self.size], self.x], dim=1)
        change = RESPOND.solve(_Change(self.held, self.v, image), start).value
        return (_parts(self.joint, self.v + change) - self.parts)[:, -self.size :] / length

    def inverse_curvature(self, direction: Tensor) -> Tensor:
        """One over the larger curvature, `(b, 1)`, of two steps of the power iteration from `direction`, `(b, p)`."""
        curvature = torch.zeros_like(self.reach)
        for _ in range(2):
            direction = self.product(direction)
            curvature = torch.maximum(curvature, torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        return _inverse(curvature, self.slope, self.reach)

    @property
    def reach(self) -> Tensor:
        """`1 + |x|`, `(b, 1)`."""
        return 1 + torch.linalg.vector_norm(self.x, dim=1, keepdim=True)


class _Change(Map):
    r"""The map $\delta \mapsto F(v + \delta) - F(v)$: how state and adjoint follow a step of the input."""

    def __init__(self, f: Map, v: Tensor, fv: Tensor) -> None:
        super().__init__(f.counts, droppable=f.droppable, blocks=f.blocks)
        self.forward_map, self.v, self.fv = f, v, fv

    def select(self, index: Tensor) -> _Change:
        return _Change(self.forward_map.select(index), self.v[index], self.fv[index])

    def solve_context(self, *, backward: bool = False) -> contextlib.AbstractContextManager[None]:
        return self.forward_map.solve_context(backward=backward)

    def call(self, z: Tensor) -> Tensor:
        return self.forward_map.call(self.v + z) - self.fv
