"""Readers of tables: what was written is read, what is damaged is refused, and nothing is fetched."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import socket
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import dump_svmlight_file, load_breast_cancer
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.utils import Bunch

from equipoise.estimators.encoding import Encoding
from equipoise.estimators.tables import read_rows, read_table
from equipoise.files import DataError

SHARED = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or pathlib.Path(__file__).parents[3] / "shared/data")
WORDNET = pathlib.Path("/usr/share/wordnet")
CSV = """\
width,color,text,label
1.5,red,a round stone,yes
2,blue,a flat stone,no
-3e-1,red,"a ""round"", dry leaf",no
"""


@pytest.fixture(autouse=True)
def _no_network(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what a test names is found, and a connection fails the test."""
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))


def dense(X: Any) -> np.ndarray:
    return X.toarray() if scipy.sparse.issparse(X) else X


def example(rows: int = 12, columns: int = 5) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    source = np.random.default_rng(0)
    X = scipy.sparse.random(rows, columns, 0.5, format="csr", random_state=source)
    return X, np.where(source.random(rows) < 0.5, -1, 1)


def write_parquet(path: pathlib.Path, columns: dict[str, Any], classes: list[str] | None = None) -> pathlib.Path:
    """A parquet file, with the names of the labels as the hub's files have them."""
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
def test_libsvm_text_is_read(name: str, zero_based: bool, tmp_path: pathlib.Path) -> None:
    X, y = example()
    dump_svmlight_file(X, y, str(tmp_path / name), zero_based=zero_based)
    table = read_table(tmp_path / name)
    assert scipy.sparse.isspmatrix_csr(table.X)
    np.testing.assert_allclose(dense(table.X), X.toarray(), rtol=1e-14)
    assert table.y.dtype == np.int64
    assert table.y.tolist() == y.tolist()
    assert table.encoding is None


def test_libsvm_text_with_real_targets(tmp_path: pathlib.Path) -> None:
    X, _ = example()
    y = np.linspace(-1, 1, 12)
    dump_svmlight_file(X, y, str(tmp_path / "rows.libsvm"))
    assert read_table(tmp_path / "rows.libsvm").y.dtype == np.float64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no data"),
        (b"1 1:0.5 2:", "cannot be read as libsvm text"),
        (b"1 1:0.5\n-1 1:nan\n", "values that are not finite"),
        (b"1 1:0.5\nnan 1:1\n", "row 2 has a label that is not finite"),
        (b"a,b\n1,2\n", r"cannot be read as libsvm text .*told by their suffix: .csv"),
        (b"\x00\x01\x02", "cannot be read as libsvm text"),
    ],
)
def test_damaged_libsvm_text_is_refused(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "bad.libsvm").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "bad.libsvm")


def test_a_truncated_compressed_file_is_refused(tmp_path: pathlib.Path) -> None:
    import gzip

    X, y = example(200, 20)
    dump_svmlight_file(X, y, str(tmp_path / "rows"))
    whole = gzip.compress((tmp_path / "rows").read_bytes())
    (tmp_path / "rows.gz").write_bytes(whole)
    np.testing.assert_allclose(dense(read_table(tmp_path / "rows.gz").X), X.toarray(), rtol=1e-14)
    (tmp_path / "rows.gz").write_bytes(whole[:-200])
    with pytest.raises(DataError, match=r"rows.gz cannot be read"):
        read_table(tmp_path / "rows.gz")


def test_npz_of_arrays_and_of_sparse_parts(tmp_path: pathlib.Path) -> None:
    X, y = example()
    np.savez(tmp_path / "dense.npz", X=X.toarray().astype(np.float32), y=y)
    parts = {"data": X.data, "indices": X.indices, "indptr": X.indptr, "shape": X.shape, "format": b"csr"}
    np.savez(tmp_path / "sparse.npz", y=np.where(y > 0, "up", "down"), **parts)
    table = read_table(tmp_path / "dense.npz")
    assert isinstance(table.X, np.ndarray)
    assert table.X.dtype == np.float64
    np.testing.assert_allclose(table.X, X.toarray(), rtol=1e-6)
    table = read_table(tmp_path / "sparse.npz")
    assert (table.X != X).nnz == 0
    assert table.y.tolist() == ["up" if label > 0 else "down" for label in y]


