"""The adjoint map, whose fixed point is the adjoint solution."""

from __future__ import annotations

from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.map import Map


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
