"""Text sets of the bilevel benchmark: their preparation, and errors for missing and damaged files."""

import codecs
import os
import pathlib
import pickle
import socket
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.utils import Bunch

from benchmarks.bilevel import named
from benchmarks.bilevel.named import NAMED
from equipoise.files import DataError

SHARED = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or pathlib.Path(__file__).parents[3] / "shared/data")
WORDNET = named.DEBIAN_WORDNET
needs_wordnet = pytest.mark.skipif(not (WORDNET / "data.noun").is_file(), reason="wordnet-base is not installed")
needs_newsgroups = pytest.mark.skipif(not (SHARED / "20newsgroups").is_dir(), reason=f"no 20newsgroups in {SHARED}")
TEXTS, GROUPS = [f"From: someone{i}\n\nword{i % 20} common text" for i in range(40)], np.arange(40) % 20


@pytest.fixture(autouse=True)
def root(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The only folder with data; a connection fails the test."""
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sklearn"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    monkeypatch.setattr(named, "DEBIAN_WORDNET", tmp_path / "debian")
    return tmp_path


def write_newsgroups(root: pathlib.Path, columns: dict[str, Any]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (root / "20newsgroups").mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), root / "20newsgroups" / "train-0.parquet")


def wordnet_file(entries: list[tuple[int, str]]) -> bytes:
    """A data file in WordNet's layout: an indented license, and lines that begin with their own place."""
    content = b"  1 This software and database is being provided to you  \n"
    for number, gloss in entries:
        content += f"{len(content):08d} {number:02d} n 01 word 0 000 | {gloss}  \n".encode()
    return content


@pytest.fixture
def wordnet(root: pathlib.Path) -> pathlib.Path:
    (root / "wordnet").mkdir()
    nouns = [(5, "a small animal"), (20, "a small plant"), (5, "an animal | with horns"), (6, "a thing")]
    for name, number in (("adj", 0), ("adv", 0), ("verb", 30)):
        (root / "wordnet" / f"data.{name}").write_bytes(wordnet_file([(number, "having much of it")]))
    (root / "wordnet" / "data.noun").write_bytes(wordnet_file(nouns))
    return root / "wordnet" / "data.noun"


@pytest.mark.parametrize("labels", [GROUPS, [f"group.{chr(97 + i)}" for i in GROUPS]], ids=["numbers", "names"])
def test_newsgroups_parquet(labels: Any, root: pathlib.Path) -> None:
    write_newsgroups(root, {"text": TEXTS, "label": labels, "id": TEXTS})
    X, y = NAMED["20newsgroups"]()
    counts = CountVectorizer().fit_transform(TEXTS).toarray()
    np.testing.assert_allclose(X.toarray(), counts / np.linalg.norm(counts, axis=1, keepdims=True))
    assert y.tolist() == [-1 if group < 10 else 1 for group in GROUPS]


def test_newsgroups_of_sklearn(root: pathlib.Path) -> None:
    parts = {
        kind: Bunch(data=TEXTS[rows], target=GROUPS[rows], filenames=np.array(["f"] * 20), target_names=[], DESCR="")
        for kind, rows in (("train", slice(0, 20)), ("test", slice(20, 40)))
    }
    content = codecs.encode(pickle.dumps(parts), "zlib_codec")
    archive = root / "sklearn" / "20news-bydate_py3.pkz"
    archive.parent.mkdir()
    archive.write_bytes(content)
    X, y = NAMED["20newsgroups"]()  # scikit-learn shuffles the posts
    assert X.shape[0] == 40
    assert (y == 1).sum() == 20
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"20news-bydate_py3.pkz is damaged: delete it and fetch it again"):
        NAMED["20newsgroups"]()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a b"], "label": [0]}, "has 1 labels, not 20"),
        ({"words": ["a b"], "label": [0]}, "needs the columns text and label; it has words, label"),
    ],
)
def test_other_newsgroups(columns: dict[str, Any], message: str, root: pathlib.Path) -> None:
    write_newsgroups(root, columns)
    with pytest.raises(DataError, match=message):
        NAMED["20newsgroups"]()


def test_wordnet(wordnet: pathlib.Path) -> None:
    X, y = NAMED["wordnet-animal-plant"]()
    assert y.tolist() == [-1, 1, -1]
    words = TfidfVectorizer(min_df=2).fit_transform(["a small animal", "a small plant", "an animal | with horns"])
    np.testing.assert_array_equal(X.toarray(), words.toarray())
    assert NAMED["wordnet-45"]()[1].tolist() == [0, 0, 5, 20, 5, 6, 30]


@pytest.mark.parametrize("keep", [0, 30, 100, -2, -20])
def test_truncated_wordnet(keep: int, wordnet: pathlib.Path) -> None:
    wordnet.write_bytes(wordnet.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"data.noun (is damaged at byte|holds no glosses)"):
        NAMED["wordnet-45"]()


def test_wordnet_with_a_gap(wordnet: pathlib.Path) -> None:
    wordnet.write_bytes(wordnet.read_bytes().replace(b" small", b""))
    with pytest.raises(DataError, match=r"data.noun is damaged at byte 99"):
        NAMED["wordnet-45"]()
    wordnet.write_bytes(wordnet_file([(5, "x")]))
    (wordnet.parent / "data.verb").unlink()
    with pytest.raises(DataError, match=r"data.verb cannot be read: No such file"):
        NAMED["wordnet-45"]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("20newsgroups", r"no 20 Newsgroups: looked for .*/20newsgroups/\*.parquet and .*run once: python -c"),
        ("wordnet-45", r"no WordNet: looked for data.adj.* in .*/wordnet, .*/debian. Install Debian's wordnet-base"),
    ],
)
def test_missing_sets(name: str, message: str, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=message):
        NAMED[name]()
    assert not any(root.iterdir())  # scikit-learn makes its folder before it looks
    monkeypatch.delenv("EQUIPOISE_DATA")
    with pytest.raises(DataError, match="no "):
        NAMED[name]()


@pytest.mark.slow
@needs_wordnet
def test_debian_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "DEBIAN_WORDNET", WORDNET)
    X, y = NAMED["wordnet-animal-plant"]()
    assert X.shape[0] == 15_539
    assert (y == -1).sum() == 7_509
    X, y = NAMED["wordnet-45"]()
    assert X.shape == (117_659, 34_407)
    assert sorted(set(y.tolist())) == list(range(45))


@pytest.mark.slow
@needs_newsgroups
def test_hub_newsgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_DATA", str(SHARED))
    X, y = NAMED["20newsgroups"]()
    assert X.shape[0] == 19_997
    np.testing.assert_allclose(np.sqrt(np.asarray(X.multiply(X).sum(1))), 1)
    assert 9_990 < (y == 1).sum() < 10_000
