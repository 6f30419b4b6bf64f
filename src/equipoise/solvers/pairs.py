"""The secant pairs of L-BFGS, and the inverse estimate from them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from equipoise.core.linalg import LowRank, dots, row_dots
from equipoise.solvers.base import NEVER


@dataclasses.dataclass(frozen=True)
class SecantInverse(LowRank):
    """Symmetric inverse estimate from secant pairs, which are rows of its basis.

    Attributes:
        learned: `(b, m)` number of the evaluation behind the pair in rows 2j and 2j + 1 of the basis, or `NEVER`.
    """

    learned: Tensor

    @property
    def mT(self) -> SecantInverse:
        return self

    def select(self, index: Tensor) -> SecantInverse:
        return SecantInverse(self.gamma[index], self.basis[index], self.core[index], self.learned[index])

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return `s` and `y`, each `(b, k, D)`, oldest first, scaled to s.y = 1; rows with fewer begin with zeros."""
        known = self.learned != NEVER
        count = int(known.sum(dim=1).max())
        order = torch.where(known, self.learned, -NEVER).argsort(dim=1, stable=True)[:, known.shape[1] - count :]
        rows = torch.arange(len(order), device=order.device)[:, None]
        found = self.basis.unflatten(1, (-1, 2))[rows, order]
        s, y = torch.where(known[rows, order][..., None, None], found, 0.0).unbind(dim=2)
        return s, y


@dataclasses.dataclass(eq=False)
class Pairs:
    """The newest pairs of each row, in a ring buffer with one spare slot."""

    vectors: Tensor  # (b, 2m + 2, D): s_0, y_0, s_1, y_1, ... divided by the root of s.y
    factor: Tensor  # (b, m + 1, m + 1) float64, inverse of R_ij = s_i . y_j, i not younger than j
    gram: Tensor  # (b, m + 1, m + 1) float64, y_i . y_j
    learned: Tensor  # (b, m + 1) number of the evaluation behind each pair, or NEVER
    spare: Tensor  # (b,) slot of the next pair
    calls: int = 0  # of `add`; slots beyond are unused

    @classmethod
    def empty(cls, like: Tensor, memory: int) -> Pairs:
        """Return a memory without pairs, for states like `(b, D)`."""
        (b, size), slots, device = like.shape, memory + 1, like.device
        return cls(
            vectors=like.new_zeros(b, 2 * slots, size),
            factor=torch.zeros(b, slots, slots, dtype=torch.float64, device=device),
            gram=torch.zeros(b, slots, slots, dtype=torch.float64, device=device),
            learned=torch.full((b, slots), NEVER, device=device),
            spare=torch.zeros(b, dtype=torch.int64, device=device),
        )

    @property
    def used(self) -> int:
        return max(1, min(self.calls, self.learned.shape[1]))

    @property
    def none(self) -> Tensor:
        """`(b,)` mask of rows without a pair."""
        return (self.learned == NEVER).all(dim=1)

    def add(self, s: Tensor, y: Tensor, *, number: int, rows: Tensor, min_curvature: float) -> None:
        """Store a pair in rows of the mask in which the objective is convex enough along it.

        Args:
            s: `(b, D)` steps.
            y: `(b, D)` decrease of the residual over them.
            number: of the evaluation behind them; larger than those before.
            rows: `(b,)` mask.
            min_curvature: least cosine between `s` and `y`.
        """
        self.calls += 1
        curvature = dots(s, y)
        keep = rows & (curvature > min_curvature * (dots(s, s) * dots(y, y)).sqrt())
        scale = torch.where(keep, curvature.rsqrt(), 0.0).to(s.dtype)
        pair = torch.stack([s, y], dim=1) * scale[:, None, None]
        pair = torch.where(keep[:, None, None], pair, 0.0)  # zero times a point that is not finite is NaN
        index, slot, used = torch.arange(len(s), device=s.device), self.spare, self.used
        self.vectors.unflatten(1, (-1, 2))[index, slot] = pair
        products = row_dots(pair[:, 1], self.vectors[:, : 2 * used]).to(self.gram.dtype)
        self.gram[index, slot, :used] = products[:, 1::2]
        self.gram[index, :used, slot] = products[:, 1::2]
        # R grows by a column that ends in one, and so does its inverse.
        known = (self.learned[:, :used] != NEVER).to(products.dtype)
        column = torch.bmm(self.factor[:, :used, :used], (products[:, ::2] * known)[:, :, None])[:, :, 0]
        self.factor[index, slot] = 0.0
        self.factor[index, :used, slot] = -column * known
        self.factor[index, slot, slot] = 1.0
        self.learned[index, slot] = torch.where(keep, number, NEVER)
        # The oldest pair makes room for the next one, but not in rows that stored nothing.
        self.spare = torch.where(keep, (slot + 1) % self.learned.shape[1], slot)
        self.learned[index, self.spare] = NEVER

    def inverse(self, step: Tensor, *, scaled: bool) -> SecantInverse:
        """Return the estimate as it stood after evaluation number `step`, `(b,)`."""
        # Pairs are missing at the old end (evicted) and at the young one (after `step`). The inverse of a triangular
        # matrix without its first or last rows and columns is its inverse without them.
        used = self.used
        known = self.learned[:, :used] <= step[:, None]
        factor = self.factor[:, :used, :used] * (known[:, :, None] & known[:, None, :])
        gram = self.gram[:, :used, :used]
        learned = torch.where(known, self.learned[:, :used], NEVER)
        gamma = gram.new_ones(len(gram))
        if scaled:
            newest = torch.where(known, learned, -NEVER).argmax(dim=1, keepdim=True)
            square = gram.diagonal(dim1=1, dim2=2).gather(1, newest)[:, 0]
            gamma = torch.where(known.any(dim=1), 1 / square, gamma)
        core = gram.new_zeros(len(gram), 2 * used, 2 * used)
        mixed = factor * gamma[:, None, None]
        core[:, ::2, ::2] = torch.bmm(factor.mT, torch.baddbmm(factor, gram, mixed))
        core[:, 1::2, ::2] = -mixed
        core[:, ::2, 1::2] = -mixed.mT
        return SecantInverse(gamma, self.vectors[:, : 2 * used], core, learned)
