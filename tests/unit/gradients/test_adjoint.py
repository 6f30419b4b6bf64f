"""The adjoint equation: what its tolerance means, what it costs, and what a start from a step before saves."""

import dataclasses
from typing import Any

import pytest
import torch
from problems import VANILLA, TanhCell, solve_linear, spectral
from torch import Tensor, nn

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.fixed_point import solve_map
from equipoise.zoo import DenseClassifier, DenseConfig

TIGHT = eq.Anderson(max_steps=300, rtol=1e-13)


class Recorder:
    """A gradient whose adjoint solves are kept."""

    def __init__(self, solver: eq.Solver, start: eq.Gradient | Tensor | None = None) -> None:
        self.reports: list[eq.Solution[Tensor]] = []
        self.gradient = eq.Implicit(solver=solver, start=start, observe=self.reports.append)

    @property
    def products(self) -> list[int]:
        return self.reports[-1].num_steps.tolist()


def slopes(cell: TanhCell, z: Tensor, x: Tensor) -> Tensor:
    """The Jacobians, `(B, d, d)`."""
    return ((1 - cell(z, x) ** 2)[..., None] * cell.w).detach()


# --- the tolerance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "start"),
    [
        (eq.GMRES(max_steps=40, memory=38), None),
        (eq.GMRES(max_steps=60, memory=3), None),
        (eq.Anderson(max_steps=100), None),
        (eq.Broyden(max_steps=40, memory=40), None),
        (eq.SteadyState(max_steps=300), None),
        (eq.Anderson(max_steps=100), eq.JacobianFree()),
        (eq.Anderson(max_steps=100), torch.zeros(6, 10)),
    ],
    ids=["gmres", "restarted", "anderson", "broyden", "flow", "jacobian-free", "zeros"],
)
def test_scale_of_the_loss(solver: eq.Solver, start: Any) -> None:
    """It changes no count. An absolute tolerance of 5e-2, as in the source, takes a mean-reduced loss for solved before
    the first product: what it then returns is the one-step gradient."""
    torch.manual_seed(1)
    cell, x, y = TanhCell(d=10, norm=0.95), torch.randn(6, 10), torch.randn(6, 10)
    recorder = Recorder(dataclasses.replace(solver, rtol=0.0, atol=5e-3), start)
    layer = eq.nn.DEQ(cell, solver=TIGHT, gradient=recorder.gradient)
    counts, directions = [], []
    for scale in (1.0, 1e-3, 1e-9, 1e-30, 1e30):
        (grad,) = torch.autograd.grad(scale * (layer(x) - y).square().mean(), cell.w)
        counts.append(recorder.products)
        directions.append(grad / scale)
        assert bool(recorder.reports[-1].converged.all())
    assert counts == counts[:1] * 5
    assert min(counts[0]) > 3
    torch.testing.assert_close(directions[1:], directions[:1] * 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 5e-3), (5e-3, 0.0)])
def test_one_product(rtol: float, atol: float) -> None:
    """It is enough where the cotangent meets the tolerance and nowhere else: the start is g, whose residual is J^T g,
    so the first product tells |J^T g| / |g|, whatever the length of g."""
    size = torch.tensor([4e-3, 6e-3, 4e-3, 6e-3])[:, None]
    g = torch.ones(4, 3) * torch.tensor([[1.0], [1.0], [1e-6], [1e6]])
    recorder, x = Recorder(eq.GMRES(max_steps=20, rtol=rtol, atol=atol)), torch.randn(4, 3, requires_grad=True)
    options = {"params": (), "solver": TIGHT, "gradient": recorder.gradient}
    z = eq.fixed_point(lambda z, x, s: s * z + x, torch.zeros(4, 3), x, size, **options).value
    torch.autograd.grad(z, x, g)
    assert [count == 1 for count in recorder.products] == [True, False, True, False]
    torch.testing.assert_close(recorder.reports[0].residual[[0, 2]], size[[0, 2], 0])
    assert float(recorder.reports[0].residual.max()) <= 5e-3


