"""Classifiers: logistic regression, binary and multinomial, and nonlinear least squares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import torch
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from equipoise.bilevel import OuterStep
from equipoise.estimators.base import BilevelEstimator, Rows, weigh
from equipoise.estimators.linear import Design, LogisticLoss, Loss, MultinomialLoss, SigmoidLoss


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _Classifier(ClassifierMixin, BilevelEstimator):
    """Labels to class numbers and back, class weights, probabilities."""

    class_weight: Any = None

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        validation: Any = None,
        observe: Callable[[OuterStep, float], None] | None = None,
    ) -> Any:
        """Search for the penalty, then fit with it.

        Args:
            X: `(n, d)`, dense or SciPy sparse.
            y: `(n,)` labels.
            sample_weight: `(n,)` weights >= 0; rows of weight zero are left out.
            validation: rows of the outer loss, `(X, y)` or `(X, y, sample_weight)`; then all of `X` trains, and
                `validation_fraction` and `cv` are unheeded.
            observe: called as `observe(step, score)` with each `OuterStep` of the search and the accuracy of its
                solution on the held-out rows, with their weights; the mean over the folds.

        Returns:
            The estimator itself.

        Raises:
            ValueError: data that cannot be used; a training part that lacks a class.
        """
        X, y = self._features(X, y=y)
        check_classification_targets(y)
        weights = weigh(sample_weight, X)
        kept = weights > 0
        names, numbers = np.unique(column_or_1d(y, warn=True)[kept], return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two classes, got one class only: {names[0]!r}")
        self._check_classes(names)
        balance = self._class_weights(names, numbers, weights[kept])
        rows = Rows(X if kept.all() else X[kept], numbers, weights[kept] * balance[numbers])
        judges = None if validation is None else self._judges(validation, names, balance)
        outputs = 1 if len(names) == 2 else len(names)
        weights, intercepts = self._tune(
            rows, outputs=outputs, judges=judges, classes=numbers, names=names, observe=observe
        )
        self.classes_, self.coef_, self.intercept_ = names, weights, intercepts
        return self

    def _score(self, scores: np.ndarray, rows: Rows) -> float:
        return float(accuracy_score(rows.target, self._best(scores.T), sample_weight=rows.weights))

    def _check_classes(self, names: np.ndarray) -> None:
        """Refuse more classes than the model has."""

    def _class_weights(self, names: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            sizes = np.bincount(numbers, weights)
            return sizes.sum() / (len(names) * sizes)
        return compute_class_weight(self.class_weight, classes=names, y=names[numbers])

    def _judges(self, validation: Any, names: np.ndarray, balance: np.ndarray) -> Rows:
        if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
            raise ValueError("validation must be (X, y) or (X, y, sample_weight)")
        X, y = self._features(validation[0], y=validation[1], reset=False)
        unknown = np.setdiff1d(y, names)
        if len(unknown):
            raise ValueError(f"validation has labels that y has not: {unknown[:5].tolist()}")
        numbers = np.searchsorted(names, y)
        return Rows(X, numbers, weigh(validation[2] if len(validation) == 3 else None, X) * balance[numbers])

    @staticmethod
    def _best(scores: np.ndarray) -> np.ndarray:
        """Class numbers: `(n, 1)` or `(n, k)` scores to `(n,)`."""
        return (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(1)

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores, `(n,)` for two classes, `(n, k)` for more."""
        scores = self._decision(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The label with the largest score, `(n,)`."""
        best = self._best(self._decision(X))  # says so if there was no fit
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, `(n, k)`, in the order of `classes_`."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return scipy.special.expit(np.stack([-scores, scores], axis=1))
        return scipy.special.softmax(scores, axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Their logarithms."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return scipy.special.log_expit(np.stack([-scores, scores], axis=1))
        return scipy.special.log_softmax(scores, axis=1)


class BilevelLogisticRegression(_Classifier):
    r"""Logistic regression whose penalties minimize the loss on held-out rows, found by gradient.

    $$ \min_\alpha\ \frac1m \sum_{j \text{ held out}} \ell_j(w^*(\alpha)), \qquad
       w^*(\alpha) = \arg\min_w\ \frac1n \sum_{i} \ell_i(w) + \frac12 \sum_g \alpha_g \|w_g\|^2 $$

    with the logistic loss of two classes, or the multinomial loss of more; intercepts are not penalized. The loss is a
    mean, so a penalty does not depend on the number of rows: `LogisticRegression(C=1 / (alpha_ * n))` of scikit-learn
    has the same minimum, with weights $n$ is their sum.

    Penalties apply to the coefficients on the columns as they are, as in scikit-learn. The search, however, begins and
    is bounded in units of the columns' variance, and the solver works on scaled columns: other units of `X` change
    `alpha_` and `coef_` accordingly, and nothing else. Sparse data stays sparse.

    Args:
        groups: what has a penalty of its own: None, nothing: there is one; `"feature"`; `"output"`, that is each class;
            or `(d,)` labels of groups of features.
        validation_fraction: share of the rows held out, drawn with the same share of each class.
        cv: folds instead: their number, a splitter such as `PredefinedSplit`, or an iterable of (train, test); the
            outer loss is the mean over the folds. None: `validation_fraction`.
        gradient: of the outer loss; None: SHINE without a fallback.
        solver: of the inner problem; None: `LBFGS(max_steps=1000, memory=30)`.
        alpha_start: the first penalties, one number or one for each; None: a tenth of the variance of the columns.
        alpha_bounds: least and largest penalties; None: from $10^{-7}$ to $10^5$ times the variance of the columns.
        max_iter: largest number of outer steps.
        tol: of the last fit: norm of the gradient relative to that at zero.
        fit_intercept: whether there are intercepts.
        class_weight: weights of the classes, a dictionary or `"balanced"`; they apply to both losses.
        refit: fit to all rows with the penalties found; otherwise `coef_` is that of the training part, or the mean
            over the folds.
        warm_start: begin at the penalties of the last fit.
        random_state: draws the held-out rows.

    Attributes:
        alpha_: the penalty, or `(p,)` penalties in the order of the sorted labels.
        coef_: `(1, d)` for two classes, `(k, d)` for more.
        intercept_: `(1,)` or `(k,)`.
        classes_: the labels.
        validation_loss_: the outer loss at `alpha_`.
        validation_score_: accuracy on the held-out rows there, with the weights of the loss.
        n_iter_: number of outer steps.
        outer_history_: a record of each step, see `OuterStep`; its `hyper` are logarithms of penalties.
        outer_status_: how the search ended, see `OuterStatus`.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> from sklearn.preprocessing import scale
        >>> X, y = load_breast_cancer(return_X_y=True)
        >>> X = scale(X[:, :10])
        >>> model = BilevelLogisticRegression(random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.9
        True

    Source: Pedregosa (2016), section 5; Ramzi et al. (2022), section 3.1.
    """

    def _loss(self, design: Design, rows: Rows) -> Loss:
        target, weights = torch.from_numpy(rows.target), torch.from_numpy(rows.weights)
        if design.outputs == 1:
            return LogisticLoss(design=design, target=2 * target - 1, weights=weights, mean=True)
        return MultinomialLoss(design=design, target=target, weights=weights, mean=True)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class BilevelNonlinearLeastSquares(_Classifier):
    r"""Two classes told apart by least squares on probabilities, with penalties found by gradient.

    $$ \ell_i(w) = \tfrac12 \bigl(y_i - \sigma(s_i)\bigr)^2, \qquad \sigma(s) = \frac1{1 + e^{-s}} $$

    in place of the logistic loss of `BilevelLogisticRegression`. The loss is bounded, so a row that is far on the wrong
    side counts little, and it is not convex: the solver finds the minimum that it reaches from zero, and from then on
    the one next to the last.

    Args:
        groups, validation_fraction, cv, gradient, solver, alpha_start, alpha_bounds, max_iter, tol: as in
            `BilevelLogisticRegression`.
        fit_intercept, class_weight, refit, warm_start, random_state: as there.
        targets: $y_i$ of the two classes. The published experiments take (-1, 1), which no sigmoid reaches.

    Attributes:
        alpha_, coef_, intercept_, classes_, validation_loss_, validation_score_, n_iter_, outer_history_,
        outer_status_: as there.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> from sklearn.preprocessing import scale
        >>> X, y = load_breast_cancer(return_X_y=True)
        >>> X = scale(X[:, :10])
        >>> model = BilevelNonlinearLeastSquares(random_state=0).fit(X, y)
        >>> model.score(X, y) > 0.9
        True

    Source: Ramzi et al. (2022), appendix on regularized nonlinear least squares.
    """

    targets: tuple[float, float] = (0, 1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _score(self, scores: np.ndarray, rows: Rows) -> float:
        return float(accuracy_score(rows.target, self._best(scores.T), sample_weight=rows.weights))

    def _check_classes(self, names: np.ndarray) -> None:
        if len(names) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass: "
                f"{type(self).__name__} tells two classes apart; take BilevelLogisticRegression for more"
            )

    def _loss(self, design: Design, rows: Rows) -> Loss:
        low, high = (float(value) for value in self.targets)
        target = torch.from_numpy(np.where(rows.target == 1, high, low))
        return SigmoidLoss(design=design, target=target, weights=torch.from_numpy(rows.weights), mean=True)
