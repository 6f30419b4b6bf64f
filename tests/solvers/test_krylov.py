"""CG and GMRES against SciPy's, row by row, and against dense algebra."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import equipoise as eq
from equipoise.map import Map


@dataclasses.dataclass(frozen=True)
class System:
    """`A w = b` of each row, as the fixed point of `w - A w + b`."""

    a: Tensor  # (B, d, d)
    b: Tensor  # (B, d)
    w0: Tensor  # (B, d)

    @staticmethod
    def f(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return w - torch.bmm(a, w[..., None])[..., 0] + b

    def solve(self, solver: eq.Solver, rows: Any = slice(None), **options: Any) -> eq.Solution[Tensor]:
        w0 = self.w0[rows]
        return solver.solve(Map(self.f, w0, (self.a[rows], self.b[rows]), params=()), w0, **options)

    def to(self, dtype: torch.dtype) -> System:
        return System(self.a.to(dtype), self.b.to(dtype), self.w0.to(dtype))

    @property
    def exact(self) -> Tensor:
        return torch.linalg.solve(self.a, self.b)

    def residual(self, w: Tensor) -> Tensor:
        return (self.f(w, self.a, self.b) - w).norm(dim=1)


def orthogonal(batch: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(batch, d, d))[0]


def symmetric(batch: int = 5, d: int = 12) -> System:
    """Positive definite, each row with a spectrum of its own; that of row 3 is one number."""
    q = orthogonal(batch, d)
    spread = torch.linspace(0.0, 1.5, batch).roll(3)[:, None]
    eigenvalues = 10.0 ** (spread * torch.linspace(-0.5, 1, d))
    return System(q @ torch.diag_embed(eigenvalues) @ q.mT, torch.randn(batch, d), torch.randn(batch, d))


def inverse_estimate(matrices: Tensor) -> eq.InverseEstimate:
    b, d, _ = matrices.shape
    return eq.InverseEstimate.of(torch.ones(b), torch.eye(d).repeat(b, 1, 1), matrices - torch.eye(d))


def near_inverse(system: System) -> Tensor:
    """Symmetric positive definite, of no simple relation to the inverse."""
    noise = torch.randn_like(system.a) * 10.0 ** torch.linspace(-3, 0, len(system.a))[:, None, None]
    return torch.linalg.inv(system.a + noise @ noise.mT)


def scipy_cg(system: System, row: int, steps: int, m: Tensor | None = None) -> list[float]:
    """Norms of the residuals of SciPy's iterates, first to last."""
    a, b = system.a[row].numpy(), system.b[row].numpy()
    iterates = [system.w0[row].numpy()]
    scipy.sparse.linalg.cg(
        a, b, x0=iterates[0], rtol=0, atol=1e-13, maxiter=steps, M=None if m is None else m[row].numpy(),
        callback=lambda x: iterates.append(x.copy()),
    )  # fmt: skip
    return [float(np.linalg.norm(b - a @ x)) for x in iterates]


def history(solver: eq.Solver, system: System, products: int, **options: Any) -> Tensor:
    """Residuals `(products + 1, B)` of the iterates after 0, 1, ... products, each the last point of its own solve."""
    lines = []
    for k in range(products + 1):
        budget = dataclasses.replace(solver, max_steps=1 if k == 0 else k + 2, rtol=0)
        solution = system.solve(budget, trace=True, **options)
        assert solution.trace is not None
        assert solution.num_evals == budget.max_steps
        lines.append(solution.trace[-1])
    return torch.stack(lines)


# --- conjugate gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_has_the_residuals_of_scipy_row_by_row(preconditioned: bool) -> None:
    system = symmetric()
    m = near_inverse(system) if preconditioned else None
    ours = history(eq.CG(), system, 8, preconditioner=None if m is None else inverse_estimate(m))
    for row in range(5):
        theirs = torch.tensor(scipy_cg(system, row, 8, m))
        torch.testing.assert_close(ours[: len(theirs), row], theirs, rtol=1e-8, atol=1e-12)
    assert bool((ours[8] < 1e-2 * ours[0]).sum() >= 3)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_spends_the_products_of_scipy_a_first_residual_and_a_verification(preconditioned: bool) -> None:
    system = symmetric()
    m = near_inverse(system) if preconditioned else None
    solution = system.solve(
        eq.CG(max_steps=60, rtol=0, atol=0.02), preconditioner=None if m is None else inverse_estimate(m)
    ).raise_for_status()
    norms = [scipy_cg(system, row, 40, m) for row in range(5)]
    products = [next(k for k, norm in enumerate(column) if norm <= 0.02) for column in norms]
    assert solution.num_steps.tolist() == [k + 2 for k in products]
    assert len(set(products)) >= 3, "the rows must be in different phases for this test to say something"
    assert solution.num_evals == max(products) + 2
    torch.testing.assert_close(solution.residual, system.residual(solution.value), rtol=1e-8, atol=1e-13)


