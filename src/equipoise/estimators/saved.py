"""Files of fitted estimators: coefficients as safetensors, the rest as JSON. Reading one runs no code of it."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.bilevel import OuterStatus
from equipoise.estimators.classifiers import BilevelLogisticRegression, BilevelNonlinearLeastSquares
from equipoise.estimators.ridge import BilevelRidge
from equipoise.estimators.tables import Encoding
from equipoise.files import CheckpointError, read_tensors, write_tensors

Estimator = BilevelLogisticRegression | BilevelNonlinearLeastSquares | BilevelRidge
CLASSES: dict[str, type[Estimator]] = {
    cls.__name__: cls for cls in (BilevelLogisticRegression, BilevelNonlinearLeastSquares, BilevelRidge)
}
ARRAYS = ("coef_", "intercept_", "alpha_")


def save(
    model: Estimator,
    path: str | os.PathLike[str],
    *,
    encoding: Encoding | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Save a fitted estimator in one safetensors file, atomically.

    The file holds the coefficients, the penalties, the status of the search, and parameters that are numbers, strings
    or lists of them. It holds neither `outer_history_` nor a `solver`, `gradient` or splitter; after `load` these
    parameters have their defaults.

    Args:
        model: a fitted estimator of this package.
        path: path of the file; its folder exists.
        encoding: `Table.encoding`, if new rows are to be read from files.
        about: further facts as JSON data.

    Raises:
        TypeError: an estimator of another package.
        ValueError: the estimator is not fitted, or its labels are neither strings nor numbers.
        OSError: the file cannot be written; an older one of the same name stays.

    Example:
        >>> import pathlib, tempfile
        >>> from sklearn.datasets import load_diabetes
        >>> from equipoise.estimators import BilevelRidge, load, save
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = BilevelRidge(random_state=0).fit(X, y)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save(model, path)
        >>> bool((load(path).predict(X) == model.predict(X)).all())
        True
    """
    name = type(model).__name__
    if CLASSES.get(name) is not type(model):
        raise TypeError(f"cannot save a {name}; known: {', '.join(CLASSES)}")
    if not hasattr(model, "coef_"):
        raise ValueError(f"this {name} is not fitted: call fit first")
    labels = np.asarray(getattr(model, "classes_", []))
    if not all(isinstance(label, (str, int, float)) for label in labels.tolist()):
        raise ValueError(f"labels of type {labels.dtype} cannot be saved; take strings or numbers")
    names = getattr(model, "feature_names_in_", None)
    facts = {
        "kind": "estimator",
        "class": name,
        "num_features": int(model.n_features_in_),
        "names": None if names is None else [str(name) for name in names],
        "classes": labels.tolist() or None,
        "validation_loss": float(model.validation_loss_),
        "validation_score": None if math.isnan(model.validation_score_) else float(model.validation_score_),
        "num_steps": int(model.n_iter_),
        "status": model.outer_status_.name,
        "parameters": _plain(model.get_params(deep=False)),
        "scalar": [attribute for attribute in ARRAYS if np.ndim(getattr(model, attribute)) == 0],
        "encoding": None if encoding is None else encoding.to_plain(),
        "about": dict(about or {}),
    }
    tensors = {attribute: torch.tensor(np.atleast_1d(getattr(model, attribute))) for attribute in ARRAYS}
    write_tensors(Path(path), tensors, facts)


def load(path: str | os.PathLike[str]) -> Any:
    """Load an estimator from a file of `save`; its predictions are those of the saved one.

    Parameters that were sequences become tuples. The attribute `encoding_` is the `Encoding` saved with the estimator,
    or None; `read_rows(file, model.encoding_)` reads rows.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or of another kind.

    Example:
        ```python notest
        model = load("runs/tune-rows-1/model.safetensors")
        model.predict(read_rows("new.csv", model.encoding_))
        ```
    """
    tensors, facts = read_tensors(Path(path))
    if facts.get("kind") != "estimator":
        raise CheckpointError(f"{path} holds no estimator, but {facts.get('kind', 'something else')!r}")
    try:
        parameters = facts["parameters"].items()
        make: Any = CLASSES[facts["class"]]
        model = make(**{k: tuple(v) if isinstance(v, list) else v for k, v in parameters})
        for attribute in ARRAYS:
            values = tensors[attribute].numpy()
            setattr(model, attribute, float(values[0]) if attribute in facts["scalar"] else values)
        if facts["classes"] is not None:
            model.classes_ = np.array(facts["classes"])
        if facts["names"] is not None:
            model.feature_names_in_ = np.array(facts["names"], dtype=object)
        model.n_features_in_ = int(facts["num_features"])
        model.validation_loss_, model.n_iter_ = float(facts["validation_loss"]), int(facts["num_steps"])
        model.validation_score_ = math.nan if facts["validation_score"] is None else float(facts["validation_score"])
        model.outer_status_ = OuterStatus[facts["status"]]
        model.encoding_ = None if facts["encoding"] is None else Encoding.from_plain(facts["encoding"])
        if model.coef_.shape[-1] != model.n_features_in_:
            raise ValueError(f"{model.coef_.shape[-1]} coefficients for {model.n_features_in_} features")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe an estimator of this version: {error}") from error
    return model


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that JSON preserves, sequences as lists."""
    found = {}
    for name, value in parameters.items():
        plain = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        plain = list(plain) if isinstance(plain, tuple) else plain
        with contextlib.suppress(TypeError, ValueError):
            if json.loads(json.dumps(plain, allow_nan=False)) == plain:
                found[name] = plain
    return found
