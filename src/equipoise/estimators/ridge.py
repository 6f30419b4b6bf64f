"""Ridge regression."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.metrics import r2_score

from equipoise.bilevel import OuterStep
from equipoise.estimators.base import BilevelEstimator, Rows, check_weights
from equipoise.estimators.linear import Design, Loss, SquaredLoss


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class BilevelRidge(MultiOutputMixin, RegressorMixin, BilevelEstimator):
    r"""Ridge regression with penalties that minimize the squared error on held-out rows, found by gradient.

    $$ \min_\alpha\ \frac1{2m} \sum_{j \text{ held out}} (y_j - s_j(w^*(\alpha)))^2, \qquad
       w^*(\alpha) = \arg\min_w\ \frac1{2n} \sum_i (y_i - s_i(w))^2 + \frac12 \sum_g \alpha_g \|w_g\|^2 $$

    The loss is a mean, so a penalty does not depend on the number of rows: `Ridge(alpha=alpha_ * n)` of scikit-learn
    has the same minimum, with weights $n$ is their sum. Otherwise it works as `BilevelLogisticRegression`.

    Args:
        groups: coefficients that share a penalty. None: all; `"feature"`: those of a feature; `"output"`: those of a
            target; or `(d,)` labels of groups of features.
        validation_fraction, cv, gradient, solver, alpha_start, alpha_bounds, max_iter, tol: as in
            `BilevelLogisticRegression`.
        fit_intercept, refit, warm_start, random_state: as in `BilevelLogisticRegression`.

    Attributes:
        coef_: `(d,)`, for several targets `(k, d)`.
        intercept_: a number, for several targets `(k,)`.
        validation_score_: $R^2$ on the held-out rows, the mean over the targets.
        alpha_, validation_loss_, n_iter_, outer_history_, outer_status_: as in `BilevelLogisticRegression`.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = BilevelRidge(random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.45
        True

    Source: Pedregosa (2016), section 5.
    """

    tol: float = 1e-8

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        validation: Any = None,
        observe: Callable[[OuterStep, float], None] | None = None,
    ) -> BilevelRidge:
        """Search for the penalties, then fit with them.

        Args:
            X: `(n, d)`, dense or SciPy sparse.
            y: `(n,)` or, with several targets, `(n, k)`.
            sample_weight: `(n,)` weights >= 0; rows of weight zero are left out.
            validation: rows of the outer loss, `(X, y)` or `(X, y, sample_weight)`. All rows of `X` are then training
                rows, without regard to `validation_fraction` and `cv`.
            observe: called as `observe(step, score)` with each `OuterStep` of the search and the weighted $R^2$ of its
                solution on the held-out rows, the mean over the folds.

        Returns:
            The estimator itself.

        Raises:
            ValueError: data of the wrong kind or shape.
        """
        options = {"multi_output": True, "y_numeric": True}
        X, y = self._features(X, y=y, **options)
        weights = check_weights(sample_weight, X)
        kept = weights > 0
        # The solver gets targets of size one; the minimum is linear in them.
        share = weights / weights.sum()
        center = share @ y if self.fit_intercept else np.zeros(y.shape[1:])
        with np.errstate(over="ignore"):
            spread = float(np.sqrt((share @ np.square(y - center)).mean()))
        spread = spread if spread > 0 else 1.0
        if not np.isfinite(spread):
            raise ValueError("y has values whose squares overflow; rescale them")

        def target(y: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(((y - center) / spread).T)

        rows = Rows(X if kept.all() else X[kept], target(y[kept]), weights[kept])
        held_out = None
        if validation is not None:
            features, wanted, given = self._validation(validation, **options)
            if wanted.shape[1:] != y.shape[1:]:
                raise ValueError(f"validation has targets of shape {wanted.shape}, y has {y.shape}")
            held_out = Rows(features, target(wanted), given)
        coefficients, intercepts = self._tune(
            rows, outputs=1 if y.ndim == 1 else y.shape[1], validation=held_out, unit=spread**2, observe=observe
        )
        coefficients, intercepts = coefficients * spread, intercepts * spread + center
        self.coef_ = coefficients[0] if y.ndim == 1 else coefficients
        self.intercept_ = float(intercepts[0]) if y.ndim == 1 else intercepts
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the targets, `(n,)` or `(n, k)`."""
        values = self._decision(X)
        return values[:, 0] if self.coef_.ndim == 1 else values

    def _score(self, scores: np.ndarray, rows: Rows) -> float:
        if len(rows.weights) < 2:  # one row has no variance
            return math.nan
        return float(r2_score(rows.target.T, scores.T, sample_weight=rows.weights))

    def _loss(self, design: Design, rows: Rows) -> Loss:
        target, weights = torch.from_numpy(rows.target), torch.from_numpy(rows.weights)
        return SquaredLoss(design=design, target=target, weights=weights, mean=True)
