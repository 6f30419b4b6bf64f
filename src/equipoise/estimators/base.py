"""What the estimators share: the search for the penalty by gradient, and the fit at the one that was found."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from equipoise.bilevel import InnerLoss, OuterStatus, OuterStep, minimize_outer
from equipoise.estimators.columns import column_moments, geometric_means
from equipoise.estimators.linear import Design, GroupPenalty, Loss
from equipoise.estimators.splits import check_split, folds, holdout
from equipoise.fixed_point import solve_map
from equipoise.gradients import Gradient, Implicit, Shine
from equipoise.solvers import LBFGS, Solver

ROUNDING = 1e-14
FIRST, LEAST, LARGEST = 0.1, 1e-7, 1e5  # penalties in units of the spread of the columns


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of data: features `(n, d)`, target `(n,)` or `(k, n)`, weights `(n,)` or, for folds, `(B, n)`."""

    features: Any
    target: np.ndarray
    weights: np.ndarray

    def select(self, rows: np.ndarray) -> Rows:
        """Some of them."""
        return Rows(self.features[rows], self.target[..., rows], self.weights[rows])

    def fold(self, splits: list[np.ndarray]) -> Rows:
        """All rows, with the weights of those of each fold."""
        weights = np.zeros((len(splits), len(self.weights)))
        for fold, rows in enumerate(splits):
            weights[fold, rows] = self.weights[rows]
        return dataclasses.replace(self, weights=weights)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)  # scikit-learn reads the parameters off its __init__
