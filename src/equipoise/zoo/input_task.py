"""Tasks that optimize inputs of the equilibrium, such as latents, contexts or attacked images."""

import dataclasses

from equipoise.core.checks import check_ranges
from equipoise.gradients import Gradient, Implicit
from equipoise.inputs import InputOptimizer, Nested, UpdateScheme
from equipoise.solvers import Anderson, Solver
from equipoise.train import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputTask(Task):
    """Base of tasks that optimize inputs: solver and gradient of the run are those of state, adjoint and input.

    Raises:
        ValueError: `step_size` is not positive.
    """

    step_size: float | None = None
    """Step of the inputs in a round; None: measured for each sample."""
    scheme: UpdateScheme = Nested(steps=2)
    """Steps of state and adjoint between two steps of the inputs."""
    equilibrium_solver: Solver = Anderson(max_steps=40, rtol=1e-4)
    """Finds the equilibrium alone, at given inputs."""

    def __post_init__(self) -> None:
        check_ranges(self, "task.", step_size="> 0, or None to measure it")

    def input_optimizer(self, solver: Solver, gradient: Gradient = Implicit()) -> InputOptimizer:
        """Return the method with the solver and gradient of a run, without verification."""
        return InputOptimizer(
            solver=solver, scheme=self.scheme, step_size=self.step_size, gradient=gradient, verify_solver=None
        )
