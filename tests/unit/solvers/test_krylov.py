"""CG and GMRES against SciPy's, row by row, and against dense algebra."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from problems import gmres_iterates, product
from torch import Tensor

import equipoise as eq


@dataclasses.dataclass(frozen=True)
class System:
    """`A w = b` of each row, as the fixed point of `w - A w + b`."""

    a: Tensor  # (B, d, d)
    b: Tensor  # (B, d)
    w0: Tensor  # (B, d)

    @staticmethod
    def f(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return w - product(a, w) + b

    def solve(self, solver: eq.Solver, rows: Any = slice(None), **options: Any) -> eq.Solution[Tensor]:
        w0 = self.w0[rows]
        return solver.solve(eq.FunctionMap(self.f, w0, (self.a[rows], self.b[rows]), params=()), w0, **options)

    def residual(self, w: Tensor) -> Tensor:
        return (self.f(w, self.a, self.b) - w).norm(dim=1)

    @property
    def exact(self) -> Tensor:
        return torch.linalg.solve(self.a, self.b)


def orthogonal(batch: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(batch, d, d))[0]


def symmetric(batch: int = 5, d: int = 12) -> System:
    """Positive definite, each row with a spectrum of its own; that of row 3 is one number."""
    q = orthogonal(batch, d)
    spread = torch.linspace(0.0, 1.5, batch).roll(3)[:, None]
    eigenvalues = 2 * 10.0 ** (spread * torch.linspace(-0.5, 1, d))
    return System(q @ torch.diag_embed(eigenvalues) @ q.mT, torch.randn(batch, d), torch.randn(batch, d))


def nonsymmetric(batch: int = 5, d: int = 12) -> System:
    """Rows from the neighborhood of the identity to far from it."""
    a = torch.eye(d) + torch.linspace(0.1, 2, batch)[:, None, None] * torch.randn(batch, d, d) / d**0.5
    return System(a, torch.randn(batch, d), torch.randn(batch, d))


def inverse_estimate(matrices: Tensor) -> eq.InverseEstimate:
    b, d, _ = matrices.shape
    return eq.InverseEstimate.of(torch.ones(b), torch.eye(d).repeat(b, 1, 1), matrices - torch.eye(d))


def near_inverse(system: System) -> Tensor:
    """Symmetric positive definite, of no simple relation to the inverse."""
    noise = torch.randn_like(system.a) * 10.0 ** torch.linspace(-1.5, 0, len(system.a))[:, None, None]
    return torch.linalg.inv(system.a + noise @ noise.mT)


def history(solver: eq.Solver, system: System, products: int, **options: Any) -> Tensor:
    """Residuals `(products + 1, B)` of the iterates after 0, 1, ... products, each the last point of its own solve."""
    lines = []
    for k in range(products + 1):
        budget = dataclasses.replace(solver, max_steps=1 if k == 0 else k + 2, rtol=0)
        solution = system.solve(budget, trace=True, **options)
        assert solution.num_evals == budget.max_steps
        lines.append(solution.trace[-1])
    return torch.stack(lines)


# --- conjugate gradients ---------------------------------------------------------------------------------------------


def scipy_cg(system: System, row: int, steps: int, m: Tensor | None = None) -> list[float]:
    """Norms of the residuals of SciPy's iterates, first to last."""
    a, b = system.a[row].numpy(), system.b[row].numpy()
    iterates = [system.w0[row].numpy()]
    scipy.sparse.linalg.cg(
        a, b, x0=iterates[0], rtol=0, atol=1e-13, maxiter=steps, M=None if m is None else m[row].numpy(),
        callback=lambda x: iterates.append(x.copy()),
    )  # fmt: skip
    return [float(np.linalg.norm(b - a @ x)) for x in iterates]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_of_scipy(preconditioned: bool) -> None:
    """The residuals of its iterates, its products, a first residual and a verification."""
    system = symmetric()
    m = near_inverse(system) if preconditioned else None
    known = None if m is None else inverse_estimate(m)
    norms, ours = [scipy_cg(system, row, 40, m) for row in range(5)], history(eq.CG(), system, 8, preconditioner=known)
    for row in range(5):
        theirs = torch.tensor(norms[row][:9])
        torch.testing.assert_close(ours[: len(theirs), row], theirs, rtol=1e-8, atol=1e-12)
    assert bool((ours[8] < 1e-2 * ours[0]).sum() >= 3)
    solution = system.solve(eq.CG(max_steps=60, rtol=0, atol=0.02), preconditioner=known).raise_for_status()
    products = [next(k for k, norm in enumerate(column) if norm <= 0.02) for column in norms]
    assert solution.num_steps.tolist() == [k + 2 for k in products]
    assert len(set(products)) >= 3, "the rows must be in different phases for this test to say something"
    assert solution.num_evals == max(products) + 2
    torch.testing.assert_close(solution.residual, system.residual(solution.value), rtol=1e-8, atol=1e-13)


