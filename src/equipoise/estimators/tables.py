"""Tables of rows and labels, read from files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.feature_extraction.text import TfidfVectorizer

from equipoise.estimators.readers import (
    Column,
    Matrix,
    has_columns,
    read_columns,
    read_libsvm,
    read_npz,
    to_labels,
    to_numbers,
    to_strings,
)
from equipoise.files import DataError

TEXT = "text"  # the only column that becomes words
MAX_CATEGORIES = 100  # values of a string column that becomes indicators; one with more is left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """Conversion of named columns to numbers: unchanged, as indicators, or as TF-IDF of words.

    Args:
        label: name of the label column.
        numeric: names of the numeric columns, which stay unchanged.
        categories: values of each string column, each of which becomes an indicator; other values give zeros.
        vocabulary: words of the column `text`; empty without one.
        idf: inverse document frequencies of the words.
    """

    label: str
    numeric: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    vocabulary: tuple[str, ...] = ()
    idf: tuple[float, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the features, in the order of the columns of `X`."""
        indicators = [f"{name}={value}" for name, values in self.categories.items() for value in values]
        return [*self.numeric, *indicators, *(f"{TEXT}:{word}" for word in self.vocabulary)]

    def to_plain(self) -> dict[str, Any]:
        """Return the encoding as JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Encoding:
        """Return the encoding of `to_plain`; raises `KeyError` or `TypeError` for other data."""
        return cls(
            label=str(plain["label"]),
            numeric=tuple(map(str, plain["numeric"])),
            categories={str(name): tuple(map(str, values)) for name, values in plain["categories"].items()},
            vocabulary=tuple(map(str, plain["vocabulary"])),
            idf=tuple(map(float, plain["idf"])),
        )

    def encode(self, columns: Mapping[str, Column], where: str) -> Matrix:
        """Return the features of rows.

        Raises:
            DataError: a column is missing or of another type.
        """
        wanted = [*self.numeric, *self.categories, *([TEXT] if self.vocabulary else [])]
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise DataError(f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}")
        parts: list[Any] = [np.zeros((len(next(iter(columns.values()))), 0))]
        for name in self.numeric:
            values = to_numbers(columns[name], name, where)
            if values is None:
                raise DataError(f"{where}: column {name!r} must hold numbers, as in the training data")
            parts.append(values[:, None])
        for name, known in self.categories.items():
            parts.append(np.array(to_strings(columns[name]))[:, None] == np.array(known)[None, :])
        dense = np.concatenate(parts, 1)
        if not self.vocabulary:
            return dense
        words = TfidfVectorizer(vocabulary=list(self.vocabulary))
        words.idf_ = np.array(self.idf)
        return scipy.sparse.hstack([dense, words.transform(to_strings(columns[TEXT]))], format="csr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and their labels.

    Args:
        name: name of the data set or of the file.
        X: `(n, d)` in double precision, an array or a CSR matrix.
        y: `(n,)`: integers, floating-point numbers, or strings.
        encoding: conversion of named columns to `X`; None without names.
        notes: decisions of the reader, as sentences.
    """

    name: str
    X: Matrix
    y: np.ndarray
    encoding: Encoding | None = None
    notes: tuple[str, ...] = ()


def _breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Return 569 x 30 features, not centered, each column of standard deviation 1, and labels -1 and 1."""
    X, y = load_breast_cancer(return_X_y=True)
    return X / X.std(0), 2 * y.astype(np.int64) - 1


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Return 442 x 10 features and centered targets of a regression."""
    X, y = load_diabetes(return_X_y=True)
    return X, y - y.mean()


# Part of scikit-learn, so that a first run needs no file.
NAMED: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "breast-cancer": _breast_cancer,
    "diabetes": _diabetes,
}