def damaged_npz(tmp_path: pathlib.Path, **parts: Any) -> pathlib.Path:
    np.savez(tmp_path / "bad.npz", **parts)
    return tmp_path / "bad.npz"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"X": np.ones((3, 2))}, "needs the arrays X and y, or data, indices, indptr, shape and y; it has X"),
        ({"X": np.ones((3, 2)), "y": np.ones(4)}, r"X of shape \(3, 2\) and y of shape \(4,\) do not fit"),
        ({"X": np.ones(3), "y": np.ones(3)}, "do not fit"),
        ({"X": np.ones((0, 2)), "y": np.ones(0)}, "holds no data"),
        ({"X": np.array([[1.0], [np.inf]]), "y": np.ones(2)}, "not finite"),
        ({"X": np.array([["a"], ["b"]]), "y": np.ones(2)}, "X must hold real numbers, not <U1"),
        ({"X": np.ones((2, 1)), "y": np.array([1.0, np.nan])}, "row 2 has a label"),
        ({"X": np.array([[None], [1]]), "y": np.ones(2)}, "truncated, corrupt, or holds objects"),
        (
            {"data": [1.0, 1], "indices": [0, 9], "indptr": [0, 1, 2], "shape": (2, 3), "y": [0, 1]},
            "holds no CSR matrix",
        ),
        (
            {"data": [1.0, 1], "indices": [0, 1], "indptr": [0, 1, 2], "shape": (2, 3), "y": [0, 1], "format": "csc"},
            r"format 'csc'; save its tocsr\(\)",
        ),
    ],
)  # fmt: skip
def test_damaged_npz_is_refused(parts: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=message):
        read_table(damaged_npz(tmp_path, **parts))


@pytest.mark.parametrize("keep", [0, 4, 100, -30])
def test_a_truncated_npz_is_refused(keep: int, tmp_path: pathlib.Path) -> None:
    path = damaged_npz(tmp_path, X=np.ones((30, 2)), y=np.ones(30))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"bad.npz (cannot be read|needs the arrays)"):
        read_table(path)


def test_a_pickle_is_not_run(tmp_path: pathlib.Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("code in a file was run",)

    (tmp_path / "bad.npz").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match=r"one.npz cannot be read \(it holds one array, not several with names"):
        read_table(tmp_path / "one.npz")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "bad.npz")


