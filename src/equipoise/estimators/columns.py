"""Moments of columns: the units of penalties and the scales of the state."""

from typing import Any

import numpy as np
import scipy.sparse
from sklearn.utils.sparsefuncs import mean_variance_axis

CONSTANT = 1e-26  # share of a column's mean square below which its variance is rounding


def column_moments(features: Any, weights: np.ndarray, *, centered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean and spread of each column, `(d,)`; the spread of a constant column is 0.

    The spread is the variance or, without `centered`, the mean square.

    Raises:
        ValueError: squares overflow.
    """
    share = weights / weights.sum()
    with np.errstate(over="ignore", invalid="ignore"):
        if scipy.sparse.issparse(features):
            mean, variance = mean_variance_axis(features, axis=0, weights=share)
        else:
            mean = share @ features
            variance = share @ np.square(features - mean)
        square = variance + np.square(mean)
    if not np.isfinite(square).all():
        raise ValueError("squares of columns of X overflow: rescale them")
    spread = variance if centered else square
    return mean, np.where(spread > CONSTANT * square, spread, 0.0)


def geometric_means(spread: np.ndarray, groups: np.ndarray, num_groups: int, entries: np.ndarray) -> np.ndarray:
    """Return the geometric mean of the positive spreads of each group, 1 without one: `(d,), (k, d) -> (p,)`.

    Other units of a single column hardly change it; other units of all columns change it by their factor. Each column
    counts by its number of `entries`, `(d,)`: a penalty of words concerns mostly the frequent ones.
    """
    count = np.where(spread > 0, entries, 0.0)
    logs = count * np.log(np.where(spread > 0, spread, 1.0))
    sums, counts = (
        np.bincount(groups.ravel(), np.broadcast_to(part, groups.shape).ravel(), num_groups) for part in (logs, count)
    )
    return np.exp(sums / np.maximum(counts, 1))
