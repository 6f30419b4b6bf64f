"""The flow `dz/dt = f(z) - z`, followed by every sample at its own pace to its steady state."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.linalg import row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import Solver
from equipoise.solvers.steppers import SHRINK, VCAB3, Classical, Stepper, StepperState, where_rows

BLOW_UP = 10.0  # a residual so many times that at the start of a step is no part of the flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteadyState(Solver):
    r"""Adaptive integration of the flow of a map from the start to a steady state.

    $$ \frac{dz}{dt} = f(z) - z, \qquad \text{a step } h \text{ of local error } e \text{ is accepted if }
       \|e\| \le \kappa\, h\, \|f(z) - z\| $$

    The flow is stable if the eigenvalues of $J$ have real parts below 1, Picard iteration only if they lie in the unit
    circle: negative and complex ones are what this solver is for. On contractions Anderson takes fewer evaluations.

    The error is taken relative to $h\,\|f(z) - z\|$, the length of the step. The source leaves out $h$, so a length
    is compared with a rate and stiff modes pass unnoticed: BS3 with $\kappa = 0.2$ then diverges at an eigenvalue of
    -3. A point that is not finite, or whose residual is 10 times that at the start of its step, sends the sample back
    to try a shorter step, at the price of that evaluation.

    Args:
        stepper: the method: `VCAB3()`, `BS3()`, `Tsit5()` or `Euler()`.
        control: of the error: None, as above; or by tolerances of the state, `Classical()`.
        first_step: the first step that is tried; 1 is a step of Picard's.
        growth: largest ratio of a step to the last one.

    Raises:
        ValueError, TypeError: a field is out of its range or of another kind.

    Example:
        >>> import torch, equipoise as eq
        >>> solution = eq.fixed_point(lambda z: 8 - 3 * z, torch.zeros(1, 1), solver=eq.SteadyState(rtol=1e-5))
        >>> round(float(solution.value), 3)
        2.0

    Source: Pal, Edelman and Rackauckas (2022), Continuous Deep Equilibrium Models.
    """

    stepper: Stepper = VCAB3()
    control: Classical | None = None
    first_step: float = 1.0
    growth: float = 3.0

    counted: ClassVar[tuple[str, ...]] = ("accepted", "rejected")
    retries: ClassVar[int] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stepper, Stepper):
            raise TypeError(f"SteadyState(stepper={self.stepper!r}): must be a stepper such as VCAB3()")
        if not (self.control is None or isinstance(self.control, Classical)):
            raise TypeError(f"SteadyState(control={self.control!r}): must be None or Classical(rtol=..., atol=...)")
        if not 0 < self.first_step < math.inf:
            raise ValueError(f"SteadyState(first_step={self.first_step!r}): must be positive and finite")
        if not self.growth >= 1:
            raise ValueError(f"SteadyState(growth={self.growth!r}): must be >= 1; at 1 steps never grow")

    def init(self, point: Point) -> StepperState:
        b, device = point.z.shape[0], point.z.device
        zeros = torch.zeros(b, dtype=torch.int64, device=device)
        ones = torch.ones(b, dtype=torch.float64, device=device)
        return StepperState(
            base=point.z,
            slopes=point.z.new_zeros(b, self.stepper.slots, point.z.shape[1]),
            size=ones * math.inf,
            step=ones * self.first_step,
            past=ones,  # neutral for the controller; a multistep method does not read it yet
            phase=zeros,
            accepted=zeros,
            rejected=zeros,
            tableau=self.stepper.tableau(b, device),
        )

    def propose(self, memory: StepperState, point: Point) -> Tensor:
        size = torch.linalg.vector_norm(point.residual, dim=1).double()
        sound = size <= BLOW_UP * memory.size  # False for NaN, too
        landed, rejected, step = self.stepper.absorb(memory, point, size, sound, self.control, self.growth)
        landed = landed & sound
        # The residual grows like the step times the stiffness: divide the step by as much.
        back = torch.where(size.isfinite(), memory.size / size, SHRINK).clamp_max(SHRINK)
        memory.step = torch.where(sound, step, memory.step * back)
        under_way = point.running & memory.size.isfinite()  # the start is no step
        memory.base = where_rows(landed, point.z, memory.base)
        memory.size = torch.where(landed, size, memory.size)
        memory.accepted = memory.accepted + (landed & under_way)
        memory.rejected = memory.rejected + ((rejected | ~sound) & point.running)
        return memory.base + row_sums(self.stepper.weights(memory), memory.slopes)
