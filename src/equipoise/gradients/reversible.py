"""Backpropagation through a reversible iteration, in constant memory."""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.function_map import FunctionMap
from equipoise.core.solution import Solution
from equipoise.gradients.adjoint import AdjointMap
from equipoise.gradients.autograd import DECLARE, HIGHER, check_map
from equipoise.gradients.base import Gradient

AMPLIFICATION = 1e3  # growth of a rounding error that is allowed before the next pair that is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversible(Gradient):
    r"""Exact gradient of a reversible iteration, whose states are not kept but computed again backwards.

    $$ y_{n+1} = (1 - \beta) y_n + \beta f(z_n), \qquad z_{n+1} = (1 - \beta) z_n + \beta f(y_{n+1}), \qquad
       y_0 = z_0 $$

    It returns the last $z$. The memory of a training step is that of one evaluation of the map at any number of steps.
    In a step backwards a rounding error grows by $1 / (1 - \beta)$; the pair is therefore a float64 one, also around a
    coarser map, and is kept every few steps.

    It takes the place of the solver, which must be `Picard(max_steps=0)`: there is no best iterate, no row leaves, and
    the status stays MAX_STEPS. The same iteration runs without gradients, so that training and evaluation compute the
    same function; to solve to a tolerance instead, `layer.using(solver=..., gradient=Implicit())`. `residual` is that
    of the last point at which the map was applied, $y$. The value is differentiable in the start, too.

    Args:
        steps: number of steps; each costs two evaluations, and in the backward pass two more with two products.
        relaxation: $\beta$.

    Raises:
        ValueError: a field is out of range, another solver, or a closure.

    Example:
        >>> import torch, equipoise as eq
        >>> cell = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
        >>> layer = {"solver": eq.Picard(max_steps=0), "gradient": eq.Reversible(steps=6)}
        >>> solution = eq.fixed_point(cell, torch.zeros(2, 3), **layer)
        >>> solution.value.sum().backward()
        >>> solution.num_evals
        12

    Source: McCallum, Kamat, Alapati and Foster (2025), Reversible deep equilibrium models, equations (5) and (6). Here
    the pair is kept now and then, so that the gradient is exact in single precision.
    """

    steps: int = 8
    relaxation: float = 0.5

    replaces_solver: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, steps=">= 1", relaxation="> 0 and < 1")

    @property
    def kept_every(self) -> int:
        """Steps between two pairs that are kept for the backward pass."""
        return max(1, math.floor(-math.log(AMPLIFICATION) / math.log1p(-self.relaxation)))

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        raise TypeError("Reversible differentiates its own iteration and cannot start an adjoint solve")

    def attach(self, f: FunctionMap, z0: Tensor, solution: Solution[Tensor]) -> Solution[Tensor]:
        if torch.is_grad_enabled():
            if not f.declared:
                raise ValueError(f"Reversible differentiates no closure: {DECLARE}")
            f.adopt(z0)
        z, residual = _ReversibleIteration.apply(self, f, z0, *f.tensors, *f.params)
        if not z.requires_grad and torch.is_grad_enabled():
            f.refuse_foreign(z0)
        return dataclasses.replace(
            solution,
            value=z,
            residual=residual,
            num_steps=solution.num_steps + self.steps,
            num_evals=solution.num_evals + 2 * self.steps,
        )


class _ReversibleIteration(torch.autograd.Function):
    """The iteration as a function of start, inputs and parameters."""

    @staticmethod
    def forward(ctx: Any, method: Reversible, f: FunctionMap, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        f, beta = f.detached(), method.relaxation
        y = z = z0.detach().double()
        kept, fy, tracked = [], y, any(ctx.needs_input_grad)
        with f.solve_context():
            for step in range(method.steps):
                if tracked and step % method.kept_every == 0:
                    kept += [y, z]
                y = torch.lerp(y, f.call(z.to(f.dtype)).double(), beta)
                fy = f.call(y.to(f.dtype)).double()
                z = torch.lerp(z, fy, beta)
        if tracked:
            f.keep_buffers()
        residual = torch.linalg.vector_norm(fy - y, dim=1)
        ctx.method, ctx.map, ctx.count = method, f.with_inputs([]), len(kept) + 3
        ctx.save_for_backward(residual, y, z, *kept, *tensors)
        ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)
        return z.to(f.dtype), residual.to(f.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        if g is None:
            return (None,) * (3 + len(wanted))
        if torch.is_grad_enabled():
            raise RuntimeError(f"Reversible cannot be differentiated again; {HIGHER}")
        residual, y, z, *rest = ctx.saved_tensors
        kept, tensors = rest[: ctx.count - 3], rest[ctx.count - 3 :]
        method, beta = ctx.method, ctx.method.relaxation
        inputs = tensors[: len(tensors) - len(ctx.map.params)]
        leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=False)]
        f = ctx.map.with_inputs(leaves)
        targets = [t for t, want in zip((*leaves, *f.params), wanted, strict=True) if want]
        totals = [torch.zeros_like(t) for t in targets]

        def pull(leaf: Tensor, value: Tensor, cotangent: Tensor) -> Tensor:
            """Return the product with the Jacobian of the state; those of the others are added to their totals."""
            if not value.requires_grad:
                return torch.zeros_like(cotangent)
            # The graph of parametrized weights serves all steps, so it is kept; that of the state dies with its names.
            out = torch.autograd.grad(
                value, [leaf, *targets], beta * cotangent, retain_graph=True, materialize_grads=True
            )
            torch._foreach_add_(totals, out[1:])
            return out[0]

        gy, gz = torch.zeros_like(g), g
        with f.solve_context(backward=True):
            for step in reversed(range(method.steps)):
                saved = None if step % method.kept_every else step // method.kept_every
                leaf, value = f.call_tracked(y.to(f.dtype))
                if step == method.steps - 1:  # the one evaluation at a point that the forward pass recorded
                    gz = check_map(f, value, leaf, residual, gz, [leaf, *leaves])
                z = kept[2 * saved + 1] if saved is not None else (z - beta * value.detach()) / (1 - beta)
                gy, gz = gy + pull(leaf, value, gz), (1 - beta) * gz
                leaf, value = f.call_tracked(z.to(f.dtype))
                y = kept[2 * saved] if saved is not None else (y - beta * value.detach()) / (1 - beta)
                gy, gz = (1 - beta) * gy, gz + pull(leaf, value, gy)
        grads = iter(totals)
        start = gy + gz if ctx.needs_input_grad[2] else None
        return (None, None, start, *(next(grads) if want else None for want in wanted))
