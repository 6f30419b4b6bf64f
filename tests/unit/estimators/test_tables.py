"""Readers of tables: files are read as written, and damaged files are refused."""

import gzip
import json
import os
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import dump_svmlight_file, load_breast_cancer
from sklearn.feature_extraction.text import TfidfVectorizer

from equipoise.estimators.tables import Encoding, read_rows, read_table
from equipoise.files import DataError

CSV = """\
width,color,text,label
1.5,red,a round stone,yes
2,blue,a flat stone,no
-3e-1,red,"a ""round"", dry leaf",no
"""
PARTS = {"data": [1.0, 1], "indices": [0, 1], "indptr": [0, 1, 2], "shape": (2, 3), "y": [0, 1]}


def dense(X: Any) -> np.ndarray:
    return X.toarray() if scipy.sparse.issparse(X) else X


def example(rows: int = 12, columns: int = 5) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    source = np.random.default_rng(0)
    X = scipy.sparse.random(rows, columns, 0.5, format="csr", random_state=source)
    return X, np.where(source.random(rows) < 0.5, -1, 1)


def refused(path: pathlib.Path, message: str, content: bytes | str | None = None, **options: Any) -> None:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_table(path, **options)


def write_npz(path: pathlib.Path, **parts: Any) -> pathlib.Path:
    np.savez(path, **parts)
    return path


