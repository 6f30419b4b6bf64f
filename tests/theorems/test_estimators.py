"""Estimators against scikit-learn at the penalty found, grids of penalties, closed forms and SciPy."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import equipoise as eq
from equipoise.estimators import BilevelLogisticRegression, BilevelNonlinearLeastSquares, BilevelRidge
from equipoise.estimators.splits import holdout

EXACT = eq.Implicit(solver=eq.LBFGS(max_steps=300, memory=30))
STEP = 0.25  # of the grids, in log alpha
TIGHT = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)


@functools.cache
def table(load: Callable[..., Any]) -> tuple[Any, np.ndarray]:
    X, y = load(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@functools.cache
def text() -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Counts of words whose frequencies fall as in a language, rows of length one; few words tell the classes."""
    rng = np.random.default_rng(0)
    rows, words = 300, 400
    y = rng.integers(2, size=rows)
    tilt = np.where(np.arange(words) % 7 == 0, 2.0, 0.0)[None] * (y[:, None] - 0.5)
    chance = np.exp(tilt) / np.arange(1, words + 1)
    X = np.stack([rng.multinomial(30, row / row.sum()) for row in chance]).astype(float)
    return scipy.sparse.csr_matrix(X / np.linalg.norm(X, axis=1, keepdims=True)), y


DATA = {
    "binary": functools.partial(table, load_breast_cancer),
    "multinomial": functools.partial(table, load_wine),
    "sparse": text,
}


def logistic(alpha: float, X: Any, y: np.ndarray, **options: Any) -> LogisticRegression:
    return LogisticRegression(C=1 / (alpha * len(y)), tol=1e-10, max_iter=10_000, **options).fit(X, y)


def logistic_value(alpha: float, X: Any, y: np.ndarray, splits: list) -> float:
    """The outer loss by hand: mean over the folds of the mean loss of their held-out rows."""
    chances = [(y[out], logistic(alpha, X[train], y[train]).predict_proba(X[out])) for train, out in splits]
    return float(np.mean([log_loss(target, chance, labels=np.unique(y)) for target, chance in chances]))


def ridge_value(alpha: float, X: np.ndarray, y: np.ndarray, splits: list) -> float:
    values = []
    for train, out in splits:
        w, center = ridge(alpha, X[train], y[train]), X[train].mean(0)
        values.append(0.5 * np.square(y[out] - y[train].mean(0) - (X[out] - center) @ w).mean(0).sum())
    return float(np.mean(values))


