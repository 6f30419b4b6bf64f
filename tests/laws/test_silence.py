"""No wrong answer in silence: each kind of misuse is exact, refused by name, or a status."""

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise.constraints import Box, L2Ball
from equipoise.core import guards
from equipoise.gradients import implicit
from equipoise.inputs import InputOptimizer, InputSolution

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
TIGHT = eq.Anderson(max_steps=200, rtol=1e-10)
GRADIENT = eq.Implicit(solver=eq.GMRES(max_steps=60, memory=60, rtol=0, atol=1e-12))


class Cell(nn.Module):
    """A cell `body(self, z, x)` of `d` numbers with an orthogonal matrix `w`."""

    def __init__(self, body: Callable[..., Tensor], d: int = 6, **attributes: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linalg.qr(torch.randn(d, d))[0])
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.body(self, z, x)


# --- rows that depend on each other ----------------------------------------------------------------------------------


def spread(rows: int, d: int = 6) -> Tensor:
    """Inputs of growing size, so that rows converge one after the other."""
    return torch.randn(rows, d) * torch.linspace(0.1, 3, rows)[:, None]


@pytest.fixture(autouse=True)
def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings come once for a line, also when it is that of another case."""
    monkeypatch.setattr(guards, "WARNED", set())


def pairs(self: Cell, z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(0.8 * z.view(-1, 2, 6).flip(1).reshape(-1, 6) @ self.w + x)


COUPLED = {
    "mean": lambda self, z, x: 0.9 * (z - 2 * z.mean(0, keepdim=True)) @ self.w + x,
    "softmax": lambda self, z, x: 0.9 * (torch.softmax(z @ z.T, dim=1) @ z) @ self.w + x,
    "next": lambda self, z, x: torch.tanh(0.9 * z.roll(1, 0) @ self.w + x),
    "sum before": lambda self, z, x: torch.tanh(0.3 * z.cumsum(0) @ self.w + x),
    "pairs": pairs,
}


@pytest.mark.parametrize("rows", [2, 8, 40])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", COUPLED)
def test_coupled_rows(kind: str, closure: bool, rows: int) -> None:
    """They are refused, or what is said of them holds together; declared as one system they are solved."""
    cell, x, z0 = Cell(COUPLED[kind]), spread(rows), torch.zeros(rows, 6)
    solver = eq.Anderson(max_steps=60, rtol=1e-5)
    solve = (lambda z: cell(z, x), z0) if closure else (cell, z0, x)
    with contextlib.suppress(ValueError):
        solution = eq.fixed_point(*solve, solver=solver)
        fz = cell(solution.value, x).detach()
        residual = (fz - solution.value.detach()).norm(dim=1) / fz.norm(dim=1)
        assert bool((residual[solution.converged] <= 1.01e-5).all())
    whole = eq.fixed_point(*solve, solver=TIGHT, coupled=True).raise_for_status()
    torch.testing.assert_close(whole.value, cell(whole.value, x), rtol=0, atol=1e-8)
    assert len(whole.status) == rows
    assert len(whole.residual.unique()) == 1


@pytest.mark.parametrize("kind", ["next", "sum before", "pairs"])
def test_coupled_rows_are_noticed(kind: str) -> None:
    with pytest.raises(ValueError, match=r"rows of the batch depend on each other.*coupled=GROUPS"):
        eq.nn.DEQ(Cell(COUPLED[kind]), solver=eq.Anderson(max_steps=200, rtol=1e-5))(spread(40))


def graph(self: Cell, z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(0.8 * self.adjacency @ z @ self.w + x)


def adjacency(sizes: list[int]) -> Tensor:
    blocks = [torch.rand(n, n) for n in sizes]
    return torch.block_diag(*[block / block.sum(1, keepdim=True) for block in blocks])


def test_groups() -> None:
    """Graphs of a batch have the answers of each alone, one status each; values and gradients."""
    sizes = [3, 5, 1, 4]
    cell, x = Cell(graph, adjacency=adjacency(sizes)), torch.randn(13, 6, requires_grad=True)
    number = torch.repeat_interleave(torch.tensor([7, 2, 9, 4]), torch.tensor(sizes))
    order = torch.randperm(13)  # rows of a group need not be neighbors
    shuffled = copy.deepcopy(cell)
    shuffled.adjacency = cell.adjacency[order][:, order]
    layer = eq.nn.DEQ(shuffled, solver=TIGHT, gradient=GRADIENT, coupled=lambda x: number[order])
    solution = layer.solve(x[order])
    (grad,) = torch.autograd.grad(solution.value.square().sum(), x)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        alone, part = copy.deepcopy(cell), x[rows].detach().requires_grad_()
        alone.adjacency = cell.adjacency[rows, rows]
        one = eq.nn.DEQ(alone, solver=TIGHT, gradient=GRADIENT, coupled=True).solve(part)
        places = torch.argsort(order)[rows]
        torch.testing.assert_close(solution.value[places], one.value, rtol=0, atol=1e-8)
        assert solution.num_steps[places].tolist() == one.num_steps.tolist()
        torch.testing.assert_close(
            grad[rows], torch.autograd.grad(one.value.square().sum(), part)[0], rtol=0, atol=1e-7
        )
        start += size


def test_groups_leave() -> None:
    """Groups whose rows are all in the inputs leave the batch as they converge."""
    calls = []

    def f(z: Tensor, x: Tensor, number: Tensor) -> Tensor:
        calls.append(len(z))
        mean = torch.zeros(10, 6).index_add(0, number, z)[number] / 4
        return 0.5 * (z - mean) + x

    number = torch.arange(40) // 4
    x = torch.randn(40, 6)
    z0 = 2 * x * (torch.arange(40) >= 32)[:, None]
    solution = eq.fixed_point(f, z0, x, number, params=(), coupled=number, solver=eq.Picard(max_steps=60, rtol=1e-6))
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value, f(solution.value, x, number), rtol=0, atol=1e-5)
    assert min(calls) < 40


def test_inputs_of_a_system() -> None:
    """A list of edges is an input of one system; without the word the message names it."""
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])

    def f(z: Tensor, x: Tensor, edges: Tensor) -> Tensor:
        return x + 0.5 * torch.zeros_like(z).index_add(0, edges[1], z[edges[0]])

    x, z0 = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"input 1 has shape \(2, 4\).*coupled=True"):
        eq.fixed_point(f, z0, x, edges, params=())
    solution = eq.fixed_point(f, z0, x, edges, params=(), coupled=True, solver=TIGHT, gradient=GRADIENT)
    matrix = torch.eye(4) - 0.5 * torch.eye(4).roll(1, 0)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, x))
    (grad,) = torch.autograd.grad(solution.value.sum(), x)
    torch.testing.assert_close(grad, torch.linalg.solve(matrix.T, torch.ones(4, 3)))


@pytest.mark.parametrize(
    ("coupled", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"coupled has shape \(3,\), the state has 4 rows"),
        (torch.zeros(4), TypeError, "the integer group number of each row, .*got torch.float"),
        ("batch", TypeError, "coupled must be False, True or .*got 'batch'"),
    ],
)
def test_bad_groups(coupled: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eq.fixed_point(lambda z: 0.5 * z, torch.ones(4, 2), coupled=coupled)


# --- maps that write, draw or change ---------------------------------------------------------------------------------


def assign(z: Tensor, x: Tensor) -> Tensor:
    z[:] = 0.5 * z
    return z + x


WRITES = {
    "mul_": lambda z, x: z.mul_(0.5).add_(x),
    "relu_": lambda z, x: 0.5 * torch.relu_(z) + x,
    "out": lambda z, x: torch.mul(z, 0.5, out=z) + x,
    "assignment": assign,
    "the input": lambda z, x: x.mul_(0.5) + 0.5 * z,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["function", "module", "bfloat16"])
@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.filterwarnings("ignore::equipoise.ConvergenceWarning")
def test_writes(kind: str, form: str, mode: Callable[[], Any]) -> None:
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float64
    f = Cell(lambda self, z, x: WRITES[kind](z, x)) if form == "module" else WRITES[kind]
    with mode():
        z0, x = torch.randn(3, 6, dtype=dtype), torch.ones(3, 6, dtype=dtype)
        with pytest.raises(ValueError, match=r"writes into its argument.*out of place"):
            eq.fixed_point(f, z0, x)


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: Callable[[], Any]) -> None:
    """A usual map has the same answer in every mode, with start and input made there."""
    with mode():
        x = torch.ones(3, 2)
        value = eq.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(3, 2), x, solver=TIGHT).value
        torch.testing.assert_close(value, torch.full((3, 2), 2.0))


def attention(self: Cell, z: Tensor, x: Tensor) -> Tensor:
    q = z[:, :, None]
    return 0.5 * F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, :, 0] + x


DRAWS = {
    "dropout": lambda self, z, x: F.dropout(torch.tanh(0.5 * z @ self.w + x), 0.3, self.training),
    "rand": lambda self, z, x: 0.5 * z + x + torch.rand(()),
    "attention": attention,
    "bernoulli": lambda self, z, x: 0.5 * z + x * torch.bernoulli(torch.full_like(x, 0.5)),
}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", DRAWS)
def test_draws(kind: str, closure: bool, rows: int) -> None:
    cell, x = Cell(DRAWS[kind]), torch.randn(rows, 6)
    f = (lambda z: cell(z, x), torch.zeros(rows, 6)) if closure else (cell, torch.zeros(rows, 6), x)
    with pytest.raises(ValueError, match=r"draws random numbers.*VariationalDropout"):
        eq.fixed_point(*f)
    if kind == "dropout":
        cell.eval()
        eq.fixed_point(*f).raise_for_status()


def test_another_thread_draws() -> None:
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        x = torch.randn(8, 6)
        for _ in range(10):
            solution = eq.fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.zeros(8, 6), x, solver=TIGHT)
            assert bool(solution.converged.all())
    finally:
        stop.set()
        thread.join()


# --- gradients of all that a map depends on, at the map of the solve -------------------------------------------------


def by_differences(loss: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> float:
    """Slope of a loss along a direction of ones."""
    with torch.no_grad():
        return float((loss(x + step) - loss(x - step)) / (2 * step))


PLACES: dict[str, Callable[[Cell, Tensor], None]] = {
    "attribute": lambda cell, a: setattr(cell, "a", a),
    "buffer": lambda cell, a: cell.register_buffer("a", a),
    "list": lambda cell, a: setattr(cell, "matrices", [a]),
    "dict": lambda cell, a: setattr(cell, "matrices", {0: a}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("generated", [False, True])
def test_tensors_that_are_no_parameters(place: str, generated: bool) -> None:
    """Of the cell: a tensor made by another network, or a leaf."""
    x, theta = torch.randn(4, 6), (0.3 * torch.randn(6, 6)).requires_grad_()

    def body(self: Cell, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ (self.a if hasattr(self, "a") else self.matrices[0]) + x @ self.w)

    cell = Cell(body)

    def loss(theta: Tensor) -> Tensor:
        module = copy.deepcopy(cell)
        PLACES[place](module, torch.tanh(theta) if generated else theta)
        return eq.nn.DEQ(module, solver=TIGHT, gradient=GRADIENT)(x).square().sum()

    (grad,) = torch.autograd.grad(loss(theta), theta)
    assert float(grad.sum()) == pytest.approx(by_differences(loss, theta.detach()), rel=1e-6)


def test_a_tensor_from_elsewhere() -> None:
    theta = torch.randn(6, 6, requires_grad=True)
    a = torch.tanh(theta)
    cell = Cell(lambda self, z, x: torch.tanh(0.3 * z @ a @ self.w + x))
    value = eq.nn.DEQ(cell)(torch.randn(3, 6))
    with pytest.raises(RuntimeError, match=r"depends on a tensor of shape \(6, 6\).*no parameter.*params=\[...\]"):
        value.sum().backward()
    cell.w.requires_grad_(False)
    with pytest.raises(RuntimeError, match="depends on a tensor"):
        eq.nn.DEQ(cell)(torch.randn(3, 6))


def test_cached_activations() -> None:
    """A cell that keeps what it computed last is trained as usual."""

    def body(self: Cell, z: Tensor, x: Tensor) -> Tensor:
        self.last = torch.tanh(0.5 * z @ self.w + x)
        return self.last

    layer, x = eq.nn.DEQ(Cell(body)), torch.randn(3, 6)
    for _ in range(3):
        layer(x).sum().backward()
        assert layer.cell.w.grad is not None


CHANGES: dict[str, Callable[[Cell], Any]] = {
    "buffer in place": lambda cell: cell.scale.mul_(1.2),
    "another buffer": lambda cell: setattr(cell, "scale", cell.scale * 1.2),
    "number": lambda cell: setattr(cell, "factor", 0.3),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_before_the_backward_pass(kind: str) -> None:
    cell = Cell(lambda self, z, x: torch.tanh(self.factor * self.scale * z @ self.w + x), factor=0.5)
    cell.register_buffer("scale", torch.ones(6))
    value = eq.nn.DEQ(cell)(torch.randn(3, 6))
    CHANGES[kind](cell)
    with pytest.raises(RuntimeError, match="changed since the solve"):
        value.sum().backward()


def test_two_forward_passes_before_a_backward_pass() -> None:
    """Spectral normalization in training: each gradient is that at the vectors of its own solve."""
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, bias=False))
    cell = Cell(lambda self, z, x: torch.tanh(0.8 * self.linear(z) + x), linear=linear)
    layer, x, later = eq.nn.DEQ(cell, solver=TIGHT, gradient=GRADIENT), torch.randn(3, 6), torch.randn(3, 6)
    alone = copy.deepcopy(layer)
    first = layer(x).square().sum()
    (first + layer(later).square().sum()).backward()
    total = layer.cell.linear.parametrizations.weight.original.grad
    alone(x).square().sum().backward()
    alone(later).square().sum().backward()
    torch.testing.assert_close(total, alone.cell.linear.parametrizations.weight.original.grad)
    assert not any(module.training is False for module in layer.modules())


def test_old_spectral_norm() -> None:
    with pytest.raises(ValueError, match=r"parametrizations.spectral_norm"):
        eq.nn.DEQ(nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6))))(torch.randn(2, 6))


# --- norms, tolerances and residuals ---------------------------------------------------------------------------------

EXTREMES = [
    (torch.float32, s) for s in (1e-30, 1e-26, 1e-22, 1e-19, 1e19, 1e22, 1e25)
] + [(torch.float64, s) for s in (1e-300, 1e-200, 1e-155, 1e155, 1e200)]  # fmt: skip
SOLVERS = [
    eq.Picard(max_steps=60), eq.Anderson(), eq.Broyden(), eq.AdjointBroyden(), eq.SteadyState(max_steps=60), eq.CG(),
    eq.GMRES(),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize(("dtype", "scale"), EXTREMES)
def test_extreme_numbers(solver: eq.Solver, dtype: torch.dtype, scale: float) -> None:
    """z = z / 2 + s has the solution 2 s at any scale; a mate of usual size has its own answer."""
    shift = torch.full((3, 8), scale, dtype=dtype)
    shift[1] = 1.0
    solution = eq.fixed_point(lambda z, s: z / 2 + s, torch.zeros_like(shift), shift, solver=solver, params=())
    solution.raise_for_status()
    torch.testing.assert_close(solution.value / (2 * shift), torch.ones_like(shift), rtol=5e-3, atol=0)


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda solver: type(solver).__name__)
def test_small_answer_from_a_usual_start(solver: eq.Solver) -> None:
    shift = torch.full((2, 8), 1e-25, dtype=torch.float32)
    long = eq.Picard(max_steps=400) if isinstance(solver, eq.Picard) else eq.Anderson(max_steps=400)
    solution = eq.fixed_point(lambda z, s: z / 2 + s, torch.ones_like(shift), shift, solver=long, params=())
    solution.raise_for_status()
    torch.testing.assert_close(solution.value / (2 * shift), torch.ones_like(shift), rtol=5e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e22, 1e30])
def test_extreme_cotangents(scale: float) -> None:
    x = torch.ones(2, 8, dtype=torch.float32, requires_grad=True)
    value = eq.fixed_point(lambda z, x: z / 2 + x, torch.zeros_like(x), x, solver=eq.Picard(rtol=1e-6)).value
    (grad,) = torch.autograd.grad(value, x, torch.full_like(value, scale))
    torch.testing.assert_close(grad / scale, torch.full_like(grad, 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rtol", [1e-3, 1e-2, 5e-2])
@pytest.mark.parametrize("solver", [eq.Picard(), eq.Anderson(), eq.Broyden()], ids=lambda solver: type(solver).__name__)
@pytest.mark.filterwarnings("ignore::equipoise.ConvergenceWarning")
def test_half_precision(solver: eq.Solver, rtol: float) -> None:
    """The residual that is judged and reported is that of the returned value."""
    torch.manual_seed(0)
    w, x = (0.35 * torch.randn(8, 8)).bfloat16(), torch.randn(64, 8).bfloat16()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    solver = type(solver)(rtol=rtol)
    solution = eq.fixed_point(f, torch.zeros_like(x), x, solver=solver, params=())
    fz, z = f(solution.value, x).double(), solution.value.double()
    residual = (fz - z).norm(dim=1)
    torch.testing.assert_close(solution.residual.double(), residual, rtol=1e-5, atol=1e-6)
    assert bool((residual <= rtol * fz.norm(dim=1) * (1 + 1e-5))[solution.converged].all())


def test_tolerance_below_the_format() -> None:
    x = torch.randn(3, 4).bfloat16()
    with pytest.warns(eq.ConvergenceWarning, match=r"rtol=0.001 is below the rounding of torch.bfloat16"):
        eq.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "solver",
    [eq.Picard(max_steps=300, rtol=1e-2), eq.SteadyState(max_steps=300, rtol=1e-2), eq.Anderson(max_steps=300)],
    ids=repr,
)
@pytest.mark.parametrize("f", [lambda z: z + 1, lambda z: z + torch.tensor([1.0, -1.0, 0.5]), lambda z: 1.01 * z + 1])
def test_residuals_that_never_fall(f: Callable[[Tensor], Tensor], solver: eq.Solver, dtype: torch.dtype) -> None:
    """There is no fixed point near; what is CONVERGED is one, to the tolerance at ten times the start."""
    solution = eq.fixed_point(lambda z: f(z).to(dtype), torch.zeros(2, 3, dtype=dtype), solver=solver)
    first = float(f(torch.zeros(1, 3)).norm())
    assert bool((solution.residual[solution.converged] <= first / 2).all())
    if float((f(torch.zeros(1, 3)) - f(torch.ones(1, 3)) + 1).abs().max()) == 0:
        assert not bool(solution.converged.any())


def test_start_at_the_solution() -> None:
    solution = eq.fixed_point(lambda z: 0.5 * z + 1, torch.full((2, 3), 2.0))
    assert (solution.num_evals, solution.converged.tolist()) == (1, [True, True])


@pytest.mark.parametrize("solver", [eq.Picard(max_steps=300), eq.Anderson(max_steps=300)], ids=repr)
def test_parts_of_different_scale(solver: eq.Solver) -> None:
    """On request each part of the state, and of the adjoint, meets the tolerance by itself."""
    a = torch.ones(2, 3, requires_grad=True)

    def f(z: tuple[Tensor, Tensor], a: Tensor) -> tuple[Tensor, Tensor]:
        return 0.9 * z[0] + 1e-9 * a, 0.5 * z[1] + 1e8 * a

    start = (torch.zeros(2, 3), torch.zeros(2, 3))
    together = eq.fixed_point(f, start, a, solver=solver)
    parts = eq.fixed_point(f, start, a, solver=solver, per_part=True)
    assert bool(together.converged.all())
    assert float((together.value[0] - 1e-8).detach().abs().max()) > 1e-10
    assert bool(parts.converged.all())
    torch.testing.assert_close(parts.value[0], torch.full((2, 3), 1e-8), rtol=1e-2, atol=0)
    torch.testing.assert_close(parts.value[1], torch.full((2, 3), 2e8), rtol=1e-2, atol=0)
    (grad,) = torch.autograd.grad(1e8 * parts.value[0].sum(), a)
    torch.testing.assert_close(grad, torch.ones(2, 3), rtol=1e-3, atol=0)


# --- adjoints --------------------------------------------------------------------------------------------------------


def affine(jacobian: Tensor, b: Tensor, gradient: eq.Gradient, solver: eq.Solver | None = None) -> Tensor:
    solver = solver or eq.Broyden(max_steps=300, memory=300, rtol=1e-9)
    f = lambda z, b: z @ jacobian.T + b  # noqa: E731
    return eq.fixed_point(f, torch.zeros_like(b), b, params=(), solver=solver, gradient=gradient).value


@pytest.mark.parametrize("kind", ["indefinite", "radius 0.99", "rotation"])
def test_default_adjoint(kind: str) -> None:
    """It meets its tolerance where GMRES does, in as many products."""
    d = 40
    q = torch.linalg.qr(torch.randn(d, d))[0]
    values = torch.cat([torch.linspace(-30, -1, 20), torch.linspace(1.5, 20, 20)])
    random = torch.randn(d, d)
    jacobian = {
        "indefinite": q @ torch.diag(values) @ q.T,
        "radius 0.99": 0.99 * random / torch.linalg.eigvals(random).abs().max(),
        "rotation": 3 * (q - q.T),
    }[kind]
    b, products = torch.randn(3, d, requires_grad=True), []
    exact = torch.linalg.solve(torch.eye(d) - jacobian.T, torch.ones(d))
    default = eq.Implicit(observe=lambda solution: products.append((solution.num_vjps, solution.converged.tolist())))
    gmres = eq.Implicit(solver=eq.GMRES(max_steps=50, memory=50, rtol=1e-5), observe=default.observe)
    for gradient in (gmres, default):
        (grad,) = torch.autograd.grad(affine(jacobian, b, gradient).sum(), b)
        torch.testing.assert_close(grad, exact.expand(3, d), rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    assert all(all(converged) for _, converged in products)
    assert products[1][0] <= 1.05 * products[0][0] + 1


@pytest.mark.parametrize(("steps", "warns"), [(5, True), (60, False)])
def test_adjoint_warning_on_a_device(steps: int, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads the record, and warns, only after an adjoint that used all its steps."""
    monkeypatch.setattr(implicit, "can_branch_on", lambda x: False)
    read: list[Any] = []
    monkeypatch.setattr(eq.Implicit, "_warn", lambda self, adjoint, answer: read.append(answer))
    jacobian = torch.linalg.qr(torch.randn(40, 40))[0] * 30
    b = torch.randn(3, 40, requires_grad=True)
    affine(jacobian, b, eq.Implicit(solver=eq.GMRES(max_steps=steps, memory=steps))).sum().backward()
    assert bool(read) == warns


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_of_a_loose_solve(dtype: torch.dtype, rtol: float) -> None:
    """The residual of the solve is not that of its adjoint: nothing has changed, and nothing is refused."""
    torch.manual_seed(0)
    cell = Cell(lambda self, z, x: torch.tanh(0.9 * z @ self.w + x)).to(dtype)
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)

    def second(solver: eq.Solver) -> Tensor:
        value = eq.fixed_point(cell, torch.zeros(4, 6, dtype=dtype), x, solver=solver).value
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    exact = second(eq.Anderson(max_steps=200, rtol=1e-6))
    assert float((second(eq.Anderson(max_steps=200, rtol=rtol)) - exact).norm()) <= 20 * rtol * float(exact.norm())


