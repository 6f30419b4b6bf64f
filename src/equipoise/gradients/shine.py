"""SHINE: the forward quasi-Newton inverse, shared with the backward pass."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.linalg import InverseEstimate, can_branch_on
from equipoise.core.solution import Solution
from equipoise.gradients.adjoint import AdjointMap
from equipoise.gradients.base import Gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shine(Gradient):
    r"""SHINE (shared inverse estimate): gradient with the inverse estimate of the forward solver, without products.

    $$ w = M^\top g, \qquad M \approx (I - J)^{-1} $$

    If $\|w\| > c\,\|g\|$ or `w` is not finite, the sample falls back to $w = g$ (Jacobian-free).

    Args:
        fallback_ratio: $c$; infinity never falls back, 0 always does. After outer-aware updates (`AdjointBroyden`,
            `LBFGS` with `outer_loss`) 1.8 is better: a more exact `w` may be longer.
        observe: called in backward with the `(B,)` mask of samples that fell back.

    Raises:
        ValueError: a negative ratio; or, when used, a forward solver that keeps no inverse.

    Source: Ramzi et al. (2022), section 2.1; the fallback per sample, section 3.
    """

    fallback_ratio: float = 1.3
    observe: Callable[[Tensor], None] | None = None

    uses_inverse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, fallback_ratio=">= 0")

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        return self._estimate(g, solution)[0]

    def warm_start(
        self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]
    ) -> tuple[Tensor, InverseEstimate | None]:
        w, fallen = self._estimate(g, solution)
        assert solution.inverse is not None
        return w, solution.inverse.mT.reset(fallen)

    def _estimate(self, g: Tensor, solution: Solution[Tensor]) -> tuple[Tensor, Tensor]:
        if solution.inverse is None:
            raise ValueError(
                "Shine needs the forward inverse, but the solve kept none; use Broyden or LBFGS with max_steps >= 1"
            )
        w = solution.inverse.rmv(g)
        norms = torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(w, dim=1)
        fallen = ~(norms[1] <= self.fallback_ratio * norms[0]) | ~norms[1].isfinite()
        if self.observe is not None:
            self.observe(fallen)
        if not can_branch_on(g) or bool(fallen.any()):
            w = torch.where(fallen[:, None], g, w)
        return w, fallen
