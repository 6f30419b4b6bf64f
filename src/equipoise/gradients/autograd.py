"""The autograd functions of an equilibrium: implicit differentiation with an estimator of the adjoint vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.guards import refuse_changes, refuse_foreign, sources
from equipoise.core.solution import Solution
from equipoise.gradients.adjoint import AdjointMap

HIGHER = "use Implicit() or Unrolled() where second derivatives are needed"
DECLARE = (
    "pass the module itself, or a function with its row-aligned tensors as inputs and the others as params, "
    "fixed_point(f, z0, *inputs, params=[...])"
)


class Estimator(Protocol):
    """The part of a `Gradient` that a backward pass uses."""

    @property
    def exact(self) -> bool: ...

    @property
    def uses_inverse(self) -> bool: ...

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor: ...


def attach(f: FunctionMap, solution: Solution[Tensor], gradient: Estimator) -> Solution[Tensor]:
    """Return the solution with a value that is differentiable in the map's inputs and parameters.

    Args:
        f: the map with the caller's input tensors.
        solution: of the forward solve, without gradient.
        gradient: the estimator of the adjoint vector.
    """
    if f.declared:
        f.adopt(solution.value)
        if not any(t.requires_grad for t in (*f.tensors, *f.params)):
            f.refuse_foreign(solution.value)
            return solution
        f.keep_buffers()
        record = _Record(f, gradient, solution).trimmed()
        value = _Equilibrium.apply(solution.value.detach(), record, *f.tensors, *f.params)
        return dataclasses.replace(solution, value=value)
    with f.solve_context():
        z, fz = f.call_tracked(solution.value)
    if not sources(fz, [z])[1]:
        return solution
    value = _ClosureEquilibrium.apply(fz, _Record(f, gradient, solution, z))
    return dataclasses.replace(solution, value=value, num_evals=solution.num_evals + 1)


@dataclasses.dataclass(eq=False, slots=True)
class _Record:
    """Arguments of a backward pass beside the tensors that autograd saves."""

    map: FunctionMap
    gradient: Estimator
    solution: Solution[Tensor]
    leaf: Tensor | None = None

    @property
    def residual(self) -> Tensor | None:
        """The residual of the solve; None if nothing was evaluated."""
        return self.solution.residual if self.solution.num_evals else None

    def trimmed(self) -> _Record:
        """Return a copy without the tensors that autograd saves itself, or that the backward pass does not need."""
        inverse = self.solution.inverse if self.gradient.uses_inverse else None
        empty = self.solution.residual.new_empty(0)
        solution = dataclasses.replace(self.solution, value=empty, inverse=inverse, trace=None, map=None)
        return dataclasses.replace(self, solution=solution, map=self.map.with_inputs([]))


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
                f"{type(record.gradient).__name__} estimates the gradient and cannot be differentiated again; {HIGHER}"
            )
        gradients = _tracked_gradients if higher else _gradients
        with record.map.solve_context(backward=True):
            grads = iter(gradients(record, z, g, inputs, wanted))
        return (None, None, *(next(grads) if want else None for want in wanted))


def _gradients(
    record: _Record, z: Tensor, g: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Return first derivatives: one evaluation of `f`, the adjoint vector, one product for all wanted tensors."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=False)]
    f = record.map.with_inputs(leaves)
    leaf, fz = f.call_tracked(z)
    g = check_map(f, fz, z, record.residual, g, [leaf, *leaves])
    adjoint = AdjointMap(f.detached(), leaf, fz, g)
    w = record.gradient.cotangent(adjoint, g, dataclasses.replace(record.solution, value=z))
    targets = [t for t, want in zip((*leaves, *f.params), wanted, strict=True) if want]
    return torch.autograd.grad(fz, targets, w, materialize_grads=True)


def check_map(
    f: FunctionMap, fz: Tensor, z: Tensor, residual: Tensor | None, g: Tensor, known: Sequence[Tensor]
) -> Tensor:
    """Check that the map is that of the solve and depends on known tensors alone; return the cotangent.

    Args:
        f: the map.
        fz: its tracked value at `z`.
        z: `(b, D)` state.
        residual: `(b,)` that was recorded there; None: none was.
        g: `(b, D)` cotangent.
        known: tensors beside the parameters that get gradients.
    """
    if fz.requires_grad and f.owner is not None and not f.makes_leaves:
        refuse_foreign(fz, [*known, *f.params])
    if residual is None:
        return g
    return refuse_changes(fz.detach(), z.detach(), residual, f.rounding(z.dtype), g)


def _tracked_gradients(
    record: _Record, z: Tensor, g: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Double-backward version: `w` is the equilibrium of the adjoint map, made differentiable in the same way."""
    gate = _Gate()
    z_in, *inputs_in = (_Through.apply(t, gate) for t in (z, *inputs))
    f = record.map.with_inputs(inputs_in)
    fz = f.call(z_in)
    g = check_map(f, fz, z, record.residual, g, [z_in, *inputs_in])
    with torch.no_grad():
        plain = AdjointMap(f.detached(), z_in, fz, g.detach())
        w = record.gradient.cotangent(plain, g.detach(), dataclasses.replace(record.solution, value=z.detach()))

    def adjoint(w: Tensor, z: Tensor, g: Tensor, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            z_in = z if z.requires_grad else z.detach().requires_grad_()
            fz = record.map.with_inputs(tensors).call(z_in)
            return torch.autograd.grad(fz, z_in, w, create_graph=True, materialize_grads=True)[0] + g

    adjoint_map = FunctionMap(
        adjoint,
        w,
        (z, g, *inputs),
        params=record.map.params,
        droppable=False,  # the dropout seeds inside do not follow rows that leave
        parametrizations=record.map.parametrizations,
    )
    # The Jacobian of this map is J^T, and its inverse estimate the transposed one.
    inverse = record.solution.inverse
    transposed = dataclasses.replace(
        record.solution,
        value=w,
        residual=torch.full_like(record.solution.residual, torch.nan),  # that of the solve is none of the adjoint
        inverse=None if inverse is None else inverse.mT,
    )
    w = attach(adjoint_map, transposed, record.gradient).value
    targets = [t for t, want in zip((*inputs_in, *f.params), wanted, strict=True) if want]
    return gate.closed_grad(fz, targets, w)


class _Gate:
    """Switch for derivatives: while it is closed, tensors behind it pass no gradient on to theirs."""

    closed = False

    def closed_grad(self, out: Tensor, targets: Sequence[Tensor], w: Tensor) -> tuple[Tensor, ...]:
        """Return differentiable gradients of `out`, partial at the tensors behind this gate."""
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
    """The fixed point of a closure: one tracked evaluation passes the adjoint vector on."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, record: _Record) -> Tensor:
        ctx.record, ctx.fz = record, fz
        return record.solution.value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        record: _Record = ctx.record
        if torch.is_grad_enabled():
            raise RuntimeError(f"the fixed point of a closure has first derivatives only: {DECLARE}")
        assert record.leaf is not None
        with record.map.solve_context(backward=True):
            adjoint = AdjointMap(record.map, record.leaf, ctx.fz, g)
            return record.gradient.cotangent(adjoint, g, record.solution), None
