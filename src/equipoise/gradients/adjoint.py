"""The adjoint map, whose fixed point is the adjoint solution."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.linalg import dots, norms
from equipoise.core.map import Map

MAX_PRODUCTS = 100  # to see whether an equation has a solution


class AdjointMap(Map):
    r"""The affine map $w \mapsto J^\top w + g$ at a fixed state, on the kept graph of one evaluation of `f`.

    Args:
        f: the forward map.
        z: `(b, D)` leaf at which it was evaluated.
        fz: its value, tracked to `z`.
        g: `(b, D)` cotangent.
    """

    def __init__(self, f: FunctionMap, z: Tensor, fz: Tensor, g: Tensor) -> None:
        super().__init__(f.counts, droppable=f.droppable, precision=f.precision)
        self.forward_map, self.z, self.fz, self.g = f, z, fz, g

    @property
    def copies_rows(self) -> bool:
        return self.forward_map.copies_rows

    def call(self, w: Tensor) -> Tensor:
        # Not in place: autograd may return an expanded tensor, or w itself.
        return self.forward_map.vjp(self.fz, self.z, w) + self.g

    def select(self, index: Tensor) -> AdjointMap:
        # f is evaluated once for the rows that stay, so that products cost less from here on.
        f = self.forward_map.select(index)
        return AdjointMap(f, *f.call_tracked(self.z[index]), self.g[index])

    def with_cotangent(self, g: Tensor) -> AdjointMap:
        """Return the same map with another right-hand side."""
        return AdjointMap(self.forward_map, self.z, self.fz, g)

    def transposed(self, v: Tensor) -> Tensor:
        """Return `v - J v`, `(b, D)`, by differentiating a product with `J^T`; the layers must allow it."""
        with torch.enable_grad():
            u = torch.zeros_like(v).requires_grad_()
            if not self.fz.requires_grad:
                return v
            product = torch.autograd.grad(self.fz, self.z, u, create_graph=True, materialize_grads=True)[0]
            if not product.requires_grad:
                return v
            return v - torch.autograd.grad(product, u, v, materialize_grads=True)[0]

    def unsolvable(self) -> Tensor:
        r"""Return `(b,)` booleans: rows whose equation $(I - J^\top) w = g$ has no solution.

        Its least-squares residual $r = g - (I - J^\top) w \neq 0$ obeys $(I - J) r = 0$; it is found by CGLS.
        """
        r = self.g
        s = p = self.transposed(r)
        square = dots(s, s)
        for _ in range(min(2 * r.shape[1] + 2, MAX_PRODUCTS)):
            q = p - self.forward_map.vjp(self.fz, self.z, p)
            step = (square / dots(q, q)).nan_to_num(nan=0.0, posinf=0.0)
            r = torch.addcmul(r, step.to(r.dtype)[:, None], q, value=-1)
            s = self.transposed(r)
            square, before = dots(s, s), square
            p = torch.addcmul(s, (square / before).nan_to_num(nan=0.0, posinf=0.0).to(s.dtype)[:, None], p)
        left = norms(r)
        eps = torch.finfo(self.forward_map.precision or r.dtype).eps
        return (left > eps**0.3 * norms(self.g)) & (norms(s) <= eps**0.7 * left)
