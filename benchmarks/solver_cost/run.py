"""What a solve costs beside the bare evaluations it makes, and beside torchdeq 0.1.0.

    python -m benchmarks.solver_cost.run [--quick] [--device cpu|cuda] [--threads N] --json FILE

Three cells (cells.py), float32, eager, relative residual 1e-4 for every sample. All calls run in one process,
interleaved with the bare calls they are compared with; figures are medians of paired ratios.

    forward_ratio   time of the solve / (calls of f x time of one bare f)
    evals           calls of f until every sample meets the tolerance
    seconds         time of the solve
    peak_states     most memory alive at once beyond the caller's tensors and f's own, in copies of the state
    backward_ratio  implicit: time of backward / (VJPs x one bare VJP into the state on a kept graph); the
                    evaluations of f in backward are part of the time, and so is what the last product, into inputs
                    and parameters, costs more than the others.
                    shine, jacobian-free: time of backward / one whole VJP: f with graph, then the product into state,
                    inputs and parameters
    cosine          of the gradient of inputs and parameters with the exact one (float64, residual 1e-10)

torchdeq is run in the configuration of each of its solvers that was fastest here: its defaults, and for Anderson also
with a ridge of 1e-8 and the memory of ours.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import pathlib
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torchdeq
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import equipoise as eq
from benchmarks.solver_cost.cells import CELLS

RTOL = 1e-4
SOLVERS: dict[str, eq.Solver] = {
    "picard": eq.Picard(max_steps=100, rtol=RTOL),
    "anderson": eq.Anderson(max_steps=100, rtol=RTOL, memory=5),
    "broyden": eq.Broyden(max_steps=100, rtol=RTOL, memory=18),
}
GRADIENTS: dict[str, eq.Gradient] = {
    "implicit": eq.Implicit(solver=eq.Anderson(max_steps=100, rtol=RTOL)),
    "implicit-picard": eq.Implicit(solver=eq.Picard(max_steps=200, rtol=RTOL)),
    "shine": eq.Shine(fallback_ratio=float("inf")),
    "jacobian-free": eq.JacobianFree(),
}


@dataclasses.dataclass
class Problem:
    """A cell with its injection and start on a device."""

    cell: nn.Module
    u: Any
    z0: Any

    def f(self, z: Any) -> Any:
        with torch.no_grad():
            return self.cell(z, self.u)


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else list(tree)


def like(tree: Any, make: Callable[[Tensor], Tensor]) -> Any:
    return make(tree) if isinstance(tree, Tensor) else type(tree)(make(t) for t in tree)


def problem(name: str, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    cell, x, z0 = CELLS[name]()
    cell, x, z0 = cell.to(device, dtype), x.to(device, dtype), like(z0, lambda t: t.to(device, dtype))
    with torch.no_grad():
        u = cell.inject(x)  # type: ignore[operator]
    return Problem(cell, u, z0)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], Any], device: str) -> float:
    start = clock(device)
    call()
    return clock(device) - start


def paired(first: Callable[[], Any], second: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """Median ratio of the times of two calls made in turn, and median time of the first."""
    first(), second()
    times = [(seconds(first, device), seconds(second, device)) for _ in range(repeats)]
    return statistics.median(a / b for a, b in times), statistics.median(a for a, _ in times)


class LiveMemory(TorchDispatchMode):
    """Bytes of tensors created under this mode and alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.add(t)
        return out

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, storage._cdata, size)

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_states(p: Problem, solve: Callable[[Callable[..., Any]], Any]) -> float:
    """Peak memory of a solve in copies of the state; what f allocates inside is its own, what it returns counts."""
    mode = LiveMemory()

    def f(z: Any, *inputs: Any) -> Any:
        with _disable_current_modes():
            out = p.cell(z, *(inputs or (p.u,)))
        for t in leaves(out):
            mode.add(t)
        return out

    with torch.no_grad(), mode:
        solve(f)
    return mode.peak / sum(t.numel() * t.element_size() for t in leaves(p.z0))


