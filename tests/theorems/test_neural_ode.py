"""The Neural ODE of the benchmarks: its flow, its gradients, its counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq

odeint = pytest.importorskip("torchdiffeq").odeint
from benchmarks.continuous.neural_ode import METHODS, NeuralODE  # noqa: E402

TIGHT = {"rtol": 1e-6, "atol": 1e-6}
EVERY = [pytest.param(s, id=n, marks=[] if "dopri5" in n else pytest.mark.slow) for n, s in METHODS.items()]


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

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.matrix.mT + x


def zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.zeros_like(x[:, :2])


@pytest.mark.parametrize("setting", EVERY)
def test_follows_the_map_itself_and_not_map_minus_state(setting: dict[str, object]) -> None:
    """Of a linear flow z(1) is a power series; the output is one more application of the map."""
    matrix, x = torch.tensor([[0.3, -1.2], [0.9, -0.4]]), torch.randn(4, 2)
    # exp of the augmented matrix [[A, x], [0, 0]] has the integral of exp(As) x in its last column.
    ends = []
    for row in x:
        whole = torch.zeros(3, 3)
        whole[:2, :2], whole[:2, 2] = matrix, row
        ends.append(torch.matrix_exp(whole)[:2, 2])
    exact = torch.stack(ends) @ matrix.mT + x
    out = NeuralODE(Linear(matrix), **TIGHT, **setting)(x)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", EVERY)
def test_agrees_with_tight_dopri5(setting: dict[str, object]) -> None:
    cell, x = Cell(), torch.randn(5, 3)

    def field(t: Tensor, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return cell(z, x)

    times = torch.tensor([0.0, 1.0])
    end = tuple(states[-1] for states in odeint(field, zeros(x), times, method="dopri5", rtol=1e-8, atol=1e-8))
    exact = cell(end, x)
    for tolerance, error in (({}, 2e-2), (TIGHT, 1e-5)):
        out = NeuralODE(cell, init=zeros, **tolerance, **setting)(x)
        for part, reference in zip(out, exact, strict=True):
            torch.testing.assert_close(part, reference, rtol=error, atol=error)


@pytest.mark.parametrize("setting", EVERY)
def test_gradients_agree_with_finite_differences(setting: dict[str, object]) -> None:
    cell, x = Cell(), torch.randn(2, 3, requires_grad=True)
    layer = NeuralODE(cell, init=zeros, **TIGHT, **setting)

    def loss() -> Tensor:
        a, b = layer(x)
        return (a * torch.tensor([1.0, -2.0, 0.5])).sum() + b.square().sum()

    tensors = (x, *cell.parameters())
    step = 1e-3
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
    cell, x = Cell(), torch.randn(3, 3)
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    layer = NeuralODE(cell, init=zeros, method="bosh3", adjoint=adjoint, first_step=0.5)
    solution = layer.solve(x)
    forward = len(calls)
    # Three evaluations a step, and the first one; then the final application.
    assert solution.num_evals == forward == int(solution.num_steps[0]) + 1
    assert (solution.num_steps[0] - 1) % 3 == 0
    assert solution.converged.all()
    sum(part.sum() for part in solution.value).backward()
    backward = solution.map.counts.vjps
    if adjoint:
        assert backward == len(calls) - forward > 0
    else:
        assert backward == int(solution.num_steps[0])
        assert len(calls) == forward
    assert all(p.grad is not None for p in cell.parameters())


def test_a_given_first_step_saves_evaluations() -> None:
    cell, x = Cell(), torch.randn(3, 3)
    slow, fast = (NeuralODE(cell, init=zeros, first_step=step).solve(x).num_evals for step in (None, 1.0))
    assert fast < slow / 2


def test_fixed_depth_steps_are_those_of_the_layer_that_it_replaces() -> None:
    cell, x = Cell(), torch.randn(3, 3)
    layer, deq = NeuralODE(cell, init=zeros), eq.nn.DEQ(cell, init=zeros)
    fixed = {"solver": eq.Picard(max_steps=0), "gradient": eq.Unrolled(steps=4)}
    with layer.using(**fixed), deq.using(**fixed):
        for part, reference in zip(layer(x), deq(x), strict=True):
            assert torch.equal(part, reference)
    assert not torch.equal(layer(x)[0], deq(x)[0])


def test_has_no_trace() -> None:
    with pytest.raises(ValueError, match="no residuals"):
        NeuralODE(Cell(), init=zeros).solve(torch.zeros(1, 3), trace=True)