class BilevelEstimator(BaseEstimator, abc.ABC):
    """Base of the linear estimators that tune their penalty: the split, the search, the last fit, the scores."""

    groups: Any = None
    validation_fraction: float = 0.25
    cv: Any = None
    gradient: Gradient | None = None
    solver: Solver | None = None
    alpha_start: Any = None
    alpha_bounds: Any = None
    max_iter: int = 30
    tol: float = 1e-6
    fit_intercept: bool = True
    refit: bool = True
    warm_start: bool = False
    random_state: Any = None

    @abc.abstractmethod
    def _loss(self, design: Design, rows: Rows) -> Loss:
        """Mean loss of some rows."""

    @abc.abstractmethod
    def _score(self, scores: np.ndarray, rows: Rows) -> float:
        """How well scores of the design, `(k, n)`, fit rows with weights `(n,)`: accuracy or R²."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _features(self, X: Any, **options: Any) -> Any:
        return validate_data(self, X, accept_sparse="csr", dtype=np.float64, **options)

    def _tune(
        self,
        rows: Rows,
        *,
        outputs: int,
        judges: Rows | None,
        classes: np.ndarray | None = None,
        names: np.ndarray | None = None,
        unit: float = 1.0,
        observe: Callable[[OuterStep, float], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search for the penalty and fit with it: coefficients `(k, d)` and intercepts `(k,)`.

        Args:
            rows: what was passed to fit, none of weight zero.
            outputs: k.
            judges: rows of the outer loss that were passed apart; None: they are split off.
            classes: `(n,)` class numbers; None: regression.
            names: what the classes are called.
            unit: of the losses that are reported.
            observe: called with each outer step and the score of its solution on the held-out rows.
        """
        self._check_options()
        inner, outer, num_splits = self._parts(rows, judges, classes, names)
        groups = self._groups(outputs, rows.features.shape[1])
        mean, spread = column_moments(inner.features, np.atleast_2d(inner.weights).sum(0), centered=self.fit_intercept)
        sparse = scipy.sparse.issparse(inner.features)
        entries = np.bincount(inner.features.indices, minlength=len(spread)) if sparse else np.ones_like(spread)
        first, low, high = self._alphas(geometric_means(spread, groups, groups.max() + 1, entries))

        def scale(alpha: np.ndarray) -> Tensor:
            # The penalty applies to the coefficients on the columns as they are. Entries of the state are these
            # coefficients times a scale that makes the diagonal of the Hessian about one.
            return torch.from_numpy(np.sqrt(spread + alpha[groups].mean(0)))

        with _torch_as_usual():
            design = Design(
                inner.features,
                outputs=outputs,
                intercept=self.fit_intercept,
                offset=torch.from_numpy(mean) if self.fit_intercept else None,
                scale=scale(first),
            )
            labels = None if len(first) == 1 else torch.from_numpy(groups)
            judge = self._loss(design.on(outer.features), outer)

            def reported(step: OuterStep) -> OuterStep:
                return dataclasses.replace(step, value=step.value * unit, gradient_norm=step.gradient_norm * unit)

            def watch(step: OuterStep, z: Tensor) -> None:
                assert observe is not None
                finite = math.isfinite(step.value)
                observe(reported(step), self._mean_score(judge.design.scores(z), outer) if finite else math.nan)

            solution = minimize_outer(
                lambda z, _: judge(z) / num_splits,
                InnerLoss(self._loss(design, inner), GroupPenalty(design=design, groups=labels)),
                z0=torch.zeros(num_splits, design.size, dtype=design.dtype),
                hyper0=torch.from_numpy(np.log(first)),
                bounds=(torch.from_numpy(np.log(low)), torch.from_numpy(np.log(high))),
                solver=self._solver(),
                gradient=Shine(fallback_ratio=math.inf) if self.gradient is None else self.gradient,
                max_steps=self.max_iter,
                observe=None if observe is None else watch,
            )
            if solution.status is OuterStatus.NONFINITE:
                raise ValueError("the loss is not finite at the first penalty; rescale X and y, or raise alpha_start")
            (log_alpha,) = solution.hyper
            # The walk compares points at loose tolerances; what is reported is the loss of the problem itself.
            alpha = log_alpha.exp().numpy()
            design, factor = design.rescaled(scale(alpha))
            penalty = GroupPenalty(design=design, groups=labels)
            z = self._solve(InnerLoss(self._loss(design, inner), penalty), log_alpha, solution.z * factor)
            judge = self._loss(design.on(outer.features), outer)
            value, score = float(judge(z).mean()), self._mean_score(judge.design.scores(z), outer)
            if self.refit and inner is not rows:
                whole = InnerLoss(self._loss(design.on(rows.features), rows), penalty)
                z = self._solve(whole, log_alpha, z.mean(0, keepdim=True))
            if solution.status is OuterStatus.INNER:
                _warn("an inner solve of the search")
            weights, intercepts = (part.mean(0).numpy() for part in design.coefficients(z))
        self.alpha_ = float(alpha[0]) if self.groups is None else alpha
        self.validation_loss_, self.validation_score_ = value * unit, score
        self.outer_history_ = [reported(step) for step in solution.history]
        self.outer_status_ = solution.status
        self.n_iter_ = len(solution.history)
        return weights, intercepts

    def _mean_score(self, scores: Tensor, rows: Rows) -> float:
        """The mean over the folds, of scores `(B, k, n)`."""
        weights = np.broadcast_to(rows.weights, (len(scores), scores.shape[-1]))
        parts = zip(scores.numpy(), weights, strict=True)
        return float(np.mean([self._score(part, dataclasses.replace(rows, weights=weight)) for part, weight in parts]))

    def _solver(self) -> Solver:
        return LBFGS(max_steps=1000, memory=30) if self.solver is None else self.solver

    def _solve(self, inner: InnerLoss, log_alpha: Tensor, z: Tensor) -> Tensor:
        """Minimize to the tolerance of the last fit, relative to the gradient at zero."""
        f = inner.map(z, (log_alpha,))
        rows = torch.arange(len(z))
        with torch.no_grad(), f.solve_context():
            origin = f.evaluate(torch.zeros_like(z), rows, torch.ones_like(rows, dtype=torch.bool))
        # Losses are means of numbers of size one: a smaller gradient is rounding.
        allowed = max(self.tol * float(torch.linalg.vector_norm(origin.residual, dim=1).max()), ROUNDING)
        solver = dataclasses.replace(self._solver(), rtol=0.0, atol=allowed)
        solution = solve_map(f, z, solver=solver, gradient=Implicit())
        if not bool(solution.converged.all()):
            _warn("the last fit", float(solution.residual.max()), allowed)
        return solution.value

    def _check_options(self) -> None:
        if not (isinstance(self.max_iter, (int, np.integer)) and self.max_iter >= 1):
            raise ValueError(f"max_iter must be an integer >= 1, got {self.max_iter!r}")
        if not self.tol > 0:
            raise ValueError(f"tol must be > 0, got {self.tol!r}")
        for name, kind in (("gradient", Gradient), ("solver", Solver)):
            value = getattr(self, name)
            if not (value is None or isinstance(value, kind)):
                raise TypeError(f"{name} must be None or a {kind.__name__} of equipoise, got {value!r}")

    def _parts(
        self, rows: Rows, judges: Rows | None, classes: np.ndarray | None, names: np.ndarray | None
    ) -> tuple[Rows, Rows, int]:
        """Rows of the inner and of the outer loss, and the number of splits."""
        if judges is not None:
            return rows, judges, 1
        target = rows.target.T if classes is None else classes
        if self.cv is None:
            generator = check_random_state(self.random_state)
            splits = [holdout(len(rows.weights), self.validation_fraction, generator, classes)]
        else:
            splits = folds(self.cv, rows.features, target, classes)
        for number, split in enumerate(splits):
            name = "the split" if len(splits) == 1 else f"fold {number}"
            check_split(split, name, classes, names)
        if len(splits) == 1:
            return rows.select(splits[0][0]), rows.select(splits[0][1]), 1
        return rows.fold([train for train, _ in splits]), rows.fold([judge for _, judge in splits]), len(splits)

    def _groups(self, outputs: int, num_features: int) -> np.ndarray:
        """The number of the penalty of each coefficient, `(k, d)`."""
        kind = self.groups if isinstance(self.groups, str) else None
        if self.groups is None:
            numbers = np.zeros(num_features, dtype=np.int64)
        elif kind == "feature":
            numbers = np.arange(num_features)
        elif kind == "output":
            if outputs == 1:
                raise ValueError("groups='output' needs several targets, or three or more classes; here is one output")
            numbers = np.arange(outputs)[:, None]
        else:
            labels = np.asarray(self.groups)
            if labels.shape != (num_features,):
                raise ValueError(
                    "groups must be None, 'feature', 'output' or an array with one label for each feature, "
                    f"({num_features},), got {self.groups!r}"
                )
            numbers = np.unique(labels, return_inverse=True)[1]
        return np.broadcast_to(numbers, (outputs, num_features)).copy()

    def _alphas(self, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First penalties, least and largest, each `(p,)`, from the spread of the columns they apply to."""
        first, low, high = FIRST * unit, LEAST * unit, LARGEST * unit
        if self.alpha_bounds is not None:
            if not isinstance(self.alpha_bounds, (tuple, list)) or len(self.alpha_bounds) != 2:
                raise ValueError(f"alpha_bounds must be None or a pair (low, high), got {self.alpha_bounds!r}")
            low, high = (self._positive("alpha_bounds", bound, unit) for bound in self.alpha_bounds)
            if not (low <= high).all():
                raise ValueError(f"alpha_bounds must be a pair (low, high) with low <= high, got {self.alpha_bounds!r}")
        if self.warm_start and np.size(getattr(self, "alpha_", ())) == len(unit):
            first = self._positive("alpha_", np.atleast_1d(self.alpha_), unit)
        elif self.alpha_start is not None:
            first = self._positive("alpha_start", self.alpha_start, unit)
            if self.alpha_bounds is None:
                low, high = np.minimum(low, first), np.maximum(high, first)
            elif not ((low <= first) & (first <= high)).all():
                raise ValueError(f"alpha_start={self.alpha_start!r} must lie within alpha_bounds={self.alpha_bounds!r}")
        return first.clip(low, high), low, high

    @staticmethod
    def _positive(name: str, value: Any, unit: np.ndarray) -> np.ndarray:
        numbers = np.asarray(value, dtype=np.float64)
        if numbers.shape not in ((), unit.shape) or not (np.isfinite(numbers) & (numbers > 0)).all():
            raise ValueError(f"{name} must be positive, one number or one for each penalty {unit.shape}, got {value!r}")
        return np.broadcast_to(numbers, unit.shape).copy()

    def _decision(self, X: Any) -> np.ndarray:
        """Scores of new rows, `(n, k)`."""
        check_is_fitted(self)
        features = self._features(X, reset=False)
        coefficients = np.atleast_2d(self.coef_)
        return np.asarray(features @ coefficients.T) + self.intercept_


def weigh(sample_weight: Any, features: Any) -> np.ndarray:
    """The weights of rows, `(n,)`, 1 if none are given.

    Raises:
        ValueError: a weight below zero, or no positive one.
    """
    weights = _check_sample_weight(sample_weight, features, dtype=np.float64, ensure_non_negative=True)
    if not (weights > 0).any():
        raise ValueError("sample_weight must be positive in some rows: all are zero")
    return weights


def _warn(what: str, residual: float | None = None, allowed: float | None = None) -> None:
    size = "" if residual is None else f" (norm of the gradient {residual:.1e}, allowed {allowed:.1e})"
    warnings.warn(
        f"{what} did not converge{size}: raise max_steps of solver=LBFGS(...), raise tol, or keep the penalty away "
        "from zero with alpha_bounds",
        ConvergenceWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def _torch_as_usual() -> Iterator[None]:
    """Whatever modes the caller is in: derivatives on, no autocast."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield
