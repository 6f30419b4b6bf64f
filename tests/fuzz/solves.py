"""Random solves: no false CONVERGED, nearly all that is within the tolerance found, no row disturbed by another.

Usage: python -m tests.fuzz.solves [--cases 10000] [--seed 0]

Maps of spectral radius 0.1 to 1.5, normal and not, stiff, discontinuous; float64, float32, bfloat16; all solvers. Each
solve is judged by the map in the dtype of the solve at the returned value, with norms in float64.
"""

import argparse
import collections
import datetime
import json
import math
import pathlib
import random
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import equipoise as eq

KINDS = ("normal", "nonnormal", "stiff", "tanh", "discontinuous")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SOLVERS = (eq.Picard, eq.Anderson, eq.Broyden, eq.AdjointBroyden, eq.SteadyState, eq.GMRES, eq.CG, eq.LBFGS)


def jacobians(kind: str, rows: int, d: int, radius: float, rng: random.Random) -> Tensor:
    """Matrices `(rows, d, d)` of a spectral radius."""
    a = torch.randn(rows, d, d, dtype=torch.float64)
    if kind == "normal":
        q = torch.linalg.qr(a)[0]
        return radius * q @ torch.diag_embed(torch.rand(rows, d, dtype=torch.float64) * 2 - 1) @ q.mT
    if kind == "stiff":
        q = torch.linalg.qr(a)[0]
        values = -(10 ** (torch.rand(rows, d, dtype=torch.float64) * 3 - 1))
        return q @ torch.diag_embed(values) @ q.mT
    if kind == "nonnormal":
        a = a.triu() + (1 + rng.random()) * torch.randn(rows, d, d, dtype=torch.float64).triu(1)
    return radius * a / torch.linalg.eigvals(a).abs().amax(dim=1)[:, None, None].clamp_min(1e-3)


def case(number: int, seed: int = 0) -> dict[str, int]:
    """Run one solve and return counts: rows, converged, falsely so, within the tolerance, disturbed mates."""
    rng = random.Random(f"{seed}-{number}")
    torch.manual_seed(rng.randrange(2**31))
    kind, dtype, solver_class = rng.choice(KINDS), rng.choice(DTYPES), rng.choice(SOLVERS)
    rows, d = rng.choice([1, 3, 8, 16]), rng.choice([1, 2, 5, 16])
    affine = solver_class in (eq.GMRES, eq.CG)
    if affine or solver_class is eq.LBFGS:
        kind = rng.choice(KINDS[:3])
    a = jacobians(kind, rows, d, rng.uniform(0.1, 1.5), rng)
    if solver_class in (eq.CG, eq.LBFGS):
        a = (a + a.mT) / 2
    low = torch.finfo(dtype).eps
    rtol = max(10 ** rng.uniform(-9, -1), 2 * low)
    solver = solver_class(max_steps=rng.choice([5, 30, 120]), rtol=rtol, atol=rng.choice([0.0, 0.0, 10 * low]))
    a, x = a.to(dtype), torch.randn(rows, d, dtype=torch.float64).to(dtype)
    z0 = torch.randn(rows, d, dtype=torch.float64).to(dtype) if rng.random() < 0.5 else torch.zeros_like(x)
    seen: list[tuple[Tensor, Tensor]] = []

    def f(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
        moved = (a.double() * z.double()[:, None]).sum(dim=2) + x.double()
        if kind in ("tanh", "discontinuous"):
            moved = torch.tanh(moved)
        if kind == "discontinuous":
            moved = moved + 0.1 * torch.sign(z.double())
        fz = moved.to(z.dtype)
        seen.append((z.detach().double(), fz.detach().double()))
        return fz

    closure = rng.random() < 0.5

    def solve(x: Tensor) -> eq.Solution[Tensor]:
        seen.clear()
        if solver_class is eq.LBFGS:  # the objective whose gradient is z - f(z)

            def h(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
                return (0.5 * z * z - 0.5 * z * (a * z[:, None]).sum(dim=2) - z * x).sum(dim=1)

            wide = [t.double() if dtype == torch.bfloat16 else t for t in (z0, x, a)]
            m = eq.DescentMap(h, wide[0], wide[1:], params=())
            return solver.solve(m, m.pack(wide[0]))
        if closure:
            return eq.fixed_point(lambda z: f(z, x, a), z0, solver=solver)
        return eq.fixed_point(f, z0, x, a, params=(), solver=solver)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve(x)
        history = seen[: solution.num_evals]
        counts = {"rows": rows, "converged": int(solution.converged.sum())}
        if solver_class is eq.LBFGS:
            z = solution.value.double()
            fz = (a.double() * z[:, None]).sum(dim=2) + x.double()
            noise = 1e3 * torch.finfo(solution.value.dtype).eps * (fz.norm(dim=1) + z.norm(dim=1))
        else:
            z = solution.value.double()
            fz = f(solution.value, x, a).double()
            noise = 8 * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps * fz.norm(dim=1)
        allowed = solver.atol + solver.rtol * fz.norm(dim=1)
        counts["false"] = int(((fz - z).norm(dim=1) > allowed + noise)[solution.converged].sum())
        if closure and solver_class is not eq.LBFGS and history:
            met = within_rule(history, solver)
            counts |= {"within": int(met.sum()), "found": int((met & solution.converged).sum())}
        poisoned = x.clone()
        sick = rng.randrange(rows)
        poisoned[sick] = rng.choice([math.nan, math.inf])
        other = solve(poisoned)
        mates = torch.arange(rows) != sick
        counts["leaks"] = int((~other.value.isfinite()).any(dim=1)[mates].sum())
        counts["mates"] = int((other.status != solution.status)[mates].sum())
    return counts


def within_rule(history: list[tuple[Tensor, Tensor]], solver: eq.Solver) -> Tensor:
    """Return rows that met the documented rule of CONVERGED at one of the evaluated points."""
    z0, f0 = history[0]
    first = (f0 - z0).norm(dim=1)
    cap = 10 * torch.maximum(z0.norm(dim=1), f0.norm(dim=1))
    met = first <= solver.atol + solver.rtol * f0.norm(dim=1)
    for z, fz in history[1:]:
        size, image = (fz - z).norm(dim=1), fz.norm(dim=1)
        fell = (size <= first / 2) | (size <= solver.atol + solver.rtol * cap)
        met |= (size <= solver.atol + solver.rtol * image) & fell
    return met


def run(cases: int, seed: int = 0, each: Callable[[int, dict[str, int]], None] | None = None) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for number in range(cases):
        counts = case(number, seed)
        total.update(counts)
        if each is not None:
            each(number, counts)
    return dict(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    date = datetime.date.today().isoformat()
    result = {"date": date, "seed": options.seed, "cases": options.cases, "torch": torch.__version__}
    result |= run(options.cases, options.seed)
    path = pathlib.Path(__file__).with_name(f"solves-{date}-seed-{options.seed}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
