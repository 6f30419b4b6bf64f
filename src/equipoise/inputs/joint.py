"""The joint system of state, adjoint and input, as a map of flat rows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.constraints import Constraint, Proximal
from equipoise.core.function_map import FunctionMap
from equipoise.core.map import Counts
from equipoise.core.state import Layout
from equipoise.inputs.schemes import FixedInput, Linearization, UpdateScheme

Triple = tuple[Tensor, Tensor, Tensor]  # state, adjoint and input, each flat


class JointModule(nn.Module):
    r"""One round over $(z, \mu, x)$, whose fixed points are the stationary points of the constrained problem.

    Cell, cost and regularizer are submodules if they are modules, so that their layers and parameters are found. All
    tensors with rows are arguments: the inputs of the cell, the targets of the cost, the bounds of the constraint and,
    last, the step `(b, 1)`.

    Args:
        cell: `f(z, x, *inputs)`.
        cost: `c(z, x, *targets) -> (B,)`.
        regularizer: `r(x) -> (B,)`, or None.
        constraint: set of the inputs, a penalty with a proximal operator, or None.
        layouts: layouts of state and input.
        sizes: numbers of inputs and of targets.
        scheme: update scheme of a round.

    Attributes:
        counts: evaluations of the cell and products with its Jacobian, shared by all variants.
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        cost: Callable[..., Tensor],
        regularizer: Callable[[Any], Tensor] | None,
        constraint: Constraint | Proximal | None,
        *,
        layouts: tuple[Layout, Layout],
        sizes: tuple[int, int],
        scheme: UpdateScheme,
    ) -> None:
        super().__init__()
        self.cell, self.cost, self.regularizer, self.constraint = cell, cost, regularizer, constraint
        self.layouts, self.sizes, self.scheme = layouts, sizes, scheme
        self.counts = Counts()

    def forward(self, state: Triple, *given: Any) -> tuple[Tensor, ...]:
        """Run one round, without the projection."""
        problem, step = FlatProblem(self, given), given[-1]
        z, mu, gradient = self.scheme.advance(problem, *state)
        x = torch.addcmul(state[2], step, gradient, value=-1)
        if isinstance(self.constraint, Proximal):
            step = step.view(-1, *(1,) * len(self.layouts[1].shapes[0]))
            x = self.constraint.operator(self.layouts[1].unpack(x), step).flatten(1)
        return z, mu, x

    def advance(self, state: Triple, *given: Any) -> Tensor:
        """Return state and adjoint after a round and the gradient of the input, side by side, `(b, 2n + p)`."""
        return torch.cat(self.scheme.advance(FlatProblem(self, given), *state), dim=1)

    def project(self, v: Tensor, *given: Any) -> Tensor:
        """Project the input of a flat joint state onto the constraint."""
        assert isinstance(self.constraint, Constraint)
        size, bounds = sum(self.layouts[1].sizes), given[sum(self.sizes) : -1]
        x = self.constraint.on(bounds).project(self.layouts[1].unpack(v[:, -size:])).flatten(1)
        return torch.cat([v[:, :-size], x], dim=1)

    def objective(self, state: Triple, *given: Any) -> Tensor:
        """Return cost, regularizer and the penalty of a proximal operator, `(b,)`."""
        value = FlatProblem(self, given).cost(state[0], state[2])
        if isinstance(self.constraint, Proximal):
            penalty = self.constraint.penalty(self.layouts[1].unpack(state[2]))
            value = value + _checked(penalty, "penalty", len(value))
        return value


class JointMap(FunctionMap):
    r"""The map of a `JointModule`.

    Args:
        joint: one round.
        start: $(z, \mu, x)$, each flat.
        given: further arguments of `joint`; the last is the step `(b, 1)`.
        params: as in `FunctionMap`; None: those of the modules in `joint`. If a part of it is a function, it is a
            closure.
    """

    f: JointModule
    makes_leaves: ClassVar[bool] = True

    def __init__(
        self, joint: JointModule, start: Triple, given: Sequence[Any], *, params: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__(
            joint,
            start,
            given,
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
        return sum(self.f.layouts[1].sizes)

    @property
    def step(self) -> Tensor:
        """The step of the input, `(b, 1)`."""
        return self.tensors[-1]

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        with self.counts.paused(), self.f.counts.paused():
            yield

    def with_step(self, step: Tensor) -> JointMap:
        """Return the map with another step of the input, `(b, 1)`."""
        return self.with_inputs([*self.tensors[:-1], step])

    def with_scheme(self, scheme: UpdateScheme) -> JointMap:
        """Return the map with another scheme and the same fixed points; it shares masks, weights and counts."""
        chosen, chosen_module = copy.copy(self), copy.copy(self.f)
        chosen.f, chosen_module.scheme = chosen_module, scheme
        if isinstance(scheme, FixedInput):
            # The input keeps its value, even as a probe outside of the constraint.
            chosen.projection = chosen_module.constraint = None
        return chosen

    def advance(self, v: Tensor) -> Tensor:
        """Return state and adjoint after a round and the gradient of the input, side by side, `(b, 2n + p)`."""
        advanced: Tensor = self.call_user(self.f.advance, v)
        return advanced


class FlatProblem:
    """Cell and cost of some rows as functions of flat tensors."""

    def __init__(self, joint: JointModule, given: Sequence[Any]) -> None:
        self.joint, (cut, count) = joint, joint.sizes
        self.inputs, self.targets = given[:cut], given[cut : cut + count]

    def evaluate(self, z: Tensor, x: Tensor) -> Tensor:
        self.joint.counts.evals += 1
        state, given = self.joint.layouts
        result = self.joint.cell(state.unpack(z), given.unpack(x), *self.inputs)
        out = state.pack(result, "the cell's result", z.dtype, True)
        if len(out) != len(z):
            raise ValueError(
                f"the cell returned {len(out)} rows for a state of {len(z)}; it must keep the batch dimension"
            )
        return out

    def cost(self, z: Tensor, x: Tensor) -> Tensor:
        """Return `c(z, x) + r(x)`, `(b,)`."""
        state, given = self.joint.layouts[0].unpack(z), self.joint.layouts[1].unpack(x)
        value = _checked(self.joint.cost(state, given, *self.targets), "cost", len(z))
        if self.joint.regularizer is not None:
            value = value + _checked(self.joint.regularizer(given), "regularizer", len(z))
        return value

    def linearize(self, z: Tensor, x: Tensor, *, create_graph: bool) -> Linearization:
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            z, x = (t if tracked and t.requires_grad else t.detach().requires_grad_() for t in (z, x))
            fz, cost = self.evaluate(z, x), self.cost(z, x)
            if cost.requires_grad:
                ones = torch.ones_like(cost)
                dz, dx = torch.autograd.grad(cost, (z, x), ones, create_graph=create_graph, materialize_grads=True)
            else:  # the cost ignores its arguments
                dz, dx = torch.zeros_like(z), torch.zeros_like(x)
        return Linearization(z, x, fz, (dz, dx), self.joint.counts, create_graph)


def _checked(value: Any, name: str, rows: int) -> Tensor:
    """Check that a user function returned one number per sample."""
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return one number per sample, ({rows},), got {got}; sum over all but the batch")
    return value
