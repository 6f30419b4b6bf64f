"""Design matrices, dense or sparse, as linear operators that are differentiable to any order; moments of columns."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.utils.sparsefuncs import mean_variance_axis
from torch import Tensor

CONSTANT = 1e-26  # share of a column's mean square below which its variance is rounding


class _Product(torch.autograd.Function):
    """`v -> v A^T` for a constant sparse `A`. Its derivative is the same function of `A^T`, so any order exists."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, matrix: scipy.sparse.csr_array, transposed: scipy.sparse.csr_array) -> Tensor:
        ctx.matrices = transposed, matrix
        array = v.detach().numpy()
        # SciPy has a separate loop for one right-hand side; several share one pass through the matrix.
        out = (matrix @ array[0])[None] if len(array) == 1 else np.ascontiguousarray((matrix @ array.T).T)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(g, *ctx.matrices), None, None


class Design:
    r"""Design matrix as a linear operator on flat states, differentiable to any order.

    A state holds one coefficient vector for each output, followed with `intercept` by the intercepts. The scores of
    output $c$ are

    $$ s_c = (X - \mathbf 1 \mu^\top)\, \operatorname{diag}(\sigma)^{-1} z_c + b_c \mathbf 1 $$

    with $\mu$ = `offset` and $\sigma$ = `scale`, applied to the state and not to the matrix: sparse data stays sparse.
    A sparse matrix is kept in rows and in columns, so that both products run along the memory.

    Args:
        features: `(n, d)` NumPy array, torch tensor or SciPy sparse matrix.
        outputs: number of scores of a sample, k.
        intercept: whether each output has an intercept.
        offset: `(d,)` subtracted from the rows; None: 0.
        scale: `(d,)` divisor of the columns; None: 1.
        dtype: dtype of the products; None: that of floating-point features, else float64.

    Raises:
        TypeError: features or dtype of the wrong kind.
        ValueError: an argument of the wrong shape; a scale that is not positive.

    Example:
        >>> import scipy.sparse, torch
        >>> design = Design(scipy.sparse.csr_array([[1.0, 0.0], [0.0, 2.0]]), intercept=True)
        >>> design.scores(torch.tensor([[3.0, 4.0, 0.5]], dtype=torch.float64))
        tensor([[[3.5000, 8.5000]]], dtype=torch.float64)
    """

    def __init__(
        self,
        features: Any,
        *,
        outputs: int = 1,
        intercept: bool = False,
        offset: Tensor | None = None,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sparse = scipy.sparse.issparse(features)
        if not sparse and not isinstance(features, (np.ndarray, Tensor)):
            kind = type(features).__name__
            raise TypeError(f"features must be a NumPy array, a tensor or a SciPy sparse matrix, got {kind}")
        if features.ndim != 2:
            raise ValueError(f"features must be a matrix (n, d), got shape {tuple(features.shape)}")
        if dtype is None:
            dtype = {"float32": torch.float32}.get(str(features.dtype).removeprefix("torch."), torch.float64)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"Design(dtype={dtype}): must be torch.float32 or torch.float64")
        if outputs < 1:
            raise ValueError(f"Design(outputs={outputs!r}): must be >= 1")
        self.dtype = dtype
        self.outputs = outputs
        self.intercept = intercept
        self.num_rows, self.num_features = (int(size) for size in features.shape)
        if sparse:
            digits = np.float32 if dtype == torch.float32 else np.float64
            self._matrix: Any = scipy.sparse.csr_array(features, dtype=digits)
            self._transposed = scipy.sparse.csr_array(self._matrix.T)
        else:
            if isinstance(features, np.ndarray):  # torch takes no read-only memory and no negative strides
                features = np.require(features, requirements=["C", "W"])
            self._matrix = torch.as_tensor(features).to(dtype)
            self._transposed = None
        self.offset = self._column(offset, "offset")
        self.scale = self._column(scale, "scale")

    def _column(self, value: Tensor | None, name: str) -> Tensor | None:
        if value is not None and value.shape != (self.num_features,):
            raise ValueError(f"{name} must have one number per feature, ({self.num_features},), got {value.shape}")
        if value is not None and name == "scale" and not bool((value > 0).all()):
            raise ValueError("scale must be positive in every column; give constant columns the scale 1")
        return None if value is None else value.to(self.dtype)

    @property
    def num_coefficients(self) -> int:
        """Number of penalized coefficients of a state, `k d`."""
        return self.outputs * self.num_features

    @property
    def size(self) -> int:
        """Size of a flat state, `D = k d`, with intercepts `k (d + 1)`."""
        return self.num_coefficients + (self.outputs if self.intercept else 0)

    def on(self, features: Any) -> Design:
        """Return the operator of another matrix with the same columns."""
        if features.shape[1:] != (self.num_features,):
            raise ValueError(f"features must be a matrix (n, {self.num_features}), got shape {tuple(features.shape)}")
        return Design(
            features,
            outputs=self.outputs,
            intercept=self.intercept,
            offset=self.offset,
            scale=self.scale,
            dtype=self.dtype,
        )

    def rescaled(self, scale: Tensor) -> tuple[Design, Tensor]:
        """Return the operator with another scale, and the factor `(D,)` that converts states of this one to it."""
        other = copy.copy(self)
        other.scale = other._column(scale, "scale")
        ratio = scale if self.scale is None else scale / self.scale
        return other, torch.cat([ratio.repeat(self.outputs), ratio.new_ones(self.size - self.num_coefficients)])

    def coefficients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients `(B, k, d)` and intercepts `(B, k)` of a state for the original columns."""
        if z.ndim != 2 or z.shape[1] != self.size or z.dtype != self.dtype:
            raise ValueError(
                f"the state of this design must be (B, {self.size}) in {self.dtype}, got {tuple(z.shape)} in {z.dtype}"
            )
        weights = z[:, : self.num_coefficients].unflatten(1, (self.outputs, self.num_features))
        if self.scale is not None:
            weights = weights / self.scale
        intercepts = z[:, self.num_coefficients :] if self.intercept else z.new_zeros(len(z), self.outputs)
        if self.offset is not None:
            intercepts = intercepts - weights @ self.offset
        return weights, intercepts

    def scores(self, z: Tensor) -> Tensor:
        """Return the scores of all rows: `(B, D) -> (B, k, n)`."""
        weights, intercepts = self.coefficients(z)
        flat = weights.flatten(0, 1)
        if self._transposed is None:
            products = flat @ self._matrix.T
        elif flat.device.type != "cpu":
            raise ValueError(f"a sparse design needs a state on the CPU, got {flat.device}; move it, or densify X")
        else:
            products = _Product.apply(flat, self._matrix, self._transposed)
        scores = products.unflatten(0, (len(z), self.outputs))
        return scores if not self.intercept and self.offset is None else scores + intercepts[:, :, None]


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
