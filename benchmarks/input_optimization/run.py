"""What it takes to optimize the input of an equilibrium, to equal cost: jointly, or by gradient steps around solves.

    python -m benchmarks.input_optimization.run [--quick] [--problem NAME ...] [--again] --json FILE

    generative    latents of a decoder of digits, a fast layer
    adversarial   an L2 ball of radius 1 within [0, 1] around digits, a fast layer; the cost is a margin
    meta          contexts of sinusoids of which ten points are seen, ten states that share one input
    slow-layer    inputs of a layer without training, of spectral radius 0.95 or more at the solution

Layers are trained here, for less than a minute each. Cost is always that at the equilibrium solved for anew. Goal of a
method: the median of the samples has an excess of at most 1 % of what there is to gain from the start; the best known
cost of a sample is the least that long descents with many small steps found. Each method has the one step size that
serves it best on other samples; how many rounds it needs is then counted on the samples that are reported. `lost` is
the share of samples with an excess above 5 % after three times as many, most of them at other stationary points.

    joint, gauss-seidel, nested-K    `optimize_inputs` with `Joint()`, `GaussSeidel()`, `Nested(steps=K)`
    automatic                        `optimize_inputs` as it is: the step is measured, and the measuring is counted
    plain                            the same with `Picard()`, advised where answers lie on the border of a set
    R-cold-paper                     gradient descent, Adam or steps of fixed length (R: gd, adam, pgd), with 18 steps
                                     of Broyden's method forward and 18 backward, from zero, for each
    gd-cold-tolerance                the same by Anderson acceleration to a relative residual of 1e-3
    R-warm-K                         the same with K plain steps of state and adjoint that go on from those before, K
                                     evaluations and K + 1 products
    gd-merged-K                      that with the trick of `Nested`: the last pass backward gives two products, K in
                                     all; with K = 1 it is the plain joint iteration

    seconds               of processor time, median of runs that take turns, one thread
    evals, vjps           of the layer, for the whole batch, and products with its Jacobian
    speedup_over_cold     the time of the fastest R-cold-paper over that of the method
    ratio_to_best_warm    the time of the method over that of the fastest R-warm-K

null: the goal was not reached within 284 rounds (100 of `optimize_inputs` and of cold loops). With --problem, figures
of other problems that FILE holds are kept. With --again, methods are only timed, by the steps and rounds in FILE.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import equipoise as eq
from benchmarks.input_optimization import models
from benchmarks.input_optimization.methods import Cold, Loop, Method, Ours, Rule, Warm, Work
from benchmarks.input_optimization.models import Problem
from equipoise.inputs import GaussSeidel, Joint, Nested

WITHIN = 0.01  # excess of the median sample at the goal, relative to what there is to gain
LOST = 0.05  # excess of a sample that has ended elsewhere
GRID = sorted({round(1.2**i) for i in range(32)})  # numbers of rounds that are looked at, up to 284
LONGEST = 100  # rounds of `optimize_inputs`
TRAINED, TUNED, MEASURED, QUICK = slice(0, 1400), slice(1400, 1416), slice(1440, 1504), slice(1400, 1404)


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem, how its layer is trained, and where the search for step sizes begins."""

    make: Callable[[], Problem]
    loss: Callable[[Problem], tuple[Tensor, Tensor, Tensor]] | None = None
    steps: int = 0
    steady: float = 0.0
    guess: float = 0.1

    def build(self, quick: bool) -> Problem:
        problem = self.make()
        if self.loss is not None:
            models.train(problem.rows(TRAINED), self.loss, 10 if quick else self.steps, steady=self.steady)
        return problem.frozen()


TASKS = {
    "generative": Task(models.generative, models.jointly, 200, 4.0, 0.05),
    "adversarial": Task(models.adversarial, models.classified, 200, 20.0, 0.1),
    "meta": Task(models.meta, models.jointly, 120, 2.0, 0.03),
    "slow-layer": Task(models.slow, guess=2.0),
}


def methods(problem: Problem, quick: bool) -> dict[str, Method]:
    """All that are compared; what moves by gradients scaled to length one is for bounded inputs."""
    rules = [Rule(name="gd"), Rule(name="adam"), *([Rule(name="pgd")] if problem.radius is not None else [])]
    found: dict[str, Method] = {"joint": Ours(scheme=Joint()), "gauss-seidel": Ours(scheme=GaussSeidel())}
    found |= {f"nested-{k}": Ours(scheme=Nested(steps=k)) for k in ((2,) if quick else (2, 4, 8))}
    found["automatic"] = Ours(measured=True)
    if problem.radius is not None:
        found["plain"] = Ours(measured=True, solver=eq.Picard())
    for rule in rules[:1] if quick else rules:
        inner = (2,) if quick else (1, 2, 4, 8) if rule.name == "gd" else (2, 4, 8)
        found |= {f"{rule.name}-warm-{k}": Warm(rule=rule, steps=k) for k in inner}
        found[f"{rule.name}-cold-paper"] = Cold(rule=rule)
    found |= {f"gd-merged-{k}": Warm(rule=rules[0], steps=k, merged=True) for k in ((1,) if quick else (1, 2, 4, 8))}
    found["gd-cold-tolerance"] = Cold(rule=rules[0], rtol=1e-3)
    return found


