"""Random misuse of the core: every case ends with the right answer, a refusal by name, a warning or a status.

Usage: python -m tests.fuzz.misuse [--cases 100000] [--seed 0]

A case draws a kind of misuse, a form (module, function, closure), a grad mode, a dtype, a solver and sizes, and returns
its outcome. It raises `Wrong` where an answer is wrong in silence; an exception that no guard raised goes through, too.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import json
import pathlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equipoise as eq
from equipoise.core import guards

REFUSALS = ("depend on each other", "writes into its argument", "draws random numbers", "changed since the solve",
            "no parameter, buffer", "no forward-mode derivative")  # fmt: skip


class Wrong(AssertionError):
    """An answer that is wrong in silence."""


def require(condition: bool, *facts: Any) -> None:
    if not condition:
        raise Wrong(*facts)


class Cell(nn.Module):
    """A cell with an orthogonal matrix `w` and any body."""

    def __init__(self, body: Callable[..., Tensor], d: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0].to(dtype))
        self.body = body

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.body(self, z, x)


@dataclasses.dataclass
class Draw:
    """Random choices of a case."""

    rng: random.Random

    def solver(self, **fields: Any) -> eq.Solver:
        kind = self.rng.choice([eq.Anderson, eq.Broyden, eq.Picard, eq.SteadyState])
        return kind(**{"max_steps": 80, "rtol": 10 ** self.rng.uniform(-8, -3)} | fields)

    def form(self, cell: Cell, x: Tensor) -> tuple[Any, ...]:
        z0 = torch.zeros_like(x) if self.rng.random() < 0.7 else torch.randn_like(x)
        form = self.rng.choice(["module", "function", "closure"])
        return (cell, z0, x) if form == "module" else (cell.forward, z0, x) if form == "function" else (
            lambda z: cell(z, x), z0
        )  # fmt: skip

    def rows(self, least: int = 1) -> int:
        return self.rng.choice([n for n in (1, 2, 3, 5, 8, 16) if n >= least])


def residual(f: Callable[..., Tensor], solution: eq.Solution[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals and norms of f at the returned values, in float64."""
    with torch.no_grad():
        z = solution.value.detach()
        fz = f(z, x).double()
    return torch.linalg.vector_norm(fz - z.double(), dim=1), torch.linalg.vector_norm(fz, dim=1)


def converged_rows_are(f: Callable[..., Tensor], solution: eq.Solution[Tensor], x: Tensor, rtol: float) -> None:
    size, image = residual(f, solution, x)
    noise = 20 * torch.finfo(x.dtype).eps * image
    require(bool((size <= 1.02 * rtol * image + noise)[solution.converged].all()), size, image, rtol)


def coupled(draw: Draw) -> None:
    """Rows that depend on each other, undeclared or declared."""
    rows, d = draw.rng.choice([2, 4, 8, 16]), 4
    number = torch.arange(rows) // 2
    adjacency = torch.rand(rows, rows).softmax(dim=1)
    bodies = [
        lambda self, z, x: 0.9 * (z - 2 * z.mean(0, keepdim=True)) @ self.w + x,
        lambda self, z, x: torch.tanh(0.9 * z.roll(1, 0) @ self.w + x),
        lambda self, z, x: torch.tanh(0.2 * z.cumsum(0) @ self.w + x),
        lambda self, z, x: torch.tanh(0.8 * self.adjacency @ z @ self.w + x),
        lambda self, z, x: torch.tanh(0.8 * torch.softmax(z @ z.T, dim=1) @ z @ self.w + x),
        lambda self, z, x: torch.tanh(0.8 * z.view(2, -1, 4).flip(0).reshape(-1, 4) @ self.w + x),
    ]
    cell, x = Cell(draw.rng.choice(bodies), d), torch.randn(rows, d) * torch.linspace(0.1, 3, rows)[:, None]
    cell.adjacency = adjacency
    declared = draw.rng.choice([False, False, True, "groups"])
    if declared == "groups":
        cell.body = lambda self, z, x: torch.tanh(0.8 * torch.block_diag(*[torch.ones(2, 2)] * rows)[
            :rows, :rows] @ z @ self.w + x)  # fmt: skip
    solver = draw.solver()
    solution = eq.fixed_point(*draw.form(cell, x), solver=solver, coupled=number if declared == "groups" else declared)
    if declared is False:
        converged_rows_are(cell, solution, x, solver.rtol)
        return
    size, image = residual(cell, solution, x)
    for group in number.unique() if declared == "groups" else [None]:
        of = number == group if group is not None else torch.ones(rows, dtype=torch.bool)
        if bool(solution.converged[of].all()):
            require(
                float(size[of].norm()) <= 1.02 * solver.rtol * float(image[of].norm()) + 1e-13, "group", size, image
            )


