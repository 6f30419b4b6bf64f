"""Adjoint Broyden's method: secant conditions on products with the transposed Jacobian."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import LowRank, row_dots, row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import NEVER, Solver


@dataclasses.dataclass(eq=False)
class _Memory:
    """Memory of a solve.

    Update i is u_i v_i^T, with u_i a combination of sigma_0 .. sigma_i and v_i one of J^T sigma_0 .. J^T sigma_i.
    """

    vectors: Tensor  # (b, 2m, D): sigma_0, J^T sigma_0, sigma_1, J^T sigma_1, ...
    left: Tensor  # (b, m, m) float64, lower triangular: coefficients of u_i
    right: Tensor  # (b, m, m) float64, lower triangular: coefficients of v_i
    learned: Tensor  # (b, m) number of the evaluation behind each update
    rank: int = 0  # updates held by the running rows
    used: int = 0  # slots written so far
    absorbed: int = 0  # points absorbed

    @property
    def sigmas(self) -> Tensor:
        return self.vectors[:, 0 : 2 * self.rank : 2]

    @property
    def pulled(self) -> Tensor:
        return self.vectors[:, 1 : 2 * self.rank : 2]

    def spread(self, products: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return `first^T second products`, `(b, n)`: of the core with left and right, of its transpose otherwise."""
        n = self.rank
        inner = torch.bmm(second[:, :n, :n], products.to(second.dtype)[..., None])
        return torch.bmm(first[:, :n, :n].mT, inner)[..., 0]

    def mv(self, x: Tensor) -> Tensor:
        return x + row_sums(self.spread(row_dots(x, self.pulled), self.left, self.right), self.sigmas)

    def rmv(self, x: Tensor) -> Tensor:
        return x + row_sums(self.spread(row_dots(x, self.sigmas), self.right, self.left), self.pulled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdjointBroyden(Solver):
    r"""Adjoint Broyden's method with unit steps, from the inverse estimate $M_0 = I$ of $(I - J)^{-1}$.

    Each update makes the estimate exact from the left in the direction $\sigma$ of the residual,
    $\sigma^\top (I - J) M_+ = \sigma^\top$, at the cost of one product $t = J^\top \sigma$.

    $$ a = M \sigma, \quad b = M^\top (\sigma - t), \quad M_+ = M + \frac{a\,(\sigma - b)^\top}{b^\top \sigma},
       \quad z_{k+1} = z_k + M_+ r_k $$

    Outer-problem awareness (OPA): with `outer_loss`, a loss $L$ of the state, every `outer_every` steps a second update
    follows in the direction $\sigma = M^\top \nabla L$. The estimate of `Shine`, $M^\top \nabla L$, then tends to the
    exact adjoint solution. It is longer than without, so a `fallback_ratio` of 1.8 suits it better than 1.3.

    The start costs no product, every later point one, an outer-aware one two. The last point costs a product too,
    though no step follows: the inverse then belongs to the answer.

    Each update stores $\sigma$ and $t$, two vectors of the size of the state (Broyden: one), and the coefficients in
    them of the factors $a$ and $\sigma - b$. An iteration passes over them one and a half times. An update whose
    denominator is below `min_denominator` $\|\sigma\|^2$ is skipped for that sample. A memory without room for the
    updates of a point is emptied.

    Args:
        memory: number of updates held; at least `max_steps` if the inverse is to serve the backward pass, and
            `max_steps // outer_every` more with `outer_loss`.
        min_denominator: least denominator, relative to $\|\sigma\|^2$.
        outer_every: steps from one outer-aware update to the next; no effect without `outer_loss`.
        outer_loss: `(z, rows) -> (b,)`, the loss of each row at a state in the structure of the map's; `rows`, `(b,)`,
            are the numbers of these rows in the batch. Use `equipoise.nn.frozen` around modules that it calls.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range; `outer_loss` without `outer_every`.

    Example:
        >>> import torch, equipoise as eq
        >>> cell, target = torch.nn.Linear(3, 3), torch.ones(2, 3)
        >>> solver = eq.AdjointBroyden(outer_every=2, outer_loss=lambda z, rows: (z - target[rows]).square().sum(1))
        >>> solution = eq.fixed_point(lambda z: torch.tanh(cell(z)), torch.zeros(2, 3), solver=solver,
        ...                           gradient=eq.Shine(fallback_ratio=1.8))
        >>> (solution.value - target).square().sum().backward()

    Source: Schlenkrich, Griewank and Walther (2010), update C; Ramzi et al. (2022), section 2.3, where $H = -M$; their
    code takes $M \nabla L$ for $M^\top \nabla L$, for which the theorem does not hold.
    """

    memory: int = 36  # room for 18 steps at any outer_every, for 30 steps at 5
    min_denominator: float = 1e-8
    outer_every: int | None = None
    outer_loss: Callable[[Any, Tensor], Tensor] | None = None

    uses_vjp: ClassVar[bool] = True
    keeps_inverse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer_loss is not None and not callable(self.outer_loss):
            raise TypeError(
                f"AdjointBroyden(outer_loss={self.outer_loss!r}): must be a function (z, rows) -> (b,), or None"
            )
        if self.outer_loss is not None and self.outer_every is None:
            raise ValueError(
                "AdjointBroyden(outer_loss=...) is evaluated every `outer_every` steps: set outer_every, say to 5"
            )
        updates = 1 if self.outer_every is None else 2  # of one point
        check_ranges(self, outer_every=">= 1, or None", memory=f">= {updates}", min_denominator=">= 0")

    def init(self, point: Point) -> _Memory:
        b, size = point.z.shape
        most = sum(1 + self._is_outer_step(step) for step in range(2, self.max_steps + 1))
        m = max(1, min(self.memory, most))
        return _Memory(
            vectors=point.z.new_empty(b, 2 * m, size),
            left=torch.zeros(b, m, m, dtype=torch.float64, device=point.z.device),
            right=torch.zeros(b, m, m, dtype=torch.float64, device=point.z.device),
            learned=torch.full((b, m), NEVER, device=point.z.device),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        memory.absorbed += 1
        if memory.absorbed == 1:
            return point.z + point.residual
        aware = self._is_outer_step(memory.absorbed)
        if memory.rank + 1 + aware > memory.learned.shape[1]:
            # Rows that stopped keep their columns: their estimate has yet to be returned.
            memory.left = torch.where(point.running[:, None, None], 0.0, memory.left)
            memory.learned = torch.where(point.running[:, None], NEVER, memory.learned)
            memory.rank = 0
        step = self._learn(memory, point, point.residual)
        if aware:
            assert self.outer_loss is not None
            self._learn(memory, point, memory.rmv(point.loss_gradient(self.outer_loss)))
            step = memory.mv(point.residual)
        return point.z + step

    def inverse(self, memory: _Memory, step: Tensor) -> LowRank:
        k = memory.used
        known = memory.learned[:, :k] <= step[:, None]
        left = torch.where(known[:, :, None], memory.left[:, :k, :k], 0.0)
        core = left.new_zeros(left.shape[0], 2 * k, 2 * k)
        core[:, 0::2, 1::2] = torch.bmm(left.mT, memory.right[:, :k, :k])
        gamma = torch.ones(core.shape[0], dtype=memory.vectors.dtype, device=core.device)
        return LowRank(gamma, memory.vectors[:, : 2 * k], core)

    def _is_outer_step(self, step: int) -> bool:
        """Return whether the evaluation of this number adds an update for the outer loss."""
        return (
            self.outer_loss is not None
            and self.outer_every is not None
            and step > 1
            and (step - 1) % self.outer_every == 0
        )

    def _learn(self, memory: _Memory, point: Point, direction: Tensor) -> Tensor:
        """Update the estimate in one direction; return its product with the direction, `M_+ direction`."""
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        # An update does not depend on the length of sigma; at length one, squares do not underflow.
        sigma = direction / torch.where(norm > 0, norm, 1.0)
        pulled = point.vjp(sigma)
        y = sigma - pulled  # (I - J)^T sigma
        n = memory.rank
        weights = memory.spread(row_dots(sigma, memory.pulled), memory.left, memory.right)
        a = sigma + row_sums(weights, memory.sigmas)
        denominator = (y * a).sum(dim=1, keepdim=True)  # b . sigma
        usable = (denominator.abs() > self.min_denominator) & denominator.isfinite()
        scale = torch.where(usable, denominator, 1.0)
        # sigma - b = t - sum_j c_j t_j with the coefficients c of M^T y.
        cross = memory.spread(row_dots(y, memory.sigmas), memory.right, memory.left)
        one = torch.ones_like(denominator, dtype=weights.dtype)
        left, right = torch.cat([weights, one], dim=1) / scale, torch.cat([-cross, one], dim=1)

        keep = point.running[:, None]
        for slot, vector in ((2 * n, sigma), (2 * n + 1, pulled)):
            vector = torch.where(usable, vector, 0.0)
            old = memory.vectors[:, slot]
            memory.vectors[:, slot] = torch.where(keep, vector, old) if n < memory.used else vector
        for core, row in ((memory.left, left), (memory.right, right)):
            core[:, n, : n + 1] = torch.where(keep, torch.where(usable, row, 0.0), core[:, n, : n + 1])
        taught = torch.where(usable[:, 0], memory.absorbed, NEVER)
        memory.learned[:, n] = torch.where(point.running, taught, memory.learned[:, n])
        memory.rank = n + 1
        memory.used = max(memory.used, memory.rank)
        return a * (norm / scale)