@dataclasses.dataclass(frozen=True)
class Reach:
    """Rounds after which a method has met the goal, and its work until then."""

    rounds: int | None = None
    evals: int = 0
    vjps: int = 0

    @property
    def units(self) -> float:
        return math.inf if self.rounds is None else self.evals + 2 * self.vjps


class Judge:
    """What some samples have to gain, and how much of it is left.

    Args:
        problem: the samples.
        guess: a step for gradient descent; the best cost is found by it, a fourth and four times of it.
        rounds: of each of these descents, with eight steps of state and adjoint each.
    """

    def __init__(self, problem: Problem, guess: float, rounds: int) -> None:
        self.problem = problem
        self.start = problem.honest(problem.x0)
        best = self.start
        for step in (guess / 4, guess, 4 * guess):
            descent = Warm(rule=Rule(name="gd"), step=step, steps=8)
            best = torch.fmin(best, problem.honest(descent.run(problem, rounds).x))
        self.best = best

    def excess(self, x: Tensor) -> Tensor:
        """`(B,)` relative to what there is to gain; infinite if it is not finite."""
        left = (self.problem.honest(x) - self.best) / (self.start - self.best).clamp_min(1e-6)
        return torch.where(left.isfinite(), left, torch.inf)

    def met(self, x: Tensor) -> bool:
        return float(self.excess(x).median()) <= WITHIN

    def reach(self, method: Method, limit: float = math.inf) -> Reach:
        """The first number of rounds of the grid that meets the goal, if its units of work are below a limit."""
        for rounds, work in self._runs(method):
            if work.units >= limit:
                break
            if self.met(work.x):
                return Reach(rounds, work.evals, work.vjps)
        return Reach()

    def _runs(self, method: Method) -> Iterator[tuple[int, Work]]:
        if isinstance(method, Loop):
            most = GRID[-1] if isinstance(method, Warm) else LONGEST
            path = enumerate(itertools.islice(method.path(self.problem), most), 1)
            return ((rounds, work) for rounds, work in path if rounds in GRID)
        # The answer is not the last iterate but the best, so a longer run does not pass that of a shorter one.
        return ((rounds, method.run(self.problem, rounds)) for rounds in GRID if rounds <= LONGEST)


def tuned(method: Method, judge: Judge, guess: float) -> Method:
    """The method with the step of least work, found by doubling and halving."""
    best, found = Reach(), dataclasses.replace(method, step=guess)
    for factor in (2.0, 0.5):
        step, misses = guess if factor > 1 else guess / 2, 0
        while misses < 2 and guess / 100 < step < guess * 100:
            candidate = dataclasses.replace(method, step=step)
            reach = judge.reach(candidate, best.units)
            misses = 0 if reach.units < best.units else misses + 1
            if not misses:
                best, found = reach, candidate
            step *= factor
    return found


