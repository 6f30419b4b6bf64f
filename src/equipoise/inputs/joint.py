"""The joint system of state, adjoint and input, as a map on flat rows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.constraints import Constraint, Proximal
from equipoise.inputs.schedules import Schedule
from equipoise.state import InputLayout, Layout


class JointModule(nn.Module):
    r"""One round over $(z, \mu, x)$, whose fixed points are the stationary points of the constrained problem.

    It holds what the caller gave: the cell, and the cost where it is a module, so that their layers and parameters are
    found. All that follows the rows comes as arguments.

    Args:
        cell: `f(z, x, *inputs)`.
        cost: `c(z, x, *targets) -> (B,)`.
        regularizer: `r(x) -> (B,)`, or None.
        constraint: set of the inputs, a penalty with a proximal operator, or None.
        states: layouts of state and input.
        inputs: layout of what the cell takes beside state and input.
        targets: layout of what the cost takes beside state and input.
        schedule: of a round.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        cost: Callable[..., Tensor],
        regularizer: Callable[[Any], Tensor] | None,
        constraint: Constraint | Proximal | None,
        states: tuple[Layout, Layout],
        inputs: InputLayout,
        targets: InputLayout,
        schedule: Schedule,
    ) -> None:
        super().__init__()
        self.cell, self.cost, self.regularizer, self.constraint = cell, cost, regularizer, constraint
        self.states, self.layouts, self.schedule = states, (inputs, targets), schedule

    def forward(self, state: tuple[Tensor, Tensor, Tensor], step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`(z, mu, x)`, each flat, after a round; `step` is `(b, 1)`."""
        z, mu, x = state
        problem = Rows(self, tensors)
        z, mu, slope = self.schedule.advance(problem, z, mu, x)
        x = x - step * slope
        if isinstance(self.constraint, Proximal):
            spread = step.view(-1, *(1,) * len(self.states[1].shapes[0]))
            x = self.constraint.operator(problem.input(x), spread).flatten(1)
        return z, mu, x

    def project(self, v: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        """The flat joint state with its input in the feasible set."""
        if not isinstance(self.constraint, Constraint):
            return v
        problem = Rows(self, tensors)
        size = sum(self.states[1].sizes)
        x = problem.constraint.project(problem.input(v[:, -size:])).flatten(1)
        return torch.cat([v[:, :-size], x], dim=1)

    def variant(self, schedule: Schedule, *, free: bool = False) -> JointModule:
        """The same system with another schedule, without its constraint if `free`; the fixed points are the same.

        Args:
            schedule: of a round.
            free: leave the constraint out.
        """
        chosen = copy.copy(self)
        chosen.schedule = schedule
        chosen.constraint = None if free else self.constraint
        return chosen


class Rows:
    """Cell and cost at some rows, on flat states: a `Lagrangian`."""

    def __init__(self, joint: JointModule, tensors: Sequence[Tensor]) -> None:
        self.joint, self.tensors = joint, tensors
        inputs, targets = joint.layouts
        cut = sum(count for _, _, count in inputs.forms)
        end = cut + sum(count for _, _, count in targets.forms)
        self.inputs = inputs.unflatten(tensors[:cut])
        self.targets = targets.unflatten(tensors[cut:end])
        self.bounds = tensors[end:]

    @property
    def constraint(self) -> Constraint:
        """The feasible sets of these rows."""
        constraint = self.joint.constraint
        assert isinstance(constraint, Constraint)
        return dataclasses.replace(constraint, **dict(zip(constraint.tensors(), self.bounds, strict=True)))

    def state(self, z: Tensor) -> Any:
        """A flat state in the structure of the caller's."""
        return self.joint.states[0].unpack(z)

    def input(self, x: Tensor) -> Any:
        """A flat input in the structure of the caller's."""
        return self.joint.states[1].unpack(x)

    def image(self, z: Tensor, x: Tensor) -> Tensor:
        out = self.joint.cell(self.state(z), self.input(x), *self.inputs)
        return self.joint.states[0].pack(out, "the cell's result", z.dtype, cast=True)

    def cost(self, z: Tensor, x: Tensor) -> Tensor:
        given = self.input(x)
        value = _checked(self.joint.cost(self.state(z), given, *self.targets), "cost", len(z))
        if self.joint.regularizer is not None:
            value = value + _checked(self.joint.regularizer(given), "regularizer", len(z))
        return value

    def objective(self, z: Tensor, x: Tensor) -> Tensor:
        """Cost, regularizer and the penalty of a proximal operator, `(b,)`."""
        value = self.cost(z, x)
        if isinstance(self.joint.constraint, Proximal):
            value = value + _checked(self.joint.constraint.penalty(self.input(x)), "penalty", len(z))
        return value


def _checked(value: Any, name: str, rows: int) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return one number per sample, ({rows},), got {got}; sum over all but the batch")
    return value
