"""Readers of files of rows: libsvm text, npz, CSV and parquet. They refuse damaged files."""

import csv
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
from sklearn.datasets import load_svmlight_file

from equipoise.files import DataError

Matrix: TypeAlias = "np.ndarray | scipy.sparse.csr_matrix"
Column = np.ndarray | list[str]


def read_libsvm(path: Path) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """Return features and labels of libsvm text.

    Raises:
        DataError: the file is empty, truncated, or of another kind.
    """
    try:
        X, y = load_svmlight_file(str(path), dtype=np.float64)
    except (ValueError, OSError, EOFError, OverflowError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as libsvm text ({error}); name other kinds by their suffix: .csv, .tsv, .parquet, "
            ".npz"
        ) from error
    return _checked(scipy.sparse.csr_matrix(X), y, path)


def read_npz(path: Path) -> tuple[Matrix, np.ndarray]:
    """Return features and labels of an npz archive: `X` and `y`, or the parts of a CSR matrix and `y`.

    Raises:
        DataError: the file is truncated, holds other arrays or Python objects, or its arrays do not fit.
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
    """Return features in double precision and labels, both finite and of equal length."""
    if X.ndim != 2 or y.ndim != 1 or X.shape[0] != len(y):
        raise DataError(f"{path}: X must be (n, d) and y (n,), got shapes {X.shape} and {y.shape}")
    if 0 in X.shape:
        raise DataError(f"{path} holds no data: X has the shape {X.shape}")
    try:
        X = X.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: X must hold real numbers, not {X.dtype}") from error
    if not np.isfinite(X.data if scipy.sparse.issparse(X) else X).all():
        raise DataError(f"{path}: X holds values that are not finite; fill them in or drop their rows")
    return X, to_labels(y, str(path))


def has_columns(path: Path) -> bool:
    """Return whether a file is of a kind with named columns."""
    return path.is_dir() or path.suffix in (".csv", ".tsv", ".parquet")


def read_columns(path: Path) -> tuple[dict[str, Column], bool]:
    """Return the columns of CSV or parquet by name, and whether the file declares their types."""
    if path.suffix in (".csv", ".tsv") and not path.is_dir():
        return _read_csv(path), False
    return _read_parquet(path), True


def _read_csv(path: Path) -> dict[str, Column]:
    rows: list[list[str]] = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in filter(None, reader):
                if rows and len(row) != len(rows[0]):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, but the header has {len(rows[0])}; the "
                        "file is truncated or damaged, or has another separator"
                    )
                rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}; is it UTF-8 text?") from error
    if len(rows) < 2:
        raise DataError(f"{path} holds no data: it needs a header and rows")
    names = [name.strip() for name in rows[0]]
    if all(map(_is_number, names)):
        raise DataError(f"{path} has no header: its first line is {','.join(names)[:60]}; write the column names there")
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{path}: each column needs a name of its own; the header is {','.join(names)[:200]}")
    return {name: list(values) for name, values in zip(names, zip(*rows[1:], strict=True), strict=True)}


def _read_parquet(path: Path) -> dict[str, Column]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet files need pyarrow: pip install 'equipoise[data]'") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path} holds no .parquet files")
    try:
        table = pa.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); it is truncated or corrupt") from error
    if not table.num_rows or len(set(table.column_names)) < table.num_columns:
        raise DataError(f"{path} holds no rows, or two columns of one name: {', '.join(table.column_names)}")
    # Files of Hugging Face declare there which integers are class numbers.
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    columns: dict[str, Column] = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        if values.null_count:
            row = values.is_null().index(True).as_py() + 1
            raise DataError(f"{path}: row {row} has no value in column {name!r}; fill it in or drop the row")
        kind = values.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            numbers = np.asarray(values.to_numpy(), np.float64)
            classes = features.get(name, {}).get("names")
            columns[name] = [classes[int(number)] for number in numbers] if classes else numbers
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns[name] = values.to_pylist()
        else:
            raise DataError(f"{path}: column {name!r} of type {kind} holds neither numbers nor strings; drop it")
    return columns


def to_numbers(values: Column, name: str, where: str) -> np.ndarray | None:
    """Return a column as numbers; None if it holds strings.

    Raises:
        DataError: a column of numbers has gaps.
    """
    found = values
    if isinstance(values, list):
        filled = [value for value in values if value.strip()]
        if not filled or not all(map(_is_number, filled)):
            return None
        found = np.array([float(value) if value.strip() else np.nan for value in values])
    finite = np.isfinite(found)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataError(
            f"{where}: row {row + 1} has no number in column {name!r} ({values[row]!r}); fill it in or drop the row"
        )
    return np.asarray(found)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_strings(values: Column) -> list[str]:
    """Return a column as strings."""
    return values if isinstance(values, list) else [f"{value:g}" for value in values]


def to_labels(y: np.ndarray, where: str) -> np.ndarray:
    """Return labels as strings, as integers if all are whole, or as floating-point numbers.

    Raises:
        DataError: a label is not finite, or neither a number nor a string.
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
