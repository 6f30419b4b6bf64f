"""Where a solve begins: a predictor, explicit steps of the cell, the penalty that draws start and answer together."""

import math
from typing import Any

import pytest
import torch
from problems import TanhCell, inverted
from torch import Tensor, nn

import equipoise as eq
from equipoise.nn import DEQ, VariationalDropout, skip_penalty, weight_norm

B, D = 4, 5
TIGHT = eq.Anderson(max_steps=300, rtol=1e-13)
EXACT = eq.Implicit(solver=eq.GMRES(max_steps=60, rtol=0.0, atol=1e-13))


class Affine(nn.Linear):
    """A contraction."""

    def __init__(self) -> None:
        super().__init__(D, D, bias=False)
        with torch.no_grad():
            self.weight.mul_(0.6 / torch.linalg.matrix_norm(self.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z) + x


class Answer(nn.Module):
    """Predicts the equilibrium of an affine cell."""

    def __init__(self, cell: Affine) -> None:
        super().__init__()
        self.inverse = nn.Parameter(torch.linalg.inv(torch.eye(D) - cell.weight.detach()))
        self.shift = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inverse.T + self.shift


# --- the predictor ---------------------------------------------------------------------------------------------------


def test_perfect_guess() -> None:
    """It costs one evaluation and nothing in the loss."""
    cell, x = Affine(), torch.randn(B, D)
    solution = DEQ(cell, solver=eq.Anderson(rtol=1e-10), init=Answer(cell)).solve(x)
    assert solution.num_steps.tolist() == [1] * B
    assert float(skip_penalty(solution).detach()) < 1e-15


def test_gradient_of_the_predictor() -> None:
    """It is the sign of its error; with the target detached the equilibrium is left as it is."""
    cell, x = Affine(), torch.randn(B, D)
    guess = Answer(cell)
    with torch.no_grad():
        guess.inverse.add_(torch.randn(D, D))
    solution = DEQ(cell, solver=TIGHT, gradient=EXACT, init=guess).solve(x)
    skip_penalty(solution, detach_target=True).backward()
    sign = (guess(x) - inverted(cell.weight, x)).detach().sign() / (B * D)
    torch.testing.assert_close(guess.shift.grad, sign.sum(0))
    torch.testing.assert_close(guess.inverse.grad, sign.T @ x)
    assert cell.weight.grad is None


@pytest.mark.parametrize("explicit_steps", [0, 1, 2])
@pytest.mark.parametrize("gradient", [EXACT, eq.Unrolled(steps=2)], ids=["implicit", "unrolled"])
def test_finite_differences(gradient: eq.Gradient, explicit_steps: int) -> None:
    """Of task and penalty, fixed depth included: there the start is a part of the answer, too."""
    solver = TIGHT if gradient is EXACT else eq.Picard(max_steps=0)
    options = {"solver": solver, "gradient": gradient, "explicit_steps": explicit_steps}
    layer = DEQ(TanhCell(D), init=nn.Linear(D, D), **options)

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        solution = layer.solve(x)
        return solution.value.square().sum() + 3 * skip_penalty(solution)

    # The layer's own parameters are perturbed in place.
    inputs = (torch.randn(B, D, requires_grad=True), *layer.parameters())
    torch.autograd.gradcheck(loss, inputs, fast_mode=True, atol=1e-6)


def test_one_adjoint_solve() -> None:
    """It serves task and penalty."""
    seen: list[Any] = []
    gradient = eq.Implicit(solver=eq.GMRES(max_steps=30, rtol=0.0, atol=1e-9), observe=seen.append)
    solution = DEQ(TanhCell(D), solver=TIGHT, gradient=gradient, init=nn.Linear(D, D)).solve(torch.randn(B, D))
    (solution.value.square().sum() + skip_penalty(solution)).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_guess_not_finite(poison: float) -> None:
    """It is a status of its sample, and the loss shows it."""
    layer = DEQ(TanhCell(D), init=lambda x: torch.where(x > 5, poison, x))
    solution = layer.solve(torch.tensor([[0.0], [6.0]]).expand(2, D))
    assert solution.status.tolist() == [eq.Status.CONVERGED, eq.Status.NONFINITE]
    assert not bool(skip_penalty(solution).isfinite())


# --- explicit steps --------------------------------------------------------------------------------------------------


def test_explicit_step() -> None:
    """It is Picard's first and shifts its path by one; it is an evaluation like any other."""
    cell, x, picard = TanhCell(D), torch.randn(B, D), eq.Picard(max_steps=12, rtol=0.0)
    plain, ahead = (DEQ(cell, solver=picard, explicit_steps=k).solve(x, trace=True) for k in (0, 1))
    torch.testing.assert_close(ahead.start, cell(torch.zeros_like(x), x))
    torch.testing.assert_close(ahead.trace[:-1], plain.trace[1:])
    assert ahead.num_steps.tolist() == [13] * B
    assert ahead.num_evals == 13


def test_map_that_ignores_its_state() -> None:
    """The step arrives."""

    class Constant(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x.tanh() + 0 * z

    solution = DEQ(Constant(), explicit_steps=1).solve(torch.randn(B, D))
    assert solution.num_steps.tolist() == [2] * B
    assert float(skip_penalty(solution)) == 0


def test_masks_and_weights() -> None:
    """An explicit step meets those of the solve."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = weight_norm(nn.Linear(D, D))
            self.dropout = VariationalDropout(0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.dropout(torch.tanh(0.4 * self.w(z)) + x)

    layer = DEQ(Cell(), solver=TIGHT, explicit_steps=1)
    solution = layer.solve(torch.randn(50, D))
    dropped = solution.start == 0
    assert 0.3 < float(dropped.double().mean()) < 0.7
    assert torch.equal(dropped, solution.value == 0)
    (skip_penalty(solution) + solution.value.sum()).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.cell.w.parametrizations.weight.parameters())


def test_tracking() -> None:
    layer, x = DEQ(TanhCell(D), init=nn.Linear(D, D), explicit_steps=1), torch.randn(B, D)
    with torch.no_grad():
        assert not layer.solve(x).start.requires_grad
    assert layer.solve(x).start.requires_grad


# --- the penalty -----------------------------------------------------------------------------------------------------


def test_scales() -> None:
    """They count alike or by their numbers."""
    z0 = (torch.zeros(B, 6), torch.zeros(B, 1, 2))
    f = lambda z, x: (0 * z[0] + 1, 0 * z[1] + 3)  # noqa: E731
    solution = eq.fixed_point(f, z0, torch.zeros(B, 1), params=())
    assert float(skip_penalty(solution)) == pytest.approx(1 + 3)
    assert float(skip_penalty(solution, per_scale=False)) == pytest.approx((6 * 1 + 2 * 3) / 8)


def test_no_start() -> None:
    x = torch.randn(B, D)
    bare = eq.Anderson().solve(eq.FunctionMap(TanhCell(D), x, (x,)), x)
    with pytest.raises(ValueError, match=r"has no start; take it from DEQ\.solve"):
        skip_penalty(bare)