def test_cg_on_few_eigenvalues() -> None:
    """It ends after as many products as there are different ones."""
    q, levels = orthogonal(4, 10), torch.tensor([2.0, 3.0, 5.0, 9.0])
    eigenvalues = torch.stack([levels[:k].repeat(10)[:10] for k in (1, 2, 3, 4)])
    system = System(q @ torch.diag_embed(eigenvalues) @ q.mT, torch.randn(4, 10), torch.zeros(4, 10))
    assert system.solve(eq.CG(rtol=0, atol=1e-10)).raise_for_status().num_steps.tolist() == [3, 4, 5, 6]


def test_cg_refreshed() -> None:
    """The residual is replaced, and the directions stay conjugate."""
    system, solver = symmetric(), eq.CG(max_steps=100, rtol=0, atol=1e-8)
    seldom, often = (system.solve(dataclasses.replace(solver, refresh=k)).raise_for_status() for k in (50, 2))
    products = seldom.num_steps - 2
    # An evaluation after every second product, the last one at the end; rounding differs.
    assert (often.num_steps - 1 - (products + 1) // 2 - products).abs().max() <= 2


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_cg_in_float32(offset: float) -> None:
    """It reaches its precision where steps are short against the iterate."""
    made = symmetric()
    w = made.exact + offset
    rounded = [t.float() for t in (made.a, product(made.a, w), w + 1e-2 * torch.randn(5, 12))]
    exact, solver = System(*(t.double() for t in rounded)), eq.CG(max_steps=40, rtol=1e-5)
    solution, double = System(*rounded).solve(solver).raise_for_status(), exact.solve(solver).raise_for_status()
    assert bool((exact.residual(solution.value.double()) <= 1.2e-5 * solution.value.norm(dim=1)).all())
    assert bool((solution.num_steps <= double.num_steps + 3).all())


def test_cg_on_an_indefinite_row() -> None:
    """It ends as a status and disturbs no other."""
    system, solver = symmetric(), eq.CG(max_steps=40, rtol=0, atol=1e-8)
    negative, clean = dataclasses.replace(system, a=-system.a), system.solve(solver)
    system.a[1] -= 2 * torch.eye(12)
    solution, others = system.solve(solver), [0, 2, 3, 4]
    assert solution.status.tolist() == [0, eq.Status.MAX_STEPS, 0, 0, 0]
    assert bool(solution.value.isfinite().all())
    assert solution.residual[1] <= system.residual(system.w0)[1]
    torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-9, atol=1e-10)
    patient = system.solve(dataclasses.replace(solver, max_steps=400, patience=30))
    assert patient.status[1] == eq.Status.STALLED
    assert negative.solve(solver).status.tolist() == [eq.Status.MAX_STEPS] * 5


# --- GMRES -----------------------------------------------------------------------------------------------------------


def scipy_gmres(system: System, row: int, restart: int, cycles: int) -> float:
    a, b, w0 = (x[row].numpy() for x in (system.a, system.b, system.w0))
    w, _ = scipy.sparse.linalg.gmres(a, b, x0=w0, rtol=0, atol=0, restart=restart, maxiter=cycles)
    return float(np.linalg.norm(b - a @ w))


def test_gmres_of_scipy() -> None:
    system = nonsymmetric()
    ours = history(eq.GMRES(), system, 6)
    for row in range(5):
        for k in range(1, 7):
            assert float(ours[k, row]) == pytest.approx(scipy_gmres(system, row, k, 1), rel=1e-7)
    for cycles in (1, 2, 3):
        solution = system.solve(eq.GMRES(memory=3, max_steps=1 + 4 * cycles, rtol=0), trace=True)
        for row in range(5):
            assert float(solution.trace[-1, row]) == pytest.approx(scipy_gmres(system, row, 3, cycles), rel=1e-7)


