"""Speed of tuning penalties: SHINE against HOAG, searches, scikit-learn and Optuna.

    python -m benchmarks bilevel [--quick] [--seeds N] [--workers N] [--data NAME ...]

Claim, after the SHINE paper (Ramzi et al. 2022): hypergradients with a shared inverse reach a good penalty sooner.
Evidence: `results/2026-11-26.json`: 5 seeds of each data set, two processes of one thread on two x86-64 cores, 30
minutes, torch 2.13.0, scikit-learn 1.9.1, Optuna 5.0.0. SHINE needs a fifth of HOAG's gradients on the WordNet pairs;
on 20newsgroups the grid is fastest.

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

Medians over the seeds; null: not reached on most. All are losses of models that the method visited: the inner problem
is solved to the tolerance of the method, not beyond.

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

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.bilevel.problems import BOX, FIRST, Problem, Trail, load
from benchmarks.bilevel.report import summary, table
from benchmarks.bilevel.rivals import grid, optuna_tpe, random, sklearn_cv
from equipoise.bilevel import HoagStep, OuterStep, StepRule, Tolerance, TrustRegion, minimize_outer

DATA = ("wordnet-animal-plant", "wordnet-person-artifact", "wordnet-45", "20newsgroups")
MAX_EVALS, MAX_EVALS_OF_HOAG_STEP = 600, 1800
NEVER_BACK = math.inf  # fallback ratio: the inverse of L-BFGS is positive definite, and the Hessian far from I
SHINE = eq.Shine(fallback_ratio=NEVER_BACK)
TRUST_REGION = TrustRegion()
CG_5 = eq.CG(max_steps=7)  # five steps, the first and the last residual

Method = Callable[[Problem], dict[str, Any]]


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
    """Descent along hypergradients."""

    def run(problem: Problem) -> dict[str, Any]:
        trail = Trail(problem)

        def observe(line: OuterStep, z: Tensor) -> None:
            trail.visit(z, line.gradient_evals)

        solution = minimize_outer(
            lambda z, log_alpha: problem.held_out(z),
            problem.inner,
            z0=problem.z0,
            hyper0=problem.hyper0,
            bounds=BOX,
            # minimize_outer gives it the outer loss.
            solver=eq.LBFGS(max_steps=1000, memory=memory, outer_every=outer_every),
            gradient=gradient,
            tolerance=Tolerance(FIRST, factor),
            step=step,
            max_steps=max_steps,
            max_evals=max_evals,
            observe=observe,
        )
        return trail.result(solution.z, solution.gradient_evals, solution.hyper[0].tolist(), end=solution.status.name)

    return run


def methods(trials: int, max_steps: int, several: bool) -> dict[str, Method]:
    """All methods, by name; the published step rule only for a single penalty."""
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
def loaded(name: str) -> tuple[Any, Any]:
    return load(name)


def measure(name: str, seed: int, quick: bool) -> dict[str, dict[str, Any]]:
    """Entries of all methods on one seed of a data set."""
    trials, max_steps = (4, 4) if quick else (200 if name == "wordnet-45" else 20, 30)
    problem = Problem(name, *loaded(name), seed)
    bilevel(SHINE, memory=30, factor=0.78, max_steps=2)(problem)  # fills caches
    every = methods(trials, max_steps, len(problem.hyper0) > 1)
    first = 3 * seed % len(every)
    order = [*every][first:] + [*every][:first]
    found = {method: every[method](problem) for method in order}
    return {method: found[method] for method in every}


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="one seed of breast-cancer, four steps: seconds",
        seeds=5,
        workers=2,
        options={"--data": {"nargs": "+", "choices": (*DATA, "breast-cancer"), "help": "some of the data sets"}},
        free=["data"],
        packages=["scikit-learn", "optuna"],
        summary=summary,
    )
    args = record.args
    pairs = itertools.product(range(args.seeds), args.data or (["breast-cancer"] if args.quick else DATA))
    record.measure_all({("runs", n, seed): functools.partial(measure, n, seed, args.quick) for seed, n in pairs})
    record.finish(table)
