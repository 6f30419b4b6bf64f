"""Laws of every gradient; a new one joins by one line in `CASES`."""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from problems import TanhCell, solve_linear
from torch import Tensor, nn

import equipoise as eq
from equipoise import gradients
from equipoise.core.function_map import DescentMap
from equipoise.core.linalg import InverseEstimate
from equipoise.fixed_point import solve_map

TIGHT = eq.Anderson(max_steps=200, rtol=1e-13)
SOLVERS = {
    "Picard": eq.Picard(max_steps=300, rtol=1e-13),
    "Anderson": TIGHT,
    "Broyden": eq.Broyden(max_steps=60, memory=60, rtol=1e-13),
    "SteadyState": eq.SteadyState(max_steps=600, rtol=1e-12),
}
INVERTING = SOLVERS["Broyden"]
EXACT = eq.Implicit(solver=TIGHT)
REFINED = eq.Implicit(solver=INVERTING, start=eq.Shine())

# --- the table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A gradient, a forward solver that suits it, and its value on a map `J = q v v^T` with `v . v = 1`, if fixed.

    What Broyden learns from steps as small as rounding errors is noise, which SHINE would make visible.
    """

    gradient: eq.Gradient
    series: Callable[[Tensor], Tensor] | None
    solver: eq.Solver = INVERTING

    @property
    def options(self) -> dict[str, Any]:
        return {"solver": self.solver, "gradient": self.gradient}

    def layer(self, cell: nn.Module | None = None) -> eq.nn.DEQ:
        return eq.nn.DEQ(TanhCell() if cell is None else cell, **self.options)

    def solve(self, f: Any, *inputs: Tensor, size: int = 6, **options: Any) -> eq.Solution[Tensor]:
        """Of three samples from zero."""
        return eq.fixed_point(f, torch.zeros(3, size), *inputs, **self.options, **options)


CASES = {
    "Implicit": Case(EXACT, lambda q: 1 / (1 - q)),
    "Implicit-refined": Case(REFINED, lambda q: 1 / (1 - q)),
    "Shine": Case(eq.Shine(), None, dataclasses.replace(INVERTING, rtol=1e-3)),
    "JacobianFree": Case(eq.JacobianFree(), torch.ones_like),
    "Neumann": Case(eq.Neumann(steps=3), lambda q: 1 + q + q**2 + q**3),
    "Phantom": Case(eq.Phantom(steps=2, damping=0.5), lambda q: 0.5 + 0.5 * (0.5 * q + 0.5)),
    "Unrolled": Case(eq.Unrolled(steps=4), lambda q: 1 + q + q**2 + q**3),
}


def cases(wanted: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items() if wanted(c)])


every, estimates = cases(), cases(lambda case: not case.gradient.exact)
implicit = cases(lambda case: not isinstance(case.gradient, eq.Unrolled))
both_kinds = pytest.mark.parametrize("closure", [True, False], ids=["closure", "named"])


def posed(cell: Any, x: Tensor, closure: bool) -> tuple[Any, ...]:
    """Map and inputs of a cell, as a closure or with the input named."""
    return (lambda z: cell(z, x),) if closure else (cell, x)


def tanh_map(z: Tensor, x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ w.T + x @ u.T + b)


def leaves(batch: int, d: int) -> list[Tensor]:
    """`x, w, u, b` of a contracting `tanh_map`, all wanting gradients."""
    cell = TanhCell(d, norm=0.5)
    return [t.detach().clone().requires_grad_() for t in (torch.randn(batch, d), cell.w, cell.u, cell.b)]


def shaped(kind: str, flat: Tensor) -> Any:
    """A state of 4 numbers per sample, as the container asked for."""
    parts = flat[:, :1], flat[:, 1:].reshape(-1, 3, 1)
    return {"tensor": flat, "tuple": parts, "dict": dict(zip("ab", parts, strict=True))}[kind]


def flattened(state: Any) -> Tensor:
    parts = (state,) if isinstance(state, Tensor) else state.values() if isinstance(state, dict) else state
    return torch.cat([part.flatten(1) for part in parts], dim=1)


class CountingCell(TanhCell):
    """Counts its evaluations and the cotangents that come back through it, apart from the library's own counts."""

    def __init__(self) -> None:
        super().__init__()
        self.evals = self.pulls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evals += 1
        out = super().forward(z, x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, g: Tensor) -> None:
        self.pulls += 1


# --- first derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "tensor") for name in SOLVERS), ("Anderson", "tuple"), ("Broyden", "dict")]
)
def test_finite_differences(name: str, kind: str) -> None:
    solver = SOLVERS[name]

    def equilibrium(x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        solution = eq.fixed_point(
            lambda z, x: shaped(kind, tanh_map(flattened(z), x, w, u, b)), shaped(kind, torch.zeros_like(x)), x,
            params=(w, u, b), solver=solver, gradient=eq.Implicit(solver=solver),
        )  # fmt: skip
        return flattened(solution.raise_for_status().value)

    torch.autograd.gradcheck(equilibrium, leaves(2, 4), fast_mode=True, check_undefined_grad=name == "Anderson")


@pytest.mark.parametrize("kind", ["tensor", "dict"])
@pytest.mark.thorough
def test_minimizer(kind: str) -> None:
    """First and second derivatives equal finite differences."""
    solver = eq.LBFGS(max_steps=100, memory=100, rtol=0, atol=1e-11)
    backward = eq.LBFGS(max_steps=100, rtol=0, atol=1e-12)

    def minimizer(x: Tensor, a: Tensor) -> Tensor:
        def objective(z: Any, x: Tensor) -> Tensor:
            flat = flattened(z)
            return (flat - x).square().sum(1) + nn.functional.softplus(flat @ a.T).sum(1)

        z0 = shaped(kind, torch.zeros_like(x))
        f = DescentMap(objective, z0, (x,), params=(a,))
        return flattened(solve_map(f, z0, solver=solver, gradient=eq.Implicit(solver=backward)).value)

    inputs = [torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    torch.autograd.gradcheck(minimizer, inputs, fast_mode=True)
    if kind == "tensor":
        torch.autograd.gradgradcheck(minimizer, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["Anderson", "SteadyState"])
def test_no_contraction(name: str) -> None:
    """A rotation by a right angle, three times as long: Picard iteration would blow up, forward and backward."""
    a, x, g = 3 * torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    solver = SOLVERS[name]
    z = solve_linear(a, x, solver, gradient=eq.Implicit(solver=solver)).raise_for_status().value
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], torch.linalg.solve(torch.eye(2) - a.T, g.T).T)


@cases(lambda case: case.series is not None)
def test_map_of_sums(case: Case) -> None:
    """The derivative of a sum is an expanded tensor, which must not be written to."""
    x = torch.randn(3, 4, requires_grad=True)
    solution = case.solve(lambda z, x: torch.tanh(x + 0.2 * z.sum(dim=1, keepdim=True)), x, size=4, params=())
    slope = 1 - solution.value.detach() ** 2  # J = 0.2 slope 1^T, so J^T 1 = q 1
    expected = case.series(0.2 * slope.sum(1, keepdim=True)) * slope
    torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), x)[0], expected)


@every
def test_descent(case: Case) -> None:
    """However crude: on a contraction estimate and gradient include an angle of less than 45 degrees here."""

    def grads(case: Case) -> Tensor:
        layer, x = case.layer(TanhCell(d=20, norm=0.7)), torch.linspace(-1, 1, 80).reshape(4, 20)
        return torch.cat([g.flatten() for g in torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))])

    assert float(torch.cosine_similarity(grads(case), grads(CASES["Implicit"]), dim=0)) > 0.7


@every
def test_spectral_norm_in_backward(case: Case) -> None:
    """It is not iterated, though far from converged: another iteration would change the map."""
    cell = eq.nn.spectral_norm(nn.Linear(6, 6))
    for buffer in cell.buffers():
        buffer.copy_(nn.functional.normalize(torch.randn_like(buffer), dim=0))
    z = case.solve(cell).value
    buffers = [buffer.clone() for buffer in cell.buffers()]
    z.sum().backward()
    assert len(buffers) == 2
    assert all(map(torch.equal, buffers, cell.buffers()))
    assert cell.parametrizations.weight.training


# --- graphs ----------------------------------------------------------------------------------------------------------


@every
def test_graphs(case: Case) -> None:
    """Two solves before one backward add up, a kept graph gives its gradient again, and equilibria compose."""
    layer, xs = case.layer(), torch.randn(2, 3, 6)
    parameters = list(layer.parameters())
    apart = [torch.autograd.grad(layer(x).sin().sum(), parameters) for x in xs]
    together = torch.autograd.grad(sum(layer(x).sin().sum() for x in xs), parameters)
    torch.testing.assert_close(list(together), [a + b for a, b in zip(*apart, strict=True)])
    x = xs[0].requires_grad_()
    middle = layer(x)
    once = torch.autograd.grad(middle, x, torch.ones(3, 6), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(middle, x, 2 * torch.ones(3, 6), retain_graph=True)[0], 2 * once)
    # The chain rule through two layers that share their cell: the second's cotangent is the first's.
    cut = middle.detach().requires_grad_()
    second = torch.autograd.grad(layer(cut).sin().sum(), [cut, *parameters])
    first = torch.autograd.grad(middle, [x, *parameters], second[0])
    actual = torch.autograd.grad(layer(layer(x)).sin().sum(), [x, *parameters])
    expected = [first[0], *(a + b for a, b in zip(first[1:], second[1:], strict=True))]
    torch.testing.assert_close(list(actual), expected)


@every
def test_frozen_parameters(case: Case) -> None:
    cell, x = TanhCell(), torch.randn(3, 6)
    expected = torch.autograd.grad(case.layer(cell)(x).sin().sum(), [cell.u, cell.b])
    cell.w.requires_grad_(False)
    case.layer(cell)(x).sin().sum().backward()
    assert cell.w.grad is None
    assert x.grad is None
    torch.testing.assert_close((cell.u.grad, cell.b.grad), expected)


@every
def test_unused(case: Case) -> None:
    """Parameters and inputs that the map ignores get zeros."""

    class Idle(TanhCell):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.ones(3))

        def forward(self, z: Tensor, x: Tensor, unused: Tensor) -> Tensor:
            return super().forward(z, x)

    cell, unused = Idle(), torch.randn(3, 2, requires_grad=True)
    z = case.solve(cell, torch.randn(3, 6), unused).value
    grads = torch.autograd.grad(z.sum(), [cell.w, cell.idle, unused], allow_unused=True)
    if isinstance(case.gradient, eq.Unrolled):  # plain backpropagation: what the graph does not contain gets None
        assert grads[1:] == (None, None)
    else:
        assert torch.equal(grads[1], torch.zeros(3))
        assert torch.equal(grads[2], torch.zeros(3, 2))
    assert bool((grads[0] != 0).any())


@every
@both_kinds
def test_nothing_tracked(case: Case, closure: bool) -> None:
    cell, x = TanhCell(), torch.randn(3, 6)
    for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        cell.requires_grad_(context is not contextlib.nullcontext)
        with context():
            value = case.solve(*posed(cell, x, closure)).value
        assert value.grad_fn is None
        assert not value.requires_grad


# --- closures --------------------------------------------------------------------------------------------------------


@every
def test_closure(case: Case) -> None:
    """It has the first derivatives of the named map."""
    cell, source = TanhCell(), torch.randn(3, 6, requires_grad=True)
    values = (case.solve(*posed(cell, source.sin(), closure)).value for closure in (True, False))  # no leaf
    grads = [torch.autograd.grad(z.sin().sum(), [source, *cell.parameters()]) for z in values]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@every
def test_params(case: Case) -> None:
    """Only what is named gets a gradient once they are given; a function without them is a closure over the rest."""
    x, w, u, b = leaves(3, 6)
    named, some, none = (
        case.solve(lambda z, x: tanh_map(z, x, w, u, b), x, params=params).value for params in ((w, u, b), (w,), None)
    )
    expected = torch.autograd.grad(named.sum(), [x, w, u, b])
    got = torch.autograd.grad(some.sum(), [x, w, u, b], allow_unused=True)
    torch.testing.assert_close(got[:2], expected[:2])
    assert got[2:] == (None, None) or isinstance(case.gradient, eq.Unrolled)
    torch.testing.assert_close(torch.autograd.grad(none.sum(), [x, w, u, b]), expected)


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        *(Case(eq.Implicit(solver=dataclasses.replace(s, rtol=1e-5)), None) for s in SOLVERS.values()),
        *(case for name, case in CASES.items() if name != "Implicit"),
    ],
    ids=[*(f"Implicit-{name}" for name in SOLVERS), *(name for name in CASES if name != "Implicit")],
)
def test_batch_independence(case: Case) -> None:
    """The samples contract at very different rates, so that rows leave early."""
    w, x, g = TanhCell(norm=1.0).w.detach(), torch.randn(5, 6), torch.randn(5, 6)
    strength, reports = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.02]), []
    gradient = case.gradient
    if isinstance(gradient, eq.Implicit):
        gradient = dataclasses.replace(gradient, observe=reports.append)

    def grad(rows: slice) -> tuple[Tensor, ...]:
        leaf, knob = x[rows].clone().requires_grad_(), strength[rows].clone().requires_grad_()
        f = lambda z, x, s: torch.tanh(s[:, None] * (z @ w.T) + x)  # noqa: E731
        z = eq.fixed_point(f, 0 * leaf.detach(), leaf, knob, params=(), solver=case.solver, gradient=gradient).value
        return torch.autograd.grad(z, [leaf, knob], g[rows])

    batch, alone = grad(slice(None)), [grad(slice(i, i + 1)) for i in range(5)]
    for whole, parts in zip(batch, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-10, atol=1e-10)
    if reports:
        steps = reports[0].num_steps.tolist()
        assert steps == [int(report.num_steps) for report in reports[1:]]
        assert len(set(steps)) > 2


@every
def test_isolation(case: Case) -> None:
    """A sample that fails harms no other, and one without cotangent gets zero."""
    w, x, g, grads = TanhCell().w.detach(), torch.randn(3, 6), torch.randn(3, 6), []
    for broken in (False, True):
        leaf = x.clone()
        leaf[1] = torch.nan if broken else leaf[1]
        leaf.requires_grad_()
        z = case.solve(lambda z, x: torch.tanh(z @ w.T + x), leaf, params=()).value
        grads.append(torch.autograd.grad(z, leaf, g)[0][[0, 2]])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    grad = torch.autograd.grad(case.layer()(x.requires_grad_())[1].sum(), x)[0]
    assert torch.equal(grad[[0, 2]], torch.zeros(2, 6))
    assert bool((grad[1].abs() > 0).all())


# --- counts ----------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(
    ("gradient", "vjps"),
    [
        (eq.JacobianFree(), 0),
        (eq.Shine(), 0),
        (eq.Neumann(steps=0), 0),
        (eq.Neumann(steps=4), 4),
        (eq.Phantom(steps=1), 0),
        (eq.Phantom(steps=4), 3),
        (eq.Implicit(solver=eq.Anderson(max_steps=0, rtol=0)), 0),
        (eq.Implicit(solver=eq.Anderson(max_steps=7, rtol=0)), 7),
        (eq.Implicit(solver=eq.Broyden(max_steps=1, rtol=0), start=eq.Shine()), 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, eq.Gradient) else str(v),
)
def test_counts(gradient: eq.Gradient, vjps: int, closure: bool) -> None:
    """Backward costs one evaluation and one product beside those of the adjoint, and nothing if it is not needed."""
    cell, x = CountingCell(), torch.randn(3, 6, requires_grad=True)
    solution = Case(gradient, None).solve(*posed(cell, x, closure))
    evals = cell.evals  # with the check of two rows, or of a closure, which is not counted
    assert evals - solution.num_evals in (0, 1)
    assert cell.pulls == 0
    torch.autograd.grad(x.sum() + 0 * solution.value.detach().sum(), x)
    assert (cell.evals, cell.pulls) == (evals, 0)
    solution.value.sum().backward()
    assert cell.pulls - vjps in (1, 2)  # one for parameters and inputs together; the adjoint of a closure is checked
    assert solution.map.counts.evals == solution.num_evals + (not closure)  # that of a closure is made in the solve
    assert solution.map.counts.vjps == vjps


