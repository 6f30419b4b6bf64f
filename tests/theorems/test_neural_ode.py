"""The Neural ODE of the benchmarks: its flow, its gradients, its counts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq

odeint = pytest.importorskip("torchdiffeq").odeint
from benchmarks.continuous.neural_ode import METHODS, NeuralODE  # noqa: E402

TIGHT = {"rtol": 1e-6, "atol": 1e-6}
every = pytest.mark.parametrize("setting", METHODS.values(), ids=METHODS)


class Cell(nn.Module):
    """Two levels, one weight normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
        self.outer = nn.Linear(2, 2)

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z
        return torch.tanh(self.inner(a) + x), torch.sin(self.outer(b) + a[:, :2])


class Linear(nn.Module):
    """`f(z, x) = A z + x`."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.3, -1.2], [0.9, -0.4]]))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.matrix.mT + x


def layer(cell: nn.Module | None = None, **options: Any) -> NeuralODE:
    return NeuralODE(Cell() if cell is None else cell, init=zeros, **options)


def zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.zeros_like(x[:, :2])


@every
def test_linear_flow(setting: dict[str, object]) -> None:
    """It follows the map itself and not map minus state, so z(1) is a power series; one more application is returned.

    exp of the augmented matrix [[A, x], [0, 0]] has the integral of exp(As) x in its last column.
    """
    cell, x, whole = Linear(), torch.randn(4, 2), torch.zeros(4, 3, 3)
    whole[:, :2, :2], whole[:, :2, 2] = cell.matrix.detach(), x
    exact = cell(torch.matrix_exp(whole)[:, :2, 2], x)
    torch.testing.assert_close(NeuralODE(cell, **TIGHT, **setting)(x), exact, rtol=1e-5, atol=1e-5)


@every
def test_tight_dopri5(setting: dict[str, object]) -> None:
    cell, x = Cell(), torch.randn(5, 3)
    times = torch.tensor([0.0, 1.0])
    states = odeint(lambda t, z: cell(z, x), zeros(x), times, method="dopri5", rtol=1e-8, atol=1e-8)
    exact = cell(tuple(state[-1] for state in states), x)
    for tolerance, error in (({}, 2e-2), (TIGHT, 1e-5)):
        torch.testing.assert_close(layer(cell, **tolerance, **setting)(x), exact, rtol=error, atol=error)


@every
def test_finite_differences(setting: dict[str, object]) -> None:
    ode, x = layer(**TIGHT, **setting), torch.randn(2, 3, requires_grad=True)

    def loss() -> Tensor:
        a, b = ode(x)
        return (a * torch.tensor([1.0, -2.0, 0.5])).sum() + b.square().sum()

    tensors, step = (x, *ode.parameters()), 1e-3
    for tensor, gradient in zip(tensors, torch.autograd.grad(loss(), tensors), strict=True):
        direction, ends = torch.randn_like(tensor), []
        with torch.no_grad():
            for sign in (1, -2, 1):
                tensor += sign * step * direction
                ends.append(loss())
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adjoint", [False, True], ids=["backpropagation", "adjoint"])
def test_counts(adjoint: bool) -> None:
    cell, calls = Cell(), []
    cell.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    solution = layer(cell, method="bosh3", adjoint=adjoint, first_step=0.5).solve(torch.randn(3, 3))
    forward, steps = len(calls), int(solution.num_steps[0])
    # Three evaluations a step, and the first one; then the final application.
    assert solution.num_evals == forward == steps + 1
    assert (steps - 1) % 3 == 0
    assert solution.converged.all()
    sum(part.sum() for part in solution.value).backward()
    backward = solution.map.counts.vjps
    assert backward == (len(calls) - forward if adjoint else steps) > 0
    assert adjoint or len(calls) == forward
    assert all(p.grad is not None for p in cell.parameters())


def test_first_step() -> None:
    """A given one saves evaluations."""
    cell, x = Cell(), torch.randn(3, 3)
    slow, fast = (layer(cell, first_step=step).solve(x).num_evals for step in (None, 1.0))
    assert fast < slow / 2


def test_fixed_depth() -> None:
    """Its steps are those of the layer that it replaces."""
    x, ode = torch.randn(3, 3), layer()
    deq, fixed = eq.nn.DEQ(ode.cell, init=zeros), {"solver": eq.Picard(max_steps=0), "gradient": eq.Unrolled(steps=4)}
    with ode.using(**fixed), deq.using(**fixed):
        assert all(map(torch.equal, ode(x), deq(x)))
    assert not torch.equal(ode(x)[0], deq(x)[0])


def test_no_trace() -> None:
    with pytest.raises(ValueError, match="no residuals"):
        layer().solve(torch.zeros(1, 3), trace=True)
