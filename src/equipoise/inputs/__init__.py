"""Joint inference and input optimization: inputs of an equilibrium as further unknowns."""

from equipoise.inputs.gradients import Envelope, FirstOrder
from equipoise.inputs.optimize import InputOptimizer, InputSolution, optimize_inputs
from equipoise.inputs.schemes import GaussSeidel, Joint, Nested, UpdateScheme

__all__ = [
    "Envelope",
    "FirstOrder",
    "GaussSeidel",
    "InputOptimizer",
    "InputSolution",
    "Joint",
    "Nested",
    "UpdateScheme",
    "optimize_inputs",
]