def read_table(source: str | os.PathLike[str], *, label: str | None = None, drop: Sequence[str] = ()) -> Table:
    """Read a file of rows and labels.

    CSV (`.csv`, `.tsv`) needs a header. In CSV and parquet (a file, or a folder of them), numeric columns stay
    unchanged, the string column `text` becomes TF-IDF of words that occur in two rows or more, and other string columns
    become one indicator for each of their values, or are left out with a note if there are more than 100. `.npz` holds
    `X` and `y`, or the parts `data`, `indices`, `indptr`, `shape` of a CSR matrix and `y`. Other files are read as
    libsvm text, plain or compressed (`.gz`, `.bz2`).

    Args:
        source: path of the file; or `breast-cancer` or `diabetes`, the small data sets of scikit-learn.
        label: name of the label column; None: `label`, or else the last. Only for CSV and parquet.
        drop: names of columns to leave out. Only for CSV and parquet.

    Returns:
        The table; the rows are in the order of the file.

    Raises:
        DataError: the file is missing, damaged or of an unknown kind, or has missing values.

    Example:
        >>> from equipoise.estimators.tables import read_table
        >>> table = read_table("breast-cancer")
        >>> table.X.shape, sorted(set(table.y.tolist()))
        ((569, 30), [-1, 1])
    """
    if str(source) in NAMED:
        X, y = NAMED[str(source)]()
        return Table(name=str(source), X=X, y=y)
    path = Path(source)
    if not path.exists():
        raise DataError(f"there is no file {path}, nor a data set of this name; named sets: {', '.join(NAMED)}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: permission denied")
    if has_columns(path):
        return _encoded(path, label, drop)
    if label is not None or drop:
        raise DataError(f"{path} has no named columns; leave out the label column {label!r} and drop={list(drop)}")
    X, y = read_npz(path) if path.suffix == ".npz" else read_libsvm(path)
    return Table(name=path.name, X=X, y=y)


def read_rows(path: str | os.PathLike[str], encoding: Encoding) -> Matrix:
    """Return the features `(n, d)` of rows in a CSV or parquet file, in the encoding of an earlier table.

    Labels are ignored.

    Raises:
        DataError: the file is missing or damaged, lacks a column, or is of another kind.
    """
    path = Path(path)
    if not path.exists() or not has_columns(path):
        raise DataError(f"{path} is not a CSV or parquet file" if path.exists() else f"there is no file {path}")
    return encoding.encode(read_columns(path)[0], str(path))


def _encoded(path: Path, label: str | None, drop: Sequence[str]) -> Table:
    columns, typed = read_columns(path)
    label = label if label is not None else "label" if "label" in columns else list(columns)[-1]
    for name in (label, *drop):
        if name not in columns:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(columns)}")

    def numbers(name: str) -> np.ndarray | None:
        values = columns[name]
        return None if typed and isinstance(values, list) else to_numbers(values, name, str(path))

    empty = [row for row, value in enumerate(columns[label], 1) if isinstance(value, str) and not value.strip()]
    if empty:
        raise DataError(f"{path}: row {empty[0]} has no value in the label column {label!r}; drop it or fill it in")
    labels = numbers(label)
    y = to_labels(np.array(to_strings(columns[label])) if labels is None else labels, str(path))
    numeric, categories, notes = [], {}, [f"labels are in column {label!r}"]
    for name in columns:
        if name in (label, TEXT, *drop):
            continue
        if numbers(name) is not None:
            numeric.append(name)
            continue
        known = sorted(set(to_strings(columns[name])))
        if len(known) <= MAX_CATEGORIES:
            categories[name] = tuple(known)
        else:
            notes.append(f"column {name!r} is left out: it has {len(known):,} different strings")
    encoding = Encoding(label=label, numeric=tuple(numeric), categories=categories)
    if TEXT in columns and TEXT not in (label, *drop):
        words = TfidfVectorizer(min_df=2)
        try:
            words.fit(to_strings(columns[TEXT]))
        except ValueError as error:
            raise DataError(f"{path}: column {TEXT!r} holds no words that occur in two rows ({error})") from error
        vocabulary = tuple(words.get_feature_names_out().tolist())
        encoding = dataclasses.replace(encoding, vocabulary=vocabulary, idf=tuple(words.idf_.tolist()))
    if not encoding.names:
        raise DataError(f"{path} has no column to learn from beside {label!r}")
    return Table(name=path.name, X=encoding.encode(columns, str(path)), y=y, encoding=encoding, notes=tuple(notes))
