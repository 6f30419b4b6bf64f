"""Flow to a steady state: z -> -3z + b, where Picard iteration diverges, by an integrator with steps per sample."""

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq

ROWS, SIZE = 8, 5


class Cell(nn.Module):
    """z -> -3z + W x + bend tanh(z), evaluations counted."""

    def __init__(self, bend: float = 0.0) -> None:
        super().__init__()
        self.inject = nn.Linear(SIZE, SIZE)
        self.bend = nn.Parameter(torch.tensor(bend))
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return -3 * z + self.inject(x) + self.bend * torch.tanh(z)


def batch() -> Tensor:
    """Samples of very different size: with the bend, very different flows."""
    return torch.randn(ROWS, SIZE) * torch.logspace(-2, 2, ROWS)[:, None]


def test_expanding_map() -> None:
    cell, x = Cell(), batch()
    with torch.no_grad():
        picard = eq.nn.DEQ(cell, solver=eq.Picard(max_steps=100)).solve(x)
        flow = eq.nn.DEQ(cell, solver=eq.SteadyState(max_steps=100, rtol=1e-8)).solve(x).raise_for_status()
    assert picard.status.tolist() == [eq.Status.DIVERGED] * ROWS
    torch.testing.assert_close(flow.value, cell.inject(x).detach() / 4, rtol=1e-7, atol=1e-9)


def test_rejected_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost no evaluation."""
    cell, x = Cell(bend=2.0), batch()[5:6]
    seen = []
    propose = eq.SteadyState.propose

    def watched(self, memory, point):
        z = propose(self, memory, point)
        seen.append((int(memory.accepted), int(memory.rejected)))
        return z

    monkeypatch.setattr(eq.SteadyState, "propose", watched)
    with torch.no_grad():
        solution = eq.nn.DEQ(cell, solver=eq.SteadyState(max_steps=200, rtol=1e-8)).solve(x).raise_for_status()
    accepted, rejected = seen[-1]
    assert rejected >= 5
    # Every point became the base of the next step, the last one was the answer: none was thrown away.
    assert cell.calls == solution.num_evals == int(solution.num_steps) == accepted + 1


@pytest.mark.parametrize("adjoint", [eq.Anderson(max_steps=60, rtol=1e-12), eq.SteadyState(max_steps=400, rtol=1e-11)])
def test_implicit_gradients(adjoint: eq.Solver) -> None:
    cell, x = Cell(bend=1.5), (0.3 * torch.randn(2, SIZE)).requires_grad_()
    layer = eq.nn.DEQ(cell, solver=eq.SteadyState(max_steps=400, rtol=1e-12), gradient=eq.Implicit(solver=adjoint))
    # The equilibrium's own derivative: (4 - bend (1 - tanh^2)) dz = d(Wx) + tanh(z) d(bend).
    z = layer.solve(x).raise_for_status().value
    g = torch.randn_like(z)
    found = torch.autograd.grad(z, [cell.inject.weight, cell.inject.bias, cell.bend, x], g)
    w = (g / (4 - cell.bend * (1 - torch.tanh(z) ** 2))).detach()
    expected = (w.T @ x.detach(), w.sum(0), (w * torch.tanh(z)).sum().detach(), w @ cell.inject.weight.detach())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