def ridge(alpha: Any, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coefficients in closed form, with one penalty or one for each feature."""
    Z = X - X.mean(0)
    return np.linalg.solve(Z.T @ Z / len(y) + alpha * np.eye(X.shape[1]), Z.T @ (y - y.mean(0)) / len(y))


def around(value: Callable[..., float], alpha: float, *data: Any) -> list[float]:
    """Values at the penalty and one grid step to either side."""
    return [value(alpha * math.exp(step), *data) for step in (-STEP, 0.0, STEP)]


def the_split(y: np.ndarray, classes: np.ndarray | None) -> list:
    return [holdout(len(y), 0.25, np.random.RandomState(0), classes)]


@pytest.mark.parametrize("kind", DATA)
def test_coefficients(kind: str) -> None:
    X, y = DATA[kind]()
    model = BilevelLogisticRegression(random_state=0, tol=1e-8, alpha_bounds=(1e-3, 1e2), max_iter=4).fit(X, y)
    reference = logistic(model.alpha_, X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-5)
    shift = reference.intercept_.mean() if len(model.intercept_) > 1 else 0.0
    np.testing.assert_allclose(model.intercept_, reference.intercept_ - shift, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(X), atol=1e-6)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(model.predict_proba(X)), atol=1e-9)
    assert (model.predict(X) == reference.predict(X)).all()
    assert model.validation_loss_ == pytest.approx(logistic_value(model.alpha_, X, y, the_split(y, y)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cv", [None, StratifiedKFold(3)], ids=["split", "folds"])
@pytest.mark.parametrize("kind", DATA)
def test_penalty(kind: str, cv: Any) -> None:
    X, y = DATA[kind]()
    model = BilevelLogisticRegression(random_state=0, gradient=EXACT, tol=1e-8, alpha_bounds=(1e-4, 10), cv=cv)
    splits = the_split(y, y) if cv is None else list(cv.split(X, y))
    below, at, above = around(logistic_value, model.fit(X, y).alpha_, X, y, splits)
    assert at <= above
    assert at <= below or model.alpha_ == pytest.approx(1e-4)
    assert model.validation_loss_ == pytest.approx(at, rel=2e-5)


@pytest.mark.slow
def test_penalty_of_shine() -> None:
    X, y = table(load_breast_cancer)
    value = functools.partial(logistic_value, X=X, y=y, splits=the_split(y, y))
    best = min(value(math.exp(log_alpha)) for log_alpha in np.arange(-9, 0, STEP))
    assert value(BilevelLogisticRegression(random_state=0).fit(X, y).alpha_) <= best * 1.01


@pytest.mark.parametrize("cv", [None, KFold(3)], ids=["split", "folds"])
def test_ridge(cv: Any) -> None:
    X, y = table(load_diabetes)
    model = BilevelRidge(random_state=0, gradient=EXACT, cv=cv).fit(X, y)
    splits = the_split(y, None) if cv is None else list(cv.split(X))
    below, at, above = around(ridge_value, model.alpha_, X, y, splits)
    assert at < min(below, above)
    assert model.validation_loss_ == pytest.approx(at, rel=1e-8)
    reference = Ridge(alpha=model.alpha_ * len(y)).fit(X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.predict(X), reference.predict(X), rtol=1e-6)


@pytest.mark.parametrize("groups", [None, "output"])
def test_several_targets(groups: str | None) -> None:
    X, y = table(load_diabetes)
    targets = np.stack([y, X[:, 2] * 30 + np.random.default_rng(0).standard_normal(len(y)), -y], axis=1)
    model = BilevelRidge(random_state=0, max_iter=5, groups=groups).fit(X, targets)
    assert np.shape(model.alpha_) == (() if groups is None else (3,))
    reference = Ridge(alpha=model.alpha_ * len(y)).fit(X, targets)
    np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.intercept_, reference.intercept_, rtol=1e-6, atol=1e-5)
    assert model.predict(X).shape == targets.shape


@pytest.mark.slow
def test_noise_group() -> None:
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((120, 3))
    y = signal @ [1.0, -2.0, 3.0] + 0.5 * rng.standard_normal(120)
    X = np.concatenate([signal, rng.standard_normal((120, 30))], axis=1)
    groups = ["signal"] * 3 + ["noise"] * 30
    fit = functools.partial(BilevelRidge, random_state=0, gradient=EXACT)
    shared, split = fit().fit(X, y), fit(groups=groups).fit(X, y)
    assert split.validation_loss_ < shared.validation_loss_
    noise, strength = split.alpha_  # in the order of the sorted labels
    assert noise > 10 * strength
    np.testing.assert_allclose(split.coef_, ridge([strength] * 3 + [noise] * 30, X, y), atol=1e-6)


@pytest.mark.slow
def test_more_penalties() -> None:
    X, y = table(load_wine)
    fit = functools.partial(
        BilevelLogisticRegression, random_state=0, gradient=EXACT, alpha_bounds=(1e-4, 10), cv=3, max_iter=8
    )
    shared, each = fit().fit(X, y), fit(groups="output").fit(X, y)
    assert each.alpha_.shape == (3,)
    assert each.validation_loss_ <= shared.validation_loss_ * (1 + 1e-6)
    feature = fit(groups="feature", max_iter=5).fit(X[:, :6], y)
    assert feature.validation_loss_ <= fit().fit(X[:, :6], y).validation_loss_


def test_nonlinear_least_squares() -> None:
    X, y = table(load_breast_cancer)
    X = X[:, :5]
    model = BilevelNonlinearLeastSquares(random_state=0, tol=1e-8, max_iter=4).fit(X, y)

    def residuals(w: np.ndarray) -> np.ndarray:
        errors = (y - 1 / (1 + np.exp(-X @ w[:-1] - w[-1]))) / math.sqrt(len(y))
        return np.concatenate([errors, math.sqrt(model.alpha_) * w[:-1]])

    found = np.append(model.coef_[0], model.intercept_)
    np.testing.assert_allclose(found, scipy.optimize.least_squares(residuals, found, **TIGHT).x, atol=1e-5)
    with pytest.raises(ValueError, match="binary"):
        BilevelNonlinearLeastSquares().fit(*table(load_wine))
    published = BilevelNonlinearLeastSquares(random_state=0, max_iter=2, targets=(-1, 1)).fit(X, y)
    assert published.score(X, y) > 0.6


@pytest.mark.parametrize("kind", [BilevelLogisticRegression, BilevelRidge])
def test_units(kind: Any) -> None:
    X, y = table(load_breast_cancer)
    X = X[:, :6]
    plain, scaled, one = (kind(random_state=0, max_iter=5).fit(X * unit, y) for unit in (1, 1e6, [1, 1, 1e6, 1, 1, 1]))
    np.testing.assert_allclose(scaled.alpha_, plain.alpha_ * 1e12, rtol=1e-4)
    np.testing.assert_allclose(scaled.coef_ * 1e6, plain.coef_, rtol=1e-4, atol=1e-6)
    assert one.score(X * [1, 1, 1e6, 1, 1, 1], y) > plain.score(X, y) - 0.05


@pytest.mark.parametrize("constant", [0.0, 7.3])
@pytest.mark.parametrize("container", [np.asarray, scipy.sparse.csr_matrix])
def test_constant_columns(constant: float, container: Any) -> None:
    X, y = table(load_breast_cancer)
    wide = container(np.concatenate([X[:, :3], np.full((len(y), 1), constant)], axis=1))
    model = BilevelLogisticRegression(random_state=0, max_iter=2, tol=1e-8, alpha_bounds=(1e-3, 1)).fit(wide, y)
    assert abs(model.coef_[0, 3]) < 1e-6  # of weights of size one


def test_dense_and_sparse() -> None:
    X, y = text()
    model = BilevelLogisticRegression(random_state=0, max_iter=3, alpha_start=1e-2, alpha_bounds=(1e-3, 1e-1))
    sparse, dense = (clone(model).fit(data, y) for data in (scipy.sparse.coo_array(X), X.toarray()))
    np.testing.assert_allclose(sparse.alpha_, dense.alpha_, rtol=1e-6)
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-6)


def test_score_of_folds() -> None:
    X, y = table(load_wine)
    splits = list(StratifiedKFold(3).split(X, y))
    model = BilevelLogisticRegression(cv=splits, max_iter=1, alpha_bounds=(1e-3, 1)).fit(X, y)
    scores = [logistic(model.alpha_, X[train], y[train]).score(X[out], y[out]) for train, out in splits]
    assert model.validation_score_ == pytest.approx(np.mean(scores), abs=1e-12)


def test_weights() -> None:
    """Weights are repeated rows if the validation rows are given."""
    X, y = table(load_breast_cancer)
    X, y, validation = X[:200, :5], y[:200], (X[200:, :5], y[200:])
    weights = np.random.default_rng(0).integers(3, size=200)
    fit = functools.partial(BilevelLogisticRegression().fit, validation=validation)
    weighted = fit(X, y, sample_weight=weights).coef_
    np.testing.assert_allclose(weighted, fit(X.repeat(weights, 0), y.repeat(weights)).coef_, rtol=1e-4)
    balanced = BilevelLogisticRegression(class_weight="balanced").fit(X, y, validation=validation)
    reference = logistic(balanced.alpha_, X, y, class_weight="balanced")
    np.testing.assert_allclose(balanced.coef_, reference.coef_, atol=1e-5)


def test_pipelines() -> None:
    X, y = load_wine(return_X_y=True, as_frame=True)
    model = BilevelLogisticRegression(random_state=0, max_iter=1, tol=1e-3, alpha_bounds=(1e-3, 10))
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), model)
    assert cross_val_score(pipeline, X, y, cv=2, n_jobs=1).mean() > 0.9
    assert list(pipeline.fit(X, y)[-1].feature_names_in_) == list(X.columns)
    search = GridSearchCV(model, {"gradient": [None, EXACT], "validation_fraction": [0.3]}, cv=2).fit(*table(load_wine))
    assert search.best_score_ > 0.9
