"""The adjoint equation: what its tolerance means, what it costs, and what a start from a step before saves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import TanhCell, spectral
from torch import Tensor, nn

import equipoise as eq
from equipoise.zoo import DenseClassifier, DenseConfig

TIGHT = eq.Anderson(max_steps=300, rtol=1e-13)
ADJOINTS = [
    eq.GMRES(max_steps=40, memory=38, rtol=0.0, atol=5e-3),
    eq.GMRES(max_steps=60, memory=3, rtol=0.0, atol=5e-3),
    eq.Anderson(max_steps=100, rtol=0.0, atol=5e-3),
    eq.Broyden(max_steps=40, memory=40, rtol=0.0, atol=5e-3),
    eq.SteadyState(max_steps=300, rtol=0.0, atol=5e-3),
]


class Recorder:
    """A gradient whose adjoint solves are kept, and the layer's answer to a cotangent."""

    def __init__(self, solver: eq.Solver, start: eq.Gradient | Tensor | None = None) -> None:
        self.reports: list[eq.Solution[Tensor]] = []
        self.gradient = eq.Implicit(solver=solver, start=start, observe=self.reports.append)

    @property
    def products(self) -> list[int]:
        return self.reports[-1].num_steps.tolist()


# --- the tolerance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ADJOINTS, ids=["gmres", "restarted", "anderson", "broyden", "flow"])
def test_scaling_the_loss_changes_no_count(solver: eq.Solver) -> None:
    """An absolute tolerance of 5e-2, as in the source, takes a mean-reduced loss for solved before the first product:
    what it then returns is the one-step gradient."""
    torch.manual_seed(1)
    cell, x, y = TanhCell(d=10, norm=0.95), torch.randn(6, 10), torch.randn(6, 10)
    recorder = Recorder(solver)
    layer = eq.nn.DEQ(cell, solver=TIGHT, gradient=recorder.gradient)
    counts, directions = [], []
    for scale in (1.0, 1e-3, 1e-9):
        loss = scale * (layer(x) - y).square().mean()
        (grad,) = torch.autograd.grad(loss, cell.w)
        counts.append(recorder.products)
        directions.append(grad / scale)
        assert bool(recorder.reports[-1].converged.all())
    assert counts[0] == counts[1] == counts[2]
    assert min(counts[0]) > 3
    for direction in directions[1:]:
        torch.testing.assert_close(direction, directions[0], rtol=1e-9, atol=1e-12)


def test_one_product_is_enough_where_the_cotangent_meets_the_tolerance_and_nowhere_else() -> None:
    """The start is g, whose residual is J^T g: the first product tells |J^T g| / |g|, whatever the length of g."""
    size = torch.tensor([4e-3, 6e-3, 4e-3, 6e-3])[:, None]
    g = torch.ones(4, 3) * torch.tensor([[1.0], [1.0], [1e-6], [1e6]])
    for rtol, atol in ((0.0, 5e-3), (5e-3, 0.0)):
        recorder = Recorder(eq.GMRES(max_steps=20, rtol=rtol, atol=atol))
        x = torch.randn(4, 3, requires_grad=True)
        z = eq.fixed_point(
            lambda z, x, s: s * z + x, torch.zeros(4, 3), x, size, params=(), solver=TIGHT, gradient=recorder.gradient
        ).value
        torch.autograd.grad(z, x, g)
        assert [count == 1 for count in recorder.products] == [True, False, True, False]
        report = recorder.reports[0]
        torch.testing.assert_close(report.residual[[0, 2]], size[[0, 2], 0])
        assert float(report.residual.max()) <= 5e-3


