"""Hyperparameters: tensors on the outside, one flat float64 vector for the step rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Bound = float | Tensor | Sequence[float | Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class HyperLayout:
    """The tensors of `hyper0`, whose shapes, dtypes and devices all points take."""

    like: tuple[Tensor, ...]

    @classmethod
    def of(cls, hyper: Tensor | Sequence[Tensor]) -> HyperLayout:
        """Read `hyper0`: a tensor or a tuple of tensors.

        Raises:
            TypeError: something else, or no floating point.
            ValueError: no number in it, or one that is not finite.
        """
        parts = tuple(hyper) if isinstance(hyper, Sequence) else (hyper,)
        for part in parts:
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise TypeError(f"hyper0 must be a floating-point tensor or a tuple of such, got {part!r}")
            if not bool(part.isfinite().all()):
                raise ValueError(f"hyper0 must be finite, got {part!r}")
        if sum(part.numel() for part in parts) == 0:
            raise ValueError("hyper0 is empty: pass at least one hyperparameter")
        return cls(tuple(part.detach() for part in parts))

    def flat(self, parts: Sequence[Tensor]) -> Tensor:
        """One vector `(p,)`, float64 on the CPU."""
        return torch.cat([part.detach().reshape(-1).to("cpu", torch.float64) for part in parts])

    def leaves(self, x: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a flat vector, to be differentiated."""
        sizes = [part.numel() for part in self.like]
        return tuple(
            piece.reshape(part.shape).to(part.device, part.dtype, copy=True).requires_grad_()
            for piece, part in zip(x.split(sizes), self.like, strict=True)
        )

    def box(self, bounds: tuple[Bound, Bound] | None) -> tuple[Tensor, Tensor]:
        """Both bounds as vectors `(p,)`, infinite where there is none.

        Raises:
            TypeError: `bounds` is no pair.
            ValueError: a bound does not fit, or `hyper0` does not lie between them.
        """
        if bounds is None:
            bounds = (-math.inf, math.inf)
        if not isinstance(bounds, tuple) or len(bounds) != 2:
            raise TypeError(f"bounds must be a pair (low, high) of numbers or tensors, got {bounds!r}")
        low, high = (self._bound(bound) for bound in bounds)
        x = self.flat(self.like)
        if not bool((low <= high).all()):
            raise ValueError("bounds must be a pair (low, high) with low <= high")
        if not bool(((low <= x) & (x <= high)).all()):
            raise ValueError(f"hyper0 must lie within the bounds {bounds!r}, got {[*self.like]}")
        return low, high

    def _bound(self, bound: Bound) -> Tensor:
        each = [bound] * len(self.like) if isinstance(bound, (int, float, Tensor)) else list(bound)
        if len(each) != len(self.like):
            raise ValueError(f"a bound has {len(each)} parts, hyper0 has {len(self.like)}")
        wide = []
        for value, part in zip(each, self.like, strict=True):
            tensor = torch.as_tensor(value, dtype=part.dtype, device="cpu")  # a float32 0.3 is not above a bound of 0.3
            try:
                wide.append(tensor.expand(part.shape))
            except RuntimeError:
                raise ValueError(
                    f"a bound has shape {tuple(tensor.shape)}, its hyperparameter {tuple(part.shape)}"
                ) from None
        return self.flat(wide)