def writes(draw: Draw) -> None:
    """Maps that write into their arguments."""

    def assign(z: Tensor, x: Tensor) -> Tensor:
        z[:] = 0.5 * z
        return z + x

    def part(z: Tensor, x: Tensor) -> Tensor:
        z.view(-1)[0] = 0.25
        return 0.5 * z + x

    bodies = [
        lambda z, x: z.mul_(0.5).add_(x), lambda z, x: 0.5 * torch.relu_(z) + x, assign, part,
        lambda z, x: torch.mul(z, 0.5, out=z) + x, lambda z, x: x.mul_(0.5) + 0.5 * z,
        lambda z, x: F.leaky_relu(z, 0.5, inplace=True) * 0.5 + x,
    ]  # fmt: skip
    body = draw.rng.choice(bodies)
    mode = draw.rng.choice([torch.enable_grad, torch.no_grad, torch.inference_mode])
    dtype = draw.rng.choice([torch.float64, torch.float32, torch.bfloat16])
    with mode():
        cell = Cell(lambda self, z, x: body(z, x), 4)
        x = torch.randn(draw.rows(), 4, dtype=dtype)
        form = draw.form(cell, x)
        if body is bodies[5] and len(form) == 2:  # what a closure has captured is no argument
            form = (cell, *form[1:], x)
        eq.fixed_point(*form, solver=eq.Anderson(rtol=0.05))
    raise Wrong("a write was not refused")


def draws(draw: Draw) -> None:
    """Maps that draw random numbers."""

    def attend(self: Cell, z: Tensor, x: Tensor) -> Tensor:
        q = z[:, :, None]
        return 0.5 * F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, :, 0] + x

    bodies = [
        lambda self, z, x: F.dropout(torch.tanh(0.5 * z @ self.w + x), 0.4, self.training),
        lambda self, z, x: 0.5 * z + x + torch.rand(()),
        lambda self, z, x: 0.5 * z + x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda self, z, x: 0.5 * z + x * random.random(),
        attend,
    ]
    cell, x = Cell(draw.rng.choice(bodies), 8), torch.randn(draw.rows(), 8)
    solution = eq.fixed_point(*draw.form(cell, x), solver=draw.solver())
    require(not bool(solution.converged.any()), "a random map converged")


def slope(loss: Callable[[Tensor], Tensor], theta: Tensor) -> None:
    """Compare the gradient of a loss with a difference along a random direction."""
    loss(theta).backward()
    grad = theta.grad
    require(grad is not None, "no gradient")
    v = torch.randn_like(theta)
    with torch.no_grad():
        expected = float((loss(theta + 1e-6 * v) - loss(theta - 1e-6 * v)) / 2e-6)
    got = float((grad * v).sum())
    require(abs(got - expected) <= 1e-4 * (abs(expected) + float(grad.norm())), "slope", got, expected)


EXACT = eq.Implicit(solver=eq.GMRES(max_steps=60, memory=60, rtol=0, atol=1e-10))
TIGHT = eq.Anderson(max_steps=200, rtol=1e-11)


def no_parameters(draw: Draw) -> None:
    """Tensors that are no parameters: attributes, buffers, lists, tensors of an enclosing scope."""
    theta, x = 0.3 * torch.randn(5, 5), torch.randn(draw.rows(), 5)
    theta = (theta / max(1.0, float(torch.linalg.matrix_norm(theta, 2)) / 0.9)).requires_grad_()  # contracts
    place, generated = draw.rng.choice(["attribute", "buffer", "list", "scope"]), draw.rng.random() < 0.5

    def loss(theta: Tensor) -> Tensor:
        a = torch.tanh(theta) if generated else theta
        cell = Cell(lambda self, z, x: torch.tanh(z @ held(self) + x), 5)
        held: Callable[[Cell], Tensor] = {
            "attribute": lambda self: self.a, "buffer": lambda self: self.a, "list": lambda self: self.many[1],
            "scope": lambda self: a,
        }[place]  # fmt: skip
        if place == "buffer":
            cell.register_buffer("a", a)
        elif place != "scope":
            cell.a, cell.many = a, [None, a]
        return eq.nn.DEQ(cell, solver=TIGHT, gradient=EXACT)(x).square().sum()

    slope(loss, theta)


