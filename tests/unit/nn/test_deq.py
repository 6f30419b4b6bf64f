"""The DEQ module: where it starts, what it returns, that it remembers nothing, and what it says about misuse."""

from typing import Any

import pytest
import torch
from problems import TanhCell
from torch import Tensor, nn

import equipoise as eq

B, D = 5, 6
TIGHT = eq.Anderson(max_steps=200, rtol=1e-12)
START_ONLY = eq.Picard(max_steps=0)


class PairCell(nn.Module):
    """A state of two parts of different shape, and an input that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2) / 4)

    def forward(self, z: tuple[Tensor, Tensor], x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        second = torch.tanh(z[0] @ self.w.T + x["b"])[:, None]
        return torch.tanh(z[1].mean(1) @ self.w + x["a"]), second.expand(-1, 4, 3)


class NormedCell(TanhCell):
    """With dropout and a normalized weight."""

    def __init__(self) -> None:
        super().__init__(D)
        self.drop = eq.nn.VariationalDropout(0.2)
        self.lift = eq.nn.weight_norm(nn.Linear(D, D))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.drop(super().forward(z, self.lift(x)))


class Returning(nn.Module):
    """A cell that returns something of its own."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, z: Tensor, *inputs: Tensor) -> Any:
        return self.make(z)


# --- start and answer ------------------------------------------------------------------------------------------------


def test_start() -> None:
    """Zeros, or what init gives, or what the caller passes."""
    x, z0, guess = torch.randn(B, D), torch.randn(B, D), nn.Linear(D, D)
    for init, given, expected in [
        (None, None, torch.zeros(B, D)), (guess, None, guess(x)), (lambda x: x.cos(), None, x.cos()), (guess, z0, z0)
    ]:  # fmt: skip
        layer = eq.nn.DEQ(TanhCell(D), solver=START_ONLY, init=init)
        assert torch.equal(layer(x, z0=given), expected)


