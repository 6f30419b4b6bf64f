"""Interface of model configurations."""

import abc
import dataclasses
from typing import Any

from equipoise.gradients import Gradient, Implicit
from equipoise.solvers import Anderson, Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Shape of an equilibrium model; it builds the model.

    A model is a module with this configuration as `config` and its equilibrium, a `DEQ`, as `deq`.
    """

    @abc.abstractmethod
    def build(self, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> Any:
        """Build the model, with weights drawn at random.

        Args:
            solver: finds the equilibrium.
            gradient: differentiates it.
        """

    @property
    @abc.abstractmethod
    def state_size(self) -> int:
        """Number of elements `D` of one sample's state."""

    @property
    def guesses(self) -> bool:
        """Whether a solve begins at a guess of the equilibrium."""
        return False

    def lipschitz_limit(self, *, training: bool) -> float | None:
        """Largest Lipschitz constant that the layers of the map allow, whatever the weights; None: any.

        Args:
            training: count dropout.
        """
        return None
