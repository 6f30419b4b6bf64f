"""Solvers of `z = f(z)`, one algorithm a file."""

from equipoise.solvers.adjoint_broyden import AdjointBroyden
from equipoise.solvers.anderson import Anderson
from equipoise.solvers.base import Solver
from equipoise.solvers.broyden import Broyden
from equipoise.solvers.cg import CG
from equipoise.solvers.gmres import GMRES
from equipoise.solvers.lbfgs import LBFGS
from equipoise.solvers.picard import Picard
from equipoise.solvers.steady_state import SteadyState
from equipoise.solvers.steppers import BS3, VCAB3, Euler, Stepper, Tsit5

__all__ = [
    "BS3",
    "CG",
    "GMRES",
    "LBFGS",
    "VCAB3",
    "AdjointBroyden",
    "Anderson",
    "Broyden",
    "Euler",
    "Picard",
    "Solver",
    "SteadyState",
    "Stepper",
    "Tsit5",
]
