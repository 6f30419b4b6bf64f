"""State, map and solution: what solvers and gradients share."""
