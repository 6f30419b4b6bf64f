"""Readers of matrices and their labels: libsvm text and npz, refused when damaged."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
from sklearn.datasets import load_svmlight_file

from equipoise.files import DataError

Matrix: TypeAlias = "np.ndarray | scipy.sparse.csr_matrix"


def read_libsvm(path: Path) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Features and labels of libsvm text.

    Raises:
        DataError: it is empty, truncated, or something else.
    """
    try:
        X, y = load_svmlight_file(str(path), dtype=np.float64)
    except (ValueError, OSError, EOFError, OverflowError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as libsvm text ({error}); other kinds are told by their suffix: .csv, .tsv, "
            ".parquet, .npz"
        ) from error
    return _checked(scipy.sparse.csr_matrix(X), y, path)


def read_npz(path: Path) -> tuple[Matrix, np.ndarray]:
    """Features and labels of an npz archive: `X` and `y`, or the parts of a CSR matrix and `y`.

    Raises:
        DataError: it is truncated, holds other arrays or Python objects, or what it holds does not fit.
    """
    try:
        with open(path, "rb") as raw:  # NumPy leaves a file open that it cannot read
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one array, not several with names")
            parts = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); it is truncated, corrupt, or holds objects") from error
    sparse = ("data", "indices", "indptr", "shape")
    if "y" not in parts or not ("X" in parts or all(name in parts for name in sparse)):
        raise DataError(f"{path} needs the arrays X and y, or {', '.join(sparse)} and y; it has {', '.join(parts)}")
    if "X" in parts:
        return _checked(parts["X"], parts["y"], path)
    if "format" in parts and parts["format"].item() not in (b"csr", "csr"):
        raise DataError(f"{path} holds a sparse matrix of format {parts['format'].item()!r}; save its tocsr()")
    try:
        X = scipy.sparse.csr_matrix(tuple(parts[name] for name in sparse[:3]), shape=tuple(parts["shape"].tolist()))
        X.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} holds no CSR matrix: {error}") from error
    return _checked(X, parts["y"], path)


def _checked(X: Any, y: np.ndarray, path: Path) -> tuple[Matrix, np.ndarray]:
    """Features in double precision and labels, both finite and of equal length."""
    if X.ndim != 2 or y.ndim != 1 or X.shape[0] != len(y):
        raise DataError(f"{path}: X of shape {X.shape} and y of shape {y.shape} do not fit: (n, d) and (n,) are wanted")
    if 0 in X.shape:
        raise DataError(f"{path} holds no data: X has the shape {X.shape}")
    try:
        X = X.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: X must hold real numbers, not {X.dtype}") from error
    values = X.data if scipy.sparse.issparse(X) else X
    if not np.isfinite(values).all():
        raise DataError(f"{path}: X holds values that are not finite; fill them in or drop their rows")
    return X, to_labels(y, str(path))


def to_labels(y: np.ndarray, where: str) -> np.ndarray:
    """Labels as strings, as integers if all are whole, or else as numbers.

    Raises:
        DataError: one is not finite, or they are neither numbers nor strings.
    """
    if y.dtype.kind in "US":
        return y.astype(str)
    try:
        y = y.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: labels must be numbers or strings, not {y.dtype}") from error
    if not np.isfinite(y).all():
        raise DataError(f"{where}: row {int(np.argmin(np.isfinite(y))) + 1} has a label that is not finite; drop it")
    whole = y.astype(np.int64) if np.abs(y).max() < 2**53 else y
    return whole if np.array_equal(whole, y) else y
