"""Laws of every solver; a new one joins by one line in `CASES`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise as eq
from equipoise import solvers
from equipoise.core import linalg
from equipoise.core.function_map import DescentMap, FunctionMap
from equipoise.solvers import BS3, Euler, Tsit5
from equipoise.solvers.base import STEPS_PER_READ

# --- families of samples -------------------------------------------------------------------------------------------


class Family:
    """Samples that differ in how fast they converge; the number of rows of each call is noted.

    States longer than a sample's `limit` meet `poison`.
    """

    def __init__(self, kind: type[FunctionMap], f: Callable[..., Tensor], z0: Tensor, *inputs: Tensor) -> None:
        self.kind, self.f, self.z0, self.inputs = kind, f, z0, inputs
        self.limit, self.poison = torch.full(z0.shape[:1], math.inf), math.nan
        self.calls: list[int] = []

    def call(self, z: Tensor, limit: Tensor, *inputs: Tensor) -> Tensor:
        self.calls.append(len(z))
        out, beyond = self.f(z, *inputs), z.norm(dim=1) > limit
        return torch.where(beyond if out.ndim == 1 else beyond[:, None], self.poison, out)

    def solve(
        self, solver: eq.Solver, rows: Any = slice(None), *, closure: bool = False, **options: Any
    ) -> eq.Solution[Tensor]:
        self.calls = []
        z0, *inputs = (t[rows] for t in (self.z0, self.limit, *self.inputs))
        if getattr(solver, "outer_every", None) is not None:
            target = torch.linspace(1, 2, len(self.z0)).to(z0)[rows, None]
            solver = dataclasses.replace(solver, outer_loss=lambda z, chosen: (z - target[chosen]).square().sum(1))
        f = self.kind(lambda z: self.call(z, *inputs), z0) if closure else self.kind(self.call, z0, inputs, params=())
        return solver.solve(f, z0, **options)

    def residual(self, z: Tensor) -> Tensor:
        return self.kind(self.f, z, self.inputs, params=()).call(z) - z

    def to(self, target: Any) -> Family:
        self.z0, self.limit, *self.inputs = (t.to(target) for t in (self.z0, self.limit, *self.inputs))
        return self


def graded(batch: int, d: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix of norm one, starts, shifts, and gains from almost zero to almost one."""
    generator = torch.Generator().manual_seed(2)
    w, x = problems.spectral(d, 1.0, generator), torch.randn(batch, d, generator=generator)
    return w, torch.zeros(batch, d), x, torch.linspace(0.02, 0.94, batch)[:, None]


def contraction(batch: int = 8, ripple: float = 0.0) -> Family:
    """Gradient maps; with `ripple` residuals go up and down."""
    w, *rows = graded(batch)

    def f(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        return gain * torch.tanh(gain * (z @ w.to(z).T) + x) @ w.to(z) + ripple * gain * torch.sin(20 * z)

    return Family(FunctionMap, f, *rows)


def objective(batch: int = 8, ripple: float = 0.0) -> Family:
    """The objectives behind these maps."""
    w, *rows = graded(batch)

    def h(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        convex = z.square().sum(1) / 2 - torch.cosh(gain * (z @ w.to(z).T) + x).log().sum(1)
        return convex + ripple * (gain * torch.cos(20 * z)).sum(1) / 20

    return Family(DescentMap, h, *rows)


def systems(batch: int = 8, d: int = 8) -> Family:
    """`A w = b` with positive definite matrices of one to eight different eigenvalues."""
    generator = torch.Generator().manual_seed(4)
    q = torch.linalg.qr(torch.randn(batch, d, d, generator=generator))[0]
    spectra = torch.stack([torch.linspace(5, 1, d)[torch.arange(d) % (1 + i * d // batch)] for i in range(batch)])
    a, b = q @ torch.diag_embed(spectra) @ q.mT, torch.randn(batch, d, generator=generator)
    return Family(FunctionMap, lambda w, b, a: w - torch.bmm(a, w[..., None])[..., 0] + b, torch.zeros(batch, d), b, a)


# --- the table -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A solver and the family of samples that it is made for."""

    solver: eq.Solver
    family: Callable[..., Family] = contraction

    @property
    def descends(self) -> bool:
        return self.family is objective

    def tight(self, rtol: float = 1e-6) -> eq.Solver:
        return dataclasses.replace(self.solver, max_steps=400, rtol=rtol)

    def set(self, **fields: Any) -> eq.Solver:
        return dataclasses.replace(self.solver, **fields)


CASES = {
    "Picard": Case(eq.Picard()),
    "Picard-damped": Case(eq.Picard(damping=0.7)),
    "Anderson": Case(eq.Anderson()),
    "Anderson-mixed": Case(eq.Anderson(memory=3, mixing=0.8)),
    "Broyden": Case(eq.Broyden(memory=60)),
    "Broyden-restarted": Case(eq.Broyden(memory=4)),
    "AdjointBroyden": Case(eq.AdjointBroyden(memory=60)),
    "AdjointBroyden-restarted": Case(eq.AdjointBroyden(memory=4)),
    "AdjointBroyden-aware": Case(eq.AdjointBroyden(memory=60, outer_every=2)),
    "AdjointBroyden-aware-restarted": Case(eq.AdjointBroyden(memory=4, outer_every=2)),
    "VCAB3": Case(eq.SteadyState()),
    "BS3": Case(eq.SteadyState(stepper=BS3())),
    "Tsit5": Case(eq.SteadyState(stepper=Tsit5())),
    "Euler": Case(eq.SteadyState(stepper=Euler())),
    "LBFGS": Case(eq.LBFGS(memory=60), objective),
    "LBFGS-short": Case(eq.LBFGS(memory=2), objective),
    "LBFGS-aware": Case(eq.LBFGS(memory=6, outer_every=2), objective),
    "CG": Case(eq.CG(), systems),
    "CG-refreshed": Case(eq.CG(refresh=2), systems),
    "GMRES": Case(eq.GMRES(memory=30), systems),
    "GMRES-restarted": Case(eq.GMRES(memory=3), systems),
}


def cases(wanted: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items() if wanted(c)])


ALL = slice(None)
PLAIN = ("Picard", "Anderson", "Broyden", "AdjointBroyden", "VCAB3", "LBFGS", "CG", "GMRES")  # one of each class
of_maps = cases(lambda case: case.family is contraction)
with_inverse = cases(lambda case: case.solver.keeps_inverse)
projecting = cases(lambda case: case.solver.supports_projection)


@functools.cache
def solved(case: Case) -> eq.Solution[Tensor]:
    """The family solved to 1e-6, which most laws compare with."""
    solution = case.family().solve(case.tight(), trace=True).raise_for_status()
    assert len(set(solution.num_steps.tolist())) > 2, "the samples must differ for the laws to say something"
    return solution


def assert_rows(part: eq.Solution[Tensor], whole: eq.Solution[Tensor], rows: Any = ALL, of: Any = ALL) -> None:
    """Rows `of` a solution are those of another, up to rounding."""
    torch.testing.assert_close(part.value[of], whole.value[rows], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(part.residual[of], whole.residual[rows], rtol=1e-6, atol=1e-10)
    assert part.status[of].tolist() == whole.status[rows].tolist()
    assert part.num_steps[of].tolist() == whole.num_steps[rows].tolist()
    for name, counted in whole.statistics.items():
        assert part.statistics[name][of].tolist() == counted[rows].tolist()
    if whole.inverse is not None:
        assert part.inverse.rank[of].tolist() == whole.inverse.rank[rows].tolist()
        torch.testing.assert_close(part.inverse.dense()[of], whole.inverse.dense()[rows], rtol=1e-6, atol=1e-7)


# --- answers -------------------------------------------------------------------------------------------------------


def flat(state: Any) -> Tensor:
    return torch.cat([part.flatten(1) for part in (state if isinstance(state, tuple) else (state,))], dim=1)


@of_maps
@pytest.mark.parametrize(
    "make", [problems.affine, problems.two_scales, problems.scalar], ids=lambda make: make.__name__
)
def test_known_answers(case: Case, make: Callable[[], problems.Problem]) -> None:
    problem = make()
    solution = problem.solve(case.tight(1e-10)).raise_for_status()
    torch.testing.assert_close(solution.value, problem.expected, rtol=1e-7, atol=1e-8)
    residual = flat(problem.f(solution.value, *problem.inputs)) - flat(solution.value)
    torch.testing.assert_close(solution.residual, residual.norm(dim=1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["Anderson", "Broyden", "AdjointBroyden", "VCAB3"])
def test_expanding_rotation(name: str) -> None:
    problem = problems.rotation()
    solution = problem.solve(CASES[name].tight(1e-11)).raise_for_status()
    torch.testing.assert_close(solution.value, problem.expected, rtol=1e-8, atol=1e-9)


@cases()
def test_warm_start(case: Case) -> None:
    family, cold = case.family(), solved(case)
    family.z0 = cold.value
    again = family.solve(case.tight())
    assert (again.num_evals, again.num_steps.tolist()) == (1, [1] * 8)
    assert torch.equal(again.value, cold.value)
    assert again.inverse is None or torch.equal(again.inverse.dense(), torch.eye(6).expand(8, 6, 6))
    family.z0 = cold.value * (1 + 1e-4 * torch.randn_like(cold.value))
    near = family.solve(case.tight()).raise_for_status()
    torch.testing.assert_close(near.value, cold.value, rtol=1e-4, atol=1e-4)
    assert int(near.num_steps.sum()) < int(cold.num_steps.sum())


@of_maps
def test_preconditioner(case: Case) -> None:
    """A known inverse is what the solver sees; samples are judged by their own residual."""
    problem = problems.affine()
    exact = torch.linalg.inv(torch.eye(6) - problems.jacobian(lambda z: problem.f(z, torch.zeros(6)), torch.zeros(6)))
    # M = I + (M - I), its second part written with the columns of I as basis; of the odd samples nothing is known.
    known = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])[:, None, None]
    estimate = eq.InverseEstimate.of(torch.ones(5), torch.eye(6).repeat(5, 1, 1), known * (exact - torch.eye(6)))
    f = FunctionMap(problem.f, problem.z0, problem.inputs, params=())
    bare = case.tight(1e-11).solve(f, problem.z0)
    helped = case.tight(1e-11).solve(f, problem.z0, preconditioner=estimate).raise_for_status()
    torch.testing.assert_close(helped.value, problem.expected, rtol=1e-9, atol=1e-9)
    residual = (problem.f(helped.value, *problem.inputs) - helped.value).norm(dim=1)
    torch.testing.assert_close(helped.residual, residual, rtol=1e-6, atol=1e-13)
    assert helped.num_steps[1::2].tolist() == bare.num_steps[1::2].tolist()
    assert bool((helped.num_steps[::2] < bare.num_steps[::2]).all())
    if case in (CASES["Picard"], CASES["Anderson"], CASES["VCAB3"]):  # undamped: the first step is Newton's
        assert helped.num_steps[::2].tolist() == [2] * 3


# --- one sample and its batch mates ----------------------------------------------------------------------------------


@cases()
@pytest.mark.parametrize("closure", [False, True], ids=["named", "closure"])
def test_batch_independence(case: Case, closure: bool) -> None:
    """Whoever else is in the batch, and in whatever order, whether rows can leave it or not."""
    family = case.family()
    for rows in (list(range(8)), [7]) if closure else ([4], [5, 4, 3, 2, 1, 0, 7, 6]):
        assert_rows(family.solve(case.tight(), rows, closure=closure), solved(case), rows)
    budget, rows = case.set(max_steps=7, rtol=1e-3), [2, 7, 5, 0, 6]
    assert_rows(family.solve(budget, rows, closure=closure), family.solve(budget), rows)


@cases()
def test_rows_leave(case: Case) -> None:
    """With named inputs the cost follows the sum of steps; a closure cannot be shown fewer rows."""
    family = case.family(batch=32)
    steps = family.solve(case.tight(), closure=True).num_steps
    assert family.calls == [32] * (int(steps.max()) + 1)  # once more at the returned values, to see them together
    assert family.solve(case.tight()).num_steps.tolist() == steps.tolist()
    # Rows leave as soon as at most half of those present run.
    expected, present = [], 32
    for k in range(int(steps.max())):
        running = int((steps > k).sum())
        if running < 32 and 2 not in expected[:k]:
            expected.append(2)  # two rows are evaluated apart, once
        present = running if 2 * running <= present else present
        expected.append(present)
    assert family.calls == expected
    assert int(steps.sum()) <= sum(family.calls) < min(2 * int(steps.sum()), 32 * int(steps.max()))


@cases()
def test_rare_reads(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device flags are read every few steps: a few surplus calls, the same answers; no branch on a value."""
    for module in list(sys.modules.values()):
        if vars(module).get("can_branch_on") is linalg.can_branch_on and module is not linalg:
            monkeypatch.setattr(module, "can_branch_on", lambda x: False)
    assert solvers.base.can_branch_on is not linalg.can_branch_on
    family, often = case.family(), solved(case)
    rarely = family.solve(case.tight())
    assert_rows(rarely, often)
    assert often.num_evals <= rarely.num_evals < often.num_evals + STEPS_PER_READ
    family.limit[2] = 0.5 * often.value[2].norm()
    broken = family.solve(dataclasses.replace(case.tight(), max_steps=int(often.num_steps[3:].max())))
    assert broken.status[2] != eq.Status.CONVERGED
    torch.testing.assert_close(broken.value[3:], often.value[3:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("case", "poison"),
    [
        *(pytest.param(case, math.nan, id=f"{name}-nan") for name, case in CASES.items()),
        *(pytest.param(CASES[name], math.inf, id=f"{name}-inf") for name in PLAIN),
    ],
)
def test_nan_isolation(case: Case, poison: float) -> None:
    """A sample that meets NaN keeps its best finite iterate and disturbs no other."""
    family, others = case.family(), [0, 1, 2, 3, 4, 5, 7]
    solver = case.set(max_steps=60, rtol=0.0, atol=1e-5)
    clean = family.solve(solver)
    # The answer lies where this sample's map is not defined: the solver meets the edge on its way.
    family.poison, family.limit[6] = poison, 0.95 * clean.value[6].norm()
    solution = family.solve(solver, trace=True)
    # Those that back away may not have given up when their steps are over.
    assert solution.status[6] in (eq.Status.NONFINITE, *([eq.Status.MAX_STEPS] if case.solver.retries else []))
    seen = solution.trace[:, 6]
    least = seen[seen.isfinite()].min()
    assert solution.residual[6] == least <= seen[0]
    assert least < seen[0] or case.family is systems  # probes of products lie far away
    torch.testing.assert_close(family.residual(solution.value)[6].norm(), least)
    assert_rows(solution, clean, others, others)
    if isinstance(case.solver, (eq.AdjointBroyden, eq.LBFGS)):  # Broyden's holds the NaN, from which Shine falls back
        assert bool(solution.inverse.dense().isfinite().all())


@cases()
def test_start_not_finite(case: Case) -> None:
    family, others = case.family(), [0, 2, 3, 4, 5, 6, 7]
    family.z0[1, 0] = math.nan
    solution = family.solve(case.tight())
    assert solution.status.tolist() == [0, eq.Status.NONFINITE, 0, 0, 0, 0, 0, 0]
    assert_rows(solution, solved(case), others, others)
    assert (int(solution.num_steps[1]), float(solution.residual[1])) == (1, math.inf)
    with pytest.raises(eq.ConvergenceError, match=r"NONFINITE: 1 of 8 samples \(1\).*check its inputs"):
        solution.raise_for_status()


# --- statuses --------------------------------------------------------------------------------------------------------


def residual(z: Tensor, kind: Tensor) -> Tensor:
    """From zero: arrives at one, gets worse with every step, blows up, is NaN and infinite beyond the start; NaN."""
    beyond, size = (z != 0).any(dim=1), z.norm(dim=1)
    fates = [torch.where(beyond, end, 1.0) for end in (1e12, math.nan, math.inf)]
    lengths = torch.stack([0 * size, 1 + size.sqrt(), *fates, torch.full_like(size, math.nan)], dim=1)
    return torch.where((kind == 0)[:, None], 1 - z, lengths.gather(1, kind[:, None]))


def fated(case: Case, kind: Tensor) -> Family:
    """Samples of these kinds, as a map or as objectives with these gradients."""

    def h(z: Tensor, kind: Tensor) -> Tensor:
        linear = -(residual(z, kind).detach() * z).sum(1)
        return torch.where(kind == 0, (z - 1).square().sum(1) / 2, linear)

    def f(z: Tensor, kind: Tensor) -> Tensor:
        return z + residual(z, kind)

    made, z0 = (DescentMap, h) if case.descends else (FunctionMap, f), torch.zeros(len(kind), 4)
    return Family(*made, z0, kind)


@cases()
@pytest.mark.parametrize(("patience", "closure"), [(None, True), (8, False)], ids=["closure", "patience"])
def test_statuses(case: Case, patience: int | None, closure: bool) -> None:
    solver = case.set(max_steps=24, rtol=0.0, atol=1e-2, patience=patience)
    solution = fated(case, torch.arange(6)).solve(solver, closure=closure)
    unsound = 2 + solver.retries  # the start, and so many points beyond it
    early = patience is not None and unsound > 1 + patience  # before the solver has tried all shorter steps
    fates = [eq.Status.STALLED] * 3 if early else [eq.Status.DIVERGED, eq.Status.NONFINITE, eq.Status.NONFINITE]
    second = eq.Status.MAX_STEPS if patience is None else eq.Status.STALLED
    assert solution.status.tolist() == [eq.Status.CONVERGED, second, *fates, eq.Status.NONFINITE]
    spent = 24 if patience is None else 1 + patience
    assert solution.num_steps[1:].tolist() == [spent, *[spent if early else unsound] * 3, 1]
    torch.testing.assert_close(solution.value[0], torch.ones(4), rtol=0, atol=1e-2)
    assert torch.equal(solution.value[1:], torch.zeros(5, 4))
    assert solution.residual[1:].tolist() == [2.0, 2.0, 2.0, 2.0, math.inf]


@cases()
def test_infinite_residual(case: Case) -> None:
    """It is not within a share of an infinite image."""
    solution = fated(case, torch.tensor([4, 0])).solve(case.set(max_steps=40, rtol=1e-3))
    assert solution.status.tolist() == [eq.Status.NONFINITE, eq.Status.CONVERGED]
    assert solution.residual[0] == 2.0


@cases()
def test_out_of_steps(case: Case) -> None:
    solution = case.family().solve(case.set(max_steps=3, rtol=1e-6))
    unfinished = (solution.status == eq.Status.MAX_STEPS).nonzero().flatten().tolist()
    assert unfinished
    assert solution.num_steps[unfinished].tolist() == [3] * len(unfinished)
    with pytest.raises(eq.ConvergenceError, match=rf"MAX_STEPS: {len(unfinished)} of 8 .*raise max_steps"):
        solution.raise_for_status()


def test_diverged() -> None:
    problem = problems.rotation(radius=30.0)
    solution = problem.solve(eq.Picard(max_steps=60, rtol=0.0, atol=1e-3))
    assert solution.status.tolist() == [eq.Status.DIVERGED] * 3
    assert solution.num_steps.tolist() == [7] * 3, "30^6 > 1e8 > 30^5"
    torch.testing.assert_close(solution.value, problem.z0)


# --- counts ----------------------------------------------------------------------------------------------------------


@cases()
@pytest.mark.parametrize(("steps", "closure"), [(0, False), (1, True), (5, False), (60, True)])
def test_counts(case: Case, steps: int, closure: bool) -> None:
    family = case.family()
    solution = family.solve(case.set(max_steps=steps), closure=closure, trace=True)
    evals = solution.num_evals
    assert evals <= steps
    assert len(family.calls) - evals in (0, 1)  # a check is not counted
    aware = getattr(case.solver, "outer_every", None) is not None
    vjps = sum(1 + (aware and step % 2 == 0) for step in range(1, evals))
    assert solution.num_vjps == (vjps if case.solver.uses_vjp else 0)
    assert int(solution.num_steps.max()) == evals
    assert solution.trace.shape == (evals, 8)
    if steps == 0:
        assert torch.equal(solution.value, family.z0)
        assert solution.status.tolist() == [eq.Status.MAX_STEPS] * 8
        assert solution.residual.tolist() == [math.inf] * 8
        assert all(counted.tolist() == [0] * 8 for counted in solution.statistics.values())


@cases()
@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 1e-5), (1e-5, 1e-4)])
def test_tolerance(case: Case, rtol: float, atol: float) -> None:
    """Samples that converged are within it at the returned point, and were not before."""
    family = case.family()
    solution = family.solve(case.set(max_steps=300, rtol=rtol, atol=atol), trace=True).raise_for_status()
    residual = family.residual(solution.value)
    found, allowed = residual.norm(dim=1), atol + rtol * (residual + solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, found, rtol=1e-6, atol=1e-14)
    assert bool((found <= allowed * (1 + 1e-9)).all())
    if rtol == 0:
        last = torch.arange(len(solution.trace))[:, None] >= solution.num_steps - 1
        assert bool((last | (solution.trace > atol)).all())


@cases()
def test_trace(case: Case) -> None:
    """It is kept on request only, and ends where a sample stops."""
    family, solution = case.family(), solved(case)
    assert family.solve(case.set(max_steps=2)).trace is None
    torch.testing.assert_close(solution.trace[0], family.residual(family.z0).norm(dim=1))
    assert solution.trace.isfinite().sum(dim=0).tolist() == solution.num_steps.tolist()
    torch.testing.assert_close(solution.trace[solution.num_steps - 1, torch.arange(8)], solution.residual)


# --- the best iterate ------------------------------------------------------------------------------------------------


@cases()
def test_best_iterate(case: Case) -> None:
    """The residual, whatever the state, follows a script of lengths: the best evaluation is known."""
    lengths = torch.tensor([[4.0, 3.0, 1.0, 5.0, 2.0], [4.0, 0.5, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    seen: list[Tensor] = []

    def scripted(z: Tensor) -> Tensor:
        seen.append(z.clone())
        direction = torch.nn.functional.one_hot(torch.tensor(len(seen) % 4), 4)
        return z + lengths[:, len(seen) - 1, None] * direction

    with torch.no_grad():
        solution = eq.fixed_point(scripted, torch.zeros(3, 4), solver=case.set(max_steps=5, rtol=0.0))
    torch.testing.assert_close(solution.residual, torch.tensor([1.0, 0.5, 1.0]))
    for row, best in enumerate([2, 1, 0]):
        assert torch.equal(solution.value[row], seen[best][row])


def test_best_in_units_of_the_tolerance() -> None:
    # |r| = 1 at |f(z)| = 1, then |r| = 999 at |f(z)| = 1000, |r| = 0.4 at |f(z)| = 1000.4: this one meets rtol = 0.01.
    def f(z: Tensor) -> Tensor:
        return torch.where(z == 0, 1.0, torch.where(z == 1, 1000.0, torch.where(z == 1000, 1000.4, 2000.0)))

    solution = eq.fixed_point(f, torch.zeros(1, 1), solver=eq.Picard(max_steps=3, rtol=0.01))
    assert (solution.status.tolist(), solution.value.item()) == ([eq.Status.CONVERGED], 1000.0)
    # Not converged, the same order counts, up to the first residual: |r| and |f(z)| are 3, 3; then 2, 5; then 2.5, 7.5.
    lengths = iter([3.0, 2.0, 2.5])
    with torch.no_grad():
        solution = eq.fixed_point(lambda z: z + next(lengths), torch.zeros(1, 1), solver=eq.Picard(max_steps=3))
    assert (solution.status.tolist(), solution.value.item()) == ([eq.Status.MAX_STEPS], 5.0)
    # On z -> 1.05 z + 1 the residual grows for ever, but relative to f(z) it falls from 1 to 0.05.
    solution = eq.fixed_point(lambda z: 1.05 * z + 1, torch.zeros(1, 1), solver=eq.Picard(max_steps=600))
    assert solution.status.tolist() == [eq.Status.DIVERGED]
    assert (solution.value.item(), solution.residual.item()) == (0.0, 1.0)


@with_inverse
def test_inverse_of_the_best(case: Case) -> None:
    """Value and inverse are those of a run that stops at the best point."""
    family, older = case.family(ripple=0.2), 0
    solver = case.set(max_steps=9, rtol=1e-3, memory=max(case.solver.memory, 14))
    both = [family.solve(solver, closure=closure, trace=True) for closure in (False, True)]
    assert len(set(both[0].num_steps.tolist())) > 1
    for row in range(8):
        (best,) = (both[0].trace[:, row] == both[0].residual[row]).nonzero().flatten().tolist()
        older += best + 1 < int(both[0].num_steps[row])
        there = family.solve(dataclasses.replace(solver, max_steps=best + 1), [row])
        for together in both:
            torch.testing.assert_close(together.value[row], there.value[0], rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(together.inverse.dense()[row], there.inverse.dense()[0], rtol=1e-6, atol=1e-8)
            assert together.inverse.rank[row] == there.inverse.rank[0]
    assert older, "a best point must be older than the last for this test to say something"


# --- modes -----------------------------------------------------------------------------------------------------------


@cases()
def test_float32(case: Case) -> None:
    solution = case.family().to(torch.float32).solve(case.tight(1e-5)).raise_for_status()
    assert solution.value.dtype == solution.residual.dtype == torch.float32
    assert solution.inverse is None or solution.inverse.dense().dtype == torch.float32
    value = solution.value.double()
    residual = case.family().residual(value)
    assert bool((residual.norm(dim=1) <= 1.5e-5 * (value + residual).norm(dim=1)).all())


@cases()
def test_autocast(case: Case) -> None:
    """The map computes in bfloat16 and the solver does not."""
    family, seen = case.family(batch=4).to(torch.float32), set()
    exact, f = family.solve(case.tight(1e-5)).raise_for_status(), family.f

    def watched(z: Tensor, *inputs: Tensor) -> Tensor:
        seen.add((z.dtype, (z @ z.T).dtype))
        return f(z, *inputs)

    family.f = watched
    with torch.autocast("cpu", torch.bfloat16):
        solution = family.solve(case.set(max_steps=40, rtol=1e-2))
    assert seen == {(torch.float32, torch.bfloat16)}
    assert solution.value.dtype == solution.residual.dtype == torch.float32
    assert solution.inverse is None or solution.inverse.dense().dtype == torch.float32
    torch.testing.assert_close(solution.value, exact.value, rtol=0.05, atol=0.05)


@cases(lambda case: not case.descends)
def test_half_precision(case: Case) -> None:
    """Such a state is solved in float32; only the map sees it."""
    x, seen = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).reshape(3, 4), set()

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.add(z.dtype)
        return -0.25 * z + x

    solution = eq.fixed_point(f, torch.zeros_like(x), x, solver=case.set(rtol=0.04), params=()).raise_for_status()
    assert seen == {torch.bfloat16}
    assert (solution.value.dtype, solution.residual.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(solution.value.double(), x.double() / 1.25, rtol=0.05, atol=0.03)


@of_maps
def test_memory_layout(case: Case) -> None:
    """Of start and input, and of what the map returns."""
    x = torch.randn(2, 3, 4, 5)
    strided, last = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), torch.channels_last
    results = []
    for t, form in ((x, None), (strided, None), (x.contiguous(memory_format=last), last)):
        assert t.is_contiguous() == (t is x)

        def f(z: Tensor, x: Tensor, form: torch.memory_format | None = form) -> Tensor:
            out = torch.tanh(0.4 * z.roll(1, 3) - 0.3 * z.roll(1, 1) + x)
            return out if form is None else out.contiguous(memory_format=form)

        results.append(eq.fixed_point(f, 0 * t, t, solver=case.set(max_steps=99), params=()).raise_for_status())
    for laid in results[1:]:
        torch.testing.assert_close(laid.value, results[0].value, rtol=1e-10, atol=1e-12)
        assert laid.num_steps.tolist() == results[0].num_steps.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@cases()
def test_device(case: Case) -> None:
    host, device = (case.family(batch=32).to(where).solve(case.tight()) for where in ("cpu", "cuda"))
    assert device.value.is_cuda
    assert device.status.is_cuda
    torch.testing.assert_close(device.value.cpu(), host.value, rtol=1e-7, atol=1e-9)
    assert device.status.tolist() == host.status.tolist()
    assert device.num_steps.tolist() == host.num_steps.tolist()
    assert device.inverse is None or device.inverse.dense().is_cuda


# --- blocks and projections ------------------------------------------------------------------------------------------


def clamped(problem: problems.Problem, seen: list[Tensor]) -> FunctionMap:
    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z)
        return problem.f(z, x)

    return FunctionMap(f, problem.z0, problem.inputs, params=(), projection=lambda z, x: z.clamp(-0.5, 0.5))


@projecting
def test_projection(case: Case) -> None:
    problem, seen = problems.affine(), []
    solution = case.tight(1e-9).solve(clamped(problem, seen), problem.z0 + 3).raise_for_status()
    assert not any(bool((z.abs() > 0.5).any()) for z in seen)
    reference = problem.z0
    for _ in range(300):
        reference = problem.f(reference, *problem.inputs).clamp(-0.5, 0.5)
    assert bool((reference.abs() == 0.5).any(dim=1).all()), "the constraint must bind"
    torch.testing.assert_close(solution.value, reference, rtol=1e-6, atol=1e-7)


@cases(lambda case: not case.solver.supports_projection)
def test_projection_refused(case: Case) -> None:
    problem, name = problems.affine(), type(case.solver).__name__
    with pytest.raises(ValueError, match=rf"^{name} cannot follow a projected map; use Anderson or Picard$"):
        case.set(max_steps=5).solve(clamped(problem, []), problem.z0)


@of_maps
def test_blocks(case: Case) -> None:
    problem = problems.two_scales()
    f = FunctionMap(problem.f, problem.z0, problem.inputs, params=(), blocks=(1, 6))
    solution = case.tight(1e-4).solve(f, f.pack(problem.z0)).raise_for_status()
    image = problem.f(f.unpack(solution.value), *problem.inputs)
    for part, new in zip(f.unpack(solution.value), image, strict=True):
        residual, size = (new - part).flatten(1).norm(dim=1), new.flatten(1).norm(dim=1)
        assert bool((residual <= 1e-4 * size * (1 + 1e-9)).all())


# --- fields ----------------------------------------------------------------------------------------------------------

DEFAULTS = (
    "Picard(max_steps=30, rtol=0.001, atol=0.0, patience=None, damping=1.0, lipschitz=None, one_sided=None)",
    "Anderson(max_steps=30, rtol=0.001, atol=0.0, patience=None, memory=5, mixing=1.0, ridge=0.0, growth=10.0, "
    "lipschitz=None)",
    "Broyden(max_steps=30, rtol=0.001, atol=0.0, patience=None, memory=18, min_denominator=1e-08)",
    "AdjointBroyden(max_steps=30, rtol=0.001, atol=0.0, patience=None, memory=36, min_denominator=1e-08, "
    "outer_every=None, outer_loss=None)",
    "SteadyState(max_steps=30, rtol=0.001, atol=0.0, patience=None, stepper=VCAB3(error_ratio=0.15), "
    "first_step=1.0, growth=3.0)",
    "LBFGS(max_steps=30, rtol=0.001, atol=0.0, patience=None, memory=10, armijo=0.0001, wolfe=0.9, "
    "min_curvature=1e-10, scaled=True, max_trials=20, outer_every=None, outer_loss=None)",
    "CG(max_steps=30, rtol=0.001, atol=0.0, patience=None, refresh=50)",
    "GMRES(max_steps=30, rtol=0.001, atol=0.0, patience=None, memory=20)",
    "VCAB3(error_ratio=0.15)",
    "BS3(error_ratio=0.1)",
    "Tsit5(error_ratio=0.02)",
    "Euler(error_ratio=0.3)",
)


@pytest.mark.parametrize("text", DEFAULTS, ids=lambda text: text.partition("(")[0])
def test_defaults(text: str) -> None:
    """A solver is its fields: it prints them, is made again from its text, and compares by them."""
    kind = getattr(solvers, text.partition("(")[0])
    assert repr(kind()) == text
    assert eval(text, vars(solvers)) == kind()
    first = dataclasses.fields(kind)[0].name
    other = dataclasses.replace(kind(), **{first: 7})
    assert other != kind() == dataclasses.replace(other, **{first: getattr(kind(), first)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), first, 7)
    with pytest.raises(TypeError, match="positional"):
        kind(7)


BAD_FIELDS = [
    ({"max_step": 3}, TypeError, "max_step"),
    ({"max_steps": -1}, ValueError, r"\(max_steps=-1\): must be >= 0"),
    ({"max_steps": 2.5}, TypeError, r"\(max_steps=2.5\): must be an integer$"),
    ({"max_steps": True}, TypeError, r"\(max_steps=True\): must be an integer$"),
    ({"rtol": -1e-3}, ValueError, r"\(rtol=-0.001\): must be >= 0; with both at 0 all max_steps are used"),
    ({"rtol": "1e-3"}, TypeError, r"\(rtol='1e-3'\): must be a number$"),
    ({"rtol": None}, TypeError, r"\(rtol=None\): must be a number$"),
    ({"atol": math.nan}, ValueError, r"\(atol=nan\): must be >= 0"),
    ({"patience": 0}, ValueError, r"\(patience=0\): must be >= 1, or None to wait until max_steps"),
    ({"patience": 2.5}, TypeError, r"\(patience=2.5\): must be an integer or None$"),
]
BAD_MEMORY = [
    ({"memory": 0}, ValueError, r"\(memory=0\): must be >= 1"),
    ({"memory": 2.5}, TypeError, r"\(memory=2.5\): must be an integer$"),
    ({"memory": None}, TypeError, r"\(memory=None\): must be an integer$"),
]
BAD: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    *((type(CASES[name].solver), *BAD_FIELDS[1]) for name in PLAIN),
    *((eq.Picard, *bad) for bad in BAD_FIELDS),
    *((kind, *bad) for kind in (eq.Broyden, eq.AdjointBroyden, eq.LBFGS, eq.GMRES) for bad in BAD_MEMORY),
    (eq.Anderson, {"memory": 2.5}, TypeError, r"\(memory=2.5\): must be an integer or None$"),
    (eq.Picard, {"one_sided": 0.0}, ValueError, r"\(one_sided=0.0, lipschitz=None\): needs a Lipschitz constant L and"),
    (
        eq.Picard,
        {"one_sided": 1.0, "lipschitz": 2.0},
        ValueError,
        r"\(one_sided=1.0, lipschitz=2.0\): .*-L <= one_s.* < 1",
    ),
    (eq.Picard, {"one_sided": -3.0, "lipschitz": 2.0}, ValueError, r"\(one_sided=-3.0, lipschitz=2.0\)"),
    (eq.Picard, {"one_sided": 0.0, "lipschitz": -1.0}, ValueError, r"\(one_sided=0.0, lipschitz=-1.0\)"),
    (eq.Picard, {"one_sided": math.nan, "lipschitz": 2.0}, ValueError, r"\(one_sided=nan, lipschitz=2.0\)"),
    (
        eq.Picard,
        {"one_sided": 0.0, "lipschitz": 2.0, "damping": 0.5},
        ValueError,
        r"0.5\): follows from .*; leave it out",
    ),
    (eq.Picard, {"damping": 0.0}, ValueError, r"\(damping=0.0\): must be > 0 and <= 1"),
    (eq.Picard, {"damping": 1.5}, ValueError, r"\(damping=1.5\): must be >"),
    (eq.Picard, {"damping": math.nan}, ValueError, r"\(damping=nan\): must be >"),
    (
        eq.Picard,
        {"lipschitz": 1.0},
        ValueError,
        r"\(lipschitz=1.0\): must be >= 0 and < 1; only a contraction has a bound",
    ),
    (eq.Picard, {"lipschitz": -0.1}, ValueError, r"\(lipschitz=-0.1\): must be >"),
    (eq.Anderson, {"memory": 0}, ValueError, r"\(memory=0\): must be >= 1; 1 is Picard iteration"),
    (eq.Anderson, {"mixing": 0.0}, ValueError, r"\(mixing=0.0\): must be > 0 and <= 1"),
    (eq.Anderson, {"mixing": 1.1}, ValueError, r"\(mixing=1.1\): must be >"),
    (eq.Anderson, {"ridge": -1e-9}, ValueError, r"\(ridge=-1e-09\): must be >= 0"),
    (eq.Anderson, {"ridge": math.nan}, ValueError, r"\(ridge=nan\): must be >= 0"),
    (eq.Anderson, {"growth": 1.0}, ValueError, r"\(growth=1.0\): must be > 1"),
    (
        eq.Anderson,
        {"lipschitz": 1.0},
        ValueError,
        r"\(lipschitz=1.0\): must be >= 0 and < 1; only a contraction has a b",
    ),
    (eq.Anderson, {"lipschitz": -0.5}, ValueError, r"\(lipschitz=-0.5\): must be >"),
    (eq.Anderson, {"lipschitz": 0.5, "mixing": 0.5}, ValueError, r"\(mixing=0.5\): must be 1 with lipschitz"),
    (eq.Broyden, {"min_denominator": -1.0}, ValueError, r"\(min_denominator=-1.0\): must be >= 0"),
    (eq.Broyden, {"min_denominator": math.nan}, ValueError, r"\(min_denominator=nan\): must be >= 0"),
    (eq.AdjointBroyden, {"min_denominator": -1.0}, ValueError, r"\(min_denominator=-1.0\): must be >= 0"),
    (eq.AdjointBroyden, {"memory": 1, "outer_every": 3}, ValueError, r"\(memory=1\): must be >= 2"),
    (eq.AdjointBroyden, {"outer_every": 0}, ValueError, r"\(outer_every=0\): must be >= 1, or None"),
    (eq.AdjointBroyden, {"outer_every": 2.5}, TypeError, r"\(outer_every=2.5\): must be an integer or None"),
    (eq.AdjointBroyden, {"outer_loss": 3, "outer_every": 2}, TypeError, r"\(outer_loss=3\): must be a function"),
    (eq.AdjointBroyden, {"outer_loss": torch.sum}, ValueError, r"\(outer_loss=...\) .*: set outer_every, say to 5"),
    (eq.LBFGS, {"max_trials": 0}, ValueError, r"\(max_trials=0\): must be >= 1"),
    (eq.LBFGS, {"wolfe": 1.0}, ValueError, r"wolfe=1.0\): must obey 0 < armijo < wolfe < 1"),
    (eq.LBFGS, {"armijo": 0.0}, ValueError, r"armijo=0.0, .*\): must obey"),
    (eq.LBFGS, {"armijo": 0.5, "wolfe": 0.5}, ValueError, r"armijo=0.5, .*\): must obey"),
    (
        eq.LBFGS,
        {"min_curvature": -1.0},
        ValueError,
        r"\(min_curvature=-1.0\): must be >= 0, else the inverse may be indefinite",
    ),
    (eq.LBFGS, {"outer_every": 0}, ValueError, r"\(outer_every=0\): must be >= 1, or None for no probes"),
    (eq.LBFGS, {"outer_every": 1.5}, TypeError, r"\(outer_every=1.5\): must be an integer or None"),
    (eq.LBFGS, {"outer_loss": torch.sum}, ValueError, r"\(outer_loss=\.\.\.\) without outer_every: .* outer_every=5"),
    (eq.CG, {"refresh": 0}, ValueError, r"\(refresh=0\): must be >= 1"),
    (eq.SteadyState, {"first_step": 0.0}, ValueError, r"\(first_step=0.0\): must be > 0 and < inf"),
    (eq.SteadyState, {"first_step": math.inf}, ValueError, r"\(first_step=inf\): must be > 0 and < inf"),
    (eq.SteadyState, {"growth": 0.5}, ValueError, r"\(growth=0.5\): must be >= 1; at 1 steps never grow"),
    (eq.SteadyState, {"stepper": "vcab3"}, TypeError, r"\(stepper='vcab3'\): must be a stepper such as VCAB3"),
    (solvers.VCAB3, {"error_ratio": 0.0}, ValueError, r"\(error_ratio=0.0\): must be > 0; math.inf controls no error"),
    (BS3, {"error_ratio": math.nan}, ValueError, r"\(error_ratio=nan\): must be > 0"),
]


@pytest.mark.parametrize(("kind", "fields", "error", "message"), BAD)
def test_bad_fields(kind: type, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        kind(**fields)
    assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (eq.Picard, {"max_steps": 0, "rtol": 0, "atol": 0, "patience": 1, "damping": 1, "lipschitz": 0}),
        (eq.Picard, {"one_sided": -2.0, "lipschitz": 2.0}),
        (eq.Picard, {"one_sided": 0, "lipschitz": 0}),
        (eq.Anderson, {"memory": 1, "mixing": 1, "ridge": 0, "lipschitz": 0}),
        (eq.Broyden, {"memory": 1, "min_denominator": 0}),
        (eq.AdjointBroyden, {"memory": 1, "min_denominator": 0}),
        (eq.AdjointBroyden, {"memory": 2, "outer_every": 1, "outer_loss": torch.sum}),
        (eq.LBFGS, {"memory": 1, "max_trials": 1, "min_curvature": 0, "outer_every": 1, "outer_loss": torch.sum}),
        (eq.CG, {"refresh": 1}),
        (eq.GMRES, {"memory": 1}),
        (eq.SteadyState, {"growth": 1}),
    ],
)
def test_least_fields(kind: type[eq.Solver], fields: dict[str, Any]) -> None:
    """The ends of the ranges are allowed."""
    solver = kind(**fields)
    assert all(getattr(solver, name) == value for name, value in fields.items())


class Operations(TorchDispatchMode):
    """Counts tensor operations; an operation whose result shares the memory of its argument is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func not in (
            torch.ops.aten.detach.default,
            torch.ops.aten._unsafe_view.default,
        )
        return func(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize(
    ("solver", "most"),
    [
        (eq.Picard, 28), (eq.Anderson, 55), (eq.Broyden, 66), (eq.AdjointBroyden, 85), (eq.SteadyState, 127),
        (eq.CG, 127), (eq.GMRES, 193),
    ],
)  # fmt: skip
def test_operations_of_a_round(solver: type[eq.Solver], most: int) -> None:
    w, x, marks = torch.linalg.qr(torch.randn(16, 16))[0] * 0.9, torch.randn(4, 16), []
    with Operations() as operations:

        def f(z: Tensor, x: Tensor) -> Tensor:
            marks.append(operations.count)
            return torch.tanh(z @ w + x)

        eq.fixed_point(f, torch.zeros_like(x), x, params=(), solver=solver(max_steps=25, rtol=0.0, atol=0.0))
    assert sorted(b - a for a, b in itertools.pairwise(marks))[len(marks) // 2] <= most


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver="anderson"), TypeError, "such as Anderson"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=eq.Anderson), TypeError, "such as Anderson"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(0, 3)), ValueError, r"\(0, 3\).*must not be empty"),
        (lambda: eq.fixed_point(torch.cos, torch.zeros(2, 3).long()), TypeError, r"torch.int64; convert it"),
        (lambda: eq.fixed_point(lambda z: z[:, :1], torch.zeros(2, 3)), ValueError, r"\(2, 1\).*\(B, 3\).*must return"),
        (lambda: eq.fixed_point(lambda z: z[:1], torch.zeros(2, 3)), ValueError, "1 rows for a state of 2; .*keep"),
        (lambda: eq.fixed_point(lambda z: z.float(), torch.zeros(2, 3)), TypeError, "float32.*float64; convert"),
        (lambda: eq.fixed_point(lambda z: (z, z), torch.zeros(2, 3)), TypeError, "must be a Tensor .*got tuple"),
        (lambda: eq.fixed_point(lambda z, x: z, torch.zeros(2, 3), torch.ones(3, 3)), ValueError, "input 0 .*batch 2"),
    ],
)
def test_bad_use(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
