"""How fast penalties are tuned: SHINE against HOAG, searches, scikit-learn and Optuna.

    python -m benchmarks.bilevel.run [--quick] [--workers N] --json FILE [--plot PNG]

Logistic regression on 90 % of the rows, sum of losses plus 0.5 exp(l) |z|^2, no intercept; l within [-12, 12] is chosen
by the loss on 5 %, the other 5 % are the test. Starts: z0 ~ N(0, I), l = 0. Five splits, seeds 0 to 4; float64, one
thread a process. wordnet-45 is multinomial with one penalty for each of 45 classes, on 3,000 rows drawn with seed 0
and the words that occur in three of them or more. All methods of a seed run in one process, one after the other, the
first one changing from seed to seed.

    seconds_to_1pct      until a held-out loss within 1 % of the best that any method found on that seed
    grad_evals_to_1pct   the same in gradients of the inner problem; a product with its Hessian counts two
    final_loss           held-out loss of the model returned
    solved_loss          held-out loss at the penalties returned, with the inner problem solved to 1e-5 afterwards
    test_loss            of the model returned

Medians over the seeds; null: not reached on most. All are read off models that the method had in hand: the inner
problem is solved to the tolerance of the method, not beyond.

Methods, with L-BFGS for the inner problem and the tolerances and memories of the paper (1e-3, times 0.78 a step, for
SHINE and its like, times 0.9 for HOAG):

    shine            H g, 30 pairs                          hoag           CG to the tolerance of the step, 10 pairs,
    shine-opa        the same, 60 pairs, a probe of the                    from the last adjoint vector
                     outer gradient each 5 steps            hoag-limited   CG of at most 5 steps
    shine-refine     H g, then CG, at most 5 steps          jacobian-free  g
    grid             10 values of one l, 10 pairs, each solved to 1e-3 from the last solution in 200 gradients at
                     most; wordnet-45: all l equal, and 50 gradients
    random           10 random l, otherwise the same
    sklearn-cv       LogisticRegressionCV on the same split and grid; its iterations count one gradient each
    optuna-tpe       200 trials on wordnet-45, 20 elsewhere, solves as in grid

CG also evaluates its first and its last residual, one product each. All gradient methods take the step rule of
`minimize_outer`, TrustRegion(), and end by it, after 30 steps or 600 gradients; METHOD/hoag-step takes the published
rule instead, with up to 1,800 gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import sklearn
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit
from torch import Tensor

import equipoise as eq
from benchmarks.bilevel.problems import BOX, Problem, Run, Stopwatch, Visit, load
from benchmarks.bilevel.report import plain, plot, restored, show, summary
from equipoise.bilevel import HoagStep, OuterStep, StepRule, Tolerance, TrustRegion, minimize_outer
from equipoise.files import write_atomic

DATA = ("wordnet-animal-plant", "wordnet-person-artifact", "wordnet-45", "20newsgroups")
SEEDS = 5
FIRST, LONGEST, LONGEST_OF_MANY = 1e-3, 200, 50  # tolerance and gradients of an inner solve of a search
MAX_EVALS, MAX_EVALS_OF_HOAG_STEP = 600, 1800
GRID = np.linspace(*BOX, 10)
NEVER_BACK = math.inf  # fallback ratio: the inverse of L-BFGS is positive definite, and the Hessian far from I
SHINE = eq.Shine(fallback_ratio=NEVER_BACK)
TRUST_REGION = TrustRegion()
CG_5 = eq.CG(max_steps=7)  # five steps, the first and the last residual

Method = Callable[[Problem], Run]
Task = tuple[str, int, int, int]  # data set, seed, trials, outer steps


def bilevel(
    gradient: eq.Gradient,
    *,
    memory: int,
    factor: float,
    outer_every: int | None = None,
    step: StepRule = TRUST_REGION,
    max_steps: int = 30,
    max_evals: int = MAX_EVALS,
) -> Method:
    """A method that follows hypergradients."""

    def run(problem: Problem) -> Run:
        visits: list[Visit] = []
        watch = Stopwatch()

        def observe(line: OuterStep, z: Tensor) -> None:
            seconds = watch()
            with watch:
                held_out, test = problem.losses(z)
                visits.append(Visit(seconds, line.gradient_evals, held_out, test, line.hyper[0].tolist()))

        # The solver learns of the outer loss from minimize_outer.
        solver = eq.LBFGS(max_steps=1000, memory=memory, outer_every=outer_every)
        solution = minimize_outer(
            lambda z, log_alpha: problem.held_out(z),
            problem.inner,
            z0=problem.z0,
            hyper0=problem.hyper0,
            bounds=BOX,
            solver=solver,
            gradient=gradient,
            tolerance=Tolerance(FIRST, factor),
            step=step,
            max_steps=max_steps,
            max_evals=max_evals,
            observe=observe,
        )
        seconds = watch()
        held_out, test = problem.losses(solution.z)
        chosen = Visit(seconds, solution.gradient_evals, held_out, test, solution.hyper[0].tolist())
        solved = problem.solved(solution.z, chosen.hyper)
        return Run(visits, seconds, solution.gradient_evals, solution.status.name, chosen, solved)

    return run


class Search:
    """Inner solves at points that something else chooses, each from the last solution."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.z, self.evals = problem, problem.z0, 0
        self.best = problem.z0
        self.visits: list[Visit] = []
        self.watch = Stopwatch()

    def __call__(self, log_alpha: Sequence[float]) -> float:
        """Held-out loss at a point."""
        hyper = torch.tensor(log_alpha, dtype=torch.float64).expand(self.problem.penalty.num_groups)
        solution = self.problem.solve(self.z, hyper, FIRST, LONGEST if len(hyper) == 1 else LONGEST_OF_MANY)
        self.z = solution.value
        self.evals += solution.num_evals
        seconds = self.watch()
        with self.watch:
            held_out, test = self.problem.losses(self.z)
            self.visits.append(Visit(seconds, self.evals, held_out, test, hyper.tolist()))
            if self.visits[-1] is min(self.visits, key=lambda visit: visit.held_out):
                self.best = self.z
        return held_out

    def result(self) -> Run:
        """Of all points so far."""
        seconds, chosen = self.watch(), min(self.visits, key=lambda visit: visit.held_out)
        return Run(self.visits, seconds, self.evals, "DONE", chosen, self.problem.solved(self.best, chosen.hyper))


