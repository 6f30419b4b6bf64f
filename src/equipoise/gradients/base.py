"""Gradients of an equilibrium: the autograd functions that ask an estimator for the adjoint vector."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.function_map import Map, Point
from equipoise.core.linalg import InverseEstimate
from equipoise.core.solution import Solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(abc.ABC):
    r"""Turns the cotangent `g` of an equilibrium into $w \approx (I - J)^{-\top} g$.

    The gradients with respect to inputs and parameters are then $w^\top \partial f / \partial(\cdot)$, one
    vector-Jacobian product.
    """

    exact: ClassVar[bool] = False  # may be differentiated again
    uses_inverse: ClassVar[bool] = False  # the solver must keep its inverse estimate

    @abc.abstractmethod
    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        r"""`w`, `(B, D)`, from the adjoint map $w \mapsto J^\top w + g$, `g` `(B, D)` and the forward solution."""

    def warm_start(
        self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]
    ) -> tuple[Tensor, InverseEstimate | None]:
        """What this estimator offers another one as a start: a vector, and an estimate of the adjoint's inverse."""
        return self.cotangent(adjoint, g, solution), None

    def attach(self, f: Map, z0: Tensor, solution: Solution[Tensor]) -> Solution[Tensor]:
        """The solution with a differentiable value.

        Args:
            f: the map with the caller's input tensors.
            z0: flat start of the solve.
            solution: what the solver found, without gradient.
        """
        if not torch.is_grad_enabled():
            return solution
        if f.declared:
            value = attach_equilibrium(f, solution.value, self, solution)
        else:
            with f.session(), torch.enable_grad():
                z = solution.value.detach().requires_grad_()
                fz = f.call(z)
            if not _depends_beyond(fz, z):
                return solution
            value = _ClosureEquilibrium.apply(fz, _Record(f, self, solution, z))
            solution = dataclasses.replace(solution, num_evals=solution.num_evals + 1)
        return dataclasses.replace(solution, value=value)


class AdjointMap(Map):
    r"""The affine map $w \mapsto J^\top w + g$ at a fixed state, on the kept graph of one evaluation of `f`."""

    def __init__(self, f: Map, z: Tensor, fz: Tensor, g: Tensor) -> None:
        self.forward_map, self.z, self.fz, self.g = f, z, fz, g
        self.counts, self.blocks, self.projection = f.counts, None, None
        self.batch, self.dtype, self.autocast, self.device = g.shape[0], g.dtype, f.autocast, f.device

    @property
    def droppable(self) -> bool:
        return self.forward_map.droppable

    def select(self, index: Tensor) -> AdjointMap:
        """The adjoint map of some rows; `f` is evaluated on them once, so that the products cost less from here on."""
        f = self.forward_map.select(index)
        with torch.enable_grad():
            z = self.z[index].detach().requires_grad_()
            fz = f.call(z)
        return AdjointMap(f, z, fz, self.g[index])

    def scaled(self, g: Tensor) -> AdjointMap:
        """The same map with another right-hand side."""
        return AdjointMap(self.forward_map, self.z, self.fz, g)

    @contextlib.contextmanager
    def session(self, *, backward: bool = False) -> Iterator[None]:
        """Nothing to set up: an adjoint solve runs inside the session of its backward pass."""
        yield

    def call(self, w: Tensor) -> Tensor:
        # Not in place: what autograd returns may be an expanded tensor, or w itself.
        return self.forward_map.pull(self.fz, self.z, w) + self.g

    def evaluate(self, z: Tensor, rows: Tensor, running: Tensor, *, graph: bool = False) -> Point:
        if graph:
            raise ValueError("the adjoint map keeps no graph of its own: solve it with a solver that uses no vjp")
        fz = self.call(z)
        return Point(z, fz, fz - z, rows, running)


@dataclasses.dataclass(eq=False, slots=True)
class _Record:
    """What a backward pass needs beside tensors that autograd saves."""

    map: Map
    gradient: Gradient
    solution: Solution[Tensor]
    leaf: Tensor | None = None

    def trimmed(self) -> _Record:
        # The value is saved by autograd, and the rest of a solution is not needed: hold no state-sized tensor twice.
        inverse = self.solution.inverse if self.gradient.uses_inverse else None
        empty = self.solution.residual.new_empty(0)
        solution = dataclasses.replace(self.solution, value=empty, inverse=inverse, trace=None, map=None)
        return dataclasses.replace(self, solution=solution, map=self.map.on([]))


def attach_equilibrium(f: Map, value: Tensor, gradient: Gradient, solution: Solution[Tensor]) -> Tensor:
    """`value` as a differentiable function of the map's inputs and parameters."""
    if not any(t.requires_grad for t in (*f.tensors, *f.params)):
        return value
    record = _Record(f, gradient, dataclasses.replace(solution, value=value)).trimmed()
    return _Equilibrium.apply(value.detach(), record, *f.tensors, *f.params)


