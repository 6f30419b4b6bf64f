"""Limited-memory "good" Broyden method, of which only the steps are stored."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import LowRank, row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import NEVER, Solver


@dataclasses.dataclass(eq=False)
class _Memory:
    steps: Tensor  # (b, m + 1, D): s_0 .. s_rank
    core: Tensor  # (b, m, m) float64, lower triangular
    learned: Tensor  # (b, m) number of the evaluation behind each column
    rank: int = -1  # columns in use; -1 before the first point
    absorbed: int = 0  # points absorbed
    restarted: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    r"""Broyden's good method with unit steps, from the inverse estimate $M_0 = I$ of $(I - J)^{-1}$.

    $$ s_k = M_k r_k, \quad z_{k+1} = z_k + s_k, \quad y_k = r_k - r_{k+1}, \quad
       M_{k+1} = M_k + \frac{(s_k - M_k y_k)\, s_k^\top M_k}{s_k^\top M_k y_k} $$

    With unit steps $M_{k+1} = (I + s_{k+1} s_k^\top / \|s_k\|^2)\, M_k$, so the steps alone are stored, and one
    iteration passes over them twice (Kelley, Iterative Methods for Linear and Nonlinear Equations, section 7.3).
    An update whose denominator is below `min_denominator` $\|s\|^2$ is skipped for that sample. A full memory is
    emptied.

    Args:
        memory: number of updates held; at least `max_steps` if the inverse is to serve the backward pass.
        min_denominator: least denominator, relative to $\|s\|^2$.

    Raises:
        ValueError: a field is out of range.

    Source: SHINE (Ramzi et al. 2022), where $H = -M$, with its "restart" policy.
    """

    memory: int = 18
    min_denominator: float = 1e-8

    keeps_inverse: ClassVar[bool] = True
    supports_projection: ClassVar[bool] = False  # the identity above holds for unit steps only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, memory=">= 1", min_denominator=">= 0")

    def init(self, point: Point) -> _Memory:
        b, size = point.z.shape
        m = max(1, min(self.memory, self.max_steps))
        return _Memory(
            steps=point.z.new_empty(b, m + 1, size),
            core=torch.zeros(b, m, m, dtype=torch.float64, device=point.z.device),
            learned=torch.full((b, m), NEVER, device=point.z.device),
        )

    def propose(self, memory: _Memory, point: Point) -> Tensor:
        memory.absorbed += 1
        n = memory.rank + 1  # the newest step is s_{n-1}
        full = n > memory.core.shape[1]
        if n == 0 or full:
            if full:
                # Rows that stopped keep their columns: their estimate has yet to be returned.
                memory.core = torch.where(point.running[:, None, None], 0.0, memory.core)
                memory.learned = torch.where(point.running[:, None], NEVER, memory.learned)
                memory.restarted = True
            memory.rank = 0
            self._store(memory, 0, point.residual, point.running)
            return point.z + point.residual
        steps, core = memory.steps, memory.core
        # r stands beside s_{n-1} in the buffer: one pass over the steps gives the products with both.
        self._store(memory, n, point.residual, point.running)
        products = torch.bmm(steps[:, n - 1 : n + 1], steps[:, :n].mT).to(core.dtype)  # (b, 2, n)
        gram, along = products[:, 0], products[:, 1]
        square = gram[:, -1]
        old = core[:, : n - 1, : n - 1]
        weights = torch.bmm(old, along[:, :-1, None])[..., 0]  # M_k r = r + sum_j weights_j s_j, j = 1 .. n-1
        denominator = square - along[:, -1] - (gram[:, 1:] * weights).sum(dim=1)  # |s|^2 - s . M_k r = s . M_k y
        usable = (denominator.abs() > self.min_denominator * square) & denominator.isfinite()
        scale = torch.where(usable, square / denominator, 1.0)[:, None]
        one = torch.ones_like(scale)
        s = row_sums(scale * torch.cat([weights, one], dim=1), steps[:, 1 : n + 1])  # r is the last of these rows

        row = torch.cat([torch.bmm(gram[:, None, 1:], old)[:, 0], one], dim=1)
        row = torch.where(usable, 1 / square, 0.0)[:, None] * row
        core[:, n - 1, :n] = torch.where(point.running[:, None], row, core[:, n - 1, :n])
        memory.learned[:, n - 1] = torch.where(point.running, memory.absorbed, memory.learned[:, n - 1])
        self._store(memory, n, s, point.running)
        memory.rank = n
        return point.z + s

    def inverse(self, memory: _Memory, step: Tensor) -> LowRank:
        k = memory.core.shape[1] if memory.restarted else max(memory.rank, 0)
        known = memory.learned[:, :k] <= step[:, None]
        # Row i holds update i, s_{i+1} times a combination of s_0 .. s_i; without the younger rows the
        # estimate is the older one exactly.
        core = torch.where(known[:, :, None], memory.core[:, :k, :k], 0.0)
        gamma = torch.ones(core.shape[0], dtype=memory.steps.dtype, device=core.device)
        return LowRank(gamma, memory.steps[:, : k + 1], torch.nn.functional.pad(core, (0, 1, 1, 0)))

    @staticmethod
    def _store(memory: _Memory, slot: int, vector: Tensor, running: Tensor) -> None:
        if memory.restarted:  # the slot may hold a column of a row that stopped
            vector = torch.where(running[:, None], vector, memory.steps[:, slot])
        memory.steps[:, slot] = vector