def bare_calls(p: Problem, count: int) -> Callable[[], None]:
    z = like(p.z0, torch.randn_like)

    def run() -> None:
        with torch.no_grad():
            for _ in range(count):
                p.cell(z, p.u)

    return run


def forward_figures(p: Problem, solver: eq.Solver, repeats: int, device: str) -> dict[str, float | None]:
    def solve(f: Callable[..., Any] = p.cell) -> eq.Solution:
        return eq.fixed_point(f, p.z0, p.u, solver=solver, params=())

    with torch.no_grad():
        solution = solve()
        if not bool(solution.converged.all()):
            return dict.fromkeys(("forward_ratio", "evals", "seconds", "peak_states"))
        ratio, time_ = paired(solve, bare_calls(p, solution.num_evals), repeats, device)
    return {
        "forward_ratio": ratio,
        "evals": solution.num_evals,
        "seconds": time_,
        "peak_states": peak_states(p, solve),
    }


def tracked(p: Problem) -> tuple[Problem, list[Tensor]]:
    """The same problem with injections that want gradients, and all that gets one."""
    u = like(p.u, lambda t: t.detach().requires_grad_())
    return Problem(p.cell, u, p.z0), [*leaves(u), *p.cell.parameters()]


def loss_of(value: Any, targets: list[Tensor]) -> Tensor:
    return sum((z * t.to(z)).sum() for z, t in zip(leaves(value), targets, strict=True))  # type: ignore[return-value]


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    x, y = (torch.cat([t.flatten().double().cpu() for t in side]) for side in zip(*pairs, strict=True))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def exact_gradient(name: str, device: str, targets: list[Tensor]) -> list[Tensor]:
    p, wanted = tracked(problem(name, device, torch.float64))
    solver = eq.Anderson(max_steps=400, rtol=1e-10)
    solution = eq.fixed_point(p.cell, p.z0, p.u, solver=solver, gradient=eq.Implicit(solver=solver))
    grads = torch.autograd.grad(
        loss_of(solution.raise_for_status().value, targets), wanted, allow_unused=True, materialize_grads=True
    )
    return list(grads)


def backward_figures(
    p: Problem, gradient: eq.Gradient, exact: list[Tensor], targets: list[Tensor], repeats: int, device: str
) -> dict[str, float]:
    p, wanted = tracked(p)
    reports: list[eq.Solution] = []
    implicit = isinstance(gradient, eq.Implicit)
    if isinstance(gradient, eq.Implicit):
        gradient = dataclasses.replace(gradient, observe=reports.append)
    loss = loss_of(eq.fixed_point(p.cell, p.z0, p.u, solver=SOLVERS["broyden"], gradient=gradient).value, targets)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)

    grads = backward()
    z = like(p.z0, lambda t: t.detach().requires_grad_())
    cotangents = [t.to(z0) for t, z0 in zip(targets, leaves(p.z0), strict=True)]

    def whole() -> None:
        torch.autograd.grad(leaves(p.cell(z, p.u)), [*leaves(z), *wanted], cotangents, allow_unused=True)

    bare = bare_vjps(p, reports[0].num_vjps + 1, targets) if implicit else whole
    ratio, time_ = paired(backward, bare, repeats, device)
    return {"backward_ratio": ratio, "seconds": time_, "cosine": cosine(list(grads), list(exact))}


class CountedVjp(torch.autograd.Function):
    """The identity; counts the products that pass backward through it."""

    count = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        CountedVjp.count += 1
        return g