class _Equilibrium(torch.autograd.Function):
    """The fixed point of a map as a function of its inputs and parameters, by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, record: _Record, *tensors: Tensor) -> Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        out = value.detach()
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        record: _Record = ctx.record
        wanted = ctx.needs_input_grad[2:]
        if g is None:
            return (None,) * (2 + len(wanted))
        z, *tensors = ctx.saved_tensors
        inputs = tensors[: len(tensors) - len(record.map.params)]
        higher = torch.is_grad_enabled()
        if higher and not record.gradient.exact:
            raise RuntimeError(
                f"{type(record.gradient).__name__} estimates the gradient and cannot be differentiated again; use "
                "Implicit() or Unrolled() where second derivatives are needed"
            )
        pull = _pull_tracked if higher else _pull
        with record.map.session(backward=True):
            grads = iter(pull(record, z, g, inputs, wanted))
        return (None, None, *(next(grads) if want else None for want in wanted))


def _pull(
    record: _Record, z: Tensor, g: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """First derivatives: one evaluation of `f`, the adjoint vector, one product for all that wants a gradient."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=False)]
        f = record.map.on(leaves)
        fz = f.call(leaf)
    adjoint = AdjointMap(f.on([t.detach() for t in inputs]), leaf, fz, g)
    w = record.gradient.cotangent(adjoint, g, dataclasses.replace(record.solution, value=z))
    targets = [t for t, want in zip((*leaves, *f.params), wanted, strict=True) if want]
    return torch.autograd.grad(fz, targets, w, materialize_grads=True)


def _pull_tracked(
    record: _Record, z: Tensor, g: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The same, itself differentiable: `w` is the equilibrium of the adjoint map, attached by the same function."""
    gate = _Gate()
    z_in, *inputs_in = (_Through.apply(t, gate) for t in (z, *inputs))
    f = record.map.on(inputs_in)
    fz = f.call(z_in)
    with torch.no_grad():
        plain = AdjointMap(f.on([t.detach() for t in inputs]), z_in, fz, g.detach())
        w = record.gradient.cotangent(plain, g.detach(), dataclasses.replace(record.solution, value=z.detach()))

    def adjoint(w: Tensor, z: Tensor, g: Tensor, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            z_in = z if z.requires_grad else z.detach().requires_grad_()
            fz = record.map.on(tensors).call(z_in)
            return torch.autograd.grad(fz, z_in, w, create_graph=True, materialize_grads=True)[0] + g

    adjoint_map = Map(adjoint, w, (z, g, *inputs), params=record.map.params)
    adjoint_map.declared = False  # the dropout seeds inside know nothing of rows that leave
    adjoint_map.learning = record.map.learning
    # The Jacobian of this map is J^T, and its inverse estimate the transposed one.
    inverse = record.solution.inverse
    transposed = dataclasses.replace(record.solution, inverse=None if inverse is None else inverse.mT)
    w = attach_equilibrium(adjoint_map, w, record.gradient, transposed)
    targets = [t for t, want in zip((*inputs_in, *f.params), wanted, strict=True) if want]
    return gate.closed_grad(fz, targets, w)


class _Gate:
    """Lets derivatives through, but while closed: then a gradient is partial, for upstream gets nothing."""

    closed = False

    def closed_grad(self, out: Tensor, targets: Sequence[Tensor], w: Tensor) -> tuple[Tensor, ...]:
        """Differentiable gradients of `out` that do not run on through the tensors behind this gate."""
        self.closed = True
        try:
            return torch.autograd.grad(out, targets, w, create_graph=True, materialize_grads=True)
        finally:
            self.closed = False


class _Through(torch.autograd.Function):
    """The identity behind a gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return (None if ctx.gate.closed else g), None


class _ClosureEquilibrium(torch.autograd.Function):
    """The fixed point of a closure: the adjoint vector goes into one tracked evaluation, which passes it on."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, record: _Record) -> Tensor:
        ctx.record, ctx.fz = record, fz
        return record.solution.value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        record: _Record = ctx.record
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fixed point of a closure has first derivatives only: pass the module itself, or a function with "
                "its row-aligned tensors as inputs and the others as params, fixed_point(f, z0, *inputs, params=[...])"
            )
        assert record.leaf is not None
        with record.map.session(backward=True):
            adjoint = AdjointMap(record.map, record.leaf, ctx.fz, g)
            return record.gradient.cotangent(adjoint, g, record.solution), None


def _depends_beyond(fz: Tensor, z: Tensor) -> bool:
    """Whether `fz` depends on tensors that want gradients other than the leaf `z`."""
    seen, stack = set(), [fz.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not z:
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False