@pytest.mark.parametrize(
    ("rtol", "atol", "kind"),
    [*((*t, kind) for t in [(1e-4, 0.0), (0.0, 1e-4)] for kind in ("plain", "preconditioned")), (0.03, 0.0, "far")],
)
def test_gmres_products(rtol: float, atol: float, kind: str) -> None:
    """It spends the least products, a first residual and a verification, and makes the true residual least.

    The iterate is evaluated where its residual is within the tolerance of the least |f(w)| that both norms admit: so
    no evaluation finds that the products must go on, and restart.
    """
    system = nonsymmetric(batch=100 if kind == "far" else 5)
    if kind == "far":  # from a start so long, and a map so steep, that no probe meets the tolerance
        a, w0 = system.a + 2 * torch.eye(12), 20 * system.w0
        system = System(a, product(a, w0) + system.b, w0)
    m, known = torch.eye(12).expand_as(system.a), None
    if kind == "preconditioned":
        m = torch.linalg.inv(system.a + 0.1 * torch.randn_like(system.a))
        known = inverse_estimate(m)
    iterates = gmres_iterates(system.a, system.b, system.w0, 11, m)
    norms, sizes = torch.stack([system.residual(w) for w in iterates]), iterates.norm(dim=2)
    ours = history(eq.GMRES(), system, 6, preconditioner=known)
    torch.testing.assert_close(ours, norms[:7], rtol=1e-8, atol=1e-12)
    allowed = atol + rtol * (sizes - norms)
    products = (norms > allowed).sum(dim=0)
    sharp = ((norms / allowed - 1).abs() > 1e-3).all(dim=0) & (products > 0)
    assert int((~sharp).sum()) <= len(sharp) / 20, "too close for the counts to say something"
    solution = system.solve(eq.GMRES(max_steps=40, rtol=rtol, atol=atol), preconditioner=known).raise_for_status()
    assert solution.num_steps[sharp].tolist() == (products + 2)[sharp].tolist()
    assert solution.num_evals == int(solution.num_steps.max())
    torch.testing.assert_close(solution.residual, system.residual(solution.value), rtol=1e-8, atol=1e-12)


def test_gmres_minimal_polynomial() -> None:
    """A is twice the identity plus a matrix of the given rank: the Krylov space closes one product later, and the next
    direction would be one of rounding errors."""
    left, right = torch.randn(4, 10, 3), torch.randn(4, 3, 10)
    kept = (torch.arange(3) < torch.arange(4)[:, None]).to(left.dtype)
    system = System(2 * torch.eye(10) + left * kept[:, None] @ right / 10, torch.randn(4, 10), torch.zeros(4, 10))
    for solver in (eq.GMRES(rtol=0, atol=1e-11), eq.GMRES(rtol=1e-12)):
        assert system.solve(solver).raise_for_status().num_steps.tolist() == [3, 4, 5, 6]
    # With no tolerance it goes on from the answer, and stays there.
    for solver in (eq.GMRES(rtol=1e-12), eq.GMRES(max_steps=60, rtol=0)):
        torch.testing.assert_close(system.solve(solver).value, system.exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory", [1, 4])
def test_gmres_stagnates(memory: int) -> None:
    """A cyclic shift: no vector of the Krylov space helps until it is the whole space."""
    shift = torch.stack([torch.eye(6).roll(1, dims=0), 2 * torch.eye(6)])
    system, solver = System(shift, torch.eye(6)[:2], torch.zeros(2, 6)), eq.GMRES(memory=memory, rtol=0, atol=1e-12)
    whole = system.solve(dataclasses.replace(solver, memory=6)).raise_for_status()
    assert whole.num_steps.tolist() in ([7, 3], [8, 3])  # the last product may happen to be at the answer
    stuck = system.solve(dataclasses.replace(solver, max_steps=40))
    assert stuck.status.tolist() == [eq.Status.MAX_STEPS, eq.Status.CONVERGED]
    assert stuck.num_steps.tolist() == [40, 3]
    assert float(stuck.residual[0]) == pytest.approx(1.0)
    patient = system.solve(dataclasses.replace(solver, max_steps=200, patience=30))
    assert patient.status.tolist() == [eq.Status.STALLED, eq.Status.CONVERGED]


def test_gmres_on_singular_matrices() -> None:
    q = orthogonal(2, 6)
    a = q @ torch.diag(torch.arange(6.0)) @ q.mT
    a[1] = 0  # every product is zero
    system, solver = System(a, torch.randn(2, 6), torch.zeros(2, 6)), eq.GMRES(max_steps=50, rtol=0, atol=1e-9)
    solution = system.solve(solver)
    assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 2
    assert bool(solution.value.isfinite().all())
    assert bool((solution.residual <= system.b.norm(dim=1)).all())
    # A right-hand side within the range of A is no difficulty.
    system.b[0] = a[0] @ system.b[0]
    assert system.solve(solver).converged.tolist() == [True, False]


# --- both ------------------------------------------------------------------------------------------------------------

RESTARTED = eq.GMRES(memory=3)
both = pytest.mark.parametrize("solver", [eq.CG(), eq.GMRES(memory=30), RESTARTED], ids=["CG", "GMRES", "GMRES(3)"])


@both
def test_batch_independence(solver: eq.Solver) -> None:
    """With a preconditioner of each row's own, too."""
    system = symmetric(batch=8)
    known = inverse_estimate(near_inverse(system))
    solver = dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=1e-3)
    whole = system.solve(solver, preconditioner=known)
    assert len(set(whole.num_steps.tolist())) > 3
    for rows in ([0], [7], [6, 1], [5, 4, 3, 2, 1, 0, 7, 6]):
        part = system.solve(solver, rows, preconditioner=known.select(torch.tensor(rows)))
        torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-7, atol=1e-9)
        assert part.num_steps.tolist() == whole.num_steps[rows].tolist()
        assert part.status.tolist() == whole.status[rows].tolist()


@both
def test_known_inverse(solver: eq.Solver) -> None:
    """A multiple of it ends after one product, and itself is met by the first point from zero, as on A = I."""
    system, solver = symmetric(), dataclasses.replace(solver, rtol=0, atol=1e-10)
    zero, exact = dataclasses.replace(system, w0=torch.zeros(5, 12)), torch.linalg.inv(system.a)
    solutions = (
        system.solve(solver, preconditioner=inverse_estimate(0.7 * exact)),
        zero.solve(solver, preconditioner=inverse_estimate(exact)),
        dataclasses.replace(zero, a=torch.eye(12).repeat(5, 1, 1)).solve(solver),
    )
    assert [solution.raise_for_status().num_steps.tolist() for solution in solutions] == [[3] * 5, [2] * 5, [2] * 5]


@pytest.mark.parametrize("kind", [eq.CG, eq.GMRES])
def test_few_steps(kind: type[eq.Solver]) -> None:
    """With one the start, with two a step of the map, with three a product and its verification."""
    system = symmetric() if kind is eq.CG else nonsymmetric()
    none, one, two, three = (system.solve(kind(max_steps=k, rtol=0), trace=True) for k in range(4))
    assert none.num_evals == 0
    assert torch.equal(none.value, system.w0)
    torch.testing.assert_close(one.residual, system.residual(system.w0))
    image = system.f(system.w0, system.a, system.b)
    torch.testing.assert_close(two.trace[1], system.residual(image))
    r = image - system.w0
    ar = product(system.a, r)
    alpha = (r * r).sum(1) / (r * ar).sum(1) if kind is eq.CG else (ar * r).sum(1) / (ar * ar).sum(1)
    torch.testing.assert_close(three.trace[2], system.residual(system.w0 + alpha[:, None] * r))


@both
def test_zero_right_hand_side(solver: eq.Solver) -> None:
    system = symmetric()
    zero = System(system.a, 0 * system.b, 0 * system.w0)
    solution = zero.solve(solver).raise_for_status()
    assert solution.num_evals == 1
    assert torch.equal(solution.value, zero.w0)
    # A zero row beside others, and a zero right-hand side from elsewhere.
    system.b[1], system.w0[1], system.b[2] = 0, 0, 0
    solution = system.solve(dataclasses.replace(solver, max_steps=300, rtol=0.0, atol=1e-6))
    assert solution.num_steps[1] == 1
    if solver is not RESTARTED:
        torch.testing.assert_close(solution.raise_for_status().value, system.exact, rtol=1e-4, atol=1e-4)


@both
def test_one_dimension(solver: eq.Solver) -> None:
    system = System(torch.tensor([[[0.3]], [[5.0]]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [0.0]]))
    solution = system.solve(dataclasses.replace(solver, rtol=1e-12)).raise_for_status()
    assert solution.num_steps.tolist() == [3, 3]
    torch.testing.assert_close(solution.value, torch.tensor([[1 / 0.3], [0.4]]))


@both
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_start_near_the_answer(solver: eq.Solver, scale: float) -> None:
    """It is not mistaken for divergence."""
    system = symmetric()
    system = System(scale * system.a, system.b, system.exact / scale * (1 + 1e-9 * torch.randn(5, 12)))
    target = 1e-2 * system.residual(system.w0).min()
    solution = system.solve(dataclasses.replace(solver, max_steps=60, rtol=0.0, atol=float(target)))
    assert eq.Status.DIVERGED not in solution.status
    if solver is not RESTARTED:
        solution.raise_for_status()


@both
def test_map_not_affine(solver: eq.Solver) -> None:
    """From almost constant to strongly curved: each status is honest."""
    gain, z0 = torch.tensor([[1e-5], [0.1], [1.0], [3.0]]), torch.zeros(4, 1)
    f = eq.FunctionMap(lambda z, gain: gain * torch.cos(z), z0, (gain,), params=())
    solution = dataclasses.replace(solver, max_steps=12, rtol=1e-4).solve(f, z0)
    image = gain * torch.cos(solution.value)
    residual = (image - solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-13)
    assert solution.converged.tolist() == (residual <= 1e-4 * image.norm(dim=1)).tolist()
    assert bool(solution.converged[0])
    assert bool((residual <= f.call(z0).norm(dim=1)).all())
