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
from equipoise.core.function_map import FunctionMap


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
        return solver.solve(FunctionMap(self.f, w0, (self.a[rows], self.b[rows]), params=()), w0, **options)

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
    eigenvalues = 2 * 10.0 ** (spread * torch.linspace(-0.5, 1, d))
    return System(q @ torch.diag_embed(eigenvalues) @ q.mT, torch.randn(batch, d), torch.randn(batch, d))


def inverse_estimate(matrices: Tensor) -> eq.InverseEstimate:
    b, d, _ = matrices.shape
    return eq.InverseEstimate.of(torch.ones(b), torch.eye(d).repeat(b, 1, 1), matrices - torch.eye(d))


def near_inverse(system: System) -> Tensor:
    """Symmetric positive definite, of no simple relation to the inverse."""
    noise = torch.randn_like(system.a) * 10.0 ** torch.linspace(-1.5, 0, len(system.a))[:, None, None]
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
    levels = torch.tensor([2.0, 3.0, 5.0, 9.0])
    eigenvalues = torch.stack([levels[:k].repeat(10)[:10] for k in (1, 2, 3, 4)])
    system = System(q @ torch.diag_embed(eigenvalues) @ q.mT, torch.randn(4, 10), torch.zeros(4, 10))
    solution = system.solve(eq.CG(rtol=0, atol=1e-10)).raise_for_status()
    assert solution.num_steps.tolist() == [3, 4, 5, 6]


def test_a_preconditioner_that_is_a_multiple_of_the_inverse_ends_after_one_product() -> None:
    system = symmetric()
    for solver in (eq.CG(rtol=0, atol=1e-10), eq.GMRES(rtol=0, atol=1e-10)):
        solution = system.solve(solver, preconditioner=inverse_estimate(0.7 * torch.linalg.inv(system.a)))
        assert solution.raise_for_status().num_steps.tolist() == [3] * 5


def test_the_first_product_is_met_at_a_newton_step_from_zero() -> None:
    system = symmetric()
    system = System(system.a, system.b, torch.zeros(5, 12))
    exact = inverse_estimate(torch.linalg.inv(system.a))
    for solver in (eq.CG(rtol=0, atol=1e-10), eq.GMRES(rtol=0, atol=1e-10)):
        constant = System(torch.eye(12).repeat(5, 1, 1), system.b, system.w0).solve(solver)
        assert constant.raise_for_status().num_steps.tolist() == [2] * 5
        known = system.solve(solver, preconditioner=exact).raise_for_status()
        assert known.num_steps.tolist() == [2] * 5


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


# --- GMRES ---------------------------------------------------------------------------------------------------------


def nonsymmetric(batch: int = 5, d: int = 12) -> System:
    """Rows from the neighborhood of the identity to far from it."""
    a = torch.eye(d) + torch.linspace(0.1, 2, batch)[:, None, None] * torch.randn(batch, d, d) / d**0.5
    return System(a, torch.randn(batch, d), torch.randn(batch, d))


def least_residuals(system: System, row: int, products: int, m: Tensor) -> list[float]:
    """`min |r_0 - A M K y|` over Krylov spaces `K` of `A M`, by dense least squares."""
    r = (system.b - torch.bmm(system.a, system.w0[..., None])[..., 0])[row]
    norms, basis = [float(r.norm())], [r / r.norm()]
    for _ in range(products):
        images = torch.stack([system.a[row] @ m[row] @ v for v in basis], dim=1)
        norms.append(float((r - images @ torch.linalg.lstsq(images, r[:, None]).solution[:, 0]).norm()))
        basis.append(torch.linalg.qr(torch.cat([torch.stack(basis, dim=1), images[:, -1:]], dim=1))[0][:, -1])
    return norms


def test_gmres_has_the_residuals_of_scipy_row_by_row() -> None:
    system = nonsymmetric()
    ours = history(eq.GMRES(), system, 6)
    for row in range(5):
        a, b, w0 = (x[row].numpy() for x in (system.a, system.b, system.w0))
        for k in range(1, 7):
            w, _ = scipy.sparse.linalg.gmres(a, b, x0=w0, rtol=0, atol=0, restart=k, maxiter=1)
            assert float(ours[k, row]) == pytest.approx(np.linalg.norm(b - a @ w), rel=1e-7)


