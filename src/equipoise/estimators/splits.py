"""Which rows train and which judge: a random part held out, or the folds of a splitter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.model_selection import check_cv

Split = tuple[np.ndarray, np.ndarray]  # numbers of the rows that train, and of those that judge


def holdout(num_rows: int, fraction: float, generator: np.random.RandomState, classes: np.ndarray | None) -> Split:
    """A random part of the rows judges; of each class about the same share, and never all of it.

    Args:
        num_rows: n.
        fraction: share of the rows that judge.
        generator: draws the rows.
        classes: `(n,)` class numbers; None: rows are not told apart.

    Raises:
        ValueError: a fraction out of its range; too few rows.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {fraction!r}")
    order = generator.permutation(num_rows)
    labels = np.zeros(num_rows, dtype=np.int64) if classes is None else classes
    sizes = np.bincount(labels)
    quota = sizes * fraction
    taken = np.minimum(np.floor(quota), sizes - 1).clip(0)
    # What is missing to the whole share comes from the classes with the largest remainders.
    missing = max(1, round(num_rows * fraction)) - int(taken.sum())
    for number in np.argsort(taken - quota, kind="stable")[: max(missing, 0)]:
        if taken[number] < sizes[number] - 1:
            taken[number] += 1
    if taken.sum() == 0:
        of_each = "" if classes is None else " of a class"
        raise ValueError(
            f"no row is left to judge: a held-out part needs at least two rows{of_each}, got n_samples = {num_rows}; "
            "pass validation=(X, y) to fit"
        )
    judges = np.concatenate([order[labels[order] == number][: int(part)] for number, part in enumerate(taken)])
    mask = np.zeros(num_rows, dtype=bool)
    mask[judges] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def folds(cv: Any, features: Any, target: np.ndarray, classes: np.ndarray | None) -> list[Split]:
    """The splits of a number of folds, a splitter or an iterable, as scikit-learn reads `cv`."""
    labels = target if classes is None else classes
    splitter = check_cv(cv, labels, classifier=classes is not None)
    splits: Iterable[Split] = splitter.split(features, labels)
    found = [(np.asarray(train), np.asarray(judge)) for train, judge in splits]
    if not found:
        raise ValueError(f"cv={cv!r} gives no split")
    return found


def check_split(split: Split, name: str, classes: np.ndarray | None, names: np.ndarray | None) -> None:
    """Refuse a split without rows, or whose training part lacks a class: its intercept would go to minus infinity."""
    for part, rows in zip(("training", "validation"), split, strict=True):
        if len(rows) == 0:
            raise ValueError(f"the {part} part of {name} is empty")
    if classes is not None:
        assert names is not None
        absent = np.setdiff1d(classes, classes[split[0]])
        if len(absent):
            raise ValueError(
                f"the training part of {name} has no row of class {', '.join(str(names[c]) for c in absent)}; "
                "take a stratified split, fewer folds, or more rows of it"
            )
