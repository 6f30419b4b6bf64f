"""Tables of rows and labels, from files and from named data sets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from equipoise.estimators.encoding import TEXT, Encoding, has_columns, read_columns, to_numbers, to_strings
from equipoise.estimators.matrices import Matrix, read_libsvm, read_npz, to_labels
from equipoise.estimators.named import NAMED
from equipoise.files import DataError

MAX_CATEGORIES = 100  # values of a string column that becomes indicators; one with more is left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and their labels.

    Args:
        name: of the data set, or of the file.
        X: `(n, d)` in double precision, an array or a CSR matrix.
        y: `(n,)`: integers, floating point numbers, or strings.
        encoding: how columns with names became `X`; None: they have no names.
        notes: what the reader had to decide, for people.
    """

    name: str
    X: Matrix
    y: np.ndarray
    encoding: Encoding | None = None
    notes: tuple[str, ...] = ()


def read_table(
    source: str | os.PathLike[str],
    *,
    label: str | None = None,
    drop: Sequence[str] = (),
    root: str | os.PathLike[str] | None = None,
) -> Table:
    """Read a file of rows, or a named data set.

    CSV (`.csv`, `.tsv`) needs a header. In CSV and parquet (a file, or a folder of them), numeric columns are taken as
    they are, the string column `text` becomes TF-IDF of words that occur in two rows or more, and other string columns
    become one indicator for each of their values, or are left out with a note if there are more than 100. `.npz` holds
    `X` and `y`, or the parts `data`, `indices`, `indptr`, `shape` of a CSR matrix and `y`. All else is read as libsvm
    text, plain or compressed (`.gz`, `.bz2`).

    Args:
        source: path of the file, or one of the names in `equipoise.estimators.named.NAMED`.
        label: name of the column of labels; None: `label`, or else the last. Only for CSV and parquet.
        drop: names of columns to leave out. Only for CSV and parquet.
        root: folder of the named data sets; None: the one that `EQUIPOISE_DATA` names, then the usual places.

    Returns:
        The table; the rows are in the order of the file.

    Raises:
        DataError: it is missing, and the message says what was looked for; it is damaged; or it holds what is not
            understood, such as missing values.

    Example:
        >>> from equipoise.estimators.tables import read_table
        >>> table = read_table("breast-cancer")
        >>> table.X.shape, sorted(set(table.y.tolist()))
        ((569, 30), [-1, 1])
    """
    if str(source) in NAMED:
        X, y = NAMED[str(source)](root)
        return Table(name=str(source), X=X, y=y)
    path = Path(source)
    if not path.exists():
        raise DataError(f"there is no file {path}, nor a data set of this name; named sets: {', '.join(NAMED)}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: permission denied")
    if has_columns(path):
        return _encoded(path, label, drop)
    if label is not None or drop:
        raise DataError(f"{path} has no columns with names; leave out the label column {label!r} and drop={list(drop)}")
    X, y = read_npz(path) if path.suffix == ".npz" else read_libsvm(path)
    return Table(name=path.name, X=X, y=y)


def read_rows(path: str | os.PathLike[str], encoding: Encoding) -> Matrix:
    """The features `(n, d)` of rows in a CSV or parquet file, encoded as those of an earlier table; labels are ignored.

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
    labels = columns[label]
    missing = [number for number, value in enumerate(labels, 1) if isinstance(value, str) and not value.strip()]
    if missing:
        raise DataError(f"{path}: row {missing[0]} has no value in the label column {label!r}; drop it or fill it in")
    numbers = None if typed and isinstance(labels, list) else to_numbers(labels, label, str(path))
    y = to_labels(np.array(to_strings(labels)) if numbers is None else numbers, str(path))
    numeric, categories, notes = [], {}, [f"labels are in column {label!r}"]
    for name, values in columns.items():
        if name in (label, TEXT, *drop):
            continue
        if not (typed and isinstance(values, list)) and to_numbers(values, name, str(path)) is not None:
            numeric.append(name)
            continue
        known = sorted(set(to_strings(values)))
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
    X = encoding.encode(columns, str(path))
    return Table(name=path.name, X=X, y=y, encoding=encoding, notes=tuple(notes))
