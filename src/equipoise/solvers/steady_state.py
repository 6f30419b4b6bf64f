"""Integration of the flow `dz/dt = f(z) - z` to its steady state."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import norms, row_sums
from equipoise.core.map import Point
from equipoise.solvers.base import Solver
from equipoise.solvers.steppers import SHRINK, VCAB3, Stepper, StepperState, where_rows

BLOW_UP = 10.0  # largest residual of a point, relative to that at the start of its step


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteadyState(Solver):
    r"""Adaptive integration of the flow of a map from the start to a steady state.

    $$ \frac{dz}{dt} = f(z) - z, \qquad \text{a step } h \text{ of local error } e \text{ is accepted if }
       \|e\| \le \kappa\, h\, \|f(z) - z\| $$

    The flow is stable if the eigenvalues of $J$ have real parts below 1, Picard iteration only if they lie in the unit
    circle: this solver is for negative and complex eigenvalues. On contractions Anderson takes fewer evaluations.

    The error is relative to $h\,\|f(z) - z\|$, the length of the step. The source leaves out $h$; it compares a length
    with a rate and does not notice stiff modes: BS3 with $\kappa = 0.2$ then diverges at an eigenvalue of -3. After a
    point that is not finite, or whose residual is 10 times that at the start of its step, the sample tries a shorter
    step; the evaluation is lost.

    Args:
        stepper: the method, with $\kappa$: `VCAB3()`, `BS3()`, `Tsit5()` or `Euler()`.
        first_step: size of the first attempt; 1 is a Picard step.
        growth: largest ratio of a step to the last one; 1 with `error_ratio=math.inf` gives fixed steps.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has the wrong type.

    Example:
        >>> import torch, equipoise as eq
        >>> solution = eq.fixed_point(lambda z: 8 - 3 * z, torch.zeros(1, 1), solver=eq.SteadyState(rtol=1e-5))
        >>> round(float(solution.value), 3)
        2.0

    Source: Pal, Edelman and Rackauckas (2022), Continuous Deep Equilibrium Models.
    """

    stepper: Stepper = VCAB3()
    first_step: float = 1.0
    growth: float = 3.0

    counted: ClassVar[tuple[str, ...]] = ("accepted", "rejected")
    retries: ClassVar[int] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stepper, Stepper):
            raise TypeError(f"SteadyState(stepper={self.stepper!r}): must be a stepper such as VCAB3()")
        check_ranges(self, first_step="> 0 and < inf", growth=">= 1; at 1 steps never grow")

    def init(self, point: Point) -> StepperState:
        b, device = point.z.shape[0], point.z.device
        zeros = torch.zeros(b, dtype=torch.int64, device=device)
        ones = torch.ones(b, dtype=torch.float64, device=device)
        return StepperState(
            base=point.z,
            slopes=point.z.new_zeros(b, self.stepper.slots, point.z.shape[1]),
            size=ones * math.inf,
            step=ones * self.first_step,
            past=ones,  # neutral for error control; a multistep method does not use it yet
            phase=zeros,
            accepted=zeros,
            rejected=zeros,
            tableau=self.stepper.tableau(b, device),
        )

    def propose(self, memory: StepperState, point: Point) -> Tensor:
        size = norms(point.residual)
        sound = size <= BLOW_UP * memory.size  # False for NaN, too
        landed, rejected, step = self.stepper.absorb(memory, point, size, sound, self.growth)
        landed = landed & sound
        # The residual grows like the step times the stiffness: divide the step by as much.
        back = torch.where(size.isfinite(), memory.size / size, SHRINK).clamp_max(SHRINK)
        memory.step = torch.where(sound, step, memory.step * back)
        moving = point.running & memory.size.isfinite()  # the start is no step
        memory.base = where_rows(landed, point.z, memory.base)
        memory.size = torch.where(landed, size, memory.size)
        memory.accepted = memory.accepted + (landed & moving)
        memory.rejected = memory.rejected + ((rejected | ~sound) & point.running)
        return memory.base + row_sums(self.stepper.weights(memory), memory.slopes)
