"""Gradients through an optimized input that are cheaper than the exact one."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from equipoise.core.solution import Solution
from equipoise.gradients import Gradient
from equipoise.gradients.adjoint import AdjointMap
from equipoise.solvers import GMRES, Solver

MIN_COSINE = 0.99  # cosine of the gradients of outer loss and cost, below which `Envelope` warns


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateOnly(Gradient):
    """Base of gradients whose adjoint solution is zero outside of the state, so the map may hold the input fixed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Envelope(StateOnly):
    r"""Gradient of an outer loss that is a multiple of the cost, by the adjoint that the solve has found.

    $$ \frac{dL}{d\theta} = s \left( \frac{\partial c}{\partial \theta} +
       \mu^{*\top} \frac{\partial f}{\partial \theta} \right), \qquad L = s\,c $$

    One product compares the cotangent of the state with the gradient of the cost and gives $s$. If the two are not
    parallel, the gradient is wrong, and a `RuntimeWarning` reports it. Active constraints change nothing (Danskin).
    A loss that reads the input must do so as the cost does: that part is assumed to cancel, without a test.

    Source: Gurumurthy et al. (2021) for autoencoding and adversarial training; the envelope theorem.
    """

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        n = _state_size(adjoint)
        mu = torch.zeros_like(g)
        mu[:, :n] = adjoint.z.detach()[:, n : 2 * n]
        # The map returns J^T mu + grad c for the adjoint, and its vector-Jacobian product with mu begins with J^T mu.
        gradient = adjoint.fz.detach()[:, n : 2 * n] - (adjoint.call(mu) - g)[:, :n]
        wanted = g[:, :n]
        size, norm = gradient.square().sum(1), torch.linalg.vector_norm(wanted, dim=1)
        scale = (wanted * gradient).sum(1) / torch.where(size > 0, size, 1.0)
        cosine = scale.abs() * size.sqrt() / torch.where(norm > 0, norm, 1.0)
        off = (cosine < MIN_COSINE) & (norm > 0)
        if bool(off.any()):
            warnings.warn(
                f"Envelope(): the outer loss is not the inner cost for {int(off.sum())} of {len(off)} samples (cosine "
                f"{float(cosine[off].min()):.2f} of their gradients at the state), so its gradient is wrong; take "
                "Implicit()",
                RuntimeWarning,
                stacklevel=2,
            )
        return mu * scale[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrder(StateOnly):
    r"""Gradient at a constant input: exact in the state, without the response of the optimal input.

    $$ u = J_z^\top u + \frac{\partial L}{\partial z}, \qquad \frac{dL}{d\theta} \approx
       \frac{\partial L}{\partial \theta} + u^\top \frac{\partial f}{\partial \theta} $$

    Args:
        solver: solver of the adjoint equation; its `atol` is relative to the right-hand side.

    Source: the code released with Gurumurthy et al. (2021), its only gradient.
    """

    solver: Solver = GMRES(max_steps=60, rtol=0.0, atol=1e-6)

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        n = _state_size(adjoint)
        state = torch.zeros_like(g)
        state[:, :n] = g[:, :n]
        norm = torch.linalg.vector_norm(state, dim=1, keepdim=True)
        scale = torch.where(norm > 0, norm, 1.0)
        state_adjoint = _StateAdjoint(adjoint.with_cotangent(state / scale), n)
        return self.solver.solve(state_adjoint, state / scale).value * scale


class _StateAdjoint(AdjointMap):
    """The adjoint map of the state block alone."""

    def __init__(self, adjoint: AdjointMap, size: int) -> None:
        super().__init__(adjoint.forward_map, adjoint.z, adjoint.fz, adjoint.g)
        self.size = size

    def select(self, index: Tensor) -> _StateAdjoint:
        return _StateAdjoint(super().select(index), self.size)

    def call(self, w: Tensor) -> Tensor:
        out = super().call(w)
        return torch.cat([out[:, : self.size], torch.zeros_like(out[:, self.size :])], dim=1)


def _state_size(adjoint: AdjointMap) -> int:
    f = adjoint.forward_map
    if f.blocks is None or len(f.blocks) != 3:
        raise ValueError("Envelope and FirstOrder are gradients of optimize_inputs; elsewhere take Implicit")
    return f.blocks[0]