def changes(draw: Draw) -> None:
    """Something of the map changes between the forward and the backward pass."""
    cell = Cell(lambda self, z, x: torch.tanh(self.factor * self.scale * z @ self.w + x), 5)
    cell.register_buffer("scale", torch.ones(5))
    cell.factor = 0.5
    x = torch.randn(draw.rows(), 5)
    value = eq.nn.DEQ(cell, solver=TIGHT, gradient=EXACT)(x)
    right = torch.autograd.grad(value.square().sum(), cell.w, retain_graph=True)[0]
    change = draw.rng.choice([
        lambda: cell.scale.mul_(1.3), lambda: setattr(cell, "factor", 0.3),
        lambda: setattr(cell, "scale", torch.full((5,), 0.5)), lambda: None,
    ])  # fmt: skip
    change()
    got = torch.autograd.grad(value.square().sum(), cell.w)[0]
    require(bool(torch.allclose(got, right, rtol=1e-6, atol=1e-9)), "gradient of another map")


def power_iteration(draw: Draw) -> None:
    """Two forward passes before one backward pass, with spectral normalization in training."""
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5, bias=False))
    cell = Cell(lambda self, z, x: torch.tanh(0.8 * self.linear(z) + x), 5)
    cell.linear = linear
    layer, inputs = eq.nn.DEQ(cell, solver=TIGHT, gradient=EXACT), [torch.randn(draw.rows(), 5) for _ in range(2)]
    alone, original = copy.deepcopy(layer), "cell.linear.parametrizations.weight.original"
    sum(layer(x).square().sum() for x in inputs).backward()
    for x in inputs:
        alone(x).square().sum().backward()
    grads = [dict(module.named_parameters())[original].grad for module in (layer, alone)]
    require(bool(torch.allclose(*grads, rtol=1e-6, atol=1e-9)), "gradient at other vectors")


def extremes(draw: Draw) -> None:
    """Numbers whose squares under- or overflow, in states and cotangents."""
    dtype = draw.rng.choice([torch.float32, torch.float64])
    low, high = (-36, 35) if dtype == torch.float32 else (-300, 300)
    exponent = draw.rng.choice([draw.rng.uniform(low, low / 2), draw.rng.uniform(high / 2, high)])
    s = torch.full((draw.rows(), 8), 10.0**exponent, dtype=dtype) * (1 + torch.rand(8, dtype=dtype))
    if draw.rng.random() < 0.3:
        x = torch.ones_like(s).requires_grad_()
        value = eq.fixed_point(lambda z, x: z / 2 + x, torch.zeros_like(x), x, solver=eq.Picard(rtol=1e-6)).value
        (grad,) = torch.autograd.grad(value, x, s)
        require(bool(torch.allclose(grad / s, torch.full_like(s, 2.0), rtol=1e-3)), "cotangent", exponent)
        return
    start = torch.zeros_like(s) if draw.rng.random() < 0.7 else s * torch.randn_like(s)
    solver = draw.solver(rtol=1e-3, max_steps=120)
    solution = eq.fixed_point(lambda z, s: z / 2 + s, start, s, solver=solver, params=())
    require(bool(solution.converged.all()), "not converged", exponent, solution.status)
    require(bool(((solution.value / s - 2).abs() < 0.02).all()), "value", exponent, solver)


def half(draw: Draw) -> None:
    """States of half precision: the residual is that of the returned value."""
    dtype = draw.rng.choice([torch.bfloat16, torch.float16])
    w, x = (0.35 * torch.randn(8, 8)).to(dtype), torch.randn(draw.rows(), 8, dtype=torch.float32).to(dtype)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh((z[:, None] * w.T).sum(dim=2) + x)

    solver = draw.solver(rtol=10 ** draw.rng.uniform(-3.5, -1))
    solution = eq.fixed_point(f, torch.zeros_like(x), x, solver=solver, params=())
    size, image = residual(f, solution, x)
    met = size <= solver.rtol * image * (1 + 1e-5) + 1e-6 * image
    require(bool(met[solution.converged].all()), size, image)
    require(bool(torch.allclose(solution.residual.double(), size, rtol=1e-4, atol=1e-6)), "reported residual")


def never_falls(draw: Draw) -> None:
    """Maps without a fixed point, whose values grow until a relative tolerance is met."""
    shift = torch.randn(draw.rows(), 3)
    factor = draw.rng.choice([1.0, 1.0, 1.001])
    solver = draw.rng.choice([eq.Picard, eq.SteadyState])(max_steps=300)
    solution = eq.fixed_point(lambda z, s: factor * z + s, torch.zeros_like(shift), shift, solver=solver, params=())
    require(not bool(solution.converged.any()), "converged to nothing", solution.value)


