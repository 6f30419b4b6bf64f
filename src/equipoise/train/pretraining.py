"""Fixed-depth pretraining."""

import dataclasses

from equipoise.core.checks import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """First steps of training, with the map applied a fixed number of times and plain backpropagation."""

    steps: int = 0
    """Optimizer steps of this kind; 0: none."""
    depth: int = 8
    """Applications of the map."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.pretraining.", steps=">= 0", depth=">= 1")
