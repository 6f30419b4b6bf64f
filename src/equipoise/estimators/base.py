"""Base of the estimators: search for the penalties by gradient, and fit at those found."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from equipoise.estimators.design import column_moments, geometric_means
from equipoise.estimators.linear import Design, GroupPenalty, Loss
from equipoise.estimators.splits import check_split, folds, holdout
from equipoise.fixed_point import solve_map
from equipoise.gradients import Gradient, Implicit, Shine
from equipoise.solvers import LBFGS, Solver

ROUNDING = 1e-14  # losses are means of numbers of size one: no smaller gradient is computed
START, LEAST, LARGEST = 0.1, 1e-7, 1e5  # penalties in units of the spread of the columns


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of data: features `(n, d)`, target `(n,)` or `(k, n)`, weights `(n,)` or, for folds, `(B, n)`."""

    features: Any
    target: np.ndarray
    weights: np.ndarray

    def select(self, rows: np.ndarray) -> Rows:
        """Return some of the rows."""
        return Rows(self.features[rows], self.target[..., rows], self.weights[rows])

    def folds(self, parts: Sequence[np.ndarray]) -> Rows:
        """Return one part of the rows; of several, all rows with a weight vector for each part."""
        if len(parts) == 1:
            return self.select(parts[0])
        weights = np.zeros((len(parts), len(self.weights)))
        for fold, rows in enumerate(parts):
            weights[fold, rows] = self.weights[rows]
        return dataclasses.replace(self, weights=weights)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)  # scikit-learn reads the parameters off its __init__