def test_gmres_makes_the_true_residual_least_with_a_preconditioner() -> None:
    system = nonsymmetric()
    m = torch.linalg.inv(system.a + 0.1 * torch.randn_like(system.a))
    ours = history(eq.GMRES(), system, 6, preconditioner=inverse_estimate(m))
    for row in range(5):
        theirs = torch.tensor(least_residuals(system, row, 6, m))
        torch.testing.assert_close(ours[:, row], theirs, rtol=1e-8, atol=1e-12)


def test_gmres_restarts_as_scipy_does() -> None:
    system = nonsymmetric()
    for cycles in (1, 2, 3):
        solution = system.solve(eq.GMRES(memory=3, max_steps=1 + 4 * cycles, rtol=0), trace=True)
        assert solution.trace is not None
        for row in range(5):
            a, b, w0 = (x[row].numpy() for x in (system.a, system.b, system.w0))
            w, _ = scipy.sparse.linalg.gmres(a, b, x0=w0, rtol=0, atol=0, restart=3, maxiter=cycles)
            assert float(solution.trace[-1, row]) == pytest.approx(np.linalg.norm(b - a @ w), rel=1e-7)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("tolerance", [{"rtol": 1e-4}, {"rtol": 0.0, "atol": 1e-4}], ids=["rtol", "atol"])
def test_gmres_spends_the_least_products_a_first_residual_and_a_verification(
    tolerance: dict[str, float], preconditioned: bool
) -> None:
    system = nonsymmetric()
    m = torch.linalg.inv(system.a + 0.1 * torch.randn_like(system.a))
    known = inverse_estimate(m) if preconditioned else None
    solution = system.solve(eq.GMRES(max_steps=40, **tolerance), preconditioner=known).raise_for_status()
    lines = history(eq.GMRES(), system, 11, preconditioner=known)
    size = system.f(solution.value, system.a, system.b).norm(dim=1)  # f(w) differs little where this is decided
    allowed = size * tolerance["rtol"] + tolerance.get("atol", 0.0)
    products = (lines > allowed).sum(dim=0)
    assert bool(((lines / allowed - 1).abs() > 1e-3).all()), "too close for the counts to say something"
    assert solution.num_steps.tolist() == (products + 2).tolist()
    assert solution.num_evals == int(products.max()) + 2
    torch.testing.assert_close(solution.residual, system.residual(solution.value), rtol=1e-8, atol=1e-13)


def test_gmres_ends_with_the_degree_of_the_minimal_polynomial() -> None:
    # A is twice the identity plus a matrix of the given rank: the Krylov space closes one product later, and the next
    # direction would be one of rounding errors.
    rank = torch.tensor([0, 1, 2, 3])
    left, right = torch.randn(4, 10, 3), torch.randn(4, 3, 10)
    kept = (torch.arange(3) < rank[:, None]).to(left.dtype)
    system = System(2 * torch.eye(10) + left * kept[:, None] @ right / 10, torch.randn(4, 10), torch.zeros(4, 10))
    for solver in (eq.GMRES(rtol=0, atol=1e-11), eq.GMRES(rtol=1e-12)):
        solution = system.solve(solver).raise_for_status()
        assert solution.num_steps.tolist() == [3, 4, 5, 6]
        torch.testing.assert_close(solution.value, system.exact, rtol=1e-9, atol=1e-10)
    # With no tolerance it goes on from the answer, and stays there.
    solution = system.solve(eq.GMRES(max_steps=60, rtol=0))
    torch.testing.assert_close(solution.value, system.exact, rtol=1e-9, atol=1e-10)


