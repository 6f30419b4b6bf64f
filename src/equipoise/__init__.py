"""Equilibrium models in PyTorch: solve, differentiate, train and certify fixed points."""

from equipoise import bilevel, constraints, contraction, inputs, nn
from equipoise.bilevel import minimize_outer
from equipoise.contraction.certificate import Certificate, CertificateError, certify, contraction_solver, jacobian_norm
from equipoise.core.function_map import DescentMap, FunctionMap
from equipoise.core.linalg import InverseEstimate
from equipoise.core.map import Map, Point
from equipoise.core.solution import ConvergenceError, ConvergenceWarning, Solution, Status
from equipoise.fixed_point import fixed_point
from equipoise.gradients import Gradient, Implicit, JacobianFree, Neumann, Phantom, Reversible, Shine, Unrolled
from equipoise.inputs import optimize_inputs
from equipoise.solvers import CG, GMRES, LBFGS, AdjointBroyden, Anderson, Broyden, Picard, Solver, SteadyState

__version__ = "0.2.0.dev0"

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "AdjointBroyden",
    "Anderson",
    "Broyden",
    "Certificate",
    "CertificateError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DescentMap",
    "FunctionMap",
    "Gradient",
    "Implicit",
    "InverseEstimate",
    "JacobianFree",
    "Map",
    "Neumann",
    "Phantom",
    "Picard",
    "Point",
    "Reversible",
    "Shine",
    "Solution",
    "Solver",
    "Status",
    "SteadyState",
    "Unrolled",
    "bilevel",
    "certify",
    "constraints",
    "contraction",
    "contraction_solver",
    "fixed_point",
    "inputs",
    "jacobian_norm",
    "minimize_outer",
    "nn",
    "optimize_inputs",
]
