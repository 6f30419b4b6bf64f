"""The joint map before and after its solve: settled states, curvatures, steps, and the answer's status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from equipoise.inputs.schedules import Held, Schedule
from equipoise.map import Map
from equipoise.solvers import Anderson

NUDGE = 1e-2  # length of a probing step, relative to 1 + |x|
PROBES = 2  # steps of the power iteration for the curvature
LONGEST = 100.0  # first step of the input at most, relative to 1 + |x|
SETTLE = Anderson(memory=10, max_steps=50, rtol=0.03)  # state and adjoint before the solve
RESPOND = Anderson(memory=10, max_steps=40, rtol=0.03)  # their change at a probing step


def variant(f: Map, schedule: Schedule, step: Tensor | None = None) -> Map:
    """The joint map with another schedule, untracked; it shares masks, weights and counts.

    Args:
        f: the joint map.
        schedule: of a round.
        step: `(b, 1)` step size of the input, None for that of `f`.
    """
    chosen = f.on([f.tensors[0] if step is None else step, *(t.detach() for t in f.tensors[1:])])
    chosen.f = f.f.variant(schedule)
    if isinstance(schedule, Held):
        chosen.projection = None
    return chosen


class Probe:
    """The slope of the reduced cost at a joint state, and its changes.

    The reduced cost is that of the equilibrium as a function of the input alone.

    Args:
        f: the joint map.
        v: `(b, D)` state; the better state and adjoint solve their equations, the better the slope.
    """

    def __init__(self, f: Map, v: Tensor) -> None:
        self.held, self.v, self.size = variant(f, Held()), v, f.blocks[2] if f.blocks else 0
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

    def product(self, direction: Tensor) -> Tensor:
        """Its Hessian times the unit vector along `direction`, `(b, p)`, by a difference over a short step.

        State and adjoint follow the step by their own equations, so what is left of their residuals cancels.
        """
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        unit = torch.where(norm > 0, direction / torch.where(norm > 0, norm, 1.0), 0.0)
        length = NUDGE * self.reach
        start = torch.zeros_like(self.v)
        start[:, -self.size :] = length * unit
        image = torch.cat([self.parts[:, : -self.size], self.x], dim=1)
        change = RESPOND.solve(_Change(self.held, self.v, image), start).value
        return (self._ask(self.v + change) - self.parts)[:, -self.size :] / length

    def inverse_curvature(self, direction: Tensor) -> Tensor:
        """A step for gradient descent, `(b, 1)`: one over the largest curvature that power iteration finds.

        Where there is none to speak of, as for a linear cost, the step is many times as long as the input.
        """
        curvature = torch.zeros_like(self.reach)
        for _ in range(PROBES):
            direction = self.product(direction)
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
        self.f, self.v, self.fv = f, v, fv
        self.counts, self.blocks, self.projection = f.counts, f.blocks, None

    @property
    def droppable(self) -> bool:
        return self.f.droppable

    def select(self, index: Tensor) -> _Change:
        return _Change(self.f.select(index), self.v[index], self.fv[index])

    @contextlib.contextmanager
    def session(self, *, backward: bool = False) -> Iterator[None]:
        with self.f.session(backward=backward):
            yield

    def call(self, z: Tensor) -> Tensor:
        return self.f.call(self.v + z) - self.fv