def test_gmres_does_what_its_steps_allow() -> None:
    system = nonsymmetric()
    none, one, two, three = (system.solve(eq.GMRES(max_steps=k, rtol=0), trace=True) for k in range(4))
    assert none.num_evals == 0
    assert torch.equal(none.value, system.w0)
    torch.testing.assert_close(one.residual, system.residual(system.w0))
    assert two.trace is not None
    assert three.trace is not None
    torch.testing.assert_close(two.trace[1], system.residual(system.f(system.w0, system.a, system.b)))
    r = system.f(system.w0, system.a, system.b) - system.w0
    image = torch.bmm(system.a, r[..., None])[..., 0]
    step = (image * r).sum(1) / image.square().sum(1)
    torch.testing.assert_close(three.trace[2], system.residual(system.w0 + step[:, None] * r))


@pytest.mark.parametrize("memory", [1, 4])
def test_restarts_that_stagnate_end_by_patience_or_steps(memory: int) -> None:
    # A cyclic shift: no vector of the Krylov space helps until it is the whole space.
    shift = torch.eye(6).roll(1, dims=0).expand(2, 6, 6).clone()
    shift[1] = 2 * torch.eye(6)
    system = System(shift, torch.eye(6)[:2].clone(), torch.zeros(2, 6))
    whole = system.solve(eq.GMRES(memory=6, rtol=0, atol=1e-12)).raise_for_status()
    assert whole.num_steps.tolist() in ([7, 3], [8, 3])  # the last product may happen to be at the answer
    stuck = system.solve(eq.GMRES(memory=memory, max_steps=40, rtol=0, atol=1e-12))
    assert stuck.status.tolist() == [eq.Status.MAX_STEPS, eq.Status.CONVERGED]
    assert stuck.num_steps.tolist() == [40, 3]
    assert float(stuck.residual[0]) == pytest.approx(1.0)
    patient = system.solve(eq.GMRES(memory=memory, max_steps=200, rtol=0, atol=1e-12, patience=30))
    assert patient.status.tolist() == [eq.Status.STALLED, eq.Status.CONVERGED]


def test_a_singular_matrix_ends_as_a_status_with_no_nan() -> None:
    q = orthogonal(2, 6)
    a = q @ torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])) @ q.mT
    a[1] = 0  # every product is zero
    system = System(a, torch.randn(2, 6), torch.zeros(2, 6))
    solution = system.solve(eq.GMRES(max_steps=50, rtol=0, atol=1e-9))
    assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 2
    assert bool(solution.value.isfinite().all())
    assert bool((solution.residual <= system.b.norm(dim=1)).all())
    # A right-hand side within the range of A is no difficulty.
    system.b[0] = a[0] @ system.b[0]
    assert system.solve(eq.GMRES(max_steps=50, rtol=0, atol=1e-9)).converged.tolist() == [True, False]


# --- both ----------------------------------------------------------------------------------------------------------


BOTH = (eq.CG(), eq.GMRES(memory=30), eq.GMRES(memory=3))
both = pytest.mark.parametrize("solver", BOTH, ids=["CG", "GMRES", "GMRES(3)"])


@both
@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_row_does_not_depend_on_its_batch_mates(solver: eq.Solver, preconditioned: bool) -> None:
    system = symmetric(batch=8)
    known = inverse_estimate(near_inverse(system)) if preconditioned else None
    solver = dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=1e-3)
    whole = system.solve(solver, preconditioner=known)
    assert len(set(whole.num_steps.tolist())) > 3
    for rows in ([0], [7], [6, 1], [5, 4, 3, 2, 1, 0, 7, 6]):
        part = system.solve(solver, rows, preconditioner=None if known is None else known.select(torch.tensor(rows)))
        torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-7, atol=1e-9)
        assert part.num_steps.tolist() == whole.num_steps[rows].tolist()
        assert part.status.tolist() == whole.status[rows].tolist()


