"""Step rules: whether an outer step is accepted, and where the next one goes. The protocol and Pedregosa's rule."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from equipoise.bilevel.solution import OuterStatus


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What one outer step told.

    Attributes:
        x: `(p,)` float64, the hyperparameters laid flat.
        value: the outer loss; NaN where the inner solve failed.
        noise: by how much the value may be wrong, since the inner solve ended at a tolerance.
        tolerance: of the inner solve.
        gradient: `(p,)` the hypergradient, finite; None where the point was rejected.
    """

    x: Tensor
    value: float
    noise: float
    tolerance: float
    gradient: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """Where to go next.

    Attributes:
        x: `(p,)` the next point; None ends the optimization.
        tighten: factor on the tolerance of all inner solves from here on.
        status: why it ended.
    """

    x: Tensor | None
    tighten: float = 1.0
    status: OuterStatus = OuterStatus.CONVERGED


class StepRule(abc.ABC):
    """Walks through the hyperparameters within their bounds; its fields are its whole configuration."""

    @abc.abstractmethod
    def init(self, low: Tensor, high: Tensor) -> Any:
        """Memory of a new walk between the bounds, each `(p,)`, infinite where there is none."""

    @abc.abstractmethod
    def accepts(self, memory: Any, trial: Trial) -> bool:
        """Whether to go on from a point, by its value; only then its gradient is computed. False for NaN."""

    @abc.abstractmethod
    def propose(self, memory: Any, trial: Trial) -> Proposal:
        """Absorb a point, accepted if it has a gradient, and name the next one."""


@dataclasses.dataclass(eq=False)
class _Descent:
    low: Tensor
    high: Tensor
    gradient: Tensor  # (p,) at the last accepted point
    at: Trial | None = None  # that point
    lipschitz: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoagStep(StepRule):
    r"""Gradient steps $\theta_{k+1} = P(\theta_k - G_k / \Lambda)$, $\Lambda$ an estimate of a Lipschitz constant.

    The first step has length $\sqrt{p}$. With $\delta$ the length of the step that led to the new point, it is

    - accepted and $\Lambda$ multiplied by `growth` if
      $L_k \le L_{k-1} + C \varepsilon_k + (C + 1)\,\varepsilon_{k-1} \delta - \Lambda \delta^2$;
    - rejected if $L_k$ exceeds $L_{k-1}$ by the share `worse`: back to the old point, $\Lambda$ doubled, tolerances
      halved;
    - accepted otherwise.

    The published code applies an accepted step twice, tests the length of the step to come instead of the one made,
    and stays where it is on rejection; here each accepted point leads to one step, as in the paper.

    Args:
        growth: factor on $\Lambda$ after a good step; smaller lets steps grow faster.
        slack: $C$.
        worse: relative increase of the outer loss at which a step is taken back.

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
        if not math.isfinite(trial.value) or memory.at is None:
            return math.isfinite(trial.value)
        return self._good(memory, trial) or trial.value < memory.at.value + self.worse * abs(memory.at.value)

    def _good(self, memory: _Descent, trial: Trial) -> bool:
        old = memory.at
        assert old is not None
        length = float(torch.linalg.vector_norm(trial.x - old.x))
        allowed = self.slack * trial.tolerance + (self.slack + 1) * old.tolerance * length
        return trial.value <= old.value + allowed - memory.lipschitz * length**2

    def propose(self, memory: _Descent, trial: Trial) -> Proposal:
        tighten = 1.0
        if trial.gradient is None:
            memory.lipschitz *= 2
            tighten = 0.5
        else:
            if memory.at is None:
                norm = float(torch.linalg.vector_norm(trial.gradient))
                memory.lipschitz = norm / math.sqrt(len(trial.x)) if norm > 1e-3 else 1.0
            elif self._good(memory, trial):
                memory.lipschitz *= self.growth
            memory.at, memory.gradient = trial, trial.gradient
        assert memory.at is not None, "the first point is accepted"
        x = memory.at.x - memory.gradient / memory.lipschitz
        return Proposal(x=x.clamp(memory.low, memory.high), tighten=tighten)