def parts(draw: Draw) -> None:
    """Parts of a state at other scales, judged separately."""
    small, big = 10 ** draw.rng.uniform(-9, -3), 10 ** draw.rng.uniform(3, 9)
    a = torch.randn(draw.rows(), 3)

    def f(z: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
        return {"s": 0.9 * z["s"] + small * a, "b": 0.5 * z["b"] + big * a}

    start = {"s": torch.zeros_like(a), "b": torch.zeros_like(a)}
    solver = draw.rng.choice([eq.Anderson, eq.Picard])(max_steps=300)
    solution = eq.fixed_point(f, start, a, solver=solver, params=(), per_part=True)
    require(bool(solution.converged.all()), "not converged")
    for name, right in (("s", 10 * small * a), ("b", 2 * big * a)):
        error = (solution.value[name] - right).norm(dim=1) / right.norm(dim=1)
        require(bool((error < 0.02).all()), name, error)


def adjoint(draw: Draw) -> None:
    """Linear maps of any spectrum: the default gradient is right, or warns."""
    d = draw.rng.choice([4, 12, 40, 80])
    a = torch.randn(d, d)
    radius = draw.rng.choice([draw.rng.uniform(0.1, 0.99), draw.rng.uniform(0.99, 1.5), draw.rng.uniform(2, 30)])
    jacobian = radius * a / torch.linalg.eigvals(a).abs().max()
    b = torch.randn(draw.rows(), d, requires_grad=True)
    dtype = draw.rng.choice([torch.float64, torch.float32])
    b = b.detach().to(dtype).requires_grad_()
    exact = torch.linalg.solve(torch.eye(d) - jacobian, b.detach().double().T).T.to(dtype)
    value = eq.fixed_point(lambda z, b: z @ jacobian.T.to(dtype) + b, exact, b, params=()).value
    g = torch.randn_like(value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guards.WARNED.clear()
        (grad,) = torch.autograd.grad(value, b, g)
    if caught:
        return
    right = torch.linalg.solve(torch.eye(d) - jacobian.T, g.double().T).T
    defect = (grad.double() - grad.double() @ jacobian - g.double()).norm(dim=1)
    allowed = (2e-5 if dtype == torch.float64 else 1e-3) * (g.double().norm(dim=1) + right.norm(dim=1))
    require(bool((defect <= allowed).all()), "adjoint", radius, d, defect)


def conserved(draw: Draw) -> None:
    """A singular adjoint equation without a solution warns."""
    n = draw.rng.choice([2, 3, 4])
    rates = torch.rand(n, n) + 0.2
    k = torch.tensor(1.0, requires_grad=True)
    flow = rates * (1 - torch.eye(n))
    flow = flow - torch.diag(flow.sum(0))
    step = 0.3 / float(flow.diagonal().abs().max())
    start = torch.rand(draw.rows(), n) + 0.1
    bend = torch.ones(n)
    bend[0] = 2.0
    solution = eq.fixed_point(
        lambda z: z + step * k * (z * (1 + (k - 1) * bend)) @ flow.T,
        start,
        solver=eq.Picard(max_steps=1500, rtol=1e-10),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guards.WARNED.clear()
        solution.value[:, 0].sum().backward()
    require(bool(caught), "no warning of a singular equation")


def forward_mode(draw: Draw) -> None:
    x, start = torch.randn(draw.rows(), 3), draw.rng.choice([0.0, 1.0])
    with draw.rng.choice([torch.enable_grad, torch.no_grad])(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        eq.fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.full_like(x, start), dual)
    raise Wrong("forward mode was not refused")


def arguments(draw: Draw) -> None:
    """Wrong shapes, types and dtypes end with a TypeError or a ValueError that names what is wrong."""
    x, z0 = torch.randn(4, 3), torch.zeros(4, 3)
    calls: list[Callable[[], Any]] = [
        lambda: eq.fixed_point(lambda z, x: z.int(), z0, x),
        lambda: eq.fixed_point(lambda z, x: z[:2], z0, x),
        lambda: eq.fixed_point(lambda z, x: z[:, :2], z0, x),
        lambda: eq.fixed_point(lambda z, x: (z, x), z0, x),
        lambda: eq.fixed_point(lambda z, x: None, z0, x),
        lambda: eq.fixed_point(lambda z, x: z.float(), z0, x),
        lambda: eq.fixed_point(lambda z, x: z, z0, x[:3]),
        lambda: eq.fixed_point(lambda z, x: z, z0.long(), x),
        lambda: eq.fixed_point(lambda z, x: z, torch.tensor(1.0), x),
        lambda: eq.fixed_point(lambda z, x: z, torch.zeros(0, 3), x),
        lambda: eq.fixed_point(lambda z, x: z, z0, "x"),
        lambda: eq.fixed_point(3, z0, x),
        lambda: eq.fixed_point(lambda z, x: z, z0, x, solver="Anderson"),
        lambda: eq.fixed_point(lambda z, x: z, z0, x, gradient=eq.Anderson()),
        lambda: eq.fixed_point(lambda z, x: z, z0, x, coupled="graph"),
        lambda: eq.fixed_point(lambda z, x: z, z0, x, coupled=torch.zeros(3, dtype=torch.int64)),
        lambda: eq.fixed_point(lambda z, x: z, z0, x.requires_grad_(), gradient=eq.Shine()),
        lambda: eq.nn.DEQ(lambda z: z),
        lambda: eq.nn.DEQ(nn.Sequential(nn.BatchNorm1d(3)))(x),
        lambda: eq.nn.DEQ(nn.Sequential(nn.Dropout(0.5)))(x),
        lambda: eq.nn.DEQ(nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3))))(x),
        lambda: eq.nn.DEQ(nn.Linear(3, 3))(),
        lambda: eq.nn.DEQ(nn.Linear(3, 3), explicit_steps=-1),
        lambda: eq.Anderson(memory=0),
        lambda: eq.Picard(rtol=float("nan")),
    ]
    try:
        draw.rng.choice(calls)()
    except (TypeError, ValueError) as error:
        require(len(str(error)) > 15, "an empty message", error)
    else:
        raise Wrong("a wrong argument was accepted")


