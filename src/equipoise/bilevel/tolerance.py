"""Tolerance schedule of the inner solves."""

import dataclasses

LEAST = 1e-12  # double precision reaches no smaller relative residual


@dataclasses.dataclass(frozen=True)
class Tolerance:
    r"""Decreasing tolerance $\varepsilon_k = \varepsilon_1 \rho^{k-1} / k^p$ of outer step $k$, at least $10^{-12}$.

    The published schedules are `Tolerance(1e-3, 0.9)` and `Tolerance(1e-3, 0.78)` for HOAG and SHINE,
    `Tolerance(first, factor=1, power=2)` and `power=3`. `Tolerance(1e-12)` solves each inner problem as exactly as
    double precision allows.

    Args:
        first: $\varepsilon_1$.
        factor: $\rho$.
        power: $p$.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> from equipoise.bilevel import Tolerance
        >>> [Tolerance(1e-3, 0.5)(step) for step in (1, 2, 3)]
        [0.001, 0.0005, 0.00025]

    Source: Pedregosa (2016), section 4; Ramzi et al. (2022), section 3.1.
    """

    first: float = 1e-3
    factor: float = 0.78
    power: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.first < 1:
            raise ValueError(f"Tolerance(first={self.first!r}): must lie between 0 and 1")
        if not 0 < self.factor <= 1:
            raise ValueError(f"Tolerance(factor={self.factor!r}): must be positive and at most 1")
        if not self.power >= 0:
            raise ValueError(f"Tolerance(power={self.power!r}): must be >= 0")

    def __call__(self, step: int) -> float:
        """Return the relative tolerance of an outer step, counted from 1."""
        return max(self.first * self.factor ** (step - 1) / step**self.power, LEAST)
