"""Columns with names: read from CSV and parquet, and made into numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from equipoise.estimators.matrices import Matrix
from equipoise.files import DataError

TEXT = "text"  # the one column that becomes words
Column = np.ndarray | list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How columns with names become numbers: as they are, as indicators, or as TF-IDF of words.

    Args:
        label: name of the column of labels.
        numeric: names of the columns taken as they are.
        categories: the values of each string column, which become one indicator each; other values give zeros.
        vocabulary: the words of the column `text`; empty if there is none.
        idf: their inverse document frequencies.
    """

    label: str
    numeric: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    vocabulary: tuple[str, ...] = ()
    idf: tuple[float, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the features, in the order of their columns in `X`."""
        indicators = [f"{name}={value}" for name, values in self.categories.items() for value in values]
        return [*self.numeric, *indicators, *(f"{TEXT}:{word}" for word in self.vocabulary)]

    def to_plain(self) -> dict[str, Any]:
        """As JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Encoding:
        """The inverse of `to_plain`; a `KeyError` or `TypeError` if it is none."""
        return cls(
            label=str(plain["label"]),
            numeric=tuple(map(str, plain["numeric"])),
            categories={str(name): tuple(map(str, values)) for name, values in plain["categories"].items()},
            vocabulary=tuple(map(str, plain["vocabulary"])),
            idf=tuple(map(float, plain["idf"])),
        )

    def encode(self, columns: Mapping[str, Column], where: str) -> Matrix:
        """The features of rows.

        Raises:
            DataError: a column is missing or does not hold what it should.
        """
        wanted = [*self.numeric, *self.categories, *([TEXT] if self.vocabulary else [])]
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise DataError(f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}")
        parts: list[Any] = []
        for name in self.numeric:
            values = to_numbers(columns[name], name, where)
            if values is None:
                raise DataError(f"{where}: column {name!r} must hold numbers, as when the model was made")
            parts.append(values[:, None])
        for name, known in self.categories.items():
            parts.append(np.array(to_strings(columns[name]))[:, None] == np.array(known)[None, :])
        rows = len(next(iter(columns.values())))
        dense = np.concatenate(parts, 1).astype(np.float64) if parts else np.zeros((rows, 0))
        if not self.vocabulary:
            return dense
        words = TfidfVectorizer(vocabulary=list(self.vocabulary))
        words.idf_ = np.array(self.idf)
        return scipy.sparse.hstack([dense, words.transform(to_strings(columns[TEXT]))], format="csr")


def has_columns(path: Path) -> bool:
    """Whether a file is of a kind whose columns have names."""
    return path.is_dir() or path.suffix in (".csv", ".tsv", ".parquet")


def read_columns(path: Path) -> tuple[dict[str, Column], bool]:
    """Columns by name, and whether the file knows their types."""
    if path.suffix in (".csv", ".tsv") and not path.is_dir():
        return _read_csv(path), False
    return _read_parquet(path), True


def _read_csv(path: Path) -> dict[str, Column]:
    rows: list[list[str]] = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if rows and row and len(row) != len(rows[0]):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(rows[0])}; "
                        "the file is truncated or damaged, or has another separator"
                    )
                if row:
                    rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}; is it UTF-8 text?") from error
    if len(rows) < 2:
        raise DataError(f"{path} holds no data: it needs a header and rows")
    header, *rows = rows
    names = [name.strip() for name in header]
    if all(_is_number(name) for name in names):
        raise DataError(f"{path} has no header: its first line is {','.join(names)[:60]}; write the column names there")
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{path}: each column needs a name of its own; the header is {','.join(names)[:200]}")
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _read_parquet(path: Path) -> dict[str, Column]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet files are read by pyarrow: pip install 'equipoise[data]'") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path} holds no .parquet files")
    try:
        table = pa.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); it is truncated or corrupt") from error
    if not table.num_rows or len(set(table.column_names)) < table.num_columns:
        raise DataError(f"{path} holds no rows, or two columns of one name: {', '.join(table.column_names)}")
    # Hugging Face's files say there which integers are names of classes.
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    columns: dict[str, Column] = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        if values.null_count:
            row = values.is_null().index(True).as_py() + 1
            raise DataError(f"{path}: row {row} has no value in column {name!r}; fill it in or drop the row")
        kind = values.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            columns[name] = np.asarray(values.to_numpy(), np.float64)
            classes = features.get(name, {}).get("names")
            if classes:
                columns[name] = [classes[int(number)] for number in columns[name]]
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns[name] = values.to_pylist()
        else:
            raise DataError(f"{path}: column {name!r} of type {kind} holds neither numbers nor strings; drop it")
    return columns


def to_numbers(values: Column, name: str, where: str) -> np.ndarray | None:
    """A column as numbers; None if it holds strings.

    Raises:
        DataError: it holds numbers, and gaps.
    """
    if isinstance(values, np.ndarray):
        found = values
    else:
        filled = [value for value in values if value.strip()]
        if not filled or not all(map(_is_number, filled)):
            return None
        found = np.array([float(value) if value.strip() else np.nan for value in values])
    if not np.isfinite(found).all():
        row = int(np.argmin(np.isfinite(found)))
        raise DataError(
            f"{where}: row {row + 1} has no number in column {name!r} ({values[row]!r}); fill it in or drop"
        )
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_strings(values: Column) -> list[str]:
    """A column as strings."""
    if isinstance(values, list):
        return values
    return [f"{value:g}" for value in values]