def test_init_module() -> None:
    """It sees all inputs and is part of the layer; the equilibrium does not depend on where the solve began."""

    class Guess(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.scale * (x - y)

    class Cell(TanhCell):
        def forward(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(z, x + y)

    layer, (x, y) = eq.nn.DEQ(Cell(D), solver=TIGHT, init=Guess()), torch.randn(2, B, D)
    assert "init.scale" in layer.state_dict()
    with layer.using(solver=START_ONLY):
        assert torch.equal(layer(x, y), x - y)
    layer(x, y).sum().backward()
    assert layer.init.scale.grad is None
    assert layer.cell.w.grad is not None


def test_solve() -> None:
    """Forward is its value, an equilibrium of the cell; a start there costs one evaluation, a near one fewer."""
    layer, x = eq.nn.DEQ(TanhCell(D), solver=TIGHT), torch.randn(B, D)
    solution = layer.solve(x).raise_for_status()
    assert torch.equal(layer(x), solution.value)
    torch.testing.assert_close(layer.cell(solution.value, x), solution.value, rtol=1e-11, atol=1e-11)
    assert solution.trace is None
    trace = layer.solve(x, trace=True).trace
    assert trace.shape == (solution.num_evals, B)
    torch.testing.assert_close(trace[0], layer.cell(torch.zeros(B, D), x).norm(dim=1))
    with layer.using(solver=eq.Anderson(rtol=1e-9)):
        assert layer.solve(x, z0=solution.value).num_evals == 1
        assert layer.solve(x, z0=layer(x)).num_evals < layer.solve(x).num_evals


def test_containers() -> None:
    start = lambda x: (x["a"].new_zeros(3, 2), x["a"].new_zeros(3, 4, 3))  # noqa: E731
    layer = eq.nn.DEQ(PairCell(), solver=TIGHT, gradient=eq.Implicit(solver=TIGHT), init=start)
    x = {"a": torch.randn(3, 2), "b": torch.randn(3, 3)}
    z = layer(x)
    assert isinstance(z, tuple)
    torch.testing.assert_close(z, layer.cell(z, x))
    a, b = (t.requires_grad_() for t in x.values())
    torch.autograd.gradcheck(lambda a, b, _: layer({"a": a, "b": b}), (a, b, layer.cell.w), fast_mode=True)


def test_tracking() -> None:
    layer, x = eq.nn.DEQ(TanhCell(D)), torch.randn(B, D)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad


# --- memory ----------------------------------------------------------------------------------------------------------


def remembered(module: nn.Module) -> dict[str, Any]:
    """All attributes of a module and of its children, hooks included; tensors by identity, version and bits."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key in ("_parameters", "_buffers"):
                value = {k: None if t is None else (id(t), t._version, t.tolist()) for k, t in value.items()}
            elif isinstance(value, dict):
                value = {k: id(v) for k, v in value.items()}
            elif not isinstance(value, bool | set | None):
                value = id(value)
            if value is not None:
                found[f"{name}.{key}"] = value
    return found


@pytest.mark.parametrize(
    "solver", [eq.Anderson(), eq.Broyden(), eq.Picard(max_steps=3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_no_memory(solver: eq.Solver, training: bool) -> None:
    """The layer remembers nothing between calls, which leave no trace in the answer."""
    layer, x = eq.nn.DEQ(NormedCell(), solver=solver, init=nn.Linear(D, D)).train(training), torch.randn(B, D)
    before = remembered(layer)
    torch.manual_seed(3)
    first = layer(x)
    torch.autograd.grad(first.square().sum(), list(layer.cell.parameters()))
    eq.nn.jacobian_penalty(layer.solve(x))
    with layer.using(solver=eq.Broyden(), gradient=eq.Shine()):
        layer(x[:2]).sum()
    assert remembered(layer) == before
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_failing_cell() -> None:
    """It leaves the layer as it was."""
    cell = nn.Sequential(eq.nn.VariationalDropout(), Returning(lambda z: {}["no such evaluation"]))
    layer = eq.nn.DEQ(cell, init=lambda: torch.zeros(B, D))
    before = remembered(layer)
    with pytest.raises(KeyError, match="no such evaluation"):
        layer()
    assert remembered(layer) == before


# --- using -----------------------------------------------------------------------------------------------------------


def test_using() -> None:
    """It replaces solver and gradient within the block only, also when that fails."""
    solver, gradient, other, implicit = eq.Anderson(rtol=1e-2), eq.JacobianFree(), eq.Broyden(), eq.Implicit()
    layer = eq.nn.DEQ(TanhCell(D), solver=solver, gradient=gradient)
    with layer.using(solver=other) as inner:
        assert inner is layer
        assert (layer.solver, layer.gradient) == (other, gradient)
        with layer.using(gradient=implicit):
            assert (layer.solver, layer.gradient) == (other, implicit)
        assert (layer.solver, layer.gradient) == (other, gradient)
    assert layer.solver is solver
    assert layer.gradient is gradient
    with pytest.raises(KeyError), layer.using(solver=other, gradient=implicit):
        raise KeyError
    wrong: Any = "broyden"
    message = r"solver must be .* got 'broyden'"
    with pytest.raises(TypeError, match=message), layer.using(solver=wrong, gradient=implicit):
        pass
    assert (layer.solver, layer.gradient) == (solver, gradient)


def test_gradient_of_the_forward_pass() -> None:
    """It is used wherever backward is called."""
    layer, x = eq.nn.DEQ(TanhCell(D), solver=TIGHT, gradient=eq.JacobianFree()), torch.randn(B, D)
    (free,) = torch.autograd.grad(layer(x).sum(), layer.cell.b)
    with layer.using(gradient=eq.Implicit(solver=TIGHT)):
        out = layer(x)
    (exact,) = torch.autograd.grad(out.sum(), layer.cell.b)  # after the block
    slope = 1 - out.detach() ** 2
    w = torch.linalg.solve((torch.eye(D) - slope[:, :, None] * layer.cell.w.detach()).mT, torch.ones(B, D))
    torch.testing.assert_close(exact, (w * slope).sum(0))
    torch.testing.assert_close(free, slope.sum(0))


def test_repr() -> None:
    """It prints the whole configuration."""
    layer = eq.nn.DEQ(TanhCell(D), solver=eq.Broyden(max_steps=7), gradient=eq.Shine(fallback_ratio=1.5))
    assert layer.extra_repr() == f"solver={layer.solver}, gradient={layer.gradient}"
    assert "(cell): TanhCell" in repr(layer)
    assert eq.nn.DEQ(TanhCell(D), explicit_steps=2).extra_repr().endswith(", explicit_steps=2")
    assert (eq.nn.DEQ(TanhCell(D)).solver, eq.nn.DEQ(TanhCell(D)).gradient) == (eq.Anderson(), eq.Implicit())


# --- misuse ----------------------------------------------------------------------------------------------------------

X, Y = torch.ones(B, D, dtype=torch.float64), torch.ones(2, D, dtype=torch.float64)
MISUSE: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (
        lambda: eq.nn.DEQ(Returning(lambda z: z[:, :2]))(X),
        ValueError, r"map's result has shape \(5, 2\), the state has \(B, 6\); a map must return the shape of its",
    ),
    "shape after an explicit step": (
        lambda: eq.nn.DEQ(Returning(lambda z: z[:, :2]), explicit_steps=1)(X), ValueError, r"map's result has shape"
    ),
    "dtype": (
        lambda: eq.nn.DEQ(Returning(lambda z: z.float()))(X),
        TypeError, "result has dtype torch.float32, the state has torch.float64; convert one",
    ),
    "rows": (
        lambda: eq.nn.DEQ(Returning(lambda z: z.mean(0, keepdim=True)))(X),
        ValueError, "returned 1 rows for a state of 5; it must keep the batch dimension",
    ),
    "nothing": (lambda: eq.nn.DEQ(Returning(lambda z: None))(X), TypeError, "result must be .* got NoneType"),
    "batch statistics": (
        lambda: eq.nn.DEQ(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)), init=lambda: X)(),
        ValueError, "the cell's 1 is BatchNorm1d with batch statistics.*use GroupNorm .* or call .eval",
    ),
    "dropout": (
        lambda: eq.nn.DEQ(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.2)), init=lambda: X)(),
        ValueError, r"the cell's 1 is Dropout\(p=0.2\).*use equipoise.nn.VariationalDropout",
    ),
    "input of another batch": (
        lambda: eq.nn.DEQ(TanhCell(D))(X, z0=Y),
        ValueError, r"input 0 has shape \(5, 6\), the state has batch 2.*make what all rows share an attribute",
    ),
    "no input": (lambda: eq.nn.DEQ(TanhCell(D))(), ValueError, r"DEQ\(init=None\) starts from zeros like.*pass init="),
    "input is a dict": (lambda: eq.nn.DEQ(PairCell())({"a": X}), ValueError, r"DEQ\(init=None\).*pass init="),
    "init is a tensor": (
        lambda: eq.nn.DEQ(TanhCell(D), init=X), TypeError, r"init must be a module or a function .*got Tensor; .*z0=",
    ),
    "init gives no state": (
        lambda: eq.nn.DEQ(TanhCell(D), init=lambda x: 0.0)(X), TypeError, "z0 must be a tensor or .* got float",
    ),
    "init is misspelt": (lambda: eq.nn.DEQ(TanhCell(D), initial=None), TypeError, "initial"),
    "explicit steps are negative": (
        lambda: eq.nn.DEQ(TanhCell(D), explicit_steps=-1), ValueError, r"DEQ\(explicit_steps=-1\): must be >= 0"
    ),
    "explicit steps are a fraction": (
        lambda: eq.nn.DEQ(TanhCell(D), explicit_steps=1.5), TypeError, "explicit_steps must be an integer, got 1.5"
    ),
    "explicit steps are a flag": (
        lambda: eq.nn.DEQ(TanhCell(D), explicit_steps=True), TypeError, "explicit_steps must be an integer, got True"
    ),
    "cell is a function": (
        lambda: eq.nn.DEQ(torch.tanh),
        TypeError, "cell must be a torch.nn.Module, got builtin_function_or_method; for functions use fixed_point",
    ),
    "solver is a name": (
        lambda: eq.nn.DEQ(TanhCell(D), solver="anderson"),
        TypeError, r"solver must be a solver such as Anderson\(\), got 'anderson'",
    ),
    "solver is a class": (
        lambda: eq.nn.DEQ(TanhCell(D), solver=eq.Anderson),
        TypeError, r"solver must be a solver such as Anderson\(\), got <class",
    ),
    "gradient is a solver": (
        lambda: eq.nn.DEQ(TanhCell(D), gradient=eq.Anderson()),
        TypeError, r"gradient must be a gradient such as Implicit\(\), got Anderson",
    ),
    "gradient without its inverse": (
        lambda: eq.nn.DEQ(TanhCell(D), solver=eq.Anderson(), gradient=eq.Shine())(X),
        ValueError, "Shine.*Anderson keeps none; use Broyden or LBFGS as solver, or Implicit",
    ),
    "misspelt argument of a call": (lambda: eq.nn.DEQ(TanhCell(D))(X, z_0=X), TypeError, "z_0"),
    "positional solver": (lambda: eq.nn.DEQ(TanhCell(D), eq.Anderson()), TypeError, "positional"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    use, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        use()


@pytest.mark.parametrize(
    ("returned", "described"),
    [
        (torch.zeros(B, 1), "a tensor (5, 1)"),
        (torch.zeros(B, D + 1), "a tensor (5, 7)"),
        ((torch.zeros(B, D), [torch.zeros(2)]), "a tuple of a tensor (5, 6), a list of a tensor (2,)"),
        ({"a": torch.zeros(B, D)}, "a dict"),
    ],
)
def test_predictor_of_another_shape(returned: Any, described: str) -> None:
    layer = eq.nn.DEQ(TanhCell(D), init=Returning(lambda z: returned))
    with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
        layer(torch.randn(B, D))
    assert caught.value.__notes__ == [f"init returned {described}; it must return a state of the cell"]


def test_batch_norm() -> None:
    """Outside the cell its statistics are fine."""
    outside = nn.Sequential(nn.BatchNorm1d(D), eq.nn.DEQ(TanhCell(D)))
    outside(torch.randn(B, D)).sum().backward()