@implicit  # unrolling holds its graph
def test_saved_tensors(case: Case) -> None:
    """Between forward and backward only the equilibrium is held, beside inputs and parameters."""
    held: list[Tensor] = []
    cell, x = TanhCell(), torch.randn(3, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        z = case.solve(cell, x).value
    assert sorted(t.data_ptr() for t in held) == sorted(t.data_ptr() for t in (z, x, *cell.parameters()))


@every
def test_lifetime_of_the_inverse(case: Case) -> None:
    """It lives as long as the graph that needs it: no cycle of references waits for the garbage collector."""

    def alive() -> int:
        return sum(type(o) is InverseEstimate for o in gc.get_objects())

    gc.freeze()  # what was there before is not counted
    try:
        z = case.layer()(torch.randn(3, 6))
        assert alive() == int(case.gradient.uses_inverse)
        z.sum().backward()
        del z
        assert alive() == 0
    finally:
        gc.unfreeze()


# --- reports of the adjoint ------------------------------------------------------------------------------------------


def report(g: Tensor, max_steps: int = 50, start: Any = None) -> tuple[Tensor, eq.Solution[Tensor]]:
    """The adjoint vector of an affine map, the matrix of which is that of `TanhCell`, and its record."""
    reports: list[eq.Solution[Tensor]] = []
    solver, x = eq.Anderson(max_steps=max_steps, rtol=1e-6), torch.randn(len(g), 6, requires_grad=True)
    gradient = eq.Implicit(solver=solver, start=start, observe=reports.append)
    z = solve_linear(TanhCell().w.detach(), x, TIGHT, gradient=gradient).value
    assert not reports
    (w,) = torch.autograd.grad(z, x, g)  # df/dx is the identity
    return w, reports[0]


@pytest.mark.parametrize("max_steps", [0, 1, 3, 50])
def test_report(max_steps: int) -> None:
    """It tells the truth; running out of steps is data: nothing is raised or warned."""
    g, a = torch.tensor([[1e-6], [1.0], [1e5]]) * torch.randn(3, 6), TanhCell().w.detach()
    w, found = report(g, max_steps)
    if max_steps == 0:
        torch.testing.assert_close(w, g, rtol=1e-15, atol=0)
        assert bool(found.residual.isinf().all())  # nothing was evaluated
    else:
        residual = (w @ a + g - w).norm(dim=1) / g.norm(dim=1)
        torch.testing.assert_close(found.residual, residual, rtol=1e-8, atol=1e-13)
    assert torch.equal(found.value, w)
    assert found.converged.tolist() == [max_steps == 50] * 3
    assert max(found.num_steps.tolist()) == found.num_vjps <= max_steps
    if max_steps < 50:
        assert set(found.status.tolist()) == {eq.Status.MAX_STEPS}
        with pytest.raises(eq.ConvergenceError, match="MAX_STEPS: 3 of 3 samples"):
            found.raise_for_status()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_start_at_the_solution(scale: float) -> None:
    g = scale * torch.randn(3, 6)
    exact = torch.linalg.solve(torch.eye(6) - TanhCell().w.detach().T, g.T).T
    w, found = report(g, start=exact)
    torch.testing.assert_close(w, exact)
    assert found.num_vjps == 1


def test_zero_cotangent() -> None:
    """Its adjoint is zero, wherever it starts, and so is its report."""
    g = torch.randn(3, 6)
    g[1:] = 0
    w, found = report(g, start=torch.randn(3, 6))
    assert w[0].abs().min() > 0
    assert torch.equal(w[1:], torch.zeros(2, 6))
    assert found.converged.all()
    assert torch.equal(found.residual[1:], torch.zeros(2))


def test_no_adjoint_solution() -> None:
    """With J = I, J^T w is w itself: adding to it in place would change w, and call the equation solved."""
    reports: list[eq.Solution[Tensor]] = []
    x, g = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3)
    for gradient in (eq.Implicit(observe=reports.append), eq.Neumann(steps=3)):
        solution = eq.fixed_point(lambda z, x: z + 0 * x, torch.zeros(2, 3), x, params=(), gradient=gradient)
        torch.autograd.grad(solution.value, x, g)
    assert not reports[0].converged.any()
    torch.testing.assert_close(reports[0].residual, torch.ones(2))
    assert torch.equal(g, torch.ones(2, 3))


# --- modes -----------------------------------------------------------------------------------------------------------


@every
def test_float32(case: Case) -> None:
    gradient, grads = case.gradient, []
    if isinstance(gradient, eq.Implicit):
        gradient = dataclasses.replace(gradient, solver=dataclasses.replace(gradient.solver, rtol=1e-6))
    solver = eq.Broyden(max_steps=40, memory=40, rtol=max(case.solver.rtol, 1e-6))
    for dtype in (torch.float32, torch.float64):
        cell, x = TanhCell().to(dtype), torch.linspace(-1, 1, 18, dtype=dtype).reshape(3, 6).requires_grad_()
        z = eq.nn.DEQ(cell, solver=solver, gradient=gradient)(x)
        grads.append(torch.autograd.grad(z.sin().sum(), [x, *cell.parameters()]))
        assert {grad.dtype for grad in grads[-1]} == {dtype}
    torch.testing.assert_close(*([g.double() for g in gs] for gs in grads), rtol=1e-4, atol=1e-4)