@dataclasses.dataclass
class Rival:
    """torchdeq with one of its solvers on a problem; `calls` counts evaluations of f."""

    solver: str
    options: dict[str, Any]
    calls: int = 0

    def solve(self, p: Problem, cell: Callable[..., Any] | None = None, *, grad: bool = False) -> Any:
        deq = torchdeq.get_deq(
            f_solver=self.solver, f_max_iter=100, f_tol=RTOL, f_stop_mode="rel", b_solver="anderson", b_max_iter=100,
            b_tol=RTOL, b_stop_mode="rel", ift=True,
        )  # fmt: skip
        f = cell or p.cell

        def call(*z: Tensor) -> Any:
            self.calls += 1
            out = f(z[0] if len(z) == 1 else z, p.u)
            return out if isinstance(out, Tensor) else list(out)

        deq.train(grad)
        out, _ = deq(call, p.z0 if isinstance(p.z0, Tensor) else list(p.z0), solver_kwargs=dict(self.options))
        return out[-1] if isinstance(out[-1], Tensor) else tuple(out[-1])


RIVALS = {
    "torchdeq-picard": [Rival("fixed_point_iter", {})],
    "torchdeq-anderson": [Rival("anderson", {}), Rival("anderson", {"m": 5, "lam": 1e-8})],
    "torchdeq-broyden": [Rival("broyden", {})],
}


def rival_figures(
    rivals: list[Rival], p: Problem, exact: list[Tensor], targets: list[Tensor], repeats: int, device: str
) -> dict[str, float | None]:
    """torchdeq at the same residual, in the fastest of its configurations that reach it."""
    best: dict[str, float | None] = dict.fromkeys(
        ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine")
    )
    for rival in rivals:
        with torch.no_grad():
            if max_residual(p, rival.solve(p)) > 1.01 * RTOL:
                continue
            rival.calls = 0
            rival.solve(p)
            evals = rival.calls
            ratio, time_ = paired(functools.partial(rival.solve, p), bare_calls(p, evals), repeats, device)
        if best["seconds"] is not None and time_ >= best["seconds"]:
            continue
        best |= {"forward_ratio": ratio, "evals": evals, "seconds": time_}
        best["peak_states"] = peak_states(p, functools.partial(rival.solve, p))
        best |= rival_backward(rival, p, exact, targets, repeats, device)
    return best


def rival_backward(
    rival: Rival, p: Problem, exact: list[Tensor], targets: list[Tensor], repeats: int, device: str
) -> dict[str, float]:
    p, wanted = tracked(p)

    def counted(z: Any, u: Any) -> Any:
        first, *rest = leaves(p.cell(z, u))
        out = [CountedVjp.apply(first), *rest]
        return out[0] if isinstance(z, Tensor) else tuple(out)

    loss = loss_of(rival.solve(p, counted, grad=True), targets)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)

    CountedVjp.count = 0
    grads = backward()
    ratio, _ = paired(backward, bare_vjps(p, CountedVjp.count, targets), repeats, device)
    return {"backward_ratio": ratio, "cosine": cosine(list(grads), exact)}


def bare_vjps(p: Problem, count: int, targets: list[Tensor]) -> Callable[[], None]:
    """`count` products into the state on one kept graph."""
    z = like(p.z0, lambda t: t.detach().requires_grad_())
    cotangents = [t.to(z0) for t, z0 in zip(targets, leaves(p.z0), strict=True)]
    kept = leaves(p.cell(z, p.u))

    def run() -> None:
        for _ in range(count):
            torch.autograd.grad(kept, leaves(z), cotangents, retain_graph=True)

    return run


def rival_ratio(p: Problem, figures: dict[str, float | None], name: str, repeats: int, device: str) -> float:
    """Time of our fastest solve over that of torchdeq's fastest, run in turn."""

    def fastest(names: Iterable[str]) -> str:
        return min(names, key=lambda method: figures[f"{name}/{method}/seconds"] or float("inf"))

    ours = SOLVERS[fastest(SOLVERS)]
    with torch.no_grad():
        return max(
            paired(
                lambda: eq.fixed_point(p.cell, p.z0, p.u, solver=ours, params=()),
                functools.partial(rival.solve, p),
                repeats,
                device,
            )[0]
            for rival in RIVALS[fastest(RIVALS)]
        )


