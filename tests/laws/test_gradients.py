"""What every gradient promises: right first derivatives for all solvers and states, counts, modes, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from problems import TanhCell
from torch import Tensor, nn

import equipoise as eq
from equipoise.core.function_map import DescentMap
from equipoise.fixed_point import solve_map

TIGHT = eq.Anderson(max_steps=200, rtol=1e-13)
SOLVERS = {
    "Picard": eq.Picard(max_steps=300, rtol=1e-13),
    "Anderson": TIGHT,
    "Broyden": eq.Broyden(max_steps=60, memory=60, rtol=1e-13),
    "SteadyState": eq.SteadyState(max_steps=300, rtol=1e-11),
}
INVERTING = SOLVERS["Broyden"]
EXACT = eq.Implicit(solver=TIGHT)
ESTIMATORS = [eq.Shine(), eq.JacobianFree(), eq.Neumann(steps=3), eq.Phantom(steps=3)]
ALL = [EXACT, eq.Implicit(solver=INVERTING, start=eq.Shine()), *ESTIMATORS, eq.Unrolled(steps=4)]


def forward(gradient: eq.gradients.Gradient) -> eq.Broyden:
    """A forward solver that suits: what Broyden learns from steps as small as rounding errors is noise, which SHINE
    would make visible."""
    return dataclasses.replace(INVERTING, rtol=1e-3) if isinstance(gradient, eq.Shine) else INVERTING


by_name = pytest.mark.parametrize("gradient", ALL, ids=lambda g: type(g).__name__)


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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class CountingCell(TanhCell):
    """Counts its evaluations and the cotangents that come back through it, apart from the library's own counts."""

    def __init__(self, d: int = 6, norm: float = 0.8) -> None:
        super().__init__(d, norm)
        self.evals = self.pulls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evals += 1
        out = super().forward(z, x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, g: Tensor) -> None:
        self.pulls += 1