def coarse(case: Case, cell: nn.Module) -> eq.nn.DEQ:
    steps = 4 if isinstance(case.gradient, eq.Shine) else 12
    return eq.nn.DEQ(cell, solver=eq.Broyden(max_steps=steps), gradient=case.gradient)


def alike(a: Tensor, b: Tensor) -> bool:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)) > 0.98


@every
@pytest.mark.parametrize("outside", [True, False], ids=["backward outside", "backward inside"])
def test_autocast(case: Case, outside: bool) -> None:
    """Backward evaluates in the state of the forward pass."""
    seen: list[torch.dtype] = []

    class Watched(TanhCell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            u = z @ self.w.T + x @ self.u.T
            seen.append(u.dtype)
            return torch.tanh(u.float() + self.b)

    layer, x = coarse(case, Watched().float()), torch.linspace(-1, 1, 18, dtype=torch.float32).reshape(3, 6)
    expected = torch.autograd.grad(layer(x).sin().sum(), layer.cell.w)[0]
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).sin().sum()
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert layer.cell.w.grad.dtype == torch.float32
    assert alike(layer.cell.w.grad, expected)


@every
def test_half_precision(case: Case) -> None:
    """Such states are differentiated in single precision."""
    x = torch.linspace(-1, 1, 18, dtype=torch.bfloat16).reshape(3, 6).requires_grad_()
    y = x.detach().double().requires_grad_()
    z = coarse(case, TanhCell().bfloat16())(x)
    (grad,), (expected,) = torch.autograd.grad(z.sum(), x), torch.autograd.grad(coarse(case, TanhCell())(y).sum(), y)
    assert z.dtype == grad.dtype == torch.bfloat16
    assert alike(grad, expected)


