"""The DEQ module: where it starts, what it returns, that it remembers nothing, and what it says about misuse."""

from __future__ import annotations

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
        return torch.tanh(z[1].mean(1) @ self.w + x["a"]), torch.tanh(z[0] @ self.w.T + x["b"])[:, None].expand(
            -1, 4, 3
        )


def pair_start(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return x["a"].new_zeros(len(x["a"]), 2), x["a"].new_zeros(len(x["a"]), 4, 3)


# --- start and answer ------------------------------------------------------------------------------------------------


def test_the_start_is_zeros_or_what_init_gives_or_what_the_caller_passes() -> None:
    x, z0 = torch.randn(B, D), torch.randn(B, D)
    guess = nn.Linear(D, D)
    starts = {"zeros": eq.nn.DEQ(TanhCell(D), solver=START_ONLY)(x)}
    starts["module"] = eq.nn.DEQ(TanhCell(D), solver=START_ONLY, init=guess)(x)
    starts["function"] = eq.nn.DEQ(TanhCell(D), solver=START_ONLY, init=lambda x: x.cos())(x)
    starts["caller"] = eq.nn.DEQ(TanhCell(D), solver=START_ONLY, init=guess)(x, z0=z0)
    expected = {"zeros": torch.zeros(B, D), "module": guess(x), "function": x.cos(), "caller": z0}
    for name, start in starts.items():
        assert torch.equal(start, expected[name]), name


def test_init_sees_all_inputs_and_its_module_is_part_of_the_layer() -> None:
    class Guess(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.scale * (x - y)

    class Cell(TanhCell):
        def forward(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(z, x + y)

    layer = eq.nn.DEQ(Cell(D), solver=TIGHT, init=Guess())
    assert "init.scale" in layer.state_dict()
    x, y = torch.randn(B, D), torch.randn(B, D)
    with layer.using(solver=START_ONLY):
        assert torch.equal(layer(x, y), x - y)
    layer(x, y).sum().backward()
    assert layer.init.scale.grad is None  # the equilibrium does not depend on where the solve began
    assert layer.cell.w.grad is not None


def test_forward_is_the_value_of_solve_and_an_equilibrium_of_the_cell() -> None:
    layer = eq.nn.DEQ(TanhCell(D), solver=TIGHT)
    x = torch.randn(B, D)
    solution = layer.solve(x).raise_for_status()
    assert torch.equal(layer(x), solution.value)
    torch.testing.assert_close(layer.cell(solution.value, x), solution.value, rtol=1e-11, atol=1e-11)
    assert solution.trace is None
    trace = layer.solve(x, trace=True).trace
    assert trace is not None
    assert trace.shape == (solution.num_evals, B)
    torch.testing.assert_close(trace[0], layer.cell(torch.zeros(B, D), x).norm(dim=1))


def test_a_start_at_the_equilibrium_costs_one_evaluation() -> None:
    layer = eq.nn.DEQ(TanhCell(D), solver=TIGHT)
    x = torch.randn(B, D)
    with layer.using(solver=eq.Anderson(rtol=1e-9)):
        again = layer.solve(x, z0=layer(x))
        assert layer.solve(x, z0=eq.nn.DEQ(layer.cell, solver=TIGHT)(x)).num_evals == 1
    assert again.num_evals < layer.solve(x).num_evals


def test_states_and_inputs_may_be_containers() -> None:
    layer = eq.nn.DEQ(PairCell(), solver=TIGHT, gradient=eq.Implicit(solver=TIGHT), init=pair_start)
    x = {"a": torch.randn(3, 2), "b": torch.randn(3, 3)}
    z = layer(x)
    assert isinstance(z, tuple)
    for actual, expected in zip(z, layer.cell(z, x), strict=True):
        torch.testing.assert_close(actual, expected)
    a, b = (t.requires_grad_() for t in x.values())
    torch.autograd.gradcheck(lambda a, b, _: layer({"a": a, "b": b}), (a, b, layer.cell.w))


def test_without_gradients_nothing_is_tracked() -> None:
    layer = eq.nn.DEQ(TanhCell(D))
    x = torch.randn(B, D)
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
            else:
                value = value if isinstance(value, bool | set | None) else id(value)
            if value is not None:
                found[f"{name}.{key}"] = value
    return found


class Failing(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        raise RuntimeError("no such evaluation")


@pytest.mark.parametrize(
    "solver", [eq.Anderson(), eq.Broyden(), eq.Picard(max_steps=3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_remembers_nothing_between_calls(solver: eq.Solver, training: bool) -> None:
    class Cell(TanhCell):
        def __init__(self) -> None:
            super().__init__(D)
            self.drop = eq.nn.VariationalDropout(0.2)
            self.lift = eq.nn.weight_norm(nn.Linear(D, D))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.drop(super().forward(z, self.lift(x)))

    layer = eq.nn.DEQ(Cell(), solver=solver, init=nn.Linear(D, D)).train(training)
    x = torch.randn(B, D)
    before = remembered(layer)
    torch.manual_seed(3)
    first = layer(x)
    torch.autograd.grad(first.square().sum(), list(layer.cell.parameters()))
    eq.nn.jacobian_penalty(layer.solve(x))
    with layer.using(solver=eq.Broyden(), gradient=eq.Shine()):
        layer(x[:2]).sum()
    assert remembered(layer) == before
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)  # and the calls between have left no trace in the answer


def test_a_failing_cell_leaves_the_layer_as_it_was() -> None:
    layer = eq.nn.DEQ(nn.Sequential(eq.nn.VariationalDropout(), Failing()), init=lambda: torch.zeros(B, D))
    before = remembered(layer)
    with pytest.raises(RuntimeError, match="no such evaluation"):
        layer()
    assert remembered(layer) == before


# --- using -----------------------------------------------------------------------------------------------------------


def test_using_replaces_solver_and_gradient_within_the_block_only() -> None:
    solver, gradient = eq.Anderson(rtol=1e-2), eq.JacobianFree()
    layer = eq.nn.DEQ(TanhCell(D), solver=solver, gradient=gradient)
    other, implicit = eq.Broyden(max_steps=40, memory=40, rtol=1e-9), eq.Implicit()
    with layer.using(solver=other) as inner:
        assert inner is layer
        assert (layer.solver, layer.gradient) == (other, gradient)
        assert float(layer.solve(torch.randn(B, D)).residual.max()) < 1e-7
        with layer.using(gradient=implicit):
            assert (layer.solver, layer.gradient) == (other, implicit)
        assert (layer.solver, layer.gradient) == (other, gradient)
    assert layer.solver is solver
    assert layer.gradient is gradient
    with pytest.raises(KeyError), layer.using(solver=other, gradient=implicit):
        raise KeyError
    assert (layer.solver, layer.gradient) == (solver, gradient)
    wrong: Any = "broyden"
    with (
        pytest.raises(TypeError, match=r"solver must be .* got 'broyden'"),
        layer.using(solver=wrong, gradient=implicit),
    ):
        pass
    assert (layer.solver, layer.gradient) == (solver, gradient)


def test_the_gradient_is_that_of_the_forward_pass_wherever_backward_is_called() -> None:
    layer = eq.nn.DEQ(TanhCell(D), solver=TIGHT, gradient=eq.JacobianFree())
    x = torch.randn(B, D)
    (free,) = torch.autograd.grad(layer(x).sum(), layer.cell.b)
    with layer.using(gradient=eq.Implicit(solver=TIGHT)):
        out = layer(x)
    (exact,) = torch.autograd.grad(out.sum(), layer.cell.b)  # after the block
    z = out.detach()
    jacobian = (1 - z**2)[:, :, None] * layer.cell.w.detach()
    w = torch.linalg.solve((torch.eye(D) - jacobian).mT, torch.ones(B, D))
    torch.testing.assert_close(exact, (w * (1 - z**2)).sum(0))
    torch.testing.assert_close(free, (1 - z**2).sum(0))


def test_the_layer_prints_its_whole_configuration() -> None:
    text = repr(eq.nn.DEQ(TanhCell(D), solver=eq.Broyden(max_steps=7), gradient=eq.Shine(fallback_ratio=1.5)))
    assert "solver=Broyden(max_steps=7" in text
    assert "gradient=Shine(fallback_ratio=1.5" in text
    assert "(cell): TanhCell" in text


# --- misuse ----------------------------------------------------------------------------------------------------------


class Returning(nn.Module):
    """A cell that returns something of its own."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, z: Tensor, x: Tensor) -> Any:
        return self.make(z)


X, Y = torch.ones(B, D, dtype=torch.float64), torch.ones(2, D, dtype=torch.float64)
MISUSE: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (
        lambda: eq.nn.DEQ(Returning(lambda z: z[:, :2]))(X),
        ValueError, r"map's result has shape \(5, 2\), the state has \(B, 6\); a map must return the shape of its",
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
        ValueError, r"input 0 has shape \(5, 6\), the state has batch 2.*belongs in the map's parameters",
    ),
    "no input": (lambda: eq.nn.DEQ(TanhCell(D))(), ValueError, r"DEQ\(init=None\) starts from zeros like.*pass init="),
    "input is a dict": (lambda: eq.nn.DEQ(PairCell())({"a": X}), ValueError, r"DEQ\(init=None\).*pass init="),
    "init is a tensor": (
        lambda: eq.nn.DEQ(TanhCell(D), init=X),  # type: ignore[arg-type]
        TypeError, r"init must be a module or a function .*got Tensor; .*z0=",
    ),
    "init gives no state": (
        lambda: eq.nn.DEQ(TanhCell(D), init=lambda x: 0.0)(X),
        TypeError, "z0 must be a tensor or .* got float",
    ),
    "init is misspelt": (
        lambda: eq.nn.DEQ(TanhCell(D), initial=None),  # type: ignore[call-arg]
        TypeError, "initial",
    ),
    "cell is a function": (
        lambda: eq.nn.DEQ(torch.tanh),  # type: ignore[arg-type]
        TypeError, "cell must be a torch.nn.Module, got builtin_function_or_method; for functions use fixed_point",
    ),
    "solver is a name": (
        lambda: eq.nn.DEQ(TanhCell(D), solver="anderson"),  # type: ignore[arg-type]
        TypeError, r"solver must be a solver such as Anderson\(\), got 'anderson'",
    ),
    "solver is a class": (
        lambda: eq.nn.DEQ(TanhCell(D), solver=eq.Anderson),  # type: ignore[arg-type]
        TypeError, r"solver must be a solver such as Anderson\(\), got <class",
    ),
    "gradient is a solver": (
        lambda: eq.nn.DEQ(TanhCell(D), gradient=eq.Anderson()),  # type: ignore[arg-type]
        TypeError, r"gradient must be a gradient such as Implicit\(\), got Anderson",
    ),
    "gradient without its inverse": (
        lambda: eq.nn.DEQ(TanhCell(D), solver=eq.Anderson(), gradient=eq.Shine())(X),
        ValueError, "Shine.*Anderson keeps none; use Broyden or LBFGS as solver, or Implicit",
    ),
    "misspelt option": (lambda: eq.Anderson(max_step=3), TypeError, "max_step"),  # type: ignore[call-arg]
    "misspelt argument of a call": (
        lambda: eq.nn.DEQ(TanhCell(D))(X, z_0=X),
        TypeError, "z_0",
    ),
    "positional solver": (
        lambda: eq.nn.DEQ(TanhCell(D), eq.Anderson()),  # type: ignore[misc]
        TypeError, "positional",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named_with_its_remedy(name: str) -> None:
    use, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        use()


def test_batch_statistics_in_evaluation_mode_and_outside_the_cell_are_fine() -> None:
    inside = eq.nn.DEQ(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh()).eval(), init=lambda: X)
    inside()
    outside = nn.Sequential(nn.BatchNorm1d(D), eq.nn.DEQ(TanhCell(D)))
    outside(torch.randn(B, D)).sum().backward()
