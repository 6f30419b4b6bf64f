"""Gradients from a truncated series: Jacobian-free, Neumann and phantom."""

import dataclasses

from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.core.solution import Solution
from equipoise.gradients.adjoint import AdjointMap
from equipoise.gradients.base import Gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class JacobianFree(Gradient):
    """Jacobian-free gradient (JFB), that of one application of the map: `w = g`.

    Source: Fung et al. (2022), Jacobian-free backpropagation.
    """

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        return g


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neumann(Gradient):
    r"""Truncated Neumann series of the inverse; the series converges if the spectral radius of $J$ is below one.

    $$ w = \sum_{i=0}^{k} (J^\top)^i g $$

    Args:
        steps: $k$, the number of products with $J^\top$; 0 is Jacobian-free.

    Raises:
        ValueError: negative steps.
    """

    steps: int = 5

    def __post_init__(self) -> None:
        check_ranges(self, steps=">= 0")

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        w = g
        for _ in range(self.steps):
            w = adjoint.call(w)
        return w


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phantom(Gradient):
    r"""Phantom gradient: that of `steps` damped applications of the map, started at the equilibrium.

    $$ w = \lambda \sum_{i=0}^{k-1} \bigl(\lambda J^\top + (1 - \lambda) I\bigr)^i g $$

    Args:
        steps: $k$; costs $k - 1$ products with $J^\top$.
        damping: $\lambda$.

    Raises:
        ValueError: a field is out of range.

    Source: Geng et al. (2021), equation (9), in Neumann form.
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, steps=">= 1", damping="> 0 and <= 1")

    def cotangent(self, adjoint: AdjointMap, g: Tensor, solution: Solution[Tensor]) -> Tensor:
        w = g * self.damping
        for _ in range(self.steps - 1):
            w = adjoint.call(w).mul_(self.damping).add_(w, alpha=1 - self.damping)
        return w