# --- first derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("name", SOLVERS)
def test_implicit_gradient_equals_finite_differences(name: str, kind: str) -> None:
    solver = SOLVERS[name]

    def equilibrium(x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        solution = eq.fixed_point(
            lambda z, x: shaped(kind, tanh_map(flattened(z), x, w, u, b)),
            shaped(kind, torch.zeros_like(x)),
            x,
            params=(w, u, b),
            solver=solver,
            gradient=eq.Implicit(solver=solver),
        )
        return flattened(solution.raise_for_status().value)

    torch.autograd.gradcheck(equilibrium, leaves(2, 4), fast_mode=True, check_undefined_grad=name == "Anderson")


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_implicit_gradient_of_a_minimizer_equals_finite_differences(kind: str) -> None:
    solver = eq.LBFGS(max_steps=100, memory=100, rtol=0, atol=1e-11)

    def minimizer(x: Tensor, a: Tensor) -> Tensor:
        def objective(z: Any, x: Tensor) -> Tensor:
            flat = flattened(z)
            return (flat - x).square().sum(1) + nn.functional.softplus(flat @ a.T).sum(1)

        z0 = shaped(kind, torch.zeros_like(x))
        f = DescentMap(objective, z0, (x,), params=(a,))
        backward = eq.LBFGS(max_steps=100, rtol=0, atol=1e-12)
        return flattened(solve_map(f, z0, solver=solver, gradient=eq.Implicit(solver=backward)).value)

    x, a = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    torch.autograd.gradcheck(minimizer, [x, a], fast_mode=True)


@pytest.mark.parametrize("name", ["Anderson", "SteadyState"])
def test_implicit_needs_no_contraction(name: str) -> None:
    # A rotation by a right angle, three times as long: Picard iteration would blow up, forward and backward.
    a = 3 * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    x = torch.randn(3, 2, requires_grad=True)
    solver = SOLVERS[name]
    solution = eq.fixed_point(
        lambda z, x: z @ a.T + x, torch.zeros(3, 2), x, solver=solver, gradient=eq.Implicit(solver=solver), params=()
    )
    g = torch.randn(3, 2)
    (grad,) = torch.autograd.grad(solution.raise_for_status().value, x, g)
    torch.testing.assert_close(grad, torch.linalg.solve(torch.eye(2) - a.T, g.T).T)


@pytest.mark.parametrize(
    ("gradient", "series"),
    [
        (EXACT, lambda q: 1 / (1 - q)),
        (eq.Implicit(solver=INVERTING, start=eq.Shine()), lambda q: 1 / (1 - q)),
        (eq.Neumann(steps=3), lambda q: 1 + q + q**2 + q**3),
        (eq.Phantom(steps=2, damping=0.5), lambda q: 0.5 + 0.5 * (0.5 * q + 0.5)),
        (eq.JacobianFree(), torch.ones_like),
        (eq.Unrolled(steps=3), lambda q: 1 + q + q**2),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_map_of_sums_has_gradients(gradient: eq.gradients.Gradient, series: Callable[[Tensor], Tensor]) -> None:
    # The derivative of a sum is an expanded tensor, which must not be written to.
    x = torch.randn(3, 4, requires_grad=True)
    solution = eq.fixed_point(
        lambda z, x: torch.tanh(x + 0.2 * z.sum(dim=1, keepdim=True)),
        torch.zeros(3, 4), x, params=(), solver=INVERTING, gradient=gradient,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(solution.value.sum(), x)
    slope = 1 - solution.value.detach() ** 2  # J = 0.2 slope 1^T, so J^T 1 = q 1
    torch.testing.assert_close(grad, series(0.2 * slope.sum(1, keepdim=True)) * slope)


def test_an_adjoint_without_solution_is_reported_and_leaves_the_cotangent_alone() -> None:
    # With J = I, J^T w is w itself: adding to it in place would change w, and call the equation solved.
    reports: list[eq.Solution[Tensor]] = []
    x, g = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3)
    for gradient in (eq.Implicit(observe=reports.append), eq.Neumann(steps=3)):
        solution = eq.fixed_point(lambda z, x: z + 0 * x, torch.zeros(2, 3), x, params=(), gradient=gradient)
        torch.autograd.grad(solution.value, x, g)
    assert not reports[0].converged.any()
    torch.testing.assert_close(reports[0].residual, torch.ones(2))
    assert torch.equal(g, torch.ones(2, 3))


@by_name
def test_gradients_descend_on_a_contraction(gradient: eq.gradients.Gradient) -> None:
    # However crude: on a contraction the estimate and the gradient include an angle of less than 45 degrees here.
    def grads(gradient: eq.gradients.Gradient) -> Tensor:
        cell, x = TanhCell(d=20, norm=0.7), torch.linspace(-1, 1, 80).reshape(4, 20)
        z = eq.fixed_point(cell, torch.zeros(4, 20), x, solver=forward(gradient), gradient=gradient).value
        z.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in cell.parameters() if p.grad is not None])

    assert float(torch.cosine_similarity(grads(gradient), grads(EXACT), dim=0)) > 0.7


@pytest.mark.parametrize("scale", [1e-8, 1e-30, 1e30])
def test_the_accuracy_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    x, *params = leaves(3, 4)
    f = lambda z, x: tanh_map(z, x, *params)  # noqa: E731
    for start in (None, eq.JacobianFree(), torch.zeros(3, 4)):
        # An absolute tolerance would take a small cotangent for solved, if it were not scaled.
        gradient = eq.Implicit(solver=eq.Anderson(max_steps=100, rtol=0, atol=1e-12), start=start)
        z = eq.fixed_point(f, torch.zeros(3, 4), x, params=params, solver=TIGHT, gradient=gradient).value
        one, scaled = (torch.autograd.grad(s * z.sum(), [x, *params], retain_graph=True) for s in (1.0, scale))
        for a, b in zip(one, scaled, strict=True):
            torch.testing.assert_close(b / scale, a, rtol=1e-10, atol=1e-11)


class NoisyCell(nn.Module):
    """Dropout, weight normalisation and a spectral norm that learns: all that differs between modes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = eq.nn.spectral_norm(nn.Linear(6, 6))
        self.outer = eq.nn.weight_norm(nn.Linear(6, 6))
        self.dropout = eq.nn.VariationalDropout(0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.outer(self.dropout(torch.tanh(self.inner(z)))) + x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_noise_and_normalized_weights_are_those_of_the_forward_pass(training: bool) -> None:
    # Finite differences of solves with the same seeds; in training mode each solve also iterates the spectral norm.
    cell, x, direction = NoisyCell().train(training), torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    state = {name: value.clone() for name, value in cell.state_dict().items()}

    def equilibrium(x: Tensor, move: float = 0.0) -> Tensor:
        cell.load_state_dict(state)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter, step in zip(cell.parameters(), steps, strict=True):
                parameter.add_(step, alpha=move)
        return eq.fixed_point(cell, torch.zeros(3, 6), x + move * direction, solver=TIGHT, gradient=EXACT).value

    steps = [torch.randn_like(p) for p in cell.parameters()]
    g = torch.randn(3, 6)
    grads = torch.autograd.grad(equilibrium(x), [x, *cell.parameters()], g)
    slope = sum(float((grad * step).sum()) for grad, step in zip(grads, [direction, *steps], strict=True))
    with torch.no_grad():
        h = 1e-5
        difference = float(((equilibrium(x, h) - equilibrium(x, -h)) * g).sum()) / (2 * h)
    assert slope == pytest.approx(difference, rel=1e-6)


@by_name
def test_backward_iterates_no_spectral_norm(gradient: eq.gradients.Gradient) -> None:
    cell = NoisyCell()
    for buffer in cell.buffers():  # far from converged: another power iteration would change the map
        buffer.copy_(nn.functional.normalize(torch.randn_like(buffer), dim=0))
    z = eq.fixed_point(cell, torch.zeros(3, 6), torch.randn(3, 6), solver=forward(gradient), gradient=gradient).value
    buffers = [buffer.clone() for buffer in cell.buffers()]
    z.sum().backward()
    assert len(buffers) == 2
    assert all(map(torch.equal, buffers, cell.buffers()))
    assert cell.inner.parametrizations.weight.training


# --- graphs --------------------------------------------------------------------------------------------------------


@by_name
def test_two_solves_before_one_backward_add_up(gradient: eq.gradients.Gradient) -> None:
    layer = eq.nn.DEQ(TanhCell(), solver=forward(gradient), gradient=gradient)
    xs = torch.randn(2, 3, 6)
    apart = [torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters())) for x in xs]
    together = torch.autograd.grad(sum(layer(x).sin().sum() for x in xs), list(layer.parameters()))
    torch.testing.assert_close(list(together), [a + b for a, b in zip(*apart, strict=True)])


@by_name
def test_equilibria_compose(gradient: eq.gradients.Gradient) -> None:
    # The chain rule through two layers that share their cell: the second's cotangent is the first's.
    layer, x = eq.nn.DEQ(TanhCell(), solver=forward(gradient), gradient=gradient), torch.randn(3, 6, requires_grad=True)
    middle = layer(x)
    cut = middle.detach().requires_grad_()
    second = torch.autograd.grad(layer(cut).sin().sum(), [cut, *layer.parameters()])
    first = torch.autograd.grad(middle, [x, *layer.parameters()], second[0])
    expected = [first[0], *(a + b for a, b in zip(first[1:], second[1:], strict=True))]
    actual = torch.autograd.grad(layer(layer(x)).sin().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(list(actual), expected)


@by_name
def test_a_kept_graph_gives_the_same_gradient_again(gradient: eq.gradients.Gradient) -> None:
    layer, x = eq.nn.DEQ(TanhCell(), solver=forward(gradient), gradient=gradient), torch.randn(3, 6, requires_grad=True)
    z = layer(x)
    once = torch.autograd.grad(z, x, torch.ones(3, 6), retain_graph=True)[0]
    twice = torch.autograd.grad(z, x, 2 * torch.ones(3, 6))[0]
    torch.testing.assert_close(twice, 2 * once)


@by_name
def test_frozen_parameters_get_no_gradient_and_change_no_other(gradient: eq.gradients.Gradient) -> None:
    cell, x = TanhCell(), torch.randn(3, 6)
    layer = eq.nn.DEQ(cell, solver=forward(gradient), gradient=gradient)
    expected = torch.autograd.grad(layer(x).sin().sum(), [cell.u, cell.b])
    cell.w.requires_grad_(False)
    layer(x).sin().sum().backward()
    assert cell.w.grad is None
    assert x.grad is None
    torch.testing.assert_close((cell.u.grad, cell.b.grad), expected)


@by_name
def test_unused_parameters_and_inputs_get_zeros(gradient: eq.gradients.Gradient) -> None:
    class Idle(TanhCell):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.ones(3))

        def forward(self, z: Tensor, x: Tensor, unused: Tensor) -> Tensor:
            return super().forward(z, x)

    cell, x, unused = Idle(), torch.randn(3, 6), torch.randn(3, 2, requires_grad=True)
    z = eq.fixed_point(cell, torch.zeros(3, 6), x, unused, solver=forward(gradient), gradient=gradient).value
    grads = torch.autograd.grad(z.sum(), [cell.w, cell.idle, unused], allow_unused=True)
    if isinstance(gradient, eq.Unrolled):  # plain backpropagation: what the graph does not contain gets None
        assert grads[1:] == (None, None)
    else:
        assert torch.equal(grads[1], torch.zeros(3))
        assert torch.equal(grads[2], torch.zeros(3, 2))
    assert bool((grads[0] != 0).any())


@by_name
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "named"])
def test_nothing_is_tracked_where_nothing_wants_a_gradient(gradient: eq.gradients.Gradient, closure: bool) -> None:
    cell, x = CountingCell(), torch.randn(3, 6)
    f, inputs = (lambda z: cell(z, x), ()) if closure else (cell, (x,))
    for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        cell.requires_grad_(context is not contextlib.nullcontext)
        with context():
            solution = eq.fixed_point(f, torch.zeros(3, 6), *inputs, solver=forward(gradient), gradient=gradient)
        assert solution.value.grad_fn is None
        assert not solution.value.requires_grad


# --- closures ------------------------------------------------------------------------------------------------------


@by_name
def test_a_closure_has_the_first_derivatives_of_the_named_map(gradient: eq.gradients.Gradient) -> None:
    cell, source = TanhCell(), torch.randn(3, 6, requires_grad=True)

    def grads(closure: bool) -> tuple[Tensor, ...]:
        x = source.sin()  # no leaf: the gradient has further to go
        f, inputs = (lambda z: cell(z, x), ()) if closure else (cell, (x,))
        z = eq.fixed_point(f, torch.zeros(3, 6), *inputs, solver=forward(gradient), gradient=gradient).value
        return torch.autograd.grad(z.sin().sum(), [source, *cell.parameters()])

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-9, atol=1e-10)


@by_name
def test_only_what_is_named_gets_a_gradient_once_params_are_given(gradient: eq.gradients.Gradient) -> None:
    x, w, u, b = leaves(3, 6)
    f = lambda z, x: tanh_map(z, x, w, u, b)  # noqa: E731
    z = eq.fixed_point(f, torch.zeros(3, 6), x, params=(w,), solver=forward(gradient), gradient=gradient).value
    got = torch.autograd.grad(z.sum(), [x, w, u, b], allow_unused=True, retain_graph=True)
    named = eq.fixed_point(f, torch.zeros(3, 6), x, params=(w, u, b), solver=forward(gradient), gradient=gradient).value
    expected = torch.autograd.grad(named.sum(), [x, w, u, b])
    torch.testing.assert_close(got[:2], expected[:2])
    if not isinstance(gradient, eq.Unrolled):
        assert got[2:] == (None, None)


def test_a_function_with_inputs_but_no_params_is_a_closure_over_the_rest() -> None:
    x, w, u, b = leaves(3, 6)
    f = lambda z, x: tanh_map(z, x, w, u, b)  # noqa: E731
    z, named = (
        eq.fixed_point(f, torch.zeros(3, 6), x, params=params, solver=TIGHT, gradient=EXACT).value
        for params in (None, (w, u, b))
    )
    actual, expected = (torch.autograd.grad(v.sin().sum(), [x, w, u, b]) for v in (z, named))
    torch.testing.assert_close(actual, expected)


# --- samples -------------------------------------------------------------------------------------------------------


def graded_map(z: Tensor, x: Tensor, strength: Tensor, w: Tensor) -> Tensor:
    """A tanh map whose samples contract at very different rates, so that rows leave early."""
    return torch.tanh(strength[:, None] * (z @ w.T) + x)


@pytest.mark.parametrize(
    "gradient",
    [*(eq.Implicit(solver=dataclasses.replace(s, rtol=1e-5)) for s in SOLVERS.values()), *ALL[1:]],
    ids=[*(f"Implicit-{name}" for name in SOLVERS), "refine", *(type(g).__name__ for g in ALL[2:])],
)
def test_a_gradient_does_not_depend_on_the_batch_mates(gradient: eq.gradients.Gradient) -> None:
    w, x, g = TanhCell(norm=1.0).w.detach(), torch.randn(5, 6), torch.randn(5, 6)
    strength = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.02])
    reports: list[eq.Solution[Tensor]] = []
    if isinstance(gradient, eq.Implicit):
        gradient = dataclasses.replace(gradient, observe=reports.append)

    def grad(rows: slice) -> tuple[Tensor, ...]:
        leaf, knob = x[rows].clone().requires_grad_(), strength[rows].clone().requires_grad_()
        solution = eq.fixed_point(
            lambda z, x, s: graded_map(z, x, s, w), torch.zeros_like(leaf), leaf, knob,
            params=(), solver=forward(gradient), gradient=gradient,
        )  # fmt: skip
        return torch.autograd.grad(solution.value, [leaf, knob], g[rows])

    batch = grad(slice(None))
    alone = [grad(slice(i, i + 1)) for i in range(5)]
    for whole, parts in zip(batch, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-10, atol=1e-10)
    if reports:
        steps = reports[0].num_steps
        assert steps.tolist() == [int(report.num_steps) for report in reports[1:]]
        assert len(set(steps.tolist())) > 2


@by_name
def test_a_sample_that_fails_harms_no_other(gradient: eq.gradients.Gradient) -> None:
    w, g = TanhCell().w.detach(), torch.randn(3, 6)
    x = torch.randn(3, 6)
    grads = []
    for broken in (False, True):
        leaf = x.clone()
        leaf[1] = torch.nan if broken else leaf[1]
        leaf.requires_grad_()
        z = eq.fixed_point(
            lambda z, x: torch.tanh(z @ w.T + x),
            torch.zeros(3, 6),
            leaf,
            params=(),
            solver=forward(gradient),
            gradient=gradient,
        ).value
        grads.append(torch.autograd.grad(z, leaf, g)[0][[0, 2]])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@by_name
def test_a_sample_without_cotangent_gets_zero(gradient: eq.gradients.Gradient) -> None:
    layer, x = eq.nn.DEQ(TanhCell(), solver=forward(gradient), gradient=gradient), torch.randn(3, 6, requires_grad=True)
    grad = torch.autograd.grad(layer(x)[1].sum(), x)[0]
    assert torch.equal(grad[[0, 2]], torch.zeros(2, 6))
    assert bool((grad[1].abs() > 0).all())


# --- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "vjps"),
    [
        (eq.JacobianFree(), 0),
        (eq.Shine(), 0),
        (eq.Neumann(steps=0), 0),
        (eq.Neumann(steps=4), 4),
        (eq.Phantom(steps=1), 0),
        (eq.Phantom(steps=4), 3),
        (eq.Implicit(solver=eq.Anderson(max_steps=0)), 0),
        (eq.Implicit(solver=eq.Anderson(max_steps=7, rtol=0)), 7),
        (eq.Implicit(solver=eq.Broyden(max_steps=1), start=eq.Shine()), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "named"])
def test_backward_costs_one_evaluation_and_one_product_beside_those_of_the_adjoint(
    gradient: eq.gradients.Gradient, vjps: int, closure: bool
) -> None:
    cell, x = CountingCell(), torch.randn(3, 6, requires_grad=True)
    f, inputs = (lambda z: cell(z, x), ()) if closure else (cell, (x,))
    solution = eq.fixed_point(f, torch.zeros(3, 6), *inputs, solver=forward(gradient), gradient=gradient)
    assert (cell.evals, cell.pulls) == (solution.num_evals, 0)
    before = cell.evals
    solution.value.sum().backward()
    assert cell.pulls == vjps + 1  # the last one is for parameters and inputs together
    assert cell.evals == before + (0 if closure else 1)  # a closure's evaluation was made, and counted, in the solve
    assert (solution.map.counts.evals, solution.map.counts.vjps) == (cell.evals, vjps)


@by_name
def test_an_unused_equilibrium_costs_nothing_in_backward(gradient: eq.gradients.Gradient) -> None:
    cell, x = CountingCell(), torch.randn(3, 6, requires_grad=True)
    z = eq.fixed_point(cell, torch.zeros(3, 6), x, solver=forward(gradient), gradient=gradient).value
    before = cell.evals
    torch.autograd.grad(x.sum() + 0 * z.detach().sum(), x)
    assert (cell.evals, cell.pulls) == (before, 0)


@pytest.mark.parametrize("gradient", ALL[:-1], ids=lambda g: type(g).__name__)  # unrolling holds its graph
def test_between_forward_and_backward_only_the_equilibrium_is_held(gradient: eq.gradients.Gradient) -> None:
    held: list[Tensor] = []
    cell, x = TanhCell(), torch.randn(3, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        z = eq.fixed_point(cell, torch.zeros(3, 6), x, solver=forward(gradient), gradient=gradient).value
    assert sorted(t.data_ptr() for t in held) == sorted(t.data_ptr() for t in (z, x, *cell.parameters()))


@by_name
def test_an_inverse_lives_as_long_as_the_graph_that_needs_it(gradient: eq.gradients.Gradient) -> None:
    def alive() -> int:
        return sum(type(o) is eq.InverseEstimate for o in gc.get_objects())

    gc.freeze()  # what was there before is not counted
    try:
        layer, x = eq.nn.DEQ(TanhCell(), solver=forward(gradient), gradient=gradient), torch.randn(3, 6)
        z = layer(x)
        assert alive() == int(gradient.uses_inverse)
        z.sum().backward()
        del z
        assert alive() == 0  # no cycle of references waits for the garbage collector
    finally:
        gc.unfreeze()


# --- reports of the adjoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [0, 1, 3, 50])
def test_the_report_tells_the_truth_about_the_adjoint(max_steps: int) -> None:
    # Running out of steps is data: nothing is raised or warned.
    reports: list[eq.Solution[Tensor]] = []
    a = TanhCell().w.detach()
    x, g = torch.randn(3, 6, requires_grad=True), torch.tensor([[1e-6], [1.0], [1e5]]) * torch.randn(3, 6)
    gradient = eq.Implicit(solver=eq.Anderson(max_steps=max_steps, rtol=1e-6), observe=reports.append)
    f = lambda z, x: z @ a.T + x  # noqa: E731
    z = eq.fixed_point(f, torch.zeros(3, 6), x, params=(), solver=TIGHT, gradient=gradient).value
    assert not reports
    (w,) = torch.autograd.grad(z, x, g)  # df/dx is the identity
    (report,) = reports
    residual = (w @ a + g - w).norm(dim=1) / g.norm(dim=1)
    if max_steps == 0:
        torch.testing.assert_close(w, g, rtol=1e-15, atol=0)
        assert bool(report.residual.isinf().all())  # nothing was evaluated
    else:
        torch.testing.assert_close(report.residual, residual, rtol=1e-8, atol=1e-13)
    assert report.converged.tolist() == [max_steps == 50] * 3
    assert max(report.num_steps.tolist()) == report.num_vjps <= max_steps
    if max_steps < 50:
        assert set(report.status.tolist()) == {eq.Status.MAX_STEPS}
        with pytest.raises(eq.ConvergenceError, match="MAX_STEPS: 3 of 3 samples"):
            report.raise_for_status()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_an_adjoint_that_starts_at_its_solution_takes_one_product(scale: float) -> None:
    reports: list[eq.Solution[Tensor]] = []
    a, x, g = TanhCell().w.detach(), torch.randn(3, 6, requires_grad=True), scale * torch.randn(3, 6)
    w = torch.linalg.solve(torch.eye(6) - a.T, g.T).T
    gradient = eq.Implicit(solver=eq.Anderson(rtol=1e-9), start=w, observe=reports.append)
    f = lambda z, x: z @ a.T + x  # noqa: E731
    z = eq.fixed_point(f, torch.zeros(3, 6), x, params=(), solver=TIGHT, gradient=gradient).value
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], w)
    assert reports[0].num_vjps == 1


def test_a_zero_cotangent_has_a_zero_adjoint_wherever_it_starts() -> None:
    a, x = TanhCell().w.detach(), torch.randn(3, 6, requires_grad=True)
    gradient = eq.Implicit(start=torch.randn(3, 6))
    z = eq.fixed_point(lambda z, x: z @ a.T + x, torch.zeros(3, 6), x, params=(), solver=TIGHT, gradient=gradient).value
    slope = torch.autograd.grad(z[0].sum(), x)[0]
    assert slope[0].abs().min() > 0
    assert torch.equal(slope[1:], torch.zeros(2, 6))


def test_the_report_of_a_zero_cotangent_is_zero() -> None:
    reports: list[eq.Solution[Tensor]] = []
    layer = eq.nn.DEQ(TanhCell(), gradient=eq.Implicit(observe=reports.append))
    (0 * layer(torch.randn(3, 6))).sum().backward()
    assert reports[0].converged.all()
    assert torch.equal(reports[0].residual, torch.zeros(3))


# --- modes ---------------------------------------------------------------------------------------------------------


@by_name
def test_single_precision_gives_single_precision_gradients(gradient: eq.gradients.Gradient) -> None:
    grads = []
    for dtype in (torch.float32, torch.float64):
        cell, x = TanhCell().to(dtype), torch.linspace(-1, 1, 18, dtype=dtype).reshape(3, 6).requires_grad_()
        solver = eq.Broyden(max_steps=40, memory=40, rtol=1e-3 if isinstance(gradient, eq.Shine) else 1e-6)
        if isinstance(gradient, eq.Implicit):
            gradient = dataclasses.replace(gradient, solver=dataclasses.replace(gradient.solver, rtol=1e-6))
        z = eq.fixed_point(cell, torch.zeros(3, 6, dtype=dtype), x, solver=solver, gradient=gradient).value
        grads.append(torch.autograd.grad(z.sin().sum(), [x, *cell.parameters()]))
        assert {grad.dtype for grad in grads[-1]} == {dtype}
    for single, double in zip(*grads, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@by_name
@pytest.mark.parametrize("outside", [True, False], ids=["backward outside", "backward inside"])
def test_backward_evaluates_in_the_autocast_state_of_the_forward_pass(
    gradient: eq.gradients.Gradient, outside: bool
) -> None:
    seen: list[torch.dtype] = []

    class Watched(TanhCell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            u = z @ self.w.T + x @ self.u.T
            seen.append(u.dtype)
            return torch.tanh(u.float() + self.b)

    cell, x = Watched().float(), torch.linspace(-1, 1, 18, dtype=torch.float32).reshape(3, 6)
    coarse = eq.Broyden(max_steps=4 if isinstance(gradient, eq.Shine) else 12)
    expected = torch.autograd.grad(eq.nn.DEQ(cell, solver=coarse, gradient=gradient)(x).sin().sum(), cell.w)[0]
    seen.clear()
    layer = eq.nn.DEQ(cell, solver=coarse, gradient=gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).sin().sum()
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert cell.w.grad is not None
    assert cell.w.grad.dtype == torch.float32
    assert float(torch.cosine_similarity(cell.w.grad.flatten(), expected.flatten(), dim=0)) > 0.98


@by_name
def test_half_precision_states_are_differentiated_in_single_precision(gradient: eq.gradients.Gradient) -> None:
    cell, x = TanhCell().bfloat16(), torch.linspace(-1, 1, 18, dtype=torch.bfloat16).reshape(3, 6).requires_grad_()
    coarse = eq.Broyden(max_steps=4 if isinstance(gradient, eq.Shine) else 12)
    z = eq.nn.DEQ(cell, solver=coarse, gradient=gradient)(x)
    assert z.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(z.sum(), x)
    wide, y = eq.nn.DEQ(TanhCell(), solver=coarse, gradient=gradient), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(wide(y).sum(), y)
    assert grad.dtype == torch.bfloat16
    assert float(torch.cosine_similarity(grad.double().flatten(), expected.flatten(), dim=0)) > 0.98


@by_name
def test_layouts_in_memory_do_not_matter(gradient: eq.gradients.Gradient) -> None:
    cell = TanhCell(8)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return cell(z.flatten(1), x.flatten(1)).view(z.shape)

    dense = torch.randn(3, 2, 2, 2)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.clone(),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.flip(0).clone().flip(0).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]
    results = []
    for layout in layouts:
        x = layout(dense).requires_grad_()
        z0, g = layout(torch.zeros_like(dense)), layout(dense.cos())
        params = tuple(cell.parameters())
        z = eq.fixed_point(f, z0, x, params=params, solver=forward(gradient), gradient=gradient).value
        results.append(torch.autograd.grad(z, [x, *params], g))
        assert x.is_contiguous() == (layout is layouts[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    # An expanded input, and the expanded cotangent of a sum.
    row = torch.randn(1, 8, requires_grad=True)
    z = eq.fixed_point(cell, torch.zeros(3, 8), row.expand(3, 8), solver=forward(gradient), gradient=gradient).value
    same = eq.fixed_point(cell, torch.zeros(1, 8), row, solver=forward(gradient), gradient=gradient).value
    actual, expected = torch.autograd.grad(z.sum(), row)[0], torch.autograd.grad(same.sum(), row)[0]
    torch.testing.assert_close(actual, 3 * expected, rtol=1e-9, atol=1e-10)


# --- bad use -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedsProducts(eq.Picard):
    uses_vjp: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eq.Implicit(solver="anderson"), r"Implicit\(solver='anderson'\): must be a solver such as Anderson"),  # type: ignore[arg-type]
        (lambda: eq.Implicit(start=1.0), r"Implicit\(start=1.0\): must be None, a gradient such as Shine\(\)"),  # type: ignore[arg-type]
        (lambda: eq.Implicit(solver=NeedsProducts()), r"NeedsProducts\): needs products with J, not only with J\^T"),
        (
            lambda: eq.fixed_point(torch.cos, torch.zeros(1, 1), gradient=eq.Implicit),  # type: ignore[arg-type]
            r"gradient must be a gradient such as Implicit\(\), got",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_start_of_another_shape_is_refused() -> None:
    layer = eq.nn.DEQ(TanhCell(), gradient=eq.Implicit(start=torch.zeros(3, 5)))
    with pytest.raises(ValueError, match=r"Implicit\(start=\.\.\.\) has shape \(3, 5\), the state \(3, 6\)"):
        layer(torch.randn(3, 6)).sum().backward()


def test_unrolled_cannot_start_an_adjoint_solve() -> None:
    layer = eq.nn.DEQ(TanhCell(), gradient=eq.Implicit(start=eq.Unrolled()))
    with pytest.raises(TypeError, match="cannot start an adjoint solve"):
        layer(torch.randn(3, 6)).sum().backward()
