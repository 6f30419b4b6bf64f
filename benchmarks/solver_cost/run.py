"""Time of a solve beside the bare evaluations that it makes, and beside torchdeq 0.1.0.

    python -m benchmarks solver_cost [--quick] [--device cpu|cuda]

Claim: a solve costs hardly more than its evaluations: 1.1 to 2.2 times as much on one CPU thread.
Evidence: `results/2026-11-24-cpu-1-thread.json`, `-2-threads.json` (x86-64, torch 2.13.0), `2026-11-26-h200.json`
(NVIDIA H200, torch 2.11.0); one process each, 15 repeats. On the H200, these cells are too small, and the claim fails.

Three cells (`cells`), float32, eager, relative residual 1e-4 for every sample. All calls run in one process, in turn
with the bare calls that they are compared with; figures are medians of paired ratios.

    forward_ratio   time of the solve / (calls of f x time of one bare f)
    evals           calls of f until every sample meets the tolerance
    seconds         time of the solve, or of the backward pass
    peak_states     most memory alive at once beyond the caller's tensors and f's own, in copies of the state
    backward_ratio  implicit: time of backward / (VJPs x one bare VJP into the state on a kept graph); the
                    evaluations of f in backward are part of the time, and so is the cost by which the last product,
                    into inputs and parameters, exceeds the others.
                    shine, jacobian-free: time of backward / one whole VJP: f with graph, then the product into state,
                    inputs and parameters
    cosine          of the gradient of inputs and parameters with the exact one (float64, residual 1e-10)

torchdeq is run in the configuration of each of its solvers that was fastest here: its defaults, and for Anderson also
with a ridge of 1e-8 and the memory of ours.
"""

import dataclasses
import functools
import statistics
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import equipoise as eq
from benchmarks import harness
from benchmarks.solver_cost.cells import CELLS, problem
from benchmarks.solver_cost.report import table
from benchmarks.solver_cost.rivals import RIVALS, CountedVjp, Rival

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
FORWARD = ("forward_ratio", "evals", "seconds", "peak_states")
Call = Callable[[], Any]


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else list(tree)


def like(tree: Any, make: Callable[[Tensor], Tensor]) -> Any:
    return make(tree) if isinstance(tree, Tensor) else type(tree)(make(t) for t in tree)


def tracked(tree: Any) -> Any:
    return like(tree, lambda t: t.detach().requires_grad_())


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    x, y = (torch.cat([t.flatten().double().cpu() for t in side]) for side in zip(*pairs, strict=True))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def paired(first: Call, second: Call, repeats: int, device: str) -> tuple[float, float]:
    """Median ratio of the times of two calls made in turn, and median time of the first."""
    first(), second()
    times: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(repeats):
        for name, call in (("first", first), ("second", second)):
            start = harness.clock(device)
            call()
            times[name].append(harness.clock(device) - start)
    return harness.median_ratio(times["first"], times["second"]), statistics.median(times["first"])


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