@both
def test_rows_leave_the_batch_in_the_midst_of_their_mates_recurrences(solver: eq.Solver) -> None:
    system = symmetric(batch=8)
    solver = dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=1e-3)
    calls: list[int] = []

    def f(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        calls.append(len(w))
        return system.f(w, a, b)

    dropping = solver.solve(FunctionMap(f, system.w0, (system.a, system.b), params=()), system.w0)
    assert calls[0] == 8
    assert calls[-1] <= 4
    staying = solver.solve(FunctionMap(lambda w: system.f(w, system.a, system.b), system.w0), system.w0)
    torch.testing.assert_close(dropping.value, staying.value, rtol=1e-8, atol=1e-10)
    assert dropping.num_steps.tolist() == staying.num_steps.tolist()


@both
def test_a_solve_that_may_not_read_flags_has_the_same_answer(
    solver: eq.Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a device: the host branches on no value, all by masks.
    system = symmetric()
    solver = dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=1e-3)
    read = system.solve(solver)
    for module in ("base", "gmres"):
        monkeypatch.setattr(f"equipoise.solvers.{module}.can_branch_on", lambda x: False)
    blind = system.solve(solver)
    torch.testing.assert_close(blind.value, read.value, rtol=1e-8, atol=1e-10)
    assert blind.num_steps.tolist() == read.num_steps.tolist()
    assert blind.status.tolist() == read.status.tolist()


@both
def test_a_zero_right_hand_side_and_a_perfect_start_take_one_evaluation(solver: eq.Solver) -> None:
    system = symmetric()
    zero = System(system.a, 0 * system.b, 0 * system.w0)
    solution = zero.solve(solver).raise_for_status()
    assert solution.num_evals == 1
    assert torch.equal(solution.value, zero.w0)
    # A zero row beside others, and a zero right-hand side from elsewhere.
    system.b[1], system.w0[1], system.b[2] = 0, 0, 0
    solution = system.solve(dataclasses.replace(solver, max_steps=300, rtol=0.0, atol=1e-6))
    assert solution.num_steps[1] == 1
    if solver is not BOTH[2]:
        torch.testing.assert_close(solution.raise_for_status().value, system.exact, rtol=1e-4, atol=1e-4)


@both
def test_one_dimension_takes_one_product(solver: eq.Solver) -> None:
    system = System(torch.tensor([[[0.3]], [[5.0]]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [0.0]]))
    solution = system.solve(dataclasses.replace(solver, rtol=1e-12)).raise_for_status()
    assert solution.num_steps.tolist() == [3, 3]
    torch.testing.assert_close(solution.value, torch.tensor([[1 / 0.3], [0.4]]))


@both
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_start_near_the_answer_is_not_mistaken_for_divergence(solver: eq.Solver, scale: float) -> None:
    system = symmetric()
    system = System(scale * system.a, system.b, system.exact / scale * (1 + 1e-9 * torch.randn(5, 12)))
    target = 1e-2 * system.residual(system.w0).min()
    solution = system.solve(dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=float(target)))
    assert eq.Status.DIVERGED not in solution.status
    if solver is not BOTH[2]:
        solution.raise_for_status()


@both
def test_a_poisoned_row_ends_as_nonfinite_and_disturbs_no_other(solver: eq.Solver) -> None:
    system = symmetric()
    solver = dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=1e-3)
    clean = system.solve(solver)
    system.b[1, 0] = torch.nan
    solution = system.solve(solver)
    assert solution.status[1] == eq.Status.NONFINITE
    others = [0, 2, 3, 4]
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-8, atol=1e-10)


@both
def test_a_map_that_is_not_affine_has_an_honest_status(solver: eq.Solver) -> None:
    # z = gain * cos z: from almost constant to strongly curved.
    gain, z0 = torch.tensor([[1e-5], [0.1], [1.0], [3.0]]), torch.zeros(4, 1)
    f = FunctionMap(lambda z, gain: gain * torch.cos(z), z0, (gain,), params=())
    solution = dataclasses.replace(solver, max_steps=12, rtol=1e-4).solve(f, z0)
    image = gain * torch.cos(solution.value)
    residual = (image - solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-13)
    assert solution.converged.tolist() == (residual <= 1e-4 * image.norm(dim=1)).tolist()
    assert bool(solution.converged[0])
    assert bool((residual <= f.call(z0).norm(dim=1)).all())


def test_bad_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"GMRES\(memory=0\): must be >= 1"):
        eq.GMRES(memory=0)
    with pytest.raises(ValueError, match=r"CG\(refresh=0\): must be >= 1"):
        eq.CG(refresh=0)
