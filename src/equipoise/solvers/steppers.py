"""Integration steps for `SteadyState`: each takes one evaluation at a time, each row at its own pace."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.linalg import can_branch_on, row_sums
from equipoise.core.map import Point

SHRINK = 0.2  # least ratio of a step to the last one that error control asks for
LARGE = 1e30  # longer steps are limited by growth in any case


@dataclasses.dataclass(eq=False)
class StepperState:
    """Where each sample is on its way; the memory of a solve."""

    base: Tensor  # (b, D) last accepted state
    slopes: Tensor  # (b, m, D) what steps are combined of: stages, or divided differences
    size: Tensor  # (b,) float64, |f(z) - z| at the base
    step: Tensor  # (b,) float64, the step that is attempted
    past: Tensor  # (b,) float64, of the last accepted step: its length (multistep) or its error (one-step)
    phase: Tensor  # (b,) int64, slopes in use: the order (multistep) or the stage that is evaluated (one-step)
    accepted: Tensor  # (b,) int64
    rejected: Tensor  # (b,) int64
    tableau: Tensor | None  # (b, m + 1, m) float64: weights of each stage, then those of the error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classical:
    r"""Error control by tolerances of the state: the mean square of $e_i / (\text{atol} + \text{rtol}\,|z_i|)$ is <= 1.

    For comparisons: where these tolerances are looser than the solver's, steps beyond the region of stability pass
    unnoticed, and samples hover around the equilibrium until `max_steps`.

    Args:
        rtol: relative to each number of the state.
        atol: absolute.

    Raises:
        ValueError: a field is not positive.
    """

    rtol: float = 1e-3
    atol: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("rtol", "atol"):
            if not getattr(self, field) > 0:
                raise ValueError(f"Classical({field}={getattr(self, field)!r}): must be > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepper(abc.ABC):
    r"""A one-step or multistep method.

    Args:
        error_ratio: largest local error of a step of length $h$, relative to $h\,\|f(z) - z\|$.

    Raises:
        ValueError: error_ratio is not positive.
    """

    error_ratio: float

    slots: ClassVar[int]  # slopes held

    def __post_init__(self) -> None:
        if not self.error_ratio > 0:
            raise ValueError(
                f"{type(self).__name__}(error_ratio={self.error_ratio!r}): must be > 0; math.inf controls no error"
            )

    @abc.abstractmethod
    def absorb(
        self, track: StepperState, point: Point, size: Tensor, sound: Tensor, control: Classical | None, growth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take a point of residual `size` into slopes, phase and past of its row, or refuse it if it is not `sound`.

        Returns:
            Masks `(b,)` of the rows that make the point their base and of those that rejected an attempt, and the
            steps `(b,)` to attempt next; all three are disregarded where the point is not sound.
        """

    @abc.abstractmethod
    def weights(self, track: StepperState) -> Tensor:
        """The next point is the base plus the slopes with these weights, `(b, m)`."""

    def tableau(self, rows: int, device: torch.device) -> Tensor | None:
        """Constants of the method for each row."""
        return None

    def error(self, vector: Tensor, z: Tensor, size: Tensor, control: Classical | None) -> Tensor:
        """An error of `h * vector` or `h**2 * vector` from `z` in allowed units, without `h` in classical control and
        without one `h` otherwise: `(b, D) -> (b,)` float64."""
        if control is None:
            return torch.linalg.vector_norm(vector, dim=1).double() / (self.error_ratio * size)
        allowed = control.atol + control.rtol * z.abs()
        return torch.linalg.vector_norm(vector / allowed, dim=1).double() / math.sqrt(z.shape[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class VCAB3(Stepper):
    r"""Variable-step Adams-Bashforth, which raises its order 1-2-3: one evaluation a step.

    With divided differences $\delta_2, \delta_3$ of $F = f(z) - z$ over the last steps $h_1, h_2$,

    $$ z_{n+1} = z_n + h F_n + \tfrac{h^2}{2}\,\delta_2 + \tfrac{h^2 (2h + 3h_1)}{6}\,\delta_3 $$

    and the last term in use is the error. It is known before the step is evaluated: an attempt that it rejects is
    shortened to the longest step that it admits, at no evaluation. Modes of the flow that decay are not made to grow
    if `error_ratio` is below 5/12.

    Source: Hairer, Norsett and Wanner I, section III.5, its recurrences in Newton's form; others start with
    Runge-Kutta steps, which cost six evaluations.
    """

    error_ratio: float = 0.15

    slots: ClassVar[int] = 3

    def absorb(
        self, track: StepperState, point: Point, size: Tensor, sound: Tensor, control: Classical | None, growth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, slopes = track.step, track.slopes
        order = (track.phase + 1).clamp_max(3)
        low = order < 3
        second = (point.residual - slopes[:, 0]).div_(h.to(point.residual.dtype)[:, None])
        third = (second - slopes[:, 1]).div_((h + track.past).to(point.residual.dtype)[:, None])
        error = self.error(where_rows(low, second, third), point.z, size, control)
        if control is None:
            longest = torch.where(low, 2 / error, 12 / (3 * h * error + (9 * (h * error) ** 2 + 48 * error).sqrt()))
        else:
            # Order 3 asks for the root of a cubic: at the lesser root of either term the two make at most 2.
            longest = torch.minimum((3 / error) ** (1 / 3), (2 / (h * error)).sqrt())
            longest = longest / (longest**2 * (2 * longest + 3 * h) * error / 6).sqrt()
            longest = torch.where(low, (2 / error).sqrt(), longest)
        blind = order == 1  # nothing is known of the first step's error
        wish = torch.where(blind, h, growth * h)
        longest = torch.where(blind, h, longest.nan_to_num(nan=LARGE).clamp_max(LARGE))
        for slot, slope in enumerate((point.residual, second, third)):
            slopes[:, slot] = where_rows(sound, slope, slopes[:, slot])
        track.past = torch.where(sound & ~blind, h, track.past)
        track.phase = torch.where(sound, order, track.phase)
        return sound, longest < wish, torch.minimum(wish, longest)

    def weights(self, track: StepperState) -> Tensor:
        h = track.step
        weights = torch.stack([h, h**2 / 2, h**2 * (2 * h + 3 * track.past) / 6], dim=1)
        return torch.where(torch.arange(3, device=h.device) < track.phase[:, None], weights, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RungeKutta(Stepper):
    """An embedded explicit pair whose last stage is the first of the next step: a stage an evaluation."""

    stages: ClassVar[tuple[tuple[float, ...], ...]]  # weights of each stage but the first; the last are the step's
    difference: ClassVar[tuple[float, ...]]  # weights of the error
    order: ClassVar[int]  # of the pair's lower formula

    def tableau(self, rows: int, device: torch.device) -> Tensor:
        lines = [line + (0.0,) * (self.slots - len(line)) for line in ((), *self.stages, self.difference)]
        return torch.tensor(lines, dtype=torch.float64, device=device).repeat(rows, 1, 1)

    def absorb(
        self, track: StepperState, point: Point, size: Tensor, sound: Tensor, control: Classical | None, growth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert track.tableau is not None
        slopes, stage, step = track.slopes, track.phase, track.step
        rows = torch.arange(slopes.shape[0], device=slopes.device)
        # What has no weight must be finite all the same.
        slopes[rows, stage] = where_rows(sound, point.residual, point.residual.new_zeros(1))
        last = stage == self.slots - 1
        landed = stage == 0
        if not can_branch_on(last) or bool(last.any()):
            vector = row_sums(track.tableau[:, -1], slopes)
            error, power = self.error(vector, track.base, track.size, control), self.order
            if control is not None:
                error, power = error * step, power + 1
            good = last & (error <= 1)
            # Proportional-integral control after accepted steps, proportional control after rejected ones.
            factor = 0.9 * error ** (-0.7 / power) * torch.where(good, track.past ** (0.4 / power), 1.0)
            step = torch.where(last, step * factor.clamp(SHRINK, growth), step)
            slopes[:, 0] = where_rows(good & sound, point.residual, slopes[:, 0])
            track.past = torch.where(good, error.clamp_min(1e-4), track.past)
            landed = landed | good
        track.phase = torch.where(last | ~sound, 1, stage + 1)
        return landed, last & ~landed, step

    def weights(self, track: StepperState) -> Tensor:
        assert track.tableau is not None
        rows = torch.arange(track.phase.shape[0], device=track.phase.device)
        return track.step[:, None] * track.tableau[rows, track.phase]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BS3(RungeKutta):
    """Bogacki and Shampine's pair of orders 3 and 2: three evaluations a step.

    Modes of the flow that decay are not made to grow if `error_ratio` is at most 1/8.

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

    Modes that decay are not made to grow at the default `error_ratio` if they turn by less than 19 times their decay.

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
    """Rows `(b, D)` of one or the other; on the host without a copy where all are of one kind."""
    if can_branch_on(mask):
        if bool(mask.all()):
            return yes
        if not bool(mask.any()):
            return no
    return torch.where(mask[:, None], yes, no)