def write_parquet(path: pathlib.Path, columns: dict[str, Any], classes: list[str] | None = None) -> pathlib.Path:
    """Write a parquet file, with the names of the classes as in files of the hub."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table(columns)
    if classes is not None:
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


# Matrices


@pytest.mark.parametrize("name", ["rows.libsvm", "rows", "rows.txt"])
@pytest.mark.parametrize("zero_based", [False, True])
def test_libsvm(name: str, zero_based: bool, tmp_path: pathlib.Path) -> None:
    X, y = example()
    dump_svmlight_file(X, y, str(tmp_path / name), zero_based=zero_based)
    table = read_table(tmp_path / name)
    assert scipy.sparse.isspmatrix_csr(table.X)
    np.testing.assert_allclose(dense(table.X), X.toarray(), rtol=1e-14)
    assert table.y.dtype == np.int64
    assert table.y.tolist() == y.tolist()
    assert (table.name, table.encoding, table.notes) == (name, None, ())
    refused(tmp_path / name, "has no named columns; leave out the label column 'y'", label="y")
    dump_svmlight_file(X, np.linspace(-1, 1, 12), str(tmp_path / name))
    assert read_table(tmp_path / name).y.dtype == np.float64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no data"),
        (b"1 1:0.5 2:", "cannot be read as libsvm text"),
        (b"1 1:0.5\n-1 1:nan\n", "values that are not finite"),
        (b"1 1:0.5\nnan 1:1\n", "row 2 has a label that is not finite"),
        (b"a,b\n1,2\n", r"cannot be read as libsvm text .*by their suffix: .csv"),
        (b"\x00\x01\x02", "cannot be read as libsvm text"),
    ],
)
def test_damaged_libsvm(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    refused(tmp_path / "bad.libsvm", message, content)


def test_compressed_libsvm(tmp_path: pathlib.Path) -> None:
    X, y = example(200, 20)
    dump_svmlight_file(X, y, str(tmp_path / "rows"))
    whole = gzip.compress((tmp_path / "rows").read_bytes())
    (tmp_path / "rows.gz").write_bytes(whole)
    np.testing.assert_allclose(dense(read_table(tmp_path / "rows.gz").X), X.toarray(), rtol=1e-14)
    refused(tmp_path / "rows.gz", r"rows.gz cannot be read", whole[:-200])


def test_npz(tmp_path: pathlib.Path) -> None:
    X, y = example()
    table = read_table(write_npz(tmp_path / "dense.npz", X=X.toarray().astype(np.float32), y=y))
    assert isinstance(table.X, np.ndarray)
    assert table.X.dtype == np.float64
    np.testing.assert_allclose(table.X, X.toarray(), rtol=1e-6)
    parts = {"data": X.data, "indices": X.indices, "indptr": X.indptr, "shape": X.shape, "format": b"csr"}
    labels = np.where(y > 0, "up", "down")
    table = read_table(write_npz(tmp_path / "sparse.npz", y=labels, **parts))
    assert (table.X != X).nnz == 0
    assert table.y.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"X": np.ones((3, 2))}, "needs the arrays X and y, or data, indices, indptr, shape and y; it has X"),
        ({"X": np.ones((3, 2)), "y": np.ones(4)}, r"must be \(n, d\) and y \(n,\), got shapes \(3, 2\) and \(4,\)"),
        ({"X": np.ones(3), "y": np.ones(3)}, "got shapes"),
        ({"X": np.ones((0, 2)), "y": np.ones(0)}, "holds no data"),
        ({"X": np.array([[1.0], [np.inf]]), "y": np.ones(2)}, "not finite"),
        ({"X": np.array([["a"], ["b"]]), "y": np.ones(2)}, "X must hold real numbers, not <U1"),
        ({"X": np.ones((2, 1)), "y": np.array([1.0, np.nan])}, "row 2 has a label"),
        ({"X": np.ones((2, 1)), "y": np.array([b"a", b"b"]).view("V1")}, "labels must be numbers or strings"),
        ({"X": np.array([[None], [1]]), "y": np.ones(2)}, "truncated, corrupt, or holds objects"),
        ({**PARTS, "indices": [0, 9]}, "holds no CSR matrix"),
        ({**PARTS, "format": "csc"}, r"format 'csc'; save its tocsr\(\)"),
    ],
)
def test_damaged_npz(parts: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    refused(write_npz(tmp_path / "bad.npz", **parts), message)


@pytest.mark.parametrize("keep", [0, 4, 100, -30])
def test_truncated_npz(keep: int, tmp_path: pathlib.Path) -> None:
    path = write_npz(tmp_path / "bad.npz", X=np.ones((30, 2)), y=np.ones(30))
    refused(path, r"bad.npz (cannot be read|needs the arrays)", path.read_bytes()[:keep])


def test_pickles_are_not_run(tmp_path: pathlib.Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("code in a file was run",)

    refused(tmp_path / "bad.npz", "cannot be read", pickle.dumps(Trap()))
    np.save(tmp_path / "one.npy", np.ones(3))
    refused(tmp_path / "one.npz", r"holds one array, not several with names", (tmp_path / "one.npy").read_bytes())


# Columns with names


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv(suffix: str, tmp_path: pathlib.Path) -> None:
    # With a byte order mark, and with Windows' ends of lines.
    content = CSV if suffix == ".csv" else CSV.replace('"a ""round"", dry leaf"', "a round dry leaf").replace(",", "\t")
    (tmp_path / f"rows{suffix}").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    table = read_table(tmp_path / f"rows{suffix}")
    assert table.encoding is not None
    assert table.encoding.names == ["width", "color=blue", "color=red", "text:round", "text:stone"]
    assert table.y.tolist() == ["yes", "no", "no"]
    X = dense(table.X)
    np.testing.assert_array_equal(X[:, :3], [[1.5, 0, 1], [2, 1, 0], [-0.3, 0, 1]])
    words = TfidfVectorizer(min_df=2).fit_transform(["a round stone", "a flat stone", "a round dry leaf"])
    np.testing.assert_allclose(X[:, 3:], words.toarray())


@pytest.mark.parametrize(
    ("header", "label", "wanted"),
    [("x,label,z", None, [5, 6]), ("x,label,z", "z", [2.5, 4]), ("x,y,z", None, [2.5, 4]), ("x,y,z", "x", [1, 3])],
)
def test_label_column(header: str, label: str | None, wanted: list[float], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n1,5,2.5\n\n3,6,4\n")
    table = read_table(path, label=label)
    assert table.y.tolist() == wanted
    assert table.X.shape == (2, 2)
    assert len(table.notes) == 1
    last = header.split(",")[1]
    assert read_table(path, label="z", drop=["x"]).X.tolist() == [[5], [6]]
    refused(path, f"has no column 'colour'; it has x, {last}, z", label="colour")
    refused(path, "has no column 'colour'", drop=["colour"])


def test_new_rows(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(CSV)
    table = read_table(path)
    assert table.encoding is not None
    again = Encoding.from_plain(json.loads(json.dumps(table.encoding.to_plain())))
    assert again == table.encoding
    np.testing.assert_array_equal(dense(read_rows(path, again)), dense(table.X))
    path.write_text("text,width,color\nround round,4,green\n")
    np.testing.assert_allclose(dense(read_rows(path, again)), [[4, 0, 0, 1, 0]])
    for content, message in (
        ("text,width\nround,4\n", r"rows.csv lacks the columns color; it has text, width"),
        ("text,width,color\nround,wide,red\n", "column 'width' must hold numbers"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_rows(path, again)
    with pytest.raises(DataError, match="is not a CSV or parquet file"):
        read_rows(write_npz(tmp_path / "rows.npz", X=np.ones((1, 1))), again)
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.csv", again)


@pytest.mark.parametrize("values", [100, 101])
def test_columns_with_many_strings(values: int, tmp_path: pathlib.Path) -> None:
    rows = "".join(f"{i},person {i},{i % 2}\n" for i in range(values))
    (tmp_path / "rows.csv").write_text("x,name,label\n" + rows)
    table = read_table(tmp_path / "rows.csv")
    assert table.X.shape == ((101, 1) if values == 101 else (100, 101))
    assert table.notes[1:] == (("column 'name' is left out: it has 101 different strings",) if values == 101 else ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs a header and rows"),
        (b"x,label\n", "needs a header and rows"),
        (b"1,2\n3,4\n", "has no header: its first line is 1,2"),
        (b"x,x,label\n1,2,3\n", "each column needs a name of its own"),
        (b"x,,label\n1,2,3\n", "each column needs a name of its own"),
        (b"x,label\n1,2\n3\n", "line 3: 1 fields, but the header has 2; the file is truncated"),
        (b'x,label\n1,2\n"3,4', "unexpected end of data"),
        (b"x,label\n1,2\n\xff\xfe,4\n", "is it UTF-8 text"),
        (b"x,label\n1,2\n,4\n", r"row 2 has no number in column 'x' \(''\)"),
        (b"x,label\n1,2\nnan,4\n", "row 2 has no number in column 'x'"),
        (b"x,label\n1,yes\n2,\n", "row 2 has no value in the label column 'label'"),
        (b"label\n1\n2\n", "no column to learn from beside 'label'"),
        (b"text,label\nred,1\nblue,2\n", "no words that occur in two rows"),
    ],
)
def test_damaged_csv(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    refused(tmp_path / "bad.csv", message, content)


def test_parquet(tmp_path: pathlib.Path) -> None:
    columns = {"x": [1, 2, 3], "code": ["7", "8", "7"], "on": [True, False, True], "label": [0, 1, 1]}
    table = read_table(write_parquet(tmp_path / "set" / "train-0.parquet", columns, ["cat", "dog"]).parent)
    assert table.y.tolist() == ["cat", "dog", "dog"]
    assert table.encoding is not None
    assert table.encoding.names == ["x", "on", "code=7", "code=8"]  # a string of digits stays a string
    np.testing.assert_array_equal(table.X, [[1, 1, 1, 0], [2, 0, 0, 1], [3, 1, 1, 0]])
    assert read_table(write_parquet(tmp_path / "plain.parquet", columns)).y.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1.0, None], "label": [0, 1]}, "row 2 has no value in column 'x'"),
        ({"x": [[1], [2]], "label": [0, 1]}, "column 'x' of type list.* holds neither numbers nor strings"),
        ({"x": [], "label": []}, "holds no rows"),
        ({"x": [1.0, float("nan")], "label": [0, 1]}, "row 2 has no number in column 'x'"),
    ],
)
def test_damaged_parquet(columns: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    refused(write_parquet(tmp_path / "bad.parquet", columns), message)


def test_truncated_parquet(tmp_path: pathlib.Path) -> None:
    path = write_parquet(tmp_path / "torn.parquet", {"x": [1.0, 2.0], "label": [0, 1]})
    refused(path, r"torn.parquet cannot be read .*truncated or corrupt", path.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no .parquet files")


def test_named_sets(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = load_breast_cancer(return_X_y=True)
    table = read_table("breast-cancer")
    np.testing.assert_allclose(table.X * X.std(0), X)
    assert table.y.tolist() == (2 * y - 1).tolist()
    table = read_table("diabetes")
    assert table.X.shape == (442, 10)
    assert abs(table.y.mean()) < 1e-9
    refused(tmp_path / "breast", "no file .*breast, nor a data set of this name; named sets: breast-cancer, diabetes")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(tmp_path / "closed.csv", "closed.csv cannot be read: permission denied", CSV)
