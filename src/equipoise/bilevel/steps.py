"""Step rules of the outer loop: the protocol, and the rule of HOAG."""

import abc
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.solution import OuterStatus


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Outer loss at one point, as a step rule receives it.

    Attributes:
        x: `(p,)` float64, the hyperparameters as one vector.
        value: outer loss; NaN if the inner solve failed.
        noise: error estimate of the value, due to the tolerance of the inner solve.
        tolerance: relative tolerance of the inner solve.
        gradient: `(p,)` finite hypergradient; None at a rejected point.
    """

    x: Tensor
    value: float
    noise: float
    tolerance: float
    gradient: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """Next point of a step rule.

    Attributes:
        x: `(p,)` the point; None ends the optimization.
        tighten: factor on the tolerance of all later inner solves.
        status: status of the optimization if it ends.
    """

    x: Tensor | None
    tighten: float = 1.0
    status: OuterStatus = OuterStatus.CONVERGED


class StepRule(abc.ABC):
    """Rule that accepts points and proposes the next one; its fields are its whole configuration."""

    @abc.abstractmethod
    def init(self, low: Tensor, high: Tensor) -> Any:
        """Return the memory of a new optimization between bounds, each `(p,)`, infinite without a bound."""

    @abc.abstractmethod
    def accepts(self, memory: Any, trial: Trial) -> bool:
        """Return whether to continue from a point of finite value; its gradient is computed only then.

        The first point is accepted without this call.
        """

    @abc.abstractmethod
    def propose(self, memory: Any, trial: Trial) -> Proposal:
        """Absorb a point, accepted if it has a gradient, and return the next one."""


@dataclasses.dataclass(eq=False)
class _Descent:
    low: Tensor
    high: Tensor
    gradient: Tensor  # (p,) at `at`
    at: Trial | None = None  # the last accepted point
    lipschitz: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoagStep(StepRule):
    r"""Step rule of HOAG (hyperparameter optimization with approximate gradient).

    $$ \theta_{k+1} = P(\theta_k - G_k / \Lambda) $$

    with an estimate $\Lambda$ of a Lipschitz constant. The first step has length $\sqrt{p}$. With the length $\delta$
    of the step that led to it, the rule

    - accepts a new point and multiplies $\Lambda$ by `growth` if
      $L_k \le L_{k-1} + C \varepsilon_k + (C + 1)\,\varepsilon_{k-1} \delta - \Lambda \delta^2$;
    - rejects it if $L_k$ exceeds $L_{k-1}$ by the share `worse`: it returns to the old point, doubles $\Lambda$ and
      halves the tolerances;
    - accepts it otherwise.

    The published code applies an accepted step twice, tests the length of the next step instead of the last one, and
    does not return to the old point on rejection. Here each accepted point leads to one step, as in the paper.

    Args:
        growth: factor on $\Lambda$ after a good step; steps grow faster with a smaller one.
        slack: $C$.
        worse: relative increase of the outer loss at which a point is rejected.

    Raises:
        ValueError: a field is out of its range.

    Source: Pedregosa (2016), section 4 and the code of Ramzi et al. (2022).
    """

    growth: float = 0.95
    slack: float = 0.25
    worse: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.growth <= 1:
            raise ValueError(f"HoagStep(growth={self.growth!r}): must be positive and at most 1")
        for field in ("slack", "worse"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"HoagStep({field}={getattr(self, field)!r}): must be >= 0")

    def init(self, low: Tensor, high: Tensor) -> _Descent:
        return _Descent(low, high, torch.zeros_like(low))

    def accepts(self, memory: _Descent, trial: Trial) -> bool:
        assert memory.at is not None, "the first point is accepted"
        old = memory.at.value
        return self._good(memory.at, memory.lipschitz, trial) or trial.value < old + self.worse * abs(old)

    def _good(self, old: Trial, lipschitz: float, trial: Trial) -> bool:
        length = float(torch.linalg.vector_norm(trial.x - old.x))
        allowed = self.slack * trial.tolerance + (self.slack + 1) * old.tolerance * length
        return trial.value <= old.value + allowed - lipschitz * length**2

    def propose(self, memory: _Descent, trial: Trial) -> Proposal:
        tighten = 1.0
        if trial.gradient is None:
            memory.lipschitz *= 2
            tighten = 0.5
        else:
            if memory.at is None:
                norm = float(torch.linalg.vector_norm(trial.gradient))
                memory.lipschitz = norm / math.sqrt(len(trial.x)) if norm > 1e-3 else 1.0
            elif self._good(memory.at, memory.lipschitz, trial):
                memory.lipschitz *= self.growth
            memory.at, memory.gradient = trial, trial.gradient
        assert memory.at is not None, "the first point is accepted"
        x = memory.at.x - memory.gradient / memory.lipschitz
        return Proposal(x=x.clamp(memory.low, memory.high), tighten=tighten)
