"""The map: counts and selections, products with the Jacobian, the map of an objective, what it does to modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import TanhCell, affine
from torch import Tensor, nn

import equipoise as eq
from equipoise.core.function_map import DescentMap, FunctionMap
from equipoise.core.modules import SeededLayer
from equipoise.gradients.adjoint import AdjointMap

BATCH, SIZE = 4, 6


def evaluate(f: FunctionMap, z: Tensor, graph: bool = False) -> eq.Point:
    """At all rows, none of which has stopped."""
    return f.evaluate(z, torch.arange(f.batch), torch.ones(f.batch, dtype=torch.bool), graph=graph)


def tanh_map() -> tuple[TanhCell, Tensor, Tensor, FunctionMap]:
    cell, z, x = TanhCell(SIZE), torch.randn(BATCH, SIZE), torch.randn(BATCH, SIZE)
    return cell, z, x, FunctionMap(cell, z, (x,))


def coupled(z: Tensor, x: Tensor) -> Tensor:
    """A strictly convex objective that is not quadratic, `(B, D), (B, D) -> (B,)`."""
    return (z - x).square().sum(1) + torch.logsumexp(z.cumsum(1), 1) + (z[:, :1] * z).tanh().sum(1) / 10


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_counts() -> None:
    """A map, its selections and the same map on other inputs count together; products evaluate nothing again."""
    cell, z, x, f = tanh_map()
    calls: list[int] = []
    cell.register_forward_hook(lambda _, arguments, __: calls.append(len(arguments[0])))
    part, other = f.select(torch.tensor([0, 2])), f.with_inputs([x + 1])
    torch.testing.assert_close(other.call(z), cell(z, x + 1))
    calls.pop()
    torch.testing.assert_close(f.call(z), cell(z, x))
    calls.pop()
    evaluate(f, z)
    evaluate(part, z[[0, 2]])
    point = evaluate(part, z[[0, 2]], graph=True)
    assert other.counts is part.counts is f.counts
    assert f.counts.evals == len(calls) == 5
    for number in range(3):
        assert f.counts.vjps == number
        point.vjp(point.residual)
    assert len(calls) == 5


def test_selection() -> None:
    """The map on its rows in their order, with inputs in containers and with its seeds."""
    cell, z, x, f = tanh_map()
    index, again = torch.tensor([3, 1, 1]), torch.tensor([2, 0])
    assert (f.batch, f.select(index).batch) == (BATCH, 3)
    torch.testing.assert_close(f.select(index).call(z[index]), cell(z, x)[index])
    torch.testing.assert_close(f.select(index).select(again).call(z[index][again]), cell(z, x)[index][again])
    a, b, c = torch.randn(3, BATCH, SIZE)
    f = FunctionMap(lambda z, pair, named: z * pair[0] + pair[1] - named["c"], z, ((a, b), {"c": c}), params=())
    torch.testing.assert_close(f.call(z), z * a + b - c)
    torch.testing.assert_close(f.select(torch.tensor([2])).call(z[2:3]), (z * a + b - c)[2:3])
    f = FunctionMap(Noisy(), z)
    assert (f.call(z) - z)[:, 0].unique().numel() == BATCH
    assert torch.equal(f.select(index).call(z[index]), f.call(z)[index])


@pytest.mark.parametrize("graph", [False, True])
def test_point(graph: bool) -> None:
    """It holds state, image and residual untracked."""
    cell, z, x, f = tanh_map()
    with torch.no_grad():  # as inside a solve
        point = evaluate(f, z, graph)
    torch.testing.assert_close(point.fz, cell(z, x).detach())
    torch.testing.assert_close(point.residual, cell(z, x).detach() - z)
    assert torch.equal(point.z, z)
    assert point.map is f
    assert not any(t.requires_grad for t in (point.z, point.fz, point.residual))


# --- products --------------------------------------------------------------------------------------------------------


def assert_products(f: FunctionMap, z: Tensor) -> None:
    """Those of `vjp` are those of the dense Jacobian, row by row; the graph is kept."""
    v = torch.randn_like(z)
    dense = torch.stack([
        torch.autograd.functional.jacobian(lambda row, i=i: f.select(torch.tensor([i])).call(row[None])[0], z[i])
        for i in range(len(z))
    ])  # fmt: skip
    point, expected = evaluate(f, z, graph=True), torch.einsum("bde,bd->be", dense, v)
    torch.testing.assert_close(point.vjp(v), expected)
    torch.testing.assert_close(point.vjp(2 * v), 2 * expected)


def test_products() -> None:
    cell, z, x, f = tanh_map()
    v = torch.randn(BATCH, SIZE)
    expected = v * (1 - cell(z, x) ** 2).detach() @ cell.w.detach()
    torch.testing.assert_close(evaluate(f, z, graph=True).vjp(v), expected)
    assert_products(f, z)
    assert all(p.grad is None for p in cell.parameters())
    with pytest.raises(RuntimeError, match=r"must set uses_vjp = True"):
        evaluate(f, z).vjp(z)


def test_products_of_a_structured_state() -> None:
    z = {"a": torch.randn(3, 2), "b": torch.randn(3, 2, 2)}

    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": torch.einsum("bij,bj->bi", z["b"], z["a"]), "b": z["a"][:, :, None] * z["b"].sin()}

    made = FunctionMap(f, z, params=())
    assert_products(made, made.pack(z))


def test_products_of_a_map_that_ignores_its_state() -> None:
    x = torch.randn(3, 2)
    f = FunctionMap(lambda z, x: x.sin(), torch.zeros(3, 2), (x,), params=())
    assert torch.equal(evaluate(f, x, graph=True).vjp(x), torch.zeros(3, 2))


def test_projection() -> None:
    """It follows the map in value and product."""
    problem = affine(BATCH, SIZE)
    (x,), z = problem.inputs, torch.randn(BATCH, SIZE)
    f = FunctionMap(problem.f, problem.z0, (x,), params=(), projection=lambda z, x: z.clamp(-0.5, 0.5))
    torch.testing.assert_close(f.project(z), z.clamp(-0.5, 0.5))
    torch.testing.assert_close(f.call(z), problem.f(z, x).clamp(-0.5, 0.5))
    assert_products(f, z)


# --- other functions of the state ------------------------------------------------------------------------------------


def test_loss_gradient() -> None:
    """Of an outer loss at the point, row by row, in the structure of the state; parameters get nothing."""
    z0, rows = (torch.randn(2, 3), torch.randn(2, 2)), torch.tensor([4, 1])
    f, weight = FunctionMap(lambda z: z, z0), nn.Parameter(torch.randn(5))
    point = f.evaluate(f.pack(z0), rows, torch.ones(2, dtype=torch.bool))

    def loss(z: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        return weight[rows - 1] * (z[0].pow(3).sum(1) + 2 * z[1].square().sum(1))

    with torch.no_grad():  # as inside a solve
        found = point.loss_gradient(loss)
    scale = weight.detach()[rows - 1][:, None]
    torch.testing.assert_close(found, scale * torch.cat([3 * z0[0] ** 2, 4 * z0[1]], dim=1))
    assert not found.requires_grad
    assert weight.grad is None
    assert torch.equal(point.loss_gradient(lambda z, rows: torch.ones(2)), torch.zeros(2, 5))
    for wrong, got in ((lambda z, rows: z[0].sum(), r"\(\)"), (lambda z, rows: 1.0, "float")):
        with pytest.raises(ValueError, match=rf"one number per row, \(2,\), got {got}"):
            point.loss_gradient(wrong)
    adjoint = AdjointMap(f, point.z, point.fz, point.z)
    with pytest.raises(RuntimeError, match="AdjointMap has flat states only, and no outer loss"):
        adjoint.loss_gradient(loss, point.z, rows)


def test_call_user() -> None:
    """Other functions meet the masks of the map and are not counted."""
    cell, z = nn.Sequential(eq.nn.VariationalDropout(0.5)), torch.ones(BATCH, 40)
    f = FunctionMap(cell, z)
    found = f.call_user(lambda z: cell(z).sum(1), z)
    assert f.counts.evals == 0
    torch.testing.assert_close(found, f.call(z).sum(1))
    assert cell[0].seeds is None


# --- what a map does to the caller's modules -------------------------------------------------------------------------


class Rows(eq.Map):
    """A map of one's own: `call` and `select` alone; each row has its own slope."""

    def __init__(self, slopes: Tensor, counts: Any = None) -> None:
        super().__init__(counts, droppable=True)
        self.slopes = slopes

    def call(self, z: Tensor) -> Tensor:
        self.counts.evals += 1
        return self.slopes[:, None] * z + 1

    def select(self, index: Tensor) -> Rows:
        return Rows(self.slopes[index], self.counts)