# Columns with names


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_becomes_numbers_indicators_and_words(suffix: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / f"rows{suffix}"
    # With a byte order mark, and with Windows' ends of lines.
    content = CSV if suffix == ".csv" else CSV.replace('"a ""round"", dry leaf"', "a round dry leaf").replace(",", "\t")
    path.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    table = read_table(path)
    assert table.encoding is not None
    assert table.encoding.names == ["width", "color=blue", "color=red", "text:round", "text:stone"]
    assert table.y.tolist() == ["yes", "no", "no"]
    X = dense(table.X)
    np.testing.assert_array_equal(X[:, :3], [[1.5, 0, 1], [2, 1, 0], [-0.3, 0, 1]])
    words = TfidfVectorizer(min_df=2).fit_transform(["a round stone", "a flat stone", "a round dry leaf"])
    np.testing.assert_allclose(X[:, 3:], words.toarray())


def test_the_label_is_the_named_column_else_label_else_the_last(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("x,label,z\n1,5,2\n3,6,4\n")
    (tmp_path / "b.csv").write_text("x,y,z\n1,5,2.5\n3,6,4\n")
    for name, label, wanted in (("a", None, [5, 6]), ("a", "z", [2, 4]), ("b", None, [2.5, 4]), ("b", "x", [1, 3])):
        table = read_table(tmp_path / f"{name}.csv", label=label)
        assert table.y.tolist() == wanted
        assert table.X.shape == (2, 2)
        assert len(table.notes) == 1
    assert read_table(tmp_path / "b.csv", drop=["x"]).X.tolist() == [[5], [6]]


def test_new_rows_are_encoded_as_the_old_ones(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.csv").write_text(CSV)
    table = read_table(tmp_path / "rows.csv")
    assert table.encoding is not None
    again = Encoding.from_plain(json.loads(json.dumps(table.encoding.to_plain())))
    assert again == table.encoding
    np.testing.assert_array_equal(dense(read_rows(tmp_path / "rows.csv", again)), dense(table.X))
    (tmp_path / "new.csv").write_text("text,width,color\nround round,4,green\n")
    np.testing.assert_allclose(dense(read_rows(tmp_path / "new.csv", again)), [[4, 0, 0, 1, 0]])
    (tmp_path / "bad.csv").write_text("text,width\nround,4\n")
    with pytest.raises(DataError, match=r"bad.csv lacks the columns color; it has text, width"):
        read_rows(tmp_path / "bad.csv", again)
    (tmp_path / "bad.csv").write_text("text,width,color\nround,wide,red\n")
    with pytest.raises(DataError, match="column 'width' must hold numbers"):
        read_rows(tmp_path / "bad.csv", again)
    with pytest.raises(DataError, match="is not a CSV or parquet file"):
        read_rows(damaged_npz(tmp_path, X=np.ones((1, 1))), again)
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.csv", again)


def test_a_string_column_with_many_values_is_left_out_and_said(tmp_path: pathlib.Path) -> None:
    rows = "".join(f"{i},person {i},{i % 2}\n" for i in range(101))
    (tmp_path / "rows.csv").write_text("x,name,label\n" + rows)
    table = read_table(tmp_path / "rows.csv")
    assert table.X.shape == (101, 1)
    assert table.notes[1] == "column 'name' is left out: it has 101 different strings"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs a header and rows"),
        (b"x,label\n", "needs a header and rows"),
        (b"1,2\n3,4\n", "has no header: its first line is 1,2"),
        (b"x,x,label\n1,2,3\n", "each column needs a name of its own"),
        (b"x,,label\n1,2,3\n", "each column needs a name of its own"),
        (b"x,label\n1,2\n3\n", "line 3: 1 fields where the header has 2; the file is truncated"),
        (b'x,label\n1,2\n"3,4', "unexpected end of data"),
        (b"x,label\n1,2\n\xff\xfe,4\n", "is it UTF-8 text"),
        (b"x,label\n1,2\n,4\n", "row 2 has no number in column 'x'"),
        (b"x,label\n1,2\nnan,4\n", "row 2 has no number in column 'x'"),
        (b"x,label\n1,yes\n2,\n", "row 2 has no value in the label column 'label'"),
        (b"label\n1\n2\n", "no column to learn from beside 'label'"),
        (b"text,label\nred,1\nblue,2\n", "no words that occur in two rows"),
    ],
)
def test_damaged_csv_is_refused(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "bad.csv")


def test_columns_that_are_not_there_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.csv").write_text(CSV)
    with pytest.raises(DataError, match="has no column 'colour'; it has width, color, text, label"):
        read_table(tmp_path / "rows.csv", label="colour")
    with pytest.raises(DataError, match="has no column 'colour'"):
        read_table(tmp_path / "rows.csv", drop=["colour"])
    X, y = example()
    dump_svmlight_file(X, y, str(tmp_path / "rows"))
    with pytest.raises(DataError, match="has no columns with names; leave out the label column 'y'"):
        read_table(tmp_path / "rows", label="y")


def test_parquet_is_read_with_the_names_of_its_classes(tmp_path: pathlib.Path) -> None:
    columns = {"x": [1, 2, 3], "code": ["7", "8", "7"], "on": [True, False, True], "label": [0, 1, 1]}
    table = read_table(write_parquet(tmp_path / "set" / "train-0.parquet", columns, ["cat", "dog"]).parent)
    assert table.y.tolist() == ["cat", "dog", "dog"]
    assert table.encoding is not None
    assert table.encoding.names == ["x", "on", "code=7", "code=8"]  # a typed string is no number
    np.testing.assert_array_equal(table.X, [[1, 1, 1, 0], [2, 0, 0, 1], [3, 1, 1, 0]])
    assert read_table(write_parquet(tmp_path / "plain.parquet", columns)).y.tolist() == [0, 1, 1]


def test_damaged_parquet_is_refused(tmp_path: pathlib.Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", {"x": [1.0, 2.0], "label": [0, 1]}).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"torn.parquet cannot be read .*truncated or corrupt"):
        read_table(tmp_path / "torn.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no .parquet files"):
        read_table(tmp_path / "empty")
    for columns, message in (
        ({"x": [1.0, None], "label": [0, 1]}, "row 2 has no value in column 'x'"),
        ({"x": [[1], [2]], "label": [0, 1]}, "column 'x' of type list.* holds neither numbers nor strings"),
        ({"x": [], "label": []}, "holds no rows"),
        ({"x": [1.0, float("nan")], "label": [0, 1]}, "row 2 has no number in column 'x'"),
    ):
        with pytest.raises(DataError, match=message):
            read_table(write_parquet(tmp_path / "bad.parquet", columns))


# Named sets


def test_the_embedded_sets() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    table = read_table("breast-cancer")
    np.testing.assert_allclose(table.X * X.std(0), X)
    assert ((table.y > 0) == (y == 1)).all()
    table = read_table("diabetes")
    assert table.X.shape == (442, 10)
    assert abs(table.y.mean()) < 1e-9


def posts(count: int = 40) -> tuple[list[str], np.ndarray]:
    return [f"From: someone{i}\n\nword{i % 20} common text" for i in range(count)], np.arange(count) % 20


def check_newsgroups(table: Any, texts: list[str], groups: np.ndarray) -> None:
    counts = CountVectorizer().fit_transform(texts).toarray()
    np.testing.assert_allclose(dense(table.X), counts / np.linalg.norm(counts, axis=1, keepdims=True))
    assert table.y.tolist() == [-1 if group < 10 else 1 for group in groups]


@pytest.mark.parametrize("named", [False, True])
def test_newsgroups_from_parquet(named: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, groups = posts()
    classes = [f"group.{chr(97 + i)}" for i in range(20)] if named else None
    path = tmp_path / "data" / "20newsgroups" / "train-00000-of-00001.parquet"
    write_parquet(path, {"text": texts, "label": groups, "id": texts}, classes)
    check_newsgroups(read_table("20newsgroups", root=tmp_path / "data"), texts, groups)
    check_newsgroups(read_table("20newsgroups", root=path.parent), texts, groups)
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path / "data"))
    check_newsgroups(read_table("20newsgroups"), texts, groups)


def test_newsgroups_that_scikit_learn_fetched(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts, groups = posts()
    names = [f"group.{i:02d}" for i in range(20)]
    half = {"filenames": np.array(["f"] * 20), "target_names": names, "DESCR": ""}
    parts = {
        kind: Bunch(data=texts[rows], target=groups[rows], **half)
        for kind, rows in (("train", slice(0, 20)), ("test", slice(20, 40)))
    }
    home = tmp_path / "sklearn"
    home.mkdir()
    import codecs

    content = codecs.encode(pickle.dumps(parts), "zlib_codec")
    (home / "20news-bydate_py3.pkz").write_bytes(content)
    table = read_table("20newsgroups")  # scikit-learn shuffles the posts
    assert table.X.shape[0] == 40
    assert (table.y == 1).sum() == 20
    (home / "20news-bydate_py3.pkz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"20news-bydate_py3.pkz is damaged: delete it and fetch it again"):
        read_table("20newsgroups")


def test_newsgroups_of_another_kind_are_refused(tmp_path: pathlib.Path) -> None:
    path = write_parquet(tmp_path / "20newsgroups" / "a.parquet", {"text": ["a b"], "label": [0]})
    with pytest.raises(DataError, match="has 1 labels, not 20"):
        read_table("20newsgroups", root=tmp_path)
    write_parquet(path, {"words": ["a b"], "label": [0]})
    with pytest.raises(DataError, match="needs the columns text and label; it has words, label"):
        read_table("20newsgroups", root=tmp_path)


def wordnet_file(entries: list[tuple[int, str]]) -> bytes:
    """A data file in WordNet's layout: an indented licence, and lines that begin with their own place."""
    content = b"  1 This software and database is being provided to you  \n"
    for number, gloss in entries:
        line = f"{len(content):08d} {number:02d} n 01 word 0 000 | {gloss}  \n"
        content += line.encode()
    return content


@pytest.fixture
def wordnet(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name in ("data.adj", "data.adv", "data.verb"):
        (folder / name).write_bytes(wordnet_file([(int(name == "data.verb") * 30, "having much of it")]))
    entries = [(5, "a small animal"), (20, "a small plant"), (5, "an animal | with horns"), (6, "a thing")]
    (folder / "data.noun").write_bytes(wordnet_file(entries))
    return folder


def test_wordnet_glosses(wordnet: pathlib.Path) -> None:
    table = read_table("wordnet-animal-plant", root=wordnet.parent)
    assert table.y.tolist() == [-1, 1, -1]
    words = TfidfVectorizer(min_df=2).fit_transform(["a small animal", "a small plant", "an animal | with horns"])
    np.testing.assert_array_equal(dense(table.X), words.toarray())
    assert read_table("wordnet-45", root=wordnet).y.tolist() == [0, 0, 5, 20, 5, 6, 30]


@pytest.mark.parametrize("keep", [0, 30, 100, -2, -20])
def test_a_truncated_wordnet_is_refused(keep: int, wordnet: pathlib.Path) -> None:
    path = wordnet / "data.noun"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"data.noun (is damaged at byte|holds no glosses)"):
        read_table("wordnet-45", root=wordnet)


def test_a_wordnet_with_a_gap_is_refused(wordnet: pathlib.Path) -> None:
    path = wordnet / "data.noun"
    path.write_bytes(path.read_bytes().replace(b" small", b""))
    with pytest.raises(DataError, match=r"data.noun is damaged at byte 99"):
        read_table("wordnet-45", root=wordnet)
    (wordnet / "data.verb").unlink()
    (wordnet / "data.noun").write_bytes(wordnet_file([(5, "x")]))
    with pytest.raises(DataError, match=r"data.verb cannot be read: No such file"):
        read_table("wordnet-45", root=wordnet)


@pytest.mark.parametrize("name", ["real-sim", "real-sim/real-sim"])
def test_real_sim(name: str, tmp_path: pathlib.Path) -> None:
    X, y = example()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    dump_svmlight_file(X, y, str(tmp_path / name))
    table = read_table("real-sim", root=tmp_path)
    np.testing.assert_allclose(dense(table.X), X.toarray(), rtol=1e-14)


def test_what_is_missing_is_said_with_what_was_looked_for(tmp_path: pathlib.Path) -> None:
    for name, message in (
        ("20newsgroups", r"no 20 Newsgroups: looked for .*empty/20newsgroups/\*.parquet.*run once: python -c"),
        ("wordnet-45", r"no WordNet: looked for data.adj.* in .*empty, .*Install Debian's wordnet-base"),
        ("real-sim", r"no real-sim: looked for .*empty/real-sim.bz2.*Fetch real-sim.bz2 from the LIBSVM"),
    ):
        with pytest.raises(DataError, match=message):
            read_table(name, root=tmp_path / "empty")
    with pytest.raises(DataError, match="for neither --root nor EQUIPOISE_DATA names a folder"):
        read_table("real-sim")
    with pytest.raises(DataError, match=r"no 20 Newsgroups: looked for \$EQUIPOISE_DATA/20newsgroups \(it is not"):
        read_table("20newsgroups")
    with pytest.raises(DataError, match=r"there is no file .*breast, nor a data set of this name; named sets: breast"):
        read_table(tmp_path / "breast")
    assert not (tmp_path / "sklearn").exists()  # scikit-learn makes its folder before it looks


@pytest.mark.slow
@pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="Debian's wordnet-base is not installed")
def test_the_real_wordnet() -> None:
    table = read_table("wordnet-animal-plant")
    assert table.X.shape[0] == 15_539
    assert (table.y == -1).sum() == 7_509


@pytest.mark.slow
@pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="Debian's wordnet-base is not installed")
def test_the_whole_real_wordnet() -> None:
    table = read_table("wordnet-45")
    assert table.X.shape == (117_659, 34_407)
    assert sorted(set(table.y.tolist())) == list(range(45))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "20newsgroups").is_dir(), reason=f"no 20newsgroups in {SHARED}")
def test_the_real_newsgroups() -> None:
    table = read_table("20newsgroups", root=SHARED)
    assert table.X.shape[0] == 19_997
    np.testing.assert_allclose(np.sqrt(np.asarray(table.X.multiply(table.X).sum(1))), 1)
    assert 9_990 < (table.y == 1).sum() < 10_000
