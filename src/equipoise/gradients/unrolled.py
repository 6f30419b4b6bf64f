"""Backpropagation through applications of the map."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.function_map import FunctionMap
from equipoise.core.solution import Solution
from equipoise.gradients.adjoint import AdjointMap
from equipoise.gradients.base import Gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Backpropagation through a fixed number of applications of the map after the solve.

    With `Picard(max_steps=0)` as solver this is a network of fixed depth, the usual pretraining of equilibrium models;
    the value is then differentiable in the start, too. The applications also take place without gradient, so that
    training and evaluation compute the same function. They count in `num_steps` and `num_evals`; `residual` is that of
    the last point at which the map was applied.

    Args:
        steps: number of applications.

    Raises:
        ValueError: fewer than one.
    """

    steps: int = 8

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, steps=">= 1")

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        raise TypeError("Unrolled backpropagates through the map itself and cannot start an adjoint solve")

    def attach(self, f: FunctionMap, z0: Tensor, solution: Solution[Tensor]) -> Solution[Tensor]:
        z = solution.value if solution.num_evals else z0
        with f.solve_context():
            for _ in range(self.steps):
                before, z = z, f.call(z)
        return dataclasses.replace(
            solution,
            value=z,
            residual=torch.linalg.vector_norm((z - before).detach(), dim=1),
            num_steps=solution.num_steps + self.steps,
            num_evals=solution.num_evals + self.steps,
        )
