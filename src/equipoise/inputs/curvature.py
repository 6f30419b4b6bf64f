"""The reduced cost, whose only argument is the input: its slope, curvature, and a step by them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from equipoise.inputs.joint import JointMap
from equipoise.inputs.schedules import Held
from equipoise.map import Map
from equipoise.solvers import Anderson, Solver

NUDGE = 1e-2  # length of a probing step, relative to 1 + |x|
LONGEST = 100.0  # first step of the input at most, relative to 1 + |x|
# What a slow layer answers after many rounds, the first steps of the input do not meet: a step that is measured so is
# cheaper, and no worse, than by the curvature at the equilibrium.
SETTLE = Anderson(max_steps=4, rtol=0.1)  # state and adjoint before the solve
GLANCE = Anderson(max_steps=4, rtol=0.1)  # their change at a probing step
RESPOND = Anderson(memory=10, max_steps=40, rtol=0.03)  # the same, to judge an answer


class Probe:
    """The slope of the reduced cost at a joint state, and its changes.

    The reduced cost is that of the equilibrium as a function of the input alone.

    Args:
        f: the joint map.
        v: `(b, D)` state; the better state and adjoint solve their equations, the better the slope.
    """

    def __init__(self, f: JointMap, v: Tensor) -> None:
        self.held, self.v, self.size = f.variant(Held()), v, f.size
        self.parts = self._ask(v)

    def _ask(self, v: Tensor) -> Tensor:
        parts: Tensor = self.held.ask(self.held.f.parts, v)
        return parts

    @property
    def slope(self) -> Tensor:
        return self.parts[:, -self.size :]

    @property
    def x(self) -> Tensor:
        return self.v[:, -self.size :]

    def product(self, direction: Tensor, solver: Solver) -> Tensor:
        """Its Hessian times the unit vector along `direction`, `(b, p)`, by a difference over a short step.

        State and adjoint follow the step by their own equations, so what is left of their residuals cancels.

        Args:
            direction: `(b, p)`.
            solver: of how state and adjoint change.
        """
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        unit = torch.where(norm > 0, direction / torch.where(norm > 0, norm, 1.0), 0.0)
        length = NUDGE * self.reach
        start = torch.zeros_like(self.v)
        start[:, -self.size :] = length * unit
        image = torch.cat([self.parts[:, : -self.size], self.x], dim=1)
        change = solver.solve(_Change(self.held, self.v, image), start).value
        return (self._ask(self.v + change) - self.parts)[:, -self.size :] / length

    def inverse_curvature(self, direction: Tensor, *, probes: int = 1, solver: Solver = GLANCE) -> Tensor:
        """A step for gradient descent, `(b, 1)`: one over the largest curvature that power iteration finds.

        Where there is none to speak of, as for a linear cost, the step is many times as long as the input.

        Args:
            direction: `(b, p)` to begin with.
            probes: steps of the power iteration.
            solver: of how state and adjoint change in each.
        """
        curvature = torch.zeros_like(self.reach)
        for _ in range(probes):
            direction = self.product(direction, solver)
            curvature = torch.maximum(curvature, torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        steepness = torch.linalg.vector_norm(self.slope, dim=1, keepdim=True)
        step = 1 / torch.maximum(curvature, steepness / (LONGEST * self.reach))
        return torch.where(step.isfinite(), step, 1.0)

    @property
    def reach(self) -> Tensor:
        """`1 + |x|`, `(b, 1)`."""
        return 1 + torch.linalg.vector_norm(self.x, dim=1, keepdim=True)


class _Change(Map):
    r"""The map $\delta \mapsto F(v + \delta) - F(v)$: how state and adjoint follow a step of the input."""

    def __init__(self, f: Map, v: Tensor, fv: Tensor) -> None:
        self.forward_map, self.v, self.fv = f, v, fv
        self.counts, self.blocks, self.projection = f.counts, f.blocks, None

    @property
    def droppable(self) -> bool:
        return self.forward_map.droppable

    def select(self, index: Tensor) -> _Change:
        return _Change(self.forward_map.select(index), self.v[index], self.fv[index])

    @contextlib.contextmanager
    def session(self, *, backward: bool = False) -> Iterator[None]:
        with self.forward_map.session(backward=backward):
            yield

    def call(self, z: Tensor) -> Tensor:
        return self.forward_map.call(self.v + z) - self.fv