def good(draw: Draw) -> None:
    """Usual layers are solved and differentiated without a refusal."""
    d, x = 5, torch.randn(draw.rows(), 5) * torch.linspace(0.1, 3, 5)
    linear = nn.Linear(d, d)
    norm = draw.rng.choice(
        [lambda m: m, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm]
    )
    net = nn.Sequential(norm(linear), eq.nn.VariationalDropout(0.2), nn.LayerNorm(d, eps=1.0), nn.Tanh())  # contracts
    cell = Cell(lambda self, z, x: 0.3 * self.net(z) + x, d)
    cell.net = net
    if draw.rng.random() < 0.3:
        cell.requires_grad_(False)
    if draw.rng.random() < 0.5:
        cell.eval()
    solver = draw.solver()
    layer = eq.nn.DEQ(cell, solver=solver)
    solution = layer.solve(x)
    require(bool(solution.converged.all()) or not isinstance(solver, eq.Anderson), "not converged", solver)
    if solution.value.requires_grad:
        leaves = [p for p in cell.parameters() if p.requires_grad]
        first = torch.autograd.grad(solution.value.square().sum(), leaves, create_graph=True, materialize_grads=True)
        sum(g.square().sum() for g in first).backward()


KINDS = (coupled, writes, draws, no_parameters, changes, power_iteration, extremes, half, never_falls, parts, adjoint,
         conserved, forward_mode, arguments, good)  # fmt: skip


def case(number: int, seed: int = 0) -> tuple[str, str]:
    """Run one case.

    Returns:
        Its kind and its outcome, `right` or `refused`.

    Raises:
        Wrong: the answer is wrong in silence.
    """
    rng = random.Random(f"{seed}-{number}")
    torch.manual_seed(rng.randrange(2**31))
    random.seed(rng.randrange(2**31))
    kind = rng.choice(KINDS)
    with contextlib.ExitStack() as stack:
        if kind not in (adjoint, conserved):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            kind(Draw(rng))
        except (ValueError, RuntimeError) as error:  # `Wrong` is neither
            if not any(words in str(error) for words in REFUSALS):
                raise
            if kind in (good, arguments, extremes, half, never_falls, parts, power_iteration, adjoint):
                raise Wrong(f"refused without a cause: {error}") from error
            return kind.__name__, "refused"
    return kind.__name__, "right"


def run(cases: int, seed: int = 0) -> collections.Counter[tuple[str, str]]:
    """Run many cases, in float64 by default, and count the outcomes."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return collections.Counter(_numbered(number, seed) for number in range(cases))
    finally:
        torch.set_default_dtype(default)


def _numbered(number: int, seed: int) -> tuple[str, str]:
    """Run a case; an error says which one it was."""
    try:
        return case(number, seed)
    except Exception as error:
        error.add_note(f"case {number} of seed {seed}")
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = run(options.cases, options.seed)
    table = {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(counts.items())}
    date = datetime.date.today().isoformat()
    result = {"date": date, "seed": options.seed, "cases": options.cases, "torch": torch.__version__, "outcomes": table}
    path = pathlib.Path(__file__).with_name(f"misuse-{date}-seed-{options.seed}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.cases} cases, none wrong; {path}")


if __name__ == "__main__":
    main()