@every
def test_memory_layout(case: Case) -> None:
    cell, dense, results = TanhCell(8), torch.randn(3, 2, 2, 2), []
    params = tuple(cell.parameters())
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.flip(0).clone().flip(0).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]
    for layout in layouts:
        x, z0 = layout(dense).requires_grad_(), layout(torch.zeros_like(dense))
        f = lambda z, x: cell(z.flatten(1), x.flatten(1)).view(z.shape)  # noqa: E731
        z = eq.fixed_point(f, z0, x, params=params, **case.options).value
        results.append(torch.autograd.grad(z, [x, *params], layout(dense.cos())))
        assert x.is_contiguous() == (layout is layouts[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    # An expanded input, and the expanded cotangent of a sum.
    row = torch.randn(1, 8, requires_grad=True)
    same = eq.fixed_point(cell, torch.zeros(1, 8), row, **case.options).value
    many = case.solve(cell, row.expand(3, 8), size=8).value
    actual, expected = (torch.autograd.grad(z.sum(), row)[0] for z in (many, same))
    torch.testing.assert_close(actual, 3 * expected, rtol=1e-9, atol=1e-10)


# --- second derivatives ----------------------------------------------------------------------------------------------


def loss(z: Tensor) -> Tensor:
    return (z.sin() * z).sum()


def posed_twice(solver: eq.Solver, gradient: eq.Gradient) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Input and parameters of a cell, and the equilibrium at their values."""
    cell = TanhCell(4)
    tensors = [torch.randn(2, 4, requires_grad=True), *cell.parameters()]
    options = {"solver": solver, "gradient": gradient}
    return tensors, lambda: eq.fixed_point(cell, torch.zeros(2, 4), tensors[0], **options).value


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        *((solver, eq.Implicit(solver=solver)) for solver in SOLVERS.values()),
        (INVERTING, eq.Implicit(solver=INVERTING, start=eq.Shine(fallback_ratio=math.inf))),
        (TIGHT, eq.Implicit(solver=TIGHT, start=torch.ones(2, 4))),
        (eq.Picard(max_steps=0), eq.Unrolled(steps=6)),
    ],
    ids=[*SOLVERS, "refined", "warm start", "Unrolled"],
)
@pytest.mark.thorough
def test_hessian_vector_products(solver: eq.Solver, gradient: eq.Gradient) -> None:
    tensors, value = posed_twice(solver, gradient)
    directions = [torch.randn_like(t) for t in tensors]

    def first() -> Tensor:
        """All first derivatives as one vector, differentiable."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(value()), tensors, create_graph=True)])

    def moved(size: float) -> Tensor:
        with torch.no_grad():
            for t, v in zip(tensors, directions, strict=True):
                t.add_(v, alpha=size)
        return first().detach()

    slopes = first()
    probe = torch.randn_like(slopes)
    seconds = torch.autograd.grad(slopes @ probe, tensors)
    product = sum((h * v).sum() for h, v in zip(seconds, directions, strict=True))  # probe^T H v
    h = 1e-4  # fourth order: h^4 and rounding / h are both far below the tolerance
    values = [moved(h), moved(h), moved(-3 * h), moved(-h)]  # at h, 2h, -h, -2h
    difference = (8 * (values[0] - values[2]) - (values[1] - values[3])) / (12 * h)
    assert abs(float(product - probe @ difference)) <= 1e-6 * float(probe.norm() * difference.norm())


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [(TIGHT, EXACT), (eq.Picard(max_steps=0), eq.Unrolled(steps=5))],
    ids=["Implicit", "Unrolled"],
)
def test_gradgradcheck(solver: eq.Solver, gradient: eq.Gradient) -> None:
    def equilibrium(x: Tensor, w: Tensor) -> Tensor:
        f = lambda z, x: torch.tanh(z @ w.T + x)  # noqa: E731
        return eq.fixed_point(f, torch.zeros_like(x), x, params=(w,), solver=solver, gradient=gradient).value

    w = (0.4 * torch.randn(3, 3)).requires_grad_()
    torch.autograd.gradgradcheck(equilibrium, [torch.randn(2, 3, requires_grad=True), w], fast_mode=True)


def test_third_derivatives() -> None:
    """Those of a long unrolled iteration."""

    def third(solver: eq.Solver, gradient: eq.Gradient) -> Tensor:
        a = torch.tensor(0.7, requires_grad=True)
        z = eq.fixed_point(lambda z: a * z.cos(), torch.zeros(1, 1), params=(a,), solver=solver, gradient=gradient)
        d: Tensor = z.value.sum()
        for _ in range(3):
            (d,) = torch.autograd.grad(d, a, create_graph=True)
        return d.detach()

    expected = third(eq.Picard(max_steps=0), eq.Unrolled(steps=150))
    torch.testing.assert_close(third(TIGHT, EXACT), expected, rtol=1e-9, atol=0)


def test_gradient_penalty() -> None:
    """The usual use: the loss contains a gradient, and .backward() differentiates it, as in a long unrolled network."""
    found = []
    for solver, gradient in ((TIGHT, EXACT), (eq.Picard(max_steps=0), eq.Unrolled(steps=100))):
        torch.manual_seed(1)
        tensors, value = posed_twice(solver, gradient)
        (g,) = torch.autograd.grad(loss(value()), tensors[0], create_graph=True)
        (loss(value()) + g.square().sum()).backward()
        found.append([t.grad for t in tensors])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@estimates
def test_estimates_refuse(case: Case) -> None:
    """They cannot be differentiated again, whatever is asked for and however."""
    tensors, value = posed_twice(INVERTING, case.gradient)
    name = type(case.gradient).__name__
    message = rf"^{name} estimates the gradient and cannot be differentiated again; use Implicit\(\) or Unrolled\(\)"
    for target in tensors[:2]:
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(loss(value()), target, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        loss(value()).backward(create_graph=True)
    assert all(t.grad is None for t in tensors)


@implicit
def test_closures_refuse(case: Case) -> None:
    cell, x = TanhCell(), torch.randn(3, 6, requires_grad=True)
    z = case.solve(lambda z: cell(z, x)).value
    with pytest.raises(RuntimeError, match=r"first derivatives only: pass the module itself.*params=\[\.\.\.\]"):
        torch.autograd.grad(loss(z), x, create_graph=True)


def test_unrolled_closure() -> None:
    """It can be differentiated again."""
    cell, x = TanhCell(), torch.randn(3, 6, requires_grad=True)
    seconds = []
    for gradient, closure in ((eq.Unrolled(steps=200), True), (EXACT, False)):
        z = Case(gradient, None, TIGHT).solve(*posed(cell, x, closure)).value
        (g,) = torch.autograd.grad(loss(z), x, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


# --- fields ----------------------------------------------------------------------------------------------------------

ADJOINT = eq.Anderson(max_steps=50, rtol=1e-5, memory=None, growth=math.inf)
DEFAULTS = (
    f"Implicit(solver={ADJOINT!r}, start=None, observe=None)",
    "Shine(fallback_ratio=1.3, observe=None)",
    "JacobianFree()",
    "Neumann(steps=5)",
    "Phantom(steps=5, damping=0.5)",
    "Unrolled(steps=8)",
)


@pytest.mark.parametrize("text", DEFAULTS, ids=lambda text: text.partition("(")[0])
def test_defaults(text: str) -> None:
    """A gradient is its fields: it prints them, is made again from its text, and compares by them."""
    kind = getattr(gradients, text.partition("(")[0])
    assert repr(kind()) == text
    assert eval(text, {**vars(gradients), "Anderson": eq.Anderson, "inf": math.inf}) == kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().steps = 3
    with pytest.raises(TypeError, match="positional"):
        kind(7)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedsProducts(eq.Picard):
    uses_vjp: ClassVar[bool] = True


def differentiated(start: Any) -> None:
    eq.nn.DEQ(TanhCell(), gradient=eq.Implicit(start=start))(torch.randn(3, 6)).sum().backward()


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: eq.Implicit(solver="anderson"), TypeError, r"^Implicit\(solver='anderson'\): must be a solver such as"),
    (lambda: eq.Implicit(start=1.0), TypeError, r"^Implicit\(start=1.0\): must be None, a gradient such as Shine\(\)"),
    (lambda: eq.Implicit(solver=NeedsProducts()), TypeError, r"NeedsProducts\): needs products with J, not only wi"),
    (lambda: eq.Shine(fallback_ratio=-1.0), ValueError, r"^Shine\(fallback_ratio=-1.0\): must be >= 0"),
    (lambda: eq.Shine(fallback_ratio=math.nan), ValueError, r"^Shine\(fallback_ratio=nan\): must be >= 0"),
    (lambda: eq.Neumann(steps=-1), ValueError, r"^Neumann\(steps=-1\): must be >= 0"),
    (lambda: eq.Phantom(steps=0), ValueError, r"^Phantom\(steps=0\): must be >= 1"),
    (lambda: eq.Phantom(damping=0.0), ValueError, r"^Phantom\(damping=0.0\): must be > 0 and <= 1"),
    (lambda: eq.Phantom(damping=1.5), ValueError, r"^Phantom\(damping=1.5\): must be > 0 and <= 1"),
    (lambda: eq.Phantom(damping=math.nan), ValueError, r"^Phantom\(damping=nan\): must be > 0 and <= 1"),
    (lambda: eq.Unrolled(steps=0), ValueError, r"^Unrolled\(steps=0\): must be >= 1"),
    (
        lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), gradient=eq.Implicit),
        TypeError, r"^gradient must be a gradient such as Implicit\(\), got <class",
    ),
    (lambda: differentiated(torch.zeros(3, 5)), ValueError, r"^Implicit\(start=...\) has shape \(3, 5\), .* \(3, 6\)"),
    (lambda: differentiated(eq.Unrolled()), TypeError, "cannot start an adjoint solve"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_use(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_least_fields() -> None:
    """The ends of the ranges are allowed."""
    assert (eq.Neumann(steps=0).steps, eq.Phantom(steps=1, damping=1).damping, eq.Unrolled(steps=1).steps) == (0, 1, 1)
    assert eq.Shine(fallback_ratio=0).fallback_ratio == 0


@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson(), eq.SteadyState()], ids=lambda s: type(s).__name__)
@cases(lambda case: case.gradient.uses_inverse)
def test_solver_without_inverse(case: Case, solver: eq.Solver) -> None:
    name = type(case.gradient).__name__
    message = rf"^gradient {name}\(.*{type(solver).__name__} keeps none; use Broyden or LBFGS as solver, or Implicit"
    layer = eq.nn.DEQ(nn.Linear(2, 2), solver=solver, gradient=case.gradient, init=lambda: torch.zeros(1, 2))
    for use in (layer, lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), solver=solver, gradient=case.gradient)):
        with pytest.raises(ValueError, match=message):
            use()
    with torch.no_grad():
        layer()
