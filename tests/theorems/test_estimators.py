"""Estimators against scikit-learn at the penalty found, grids of penalties, closed forms and SciPy."""

from __future__ import annotations

import functools
import importlib
import math
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, KFold, PredefinedSplit, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import equipoise as eq
from equipoise.bilevel import OuterStep
from equipoise.estimators import BilevelLogisticRegression, BilevelNonlinearLeastSquares, BilevelRidge
from equipoise.estimators.splits import holdout

EXACT = eq.Implicit(solver=eq.LBFGS(max_steps=300, memory=30))
STEP = 0.25  # of the grids, in log alpha


@functools.cache
def table(load: Any) -> tuple[np.ndarray, np.ndarray]:
    X, y = load(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@functools.cache
def text() -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Counts of words whose frequencies fall as in a language, rows of length one; few words tell the classes apart."""
    rng = np.random.default_rng(0)
    rows, words = 300, 400
    y = rng.integers(2, size=rows)
    tilt = np.where(np.arange(words) % 7 == 0, 2.0, 0.0)[None] * (y[:, None] - 0.5)
    chance = np.exp(tilt) / np.arange(1, words + 1)
    chance /= chance.sum(1, keepdims=True)
    X = np.stack([rng.multinomial(30, row) for row in chance]).astype(float)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return scipy.sparse.csr_matrix(X), y


def logistic(alpha: float, X: Any, y: np.ndarray, **options: Any) -> LogisticRegression:
    C = 1 / (alpha * len(y))
    return LogisticRegression(C=C, tol=1e-10, max_iter=10_000, **options).fit(X, y)


def held_out(alpha: float, X: Any, y: np.ndarray, splits: list) -> float:
    """The outer loss by hand: mean over the folds of the mean loss of their held-out rows."""
    losses = []
    for train, judge in splits:
        chances = logistic(alpha, X[train], y[train]).predict_proba(X[judge])
        losses.append(log_loss(y[judge], chances, labels=np.unique(y)))
    return float(np.mean(losses))


def grid(value: Any, alpha: float) -> list[float]:
    """Values at the penalty and one grid step to either side."""
    return [value(alpha * math.exp(step)) for step in (-STEP, 0.0, STEP)]


def the_split(X: Any, y: np.ndarray) -> list:
    return [holdout(len(y), 0.25, np.random.RandomState(0), y)]


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine, None], ids=["binary", "multinomial", "sparse"])
def test_coefficients_are_scikit_learns_at_the_penalty(load: Any) -> None:
    X, y = text() if load is None else table(load)
    model = BilevelLogisticRegression(random_state=0, tol=1e-8, alpha_bounds=(1e-3, 1e2), max_iter=4).fit(X, y)
    reference = logistic(model.alpha_, X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-5)
    shift = reference.intercept_.mean() if len(model.intercept_) > 1 else 0.0
    np.testing.assert_allclose(model.intercept_, reference.intercept_ - shift, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(X), atol=1e-6)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(model.predict_proba(X)), atol=1e-9)
    assert (model.predict(X) == reference.predict(X)).all()
    assert model.validation_loss_ == pytest.approx(held_out(model.alpha_, X, y, the_split(X, y)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cv", [None, StratifiedKFold(3)], ids=["split", "folds"])
@pytest.mark.parametrize("load", [load_breast_cancer, load_wine, None], ids=["binary", "multinomial", "sparse"])
def test_the_penalty_is_that_of_a_grid(load: Any, cv: Any) -> None:
    X, y = text() if load is None else table(load)
    model = BilevelLogisticRegression(random_state=0, gradient=EXACT, tol=1e-8, alpha_bounds=(1e-4, 10), cv=cv)
    model.fit(X, y)
    splits = the_split(X, y) if cv is None else list(cv.split(X, y))
    below, at, above = grid(lambda alpha: held_out(alpha, X, y, splits), model.alpha_)
    assert at <= above
    assert at <= below or model.alpha_ == pytest.approx(1e-4)
    assert model.validation_loss_ == pytest.approx(at, rel=2e-5)


@pytest.mark.slow
def test_shine_comes_close_to_the_grid() -> None:
    X, y = table(load_breast_cancer)
    model = BilevelLogisticRegression(random_state=0).fit(X, y)
    value = functools.partial(held_out, X=X, y=y, splits=the_split(X, y))
    best = min(value(math.exp(log_alpha)) for log_alpha in np.arange(-9, 0, STEP))
    assert value(model.alpha_) <= best * 1.01


def ridge_value(alpha: float, X: np.ndarray, y: np.ndarray, splits: list) -> float:
    """The outer loss in closed form."""
    values = []
    for train, judge in splits:
        center, mean = X[train].mean(0), y[train].mean(0)
        Z = X[train] - center
        w = np.linalg.solve(Z.T @ Z / len(train) + alpha * np.eye(X.shape[1]), Z.T @ (y[train] - mean) / len(train))
        values.append(0.5 * np.square(y[judge] - mean - (X[judge] - center) @ w).mean(0).sum())
    return float(np.mean(values))


@pytest.mark.parametrize("cv", [None, KFold(3)], ids=["split", "folds"])
def test_ridge_in_closed_form(cv: Any) -> None:
    X, y = table(load_diabetes)
    model = BilevelRidge(random_state=0, gradient=EXACT, cv=cv).fit(X, y)
    random = np.random.RandomState(0)
    splits = [holdout(len(y), 0.25, random, None)] if cv is None else list(cv.split(X))
    below, at, above = grid(lambda alpha: ridge_value(alpha, X, y, splits), model.alpha_)
    assert at < below
    assert at < above
    assert model.validation_loss_ == pytest.approx(at, rel=1e-8)
    reference = Ridge(alpha=model.alpha_ * len(y)).fit(X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.predict(X), reference.predict(X), rtol=1e-6)


def test_ridge_of_several_targets() -> None:
    X, y = table(load_diabetes)
    targets = np.stack([y, X[:, 2] * 30 + np.random.default_rng(0).standard_normal(len(y)), -y], axis=1)
    shared = BilevelRidge(random_state=0, max_iter=5).fit(X, targets)
    reference = Ridge(alpha=shared.alpha_ * len(y)).fit(X, targets)
    np.testing.assert_allclose(shared.coef_, reference.coef_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shared.intercept_, reference.intercept_, rtol=1e-6, atol=1e-5)
    assert shared.predict(X).shape == targets.shape
    each = BilevelRidge(random_state=0, max_iter=5, groups="output").fit(X, targets)
    assert each.alpha_.shape == (3,)
    reference = Ridge(alpha=each.alpha_ * len(y)).fit(X, targets)
    np.testing.assert_allclose(each.coef_, reference.coef_, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_group_of_noise_is_penalized_away() -> None:
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((120, 3))
    y = signal @ [1.0, -2.0, 3.0] + 0.5 * rng.standard_normal(120)
    X = np.concatenate([signal, rng.standard_normal((120, 30))], axis=1)
    groups = ["signal"] * 3 + ["noise"] * 30
    shared = BilevelRidge(random_state=0, gradient=EXACT).fit(X, y)
    split = BilevelRidge(random_state=0, gradient=EXACT, groups=groups).fit(X, y)
    assert split.validation_loss_ < shared.validation_loss_
    noise, strength = split.alpha_  # in the order of the sorted labels
    assert noise > 10 * strength
    weights = np.where(np.array(groups) == "noise", noise, strength)
    Z = X - X.mean(0)
    expected = np.linalg.solve(Z.T @ Z / 120 + np.diag(weights), Z.T @ (y - y.mean()) / 120)
    np.testing.assert_allclose(split.coef_, expected, atol=1e-6)
    with pytest.raises(ValueError, match="groups"):
        BilevelRidge(groups=groups[1:]).fit(X, y)
    with pytest.raises(ValueError, match="groups='output'"):
        BilevelRidge(groups="output").fit(X, y)


@pytest.mark.slow
def test_more_penalties_fit_the_held_out_rows_better() -> None:
    X, y = table(load_wine)
    fit = functools.partial(BilevelLogisticRegression, random_state=0, gradient=EXACT, alpha_bounds=(1e-4, 10), cv=3)
    shared, each = fit().fit(X, y), fit(groups="output").fit(X, y)
    assert each.alpha_.shape == (3,)
    assert each.validation_loss_ <= shared.validation_loss_ * (1 + 1e-6)
    feature = fit(groups="feature", max_iter=5).fit(X[:, :6], y)
    assert feature.validation_loss_ <= fit().fit(X[:, :6], y).validation_loss_


def test_nonlinear_least_squares_is_scipys() -> None:
    X, y = table(load_breast_cancer)
    X = X[:, :5]
    model = BilevelNonlinearLeastSquares(random_state=0, tol=1e-8, max_iter=4).fit(X, y)

    def residuals(w: np.ndarray) -> np.ndarray:
        fit = (y - 1 / (1 + np.exp(-X @ w[:-1] - w[-1]))) / math.sqrt(len(y))
        return np.concatenate([fit, math.sqrt(model.alpha_) * w[:-1]])

    start = np.append(model.coef_[0], model.intercept_)
    tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
    reference = scipy.optimize.least_squares(residuals, start, **tight)
    np.testing.assert_allclose(start, reference.x, atol=1e-5)
    with pytest.raises(ValueError, match="binary"):
        BilevelNonlinearLeastSquares().fit(*table(load_wine))
    published = BilevelNonlinearLeastSquares(random_state=0, max_iter=2, targets=(-1, 1)).fit(X, y)
    assert published.score(X, y) > 0.6


@pytest.mark.parametrize("kind", [BilevelLogisticRegression, BilevelRidge])
def test_other_units_change_nothing_else(kind: Any) -> None:
    X, y = table(load_breast_cancer)
    X = X[:, :6]
    plain = kind(random_state=0, max_iter=5).fit(X, y)
    scaled = kind(random_state=0, max_iter=5).fit(X * 1e6, y)
    np.testing.assert_allclose(scaled.alpha_, plain.alpha_ * 1e12, rtol=1e-4)
    np.testing.assert_allclose(scaled.coef_ * 1e6, plain.coef_, rtol=1e-4, atol=1e-6)
    one = X.copy()
    one[:, 2] *= 1e6
    model = kind(random_state=0, max_iter=5).fit(one, y)
    assert np.isfinite(model.coef_).all()
    assert model.score(one, y) > plain.score(X, y) - 0.05


def test_constant_and_empty_columns_get_no_weight() -> None:
    X, y = table(load_breast_cancer)
    for empty in (np.zeros((len(y), 1)), np.full((len(y), 1), 7.3)):
        wide = np.concatenate([X[:, :3], empty], axis=1)
        for data in (wide, scipy.sparse.csr_matrix(wide)):
            model = BilevelLogisticRegression(random_state=0, max_iter=2, tol=1e-8, alpha_bounds=(1e-3, 1)).fit(data, y)
            assert abs(model.coef_[0, 3]) < 1e-6  # of weights of size one
    model = BilevelRidge(random_state=0).fit(np.ones((10, 2)), np.arange(10.0))
    np.testing.assert_allclose(model.predict(np.ones((1, 2))), 4.5)


def test_dense_and_sparse_data_are_the_same() -> None:
    X, y = text()
    model = BilevelLogisticRegression(random_state=0, max_iter=3, alpha_start=1e-2, alpha_bounds=(1e-3, 1e-1))
    sparse, dense = (clone(model).fit(data, y) for data in (scipy.sparse.coo_array(X), X.toarray()))
    np.testing.assert_allclose(sparse.alpha_, dense.alpha_, rtol=1e-6)
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-6)


def test_fewer_rows_than_columns() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((12, 40)), np.arange(12) % 2
    model = BilevelLogisticRegression(random_state=0, max_iter=5).fit(X, y)
    assert np.isfinite(model.coef_).all()
    assert np.isfinite(BilevelRidge(random_state=0, max_iter=5).fit(X, rng.standard_normal(12)).coef_).all()


def test_given_rows_judge() -> None:
    X, y = table(load_breast_cancer)
    X = X[:, :8]
    train, judge = the_split(X, y)[0]
    fit = functools.partial(BilevelLogisticRegression, max_iter=3, alpha_bounds=(1e-3, 1))
    drawn = fit(random_state=0, refit=False).fit(X, y)
    given = fit().fit(X[train], y[train], validation=(X[judge], y[judge]))
    assert given.alpha_ == drawn.alpha_
    np.testing.assert_allclose(given.coef_, drawn.coef_, atol=1e-12)
    fold = np.full(len(y), -1)
    fold[judge] = 0
    defined = fit(cv=PredefinedSplit(fold), refit=False).fit(X, y)
    np.testing.assert_allclose(defined.coef_, drawn.coef_, atol=1e-12)
    targets = y.astype(float)
    ridge = BilevelRidge().fit(X[train], targets[train], validation=(X[judge], targets[judge]))
    assert ridge.validation_loss_ == pytest.approx(
        0.5 * np.square(ridge.predict(X[judge]) - targets[judge]).mean(), rel=1e-8
    )
    with pytest.raises(ValueError, match="labels that are not in y"):
        BilevelLogisticRegression().fit(X, y, validation=(X, y + 5))
    with pytest.raises(ValueError, match="validation must be"):
        BilevelLogisticRegression().fit(X, y, validation=X)


@pytest.mark.parametrize("kind", ["binary", "multinomial", "ridge", "ridges"])
def test_an_observer_is_told_the_held_out_score_of_each_step(kind: str) -> None:
    X, y = table(load_breast_cancer if kind == "binary" else load_wine)
    X, targets = X[:, :4], X[:, 5:7] if kind == "ridges" else X[:, 5]
    cls, wanted = (BilevelRidge, targets) if kind.startswith("ridge") else (BilevelLogisticRegression, y)
    train, judge = the_split(X, y)[0]
    weights = np.random.default_rng(0).uniform(size=len(judge))
    told: list[tuple[OuterStep, float]] = []
    model = cls(max_iter=3).fit(
        X[train],
        wanted[train],
        validation=(X[judge], wanted[judge], weights),
        observe=lambda step, score: told.append((step, score)),
    )
    assert [step for step, _ in told] == model.outer_history_
    for step, score in told:  # the model with the penalty of that step, solved further
        alpha = step.hyper[0].exp().item()
        again = cls(max_iter=1, alpha_start=alpha).fit(
            X[train], wanted[train], validation=(X[judge], wanted[judge], weights)
        )
        assert score == pytest.approx(again.score(X[judge], wanted[judge], weights), abs=0.02)
        assert again.validation_score_ == pytest.approx(again.score(X[judge], wanted[judge], weights), abs=1e-12)
        assert step.value == pytest.approx(again.validation_loss_, rel=0.02)


def test_the_held_out_score_is_the_mean_over_folds() -> None:
    X, y = table(load_wine)
    splits = list(StratifiedKFold(3).split(X, y))
    model = BilevelLogisticRegression(cv=splits, max_iter=1, alpha_bounds=(1e-3, 1)).fit(X, y)
    scores = [logistic(model.alpha_, X[train], y[train]).score(X[judge], y[judge]) for train, judge in splits]
    assert model.validation_score_ == pytest.approx(np.mean(scores), abs=1e-12)


def test_one_held_out_row_has_no_r2() -> None:
    X, y = table(load_diabetes)
    model = BilevelRidge(max_iter=1).fit(X[1:50], y[1:50], validation=(X[:1], y[:1]))
    assert math.isnan(model.validation_score_)


def test_weights_are_repeated_rows_where_the_rows_that_judge_are_given() -> None:
    X, y = table(load_breast_cancer)
    X, y, judges = X[:200, :5], y[:200], (X[200:, :5], y[200:])
    weights = np.random.default_rng(0).integers(3, size=200)
    weighted = BilevelLogisticRegression().fit(X, y, sample_weight=weights, validation=judges)
    repeated = BilevelLogisticRegression().fit(X.repeat(weights, 0), y.repeat(weights), validation=judges)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-4)
    balanced = BilevelLogisticRegression(class_weight="balanced").fit(X, y, validation=judges)
    reference = LogisticRegression(C=1 / (balanced.alpha_ * 200), class_weight="balanced", tol=1e-10).fit(X, y)
    np.testing.assert_allclose(balanced.coef_, reference.coef_, atol=1e-5)


def test_pipelines_searches_and_copies() -> None:
    X, y = load_wine(return_X_y=True, as_frame=True)
    model = BilevelLogisticRegression(random_state=0, max_iter=1, tol=1e-3, alpha_bounds=(1e-3, 10))
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), model)
    assert cross_val_score(pipeline, X, y, cv=2, n_jobs=1).mean() > 0.9
    pipeline.fit(X, y)
    assert list(pipeline[-1].feature_names_in_) == list(X.columns)
    copy = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(copy.predict_proba(X), pipeline.predict_proba(X))
    search = GridSearchCV(model, {"gradient": [None, EXACT], "validation_fraction": [0.3]}, cv=2).fit(*table(load_wine))
    assert search.best_score_ > 0.9
    assert clone(model).get_params() == model.get_params()


def test_a_fit_is_deterministic_and_leaves_torch_alone() -> None:
    X, y = table(load_breast_cancer)
    X = X[:, :5]
    model = BilevelLogisticRegression(random_state=0, max_iter=3)
    first = model.fit(X, y).coef_
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(model.fit(X, y).coef_, first)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert model.coef_.dtype == np.float64


def test_a_warm_start_is_a_start() -> None:
    X, y = table(load_diabetes)
    model = BilevelRidge(random_state=0, warm_start=True, gradient=EXACT).fit(X, y)
    alpha, steps = model.alpha_, model.n_iter_
    model.fit(X, y)
    assert model.alpha_ == pytest.approx(alpha, rel=0.05)
    assert model.outer_history_[0].hyper[0].exp().item() == pytest.approx(alpha)
    assert model.n_iter_ <= steps


def test_what_does_not_converge_warns() -> None:
    X, y = table(load_breast_cancer)
    hasty = BilevelLogisticRegression(random_state=0, solver=eq.LBFGS(max_steps=3), max_iter=2)
    with pytest.warns(ConvergenceWarning, match="max_steps"):
        hasty.fit(X, y)
    assert np.isfinite(hasty.coef_).all()


def test_data_that_cannot_be_used() -> None:
    X, y = np.random.default_rng(0).standard_normal((12, 2)), np.arange(12) % 3
    fit = BilevelLogisticRegression().fit
    with pytest.raises(ValueError, match="NaN"):
        fit(np.where(X > 1, np.nan, X), y)
    with pytest.raises(ValueError, match="class"):
        fit(X, np.zeros(12))
    with pytest.raises(ValueError, match="two rows of a class"):
        fit(X, np.arange(12))
    with pytest.raises(ValueError, match="has no row of class 2"):
        BilevelLogisticRegression(cv=[(np.flatnonzero(y < 2), np.flatnonzero(y == 2))]).fit(X, y)
    with pytest.raises(ValueError, match="overflow"):
        fit(X * 1e200, y)
    rare = np.array([0] * 6 + [1] * 5 + [2])  # the only row of a class trains
    assert len(BilevelLogisticRegression(max_iter=2, random_state=0).fit(X, rare).classes_) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": 0}, "tol"),
        ({"alpha_start": -1}, "alpha_start"),
        ({"alpha_start": 5, "alpha_bounds": (1e-3, 1)}, "alpha_start"),
        ({"alpha_bounds": 3}, "alpha_bounds"),
        ({"alpha_bounds": (2, 1)}, "alpha_bounds"),
        ({"gradient": "shine"}, "gradient"),
        ({"solver": "lbfgs"}, "solver"),
        ({"groups": "word"}, "groups"),
    ],
)
def test_options_that_cannot_be_used(options: dict, words: str) -> None:
    X, y = table(load_breast_cancer)
    with pytest.raises((ValueError, TypeError), match=words):
        BilevelLogisticRegression(**options).fit(X, y)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "equipoise.estimators")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"equipoise\[estimators\]"):
        importlib.import_module("equipoise.estimators")
