"""Fits of the estimators: options, validation rows, observers, warm starts and errors."""

import functools
import importlib
import math
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import PredefinedSplit
from sklearn.preprocessing import scale

import equipoise as eq
from equipoise.bilevel import OuterStep
from equipoise.estimators import BilevelLogisticRegression, BilevelRidge
from equipoise.estimators.splits import holdout

EXACT = eq.Implicit(solver=eq.LBFGS(max_steps=300, memory=30))


def table(load: Any = load_breast_cancer, columns: int = 5) -> tuple[np.ndarray, np.ndarray]:
    X, y = load(return_X_y=True)
    return scale(X)[:, :columns], y


def the_split(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return holdout(len(y), 0.25, np.random.RandomState(0), y)


@pytest.mark.slow
def test_validation_rows() -> None:
    X, y = table(columns=8)
    train, out = the_split(y)
    fit = functools.partial(BilevelLogisticRegression, max_iter=3, alpha_bounds=(1e-3, 1))
    drawn = fit(random_state=0, refit=False).fit(X, y)
    given = fit().fit(X[train], y[train], validation=(X[out], y[out]))
    assert given.alpha_ == drawn.alpha_
    np.testing.assert_allclose(given.coef_, drawn.coef_, atol=1e-12)
    fold = np.full(len(y), -1)
    fold[out] = 0
    defined = fit(cv=PredefinedSplit(fold), refit=False).fit(X, y)
    np.testing.assert_allclose(defined.coef_, drawn.coef_, atol=1e-12)
    targets = y.astype(float)
    ridge = BilevelRidge().fit(X[train], targets[train], validation=(X[out], targets[out]))
    loss = 0.5 * np.square(ridge.predict(X[out]) - targets[out]).mean()
    assert ridge.validation_loss_ == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize("kind", ["binary", "multinomial", "ridge", "ridges"])
@pytest.mark.slow
def test_observer(kind: str) -> None:
    X, y = table(load_breast_cancer if kind == "binary" else load_wine, 8)
    X, targets = X[:, :4], X[:, 5:7] if kind == "ridges" else X[:, 5]
    cls, wanted = (BilevelRidge, targets) if kind.startswith("ridge") else (BilevelLogisticRegression, y)
    train, out = the_split(y)
    validation = (X[out], wanted[out], np.random.default_rng(0).uniform(size=len(out)))
    told: list[tuple[OuterStep, float]] = []
    model = cls(max_iter=3).fit(
        X[train], wanted[train], validation=validation, observe=lambda step, score: told.append((step, score))
    )
    assert [step for step, _ in told] == model.outer_history_
    for step, score in told:  # the model with the penalty of that step, solved further
        again = cls(max_iter=1, alpha_start=step.hyper[0].exp().item())
        again.fit(X[train], wanted[train], validation=validation)
        assert score == pytest.approx(again.score(*validation), abs=0.02)
        assert again.validation_score_ == pytest.approx(again.score(*validation), abs=1e-12)
        assert step.value == pytest.approx(again.validation_loss_, rel=0.02)


def test_one_validation_row() -> None:
    X, y = table(load_diabetes)
    model = BilevelRidge(max_iter=1).fit(X[1:50], y[1:50], validation=(X[:1], y[:1]))
    assert math.isnan(model.validation_score_)


@pytest.mark.slow
def test_isolation() -> None:
    """A fit is deterministic and leaves torch's state alone."""
    X, y = table()
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
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))
    assert clone(model).get_params() == model.get_params()


@pytest.mark.slow
def test_warm_start() -> None:
    X, y = table(load_diabetes, 10)
    model = BilevelRidge(random_state=0, warm_start=True, gradient=EXACT).fit(X, y)
    alpha, steps = model.alpha_, model.n_iter_
    model.fit(X, y)
    assert model.alpha_ == pytest.approx(alpha, rel=0.05)
    assert model.outer_history_[0].hyper[0].exp().item() == pytest.approx(alpha)
    assert model.n_iter_ <= steps


def test_convergence_warning() -> None:
    hasty = BilevelLogisticRegression(random_state=0, solver=eq.LBFGS(max_steps=3), max_iter=2)
    with pytest.warns(ConvergenceWarning, match="max_steps"):
        hasty.fit(*table(columns=30))
    assert np.isfinite(hasty.coef_).all()


@pytest.mark.slow
def test_degenerate_data() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((12, 40)), np.arange(12) % 2  # fewer rows than columns
    assert np.isfinite(BilevelLogisticRegression(random_state=0, max_iter=5).fit(X, y).coef_).all()
    assert np.isfinite(BilevelRidge(random_state=0, max_iter=5).fit(X, rng.standard_normal(12)).coef_).all()
    model = BilevelRidge(random_state=0).fit(np.ones((10, 2)), np.arange(10.0))
    np.testing.assert_allclose(model.predict(np.ones((1, 2))), 4.5)
    rare = np.array([0] * 6 + [1] * 5 + [2])  # the only row of a class is a training row
    assert len(BilevelLogisticRegression(max_iter=2, random_state=0).fit(X[:, :2], rare).classes_) == 3


X12, Y12 = np.random.default_rng(0).standard_normal((12, 2)), np.arange(12) % 3


@pytest.mark.parametrize(
    ("X", "y", "options", "words"),
    [
        (np.where(X12 > 1, np.nan, X12), Y12, {}, "NaN"),
        (X12, np.zeros(12), {}, "needs at least two classes"),
        (X12, np.arange(12), {}, "two rows of a class"),
        (X12 * 1e200, Y12, {}, "overflow"),
        (X12, Y12, {"sample_weight": np.zeros(12)}, "(?i)sample.weight"),
        (X12, Y12, {"validation": (X12, Y12 + 5)}, "labels that are not in y"),
        (X12, Y12, {"validation": X12}, "validation must be"),
    ],
)
def test_data_errors(X: Any, y: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BilevelLogisticRegression().fit(X, y, **options)


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
        ({"groups": ["a"]}, "groups"),
        ({"cv": []}, "gives no split"),
        ({"cv": [(np.flatnonzero(Y12 < 2), np.flatnonzero(Y12 == 2))]}, "has no row of class 2"),
        ({"cv": [(np.arange(12), np.arange(0))]}, "the validation part of the split is empty"),
    ],
)
def test_option_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        BilevelLogisticRegression(**options).fit(X12, Y12)


def test_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="groups='output'"):
        BilevelRidge(groups="output").fit(X12, Y12)
    with pytest.raises(ValueError, match="validation has targets of shape"):
        BilevelRidge().fit(X12, Y12, validation=(X12, np.stack([Y12, Y12], 1)))
    with pytest.raises(ValueError, match="y has values whose squares overflow"):
        BilevelRidge().fit(X12, Y12 * 1e200)
    monkeypatch.delitem(sys.modules, "equipoise.estimators")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"equipoise\[estimators\]"):
        importlib.import_module("equipoise.estimators")