def grid(problem: Problem) -> Run:
    search = Search(problem)
    for value in GRID:
        search([value])
    return search.result()


def random(problem: Problem) -> Run:
    search = Search(problem)
    source = np.random.default_rng(problem.seed)
    for _ in GRID:
        search(source.uniform(*BOX, len(problem.hyper0)).tolist())
    return search.result()


def optuna_tpe(problem: Problem, *, trials: int) -> Run:
    search = Search(problem)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.seed))
    names = [f"l{number}" for number in range(len(problem.hyper0))]
    study.optimize(lambda trial: search([trial.suggest_float(name, *BOX) for name in names]), n_trials=trials)
    return search.result()


def sklearn_cv(problem: Problem) -> Run:
    train, held_out = problem.rows
    rows = np.concatenate([train, held_out])
    fold = np.repeat([-1, 0], [len(train), len(held_out)])
    watch = Stopwatch()
    model = LogisticRegressionCV(
        Cs=np.exp(-GRID),
        cv=PredefinedSplit(fold),
        fit_intercept=False,
        scoring="neg_log_loss",
        refit=False,
        max_iter=1000,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak penalties end at max_iter; attributes of the next release
        model.fit(problem.X[rows], problem.y[rows])
    seconds, evals = watch(), int(np.sum(model.n_iter_))
    z = torch.from_numpy(model.coef_.reshape(1, -1))
    loss, test = problem.losses(z)
    chosen = Visit(seconds, evals, loss, test, [-math.log(float(np.ravel(model.C_)[0]))] * len(problem.hyper0))
    return Run([chosen], seconds, evals, "DONE", chosen, problem.solved(z, chosen.hyper))


def methods(trials: int, max_steps: int, several: bool) -> dict[str, Method]:
    """All of them, by name; the published step rule only for a single penalty."""
    hoag = eq.Implicit(solver=eq.CG(max_steps=10_000))
    ours = functools.partial(bilevel, factor=0.78, max_steps=max_steps)
    theirs = functools.partial(bilevel, memory=10, factor=0.9, max_steps=max_steps)
    found: dict[str, Method] = {
        "shine": ours(SHINE, memory=30),
        "shine-opa": ours(SHINE, memory=60, outer_every=5),
        "shine-refine": ours(eq.Implicit(solver=CG_5, start=SHINE), memory=30),
        "hoag": theirs(hoag),
        "hoag-limited": theirs(eq.Implicit(solver=CG_5)),
        "jacobian-free": ours(eq.JacobianFree(), memory=30),
        "grid": grid,
        "random": random,
        "sklearn-cv": sklearn_cv,
        "optuna-tpe": functools.partial(optuna_tpe, trials=trials),
    }
    if not several:
        found["shine/hoag-step"] = ours(SHINE, memory=30, step=HoagStep(), max_evals=MAX_EVALS_OF_HOAG_STEP)
        found["hoag/hoag-step"] = theirs(hoag, step=HoagStep(), max_evals=MAX_EVALS_OF_HOAG_STEP)
    return found


@functools.cache
def loaded(name: str) -> tuple[Any, np.ndarray]:
    return load(name)


def measure(task: Task) -> tuple[Task, dict[str, Run]]:
    """All methods on one seed of a data set."""
    name, seed, trials, max_steps = task
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = Problem(name, *loaded(name), seed)
    bilevel(SHINE, memory=30, factor=0.78, max_steps=2)(problem)  # fills caches
    every = methods(trials, max_steps, len(problem.hyper0) > 1)
    first = 3 * seed % len(every)
    order = [*every][first:] + [*every][:first]
    found = {method: every[method](problem) for method in order}
    return task, {method: found[method] for method in every}


def machine() -> dict[str, Any]:
    """What ran this, and how busy it was besides."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed of breast-cancer, four steps: seconds")
    parser.add_argument("--data", nargs="+", choices=(*DATA, "breast-cancer"), help="some of the data sets")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--resume", action="store_true", help="keep the seeds that FILE holds")
    parser.add_argument("--plot", type=pathlib.Path, help="PNG of the held-out loss against time")
    args = parser.parse_args()
    data = args.data or (["breast-cancer"] if args.quick else list(DATA))
    seeds = 1 if args.quick else args.seeds
    trials = {name: 4 if args.quick else 200 if name == "wordnet-45" else 20 for name in data}
    tasks = [(name, seed, trials[name], 4 if args.quick else 30) for seed in range(seeds) for name in data]
    console = Console(width=220)
    began, before = time.time(), machine()
    # Set for the processes that start below: the libraries read it when they load.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    results: dict[str, dict[int, dict[str, Run]]] = {name: {} for name in data}
    minutes = 0.0
    if args.resume and args.json.exists():
        content = json.loads(args.json.read_text())
        results |= restored(content["runs"])
        minutes = content["minutes"]
    tasks = [task for task in tasks if task[1] not in results[task[0]]]
    medians, details = summary(results)
    with multiprocessing.get_context("spawn").Pool(1 if args.quick else args.workers) as pool:
        for (name, seed, *_), runs in pool.imap_unordered(measure, tasks):
            results[name][seed] = runs
            spent = minutes + (time.time() - began) / 60
            console.print(f"{spent:5.1f} min  {name} seed {seed}", highlight=False)
            medians, details = summary(results)
            content = {
                "date": time.strftime("%Y-%m-%d"),
                "minutes": spent,
                "seeds": {name: sorted(each) for name, each in results.items()},
                "trials": trials,
                "workers": 1 if args.quick else args.workers,
                "machine": before | {"load_average_at_end": os.getloadavg()[0]},
                "python": platform.python_version(),
                "torch": torch.__version__,
                "scikit-learn": sklearn.__version__,
                "optuna": optuna.__version__,
                "equipoise": eq.__version__,
                **medians,
                "details": details,
                "runs": plain(results),
            }
            # After each seed, so that what a long run has found is not lost.
            write_atomic(args.json, (json.dumps(content, allow_nan=False) + "\n").encode())
    show(console, medians, details)
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