@pytest.mark.parametrize("start", [None, eq.Shine(fallback_ratio=math.inf)], ids=["g", "shine"])
def test_restarts_reach_the_tolerance_and_report_the_residual_of_dense_algebra(start: eq.Gradient | None) -> None:
    cell, x, g = TanhCell(d=12, norm=2.0), torch.randn(5, 12), torch.randn(5, 12)
    recorder = Recorder(eq.GMRES(max_steps=200, memory=4, rtol=0.0, atol=1e-6), start)
    layer = eq.nn.DEQ(cell, solver=eq.Broyden(max_steps=80, memory=80, rtol=1e-7), gradient=recorder.gradient)
    z = layer.solve(x).raise_for_status().value
    torch.autograd.grad(z, cell.b, g)
    report = recorder.reports[0].raise_for_status()
    assert max(recorder.products) > 4 + 2, "there must be restarts"
    jacobian = ((1 - cell(z, x) ** 2)[..., None] * cell.w).detach()
    residual = torch.bmm(jacobian.mT, report.value[..., None])[..., 0] + g - report.value
    torch.testing.assert_close(report.residual, residual.norm(dim=1) / g.norm(dim=1), rtol=1e-5, atol=1e-12)
    exact = torch.linalg.solve(torch.eye(12) - jacobian.mT, g)
    assert float(((report.value - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-4


# --- identities ------------------------------------------------------------------------------------------------------


def test_one_more_tracked_application_changes_nothing_and_is_one_more_term_of_a_series() -> None:
    r"""$v + (I - J)^{-\top} J^\top v = (I - J)^{-\top} v$: the layer of the source applies its map once more."""
    cell, x, v = TanhCell(), torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    wanted = [x, *cell.parameters()]
    exact = eq.Implicit(solver=eq.GMRES(max_steps=40, rtol=0.0, atol=1e-14))

    def gradient(estimate: eq.Gradient, again: bool) -> tuple[Tensor, ...]:
        z = eq.nn.DEQ(cell, solver=TIGHT, gradient=estimate)(x)
        return torch.autograd.grad(cell(z, x) if again else z, wanted, v)

    z = eq.nn.DEQ(cell, solver=TIGHT)(x).detach()
    jacobian = ((1 - z**2)[..., None] * cell.w).detach()
    w = torch.linalg.solve(torch.eye(6) - jacobian.mT, v)
    pushed = torch.linalg.solve(torch.eye(6) - jacobian.mT, torch.bmm(jacobian.mT, v[..., None])[..., 0])
    torch.testing.assert_close(v + pushed, w, rtol=1e-12, atol=1e-13)
    dense = torch.autograd.grad(cell(z, x), wanted, w)
    for again in (False, True):
        torch.testing.assert_close(gradient(exact, again), dense, rtol=1e-10, atol=1e-12)
    for steps in (0, 1, 4):
        torch.testing.assert_close(
            gradient(eq.Neumann(steps=steps), True), gradient(eq.Neumann(steps=steps + 1), False), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_the_error_of_a_series_falls_by_the_spectral_radius_with_every_term(rho: float) -> None:
    """J is `rho` times an isometry, so each relative error is the power of `rho` itself; that of one step is `rho`."""
    turn = rho * torch.linalg.qr(torch.randn(6, 6)).Q
    x, v = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    exact = torch.linalg.solve(torch.eye(6) - turn.T, v.T).T
    for estimate, terms in [(eq.JacobianFree(), 0), *((eq.Neumann(steps=k), k) for k in (0, 1, 2, 5, 10))]:
        z = eq.fixed_point(
            lambda z, x: z @ turn.T + x, torch.zeros(3, 6), x, params=(), solver=TIGHT, gradient=estimate
        ).value
        (w,) = torch.autograd.grad(z, x, v)
        error = (w - exact).norm(dim=1) / exact.norm(dim=1)
        torch.testing.assert_close(error, torch.full((3,), rho ** (terms + 1)), rtol=1e-7, atol=0)


# --- warm starts -----------------------------------------------------------------------------------------------------


def adjoint(model: DenseClassifier, images: Tensor, labels: Tensor, start: Tensor | None) -> eq.Solution[Tensor]:
    recorder = Recorder(dataclasses.replace(ADJOINTS[0], atol=1e-3), start)
    with model.deq.using(gradient=recorder.gradient):
        nn.functional.cross_entropy(model(images), labels).backward()
    return recorder.reports[0].raise_for_status()


def test_the_adjoint_of_the_image_before_is_a_start_in_a_slow_sequence_and_not_among_strangers() -> None:
    config = DenseConfig(image_size=8, image_channels=1, num_classes=10, width=32)
    model = DenseClassifier(config, solver=TIGHT)
    with torch.no_grad():
        model.deq.cell.state.weight.copy_(spectral(32, 1.2, torch.Generator().manual_seed(0)))
    first, last, labels = torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8), torch.randint(10, (16,))

    def products(frames: list[Tensor]) -> tuple[float, float]:
        """Mean of a sample, from the cotangent and from the adjoint of the frame before."""
        before, cold, warm = adjoint(model, frames[0], labels, None).value, 0.0, 0.0
        for frame in frames[1:]:
            plain = adjoint(model, frame, labels, None)
            started = adjoint(model, frame, labels, before)
            torch.testing.assert_close(started.value, plain.value, rtol=2e-2, atol=2e-3)
            cold, warm = cold + float(plain.num_steps.sum()), warm + float(started.num_steps.sum())
            before = plain.value
        return cold / (16 * (len(frames) - 1)), warm / (16 * (len(frames) - 1))

    cold, warm = products([first + 0.003 * t * (last - first) for t in range(3)])
    assert warm < 0.75 * cold, (cold, warm)
    cold, warm = products([first, last])
    assert warm > 0.95 * cold, (cold, warm)