def compare(name: str, quick: bool) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Figures and details of one problem."""
    task = TASKS[name]
    began = time.process_time()
    problem = task.build(quick)
    trained = time.process_time() - began
    rows = problem.rows(QUICK if quick else TUNED), problem.rows(QUICK if quick else MEASURED)
    tuning, judge = (Judge(part, task.guess, 20 if quick else 250) for part in rows)
    chosen: dict[str, Method] = {}
    reached: dict[str, Reach] = {}
    details: dict[str, Any] = {}
    for label, method in methods(problem, quick).items():
        guess = task.guess
        if isinstance(method, Loop):
            # Solved for entirely, state and adjoint want about the same step as after eight steps of each.
            known = chosen.get(f"{method.rule.name}-warm-8")
            guess = known.step if known else {"adam": 0.1, "pgd": 0.3}.get(method.rule.name, guess)
        measured = isinstance(method, Ours) and method.measured
        chosen[label] = (
            method if measured else dataclasses.replace(method, step=guess) if quick else tuned(method, tuning, guess)
        )
        reached[label] = judge.reach(chosen[label])
        after = chosen[label].run(rows[1], 3 * (reached[label].rounds or 10)).x
        details[label] = {
            "step": None if measured else chosen[label].step,
            "rounds": reached[label].rounds,
            "lost": float((judge.excess(after) > LOST).double().mean()),
        }
        print(f"{time.strftime('%H:%M:%S')} {name}/{label}: {details[label]}", flush=True)
    figures = summary(name, reached, timed(chosen, reached, rows[1], 2 if quick else 3))
    radius = eq.nn.spectral_radius(rows[1].equilibrium(judge_best(rows[1], chosen, reached)))
    details["layer"] = {
        "spectral_radius_median": float(radius.median()),
        "training_seconds": trained,
        "samples": len(rows[1].z0),
        "start_cost": float(judge.start.mean()),
        "best_cost": float(judge.best.mean()),
    }
    return figures, details


def summary(name: str, reached: Mapping[str, Reach], seconds: Mapping[str, float]) -> dict[str, float | None]:
    """The figures of one problem."""
    figures: dict[str, float | None] = {}
    cold, warm = (
        min((s for label, s in seconds.items() if kind in label), default=None) for kind in ("-cold-paper", "-warm-")
    )
    for label, reach in reached.items():
        taken, got = seconds.get(label), reach.rounds is not None
        figures |= {
            f"{name}/{label}/seconds": taken,
            f"{name}/{label}/evals": reach.evals if got else None,
            f"{name}/{label}/vjps": reach.vjps if got else None,
            f"{name}/{label}/speedup_over_cold": cold / taken if taken and cold else None,
            f"{name}/{label}/ratio_to_best_warm": taken / warm if taken and warm else None,
        }
    return figures


def time_again(name: str, quick: bool, content: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of one problem with times taken anew."""
    problem = TASKS[name].build(quick)
    found = content["details"][name]
    chosen, reached = {}, {}
    for label, method in methods(problem, quick).items():
        step, rounds = found[label]["step"], found[label]["rounds"]
        chosen[label] = method if step is None else dataclasses.replace(method, step=step)
        counts = (content[f"{name}/{label}/{key}"] or 0 for key in ("evals", "vjps"))
        reached[label] = Reach(rounds, *counts)
    rows = problem.rows(QUICK if quick else MEASURED)
    return summary(name, reached, timed(chosen, reached, rows, 3 if quick else 7))


def judge_best(problem: Problem, chosen: Mapping[str, Method], reached: Mapping[str, Reach]) -> Tensor:
    """Inputs at which the layer is looked at: those of the first warm descent that met the goal."""
    label = next((key for key, reach in reached.items() if "-warm-" in key and reach.rounds), "joint")
    return chosen[label].run(problem, LONGEST).x


def timed(
    chosen: Mapping[str, Method], reached: Mapping[str, Reach], problem: Problem, repeats: int
) -> dict[str, float]:
    """Median processor time of each method until the goal; they take turns."""
    taken: dict[str, list[float]] = {label: [] for label, reach in reached.items() if reach.rounds is not None}
    for _ in range(repeats):
        for label, seconds in taken.items():
            start = time.process_time()
            chosen[label].run(problem, reached[label].rounds or 0)
            seconds.append(time.process_time() - start)
    return {label: statistics.median(seconds) for label, seconds in taken.items()}


def table(figures: Mapping[str, float | None], details: Mapping[str, Any]) -> str:
    """Markdown, a table for each problem."""
    lines = []
    for name, parts in details.items():
        layer = parts["layer"]
        lines += [
            f"## {name}",
            "",
            f"Spectral radius at the solution {layer['spectral_radius_median']:.2f} (median); mean cost "
            f"{layer['start_cost']:.3f} at the start, {layer['best_cost']:.3f} at best.",
            "",
            "| method | step | rounds | evals | vjps | ms | speedup over cold | ratio to best warm | lost |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for label, detail in parts.items():
            if label == "layer":
                continue
            keys = ("evals", "vjps", "seconds", "speedup_over_cold", "ratio_to_best_warm")
            evals, vjps, seconds, speedup, ratio = (figures[f"{name}/{label}/{key}"] for key in keys)
            cells = [detail["step"], detail["rounds"], evals, vjps, seconds and 1000 * seconds, speedup, ratio]
            shown = ["-" if cell is None else f"{cell:.3g}" for cell in cells]
            lines.append("| " + " | ".join([label, *shown, f"{detail['lost']:.0%}"]) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="hardly trained layers, few methods, two repeats")
    parser.add_argument("--problem", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--again", action="store_true", help="take steps and rounds from FILE, and time them anew")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    before: dict[str, Any] = {"minutes": 0.0, "details": {}}
    if args.json.exists():
        before = json.loads(args.json.read_text())
    figures: dict[str, float | None] = {key: value for key, value in before.items() if key.count("/") == 2}
    details: dict[str, Any] = before["details"]
    for name in args.problem:
        if args.again:
            found = time_again(name, args.quick, before)
        else:
            found, details[name] = compare(name, args.quick)
        figures = {key: value for key, value in figures.items() if not key.startswith(f"{name}/")} | found
        settings = {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": before["minutes"] + (time.time() - began) / 60,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "torch": torch.__version__,
            "equipoise": eq.__version__,
        }
        args.json.write_text(json.dumps({**settings, **figures, "details": details}, indent=1) + "\n")
    text = table(figures, details)
    args.json.with_suffix(".md").write_text(f"# Input optimization to equal cost\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
