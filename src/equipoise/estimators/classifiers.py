"""Classifiers: logistic regression, binary and multinomial, and nonlinear least squares."""

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
from equipoise.estimators.base import BilevelEstimator, Rows, check_weights
from equipoise.estimators.linear import Design, LogisticLoss, Loss, MultinomialLoss, SigmoidLoss


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class _Classifier(ClassifierMixin, BilevelEstimator):
    """Classifier: class numbers of labels, class weights and probabilities."""

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
        """Search for the penalties, then fit with them.

        Args:
            X: `(n, d)`, dense or SciPy sparse.
            y: `(n,)` labels.
            sample_weight: `(n,)` weights >= 0; rows of weight zero are left out.
            validation: rows of the outer loss, `(X, y)` or `(X, y, sample_weight)`. All rows of `X` are then training
                rows, without regard to `validation_fraction` and `cv`.
            observe: called as `observe(step, score)` with each `OuterStep` of the search and the weighted accuracy of
                its solution on the held-out rows, the mean over the folds.

        Returns:
            The estimator itself.

        Raises:
            ValueError: data of the wrong kind or shape; a training part that lacks a class.
        """
        X, y = self._features(X, y=y)
        check_classification_targets(y)
        weights = check_weights(sample_weight, X)
        kept = weights > 0
        names, numbers = np.unique(column_or_1d(y, warn=True)[kept], return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two classes, got one class: {names[0]!r}")
        self._check_classes(names)
        balance = self._class_weights(names, numbers, weights[kept])
        rows = Rows(X if kept.all() else X[kept], numbers, weights[kept] * balance[numbers])
        held_out = None if validation is None else self._held_out(validation, names, balance)
        outputs = 1 if len(names) == 2 else len(names)
        self.coef_, self.intercept_ = self._tune(
            rows, outputs=outputs, validation=held_out, classes=numbers, names=names, observe=observe
        )
        self.classes_ = names
        return self

    def _score(self, scores: np.ndarray, rows: Rows) -> float:
        return float(accuracy_score(rows.target, self._best(scores.T), sample_weight=rows.weights))

    def _check_classes(self, names: np.ndarray) -> None:
        """Raise an error for more classes than the model has."""

    def _class_weights(self, names: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            sizes = np.bincount(numbers, weights)
            return sizes.sum() / (len(names) * sizes)
        return compute_class_weight(self.class_weight, classes=names, y=names[numbers])

    def _held_out(self, validation: Any, names: np.ndarray, balance: np.ndarray) -> Rows:
        X, y, weights = self._validation(validation)
        unknown = np.setdiff1d(y, names)
        if len(unknown):
            raise ValueError(f"validation has labels that are not in y: {unknown[:5].tolist()}")
        numbers = np.searchsorted(names, y)
        return Rows(X, numbers, weights * balance[numbers])

    @staticmethod
    def _best(scores: np.ndarray) -> np.ndarray:
        """Return the class numbers of scores: `(n, 1)` or `(n, k)` to `(n,)`."""
        return (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(1)

    def decision_function(self, X: Any) -> np.ndarray:
        """Return scores, `(n,)` for two classes, `(n, k)` for more."""
        scores = self._decision(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> np.ndarray:
        """Return the label with the largest score, `(n,)`."""
        best = self._best(self._decision(X))  # first, as it raises the error of an estimator that is not fitted
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities of the classes, `(n, k)`, in the order of `classes_`."""
        return self._link(X, scipy.special.expit, scipy.special.softmax)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of the probabilities."""
        return self._link(X, scipy.special.log_expit, scipy.special.log_softmax)

    def _link(self, X: Any, binary: Callable[..., np.ndarray], multinomial: Callable[..., np.ndarray]) -> np.ndarray:
        scores = self._decision(X)
        if scores.shape[1] == 1:
            return binary(np.concatenate([-scores, scores], axis=1))
        return multinomial(scores, axis=1)


class BilevelLogisticRegression(_Classifier):
    r"""Logistic regression with penalties that minimize the loss on held-out rows, found by gradient.

    $$ \min_\alpha\ \frac1m \sum_{j \text{ held out}} \ell_j(w^*(\alpha)), \qquad
       w^*(\alpha) = \arg\min_w\ \frac1n \sum_{i} \ell_i(w) + \frac12 \sum_g \alpha_g \|w_g\|^2 $$

    with the logistic loss of two classes, or the multinomial loss of more; intercepts are not penalized. The loss is a
    mean, so a penalty does not depend on the number of rows: `LogisticRegression(C=1 / (alpha_ * n))` of scikit-learn
    has the same minimum, with weights $n$ is their sum.

    Penalties apply to the coefficients of the original columns, as in scikit-learn. Start and bounds of the search are
    in units of the columns' variance, and the solver works on scaled columns: other units of `X` change only `alpha_`
    and `coef_`, by their factor. Sparse data stays sparse.

    Args:
        groups: coefficients that share a penalty. None: all; `"feature"`: those of a feature; `"output"`: those of a
            class; or `(d,)` labels of groups of features.
        validation_fraction: share of the rows held out, drawn with the same share of each class.
        cv: folds instead of one split: their number, a splitter such as `PredefinedSplit`, or an iterable of
            (train, test); the outer loss is the mean over the folds. None: `validation_fraction`.
        gradient: gradient of the inner solution; None: SHINE without a fallback.
        solver: inner solver; None: `LBFGS(max_steps=1000, memory=30)`.
        alpha_start: first penalties, one number or one for each; None: a tenth of the variance of the columns.
        alpha_bounds: least and largest penalties; None: from $10^{-7}$ to $10^5$ times the variance of the columns.
        max_iter: largest number of outer steps.
        tol: tolerance of the final fit: norm of the gradient relative to that at zero.
        fit_intercept: whether the model has intercepts.
        class_weight: weights of the classes in both losses, a dictionary or `"balanced"`.
        refit: fit to all rows with the penalties found; otherwise `coef_` is that of the training part, or the mean
            over the folds.
        warm_start: begin at the penalties of the last fit.
        random_state: seed or generator of the split.

    Attributes:
        alpha_: penalty, or `(p,)` penalties in the order of the sorted labels.
        coef_: `(1, d)` for two classes, `(k, d)` for more.
        intercept_: `(1,)` or `(k,)`.
        classes_: sorted labels.
        validation_loss_: outer loss at `alpha_`.
        validation_score_: accuracy on the held-out rows at `alpha_`, with the weights of the loss.
        n_iter_: number of outer steps.
        outer_history_: `OuterStep` of each step; its `hyper` are logarithms of penalties.
        outer_status_: `OuterStatus` of the search.
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
    r"""Binary classification by least squares on probabilities, with penalties found by gradient.

    $$ \ell_i(w) = \tfrac12 \bigl(y_i - \sigma(s_i)\bigr)^2, \qquad \sigma(s) = \frac1{1 + e^{-s}} $$

    in place of the logistic loss of `BilevelLogisticRegression`. The loss is bounded, so an outlier counts little. It
    is not convex: the first solve finds the minimum that it reaches from zero, each later one a minimum near the last.

    Args:
        groups, validation_fraction, cv, gradient, solver, alpha_start, alpha_bounds, max_iter, tol: as in
            `BilevelLogisticRegression`.
        fit_intercept, class_weight, refit, warm_start, random_state: as in `BilevelLogisticRegression`.
        targets: $y_i$ of the two classes. The published experiments take (-1, 1); no sigmoid reaches -1.

    Attributes:
        alpha_, coef_, intercept_, classes_: as in `BilevelLogisticRegression`.
        validation_loss_, validation_score_, n_iter_, outer_history_, outer_status_: likewise.

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

    def _check_classes(self, names: np.ndarray) -> None:
        if len(names) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass; take "
                "BilevelLogisticRegression for more than two classes"
            )

    def _loss(self, design: Design, rows: Rows) -> Loss:
        low, high = (float(value) for value in self.targets)
        target = torch.from_numpy(np.where(rows.target == 1, high, low))
        return SigmoidLoss(design=design, target=target, weights=torch.from_numpy(rows.weights), mean=True)
