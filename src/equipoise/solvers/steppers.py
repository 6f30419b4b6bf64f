"""Integration methods of `SteadyState`, one evaluation at a time; each row has its own step size."""

import abc
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import can_branch_on, norms, row_sums
from equipoise.core.map import Point

SHRINK = 0.2  # least ratio of a step to the last one in error control
LARGE = 1e30  # finite bound on steps; `growth` limits them long before


@dataclasses.dataclass(eq=False)
class StepperState:
    """Memory of a `SteadyState` solve."""

    base: Tensor  # (b, D) last accepted state
    slopes: Tensor  # (b, m, D) stages (one-step) or divided differences (multistep)
    size: Tensor  # (b,) float64, |f(z) - z| at the base
    step: Tensor  # (b,) float64, step size of the attempt
    past: Tensor  # (b,) float64, of the last accepted step: its length (multistep) or its error (one-step)
    phase: Tensor  # (b,) int64, slopes in use: the order (multistep) or the current stage (one-step)
    accepted: Tensor  # (b,) int64
    rejected: Tensor  # (b,) int64
    tableau: Tensor | None  # (b, m + 1, m) float64: weights of each stage, then those of the error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepper(abc.ABC):
    r"""A one-step or multistep method.

    Args:
        error_ratio: $\kappa$, largest local error of a step of length $h$, relative to $h\,\|f(z) - z\|$; infinite: no
            error control.

    Raises:
        ValueError: `error_ratio` is not positive.
    """

    error_ratio: float

    slots: ClassVar[int]  # slopes held

    def __post_init__(self) -> None:
        check_ranges(self, error_ratio="> 0; math.inf controls no error")

    @abc.abstractmethod
    def absorb(
        self, state: StepperState, point: Point, size: Tensor, sound: Tensor, growth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update slopes, phase and past of each row by its point.

        Args:
            state: of the solve.
            point: the evaluation.
            size: `(b,)` norm of the residual there.
            sound: `(b,)` mask; a row that is not sound keeps its slopes.
            growth: largest ratio of a step to the last one.

        Returns:
            Masks `(b,)` of the rows whose point is the new base and of those that rejected an attempt, and the next
            step sizes `(b,)`; all three are meaningless for rows that are not sound.
        """

    @abc.abstractmethod
    def weights(self, state: StepperState) -> Tensor:
        """Return the weights `(b, m)` of the slopes whose sum leads from the base to the next point."""

    def tableau(self, rows: int, device: torch.device) -> Tensor | None:
        """Return the constants of the method, repeated for each row."""
        return None

    def error(self, vector: Tensor, size: Tensor) -> Tensor:
        """Return the error `h * vector` of a step `h` in units of the largest allowed one: `(b, D) -> (b,)` float64."""
        return norms(vector) / (self.error_ratio * size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VCAB3(Stepper):
    r"""Variable-step Adams-Bashforth, which raises its order 1-2-3: one evaluation a step.

    With divided differences $\delta_2, \delta_3$ of $F = f(z) - z$ over the last steps $h_1, h_2$,

    $$ z_{n+1} = z_n + h F_n + \tfrac{h^2}{2}\,\delta_2 + \tfrac{h^2 (2h + 3h_1)}{6}\,\delta_3 $$

    and the last term in use is the error. It is known before the step is evaluated, so a rejected attempt is shortened
    to the longest admissible step without an evaluation. Decaying modes of the flow do not grow if `error_ratio` is
    below 5/12.

    Source: Hairer, Norsett and Wanner I, section III.5, its recurrences in Newton's form; others start with
    Runge-Kutta steps, which cost six evaluations.
    """

    error_ratio: float = 0.15

    slots: ClassVar[int] = 3

    def absorb(
        self, state: StepperState, point: Point, size: Tensor, sound: Tensor, growth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, slopes = state.step, state.slopes
        order = (state.phase + 1).clamp_max(3)
        low = order < 3
        second = (point.residual - slopes[:, 0]).div_(h.to(point.residual.dtype)[:, None])
        third = (second - slopes[:, 1]).div_((h + state.past).to(point.residual.dtype)[:, None])
        error = self.error(where_rows(low, second, third), size)
        longest = torch.where(low, 2 / error, 12 / (3 * h * error + (9 * (h * error) ** 2 + 48 * error).sqrt()))
        blind = order == 1  # the error of the first step is unknown
        wish = torch.where(blind, h, growth * h)
        longest = torch.where(blind, h, longest.nan_to_num(nan=LARGE).clamp_max(LARGE))
        for slot, slope in enumerate((point.residual, second, third)):
            slopes[:, slot] = where_rows(sound, slope, slopes[:, slot])
        state.past = torch.where(sound & ~blind, h, state.past)
        state.phase = torch.where(sound, order, state.phase)
        return sound, longest < wish, torch.minimum(wish, longest)

    def weights(self, state: StepperState) -> Tensor:
        h = state.step
        weights = torch.stack([h, h**2 / 2, h**2 * (2 * h + 3 * state.past) / 6], dim=1)
        return torch.where(torch.arange(3, device=h.device) < state.phase[:, None], weights, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RungeKutta(Stepper):
    """Embedded explicit Runge-Kutta pair whose last stage is the first of the next step: one evaluation a stage."""

    stages: ClassVar[tuple[tuple[float, ...], ...]]  # weights of each stage but the first; the last row is the step
    difference: ClassVar[tuple[float, ...]]  # weights of the error
    order: ClassVar[int]  # of the pair's lower formula

    def tableau(self, rows: int, device: torch.device) -> Tensor:
        lines = [line + (0.0,) * (self.slots - len(line)) for line in ((), *self.stages, self.difference)]
        return torch.tensor(lines, dtype=torch.float64, device=device).repeat(rows, 1, 1)

    def absorb(
        self, state: StepperState, point: Point, size: Tensor, sound: Tensor, growth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert state.tableau is not None
        slopes, stage, step = state.slopes, state.phase, state.step
        rows = torch.arange(slopes.shape[0], device=slopes.device)
        # Slopes of weight zero must be finite, too.
        slopes[rows, stage] = where_rows(sound, point.residual, point.residual.new_zeros(1))
        last = stage == self.slots - 1
        landed = stage == 0
        if not can_branch_on(last) or bool(last.any()):
            vector = row_sums(state.tableau[:, -1], slopes)
            error = self.error(vector, state.size)
            good = last & (error <= 1)
            # Proportional-integral control after accepted steps, proportional control after rejected ones.
            factor = 0.9 * error ** (-0.7 / self.order) * torch.where(good, state.past ** (0.4 / self.order), 1.0)
            step = torch.where(last, step * factor.clamp(SHRINK, growth), step)
            slopes[:, 0] = where_rows(good & sound, point.residual, slopes[:, 0])
            state.past = torch.where(good, error.clamp_min(1e-4), state.past)
            landed = landed | good
        state.phase = torch.where(last | ~sound, 1, stage + 1)
        return landed, last & ~landed, step

    def weights(self, state: StepperState) -> Tensor:
        assert state.tableau is not None
        rows = torch.arange(state.phase.shape[0], device=state.phase.device)
        return state.step[:, None] * state.tableau[rows, state.phase]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BS3(RungeKutta):
    """Bogacki and Shampine's pair of orders 3 and 2: three evaluations a step.

    Decaying modes of the flow do not grow if `error_ratio` is at most 1/8.

    Source: Bogacki and Shampine (1989).
    """

    error_ratio: float = 0.1

    slots = 4
    stages = ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9))
    difference = (-5 / 72, 1 / 12, 1 / 9, -1 / 8)
    order = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tsit5(RungeKutta):
    r"""Tsitouras' pair of orders 5 and 4: six evaluations a step.

    Decaying modes do not grow at the default `error_ratio` if they rotate by less than 19 times their decay.

    Source: Tsitouras (2011).
    """

    error_ratio: float = 0.02

    slots = 7
    stages = (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    )
    difference = (
        -0.001780011052225777, -0.0008164344596567469, 0.007880878010261996, -0.1447110071732629,
        0.5823571654525552, -0.45808210592918695, 1 / 66,
    )  # fmt: skip
    order = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(RungeKutta):
    r"""Euler's method: Picard iteration with its step as damping; the error is half the change of the residual.

    Modes whose eigenvalue is at the angle $\phi$ from the negative real axis do not grow if `error_ratio` is below
    $\cos\phi$.
    """

    error_ratio: float = 0.3

    slots = 2
    stages = ((1.0,),)
    difference = (-1 / 2, 1 / 2)
    order = 1


def where_rows(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return rows `(b, D)` of one or the other; on the CPU without a copy if all are from one."""
    if can_branch_on(mask):
        if bool(mask.all()):
            return yes
        if not bool(mask.any()):
            return no
    return torch.where(mask[:, None], yes, no)
