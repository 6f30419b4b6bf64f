"""Joint inference and input optimization: the inputs of an equilibrium as unknowns beside it."""

from equipoise.inputs.gradients import Envelope, FirstOrder
from equipoise.inputs.optimize import InputSolution, optimize_inputs
from equipoise.inputs.schedules import GaussSeidel, Joint, Nested, Schedule

__all__ = ["Envelope", "FirstOrder", "GaussSeidel", "InputSolution", "Joint", "Nested", "Schedule", "optimize_inputs"]
