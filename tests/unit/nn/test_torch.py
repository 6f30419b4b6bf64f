"""Inside the tools of PyTorch: copies, checkpoints, several processes, compilation, export."""

from __future__ import annotations

import copy
import io
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import TanhCell
from torch import Tensor, nn

import equipoise as eq
from equipoise.core.linalg import can_branch_on

B, D = 6, 6
TIGHT = eq.Anderson(max_steps=100, rtol=1e-11)
# An inverse learned from steps as small as the rounding errors would differ from one batch size to another.
BROYDEN = eq.Broyden(max_steps=50, memory=50, rtol=1e-3)
GRADIENTS = {
    "Implicit": (TIGHT, eq.Implicit(solver=TIGHT)),
    "Shine": (BROYDEN, eq.Shine()),
    "JacobianFree": (TIGHT, eq.JacobianFree()),
    "Unrolled": (TIGHT, eq.Unrolled(steps=3)),
}
by_gradient = pytest.mark.parametrize("name", GRADIENTS)


def deq(name: str = "Implicit", cell: nn.Module | None = None, **kwargs: Any) -> eq.nn.DEQ:
    solver, gradient = GRADIENTS[name]
    return eq.nn.DEQ(TanhCell(D) if cell is None else cell, solver=solver, gradient=gradient, **kwargs)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))


# --- copies and checkpoints ------------------------------------------------------------------------------------------


@by_gradient
def test_a_deep_copy_computes_the_same_and_shares_nothing(name: str) -> None:
    layer, x = deq(name, init=nn.Linear(D, D)), torch.randn(B, D)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert (twin.solver, twin.gradient) == (layer.solver, layer.gradient)
    assert torch.equal(twin(x), layer(x))
    z = layer(x)
    with torch.no_grad():
        twin.cell.b.add_(1.0)
    assert not torch.allclose(twin(x), z)
    assert torch.equal(layer(x), z)


def test_the_state_dict_holds_the_parameters_of_cell_and_init_and_goes_round() -> None:
    layer, x = deq(init=nn.Linear(D, D)), torch.randn(B, D)
    assert sorted(layer.state_dict()) == ["cell.b", "cell.u", "cell.w", "init.bias", "init.weight"]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.01 * torch.randn_like(p))
    layer(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = deq(init=nn.Linear(D, D))
    assert not torch.allclose(fresh(x), layer(x))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), layer(x))
    # Another solver and gradient take the same checkpoint: they are configuration, not state.
    deq("Shine", init=nn.Linear(D, D)).load_state_dict(layer.state_dict())


def test_a_whole_layer_is_pickled() -> None:
    layer, x = deq("Shine"), torch.randn(B, D)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    assert (loaded.solver, loaded.gradient) == (layer.solver, layer.gradient)


def test_a_layer_is_cast_with_its_cell() -> None:
    layer, x = deq().float(), torch.randn(B, D, dtype=torch.float32)
    with layer.using(solver=eq.Anderson(max_steps=50, rtol=1e-5), gradient=eq.Implicit()):
        z = layer(x)
        assert z.dtype == torch.float32
        z.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(z.double(), deq()(x.double()), rtol=1e-3, atol=1e-3)


def test_other_parameters_are_named_and_an_exchange_behind_the_back_of_backward_is_refused() -> None:
    layer, x = deq(), torch.randn(B, D)
    params = {name: (p + 0.01).detach().requires_grad_() for name, p in layer.cell.named_parameters()}
    other = copy.deepcopy(layer)
    other.cell.load_state_dict(params)
    expected = torch.autograd.grad(other(x).sum(), list(other.cell.parameters()))

    z = torch.func.functional_call(layer, {f"cell.{name}": p for name, p in params.items()}, (x,))
    assert torch.equal(z, other(x))
    with pytest.raises(RuntimeError, match=r"parameters are not those of the solve.*functional_call") as refusal:
        z.sum().backward()
    assert "params=[*params.values()]" in str(refusal.value)
    named = eq.fixed_point(
        lambda z, x: torch.func.functional_call(layer.cell, params, (z, x)), torch.zeros_like(x), x,
        params=[*params.values()], solver=layer.solver, gradient=layer.gradient,
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(named.value.sum(), list(params.values())), expected)


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
    import os, sys
    import torch
    import torch.distributed as dist
    from problems import TanhCell
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import equipoise as eq

    rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_default_dtype(torch.float64)
    job = torch.load(path + "/job.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    grads = {}
    for name, model in job["models"].items():
        # Several backward passes, the gradients summed: the reducer must be in order after each.
        model = DistributedDataParallel(model)
        for half in job["x"].chunk(4)[2 * rank : 2 * rank + 2]:
            model.zero_grad()
            model(half).square().mean().backward()
        grads[name] = [p.grad for p in model.parameters()]
    torch.save(grads, f"{path}/grads{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    x = torch.randn(16, D)
    models = {name: nn.Sequential(nn.Linear(D, D), deq(name), nn.Linear(D, 2)) for name in GRADIENTS}
    torch.save({"models": models, "x": x}, tmp_path / "job.pt")
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tests = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r}); exec(open({str(script)!r}).read())"]
    workers = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err
    finally:
        for worker in workers:
            worker.kill()
    quarters = x.chunk(4)
    last = torch.cat([quarters[1], quarters[3]])  # what the two processes saw in their last passes
    together = [torch.load(tmp_path / f"grads{rank}.pt") for rank in range(2)]
    for name, model in models.items():
        model(last).square().mean().backward()
        for one, p in enumerate(model.parameters()):
            assert torch.equal(together[0][name][one], together[1][name][one])
            torch.testing.assert_close(
                together[0][name][one], p.grad, rtol=1e-10, atol=1e-10, msg=f"{name}, parameter {one}"
            )


