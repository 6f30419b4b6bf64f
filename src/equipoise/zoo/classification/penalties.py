"""Penalties in the loss of an equilibrium classifier."""

from __future__ import annotations

import dataclasses

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
    """What is added to the weight every `growth_every` steps."""
    growth_every: int = 50_000
    """Steps between two additions."""
    stop_epoch: int | None = None
    """Epoch from which on there is no penalty; None: it stays."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"task.penalty.weight={self.weight!r}: must be >= 0")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"task.penalty.probability={self.probability!r}: must lie in [0, 1]")
        if self.num_probes < 1 or self.growth_every < 1:
            raise ValueError(
                f"task.penalty: num_probes={self.num_probes!r} and growth_every={self.growth_every!r} must be >= 1"
            )

    def at(self, step: int, epoch: int, seed: int) -> float:
        """Weight on one step: zero when the step's lot, the same on every device, says so."""
        if self.weight == 0 or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return 0.0
        if derive_seed(seed, step, 1) / 2**63 >= self.probability:
            return 0.0
        return self.weight + self.growth * (step // self.growth_every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipPenalty:
    """Penalty on the distance of the equilibrium from where its solve began: Skip DEQ and Skip Reg DEQ.

    Source: Pal, Edelman and Rackauckas (2022).
    """

    weight: float = 0.0
    """Weight in the loss in the first epoch; 0: no penalty."""
    decay: float = 1.0
    """Factor of the weight from one epoch to the next."""
    per_scale: bool = True
    """Whether the mean is taken for each part of the state, and these are added; else over all numbers alike."""
    detach_target: bool = False
    """Whether only the start is drawn to the equilibrium and not the equilibrium to the start."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"task.skip.weight={self.weight!r}: must be >= 0")
        if not 0 < self.decay <= 1:
            raise ValueError(f"task.skip.decay={self.decay!r}: must lie in (0, 1]; 1 keeps the weight")

    def at(self, epoch: int) -> float:
        """Weight in an epoch, counted from zero."""
        return self.weight * self.decay**epoch