class BilevelEstimator(BaseEstimator, abc.ABC):
    """Linear estimator that tunes its penalties: split, search, final fit and scores."""

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
        """Return the mean loss of some rows."""

    @abc.abstractmethod
    def _score(self, scores: np.ndarray, rows: Rows) -> float:
        """Return accuracy or R² of scores of the design, `(k, n)`, on rows with weights `(n,)`."""

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
        validation: Rows | None,
        classes: np.ndarray | None = None,
        names: np.ndarray | None = None,
        unit: float = 1.0,
        observe: Callable[[OuterStep, float], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search for the penalties, fit with them, and return coefficients `(k, d)` and intercepts `(k,)`.

        Args:
            rows: rows of fit without those of weight zero.
            outputs: k.
            validation: rows of the outer loss; None: split off from `rows`.
            classes: `(n,)` class numbers; None: regression.
            names: names of the classes.
            unit: factor on the reported losses.
            observe: called with each outer step and the score of its solution on the held-out rows.
        """
        self._check_options()
        inner, outer = (rows, validation) if validation is not None else self._split(rows, classes, names)
        num_splits = len(np.atleast_2d(inner.weights))
        groups = self._groups(outputs, rows.features.shape[1])
        mean, spread = column_moments(inner.features, np.atleast_2d(inner.weights).sum(0), centered=self.fit_intercept)
        sparse = scipy.sparse.issparse(inner.features)
        entries = np.bincount(inner.features.indices, minlength=len(spread)) if sparse else np.ones_like(spread)
        start, low, high = self._alphas(geometric_means(spread, groups, groups.max() + 1, entries))
        labels = None if len(start) == 1 else torch.from_numpy(groups)

        def scale(alpha: np.ndarray) -> Tensor:
            # The penalty applies to the coefficients of the original columns. The state holds these coefficients times
            # a scale that makes the diagonal of the Hessian about one.
            return torch.from_numpy(np.sqrt(spread + alpha[groups].mean(0)))

        def reported(step: OuterStep) -> OuterStep:
            return dataclasses.replace(step, value=step.value * unit, gradient_norm=step.gradient_norm * unit)

        with _default_modes():
            design = Design(
                inner.features,
                outputs=outputs,
                intercept=self.fit_intercept,
                offset=torch.from_numpy(mean) if self.fit_intercept else None,
                scale=scale(start),
            )
            outer_loss = self._loss(design.on(outer.features), outer)

            def watch(step: OuterStep, z: Tensor) -> None:
                if observe is not None:
                    finite = math.isfinite(step.value)
                    observe(reported(step), self._mean_score(outer_loss, z, outer) if finite else math.nan)

            solution = minimize_outer(
                lambda z, _: outer_loss(z) / num_splits,
                InnerLoss(self._loss(design, inner), GroupPenalty(design=design, groups=labels)),
                z0=torch.zeros(num_splits, design.size, dtype=design.dtype),
                hyper0=torch.from_numpy(np.log(start)),
                bounds=(torch.from_numpy(np.log(low)), torch.from_numpy(np.log(high))),
                solver=self._solver(),
                gradient=Shine(fallback_ratio=math.inf) if self.gradient is None else self.gradient,
                max_steps=self.max_iter,
                observe=watch,
            )
            if solution.status is OuterStatus.NONFINITE:
                raise ValueError("the loss is not finite at the first penalty; rescale X and y, or raise alpha_start")
            (log_alpha,) = solution.hyper
            # The search compares points at loose tolerances; the reported loss is that of a converged solution.
            alpha = log_alpha.exp().numpy()
            design, factor = design.rescaled(scale(alpha))
            penalty = GroupPenalty(design=design, groups=labels)
            z = self._solve(InnerLoss(self._loss(design, inner), penalty), log_alpha, solution.z * factor)
            outer_loss = self._loss(design.on(outer.features), outer)
            self.validation_loss_ = float(outer_loss(z).mean()) * unit
            self.validation_score_ = self._mean_score(outer_loss, z, outer)
            if self.refit and inner is not rows:
                whole = InnerLoss(self._loss(design.on(rows.features), rows), penalty)
                z = self._solve(whole, log_alpha, z.mean(0, keepdim=True))
            if solution.status is OuterStatus.INNER:
                _warn("an inner solve of the search")
            coefficients, intercepts = (part.mean(0).numpy() for part in design.coefficients(z))
        self.alpha_ = float(alpha[0]) if self.groups is None else alpha
        self.outer_history_ = [reported(step) for step in solution.history]
        self.outer_status_ = solution.status
        self.n_iter_ = len(solution.history)
        return coefficients, intercepts

    def _mean_score(self, loss: Loss, z: Tensor, rows: Rows) -> float:
        """Return the score of a state on the rows of a loss, the mean over the folds."""
        scores = loss.design.scores(z)
        weights = np.broadcast_to(rows.weights, (len(scores), scores.shape[-1]))
        parts = zip(scores.numpy(), weights, strict=True)
        return float(np.mean([self._score(part, dataclasses.replace(rows, weights=weight)) for part, weight in parts]))

    def _solver(self) -> Solver:
        return LBFGS(max_steps=1000, memory=30) if self.solver is None else self.solver

    def _solve(self, inner: InnerLoss, log_alpha: Tensor, z: Tensor) -> Tensor:
        """Minimize to the tolerance of the final fit, relative to the gradient at zero."""
        f = inner.map(z, (log_alpha,))
        rows = torch.arange(len(z))
        with torch.no_grad(), f.solve_context():
            origin = f.evaluate(torch.zeros_like(z), rows, torch.ones_like(rows, dtype=torch.bool))
        allowed = max(self.tol * float(torch.linalg.vector_norm(origin.residual, dim=1).max()), ROUNDING)
        solver = dataclasses.replace(self._solver(), rtol=0.0, atol=allowed)
        solution = solve_map(f, z, solver=solver, gradient=Implicit())
        if not bool(solution.converged.all()):
            _warn("the final fit", float(solution.residual.max()), allowed)
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

    def _split(self, rows: Rows, classes: np.ndarray | None, names: np.ndarray | None) -> tuple[Rows, Rows]:
        """Return the rows of the inner and of the outer loss."""
        target = rows.target.T if classes is None else classes
        if self.cv is None:
            generator = check_random_state(self.random_state)
            splits = [holdout(len(rows.weights), self.validation_fraction, generator, classes)]
        else:
            splits = folds(self.cv, rows.features, target, classes)
        for number, split in enumerate(splits):
            name = "the split" if len(splits) == 1 else f"fold {number}"
            check_split(split, name, classes, names)
        train, held_out = zip(*splits, strict=True)
        return rows.folds(train), rows.folds(held_out)

    def _groups(self, outputs: int, num_features: int) -> np.ndarray:
        """Return the number of the penalty of each coefficient, `(k, d)`."""
        if self.groups is None:
            numbers = np.zeros(num_features, dtype=np.int64)
        elif isinstance(self.groups, str) and self.groups == "feature":
            numbers = np.arange(num_features)
        elif isinstance(self.groups, str) and self.groups == "output":
            if outputs == 1:
                raise ValueError("groups='output' needs several targets, or three or more classes; there is one output")
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
        """Return first, least and largest penalties, each `(p,)`, from the spread of their columns."""
        start, low, high = START * unit, LEAST * unit, LARGEST * unit
        if self.alpha_bounds is not None:
            if not isinstance(self.alpha_bounds, (tuple, list)) or len(self.alpha_bounds) != 2:
                raise ValueError(f"alpha_bounds must be None or a pair (low, high), got {self.alpha_bounds!r}")
            low, high = (self._positive("alpha_bounds", bound, unit) for bound in self.alpha_bounds)
            if not (low <= high).all():
                raise ValueError(f"alpha_bounds must be a pair (low, high) with low <= high, got {self.alpha_bounds!r}")
        if self.warm_start and np.size(getattr(self, "alpha_", ())) == len(unit):
            start = self._positive("alpha_", np.atleast_1d(self.alpha_), unit)
        elif self.alpha_start is not None:
            start = self._positive("alpha_start", self.alpha_start, unit)
            if self.alpha_bounds is None:
                low, high = np.minimum(low, start), np.maximum(high, start)
            elif not ((low <= start) & (start <= high)).all():
                raise ValueError(f"alpha_start={self.alpha_start!r} must lie within alpha_bounds={self.alpha_bounds!r}")
        return start.clip(low, high), low, high

    @staticmethod
    def _positive(name: str, value: Any, unit: np.ndarray) -> np.ndarray:
        numbers = np.asarray(value, dtype=np.float64)
        if numbers.shape not in ((), unit.shape) or not (np.isfinite(numbers) & (numbers > 0)).all():
            raise ValueError(f"{name} must be positive, one number or one for each penalty {unit.shape}, got {value!r}")
        return np.broadcast_to(numbers, unit.shape).copy()

    def _decision(self, X: Any) -> np.ndarray:
        """Return scores of new rows, `(n, k)`."""
        check_is_fitted(self)
        features = self._features(X, reset=False)
        return np.asarray(features @ np.atleast_2d(self.coef_).T) + self.intercept_

    def _validation(self, given: Any, **options: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        """Return features, target and weights of `(X, y)` or `(X, y, sample_weight)`."""
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise ValueError("validation must be (X, y) or (X, y, sample_weight)")
        X, y = self._features(given[0], y=given[1], reset=False, **options)
        return X, y, check_weights(given[2] if len(given) == 3 else None, X)


def check_weights(sample_weight: Any, features: Any) -> np.ndarray:
    """Return the weights of rows, `(n,)`, by default 1.

    Raises:
        ValueError: a weight below zero, or no positive one.
    """
    weights = _check_sample_weight(sample_weight, features, dtype=np.float64, ensure_non_negative=True)
    if not (weights > 0).any():
        raise ValueError("sample_weight is zero in all rows; it must be positive in some")
    return weights


def _warn(solve: str, residual: float | None = None, allowed: float | None = None) -> None:
    size = "" if residual is None else f" (norm of the gradient {residual:.1e}, allowed {allowed:.1e})"
    warnings.warn(
        f"{solve} did not converge{size}: raise max_steps of solver=LBFGS(...), raise tol, or keep the penalty away "
        "from zero with alpha_bounds",
        ConvergenceWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def _default_modes() -> Iterator[None]:
    """Turn derivatives on and autocast off, whatever the modes of the caller."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield
