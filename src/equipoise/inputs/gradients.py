"""Gradients through an optimized input that cost less than the exact one."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from equipoise.core.solution import Solution
from equipoise.gradients import Gradient
from equipoise.gradients.adjoint import AdjointMap
from equipoise.solvers import GMRES, Solver

ALIKE = 0.99  # cosine of two slopes that are taken for those of the same loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateOnly(Gradient):
    """A gradient whose adjoint vector has a part for the state alone: it meets a map that holds adjoint and input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Envelope(StateOnly):
    r"""For an outer loss that is the inner cost, up to a factor: its adjoint is known already.

    $$ \frac{dL}{d\theta} = s \left( \frac{\partial c}{\partial \theta} +
       \mu^{*\top} \frac{\partial f}{\partial \theta} \right), \qquad L = s\,c $$

    One product compares the cotangent of the state with the slope of the inner cost and finds $s$; where it is no
    multiple, a `RuntimeWarning` says so, for the gradient is then wrong. Active constraints change nothing (Danskin).
    A loss that reads the input must do so as the inner cost does; that part is taken to cancel, and not looked at.

    Source: Gurumurthy et al. (2021) for autoencoding and adversarial training; the envelope theorem.
    """

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        n = _state_size(adjoint)
        mu = torch.zeros_like(g)
        mu[:, :n] = adjoint.z.detach()[:, n : 2 * n]
        # The adjoint's image is J^T mu + slope, the pull of mu its first part.
        slope = adjoint.fz.detach()[:, n : 2 * n] - (adjoint.call(mu) - g)[:, :n]
        wanted = g[:, :n]
        size, norm = slope.square().sum(1), torch.linalg.vector_norm(wanted, dim=1)
        scale = (wanted * slope).sum(1) / torch.where(size > 0, size, 1.0)
        cosine = scale.abs() * size.sqrt() / torch.where(norm > 0, norm, 1.0)
        off = (cosine < ALIKE) & (norm > 0)
        if bool(off.any()):
            warnings.warn(
                f"Envelope(): the outer loss is not the inner cost for {int(off.sum())} of {len(off)} samples (cosine "
                f"{float(cosine[off].min()):.2f} of their slopes at the state), so its gradient is wrong; take "
                "Implicit()",
                RuntimeWarning,
                stacklevel=2,
            )
        return mu * scale[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrder(StateOnly):
    r"""The gradient with the input held constant: exact in the state, blind to how the optimum moves.

    $$ u = J_z^\top u + \frac{\partial L}{\partial z}, \qquad \frac{dL}{d\theta} \approx
       \frac{\partial L}{\partial \theta} + u^\top \frac{\partial f}{\partial \theta} $$

    Args:
        solver: of the adjoint equation; its `atol` is one of the residual relative to the right-hand side.

    Source: the code released with Gurumurthy et al. (2021), which has nothing else.
    """

    solver: Solver = GMRES(max_steps=60, rtol=0.0, atol=1e-6)

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        n = _state_size(adjoint)
        held = torch.zeros_like(g)
        held[:, :n] = g[:, :n]
        norm = torch.linalg.vector_norm(held, dim=1, keepdim=True)
        scale = torch.where(norm > 0, norm, 1.0)
        return self.solver.solve(_Held(adjoint.with_cotangent(held / scale), n), held / scale).value * scale


class _Held(AdjointMap):
    """The adjoint map with all but the state's block left out."""

    def __init__(self, adjoint: AdjointMap, size: int) -> None:
        super().__init__(adjoint.forward_map, adjoint.z, adjoint.fz, adjoint.g)
        self.size = size

    def select(self, index: Tensor) -> _Held:
        return _Held(super().select(index), self.size)

    def call(self, w: Tensor) -> Tensor:
        out = super().call(w)
        return torch.cat([out[:, : self.size], torch.zeros_like(out[:, self.size :])], dim=1)


def _state_size(adjoint: AdjointMap) -> int:
    f = adjoint.forward_map
    if f.blocks is None or len(f.blocks) != 3:
        raise ValueError("Envelope and FirstOrder are gradients of optimize_inputs; elsewhere take Implicit")
    return f.blocks[0]
