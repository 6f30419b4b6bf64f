"""Searches for penalties: grid, random, scikit-learn and Optuna."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit

from benchmarks.bilevel.problems import BOX, FIRST, Problem, Trail

LONGEST, LONGEST_OF_MANY = 200, 50  # gradients of an inner solve, for one penalty and for several
GRID = np.linspace(*BOX, 10)


class Search(Trail):
    """Inner solves at given points, each from the last solution."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.z, self.evals, self.best = problem.z0, 0, (math.inf, problem.z0, [0.0], 0)

    def __call__(self, log_alpha: Sequence[float]) -> float:
        """Held-out loss at a point."""
        hyper = torch.tensor(log_alpha, dtype=torch.float64).expand(self.problem.penalty.num_groups)
        solution = self.problem.solve(self.z, hyper, FIRST, LONGEST if len(hyper) == 1 else LONGEST_OF_MANY)
        self.z = solution.value
        self.evals += solution.num_evals
        held_out = self.visit(self.z, self.evals)
        if held_out < self.best[0]:
            self.best = held_out, self.z, hyper.tolist(), len(self.visits) - 1
        return held_out

    def best_result(self) -> dict[str, Any]:
        """Entry of the record for the best point so far."""
        _, z, hyper, number = self.best
        return self.result(z, self.evals, hyper, chosen=self.visits[number])


def grid(problem: Problem) -> dict[str, Any]:
    search = Search(problem)
    for value in GRID:
        search([value])
    return search.best_result()


def random(problem: Problem) -> dict[str, Any]:
    search = Search(problem)
    source = np.random.default_rng(problem.seed)
    for _ in GRID:
        search(source.uniform(*BOX, len(problem.hyper0)).tolist())
    return search.best_result()


def optuna_tpe(problem: Problem, *, trials: int) -> dict[str, Any]:
    search = Search(problem)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.seed))
    names = [f"l{number}" for number in range(len(problem.hyper0))]
    study.optimize(lambda trial: search([trial.suggest_float(name, *BOX) for name in names]), n_trials=trials)
    return search.best_result()


def sklearn_cv(problem: Problem) -> dict[str, Any]:
    train, held_out = problem.rows
    rows = np.concatenate([train, held_out])
    fold = np.repeat([-1, 0], [len(train), len(held_out)])
    trail = Trail(problem)
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
    hyper = [-math.log(float(np.ravel(model.C_)[0]))] * len(problem.hyper0)
    return trail.result(torch.from_numpy(model.coef_.reshape(1, -1)), int(np.sum(model.n_iter_)), hyper)
