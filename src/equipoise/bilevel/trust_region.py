"""The step rule of minimize_outer: a convex quadratic model within a box and a trust region."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from equipoise.bilevel.solution import OuterStatus
from equipoise.bilevel.steps import Proposal, StepRule, Trial

ACCEPT, POOR, GOOD = 0.01, 0.25, 0.75  # share of the predicted decrease
DAMPING = 0.2  # least curvature that a pair teaches, relative to the model's


@dataclasses.dataclass(eq=False)
class _Model:
    low: Tensor
    high: Tensor
    gradient: Tensor  # (p,) at the last accepted point
    hessian: Tensor  # (p, p)
    step: Tensor  # (p,) from there to the point proposed last
    radius: float
    at: Trial | None = None  # the last accepted point
    predicted: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustRegion(StepRule):
    r"""Steps to the minimum of a convex quadratic model within the bounds and a trust region.

    $$ \min_s\ G^\top s + \tfrac12 s^\top B s, \qquad \theta + s \in [\text{low}, \text{high}], \quad
       \|s\|_\infty \le \Delta $$

    $B$ is a damped BFGS matrix, at first the multiple of the identity for which the first step ends on the region. A
    point is accepted if the outer loss falls by a share of what the model predicts, up to the error that the inner
    tolerance leaves in it; otherwise the walk returns to the last accepted point, which needs no new solve, and the
    region shrinks. With one hyperparameter this is a safeguarded secant method.

    Args:
        radius: the first $\Delta$; the first step has this length in its largest component.
        rtol: converged when the model predicts a smaller decrease, relative to the outer loss.
        least_radius: stalled when the region is smaller.

    Raises:
        ValueError: a field is out of its range.

    Source: Conn, Gould and Toint, Trust-Region Methods (2000), section 10.6 for inexact values; Nocedal and Wright,
    Numerical Optimization (2006), procedure 18.2 for the damping.
    """

    radius: float = 2.0
    rtol: float = 1e-5
    least_radius: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.least_radius < self.radius < math.inf:
            raise ValueError(
                f"TrustRegion(radius={self.radius!r}, least_radius={self.least_radius!r}): must obey "
                "0 < least_radius < radius"
            )
        if not self.rtol >= 0:
            raise ValueError(f"TrustRegion(rtol={self.rtol!r}): must be >= 0")

    def init(self, low: Tensor, high: Tensor) -> _Model:
        zero = torch.zeros_like(low)
        return _Model(low, high, zero, torch.outer(zero, zero), zero, self.radius)

    def accepts(self, memory: _Model, trial: Trial) -> bool:
        if not math.isfinite(trial.value) or memory.at is None:
            return math.isfinite(trial.value)
        return self._share(memory, trial) >= ACCEPT

    @staticmethod
    def _share(memory: _Model, trial: Trial) -> float:
        """Actual over predicted decrease, both raised by the error of the values."""
        old = memory.at
        assert old is not None
        slack = old.noise + trial.noise
        return (old.value - trial.value + slack) / max(memory.predicted + slack, 1e-300)

    def propose(self, memory: _Model, trial: Trial) -> Proposal:
        if trial.gradient is None:
            self._shrink(memory, trial)
        elif memory.at is None:
            steepest = trial.gradient.abs().max().clamp_min(1e-300)
            memory.hessian = torch.eye(len(trial.x), dtype=trial.x.dtype) * steepest / self.radius
            memory.at, memory.gradient = trial, trial.gradient
        else:
            self._resize(memory, trial)
            self._learn(memory, trial.x - memory.at.x, trial.gradient - memory.gradient)
            memory.at, memory.gradient = trial, trial.gradient
        at = memory.at
        assert at is not None, "the first point is accepted"
        low = (memory.low - at.x).clamp_min(-memory.radius)
        high = (memory.high - at.x).clamp_max(memory.radius)
        step = quadratic_minimum(memory.gradient, memory.hessian, low, high)
        predicted = -float(memory.gradient @ step + step @ (memory.hessian @ step) / 2)
        length = float(step.abs().max())
        # A short step is no sign of a minimum where the region was cut before, unless it ends inside.
        telling = length < 0.99 * memory.radius or memory.radius >= self.radius / 16
        if predicted <= self.rtol * abs(at.value) and telling:
            return Proposal(x=None, status=OuterStatus.CONVERGED)
        if memory.radius < self.least_radius:
            return Proposal(x=None, status=OuterStatus.STALLED)
        memory.step, memory.predicted = step, predicted
        # What is about to be compared should be known better than it is predicted to change.
        return Proposal(
            x=(at.x + step).clamp(memory.low, memory.high), tighten=0.1 if predicted < 2 * at.noise else 1.0
        )

    @staticmethod
    def _shrink(memory: _Model, trial: Trial) -> None:
        """To where the parabola through both values has its minimum."""
        assert memory.at is not None
        slope = float(memory.gradient @ memory.step)
        part = -slope / (2 * (trial.value - memory.at.value - slope))
        part = min(max(part, 0.1), 0.5) if math.isfinite(part) else 0.25
        memory.radius = part * float(memory.step.abs().max())

    def _resize(self, memory: _Model, trial: Trial) -> None:
        """Shorter steps where the model predicted poorly, longer ones where it was right as far as it was allowed."""
        share, length = self._share(memory, trial), float(memory.step.abs().max())
        if share < POOR:
            memory.radius = length / 2
        elif share > GOOD and length >= 0.99 * memory.radius:
            memory.radius *= 2

    @staticmethod
    def _learn(memory: _Model, s: Tensor, y: Tensor) -> None:
        """Let the change of the gradient correct the model."""
        curvature = float(s @ y)
        if not float(s @ s) > 0:
            return
        image = memory.hessian @ s
        modelled = float(s @ image)
        if curvature < DAMPING * modelled:
            part = (1 - DAMPING) * modelled / (modelled - curvature)
            y = part * y + (1 - part) * image
            curvature = DAMPING * modelled
        updated = memory.hessian - torch.outer(image, image) / modelled + torch.outer(y, y) / curvature
        if bool(updated.isfinite().all()):
            memory.hessian = updated


def quadratic_minimum(g: Tensor, hessian: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Minimum of `g . s + s . H s / 2` over a box around zero, `H` positive definite: `(p,), (p, p) -> (p,)`.

    Newton steps in the components that are not held at a bound, projected; where such a step does not descend, one
    sweep through the components, each set to its own minimum, which always does.
    """

    def model(s: Tensor) -> float:
        return float(g @ s + s @ (hessian @ s) / 2)

    s = torch.zeros_like(g)
    value = 0.0
    for _ in range(100):
        slope = g + hessian @ s
        free = ~(((s <= low) & (slope >= 0)) | ((s >= high) & (slope <= 0)))
        if not bool(free.any()) or float(slope[free].abs().max()) <= 1e-12 * float(g.abs().max()):
            break
        newton = torch.zeros_like(s)
        newton[free] = -torch.linalg.solve(hessian[free][:, free], slope[free])
        for part in (1.0, 0.5, 0.1):
            trial = torch.clamp(s + part * newton, low, high)
            if model(trial) < value:
                break
        else:
            trial = s.clone()
            for i in range(len(s)):
                trial[i] = torch.clamp(trial[i] - (g[i] + hessian[i] @ trial) / hessian[i, i], low[i], high[i])
        if not model(trial) < value:
            break
        s, value = trial, model(trial)
    return s
