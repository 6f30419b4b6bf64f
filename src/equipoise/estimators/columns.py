"""The sizes of columns: what penalties are measured in, and what makes the state well scaled."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from sklearn.utils.sparsefuncs import mean_variance_axis

CONSTANT = 1e-26  # share of a column's mean square below which its variance is rounding


def column_moments(features: Any, weights: np.ndarray, *, centered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and spread of each column, `(d,)`; zeros where a column is constant.

    The spread is the variance or, where columns are not `centered`, the mean square.

    Raises:
        ValueError: numbers whose squares overflow.
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
        raise ValueError("X has columns whose squares overflow; rescale them")
    spread = variance if centered else square
    return mean, np.where(spread > CONSTANT * square, spread, 0.0)


def geometric_means(spread: np.ndarray, groups: np.ndarray, num_groups: int, entries: np.ndarray) -> np.ndarray:
    """Geometric mean of the positive spreads of each group, 1 where there is none: `(d,), (k, d) -> (p,)`.

    A single column in other units hardly moves it, and columns all in other units move it as they should. Columns count
    by their number of `entries`, `(d,)`: among words it is the frequent ones that a penalty is about.
    """
    count = np.where(spread > 0, entries, 0.0)
    logs = count * np.log(np.where(spread > 0, spread, 1.0))
    sums, counts = (
        np.bincount(groups.ravel(), np.broadcast_to(part, groups.shape).ravel(), num_groups) for part in (logs, count)
    )
    return np.exp(sums / np.maximum(counts, 1))
