"""Anderson acceleration."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from equipoise.linalg import row_dots, row_sums, solve_positive
from equipoise.map import Point
from equipoise.solvers.base import Solver


@dataclasses.dataclass(eq=False)
class _Memory:
    images: Tensor  # (b, m, D) f(z_i)
    residuals: Tensor  # (b, m, D) f(z_i) - z_i
    gram: Tensor  # (b, m, m) float64, products of residuals
    valid: Tensor  # (b, m) columns that the next step may use
    count: int = 0  # points absorbed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    r"""Anderson acceleration: the combination of the last points whose residual is least.

    $$ z_{k+1} = \sum_i \alpha_i \bigl(z_i + \beta r_i\bigr), \qquad
       \alpha = \arg\min_{\sum_i \alpha_i = 1} \Bigl\|\sum_i \alpha_i r_i\Bigr\|^2, \qquad r_i = f(z_i) - z_i $$

    Safeguard: a sample whose residual exceeds `growth` times the least in its memory goes back to the Picard step of
    that best point and forgets the others.

    Args:
        memory: number of points combined.
        mixing: $\beta$.
        ridge: regularisation of the least-squares problem, relative to the scale of each of its columns, so that it
            means the same at every residual.
        growth: how much a residual may grow before the sample restarts.

    Raises:
        ValueError: a field is out of its range.

    Source: Walker and Ni (2011), problem (LS) in differences to the newest residual.
    """

    memory: int = 5
    mixing: float = 1.0
    ridge: float = 1e-8
    growth: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"Anderson(memory={self.memory!r}): must be >= 1; 1 is Picard iteration")
        if not 0 < self.mixing <= 1:
            raise ValueError(f"Anderson(mixing={self.mixing!r}): must lie in (0, 1]")
        if not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge!r}): must be >= 0")
        if not self.growth > 1:
            raise ValueError(f"Anderson(growth={self.growth!r}): must be > 1")

    def init(self, point: Point) -> _Memory:
        b, size = point.z.shape
        m = max(1, min(self.memory, self.max_steps))
        return _Memory(
            images=point.z.new_empty(b, m, size),
            residuals=point.z.new_empty(b, m, size),
            gram=torch.zeros(b, m, m, dtype=torch.float64, device=point.z.device),
            valid=torch.zeros(b, m, dtype=torch.bool, device=point.z.device),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        m = memory.gram.shape[1]
        slot, used = memory.count % m, min(memory.count + 1, m)
        memory.images[:, slot] = point.fz
        memory.residuals[:, slot] = point.r
        memory.valid[:, slot] = True
        memory.count += 1
        products = row_dots(point.r, memory.residuals[:, :used]).to(memory.gram.dtype)
        memory.gram[:, slot, :used] = products
        memory.gram[:, :used, slot] = products
        if used == 1:
            return point.z.add(point.r, alpha=self.mixing)
        weights = self._weights(memory, slot, used)
        z = row_sums(weights, memory.images[:, :used])
        return z if self.mixing == 1 else z.sub_(row_sums(weights * (1 - self.mixing), memory.residuals[:, :used]))

    def _weights(self, memory: _Memory, slot: int, used: int) -> Tensor:
        """Weights `(b, used)` of the next step, restarted where the residual grew too much."""
        gram, valid = memory.gram[:, :used, :used], memory.valid[:, :used]
        squares = gram.diagonal(dim1=1, dim2=2)
        newest = squares[:, slot]
        least, best = torch.where(valid, squares, torch.inf).min(dim=1)
        onehot = torch.nn.functional.one_hot(best, used).bool()
        grown = ~(newest <= self.growth**2 * least)
        valid = torch.where(grown[:, None], onehot, valid)
        memory.valid[:, :used] = valid

        # Differences to the newest residual: A_ij = (r_n - r_i).(r_n - r_j), right-hand side r_n.(r_n - r_i).
        cross = gram[:, slot]
        others = valid.clone()
        others[:, slot] = False
        matrix = gram + (newest[:, None, None] - cross[:, :, None] - cross[:, None, :])
        # The rounding of the products is all that is known of differences below it.
        noise = torch.finfo(memory.images.dtype).eps * (newest[:, None] + squares)
        diagonal = torch.where(others, self.ridge * matrix.diagonal(dim1=1, dim2=2) + noise, 1.0)
        both = others[:, :, None] & others[:, None, :]
        matrix = torch.where(both, matrix, 0.0) + torch.diag_embed(diagonal)
        weights = solve_positive(matrix, torch.where(others, newest[:, None] - cross, 0.0))
        weights[:, slot] = 1 - weights.sum(dim=1)
        return torch.where(grown[:, None], onehot.to(weights.dtype), weights)