def test_adjoint_warning() -> None:
    """Once for a line of the user's code, with shares and remedy; none where it converges."""
    jacobian = torch.linalg.qr(torch.randn(60, 60))[0] * 30
    gradient = eq.Implicit(solver=eq.GMRES(max_steps=5))
    b = torch.randn(3, 60, requires_grad=True)
    value = affine(jacobian, b, gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            value.sum().backward(retain_graph=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "3 of 3 samples" in str(caught[0].message)
    assert "raise max_steps" in str(caught[0].message)


@pytest.mark.parametrize("rates", [(2.0, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("cycle", [False, True])
def test_conserved_total(rates: tuple[float, float], cycle: bool) -> None:
    """I - J is singular and the adjoint equation has no solution; without the conserved total it is exact."""
    k = torch.tensor(rates, requires_grad=True)

    def flow(z: Tensor) -> Tensor:
        forth, back = k[0] * z[:, 0], k[1] * z[:, 1]
        if not cycle:
            return torch.stack([back - forth, forth - back], 1)
        round_ = z[:, 2]
        return torch.stack([round_ - forth, forth - back, back - round_], 1)

    start = torch.zeros(1, 3 if cycle else 2)
    start[0, 0] = 3.0
    value = eq.fixed_point(lambda z: z + 0.1 * flow(z), start, solver=eq.Picard(max_steps=2000, rtol=1e-10)).value
    with pytest.warns(eq.ConvergenceWarning, match=r"for 1 of 1 .* its equation has no solution.*eliminate"):
        value[0, 0].backward()
    if not cycle:
        one = eq.fixed_point(
            lambda a: a + 0.1 * (k[1] * (3 - a) - k[0] * a), start[:, :1], solver=eq.Picard(max_steps=2000, rtol=1e-10)
        ).value
        (grad,) = torch.autograd.grad(one.sum(), k)
        total = rates[0] + rates[1]
        torch.testing.assert_close(grad, torch.tensor([-3 * rates[1] / total**2, 3 * rates[0] / total**2]))


# --- saddle points of an input's cost ---------------------------------------------------------------------------------


def wells(z: Tensor, x: Tensor) -> Tensor:
    """Two wells in the first number, a valley in the second."""
    return 0.25 * (z[:, 0].square() - 1).square() + 0.5 * z[:, 1].square()


SADDLES = [
    pytest.param(wells, [0.0, 1.0], None, 0.0, id="wells"),
    pytest.param(wells, [0.0, 1.0], Box(lower=0.0, upper=1.0), 0.0, id="box"),
    pytest.param(wells, [0.0, 1.0], Box(lower=torch.tensor([-1.0, 0.3]), upper=torch.tensor(2.0)), 0.18, id="border"),
    pytest.param(lambda z, x: (z.square().sum(1) - 1).square(), [0.0, 0.0], None, 0.0, id="maximum"),
    pytest.param(lambda z, x: z[:, 0] * z[:, 1] + 0.25 * z.pow(4).sum(1), [0.0, 0.0], None, -0.5, id="product"),
]


def minimize(cost: Callable[..., Tensor], x: Tensor, **options: Any) -> InputSolution:
    """Minimize a cost of `z = 2 x`."""
    cell, z0 = lambda z, x: 0.5 * z + x, torch.zeros_like(x)
    return eq.optimize_inputs(cell, z0=z0, x0=x, cost=cost, params=(), **options)


@torch.no_grad()
@pytest.mark.thorough
@pytest.mark.parametrize(("cost", "start", "constraint", "lowest"), SADDLES)
def test_saddle_point(cost: Callable[..., Tensor], start: list[float], constraint: Any, lowest: float) -> None:
    """A sample leaves a saddle point and says that it is not done; from there it reaches the minimum."""
    found = minimize(cost, torch.tensor([start, [0.3, 0.7]]), constraint=constraint)
    assert int(found.status[0]) == eq.Status.STALLED
    descent = InputOptimizer(solver=eq.Picard(max_steps=600), step_size=0.02)
    again = minimize(cost, found.value[2], constraint=constraint, optimizer=descent).raise_for_status()
    torch.testing.assert_close(again.cost, torch.full((2,), lowest), rtol=0, atol=1e-4)
    assert bool(minimize(cost, again.value[2], constraint=constraint).converged.all()), "not worse than an optimum"


@torch.no_grad()
@pytest.mark.parametrize(
    ("cost", "constraint"),
    [
        (lambda z, x: (z - 1).square().sum(1), None),
        (lambda z, x: -z.square().sum(1), Box(lower=-0.5, upper=1.0)),  # a corner, with negative curvature outwards
        (lambda z, x: -z.square().sum(1) + z[:, 0], L2Ball(radius=1.0)),
        (lambda z, x: (z[:, 0] - 1).square(), None),  # flat in the second number
        (lambda z, x: (z - 1).pow(4).sum(1), None),  # flat at the minimum
    ],
)
def test_minimum_is_no_saddle_point(cost: Callable[..., Tensor], constraint: Any) -> None:
    x = torch.tensor([[-0.3, 0.2], [-0.4, -0.4], [-0.4, 0.8]])
    found = minimize(cost, x, constraint=constraint, optimizer=InputOptimizer(solver=eq.Anderson(max_steps=300)))
    assert eq.Status.STALLED not in found.status


@torch.no_grad()
@pytest.mark.thorough
def test_saddle_points_of_random_problems() -> None:
    """Curvatures from a dense Hessian; the cost is even, so zero is stationary."""
    w, u, c = 0.7 * torch.linalg.qr(torch.randn(8, 8))[0], 0.7 * torch.randn(4, 8), torch.randn(8, 8) / 8**0.5

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + x @ u)

    def cost(z: Tensor, x: Tensor) -> Tensor:
        return ((2 * z @ c).square() - 0.6).square().sum(1) + 0.01 * x.square().sum(1)

    def reduced(x: Tensor) -> Tensor:
        z = x.new_zeros(1, 8)
        for _ in range(100):
            z = cell(z, x[None])
        return cost(z, x[None])[0]

    x0 = torch.randn(16, 4) * (torch.arange(16) % 2)[:, None]
    found = eq.optimize_inputs(cell, z0=torch.zeros(16, 8), x0=x0, cost=cost, params=())
    lowest = torch.linalg.eigvalsh(torch.func.vmap(torch.func.hessian(reduced))(found.value[2]))[:, 0]
    assert float(torch.linalg.eigvalsh(torch.func.hessian(reduced)(torch.zeros(4)))[0]) < 0
    assert int(found.converged.sum()) >= 3
    assert bool((lowest[found.converged] > 0).all())
    assert found.status[::2].tolist() == [eq.Status.STALLED] * 8


# --- forward mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "dual"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_forward_mode(transform: str, mode: Callable[[], Any], start: float) -> None:
    def solve(x: Tensor) -> Tensor:
        return eq.fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.full((2, 3), start), x).value

    x = torch.ones(2, 3)
    calls: dict[str, Callable[[], Any]] = {
        "dual": lambda: solve(torch.autograd.forward_ad.make_dual(x, x)),
        "jvp": lambda: torch.func.jvp(solve, (x,), (x,)),
        "jacfwd": lambda: torch.func.jacfwd(solve)(x),
    }
    level = torch.autograd.forward_ad.dual_level() if transform == "dual" else contextlib.nullcontext()
    with mode(), level, pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        calls[transform]()


def test_no_refusal_without_a_cause() -> None:
    """Guards are silent for spectral normalization, dropout with fixed masks and frozen weights."""
    torch.manual_seed(1)
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    body = nn.Sequential(linear, eq.nn.VariationalDropout(0.2), nn.Tanh())
    cell = Cell(lambda self, z, x: 0.7 * self.net(z) + x, net=body)
    x = spread(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (eq.nn.DEQ(cell), eq.nn.DEQ(copy.deepcopy(cell).requires_grad_(False)), eq.nn.DEQ(cell.eval())):
            solution = layer.solve(x)
            if solution.value.requires_grad:
                solution.value.sum().backward()
            assert bool(solution.converged.all())
    assert guards.RandomWatch(torch.device("cpu")).advanced is False
