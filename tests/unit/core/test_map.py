"""The map: what it counts and selects, its products with the Jacobian, and the map of an objective."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import TanhCell, affine
from torch import Tensor, nn

import equipoise as eq
from equipoise.core.function_map import DescentMap, FunctionMap, SeededLayer
from equipoise.fixed_point import solve_map

BATCH, SIZE = 4, 6


def rows(f: FunctionMap) -> tuple[Tensor, Tensor]:
    """Numbers and mask of the rows of a map that none has left."""
    return torch.arange(f.batch), torch.ones(f.batch, dtype=torch.bool)


def tanh_map() -> tuple[TanhCell, Tensor, Tensor, FunctionMap]:
    cell, z, x = TanhCell(SIZE), torch.randn(BATCH, SIZE), torch.randn(BATCH, SIZE)
    return cell, z, x, FunctionMap(cell, z, (x,))


def jacobians(cell: TanhCell, z: Tensor, x: Tensor) -> Tensor:
    """Closed form, `(B, D, D)`: diag(1 - tanh^2) W."""
    return (1 - cell(z, x) ** 2).detach()[:, :, None] * cell.w.detach()


def coupled(z: Tensor, x: Tensor) -> Tensor:
    """A strictly convex objective that is not quadratic, `(B, D), (B, D) -> (B,)`."""
    return (z - x).square().sum(1) + torch.logsumexp(z.cumsum(1), 1) + (z[:, :1] * z).tanh().sum(1) / 10


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluations_and_products_are_counted_by_a_map_and_its_selections_together() -> None:
    cell, z, x, f = tanh_map()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    cell.register_forward_hook(count)
    part = f.select(torch.tensor([0, 2]))
    f.call(z)
    f.evaluate(z, *rows(f))
    part.evaluate(z[[0, 2]], *rows(part))
    f.with_inputs([x + 1]).call(z)
    point = part.evaluate(z[[0, 2]], *rows(part), graph=True)
    assert f.counts.evals == part.counts.evals == calls == 5
    assert f.counts.vjps == 0
    for number in range(1, 4):
        point.vjp(point.residual)
        assert f.counts.vjps == number
    assert calls == 5  # products evaluate nothing again


def test_a_selection_is_the_map_on_its_rows_in_their_order() -> None:
    cell, z, x, f = tanh_map()
    index = torch.tensor([3, 1, 1])
    assert f.select(index).batch == 3
    torch.testing.assert_close(f.select(index).call(z[index]), cell(z, x)[index])
    again = torch.tensor([2, 0])
    torch.testing.assert_close(f.select(index).select(again).call(z[index][again]), cell(z, x)[index][again])
    assert f.batch == BATCH


def test_inputs_may_be_containers_whose_rows_are_selected_together() -> None:
    z, a, b, c = (torch.randn(3, 2) for _ in range(4))
    f = FunctionMap(lambda z, pair, named: z * pair[0] + pair[1] - named["c"], z, ((a, b), {"c": c}), params=())
    torch.testing.assert_close(f.call(z), z * a + b - c)
    torch.testing.assert_close(f.select(torch.tensor([2])).call(z[2:]), (z * a + b - c)[2:])


def test_a_point_holds_the_state_its_image_and_the_residual_untracked() -> None:
    cell, z, x, f = tanh_map()
    for graph in (False, True):
        point = f.evaluate(z, *rows(f), graph=graph)
        torch.testing.assert_close(point.fz, cell(z, x).detach())
        torch.testing.assert_close(point.residual, cell(z, x).detach() - z)
        assert torch.equal(point.z, z)
        assert graph is False or not any(t.requires_grad for t in (point.z, point.fz, point.residual))


def test_products_with_the_transposed_jacobian_are_those_of_dense_algebra() -> None:
    cell, z, x, f = tanh_map()
    v = torch.randn(BATCH, SIZE)
    point = f.evaluate(z, *rows(f), graph=True)
    expected = torch.einsum("bde,bd->be", jacobians(cell, z, x), v)
    torch.testing.assert_close(point.vjp(v), expected)
    torch.testing.assert_close(point.vjp(2 * v), 2 * expected)  # the graph is kept
    assert all(p.grad is None for p in cell.parameters())


def test_products_of_a_structured_state_are_those_of_its_flat_jacobian() -> None:
    z = {"a": torch.randn(3, 2), "b": torch.randn(3, 2, 2)}

    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": torch.einsum("bij,bj->bi", z["b"], z["a"]), "b": z["a"][:, :, None] * z["b"].sin()}

    m = FunctionMap(f, z)
    flat, v = m.pack(z), torch.randn(3, 6)
    dense = torch.func.vmap(torch.func.jacrev(lambda row: m.call(row[None])[0]))(flat)
    torch.testing.assert_close(m.evaluate(flat, *rows(m), graph=True).vjp(v), torch.einsum("bde,bd->be", dense, v))


def test_a_point_without_graph_says_what_its_solver_must_declare() -> None:
    _, z, _, f = tanh_map()
    with pytest.raises(RuntimeError, match="must set uses_vjp = True"):
        f.evaluate(z, *rows(f)).vjp(z)


def test_a_map_that_ignores_its_state_has_zero_products() -> None:
    x = torch.randn(3, 2)
    f = FunctionMap(lambda z, x: x.sin(), torch.zeros(3, 2), (x,), params=())
    assert torch.equal(f.evaluate(x, *rows(f), graph=True).vjp(x), torch.zeros(3, 2))


def test_the_gradient_of_an_outer_loss_is_taken_at_the_point_row_by_row() -> None:
    _, z, _, f = tanh_map()
    target = torch.randn(9, SIZE)
    numbers = torch.tensor([7, 0, 8, 3])
    point = f.evaluate(z, numbers, rows(f)[1])
    with torch.no_grad():  # as inside a solve
        gradient = point.loss_gradient(lambda z, rows: ((z - target[rows]) ** 4).sum(1))
    torch.testing.assert_close(gradient, 4 * (z - target[numbers]) ** 3)


def test_other_questions_meet_the_masks_of_the_map_and_are_not_counted() -> None:
    cell = torch.nn.Sequential(eq.nn.VariationalDropout(0.5))
    z = torch.ones(BATCH, 40)
    f = FunctionMap(cell, z)
    asked = f.call_user(lambda z: cell(z).sum(1), z)
    assert f.counts.evals == 0
    torch.testing.assert_close(asked, f.call(z).sum(1))
    assert cell[0].seeds is None


def test_a_map_is_followed_by_its_projection_in_value_and_product() -> None:
    problem = affine(BATCH, SIZE)
    (x,) = problem.inputs
    f = FunctionMap(problem.f, problem.z0, (x,), params=(), projection=lambda z, x: z.clamp(-0.5, 0.5))
    z = torch.randn(BATCH, SIZE)
    free = problem.f(z, x)
    torch.testing.assert_close(f.project(z), z.clamp(-0.5, 0.5))
    torch.testing.assert_close(f.call(z), free.clamp(-0.5, 0.5))
    a = problem.f(torch.eye(SIZE), torch.zeros(SIZE)).T
    v = torch.randn(BATCH, SIZE)
    torch.testing.assert_close(f.evaluate(z, *rows(f), graph=True).vjp(v), (v * (free.abs() < 0.5)) @ a)


def test_blocks_converge_separately() -> None:
    # The first part is a million times larger and converges at once; without blocks it hides the other.
    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], 0.9 * z[:, 1:] + x[:, 1:]], dim=1)

    x = torch.tensor([[1e6, 0.1, 0.2]])
    z0, solver = torch.zeros(1, 3), eq.Picard(max_steps=500, rtol=1e-4)
    solve = functools.partial(solve_map, z0=z0, solver=solver, gradient=eq.Implicit())
    together = solve(FunctionMap(f, z0, (x,), params=()))
    apart = solve(FunctionMap(f, z0, (x,), params=(), blocks=(1, 2)))
    assert bool(together.converged)
    assert bool(apart.converged)
    exact = torch.tensor([[1.0, 2.0]])
    assert float((together.value[:, 1:] - exact).norm()) > 0.5
    residual = (f(apart.value, x) - apart.value)[:, 1:].norm()
    assert residual <= 1e-4 * f(apart.value, x)[:, 1:].norm()
    assert int(apart.num_steps) > int(together.num_steps)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": (2, 3)}, ValueError, r"blocks \(2, 3\) must add up to the size of the state, 6"),
        ({"f": 3}, TypeError, "f must be a module or a function .* got int"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionMap(**({"f": TanhCell(SIZE), "z0": torch.zeros(BATCH, SIZE)} | arguments))


# --- what a map does to the caller's modules -------------------------------------------------------------------------


class Noisy(SeededLayer):
    def forward(self, z: Tensor) -> Tensor:
        assert self.seeds is not None
        return z + self.seeds[:, None] / 2.0**40


def test_seeds_are_present_during_an_evaluation_only_also_when_it_fails() -> None:
    layer = Noisy()
    f = FunctionMap(layer, torch.zeros(3, 2))
    f.call(torch.zeros(3, 2))
    assert layer.seeds is None
    with pytest.raises(RuntimeError, match="size"):
        f.call(torch.zeros(5, 2))
    assert layer.seeds is None


def test_a_selection_takes_its_seeds_along() -> None:
    f = FunctionMap(Noisy(), torch.zeros(5, 2))
    z, index = torch.zeros(5, 2), torch.tensor([4, 2])
    assert f.call(z)[:, 0].unique().numel() == 5
    assert torch.equal(f.select(index).call(z[index]), f.call(z)[index])


REFUSED = {
    "BatchNorm1d with batch statistics": lambda: nn.BatchNorm1d(SIZE),
    "SyncBatchNorm with batch statistics": lambda: nn.SyncBatchNorm(SIZE),
    "BatchNorm1d with batch statistics: ": lambda: nn.BatchNorm1d(SIZE, track_running_stats=False).eval(),
    r"Dropout\(p=0.3\), which changes": lambda: nn.Dropout(0.3),
    r"AlphaDropout\(p=0.1\), which changes": lambda: nn.AlphaDropout(0.1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layers_that_make_no_map_are_refused_by_name(message: str) -> None:
    cell = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Sequential(REFUSED[message]()))
    remedy = "use GroupNorm inside the cell, or call .eval" if "Norm" in message else "VariationalDropout"
    with pytest.raises(ValueError, match=f"the cell's 1.0 is {message}.*{remedy}"):
        eq.fixed_point(cell, torch.zeros(BATCH, SIZE))


def test_the_same_layers_are_welcome_in_evaluation_mode() -> None:
    cell = nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.Dropout(0.3), nn.Tanh()).eval()
    solution = eq.fixed_point(cell, torch.zeros(BATCH, SIZE), solver=eq.Anderson(max_steps=100, rtol=1e-10))
    torch.testing.assert_close(cell(solution.raise_for_status().value), solution.value, rtol=1e-8, atol=1e-8)
    FunctionMap(nn.Sequential(nn.Dropout(0.0)), torch.zeros(BATCH, SIZE))  # drops nothing, even in training mode


# --- minimisation ----------------------------------------------------------------------------------------------------


def test_the_descent_map_steps_along_the_gradient_and_tells_the_value() -> None:
    z, x = torch.randn(BATCH, SIZE), torch.randn(BATCH, SIZE)
    f = DescentMap(coupled, z, (x,), params=())
    gradient = torch.func.grad(lambda z: coupled(z, x).sum())(z)
    point = f.evaluate(z, *rows(f))
    torch.testing.assert_close(point.value, coupled(z, x))
    torch.testing.assert_close(point.residual, -gradient)
    torch.testing.assert_close(point.fz, z - gradient)
    torch.testing.assert_close(f.call(z), z - gradient)
    assert f.counts.evals == 2  # value and gradient together are one evaluation


def test_the_jacobian_of_a_descent_map_is_the_identity_less_the_hessian() -> None:
    z, x, v = (torch.randn(BATCH, SIZE) for _ in range(3))
    f = DescentMap(coupled, z, (x,), params=())
    hessian = torch.func.vmap(torch.func.hessian(lambda z, x: coupled(z[None], x[None])[0]))(z, x)
    product = f.evaluate(z, *rows(f), graph=True).vjp(v)
    torch.testing.assert_close(product, v - torch.einsum("bde,be->bd", hessian, v))


def test_the_descent_map_of_a_structured_state_is_that_of_the_flat_one() -> None:
    z, x = torch.randn(BATCH, SIZE), torch.randn(BATCH, SIZE)
    parts = (z[:, :2], z[:, 2:].reshape(BATCH, 2, 2))
    f = DescentMap(lambda z, x: coupled(torch.cat([z[0], z[1].flatten(1)], 1), x), parts, (x,), params=())
    plain = DescentMap(coupled, z, (x,), params=())
    torch.testing.assert_close(f.call(f.pack(parts)), plain.call(z))


def test_outside_the_domain_of_the_objective_only_the_row_itself_is_not_finite() -> None:
    z = torch.tensor([[1.0], [-1.0], [2.0]])
    f = DescentMap(lambda z: (z - z.log())[:, 0], z)
    point = f.evaluate(z, *rows(f))
    # The formula's slope at -1 is finite, 1 - 1/z = 2, but h has none there.
    assert point.fz.isnan().flatten().tolist() == [False, True, False]
    torch.testing.assert_close(point.residual[[0, 2], 0], torch.tensor([0.0, -0.5]))


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda z: z.sum(), r"\(\)"),
        (lambda z: z, r"\(3, 2\)"),
        (lambda z: (z.sum(1),), "tuple"),
        (lambda z: z.sum(1, keepdim=True), r"\(3, 1\)"),
    ],
)
def test_an_objective_gives_one_number_per_sample(objective: Any, got: str) -> None:
    f = DescentMap(objective, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=rf"one number per sample, \(3,\), got {got}"):
        f.call(torch.zeros(3, 2))


def test_a_map_on_other_inputs_leaves_the_first_alone() -> None:
    cell, z, x, f = tanh_map()
    other = f.with_inputs([x + 1])
    torch.testing.assert_close(other.call(z), cell(z, x + 1))
    torch.testing.assert_close(f.call(z), cell(z, x))
    assert other.counts is f.counts
