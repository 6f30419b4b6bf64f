"""Damped Picard iteration."""

import dataclasses
from typing import Any

from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.map import Point
from equipoise.solvers.base import Solver

CONTRACTION = ">= 0 and < 1; only a contraction has a bound"  # rule for a Lipschitz constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    r"""Fixed-point iteration, which converges if the map contracts.

    $$ z_{k+1} = z_k + \beta\,(f(z_k) - z_k) $$

    With `lipschitz` alone, the tolerance bounds the error instead of the residual: a sample stops when
    $\|f(z) - z\| / (1 - L) \le \text{atol} + \text{rtol}\,\|f(z)\|$, and by Banach's theorem
    $\|z - z^*\| \le \|f(z) - z\| / (1 - L)$.

    A weaker condition suffices: let $f$ be $L$-Lipschitz, $L \ge 1$ allowed, and one-sided bounded,
    $\langle f(z) - f(z'), z - z' \rangle \le \mu \|z - z'\|^2$ with $\mu < 1$. Then the damped iteration with
    $\beta = (1 - \mu) / (1 - 2 \mu + L^2)$ contracts by $\sqrt{1 - (1 - \mu)^2 / (1 - 2 \mu + L^2)}$, and
    $\|z - z^*\| \le \|f(z) - z\| / (1 - \mu)$. With both constants, the solver uses this step and this bound. If
    $\mu > L^2$ the formula exceeds one and proves nothing; the step is then one, and the map contracts by $L < 1$.

    Args:
        damping: $\beta$; below 1 it also damps oscillations. With `one_sided` it follows from the constants.
        lipschitz: proved Lipschitz constant $L$ of the map in the Euclidean norm of the whole state, below 1 unless
            there is a one-sided bound.
        one_sided: proved one-sided bound $\mu < 1$ in the same norm.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> import torch, equipoise as eq
        >>> solution = eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Picard(max_steps=50, rtol=1e-6))
        >>> round(float(solution.value), 4)
        0.7391
    """

    damping: float = 1.0
    lipschitz: float | None = None
    one_sided: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, damping="> 0 and <= 1")
        if self.one_sided is None:
            check_ranges(self, lipschitz=CONTRACTION)
            return
        if self.lipschitz is None or self.lipschitz < 0 or not -self.lipschitz <= self.one_sided < 1:
            raise ValueError(
                f"Picard(one_sided={self.one_sided!r}, lipschitz={self.lipschitz!r}): needs a Lipschitz constant L and "
                "-L <= one_sided < 1"
            )
        if self.damping != 1:
            raise ValueError(f"Picard(damping={self.damping!r}): follows from one_sided and lipschitz; leave it out")

    @property
    def step(self) -> float:
        """Damping in use."""
        if self.one_sided is None or self.lipschitz is None:
            return self.damping
        mu = min(self.one_sided, self.lipschitz)  # by Cauchy and Schwarz
        return min(1.0, (1 - mu) / (1 - 2 * mu + self.lipschitz**2))

    def tolerance(self, size: Tensor) -> Tensor:
        allowed = super().tolerance(size)
        bound = self.lipschitz
        if self.one_sided is not None and bound is not None:
            bound = min(self.one_sided, bound)
        return allowed if bound is None else allowed * (1 - bound)

    def init(self, point: Point) -> Any:
        return None

    def propose(self, memory: Any, point: Point) -> Tensor:
        return point.fz if self.step == 1 else point.z.add(point.residual, alpha=self.step)
