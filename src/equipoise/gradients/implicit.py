"""Gradients by the implicit function theorem: solve the adjoint system."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.guards import warn_once
from equipoise.core.linalg import InverseEstimate, can_branch_on, norms, safe_norms
from equipoise.core.solution import Solution
from equipoise.gradients.adjoint import AdjointMap
from equipoise.gradients.base import Gradient
from equipoise.solvers import Anderson, Solver

EXAMINED = 8  # samples of which a warning says whether their equation has a solution
INEXACT = 1e3  # residual relative to g, in units of the tolerance, above which a gradient is reported as inexact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit(Gradient):
    r"""Gradient by the implicit function theorem; exact, at any order, up to the tolerance of its solver.

    $$ w = J^\top w + g, \qquad \frac{dL}{d\theta} = w^\top \frac{\partial f}{\partial \theta} $$

    The right-hand side is scaled to norm one, so that the accuracy does not depend on the scale of the loss: `atol` of
    the solver bounds the relative residual $\|J^\top w + g - w\| / \|g\|$, and `rtol` is relative to
    $\|J^\top w + g\|$. For the first alone: `solver=GMRES(rtol=0, atol=1e-6)`.

    Args:
        solver: of the adjoint equation; its `max_steps` counts products $J^\top w$.
        start: warm start. None: `g`; another gradient: its estimate (with `Shine()` the forward inverse also
            preconditions the adjoint, which is SHINE-refine); a tensor `(B, ...)`: that state.
        observe: called in backward with the adjoint's `Solution`, whose `residual` is relative to the norm of `g`.

    Raises:
        TypeError: a field has the wrong type.

    Source: Bai, Kolter and Koltun (2019), theorem 1; refine: Ramzi et al. (2022), with the transposed inverse.
    """

    solver: Solver = Anderson(max_steps=50, rtol=1e-5, memory=None, growth=math.inf)
    start: Gradient | Tensor | None = None
    observe: Callable[[Solution[Tensor]], None] | None = None

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"Implicit(solver={self.solver!r}): must be a solver such as Anderson()")
        if self.solver.uses_vjp:
            raise TypeError(f"Implicit(solver={type(self.solver).__name__}): needs products with J, not only with J^T")
        if not (self.start is None or isinstance(self.start, (Gradient, Tensor))):
            raise TypeError(f"Implicit(start={self.start!r}): must be None, a gradient such as Shine(), or a tensor")

    @property
    def uses_inverse(self) -> bool:  # type: ignore[override]
        """Whether the warm start uses the forward solver's inverse."""
        return isinstance(self.start, Gradient) and self.start.uses_inverse

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        norm = safe_norms(g).to(g.dtype)[:, None]
        scale = torch.where(norm > 0, norm, 1.0)
        unit = g / scale
        adjoint = adjoint.with_cotangent(unit)
        w, preconditioner = self._start(adjoint, unit, norm, solution)
        answer = self.solver.solve(adjoint, w, preconditioner=preconditioner)
        if can_branch_on(g) or answer.num_vjps >= self.solver.max_steps:  # else the host does not wait for a device
            self._warn(adjoint, answer)
        w = answer.value * scale
        if self.observe is not None:
            self.observe(dataclasses.replace(answer, value=w))
        return w

    def _warn(self, adjoint: AdjointMap, answer: Solution[Tensor]) -> None:
        """Warn of samples whose adjoint did not converge."""
        # A tolerance relative to w may be met by a w that grows without bound.
        failed = ~answer.converged | (answer.residual > INEXACT * (self.solver.rtol + self.solver.atol))
        if adjoint.precision in (torch.bfloat16, torch.float16):  # what its rounding leaves is not reported
            failed &= ~(answer.residual <= adjoint.rounding(answer.value.dtype) * (1 + norms(answer.value)))
        count = int(failed.sum())
        if count == 0 or self.solver.unlimited:
            return
        worst = float(answer.residual[failed].max())

        def text() -> str:
            rows = failed.nonzero()[:EXAMINED, 0]
            try:
                with adjoint.uncounted():
                    part, kept = (adjoint.select(rows), slice(None)) if adjoint.droppable else (adjoint, rows)
                    unsolvable = part.unsolvable()[kept]
            except RuntimeError:  # a layer without second derivatives
                unsolvable = failed.new_zeros(1)
            if bool(unsolvable.any()):
                return (
                    f"the adjoint solve did not converge for {count} of {len(failed)} samples, and for "
                    f"{int(unsolvable.sum())} of {len(rows)} that were examined its equation has no solution: I - J is "
                    "singular at the equilibrium, so it is no function of the parameters alone; eliminate the "
                    "conserved total, such as the sum of the state, by solving for the other parts"
                )
            return (
                f"the adjoint solve did not converge for {count} of {len(failed)} samples (largest relative residual "
                f"{worst:.2g}), so the gradient is inexact; raise max_steps, "
                "Implicit(solver=GMRES(max_steps=200, memory=200)), or make the map contract"
            )

        warn_once("adjoint", text)

    def _start(
        self, adjoint: AdjointMap, g: Tensor, norm: Tensor, solution: Solution[Tensor]
    ) -> tuple[Tensor, InverseEstimate | None]:
        if self.start is None:
            return g, None
        if isinstance(self.start, Tensor):
            w = self.start.detach().reshape(g.shape[0], -1).to(g)
            if w.shape != g.shape:
                raise ValueError(f"Implicit(start=...) has shape {tuple(self.start.shape)}, the state {tuple(g.shape)}")
            return torch.where(norm > 0, w / norm, 0.0), None  # a zero cotangent has a zero adjoint
        return self.start.warm_start(adjoint, g, solution)
