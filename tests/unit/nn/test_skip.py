"""Where a solve begins: a predictor, explicit steps of the cell, the penalty that draws start and answer together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import TanhCell
from torch import Tensor, nn

import equipoise as eq
from equipoise.nn import DEQ, VariationalDropout, skip_penalty, weight_norm

B, D = 4, 5
TIGHT = eq.Anderson(max_steps=300, rtol=1e-13)
EXACT = eq.Implicit(solver=eq.GMRES(max_steps=60, rtol=0.0, atol=1e-13))


class Answer(nn.Module):
    """Predicts the equilibrium of an affine cell, shifted."""

    def __init__(self, cell: nn.Linear, shift: float = 0.0) -> None:
        super().__init__()
        self.inverse = nn.Parameter(torch.linalg.inv(torch.eye(D) - cell.weight.detach()))
        self.shift = nn.Parameter(torch.full((D,), shift))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inverse.T + self.shift


class Affine(nn.Linear):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z) + x


def affine() -> Affine:
    cell = Affine(D, D, bias=False)
    with torch.no_grad():
        cell.weight.mul_(0.6 / torch.linalg.matrix_norm(cell.weight, 2))
    return cell


# --- the predictor ---------------------------------------------------------------------------------------------------


def test_a_perfect_guess_costs_one_evaluation_and_nothing_in_the_loss() -> None:
    cell, x = affine(), torch.randn(B, D)
    solution = DEQ(cell, solver=eq.Anderson(rtol=1e-10), init=Answer(cell)).solve(x)
    assert solution.num_steps.tolist() == [1] * B
    assert float(skip_penalty(solution).detach()) < 1e-15


def test_the_gradient_of_the_predictor_is_the_sign_of_its_error() -> None:
    cell, x = affine(), torch.randn(B, D)
    guess = Answer(cell)
    with torch.no_grad():
        guess.inverse.add_(torch.randn(D, D))
    solution = DEQ(cell, solver=TIGHT, gradient=EXACT, init=guess).solve(x)
    skip_penalty(solution, detach_target=True).backward()
    sign = (guess(x) - torch.linalg.solve(torch.eye(D) - cell.weight, x.T).T).detach().sign() / (B * D)
    torch.testing.assert_close(guess.shift.grad, sign.sum(0))
    torch.testing.assert_close(guess.inverse.grad, sign.T @ x)
    assert cell.weight.grad is None, "the equilibrium is left as it is"


@pytest.mark.parametrize("explicit_steps", [0, 1, 2])
@pytest.mark.parametrize("gradient", [EXACT, eq.Unrolled(steps=2)], ids=["implicit", "unrolled"])
def test_the_gradient_of_task_and_penalty_equals_finite_differences(gradient: eq.Gradient, explicit_steps: int) -> None:
    """Fixed depth included: there the start is a part of the answer, too."""
    cell, guess = TanhCell(D), nn.Linear(D, D)
    solver = TIGHT if gradient is EXACT else eq.Picard(max_steps=0)
    layer = DEQ(cell, solver=solver, gradient=gradient, init=guess, explicit_steps=explicit_steps)
    names = [name for name, _ in layer.named_parameters()]

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.no_grad():
            for name, value in zip(names, parameters, strict=True):
                layer.get_parameter(name).copy_(value)
        solution = layer.solve(x)
        return solution.value.square().sum() + 3 * skip_penalty(solution)

    x = torch.randn(B, D, requires_grad=True)
    values = [p.detach().clone() for p in layer.parameters()]
    total = loss(x, *values)
    gradients = torch.autograd.grad(total, [x, *layer.parameters()])
    for number, gradient_of in enumerate(gradients):
        arguments = [x.detach(), *values]
        direction = torch.randn_like(gradient_of)
        moved = [
            loss(*[a + sign * 1e-6 * direction if i == number else a for i, a in enumerate(arguments)])
            for sign in (1, -1)
        ]
        difference = (moved[0] - moved[1]).detach() / 2e-6
        torch.testing.assert_close((gradient_of * direction).sum(), difference, rtol=2e-6, atol=1e-8)


def test_one_adjoint_solve_serves_task_and_penalty() -> None:
    seen: list[Any] = []
    gradient = eq.Implicit(solver=eq.GMRES(max_steps=30, rtol=0.0, atol=1e-9), observe=seen.append)
    solution = DEQ(TanhCell(D), solver=TIGHT, gradient=gradient, init=nn.Linear(D, D)).solve(torch.randn(B, D))
    (solution.value.square().sum() + skip_penalty(solution)).backward()
    assert len(seen) == 1


# --- explicit steps --------------------------------------------------------------------------------------------------


def test_an_explicit_step_is_picards_first_and_shifts_its_path_by_one() -> None:
    cell, x = TanhCell(D), torch.randn(B, D)
    picard = eq.Picard(max_steps=12, rtol=0.0)
    plain = DEQ(cell, solver=picard).solve(x, trace=True)
    ahead = DEQ(cell, solver=picard, explicit_steps=1).solve(x, trace=True)
    assert plain.trace is not None
    assert ahead.trace is not None
    torch.testing.assert_close(ahead.start, cell(torch.zeros_like(x), x))
    torch.testing.assert_close(ahead.trace[:-1], plain.trace[1:])
    assert ahead.num_steps.tolist() == [13] * B, "the explicit step is an evaluation like any other"
    assert ahead.num_evals == 13


def test_where_the_map_ignores_its_state_the_step_arrives() -> None:
    class Constant(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x.tanh() + 0 * z

    solution = DEQ(Constant(), explicit_steps=1).solve(torch.randn(B, D))
    assert solution.num_steps.tolist() == [2] * B
    assert float(skip_penalty(solution)) == 0


def test_the_explicit_step_meets_masks_and_weights_of_the_solve() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = weight_norm(nn.Linear(D, D))
            self.dropout = VariationalDropout(0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.dropout(torch.tanh(0.4 * self.w(z)) + x)

    layer, x = DEQ(Cell(), solver=TIGHT, explicit_steps=1), torch.randn(50, D)
    solution = layer.solve(x)
    assert isinstance(solution.start, Tensor)
    dropped = solution.start == 0
    assert 0.3 < float(dropped.double().mean()) < 0.7
    assert torch.equal(dropped, solution.value == 0)
    (skip_penalty(solution) + solution.value.sum()).backward()
    weight = layer.cell.w.parametrizations.weight
    assert all(bool(p.grad.abs().sum() > 0) for p in weight.parameters())


def test_without_gradients_the_start_is_not_tracked() -> None:
    layer = DEQ(TanhCell(D), init=nn.Linear(D, D), explicit_steps=1)
    with torch.no_grad():
        assert not layer.solve(torch.randn(B, D)).start.requires_grad
    assert layer.solve(torch.randn(B, D)).start.requires_grad


# --- the penalty -----------------------------------------------------------------------------------------------------


def test_scales_count_alike_or_by_their_numbers() -> None:
    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return 0 * z[0] + 1, 0 * z[1] + 3

    z0 = (torch.zeros(B, 6), torch.zeros(B, 1, 2))
    solution = eq.fixed_point(f, z0, torch.zeros(B, 1), params=())
    assert float(skip_penalty(solution)) == pytest.approx(1 + 3)
    assert float(skip_penalty(solution, per_scale=False)) == pytest.approx((6 * 1 + 2 * 3) / 8)


def test_misuse_is_named_with_its_remedy() -> None:
    x = torch.randn(B, D)
    bare = eq.Anderson().solve(eq.FunctionMap(TanhCell(D), x, (x,)), x)
    with pytest.raises(ValueError, match=r"has no start; take it from DEQ\.solve"):
        skip_penalty(bare)
    with pytest.raises(ValueError, match="explicit_steps must be >= 0, got -1"):
        DEQ(TanhCell(D), explicit_steps=-1)
    with pytest.raises(TypeError, match=r"explicit_steps must be an integer, got 1\.5"):
        DEQ(TanhCell(D), explicit_steps=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, D + 1])
def test_a_predictor_of_another_shape_is_named(size: int) -> None:
    layer = DEQ(TanhCell(D), init=nn.Linear(D, size))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        layer(torch.randn(B, D))
    note = f"init returned a tensor ({B}, {size}); it must return a state of the cell"
    assert caught.value.__notes__ == [note]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", [eq.SteadyState(), eq.Anderson(), eq.Broyden()], ids=lambda s: type(s).__name__)
def test_a_guess_that_is_not_finite_is_a_status_and_harms_no_other(solver: eq.Solver, poison: float) -> None:
    class Guess(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 5, poison, x)

    x = torch.randn(B, D)
    x[1, 0] = 6.0
    layer = DEQ(TanhCell(D), solver=solver, init=Guess())
    solution, others = layer.solve(x), [0, 2, 3]
    alone = layer.solve(x[others])
    assert int(solution.status[1]) == eq.Status.NONFINITE
    assert int(solution.num_steps[1]) == 1
    torch.testing.assert_close(solution.value[others], alone.value, rtol=1e-10, atol=1e-12)
    with pytest.raises(eq.ConvergenceError, match=r"NONFINITE: 1 of 4 samples \(1\)"):
        solution.raise_for_status()
    assert not bool(skip_penalty(solution).isfinite()), "the loss shows it"


def test_a_cell_whose_result_is_no_state_is_named() -> None:
    class Wide(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.zeros(z.shape[0], self.size)

    for explicit_steps in (0, 1):
        layer = DEQ(Wide(D + 1), solver=eq.SteadyState(), explicit_steps=explicit_steps)
        with pytest.raises(ValueError, match="the map's result"):
            layer(torch.randn(B, D))
