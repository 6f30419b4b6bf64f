"""Saved estimators: they predict as before, and files that are damaged or of another kind are refused."""

import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from equipoise.estimators import BilevelLogisticRegression, BilevelNonlinearLeastSquares, BilevelRidge, load, save
from equipoise.estimators.tables import Encoding
from equipoise.files import CheckpointError, read_facts, read_tensors, write_tensors
from equipoise.solvers import LBFGS


def data(classes: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(0)
    X = source.normal(size=(60, 4))
    scores = X @ source.normal(size=(4, classes)) + source.normal(size=(60, classes))
    return X, scores.argmax(1)


def fitted(kind: str) -> tuple[Any, np.ndarray]:
    X, y = data(3 if kind == "three" else 2)
    if kind in ("ridge", "ridges"):
        y = np.stack([X @ [1, 2, 3, 4], X @ [4, 3, 2, 1]], 1) + 0.1 if kind == "ridges" else X @ [1.0, -2, 0, 3] + 0.5
        return BilevelRidge(random_state=0, max_iter=3).fit(X, y), X
    if kind == "nonlinear":
        return BilevelNonlinearLeastSquares(random_state=0, max_iter=3).fit(X, y), X
    names = np.array(["low", "middle", "high"])[y] if kind == "three" else np.where(y == 0, -1, 1)
    groups = "output" if kind == "three" else None
    return BilevelLogisticRegression(groups=groups, random_state=0, max_iter=3).fit(X, names), X


@pytest.mark.parametrize("kind", ["two", "three", "ridge", "ridges", "nonlinear"])
def test_round_trip(kind: str, tmp_path: pathlib.Path) -> None:
    model, X = fitted(kind)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert type(again) is type(model)
    assert again.encoding_ is None
    assert again.outer_status_ is model.outer_status_
    assert again.get_params() == model.get_params()
    kept = ("coef_", "intercept_", "alpha_", "validation_loss_", "validation_score_", "n_iter_", "n_features_in_")
    for attribute in kept:
        before, after = getattr(model, attribute), getattr(again, attribute)
        assert np.shape(before) == np.shape(after)
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(model.predict(X), again.predict(X))
    if hasattr(model, "predict_proba"):
        assert again.classes_.tolist() == model.classes_.tolist()
        np.testing.assert_array_equal(model.predict_proba(X), again.predict_proba(X))
    with pytest.raises(ValueError, match="features"):
        again.predict(X[:, :3])


def test_parameters(tmp_path: pathlib.Path) -> None:
    X, y = data(2)
    model = BilevelLogisticRegression(
        groups=np.array([0, 0, 1, 1]), alpha_bounds=(1e-3, 1.0), alpha_start=np.array([0.1, 0.2]), max_iter=2,
        class_weight={0: 1.0, 1: 2.0}, solver=LBFGS(max_steps=99), random_state=np.random.RandomState(0),
    ).fit(X, y)  # fmt: skip
    save(model, tmp_path / "model.safetensors")
    found, default = load(tmp_path / "model.safetensors").get_params(), BilevelLogisticRegression().get_params()
    told = {"groups": (0, 0, 1, 1), "alpha_bounds": (1e-3, 1.0), "alpha_start": (0.1, 0.2), "max_iter": 2}
    assert found == {**default, **told}


def test_encoding_and_facts(tmp_path: pathlib.Path) -> None:
    model, _ = fitted("two")
    encoding = Encoding(label="y", numeric=("a", "b"), categories={"c": ("x", "z")})
    save(model, tmp_path / "model.safetensors", encoding=encoding, about={"source": "test"})
    assert load(tmp_path / "model.safetensors").encoding_ == encoding
    assert read_facts(tmp_path / "model.safetensors")["about"] == {"source": "test"}


def test_save_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        save(BilevelRidge(), tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="cannot save a dict; known: BilevelLogisticRegression"):
        save({}, tmp_path / "model.safetensors")  # type: ignore[arg-type]
    model, _ = fitted("two")
    before = (save(model, tmp_path / "model.safetensors"), (tmp_path / "model.safetensors").read_bytes())[1]
    with pytest.raises(OSError, match="nowhere"):
        save(model, tmp_path / "nowhere" / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before


CHANGES = [
    {"class": "Popen"},
    {"class": None},
    {"encoding": {"label": "y"}},
    {"num_features": 5},
    {"scalar": 3},
    {"status": "DONE"},
    {"parameters": {"alpha": 1}},
    {"classes": 7, "num_features": "many"},
    {"kind": "model"},
]


def test_damaged_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    save(fitted("two")[0], path)
    whole = path.read_bytes()
    tensors, facts = read_tensors(path)
    for content in (whole[:-8], whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            load(path)
    for change in CHANGES:
        write_tensors(path, tensors, {**facts, **change})
        with pytest.raises(CheckpointError, match=r"does not describe an estimator|holds no estimator, but 'model'"):
            load(path)
    save_file({"coef_": np.ones(3)}, path)
    with pytest.raises(CheckpointError, match="not written by equipoise"):
        load(path)
