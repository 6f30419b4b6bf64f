"""How exact the inner solves are: tolerances that decrease from one outer step to the next."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

LEAST = 1e-12


class Tolerance(abc.ABC):
    """Relative tolerance of the inner solve of each outer step."""

    @abc.abstractmethod
    def at(self, step: int) -> float:
        """The tolerance of outer step number `step`, counted from 1."""


@dataclasses.dataclass(frozen=True)
class _Falling(Tolerance):
    first: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.first < 1:
            raise ValueError(f"{type(self).__name__}(first={self.first!r}): must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Exponential(_Falling):
    r"""$\varepsilon_k = \varepsilon_1 \rho^{k-1}$, at least $10^{-12}$.

    Args:
        first: $\varepsilon_1$.
        factor: $\rho$.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> from equipoise.bilevel import Exponential
        >>> [Exponential(1e-3, 0.5).at(k) for k in (1, 2, 3)]
        [0.001, 0.0005, 0.00025]

    Source: Pedregosa (2016), section 4; the factors 0.9 and 0.78 are those of HOAG and SHINE in Ramzi et al. (2022).
    """

    factor: float = 0.78

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor <= 1:
            raise ValueError(f"Exponential(factor={self.factor!r}): must be positive and at most 1")

    def at(self, step: int) -> float:
        return max(self.first * self.factor ** (step - 1), LEAST)


@dataclasses.dataclass(frozen=True)
class _Power(_Falling):
    power: ClassVar[int]

    def at(self, step: int) -> float:
        return max(self.first / step**self.power, LEAST)


@dataclasses.dataclass(frozen=True)
class Quadratic(_Power):
    r"""$\varepsilon_k = \varepsilon_1 / k^2$, at least $10^{-12}$.

    Args:
        first: $\varepsilon_1$.

    Raises:
        ValueError: `first` is out of its range.

    Source: Pedregosa (2016), section 4.
    """

    power = 2


@dataclasses.dataclass(frozen=True)
class Cubic(_Power):
    r"""$\varepsilon_k = \varepsilon_1 / k^3$, at least $10^{-12}$.

    Args:
        first: $\varepsilon_1$.

    Raises:
        ValueError: `first` is out of its range.

    Source: Pedregosa (2016), section 4.
    """

    power = 3


@dataclasses.dataclass(frozen=True)
class Exact(Tolerance):
    r"""$\varepsilon_k = 10^{-12}$: each inner problem is solved as far as double precision goes."""

    def at(self, step: int) -> float:
        return LEAST