def test_protocol() -> None:
    slopes = torch.tensor([0.1, 0.5, 0.9, -0.9])
    f, z0 = Rows(slopes), torch.zeros(4, 3)
    solution = eq.Picard(max_steps=500, rtol=1e-8).solve(f, z0).raise_for_status()
    torch.testing.assert_close(solution.value, (1 / (1 - slopes))[:, None].expand(4, 3), rtol=1e-6, atol=0)
    assert f.counts.evals == solution.num_evals == solution.num_steps.max()
    assert f.project(z0) is z0
    with pytest.raises(ValueError, match="Rows keeps no graph: use a solver without vjp"):
        eq.AdjointBroyden().solve(f, z0)
    with pytest.raises(RuntimeError, match="Rows has flat states only"):
        f.loss_gradient(lambda z, rows: z.sum(1), z0, torch.arange(4))


class Noisy(SeededLayer):
    def forward(self, z: Tensor) -> Tensor:
        assert self.seeds is not None
        return z + self.seeds[:, None] / 2.0**40


def test_seeds() -> None:
    """They are present during an evaluation only, also when it fails."""
    layer = Noisy()
    f = FunctionMap(layer, torch.zeros(3, 2))
    f.call(torch.zeros(3, 2))
    assert layer.seeds is None
    with pytest.raises(RuntimeError, match="size"):
        f.call(torch.zeros(5, 2))
    assert layer.seeds is None


