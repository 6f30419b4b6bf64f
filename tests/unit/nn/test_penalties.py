"""Penalties and probes of the Jacobian, against the dense Jacobian."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from problems import TanhCell, affine, product, spectral
from torch import Tensor, nn

import equipoise as eq

B, D = 4, 5
TIGHT = eq.Anderson(max_steps=200, rtol=1e-12)


def solved() -> tuple[TanhCell, Tensor, eq.Solution[Tensor]]:
    """A cell, its input and its equilibrium."""
    cell, x = TanhCell(D), torch.randn(B, D, requires_grad=True)
    return cell, x, eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)


def jacobians(cell: TanhCell, z: Tensor, x: Tensor) -> Tensor:
    """Closed form, `(B, D, D)`, differentiable in weights and inputs: diag(1 - tanh^2) W."""
    return (1 - cell(z, x) ** 2)[:, :, None] * cell.w


# --- the penalty -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_unit_vectors(structured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty of all is the mean squared Frobenius norm, and so are their gradients, of any state."""
    cell, x, solution = solved()
    parameters, z = list(cell.parameters()), solution.value.detach()
    if structured:
        split = lambda z: {"a": z[:, :1], "b": z[:, 1:].reshape(-1, 2, 2)}  # noqa: E731
        f = lambda z, x: split(cell(torch.cat([z["a"], z["b"].flatten(1)], dim=1), x))  # noqa: E731
        solution = eq.fixed_point(f, split(torch.zeros(B, D)), x, params=parameters, solver=TIGHT)
    columns = iter(torch.eye(D) * math.sqrt(D))
    monkeypatch.setattr(torch, "randn_like", lambda t: next(columns).expand_as(t))
    penalty, expected = eq.nn.jacobian_penalty(solution, num_probes=D), jacobians(cell, z, x).square().sum() / (B * D)
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, parameters) for value in (penalty, expected)))


@pytest.mark.parametrize("num_probes", [1, 4])
def test_average(num_probes: int) -> None:
    """It is right, and more probes scatter less; rows of a batch have probes of their own: as good as so many seeds."""
    cell, x, _ = solved()
    copies = 4000
    z = eq.fixed_point(cell, torch.zeros(1, D), x[:1], solver=TIGHT).value.detach()
    solution = eq.fixed_point(cell, z.expand(copies, D), x[:1].expand(copies, D), solver=eq.Picard(rtol=1e-6))
    jacobian = jacobians(cell, z, x[:1])[0].detach()
    # J^T eps is normal with covariance J^T J =: C, so |J^T eps|^2 has mean tr C and variance 2 tr C^2.
    covariance = jacobian.T @ jacobian
    deviation = (2 * (covariance @ covariance).trace() / (copies * num_probes)).sqrt()
    penalties = torch.stack([eq.nn.jacobian_penalty(solution, num_probes).detach() for _ in range(8)])
    errors = (D * penalties - covariance.trace()) / deviation
    assert float(errors.abs().max()) < 4
    assert 0.4 < float(errors.square().mean().sqrt()) < 2  # it scatters as it should, and no less


def test_finite_differences() -> None:
    """Weights and inputs are perturbed in place; the equilibrium stays, for the penalty is not derived through it."""
    cell, x, solution = solved()

    def penalty(*_: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same probes each time
        return eq.nn.jacobian_penalty(solution, num_probes=2)

    inputs = (x, *cell.parameters())
    torch.autograd.gradcheck(penalty, inputs)
    assert all(float(grad.norm()) > 1e-3 for grad in torch.autograd.grad(penalty(), inputs))


def test_costs() -> None:
    """One evaluation, a product for each probe or iteration, and no gradient left."""
    cell, _, solution = solved()
    counts, evals, vjps = solution.map.counts, solution.map.counts.evals, solution.map.counts.vjps
    with torch.no_grad():
        eq.nn.jacobian_penalty(solution, num_probes=3)
    assert (counts.evals, counts.vjps) == (evals + 1, vjps + 3)
    eq.nn.jacobian_penalty(solution)
    assert (counts.evals, counts.vjps) == (evals + 2, vjps + 4)
    eq.nn.spectral_radius(solution, num_iterations=11)
    assert (counts.evals, counts.vjps) == (evals + 3, vjps + 15)
    eq.nn.spectral_radius(solution)
    assert (counts.evals, counts.vjps) == (evals + 4, vjps + 115)
    assert all(p.grad is None for p in cell.parameters())


def test_loss_and_penalty() -> None:
    """They are trained together."""
    cell, x, solution = solved()
    grads = []
    for loss, weight in ((1, 0.5), (1, 0), (0, 0.5)):
        torch.manual_seed(1)
        solution = eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)
        total = loss * solution.value.square().sum() + weight * eq.nn.jacobian_penalty(solution)
        grads.append(torch.autograd.grad(total, cell.w)[0])
    torch.testing.assert_close(grads[0], grads[1] + grads[2])


@pytest.mark.parametrize("probe", [eq.nn.jacobian_penalty, eq.nn.spectral_radius])
def test_dropout_masks(probe: Any) -> None:
    """Probes meet those of the solve."""

    class Cell(TanhCell):
        def __init__(self) -> None:
            super().__init__(D)
            self.drop = eq.nn.VariationalDropout(0.5)
            self.seen: list[Tensor] = []

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.seen.append(self.drop(torch.ones_like(z)))
            return super().forward(self.drop(z), x)

    cell = Cell()
    probe(eq.fixed_point(cell, torch.zeros(B, D), torch.randn(B, D), solver=eq.Picard(max_steps=2)))
    assert torch.equal(cell.seen[-1], cell.seen[0])
    assert cell.seen[0].unique().numel() == 2


