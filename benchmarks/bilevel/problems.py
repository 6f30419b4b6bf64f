"""Bilevel problems with their data, splits and losses, and the models that a method visits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from benchmarks.bilevel.named import NAMED
from benchmarks.bilevel.report import HELD_OUT
from equipoise.bilevel import InnerLoss
from equipoise.core.function_map import DescentMap
from equipoise.core.solution import Solution
from equipoise.estimators.design import Design
from equipoise.estimators.linear import GroupPenalty, LogisticLoss, MultinomialLoss
from equipoise.fixed_point import solve_map
from equipoise.gradients import JacobianFree
from equipoise.solvers import LBFGS

BOX = (-12.0, 12.0)
FIRST = 1e-3  # tolerance of the inner solves of a search, and of the first one of a descent
SUBSAMPLED = {"wordnet-45": 3_000}  # rows, and then columns that occur in three of them or more


class Trail:
    """Models that a method visits, with the seconds and gradients until each; evaluating them costs it no time.

    Args:
        problem: that the method solves.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.began = problem, time.perf_counter()
        self.visits: list[list[float]] = []
        self.away = 0.0

    def model(self, z: Tensor, evals: int) -> list[float]:
        """Seconds, gradients, held-out and test loss of a state, with eight digits."""
        now = time.perf_counter()
        held_out, test = self.problem.losses(z)
        found = [float(f"{value:.8g}") for value in (now - self.began - self.away, evals, held_out, test)]
        self.away += time.perf_counter() - now
        return found

    def visit(self, z: Tensor, evals: int) -> float:
        """Record a state; return its held-out loss."""
        self.visits.append(self.model(z, evals))
        return self.visits[-1][HELD_OUT]

    def result(
        self, z: Tensor, evals: int, hyper: list[float], *, chosen: list[float] | None = None, end: str = "DONE"
    ) -> dict[str, Any]:
        """Entry of the record: cost, chosen model, and its loss after a further solve, at no method's expense."""
        final = self.model(z, evals)
        return {
            "end": end,
            "total": final[:HELD_OUT],
            "chosen": chosen or final,
            "log_alpha": [float(f"{value:.8g}") for value in hyper],
            "solved": self.problem.solved(z, hyper),
            "visits": self.visits or [final],
        }


class Problem:
    """Train on 90 % of the rows, choose penalties on 5 %, test on 5 %; losses are sums, there is no intercept.

    Args:
        name: of the data set.
        X: features.
        y: labels; two, and there is one penalty; more, and there is one for each.
        seed: of the split and of the start.
    """

    def __init__(self, name: str, X: Any, y: np.ndarray, seed: int) -> None:
        self.name, self.seed = name, seed
        order, part = np.random.default_rng(seed).permutation(len(y)), len(y) // 20
        test, held_out, train = order[:part], order[part : 2 * part], order[2 * part :]
        self.classes, numbers = np.unique(y, return_inverse=True)
        count = len(self.classes)
        self.X, self.y, self.rows = X, numbers, (train, held_out)

        def loss(rows: np.ndarray) -> LogisticLoss | MultinomialLoss:
            target = torch.from_numpy(numbers[rows])
            if count == 2:
                return LogisticLoss(design=Design(X[rows]), target=2 * target - 1)
            return MultinomialLoss(design=Design(X[rows], outputs=count), target=target)

        self.train, self.held_out, self.test = loss(train), loss(held_out), loss(test)
        design = self.train.design
        self.penalty = GroupPenalty(design=design) if count == 2 else GroupPenalty.per_class(design)
        self.inner = InnerLoss(self.train, self.penalty)
        source = torch.Generator().manual_seed(seed)
        self.z0 = torch.randn(1, design.size, generator=source, dtype=torch.float64)
        self.hyper0 = torch.zeros(self.penalty.num_groups, dtype=torch.float64)
        # The unit of tolerances: the norm of the gradient at the start.
        first = DescentMap(lambda z: self.train(z) + self.penalty(z, self.hyper0), self.z0, params=())
        with torch.no_grad():
            point = first.evaluate(self.z0, torch.arange(1), torch.ones(1, dtype=torch.bool))
        self.scale = float(torch.linalg.vector_norm(point.residual))

    def solve(self, z: Tensor, log_alpha: Tensor, tolerance: float, max_steps: int) -> Solution[Any]:
        """The inner problem at given penalties, from a state, to a tolerance relative to the first gradient."""
        solver = LBFGS(max_steps=max_steps, memory=10, rtol=0.0, atol=tolerance * self.scale)
        with torch.no_grad():  # so that it does not matter which gradient is named
            return solve_map(self.inner.map(z, (log_alpha,)), z, solver=solver, gradient=JacobianFree())

    def solved(self, z: Tensor, log_alpha: Sequence[float]) -> float:
        """Held-out loss at given penalties, a hundred times nearer to the minimum than the searches go."""
        return self.losses(self.solve(z, torch.tensor(log_alpha, dtype=torch.float64), 1e-5, 300).value)[0]

    def losses(self, z: Tensor) -> tuple[float, float]:
        """Held-out and test loss of a state."""
        with torch.no_grad():
            return float(self.held_out(z)), float(self.test(z))


def load(name: str) -> tuple[Any, np.ndarray]:
    """Features and labels of a data set, some of its rows if it is too large for hundreds of solves."""
    X, y = NAMED[name]()
    if name in SUBSAMPLED:
        rows = np.random.default_rng(0).choice(len(y), SUBSAMPLED[name], replace=False)
        X, y = X[rows], y[rows]
        X = X[:, np.asarray((X != 0).sum(0)).ravel() >= 3]
    return scipy.sparse.csr_matrix(X) if scipy.sparse.issparse(X) else X, y
