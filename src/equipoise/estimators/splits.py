"""Training and validation splits: random rows held out, or the folds of a splitter."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.model_selection import check_cv

Split = tuple[np.ndarray, np.ndarray]  # numbers of the training and of the validation rows


def holdout(num_rows: int, fraction: float, generator: np.random.RandomState, classes: np.ndarray | None) -> Split:
    """Hold out random rows: about the same share of each class, and never the whole class.

    Args:
        num_rows: n.
        fraction: share of the rows to hold out.
        generator: source of the draw.
        classes: `(n,)` class numbers; None: one class.

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
    # The rows still missing come from the classes with the largest remainders.
    missing = max(1, round(num_rows * fraction)) - int(taken.sum())
    for number in np.argsort(taken - quota, kind="stable")[: max(missing, 0)]:
        if taken[number] < sizes[number] - 1:
            taken[number] += 1
    if taken.sum() == 0:
        of_each = "" if classes is None else " of a class"
        raise ValueError(
            f"no validation row: a held-out part needs at least two rows{of_each}, got n_samples = {num_rows}; pass "
            "validation=(X, y) to fit"
        )
    mask = np.zeros(num_rows, dtype=bool)
    for number, part in enumerate(taken):
        mask[order[labels[order] == number][: int(part)]] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def folds(cv: Any, features: Any, target: np.ndarray, classes: np.ndarray | None) -> list[Split]:
    """Return the splits of a number of folds, a splitter or an iterable, as scikit-learn reads `cv`."""
    labels = target if classes is None else classes
    splitter = check_cv(cv, labels, classifier=classes is not None)
    splits: Iterable[Split] = splitter.split(features, labels)
    found = [(np.asarray(train), np.asarray(held_out)) for train, held_out in splits]
    if not found:
        raise ValueError(f"cv={cv!r} gives no split: pass at least one")
    return found


def check_split(split: Split, name: str, classes: np.ndarray | None, names: np.ndarray | None) -> None:
    """Check that a split has rows, and training rows of each class: else an intercept would go to minus infinity."""
    for part, rows in zip(("training", "validation"), split, strict=True):
        if len(rows) == 0:
            raise ValueError(f"the {part} part of {name} is empty: pass a split with rows in both parts")
    if classes is not None:
        assert names is not None
        absent = np.setdiff1d(classes, classes[split[0]])
        if len(absent):
            raise ValueError(
                f"the training part of {name} has no row of class {', '.join(str(names[c]) for c in absent)}; "
                "take a stratified split, fewer folds, or more rows of it"
            )