# --- spectral radius -------------------------------------------------------------------------------------------------


def radius(matrices: Tensor, num_iterations: int = 100) -> Tensor:
    """Of the maps z -> A z, a matrix for each sample."""
    z0, solver = matrices.new_ones(matrices.shape[:2]), eq.Picard(max_steps=1)
    solution = eq.fixed_point(lambda z, a: product(a, z), z0, matrices, params=(), solver=solver)
    return eq.nn.spectral_radius(solution, num_iterations)


def with_spectrum(eigenvalues: list[float | complex]) -> Tensor:
    """A real matrix, far from normal, with the given eigenvalues (complex ones for themselves and their conjugates)."""
    blocks = [
        torch.tensor([[v.real, v.imag], [-v.imag, v.real]]) if isinstance(v, complex) else torch.tensor([[v]])
        for v in eigenvalues
    ]
    basis = torch.randn(D, D)
    return basis @ torch.block_diag(*blocks) @ torch.linalg.inv(basis)


def test_dense_jacobian() -> None:
    cell, x, _ = solved()
    x = x.detach() * torch.tensor([0.1, 1.0, 3.0, 0.5])[:, None]
    solution = eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)
    dense = torch.linalg.eigvals(jacobians(cell, solution.value, x).detach()).abs().amax(dim=1)
    assert dense.unique().numel() == B
    with torch.no_grad():
        torch.testing.assert_close(eq.nn.spectral_radius(solution, 600), dense, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("eigenvalues", "expected", "rtol"),
    [
        ([0.9, 0.5, 0.3, 0.2, 0.1], 0.9, 1e-8),
        ([-1.7, 0.5, 0.3, 0.2, 0.1], 1.7, 1e-8),
        ([0.6 + 0.8j, 0.5, 0.3, 0.1], 1.0, 0.02),  # a complex pair: the growth of a vector oscillates
        ([0.2 + 1.9j, -0.3 + 0.3j, 1.0], 1.9105, 0.02),
        ([0.95, -0.95, 0.3, 0.2, 0.1], 0.95, 0.01),  # two of the same size
    ],
)
def test_unsymmetric(eigenvalues: list[float | complex], expected: float, rtol: float) -> None:
    matrices = torch.stack([with_spectrum(eigenvalues) for _ in range(3)])
    exact = torch.full((3,), expected)
    torch.testing.assert_close(torch.linalg.eigvals(matrices).abs().amax(dim=1), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(radius(matrices, 400), exact, rtol=rtol, atol=0)
    assert bool((torch.linalg.matrix_norm(matrices, 2) > 1.05 * expected).all()), "not the norm"


def test_exact_values() -> None:
    """Of a rotation its length, of a nilpotent and of a constant map zero; the penalty of the latter is zero."""
    matrices = torch.tensor([[[0.9, -1.2], [1.2, 0.9]], [[0.0, 5.0], [0.0, 0.0]]])
    torch.testing.assert_close(radius(matrices), torch.tensor([1.5, 0.0]), atol=1e-12, rtol=1e-12)
    constant = eq.fixed_point(lambda z, x: x.sin(), torch.zeros(2, 3), torch.randn(2, 3), params=())
    assert eq.nn.spectral_radius(constant).tolist() == [0.0, 0.0]
    assert float(eq.nn.jacobian_penalty(constant)) == 0.0


@pytest.mark.parametrize("closure", [False, True])
def test_dropped_rows_and_closures(closure: bool) -> None:
    problem = affine(batch=6, d=D)
    x = problem.inputs[0] * torch.logspace(-3, 1, 6)[:, None]
    expected = torch.linalg.eigvals(spectral(D, 0.7, torch.Generator().manual_seed(1))).abs().max()
    f, inputs = (lambda z: problem.f(z, x), ()) if closure else (problem.f, (x,))
    solver = eq.Picard(max_steps=200, atol=1e-6)
    solution = eq.fixed_point(f, torch.zeros_like(x), *inputs, solver=solver, params=None if closure else ())
    torch.testing.assert_close(eq.nn.spectral_radius(solution, 400), expected.expand(6), rtol=0.02, atol=0)


def test_misuse() -> None:
    _, _, solution = solved()
    for num_probes in (0, -1):
        with pytest.raises(ValueError, match=rf"num_probes={num_probes}: must be >= 1"):
            eq.nn.jacobian_penalty(solution, num_probes)
    with pytest.raises(ValueError, match="num_iterations=1: must be >= 2"):
        eq.nn.spectral_radius(solution, 1)
    assert eq.nn.spectral_radius(solution, 2).shape == (B,)
    for probe in (eq.nn.jacobian_penalty, eq.nn.spectral_radius):
        with pytest.raises(ValueError, match=r"map; take it from DEQ.solve or fixed_point"):
            probe(dataclasses.replace(solution, map=None))


def test_map_of_a_layer() -> None:
    layer = eq.nn.DEQ(nn.Sequential(nn.Linear(D, D), nn.Tanh()), init=lambda: torch.zeros(B, D))
    assert isinstance(layer.solve().map, eq.FunctionMap)
