"""Fixed-depth pretraining."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The first steps of training with the map applied a fixed number of times, by plain backpropagation."""

    steps: int = 0
    """Optimizer steps of this kind; 0: none."""
    depth: int = 8
    """Applications of the map."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.depth < 1:
            raise ValueError(f"task.pretraining: steps={self.steps!r} must be >= 0 and depth={self.depth!r} >= 1")