@pytest.mark.parametrize("start", [None, VANILLA], ids=["g", "shine"])
def test_restarts(start: eq.Gradient | None) -> None:
    """They reach the tolerance and report the residual of dense algebra."""
    cell, x, g = TanhCell(d=12, norm=2.0), torch.randn(5, 12), torch.randn(5, 12)
    recorder = Recorder(eq.GMRES(max_steps=200, memory=4, rtol=0.0, atol=1e-6), start)
    layer = eq.nn.DEQ(cell, solver=eq.Broyden(max_steps=80, memory=80, rtol=1e-7), gradient=recorder.gradient)
    z = layer.solve(x).raise_for_status().value
    torch.autograd.grad(z, cell.b, g)
    report = recorder.reports[0].raise_for_status()
    assert max(recorder.products) > 4 + 2, "there must be restarts"
    matrices = torch.eye(12) - slopes(cell, z, x).mT
    residual = g - torch.bmm(matrices, report.value[..., None])[..., 0]
    torch.testing.assert_close(report.residual, residual.norm(dim=1) / g.norm(dim=1), rtol=1e-5, atol=1e-12)
    exact = torch.linalg.solve(matrices, g)
    assert float(((report.value - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-4


# --- identities ------------------------------------------------------------------------------------------------------


def test_one_more_application() -> None:
    r"""It changes nothing, and is one more term of a series: the layer of the source applies its map once more.

    $v + (I - J)^{-\top} J^\top v = (I - J)^{-\top} v$
    """
    cell, x, v = TanhCell(), torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    wanted = [x, *cell.parameters()]

    def gradient(estimate: eq.Gradient, again: bool) -> tuple[Tensor, ...]:
        z = eq.nn.DEQ(cell, solver=TIGHT, gradient=estimate)(x)
        return torch.autograd.grad(cell(z, x) if again else z, wanted, v)

    z = eq.nn.DEQ(cell, solver=TIGHT)(x).detach()
    w = torch.linalg.solve(torch.eye(6) - slopes(cell, z, x).mT, v)
    dense = torch.autograd.grad(cell(z, x), wanted, w)
    exact = eq.Implicit(solver=eq.GMRES(max_steps=40, rtol=0.0, atol=1e-14))
    for again in (False, True):
        torch.testing.assert_close(gradient(exact, again), dense, rtol=1e-10, atol=1e-12)
    for steps in (0, 1, 4):
        more, less = eq.Neumann(steps=steps + 1), eq.Neumann(steps=steps)
        torch.testing.assert_close(gradient(less, True), gradient(more, False), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_series(rho: float) -> None:
    """J is `rho` times an isometry, so each relative error is the power of `rho` itself; that of one step is `rho`."""
    turn = rho * torch.linalg.qr(torch.randn(6, 6)).Q
    x, v = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    exact = torch.linalg.solve(torch.eye(6) - turn.T, v.T).T
    for estimate, terms in [(eq.JacobianFree(), 0), *((eq.Neumann(steps=k), k) for k in (0, 1, 2, 5, 10))]:
        (w,) = torch.autograd.grad(solve_linear(turn, x, TIGHT, gradient=estimate).value, x, v)
        error = (w - exact).norm(dim=1) / exact.norm(dim=1)
        torch.testing.assert_close(error, torch.full((3,), rho ** (terms + 1)), rtol=1e-7, atol=0)


# --- Krylov methods --------------------------------------------------------------------------------------------------


def test_preconditioned_cg() -> None:
    """It refines what L-BFGS learned of the Hessian of log cosh(a z - x) + |z|^2 / 50, of rows that differ in scale."""
    a, target = torch.randn(20, 8), torch.randn(4, 8)
    x = torch.randn(4, 20) * torch.tensor([[0.1], [1.0], [3.0], [10.0]])

    def grad(solver: eq.Solver, start: eq.Gradient | None) -> tuple[Tensor, Tensor]:
        recorder, inputs = Recorder(solver, start), x.clone().requires_grad_()
        h = lambda z, x: torch.cosh(z @ a.T - x).log().sum(1) + z.square().sum(1) / 50  # noqa: E731
        f, forward = (
            DescentMap(h, 0 * target, (inputs,), params=()),
            eq.LBFGS(max_steps=60, memory=60, rtol=0, atol=1e-9),
        )
        z = solve_map(f, 0 * target, solver=forward, gradient=recorder.gradient).raise_for_status().value
        found = torch.autograd.grad((z - target).square().sum(), inputs)[0]
        return found, recorder.reports[0].raise_for_status().num_steps

    cg = eq.CG(max_steps=60, rtol=0, atol=1e-6)
    exact, _ = grad(eq.Broyden(max_steps=100, memory=100, rtol=1e-12), None)
    (plain, steps), (refined, fewer) = grad(cg, None), grad(cg, VANILLA)
    torch.testing.assert_close(plain, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refined, exact, rtol=1e-4, atol=1e-5)
    assert bool((fewer <= steps).all())
    assert int(fewer.sum()) < 0.8 * int(steps.sum())


@pytest.mark.parametrize("start", [None, VANILLA], ids=["g", "shine"])
@pytest.mark.parametrize("kind", [eq.CG, eq.GMRES])
@pytest.mark.thorough
def test_finite_differences(kind: Any, start: eq.Gradient | None) -> None:
    """Of first and second derivatives; for CG the map is a gradient, w^T tanh(w z + x), so that J is symmetric."""
    w = torch.randn(2, 2) / 4
    w = ((w + w.T) / 2 if kind is eq.CG else w).requires_grad_()
    x = torch.randn(1, 2, requires_grad=True)
    options = {
        "solver": eq.Broyden(max_steps=60, memory=60, rtol=1e-13),
        "gradient": eq.Implicit(solver=kind(max_steps=30, rtol=0.0, atol=1e-12), start=start),
    }

    def value(x: Tensor, w: Tensor) -> Tensor:
        f = lambda z, x: torch.tanh(z @ w.T + x) @ (w if kind is eq.CG else torch.eye(2))  # noqa: E731
        return eq.fixed_point(f, torch.zeros(1, 2), x, params=[w], **options).value

    assert torch.autograd.gradcheck(value, (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (x, w), fast_mode=True)


# --- warm starts -----------------------------------------------------------------------------------------------------


def test_sequence_of_images() -> None:
    """The adjoint of the image before is a start in a slow sequence, and not among strangers."""
    config = DenseConfig(image_size=8, image_channels=1, num_classes=10, width=32)
    model = DenseClassifier(config, solver=TIGHT)
    with torch.no_grad():
        model.deq.cell.state.weight.copy_(spectral(32, 1.2, torch.Generator().manual_seed(0)))
    first, last, labels = torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8), torch.randint(10, (16,))

    def adjoint(images: Tensor, start: Tensor | None) -> eq.Solution[Tensor]:
        recorder = Recorder(eq.GMRES(max_steps=40, memory=38, rtol=0.0, atol=1e-3), start)
        with model.deq.using(gradient=recorder.gradient):
            nn.functional.cross_entropy(model(images), labels).backward()
        return recorder.reports[0].raise_for_status()

    def ratio(frames: list[Tensor]) -> float:
        """Of the products from the adjoint of the frame before to those from the cotangent."""
        before, cold, warm = adjoint(frames[0], None).value, 0, 0
        for frame in frames[1:]:
            plain, started = adjoint(frame, None), adjoint(frame, before)
            torch.testing.assert_close(started.value, plain.value, rtol=2e-2, atol=2e-3)
            cold, warm = cold + int(plain.num_steps.sum()), warm + int(started.num_steps.sum())
            before = plain.value
        return warm / cold

    assert ratio([first + 0.003 * t * (last - first) for t in range(3)]) < 0.75
    assert ratio([first, last]) > 0.95
