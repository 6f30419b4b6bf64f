"""Work and time to optimize the input of an equilibrium to equal cost: jointly, or by gradient steps around solves.

    python -m benchmarks input_optimization [--quick] [--problem NAME ...] [--again]

Claim of the paper (Gurumurthy, Bai, Manchester and Kolter 2021): joint optimization is several times faster than
gradient steps around solves from zero.
Evidence: `results/2026-11-26.json`: 64 samples of each problem, medians of 7 runs, one thread of x86-64, torch 2.13.0.
By default 7.0 and 12.3 times faster on `generative` and `meta`, 2.3 times on `adversarial`.

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
    automatic                        `optimize_inputs` by default: the step is measured, and the cost of that is counted
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

null: the goal was not reached within 284 rounds (100 of `optimize_inputs` and of cold loops). `--resume --again` times
the methods anew, by the steps and rounds in FILE.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.input_optimization import models
from benchmarks.input_optimization.methods import Cold, Loop, Method, Ours, Rule, Warm, Work
from benchmarks.input_optimization.models import Problem
from benchmarks.input_optimization.report import summary, table
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

    @functools.cache  # noqa: B019
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
    """Gains that are possible on some samples, and the part of them that an input leaves.

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


def compare(name: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Step, rounds and work of each method to the goal, share of samples that it loses, and facts of the layer."""
    task = TASKS[name]
    began = harness.clock()
    problem = task.build(quick)
    trained = harness.clock() - began
    rows = problem.rows(QUICK if quick else TUNED), problem.rows(QUICK if quick else MEASURED)
    tuning, judge = (Judge(part, task.guess, 20 if quick else 250) for part in rows)
    chosen: dict[str, Method] = {}
    details: dict[str, dict[str, Any]] = {}
    for label, method in methods(problem, quick).items():
        guess = task.guess
        if isinstance(method, Loop):
            # Solved for entirely, state and adjoint want about the same step as after eight steps of each.
            known = chosen.get(f"{method.rule.name}-warm-8")
            guess = known.step if known else {"adam": 0.1, "pgd": 0.3}.get(method.rule.name, guess)
        measured = isinstance(method, Ours) and method.measured
        if not measured:
            method = dataclasses.replace(method, step=guess) if quick else tuned(method, tuning, guess)
        reach, chosen[label] = judge.reach(method), method
        after = method.run(rows[1], 3 * (reach.rounds or 10)).x
        details[label] = {
            "step": None if measured else method.step,
            "rounds": reach.rounds,
            "evals": None if reach.rounds is None else reach.evals,
            "vjps": None if reach.rounds is None else reach.vjps,
            "lost": float((judge.excess(after) > LOST).double().mean()),
        }
    # The layer is measured at the inputs of the first warm descent that reaches the goal.
    best = next((key for key in chosen if "-warm-" in key and details[key]["rounds"]), "joint")
    solution = rows[1].equilibrium(chosen[best].run(rows[1], LONGEST).x)
    details["layer"] = {
        "spectral_radius_median": float(eq.nn.spectral_radius(solution).median()),
        "training_seconds": trained,
        "samples": len(rows[1].z0),
        "start_cost": float(judge.start.mean()),
        "best_cost": float(judge.best.mean()),
    }
    return details


def times(name: str, quick: bool, details: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Median processor time of each method until the goal; they take turns."""
    problem = TASKS[name].build(quick)
    rows = problem.rows(QUICK if quick else MEASURED)
    seconds: dict[str, list[float]] = {}
    for _, (label, method) in itertools.product(range(2 if quick else 7), methods(problem, quick).items()):
        step, rounds = details[label]["step"], details[label]["rounds"]
        if rounds is not None:
            start = harness.clock()
            (method if step is None else dataclasses.replace(method, step=step)).run(rows, rounds)
            seconds.setdefault(label, []).append(harness.clock() - start)
    return {label: statistics.median(found) for label, found in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="hardly trained layers, few methods, two repeats",
        options={
            "--problem": {"nargs": "+", "choices": TASKS, "default": list(TASKS)},
            "--again": {"action": "store_true", "help": "with --resume: time anew the methods in FILE"},
        },
        free=["problem", "again"],
        summary=summary,
    )
    quick = record.args.quick
    if record.args.again:
        record.content["times"] = {}
    for name in record.args.problem:
        details = record.measure(functools.partial(compare, name, quick), "details", name)
        record.measure(functools.partial(times, name, quick, details), "times", name)
    record.finish(table)
