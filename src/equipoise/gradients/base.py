"""The interface of gradient estimators."""

import abc
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.function_map import FunctionMap
from equipoise.core.linalg import InverseEstimate
from equipoise.core.solution import Solution
from equipoise.gradients import autograd
from equipoise.gradients.adjoint import AdjointMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(abc.ABC):
    r"""Estimator of the adjoint vector $w \approx (I - J)^{-\top} g$ of a cotangent `g` of the equilibrium.

    The gradients with respect to inputs and parameters are then $w^\top \partial f / \partial(\cdot)$, one
    vector-Jacobian product.
    """

    exact: ClassVar[bool] = False  # may be differentiated again
    uses_inverse: ClassVar[bool] = False  # the solver must keep its inverse estimate
    replaces_solver: ClassVar[bool] = False  # it iterates by itself, so the solver must do nothing

    @abc.abstractmethod
    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        r"""Return `w`, `(B, D)`.

        Args:
            adjoint: the map $w \mapsto J^\top w + g$.
            g: `(B, D)` cotangent.
            solution: of the forward solve.
        """

    def warm_start(
        self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]
    ) -> tuple[Tensor, InverseEstimate | None]:
        """Return a warm start and a preconditioner for the adjoint solve of another estimator."""
        return self.cotangent(adjoint, g, solution), None

    def attach(self, f: FunctionMap, z0: Tensor, solution: Solution[Tensor]) -> Solution[Tensor]:
        """Return the solution with a differentiable value.

        Args:
            f: the map with the caller's input tensors.
            z0: flat start of the solve.
            solution: of the forward solve, without gradient.
        """
        return autograd.attach(f, solution, self) if torch.is_grad_enabled() else solution
