"""Damped Picard iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from equipoise.map import Point
from equipoise.solvers.base import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    r"""Fixed-point iteration, which converges if the map contracts.

    $$ z_{k+1} = z_k + \beta\,(f(z_k) - z_k) $$

    If `lipschitz` is given, the tolerance bounds the error instead of the residual: a sample stops when
    $\|f(z) - z\| / (1 - L) \le \text{atol} + \text{rtol}\,\|f(z)\|$, and by Banach's theorem
    $\|z - z^*\| \le \|f(z) - z\| / (1 - L)$.

    Args:
        damping: $\beta$; below 1 it also tames maps that oscillate.
        lipschitz: a proved Lipschitz constant $L < 1$ of the map in the Euclidean norm of the whole state.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> import torch, equipoise as eq
        >>> solution = eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Picard(max_steps=50, rtol=1e-6))
        >>> round(float(solution.value), 4)
        0.7391
    """

    damping: float = 1.0
    lipschitz: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ValueError(f"Picard(damping={self.damping!r}): must lie in (0, 1]")
        if self.lipschitz is not None and not 0 <= self.lipschitz < 1:
            raise ValueError(
                f"Picard(lipschitz={self.lipschitz!r}): must lie in [0, 1); only a contraction has a bound"
            )

    def tolerance(self, size: Tensor) -> Tensor:
        allowed = super().tolerance(size)
        return allowed if self.lipschitz is None else allowed * (1 - self.lipschitz)

    def init(self, point: Point) -> Any:
        return None

    def propose(self, memory: Any, point: Point) -> Tensor:
        return point.fz if self.damping == 1 else point.z.add(point.r, alpha=self.damping)
