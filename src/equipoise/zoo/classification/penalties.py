"""Penalties in the loss of an equilibrium classifier."""

import dataclasses

from equipoise.core.checks import check_ranges
from equipoise.data import derive_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class JacobianPenalty:
    """Penalty on the Jacobian at the equilibrium, on a random share of the steps.

    Source: Bai, Koltun and Kolter (2021), section 4.
    """

    weight: float = 0.0
    """Weight in the loss; 0: no penalty."""
    probability: float = 1.0
    """Share of the steps on which it is evaluated."""
    num_probes: int = 1
    """Random vectors per evaluation."""
    growth: float = 0.0
    """Increase of the weight every `growth_every` steps."""
    growth_every: int = 50_000
    """Steps between two additions."""
    stop_epoch: int | None = None
    """Epoch from which on there is no penalty; None: it stays."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "task.penalty.", weight=">= 0", probability=">= 0 and <= 1", num_probes=">= 1", growth_every=">= 1"
        )

    def at(self, step: int, epoch: int, seed: int) -> float:
        """Weight on one step; 0 on steps that the random draw skips, the same on every device."""
        over = self.stop_epoch is not None and epoch >= self.stop_epoch
        if self.weight == 0 or over or derive_seed(seed, step, 1) / 2**63 >= self.probability:
            return 0.0
        return self.weight + self.growth * (step // self.growth_every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipPenalty:
    """Penalty on the distance of the equilibrium from the start of its solve: Skip DEQ and Skip Reg DEQ.

    Source: Pal, Edelman and Rackauckas (2022).
    """

    weight: float = 0.0
    """Weight in the loss in the first epoch; 0: no penalty."""
    decay: float = 1.0
    """Factor of the weight from one epoch to the next."""
    per_scale: bool = True
    """Whether the means over each part of the state are added; else one mean over all numbers."""
    detach_target: bool = False
    """Whether the penalty moves the start alone, not the equilibrium."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.skip.", weight=">= 0", decay="> 0 and <= 1; 1 keeps the weight")

    def at(self, epoch: int) -> float:
        """Weight in an epoch, counted from zero."""
        return self.weight * self.decay**epoch