class Bench:
    """A cell with its injection and start on a device, and all that methods are compared with.

    Args:
        name: of the cell.
        device: of all tensors.
        repeats: of each timing.
    """

    def __init__(self, name: str, device: str, repeats: int) -> None:
        self.paired = functools.partial(paired, repeats=repeats, device=device)
        self.cell, self.u, self.z0 = self._problem(name, device, torch.float32)
        torch.manual_seed(1)
        self.targets = [torch.randn_like(t) for t in leaves(self.z0)]
        cell, u, z0 = self._problem(name, device, torch.float64)
        u, solver = tracked(u), eq.Anderson(max_steps=400, rtol=1e-10)
        solution = eq.fixed_point(cell, z0, u, solver=solver, gradient=eq.Implicit(solver=solver))
        self.exact = torch.autograd.grad(
            self._loss(solution.raise_for_status().value),
            [*leaves(u), *cell.parameters()],
            allow_unused=True,
            materialize_grads=True,
        )

    @staticmethod
    def _problem(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
        cell, x, z0 = problem(name)
        cell = cell.to(device, dtype)
        with torch.no_grad():
            u = cell.inject(x.to(device, dtype))  # type: ignore[operator]
        return cell, u, like(z0, lambda t: t.to(device, dtype))

    def _loss(self, value: Any) -> Tensor:
        return sum((z * t.to(z)).sum() for z, t in zip(leaves(value), self.targets, strict=True))  # type: ignore[return-value]

    def _peak_states(self, solve: Callable[..., Any]) -> float:
        """Peak memory of a solve in copies of the state: less the inner tensors of `f`, with its output."""
        mode = LiveMemory()

        def f(z: Any, *inputs: Any) -> Any:
            with _disable_current_modes():
                out = self.cell(z, *inputs)
            for t in leaves(out):
                mode.add(t)
            return out

        with mode:
            solve(f)
        return mode.peak / sum(t.numel() * t.element_size() for t in leaves(self.z0))

    def _evaluations(self, count: int) -> Call:
        """`count` bare evaluations."""
        z = like(self.z0, torch.randn_like)

        def run() -> None:
            for _ in range(count):
                self.cell(z, self.u)

        return run

    def _products(self, count: int) -> Call:
        """`count` products into the state on one kept graph."""
        z = tracked(self.z0)
        kept = leaves(self.cell(z, self.u))

        def run() -> None:
            for _ in range(count):
                torch.autograd.grad(kept, leaves(z), self.targets, retain_graph=True)

        return run

    def _whole_product(self, wanted: list[Tensor]) -> Call:
        """One evaluation with graph, and its product into state, inputs and parameters."""
        z = tracked(self.z0)
        inputs = [*leaves(z), *wanted]
        return lambda: torch.autograd.grad(leaves(self.cell(z, self.u)), inputs, self.targets, allow_unused=True)

    @torch.no_grad()
    def _forward(self, solve: Callable[..., Any], evals: int) -> dict[str, float | None]:
        ratio, seconds = self.paired(solve, self._evaluations(evals))
        return dict(zip(FORWARD, (ratio, evals, seconds, self._peak_states(solve)), strict=True))

    def _backward(self, value: Any, wanted: list[Tensor], bare: Callable[[], Call]) -> dict[str, float]:
        """Figures of a backward pass; `bare` is asked after the first for the calls that it is compared with."""
        loss = self._loss(value)
        backward = functools.partial(torch.autograd.grad, loss, wanted, retain_graph=True, allow_unused=True)
        grads = backward()
        ratio, seconds = self.paired(backward, bare())
        return {"backward_ratio": ratio, "seconds": seconds, "cosine": cosine(grads, self.exact)}

    def solve(self, f: Callable[..., Any], solver: eq.Solver) -> eq.Solution:
        return eq.fixed_point(f, self.z0, self.u, solver=solver, params=())

    @torch.no_grad()
    def forward(self, solver: eq.Solver) -> dict[str, float | None]:
        """Figures of one of our solvers; None if a sample does not converge."""
        solution = self.solve(self.cell, solver)
        if not bool(solution.converged.all()):
            return dict.fromkeys(FORWARD)
        return self._forward(lambda f=self.cell: self.solve(f, solver), solution.num_evals)

    def backward(self, gradient: eq.Gradient) -> dict[str, float]:
        """Figures of one of our gradients."""
        self.u = tracked(self.u)
        wanted = [*leaves(self.u), *self.cell.parameters()]
        if isinstance(gradient, eq.Implicit):
            reports: list[eq.Solution] = []
            gradient = dataclasses.replace(gradient, observe=reports.append)
            bare = lambda: self._products(reports[0].num_vjps + 1)  # noqa: E731
        else:
            bare = lambda: self._whole_product(wanted)  # noqa: E731
        solution = eq.fixed_point(self.cell, self.z0, self.u, solver=SOLVERS["broyden"], gradient=gradient)
        return self._backward(solution.value, wanted, bare)

    def rival(self, configurations: list[Rival]) -> dict[str, float | None]:
        """Figures of torchdeq at the same residual, in the fastest of its configurations that reach it."""
        best: dict[str, float | None] = dict.fromkeys((*FORWARD, "backward_ratio", "cosine"))
        for rival in configurations:
            call = functools.partial(rival.solve, z0=self.z0, u=self.u, rtol=RTOL)
            with torch.no_grad():
                if self._residual(call(self.cell)) > 1.01 * RTOL:
                    continue
                rival.calls = 0
                call(self.cell)
            found = self._forward(lambda f=self.cell, call=call: call(f), rival.calls)
            if best["seconds"] is None or (found["seconds"] or 0.0) < best["seconds"]:
                best |= {**self._rival_backward(rival), **found}
        return best

    def _rival_backward(self, rival: Rival) -> dict[str, float]:
        self.u = tracked(self.u)

        def counted(z: Any, u: Any) -> Any:
            first, *rest = leaves(self.cell(z, u))
            out = [CountedVjp.apply(first), *rest]
            return out[0] if isinstance(z, Tensor) else tuple(out)

        value, CountedVjp.count = rival.solve(counted, self.z0, self.u, RTOL, grad=True), 0
        wanted = [*leaves(self.u), *self.cell.parameters()]
        return self._backward(value, wanted, lambda: self._products(CountedVjp.count))

    def _residual(self, z: Any) -> float:
        fz, flat = (torch.cat([t.flatten(1) for t in leaves(tree)], 1) for tree in (self.cell(z, self.u), z))
        return float(((fz - flat).norm(dim=1) / fz.norm(dim=1)).max())

    @torch.no_grad()
    def fastest_ratio(self, found: dict[str, dict[str, float | None]]) -> float:
        """Time of our fastest solve over that of torchdeq's fastest, run in turn."""

        def fastest(names: Iterable[str]) -> str:
            return min(names, key=lambda method: found[method]["seconds"] or float("inf"))

        ours = functools.partial(self.solve, self.cell, SOLVERS[fastest(SOLVERS)])
        theirs = [functools.partial(r.solve, self.cell, self.z0, self.u, RTOL) for r in RIVALS[fastest(RIVALS)]]
        return max(self.paired(ours, rival)[0] for rival in theirs)


@torch.no_grad()
def mixed_batch(device: str) -> dict[str, float]:
    """A batch in which half the samples need a fraction of the steps of the others, with and without leaving."""
    torch.manual_seed(0)
    d, b = 512, 64
    weight = torch.linalg.qr(torch.randn(d, d))[0].to(device)
    rate = torch.where(torch.arange(b, device=device) % 2 == 0, 0.05, 0.9)[:, None]
    x = torch.randn(b, d, device=device)
    z0, rows = torch.zeros_like(x), [0]

    def f(z: Tensor, rate: Tensor, x: Tensor) -> Tensor:
        rows[-1] += z.shape[0]
        return rate * torch.tanh(z @ weight) + x

    def leaving() -> eq.Solution:
        return eq.fixed_point(f, z0, rate, x, solver=SOLVERS["picard"], params=())

    def staying() -> eq.Solution:
        return eq.fixed_point(lambda z: f(z, rate, x), z0, solver=SOLVERS["picard"])

    steps = leaving().num_steps.double()
    rows.append(0)
    staying()
    return {
        "easy_steps": float(steps[::2].mean()),
        "hard_steps": float(steps[1::2].mean()),
        "row_evaluations_ratio": rows[0] / rows[1],
        "time_ratio": paired(leaving, staying, 15, device)[0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="three repeats instead of fifteen, and the dense cell only",
        options=harness.DEVICE,
        packages=["torchdeq"],
        summary=lambda content: (harness.flatten(content.get("runs", {})), {}),
    )
    quick, device = record.args.quick, record.args.device
    for name in ["tanh"] if quick else CELLS:
        bench = Bench(name, device, 3 if quick else 15)
        jobs: dict[str, Call] = {
            **{method: functools.partial(bench.forward, solver) for method, solver in SOLVERS.items()},
            **{method: functools.partial(bench.backward, gradient) for method, gradient in GRADIENTS.items()},
            **{method: functools.partial(bench.rival, rivals) for method, rivals in RIVALS.items()},
        }
        found = {method: record.measure(call, "runs", name, method) for method, call in jobs.items()}
        record.measure(functools.partial(bench.fastest_ratio, found), "runs", name, "time_ratio_to_fastest_rival")
    record.measure(functools.partial(mixed_batch, device), "runs", "mixed")
    record.finish(table)