def test_cg_ends_after_as_many_products_as_there_are_different_eigenvalues() -> None:
    q = orthogonal(4, 10)
    levels = torch.tensor([1.0, 2.0, 5.0, 9.0])
    eigenvalues = torch.stack([levels[:k].repeat(10)[:10] for k in (1, 2, 3, 4)])
    system = System(q @ torch.diag_embed(eigenvalues) @ q.mT, torch.randn(4, 10), torch.zeros(4, 10))
    solution = system.solve(eq.CG(rtol=0, atol=1e-10)).raise_for_status()
    assert solution.num_steps.tolist() == [3, 4, 5, 6]


def test_a_preconditioner_that_is_the_inverse_ends_after_one_product() -> None:
    system = symmetric()
    solution = system.solve(eq.CG(rtol=0, atol=1e-10), preconditioner=inverse_estimate(torch.linalg.inv(system.a)))
    assert solution.raise_for_status().num_steps.tolist() == [3] * 5


def test_cg_does_what_its_steps_allow() -> None:
    system = symmetric()
    start = system.residual(system.w0)
    none, one, two, three = (system.solve(eq.CG(max_steps=k, rtol=0), trace=True) for k in range(4))
    assert none.num_evals == 0
    assert torch.equal(none.value, system.w0)
    torch.testing.assert_close(one.residual, start)
    assert two.trace is not None
    assert three.trace is not None
    # With two there is no room for a product and its verification: one step of the map.
    torch.testing.assert_close(two.trace[1], system.residual(system.f(system.w0, system.a, system.b)))
    r = system.f(system.w0, system.a, system.b) - system.w0
    alpha = r.square().sum(1) / torch.einsum("bi,bij,bj->b", r, system.a, r)
    torch.testing.assert_close(three.trace[2], system.residual(system.w0 + alpha[:, None] * r))


def test_refreshing_replaces_the_residual_and_keeps_the_directions_conjugate() -> None:
    system = symmetric()
    seldom = system.solve(eq.CG(max_steps=100, rtol=0, atol=1e-8)).raise_for_status()
    often = system.solve(eq.CG(max_steps=100, rtol=0, atol=1e-8, refresh=2)).raise_for_status()
    products = seldom.num_steps - 2
    # An evaluation after every second product, the last one at the end; rounding differs.
    assert (often.num_steps - 1 - (products + 1) // 2 - products).abs().max() <= 2


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_reaches_its_precision_where_steps_are_short_against_the_iterate(offset: float) -> None:
    system = symmetric()
    w = system.exact + offset
    system = System(system.a, torch.bmm(system.a, w[..., None])[..., 0], w + 1e-2 * torch.randn(5, 12)).to(
        torch.float32
    )
    solution = system.solve(eq.CG(max_steps=40, rtol=1e-5)).raise_for_status()
    exact = system.to(torch.float64)
    assert bool((exact.residual(solution.value.double()) <= 1.2e-5 * solution.value.norm(dim=1)).all())
    double = exact.solve(eq.CG(max_steps=40, rtol=1e-5)).raise_for_status()
    assert bool((solution.num_steps <= double.num_steps + 3).all())


def test_a_row_that_is_not_positive_definite_ends_as_a_status_and_disturbs_no_other() -> None:
    system = symmetric()
    clean = system.solve(eq.CG(max_steps=40, rtol=0, atol=1e-8))
    system.a[1] -= 2 * torch.eye(12)
    solution = system.solve(eq.CG(max_steps=40, rtol=0, atol=1e-8))
    assert solution.status.tolist() == [0, eq.Status.MAX_STEPS, 0, 0, 0]
    assert bool(solution.value.isfinite().all())
    assert solution.residual[1] <= system.residual(system.w0)[1]
    others = [0, 2, 3, 4]
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-9, atol=1e-10)
    patient = system.solve(eq.CG(max_steps=400, rtol=0, atol=1e-8, patience=30))
    assert patient.status[1] == eq.Status.STALLED
    negative = dataclasses.replace(system, a=-symmetric().a)
    assert negative.solve(eq.CG(max_steps=20, rtol=0, atol=1e-8)).status.tolist() == [eq.Status.MAX_STEPS] * 5
