"""The reversible iteration: its gradient equals that of the same iteration unrolled by autograd."""

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import equipoise as eq
from equipoise import train, zoo

ALONE = eq.Picard(max_steps=0)


class Cell(nn.Module):
    def __init__(self, d: int = 12, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(d, d, bias=False), nn.Linear(d, d)
        nn.init.orthogonal_(self.w.weight, 0.9)
        self.to(dtype)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.w(z) + self.u(x))


def unrolled(cell: nn.Module, start: Tensor, x: Tensor, steps: int, beta: float) -> Tensor:
    y = z = start.double()
    for _ in range(steps):
        y = (1 - beta) * y + beta * cell(z.to(x.dtype), x).double()
        z = (1 - beta) * z + beta * cell(y.to(x.dtype), x).double()
    return z.to(x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 8, 24])
def test_unrolled(steps: int, beta: float, dtype: torch.dtype, tolerance: float) -> None:
    cell = Cell(64, dtype)
    x, start = (torch.randn(16, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    solution = eq.fixed_point(cell, start, x, solver=ALONE, gradient=eq.Reversible(steps=steps, relaxation=beta))
    expected, weights = unrolled(cell, start, x, steps, beta), torch.randn(16, 64, dtype=dtype)
    leaves = [x, *cell.parameters()]
    found = torch.autograd.grad((solution.value * weights).sum(), [*leaves, start])
    right = torch.autograd.grad((expected * weights).sum(), [*leaves, start])
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=tolerance)
    for a, b in zip(found, right, strict=True):  # the gradient of the start, the last, fades
        assert float((a - b).norm()) <= tolerance * float(b.norm() if b is not right[-1] else right[0].norm())
    assert (solution.num_evals, solution.num_steps.tolist()) == (2 * steps, [steps] * 16)
    assert bool((solution.status == eq.Status.MAX_STEPS).all())


def test_finite_differences() -> None:
    cell = Cell(4)
    layer = eq.nn.DEQ(cell, solver=ALONE, gradient=eq.Reversible(steps=5, relaxation=0.7))
    x, start = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    torch.autograd.gradcheck(lambda x, z0, *_: layer(x, z0=z0), (x, start, *cell.parameters()))
    weight = cell.w.weight.detach().clone().requires_grad_()
    closed = {"solver": ALONE, "gradient": eq.Reversible(steps=3), "params": [weight]}
    f = lambda z, x: (torch.tanh(z[0] @ weight + x), 0.5 * z[0] + z[1].cos())  # noqa: E731
    torch.autograd.gradcheck(lambda x, w: torch.cat(eq.fixed_point(f, (start, start), x, **closed).value), (x, weight))


def test_memory() -> None:
    """What autograd keeps does not grow with the steps, but for a pair every ten."""
    cell, x = Cell(), torch.randn(4, 12)

    def kept(gradient: eq.Gradient) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            eq.fixed_point(cell, torch.zeros(4, 12), x, solver=ALONE, gradient=gradient)
        return sum(sizes)

    assert kept(eq.Reversible(steps=2)) == kept(eq.Reversible(steps=9))
    assert kept(eq.Reversible(steps=90)) - kept(eq.Reversible(steps=9)) == 9 * 2 * 48
    assert kept(eq.Unrolled(steps=90)) > 4 * kept(eq.Reversible(steps=45))


def test_same_function_without_gradients() -> None:
    cell, x = Cell(), torch.randn(4, 12)
    layer = eq.nn.DEQ(cell, solver=ALONE, gradient=eq.Reversible(steps=40))
    with torch.no_grad():
        plain = layer.solve(x)
    assert torch.equal(plain.value, layer(x))
    residual = (cell(plain.value, x) - plain.value).norm(dim=1)
    torch.testing.assert_close(plain.residual, residual, rtol=0.5, atol=1e-10)
    with layer.using(solver=eq.Anderson(rtol=1e-10, max_steps=100)):
        assert isinstance(layer.gradient, eq.Implicit)
        torch.testing.assert_close(layer(x), plain.value, rtol=0, atol=1e-4)


def test_two_forwards_before_one_backward() -> None:
    """Power iteration of a spectral norm moves on in between; each backward pass has its own vectors."""
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, bias=False))
    cell, x = Cell(6), torch.randn(3, 6)
    cell.w = linear
    layer = eq.nn.DEQ(cell, solver=ALONE, gradient=eq.Reversible(steps=4))
    sigma = linear.parametrizations.weight[0]
    vectors = sigma._u.clone(), sigma._v.clone()
    first = layer(x)
    layer(x)
    (found,) = torch.autograd.grad(first.sum(), linear.parametrizations.weight.original)
    sigma._u.copy_(vectors[0]), sigma._v.copy_(vectors[1])
    (right,) = torch.autograd.grad(layer(x).sum(), linear.parametrizations.weight.original)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eq.Reversible(relaxation=1.0), ValueError, r"relaxation=1.0\): must be > 0 and < 1"),
        (lambda: eq.Reversible(steps=0), ValueError, r"steps=0\): must be >= 1"),
        (lambda: eq.fixed_point(Cell(), torch.zeros(1, 12), gradient=eq.Reversible()), ValueError, "takes the place"),
        (lambda: eq.nn.DEQ(Cell(), gradient=eq.Reversible()), ValueError, r"take solver=Picard\(max_steps=0\)"),
    ],
)
def test_bad_use(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_refusals() -> None:
    options = {"solver": ALONE, "gradient": eq.Reversible(steps=3)}
    cell, x = Cell(), torch.randn(2, 12)
    with pytest.raises(ValueError, match="differentiates no closure"):
        eq.fixed_point(lambda z: cell(z, x), torch.zeros(2, 12), **options)
    value = eq.fixed_point(cell, torch.zeros(2, 12), x, **options).value
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(value.sum(), cell.w.weight, create_graph=True)
    cell.u.register_forward_hook(lambda module, args, out: out + torch.rand_like(out))
    with pytest.raises(RuntimeError, match="changed since the solve"):
        eq.fixed_point(cell, torch.zeros(2, 12), x, **options).value.sum().backward()


@pytest.mark.slow
def test_training(tmp_path: pathlib.Path) -> None:
    """A recipe trains with it, and evaluation solves to a tolerance."""
    base = dataclasses.replace(
        zoo.mdeq_digits(), stop_after=2, tensorboard=False, gradient=eq.Implicit(), task=zoo.Classify()
    )
    with pytest.raises(ValueError, match=r"solver Picard with solver.max_steps=0"):
        dataclasses.replace(base, gradient=eq.Reversible(steps=3))
    solver = eq.Anderson(max_steps=60, rtol=1e-2)
    config = dataclasses.replace(base, solver=ALONE, gradient=eq.Reversible(steps=3), eval_solver=solver)
    result = train.fit(config, run_dir=tmp_path)
    assert result.test["mean_steps"] > 10
    assert result.history[0]["mean_steps"] == 3
