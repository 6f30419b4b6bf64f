"""Estimators of the gradient of an equilibrium."""

from equipoise.gradients.base import Gradient
from equipoise.gradients.implicit import Implicit
from equipoise.gradients.reversible import Reversible
from equipoise.gradients.shine import Shine
from equipoise.gradients.truncated import JacobianFree, Neumann, Phantom
from equipoise.gradients.unrolled import Unrolled

__all__ = ["Gradient", "Implicit", "JacobianFree", "Neumann", "Phantom", "Reversible", "Shine", "Unrolled"]
