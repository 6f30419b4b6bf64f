"""Penalties and probes of the Jacobian, against the dense Jacobian."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from problems import TanhCell, affine, spectral
from torch import Tensor, nn

import equipoise as eq
from equipoise.core.function_map import FunctionMap

B, D = 4, 5
TIGHT = eq.Anderson(max_steps=200, rtol=1e-12)


def solved() -> tuple[TanhCell, Tensor, eq.Solution[Tensor]]:
    """A cell, its input and its equilibrium."""
    cell, x = TanhCell(D), torch.randn(B, D)
    return cell, x, eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)


def jacobians(cell: TanhCell, z: Tensor, x: Tensor) -> Tensor:
    """Closed form, `(B, D, D)`, differentiable in weights and inputs: diag(1 - tanh^2) W."""
    return (1 - cell(z, x) ** 2)[:, :, None] * cell.w


def exhaustive(monkeypatch: pytest.MonkeyPatch, size: int = D) -> None:
    """Probes become the scaled unit vectors in turn: their average is the norm itself."""
    columns = iter(torch.eye(size) * math.sqrt(size))
    monkeypatch.setattr(torch, "randn_like", lambda t: next(columns).expand_as(t))


def test_the_penalty_of_all_unit_vectors_is_the_mean_squared_frobenius_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, solution = solved()
    exhaustive(monkeypatch)
    expected = jacobians(cell, solution.value.detach(), x).square().sum() / (B * D)
    torch.testing.assert_close(eq.nn.jacobian_penalty(solution, num_probes=D), expected)


def test_the_penalty_of_a_structured_state_is_that_of_its_flat_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x = TanhCell(D), torch.randn(B, D)

    def split(z: Tensor) -> dict[str, Tensor]:
        return {"a": z[:, :1], "b": z[:, 1:].reshape(-1, 2, 2)}

    solution = eq.fixed_point(
        lambda z, x: split(cell(torch.cat([z["a"], z["b"].flatten(1)], dim=1), x)),
        split(torch.zeros(B, D)), x, params=list(cell.parameters()), solver=TIGHT,
    )  # fmt: skip
    exhaustive(monkeypatch)
    z = torch.cat([solution.value["a"], solution.value["b"].flatten(1)], dim=1).detach()
    expected = jacobians(cell, z, x).square().sum() / (B * D)
    torch.testing.assert_close(eq.nn.jacobian_penalty(solution, num_probes=D), expected)


@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_penalty_is_right_on_average_and_more_probes_scatter_less(num_probes: int) -> None:
    cell, x, _ = solved()
    copies = 4000  # rows of a batch have probes of their own: as good as so many seeds
    x = x[:1].expand(copies, D)
    z = eq.fixed_point(cell, torch.zeros(1, D), x[:1], solver=TIGHT).value.detach()
    solution = eq.fixed_point(cell, z.expand(copies, D), x, solver=eq.Picard(rtol=1e-6))
    jacobian = jacobians(cell, z, x[:1])[0].detach()
    # J^T eps is normal with covariance J^T J =: C, so |J^T eps|^2 has mean tr C and variance 2 tr C^2.
    covariance = jacobian.T @ jacobian
    mean = covariance.trace() / D
    deviation = (2 * (covariance @ covariance).trace() / (copies * num_probes)).sqrt() / D
    errors = torch.stack([eq.nn.jacobian_penalty(solution, num_probes).detach() - mean for _ in range(8)]) / deviation
    assert float(errors.abs().max()) < 4
    assert 0.4 < float(errors.square().mean().sqrt()) < 2  # it scatters as it should, and no less


def test_the_gradient_of_the_penalty_equals_finite_differences_at_the_fixed_equilibrium() -> None:
    cell, x, _ = solved()
    x.requires_grad_()
    solution = eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)

    def penalty(*_: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same probes each time
        return eq.nn.jacobian_penalty(solution, num_probes=2)

    # Weights and inputs are perturbed in place; the equilibrium stays, for the penalty is not derived through it.
    inputs = (x, *cell.parameters())
    torch.autograd.gradcheck(penalty, inputs)
    grads = torch.autograd.grad(penalty(), inputs)
    assert all(float(grad.norm()) > 1e-3 for grad in grads)


def test_the_gradient_of_the_penalty_of_all_unit_vectors_is_that_of_dense_algebra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell, x, solution = solved()
    exhaustive(monkeypatch)
    parameters = list(cell.parameters())
    actual = torch.autograd.grad(eq.nn.jacobian_penalty(solution, num_probes=D), parameters)
    dense = jacobians(cell, solution.value.detach(), x).square().sum() / (B * D)
    torch.testing.assert_close(actual, torch.autograd.grad(dense, parameters))


def test_a_penalty_and_a_probe_cost_what_they_say_and_leave_no_gradient() -> None:
    cell, _, solution = solved()
    counts = solution.map.counts
    before = (counts.evals, counts.vjps)
    with torch.no_grad():
        eq.nn.jacobian_penalty(solution, num_probes=3)
    assert (counts.evals, counts.vjps) == (before[0] + 1, before[1] + 3)
    eq.nn.spectral_radius(solution, num_iterations=11)
    assert (counts.evals, counts.vjps) == (before[0] + 2, before[1] + 14)
    assert all(p.grad is None for p in cell.parameters())


def test_loss_and_penalty_are_trained_together() -> None:
    cell, x, solution = solved()
    torch.manual_seed(1)
    penalty = eq.nn.jacobian_penalty(solution)
    (solution.value.square().sum() + 0.5 * penalty).backward()
    torch.manual_seed(1)
    parts = eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)
    (alone,) = torch.autograd.grad(parts.value.square().sum(), cell.w)
    (penal,) = torch.autograd.grad(eq.nn.jacobian_penalty(parts), cell.w)
    torch.testing.assert_close(cell.w.grad, alone + 0.5 * penal)


@pytest.mark.parametrize("probe", [eq.nn.jacobian_penalty, eq.nn.spectral_radius])
def test_probes_meet_the_dropout_masks_of_the_solve(probe: Any) -> None:
    class Cell(TanhCell):
        def __init__(self) -> None:
            super().__init__(D)
            self.drop = eq.nn.VariationalDropout(0.5)
            self.seen: list[Tensor] = []

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.seen.append(self.drop(torch.ones_like(z)))
            return super().forward(self.drop(z), x)

    cell = Cell()
    solution = eq.fixed_point(cell, torch.zeros(B, D), torch.randn(B, D), solver=eq.Picard(max_steps=2))
    probe(solution)
    assert torch.equal(cell.seen[-1], cell.seen[0])
    assert cell.seen[0].unique().numel() == 2


# --- spectral radius -------------------------------------------------------------------------------------------------


def affine_solution(matrices: Tensor) -> eq.Solution[Tensor]:
    """A solution of z -> A z with a matrix for each sample."""
    b, d, _ = matrices.shape
    return eq.fixed_point(
        lambda z, a: (a @ z[..., None])[..., 0], torch.ones(b, d), matrices, params=(), solver=eq.Picard(max_steps=1)
    )


def with_spectrum(eigenvalues: list[float | complex], d: int = D) -> Tensor:
    """A real matrix, far from normal, with the given eigenvalues (complex ones for themselves and their conjugates)."""
    blocks = [
        torch.tensor([[v.real, v.imag], [-v.imag, v.real]]) if isinstance(v, complex) else torch.tensor([[v]])
        for v in eigenvalues
    ]
    diagonal = torch.block_diag(*blocks)
    assert diagonal.shape == (d, d)
    basis = torch.randn(d, d)
    return basis @ diagonal @ torch.linalg.inv(basis)


def test_the_spectral_radius_of_each_sample_is_that_of_its_dense_jacobian() -> None:
    cell, x, _ = solved()
    x = x * torch.tensor([0.1, 1.0, 3.0, 0.5])[:, None]
    solution = eq.fixed_point(cell, torch.zeros(B, D), x, solver=TIGHT)
    dense = torch.linalg.eigvals(jacobians(cell, solution.value, x).detach()).abs().amax(dim=1)
    assert dense.unique().numel() == B
    with torch.no_grad():
        torch.testing.assert_close(eq.nn.spectral_radius(solution, 600), dense, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("eigenvalues", "radius", "rtol"),
    [
        ([0.9, 0.5, 0.3, 0.2, 0.1], 0.9, 1e-8),
        ([-1.7, 0.5, 0.3, 0.2, 0.1], 1.7, 1e-8),
        ([0.6 + 0.8j, 0.5, 0.3, 0.1], 1.0, 0.02),  # a complex pair: the growth of a vector oscillates
        ([0.2 + 1.9j, -0.3 + 0.3j, 1.0], 1.9105, 0.02),
        ([0.95, -0.95, 0.3, 0.2, 0.1], 0.95, 0.01),  # two of the same size
    ],
)
def test_the_spectral_radius_of_unsymmetric_matrices(
    eigenvalues: list[float | complex], radius: float, rtol: float
) -> None:
    matrices = torch.stack([with_spectrum(eigenvalues) for _ in range(3)])
    torch.testing.assert_close(
        torch.linalg.eigvals(matrices).abs().amax(dim=1), torch.full((3,), radius), rtol=1e-4, atol=0
    )
    estimates = eq.nn.spectral_radius(affine_solution(matrices), num_iterations=400)
    torch.testing.assert_close(estimates, torch.full((3,), radius), rtol=rtol, atol=0)
    assert bool((torch.linalg.matrix_norm(matrices, 2) > 1.05 * radius).all()), "not the norm"


def test_the_spectral_radius_of_a_rotation_is_its_length_and_of_a_constant_zero() -> None:
    rotation = 1.5 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    nilpotent = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    estimates = eq.nn.spectral_radius(affine_solution(torch.stack([rotation, nilpotent])))
    torch.testing.assert_close(estimates, torch.tensor([1.5, 0.0]), atol=1e-12, rtol=1e-12)
    x = torch.randn(2, 3)
    constant = eq.fixed_point(lambda z, x: x.sin(), torch.zeros(2, 3), x, params=())
    assert eq.nn.spectral_radius(constant).tolist() == [0.0, 0.0]


def test_the_penalty_of_a_map_that_ignores_its_state_is_zero() -> None:
    constant = eq.fixed_point(lambda z, x: x.sin(), torch.zeros(2, 3), torch.randn(2, 3), params=())
    assert float(eq.nn.jacobian_penalty(constant)) == 0.0


def test_probes_work_on_closures_and_after_dropping_rows() -> None:
    problem = affine(batch=6, d=D)
    (x,) = problem.inputs
    x = x * torch.logspace(-3, 1, 6)[:, None]
    a = spectral(D, 0.7, torch.Generator().manual_seed(1))  # the matrix of the problem
    radius = float(torch.linalg.eigvals(a).abs().max())
    for solution in (
        eq.fixed_point(problem.f, torch.zeros_like(x), x, params=(), solver=eq.Picard(max_steps=200, atol=1e-6)),
        eq.fixed_point(lambda z: problem.f(z, x), torch.zeros_like(x), solver=TIGHT),
    ):
        estimates = eq.nn.spectral_radius(solution, 400)
        torch.testing.assert_close(estimates, torch.full((6,), radius), rtol=0.02, atol=0)


# --- misuse ----------------------------------------------------------------------------------------------------------


def test_misuse_is_named() -> None:
    _, _, solution = solved()
    for num_probes in (0, -1):
        with pytest.raises(ValueError, match=rf"num_probes={num_probes}: must be >= 1"):
            eq.nn.jacobian_penalty(solution, num_probes)
    with pytest.raises(ValueError, match="num_iterations=1: must be >= 2"):
        eq.nn.spectral_radius(solution, 1)
    bare = dataclasses.replace(solution, map=None)
    for probe in (eq.nn.jacobian_penalty, eq.nn.spectral_radius):
        with pytest.raises(ValueError, match=r"carries no map; take it from DEQ.solve or fixed_point"):
            probe(bare)


def test_the_map_of_a_solution_is_that_of_its_layer() -> None:
    layer = eq.nn.DEQ(nn.Sequential(nn.Linear(D, D), nn.Tanh()), init=lambda: torch.zeros(B, D))
    assert isinstance(layer.solve().map, FunctionMap)