REFUSED = {
    "BatchNorm1d with batch statistics": lambda: nn.BatchNorm1d(SIZE),
    "SyncBatchNorm with batch statistics": lambda: nn.SyncBatchNorm(SIZE),
    "BatchNorm1d with batch statistics: ": lambda: nn.BatchNorm1d(SIZE, track_running_stats=False).eval(),
    r"Dropout\(p=0.3\), which changes": lambda: nn.Dropout(0.3),
    r"AlphaDropout\(p=0.1\), which changes": lambda: nn.AlphaDropout(0.1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layers_refused(message: str) -> None:
    cell = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Sequential(REFUSED[message]()))
    remedy = "use GroupNorm inside the cell, or call .eval" if "Norm" in message else "VariationalDropout"
    with pytest.raises(ValueError, match=f"the cell's 1.0 is {message}.*{remedy}"):
        eq.fixed_point(cell, torch.zeros(BATCH, SIZE))


def test_layers_in_evaluation_mode() -> None:
    cell = nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.Dropout(0.3), nn.Tanh()).eval()
    solution = eq.fixed_point(cell, torch.zeros(BATCH, SIZE), solver=eq.Anderson(max_steps=100, rtol=1e-10))
    torch.testing.assert_close(cell(solution.raise_for_status().value), solution.value, rtol=1e-8, atol=1e-8)
    FunctionMap(nn.Sequential(nn.Dropout(0.0)), torch.zeros(BATCH, SIZE))  # drops nothing, even in training mode


def test_one_block() -> None:
    """It is none: the whole state converges together."""
    z0 = torch.zeros(BATCH, SIZE)
    assert [FunctionMap(TanhCell(SIZE), z0, blocks=b).blocks for b in (None, (6,), (2, 4))] == [None, None, (2, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": (2, 3)}, ValueError, r"blocks \(2, 3\) must add up to the size of the state, 6"),
        ({"f": 3}, TypeError, "f must be a module or a function .* got int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionMap(**({"f": TanhCell(SIZE), "z0": torch.zeros(BATCH, SIZE)} | arguments))


# --- minimization ----------------------------------------------------------------------------------------------------


def test_descent_map() -> None:
    """A step along the gradient, and the value; together they are one evaluation. Its J is I less the Hessian."""
    z, x = torch.randn(2, BATCH, SIZE)
    f = DescentMap(coupled, z, (x,), params=())
    gradient = torch.autograd.functional.jacobian(lambda z: coupled(z, x).sum(), z)
    point = evaluate(f, z)
    torch.testing.assert_close(point.value, coupled(z, x))
    torch.testing.assert_close(point.residual, -gradient)
    for image in (point.fz, f.call(z)):
        torch.testing.assert_close(image, z - gradient)
    assert f.counts.evals == 2
    assert_products(f, z)
    rows = ((lambda z, x=x: coupled(z[None], x[None])[0], z) for z, x in zip(z, x, strict=True))
    hessian = torch.stack([torch.autograd.functional.hessian(*row) for row in rows])
    product = evaluate(f, z, graph=True).vjp(x)
    torch.testing.assert_close(product, x - torch.einsum("bde,be->bd", hessian, x))
    parts = (z[:, :2], z[:, 2:].reshape(BATCH, 2, 2))
    shaped = DescentMap(lambda z, x: coupled(torch.cat([z[0], z[1].flatten(1)], 1), x), parts, (x,), params=())
    torch.testing.assert_close(shaped.call(shaped.pack(parts)), f.call(z))


def test_outside_the_domain() -> None:
    """Only the row itself is not finite: the formula's slope at -1 is, 1 - 1/z = 2, but h has none there."""
    z = torch.tensor([[1.0], [-1.0], [2.0]])
    point = evaluate(DescentMap(lambda z: (z - z.log())[:, 0], z), z)
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
def test_bad_objective(objective: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"one number per sample, \(3,\), got {got}"):
        DescentMap(objective, torch.zeros(3, 2)).call(torch.zeros(3, 2))
