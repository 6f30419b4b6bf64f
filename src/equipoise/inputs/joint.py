"""The joint system of state, adjoint and input, as a map on flat rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.constraints import Constraint, Proximal
from equipoise.core.function_map import FunctionMap
from equipoise.core.map import Counts
from equipoise.core.state import InputLayout, Layout
from equipoise.inputs.schedules import Held, Linearization, Schedule


class JointModule(nn.Module):
    r"""One round over $(z, \mu, x)$, whose fixed points are the stationary points of the constrained problem.

    It holds what the caller gave: the cell, and cost and regularizer where they are modules, so that their layers and
    parameters are found. All that follows the rows comes as arguments: the step `(b, 1)`, what the cell takes, what the
    cost takes, and the tensors of the constraint.

    Args:
        cell: `f(z, x, *inputs)`.
        cost: `c(z, x, *targets) -> (B,)`.
        regularizer: `r(x) -> (B,)`, or None.
        constraint: set of the inputs, a penalty with a proximal operator, or None.
        states: layouts of state and input.
        inputs: layout of what the cell takes beside state and input.
        targets: layout of what the cost takes beside state and input.
        schedule: of a round.

    Attributes:
        counts: evaluations of the cell and products with its Jacobian, shared by all variants.
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
        self.counts = Counts()

    def forward(self, state: tuple[Tensor, Tensor, Tensor], step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`(z, mu, x)`, each flat, after a round, without the projection."""
        problem = Rows(self, tensors)
        z, mu, slope = self.schedule.advance(problem, *state)
        x = torch.addcmul(state[2], step, slope, value=-1)
        if isinstance(self.constraint, Proximal):
            spread = step.view(-1, *(1,) * len(self.states[1].shapes[0]))
            x = self.constraint.operator(problem.input(x), spread).flatten(1)
        return z, mu, x

    def project(self, v: Tensor, step: Tensor, *tensors: Tensor) -> Tensor:
        """The flat joint state with its input in the feasible set."""
        size = sum(self.states[1].sizes)
        problem = Rows(self, tensors)
        assert isinstance(self.constraint, Constraint)
        x = self.constraint.on(problem.bounds).project(problem.input(v[:, -size:])).flatten(1)
        return torch.cat([v[:, :-size], x], dim=1)

    def parts(self, state: tuple[Tensor, Tensor, Tensor], step: Tensor, *tensors: Tensor) -> Tensor:
        """State and adjoint after a round, and the slope of the input, side by side, `(b, 2n + p)`."""
        return torch.cat(self.schedule.advance(Rows(self, tensors), *state), dim=1)

    def objective(self, state: tuple[Tensor, Tensor, Tensor], step: Tensor, *tensors: Tensor) -> Tensor:
        """Cost, regularizer and the penalty of a proximal operator, `(b,)`."""
        problem = Rows(self, tensors)
        value = problem.cost(state[0], state[2])
        if isinstance(self.constraint, Proximal):
            value = value + _checked(self.constraint.penalty(problem.input(state[2])), "penalty", len(value))
        return value

    def variant(self, schedule: Schedule) -> JointModule:
        """The same system with another schedule; it shares parameters and counts, and has the same fixed points."""
        chosen = copy.copy(self)
        chosen.schedule = schedule
        if isinstance(schedule, Held):
            chosen.constraint = None  # the input stays where it is, be it a probe outside of the set
        return chosen


class JointMap(FunctionMap):
    r"""The map of a `JointModule`.

    Args:
        joint: one round.
        start: $(z, \mu, x)$, each flat.
        tensors: inputs of `joint`; the first is the step `(b, 1)`.
        params: as in `FunctionMap`; None: those of the modules in `joint`. If a part of it is a function, it is a
            closure.
    """

    f: JointModule

    def __init__(
        self,
        joint: JointModule,
        start: tuple[Tensor, Tensor, Tensor],
        tensors: Sequence[Tensor],
        *,
        params: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(
            joint,
            start,
            tensors,
            params=params,
            blocks=[part.shape[1] for part in start],
            projection=joint.project if isinstance(joint.constraint, Constraint) else None,
        )
        if params is None:
            parts = (joint.cell, joint.cost, joint.regularizer)
            self.declared = self.droppable = all(part is None or isinstance(part, nn.Module) for part in parts)

    @property
    def size(self) -> int:
        """Numbers of an input."""
        return sum(self.f.states[1].sizes)

    def with_step(self, step: Tensor) -> JointMap:
        """The same map with another step of the input, `(b, 1)`."""
        return self.with_inputs([step, *self.tensors[1:]])

    def with_schedule(self, schedule: Schedule) -> JointMap:
        """The map with another schedule; it shares masks, weights and counts."""
        chosen = copy.copy(self)
        chosen.f = self.f.variant(schedule)
        if isinstance(schedule, Held):
            chosen.projection = None
        return chosen

    def variant(self, schedule: Schedule, step: Tensor | None = None) -> JointMap:
        """The map with another schedule, and another step if given, untracked."""
        chosen = self.with_inputs([t.detach() for t in self.tensors]).with_schedule(schedule)
        return chosen if step is None else chosen.with_step(step)


class Rows:
    """Cell and cost at some rows, on flat states: the `Problem` of a schedule."""

    def __init__(self, joint: JointModule, tensors: Sequence[Tensor]) -> None:
        self.joint = joint
        inputs, targets = joint.layouts
        cut = sum(count for _, _, count in inputs.forms)
        end = cut + sum(count for _, _, count in targets.forms)
        self.inputs = inputs.unflatten(tensors[:cut])
        self.targets = targets.unflatten(tensors[cut:end])
        self.bounds = tensors[end:]

    def input(self, x: Tensor) -> Any:
        """A flat input in the structure of the caller's."""
        return self.joint.states[1].unpack(x)

    def image(self, z: Tensor, x: Tensor) -> Tensor:
        self.joint.counts.evals += 1
        layout = self.joint.states[0]
        out = layout.pack(
            self.joint.cell(layout.unpack(z), self.input(x), *self.inputs), "the cell's result", z.dtype, True
        )
        if len(out) != len(z):
            raise ValueError(
                f"the cell returned {len(out)} rows for a state of {len(z)}; it must keep the batch dimension"
            )
        return out

    def cost(self, z: Tensor, x: Tensor) -> Tensor:
        """`c(z, x) + r(x)`, `(b,)`."""
        given = self.input(x)
        value = _checked(self.joint.cost(self.joint.states[0].unpack(z), given, *self.targets), "cost", len(z))
        if self.joint.regularizer is not None:
            value = value + _checked(self.joint.regularizer(given), "regularizer", len(z))
        return value

    def at(self, z: Tensor, x: Tensor, *, second: bool) -> Linearization:
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            z, x = (t if tracked and t.requires_grad else t.detach().requires_grad_() for t in (z, x))
            image, cost = self.image(z, x), self.cost(z, x)
            slopes: tuple[Tensor, ...]
            if cost.requires_grad:
                ones = torch.ones_like(cost)
                slopes = torch.autograd.grad(cost, (z, x), ones, create_graph=second, materialize_grads=True)
            else:  # it ignores its arguments
                slopes = torch.zeros_like(z), torch.zeros_like(x)
        return Linearization(z, x, image, slopes, self.joint.counts, second)


def _checked(value: Any, name: str, rows: int) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return one number per sample, ({rows},), got {got}; sum over all but the batch")
    return value
