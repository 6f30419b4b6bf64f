"""Default step rule: a convex quadratic model within a box and a trust region."""

import dataclasses
import math

import torch
from torch import Tensor

from equipoise.bilevel.solution import OuterStatus
from equipoise.bilevel.steps import Proposal, StepRule, Trial

ACCEPT, POOR, GOOD = 0.01, 0.25, 0.75  # limits of the actual over the predicted decrease
DAMPING = 0.2  # least curvature of an update, relative to the curvature of the model
TINY = 1e-300  # keeps quotients finite


@dataclasses.dataclass(eq=False)
class _Model:
    low: Tensor
    high: Tensor
    gradient: Tensor  # (p,) at `at`
    hessian: Tensor  # (p, p)
    step: Tensor  # (p,) from `at` to the proposed point
    radius: float
    at: Trial | None = None  # the last accepted point
    predicted: float = 0.0  # decrease over the step


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustRegion(StepRule):
    r"""Steps to the minimum of a convex quadratic model within the bounds and a trust region.

    $$ \min_s\ G^\top s + \tfrac12 s^\top B s, \qquad \theta + s \in [\text{low}, \text{high}], \quad
       \|s\|_\infty \le \Delta $$

    $B$ is a damped BFGS matrix. It begins as the multiple of the identity for which the first step ends on the boundary
    of the region. A point is accepted if the outer loss falls by a share of the decrease that the model predicts, up to
    the error due to the inner tolerance. Otherwise the next step starts again at the last accepted point, without a new
    solve, and the region shrinks. With one hyperparameter this is a safeguarded secant method.

    Args:
        radius: first $\Delta$; the first step has this length in its largest component.
        rtol: converged if the model predicts a smaller decrease, relative to the outer loss.
        least_radius: stalled if the region is smaller.

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
        return _decrease_ratio(memory, trial) >= ACCEPT

    def propose(self, memory: _Model, trial: Trial) -> Proposal:
        if trial.gradient is None:
            _shrink(memory, trial)
        else:
            if memory.at is None:
                steepest = trial.gradient.abs().max().clamp_min(TINY)
                memory.hessian = torch.eye(len(trial.x), dtype=trial.x.dtype) * steepest / self.radius
            else:
                _resize(memory, trial)
                _update_hessian(memory, trial.x - memory.at.x, trial.gradient - memory.gradient)
            memory.at, memory.gradient = trial, trial.gradient
        at = memory.at
        assert at is not None, "the first point is accepted"
        low = (memory.low - at.x).clamp_min(-memory.radius)
        high = (memory.high - at.x).clamp_max(memory.radius)
        step = quadratic_minimum(memory.gradient, memory.hessian, low, high)
        predicted = -float(memory.gradient @ step + step @ (memory.hessian @ step) / 2)
        # In a region that was cut before, a short step is a sign of a minimum only if it ends inside.
        inside = float(step.abs().max()) < 0.99 * memory.radius
        if predicted <= self.rtol * abs(at.value) and (inside or memory.radius >= self.radius / 16):
            return Proposal(x=None, status=OuterStatus.CONVERGED)
        if memory.radius < self.least_radius:
            return Proposal(x=None, status=OuterStatus.STALLED)
        memory.step, memory.predicted = step, predicted
        # The error of the compared values should be smaller than their predicted difference.
        tighten = 0.1 if predicted < 2 * at.noise else 1.0
        return Proposal(x=(at.x + step).clamp(memory.low, memory.high), tighten=tighten)


def _decrease_ratio(memory: _Model, trial: Trial) -> float:
    """Return the actual over the predicted decrease, both raised by the error of the values."""
    old = memory.at
    assert old is not None, "the first point is accepted"
    slack = old.noise + trial.noise
    return (old.value - trial.value + slack) / max(memory.predicted + slack, TINY)


def _shrink(memory: _Model, trial: Trial) -> None:
    """Shrink the region to the minimum of the parabola through both values."""
    assert memory.at is not None, "the first point is accepted"
    slope = float(memory.gradient @ memory.step)
    part = -slope / (2 * (trial.value - memory.at.value - slope))
    part = min(max(part, 0.1), 0.5) if math.isfinite(part) else 0.25
    memory.radius = part * float(memory.step.abs().max())


def _resize(memory: _Model, trial: Trial) -> None:
    """Shrink the region after a poor prediction; grow it after a good one at its boundary."""
    ratio, length = _decrease_ratio(memory, trial), float(memory.step.abs().max())
    if ratio < POOR:
        memory.radius = length / 2
    elif ratio > GOOD and length >= 0.99 * memory.radius:
        memory.radius *= 2


def _update_hessian(memory: _Model, s: Tensor, y: Tensor) -> None:
    """Apply the damped BFGS update of a step `s` and the change `y` of the gradient."""
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
    """Minimize `g . s + s . H s / 2` over a box around zero, `H` positive definite: `(p,), (p, p) -> (p,)`.

    Newton steps in the components that are not held at a bound, projected onto the box. If such a step does not
    descend, one sweep sets each component to its own minimum, which always descends.
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