def max_residual(p: Problem, value: Any) -> float:
    with torch.no_grad():
        z = value if isinstance(value, Tensor) else tuple(value)
        fz = torch.cat([t.flatten(1) for t in leaves(p.f(z))], 1)
        flat = torch.cat([t.flatten(1) for t in leaves(z)], 1)
        return float(((fz - flat).norm(dim=1) / fz.norm(dim=1)).max())


def mixed_batch(device: str) -> dict[str, float]:
    """A batch in which half the samples need a fraction of the steps of the others, with and without leaving."""
    torch.manual_seed(0)
    d, b = 512, 64
    weight = torch.linalg.qr(torch.randn(d, d))[0].to(device)
    rate = torch.where(torch.arange(b, device=device) % 2 == 0, 0.05, 0.9)[:, None]
    x = torch.randn(b, d, device=device)
    rows_seen = 0

    def f(z: Tensor, rate: Tensor, x: Tensor) -> Tensor:
        nonlocal rows_seen
        rows_seen += z.shape[0]
        return rate * torch.tanh(z @ weight) + x

    def solve(named: bool) -> eq.Solution:
        z0 = torch.zeros_like(x)
        if named:
            return eq.fixed_point(f, z0, rate, x, solver=SOLVERS["picard"], params=())
        return eq.fixed_point(lambda z: f(z, rate, x), z0, solver=SOLVERS["picard"])

    with torch.no_grad():
        solution = solve(True)
        rows_seen = 0
        solve(True)
        leaving = rows_seen
        rows_seen = 0
        solve(False)
        staying = rows_seen
        ratio, _ = paired(lambda: solve(True), lambda: solve(False), 15, device)
    steps = solution.num_steps.double()
    return {
        "mixed/easy_steps": float(steps[::2].mean()),
        "mixed/hard_steps": float(steps[1::2].mean()),
        "mixed/row_evaluations_ratio": leaving / staying,
        "mixed/time_ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="three repeats instead of fifteen, and the dense cell only"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repeats = 3 if args.quick else 15
    figures: dict[str, float | None] = {}
    for name in ["tanh"] if args.quick else CELLS:
        p = problem(name, args.device)
        torch.manual_seed(1)
        targets = [torch.randn_like(t) for t in leaves(p.z0)]
        exact = exact_gradient(name, args.device, targets)
        for solver_name, solver in SOLVERS.items():
            rows = forward_figures(p, solver, repeats, args.device)
            figures |= {f"{name}/{solver_name}/{key}": value for key, value in rows.items()}
        for gradient_name, gradient in GRADIENTS.items():
            costs = backward_figures(copy.copy(p), gradient, exact, targets, repeats, args.device)
            figures |= {f"{name}/{gradient_name}/{key}": value for key, value in costs.items()}
        for rival, configurations in RIVALS.items():
            rows = rival_figures(configurations, p, exact, targets, repeats, args.device)
            figures |= {f"{name}/{rival}/{key}": value for key, value in rows.items()}
        figures[f"{name}/time_ratio_to_fastest_rival"] = rival_ratio(p, figures, name, repeats, args.device)
    figures |= mixed_batch(args.device)
    print(table(figures))
    settings = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": args.threads,
        "repeats": repeats,
        "torch": torch.__version__,
        "torchdeq": "0.1.0",
        "equipoise": eq.__version__,
    }
    args.json.write_text(json.dumps({**settings, **figures}, indent=1) + "\n")


def table(figures: dict[str, float | None]) -> str:
    columns = ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine")
    lines = ["".join(f"{head:>16}" for head in ("cell", "method", *columns))]
    for key in dict.fromkeys(key.rsplit("/", 1)[0] for key in figures if key.count("/") == 2):
        cells = []
        for column in columns:
            value = figures.get(f"{key}/{column}")
            cells.append("" if value is None else f"{value:.4g}")
        lines.append("".join(f"{text:>18}" for text in (*key.split("/"), *cells)))
    lines += [f"{key}: {value:.3g}" for key, value in figures.items() if key.count("/") == 1 and value is not None]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
