"""Solvers of `z = f(z)`, one algorithm a file."""

from equipoise.solvers.anderson import Anderson
from equipoise.solvers.base import Solver
from equipoise.solvers.broyden import Broyden
from equipoise.solvers.lbfgs import LBFGS
from equipoise.solvers.picard import Picard

__all__ = ["LBFGS", "Anderson", "Broyden", "Picard", "Solver"]
