"""Inside the tools of PyTorch: copies, checkpoints, several processes, compilation, export."""

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
    "Reversible": (eq.Picard(max_steps=0), eq.Reversible(steps=30)),
}


def deq(name: str = "Implicit", cell: nn.Module | None = None, **kwargs: Any) -> eq.nn.DEQ:
    solver, gradient = GRADIENTS[name]
    return eq.nn.DEQ(TanhCell(D) if cell is None else cell, solver=solver, gradient=gradient, **kwargs)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))


def reloaded(saved: Any, weights_only: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


# --- copies and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRADIENTS)
def test_copies(name: str) -> None:
    """A deep copy and a pickled layer compute the same and share nothing."""
    layer, x = deq(name, init=nn.Linear(D, D)), torch.randn(B, D)
    layer(x).sum().backward()
    z = layer(x)
    for twin in (copy.deepcopy(layer), reloaded(layer, weights_only=False)):
        assert (twin.solver, twin.gradient) == (layer.solver, layer.gradient)
        assert torch.equal(twin(x), z)
        with torch.no_grad():
            twin.cell.b.add_(1.0)
        assert not torch.allclose(twin(x), z)
        assert torch.equal(layer(x), z)


def test_state_dict() -> None:
    """It holds the parameters of cell and init; solver and gradient are configuration, not state."""
    layer, x = deq(init=nn.Linear(D, D)), torch.randn(B, D)
    assert sorted(layer.state_dict()) == ["cell.b", "cell.u", "cell.w", "init.bias", "init.weight"]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.01 * torch.randn_like(p))
    layer(x).sum().backward()
    fresh = deq(init=nn.Linear(D, D))
    assert not torch.allclose(fresh(x), layer(x))
    fresh.load_state_dict(reloaded(layer.state_dict(), weights_only=True))
    assert torch.equal(fresh(x), layer(x))
    deq("Shine", init=nn.Linear(D, D)).load_state_dict(layer.state_dict())


def test_functional_call() -> None:
    """Other parameters are named; an exchange behind the back of backward is refused."""
    layer, x = deq(), torch.randn(B, D)
    params = {name: (p + 0.01).detach().requires_grad_() for name, p in layer.cell.named_parameters()}
    other = copy.deepcopy(layer)
    other.cell.load_state_dict(params)
    expected = torch.autograd.grad(other(x).sum(), list(other.cell.parameters()))
    z = torch.func.functional_call(layer, {f"cell.{name}": p for name, p in params.items()}, (x,))
    assert torch.equal(z, other(x))
    with pytest.raises(
        RuntimeError, match=r"parameters are not those .*functional_call.*params=\[\*params.values\(\)\]"
    ):
        z.sum().backward()
    named = eq.fixed_point(
        lambda z, x: torch.func.functional_call(layer.cell, params, (z, x)), torch.zeros_like(x), x,
        params=[*params.values()], solver=layer.solver, gradient=layer.gradient,
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(named.value.sum(), list(params.values())), expected)


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

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
def test_two_processes(tmp_path: Path) -> None:
    """They give the gradients of one."""
    x = torch.randn(16, D)
    models = {name: nn.Sequential(nn.Linear(D, D), deq(name), nn.Linear(D, 2)) for name in GRADIENTS}
    torch.save({"models": models, "x": x}, tmp_path / "job.pt")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n" + textwrap.dedent(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(port), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
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
    first, second = (torch.load(tmp_path / f"grads{rank}.pt") for rank in range(2))
    for name, model in models.items():
        model(last).square().mean().backward()
        assert all(map(torch.equal, first[name], second[name]))
        torch.testing.assert_close(first[name], [p.grad for p in model.parameters()], rtol=1e-10, atol=1e-10)


# --- compilation -----------------------------------------------------------------------------------------------------


class NoisyCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = eq.nn.weight_norm(nn.Linear(D, D))
        self.drop = eq.nn.VariationalDropout(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.drop(self.w(z) / 3) + x)


# While it traces, Dynamo looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "make"),
    [
        *(("eager", name, TanhCell) for name in GRADIENTS),
        *((backend, "Implicit", TanhCell) for backend in ("aot_eager", "inductor")),
        ("eager", "Implicit", NoisyCell),
    ],
)
def test_compiled_cell(backend: str, name: str, make: type[nn.Module]) -> None:
    """It gives the same answers and gradients, with its noise and its normalized weights."""
    torch.compiler.reset()
    cell, x = make(), torch.randn(B, D) * torch.logspace(-2, 1, B)[:, None]
    layers = deq(name, cell), deq(name, torch.compile(cell, backend=backend))
    found = []
    for layer in layers:
        torch.manual_seed(4)
        solution = layer.solve(x)
        torch.manual_seed(4)
        found.append((solution.value, solution.num_steps, *gradients(layer, x)))
    assert name == "Reversible" or found[0][1].unique().numel() > 1, (
        "rows must leave the batch for this test to tell something"
    )
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
    if make is NoisyCell:
        with pytest.raises(ValueError, match="BatchNorm1d with batch statistics"):
            deq(cell=torch.compile(nn.Sequential(nn.BatchNorm1d(D)), backend="eager"), init=lambda: x)()


@pytest.mark.slow
def test_host_reads() -> None:
    """On the CPU, and never in a traced graph."""
    branching = torch.compile(lambda x: x + 1 if can_branch_on(x) else x - 1, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    assert can_branch_on(x)
    assert not can_branch_on(torch.zeros(2, device="meta"))
    assert torch.equal(branching(x), x - 1)


# --- export ----------------------------------------------------------------------------------------------------------


class PairCell(nn.Module):
    """Weight and batch normalization and dropout, all of which are fixed in evaluation mode; the state is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.w = eq.nn.weight_norm(nn.Linear(D, D))
        self.norm = nn.BatchNorm1d(D)
        self.drop = eq.nn.VariationalDropout(0.3)

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.norm(self.w(z[1])) / 3 + x), self.drop(torch.sin(z[0] / 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "make"),
    [
        (eq.Anderson(max_steps=6, memory=4, rtol=0.0), TanhCell),
        (eq.Broyden(max_steps=6, memory=6, rtol=0.0), TanhCell),
        (eq.Broyden(max_steps=6, memory=3, rtol=0.0), PairCell),  # restarts
        (eq.Anderson(max_steps=6, rtol=1e-3), PairCell),  # some samples converge within the steps
    ],
    ids=["anderson", "broyden", "broyden-restarted", "anderson-converging"],
)
def test_export(solver: eq.Solver, make: type[nn.Module]) -> None:
    """An exported layer equals the eager one at any batch size."""
    init = (lambda x: (torch.zeros_like(x), torch.zeros_like(x))) if make is PairCell else None
    layer = eq.nn.DEQ(make(), solver=solver, init=init).eval()
    batch, buffer = torch.export.Dim("batch", min=1, max=64), io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(4, D),), dynamic_shapes=(({0: batch},),))
        torch.export.save(program, buffer)
        buffer.seek(0)
        exported = torch.export.load(buffer).module()
        for size in (4, 1, 2, 33):
            x = torch.randn(size, D) * torch.logspace(-2, 1, size)[:, None]
            solution = layer.solve(x)
            torch.testing.assert_close(exported(x), solution.value, rtol=1e-6, atol=1e-6)
    # The last batch of 33: with a tolerance some samples have stopped and others have not.
    assert bool(solution.converged.any()) == (solver.rtol > 0)
    assert not bool(solution.converged.all())
