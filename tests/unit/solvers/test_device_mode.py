"""On devices flags are read every few steps only: a few surplus calls, the same answers. Checked on the CPU."""

from __future__ import annotations

import pytest
import torch

import equipoise as eq
from equipoise.solvers import anderson, base

SOLVERS = [
    eq.Picard(max_steps=60, rtol=1e-8),
    eq.Anderson(max_steps=60, rtol=1e-8, memory=4),
    eq.Broyden(max_steps=60, rtol=1e-8, memory=40),
    eq.Broyden(max_steps=60, rtol=1e-8, memory=5),
]


def solve(solver: eq.Solver) -> tuple[eq.Solution, torch.Tensor]:
    torch.manual_seed(1)
    d, rows = 10, 7
    weight = torch.randn(d, d)
    weight /= torch.linalg.matrix_norm(weight, 2)
    gain, x = torch.linspace(0.05, 0.95, rows)[:, None], torch.randn(rows, d, requires_grad=True)
    poison = torch.zeros(rows, 1)
    poison[2] = 1.0

    def f(z: torch.Tensor, gain: torch.Tensor, poison: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(gain * (z @ weight) + x)
        return torch.where((poison > 0) & (z.norm(dim=1, keepdim=True) > 0.1), torch.nan, out)

    gradient = eq.Shine() if solver.keeps_inverse else eq.Implicit()
    solution = eq.fixed_point(
        f, torch.zeros(rows, d), gain, poison, x, solver=solver, gradient=gradient, params=(), trace=True
    )
    (grad,) = torch.autograd.grad(solution.value[[0, 1, 3, 4, 5, 6]].sum(), x)
    return solution, grad


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}{getattr(s, 'memory', '')}")
def test_same_answers_with_rare_reads(solver: eq.Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    often, grad_often = solve(solver)
    for module in (base, anderson):
        monkeypatch.setattr(module, "can_branch_on", lambda x: False)
    rarely, grad_rarely = solve(solver)
    assert rarely.status.tolist() == often.status.tolist()
    assert rarely.num_steps.tolist() == often.num_steps.tolist()
    assert often.status[2] == eq.Status.NONFINITE
    torch.testing.assert_close(rarely.value, often.value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_rarely, grad_often, rtol=1e-6, atol=1e-9)
    assert often.num_evals <= rarely.num_evals < often.num_evals + base.STEPS_PER_READ
    if often.inverse is not None and rarely.inverse is not None:
        assert rarely.inverse.rank.tolist() == often.inverse.rank.tolist()