# --- compilation -----------------------------------------------------------------------------------------------------


# While it traces, Dynamo looks at the gradients of tensors that are no leaves.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@compiling
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"), [*(("eager", name) for name in GRADIENTS), ("aot_eager", "Implicit"), ("inductor", "Implicit")]
)
def test_a_compiled_cell_gives_the_same_answers_and_gradients(backend: str, name: str) -> None:
    torch.compiler.reset()
    cell, x = TanhCell(D), torch.randn(B, D) * torch.logspace(-2, 1, B)[:, None]
    plain, compiled = deq(name, cell), deq(name, torch.compile(cell, backend=backend))
    solution = plain.solve(x)
    assert solution.num_steps.unique().numel() > 1, "rows must leave the batch for this test to tell something"
    twin = compiled.solve(x)
    torch.testing.assert_close(twin.value, solution.value, rtol=1e-9, atol=1e-9)
    assert torch.equal(twin.num_steps, solution.num_steps)
    torch.testing.assert_close(gradients(compiled, x), gradients(plain, x), rtol=1e-7, atol=1e-9)


@compiling
@pytest.mark.slow
def test_a_compiled_cell_keeps_its_noise_and_its_normalized_weights() -> None:
    torch.compiler.reset()

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = eq.nn.weight_norm(nn.Linear(D, D))
            self.drop = eq.nn.VariationalDropout(0.3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.drop(self.w(z) / 3) + x)

    cell, x = Cell(), torch.randn(B, D)
    results = []
    for layer in (deq(cell=cell), deq(cell=torch.compile(cell, backend="eager"))):
        torch.manual_seed(4)
        results.append(gradients(layer, x))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="BatchNorm1d with batch statistics"):
        deq(cell=torch.compile(nn.Sequential(nn.BatchNorm1d(D)), backend="eager"), init=lambda: x)()


@pytest.mark.slow
def test_the_host_reads_on_the_cpu_and_never_in_a_traced_graph() -> None:
    branching = torch.compile(lambda x: x + 1 if can_branch_on(x) else x - 1, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    assert can_branch_on(x)
    assert not can_branch_on(torch.zeros(2, device="meta"))
    assert torch.equal(branching(x), x - 1)


# --- export ----------------------------------------------------------------------------------------------------------


class NormedCell(nn.Module):
    """Weight and batch normalisation and dropout, all of which are fixed in evaluation mode; the state is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.w = eq.nn.weight_norm(nn.Linear(D, D))
        self.norm = nn.BatchNorm1d(D)
        self.drop = eq.nn.VariationalDropout(0.3)

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.norm(self.w(z[1])) / 3 + x), self.drop(torch.sin(z[0] / 2))


CELLS = {
    "tensor": (lambda: TanhCell(D), None),
    "pair": (NormedCell, lambda x: (torch.zeros_like(x), torch.zeros_like(x))),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "cell"),
    [
        (eq.Anderson(max_steps=6, memory=4, rtol=0.0), "tensor"),
        (eq.Broyden(max_steps=6, memory=6, rtol=0.0), "tensor"),
        (eq.Broyden(max_steps=6, memory=3, rtol=0.0), "pair"),  # restarts
        (eq.Anderson(max_steps=6, rtol=1e-3), "pair"),  # some samples converge within the steps
    ],
    ids=["anderson", "broyden", "broyden-restarted", "anderson-converging"],
)
def test_an_exported_layer_equals_the_eager_one_at_any_batch_size(solver: eq.Solver, cell: str) -> None:
    make, init = CELLS[cell]
    layer = eq.nn.DEQ(make(), solver=solver, init=init).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(4, D),), dynamic_shapes=(({0: batch},),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    with torch.no_grad():
        for size in (4, 1, 2, 33):
            x = torch.randn(size, D) * torch.logspace(-2, 1, size)[:, None]
            solution = layer.solve(x)
            torch.testing.assert_close(exported(x), solution.value, rtol=1e-6, atol=1e-6)
        # The last batch of 33: with a tolerance some samples have stopped and others have not.
        assert bool(solution.converged.any()) == (solver.rtol > 0)
        assert not bool(solution.converged.all())
