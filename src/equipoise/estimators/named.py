"""Named data sets: where they are looked for, and how the papers prepared them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import fetch_20newsgroups, load_breast_cancer, load_diabetes
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from equipoise.estimators.encoding import read_columns, to_strings
from equipoise.estimators.matrices import read_libsvm
from equipoise.files import DataError, data_root

SKLEARN_NEWSGROUPS = "20news-bydate_py3.pkz"
DEBIAN_WORDNET = Path("/usr/share/wordnet")
WORDNET_FILES = ("data.adj", "data.adv", "data.noun", "data.verb")
ANIMAL, ARTIFACT, PERSON, PLANT = 5, 6, 18, 20  # numbers of WordNet's lexicographer files
Root = str | os.PathLike[str] | None
Loader = Callable[[Root], tuple[Any, np.ndarray]]


def breast_cancer(root: Root = None) -> tuple[np.ndarray, np.ndarray]:
    """569 x 30, labels -1 and 1; each column divided by its standard deviation, not centered. Part of scikit-learn."""
    X, y = load_breast_cancer(return_X_y=True)
    return X / X.std(0), 2 * y.astype(np.int64) - 1


def diabetes(root: Root = None) -> tuple[np.ndarray, np.ndarray]:
    """442 x 10, a regression; the target less its mean. Part of scikit-learn."""
    X, y = load_diabetes(return_X_y=True)
    return X, y - y.mean()


def newsgroups(root: Root = None) -> tuple[Any, np.ndarray]:
    """20 Newsgroups, counts of words in rows of length 1; groups 0 to 9 (label -1) against 10 to 19 (label 1).

    Read from parquet files with the columns `text` and `label`, as on the hub, or from what scikit-learn once fetched.

    Raises:
        DataError: there is none.
    """
    texts, groups = _newsgroup_posts(root)
    counts = CountVectorizer(dtype=np.float64).fit_transform(texts)
    return normalize(counts).tocsr(), np.where(groups < 10, -1, 1)


def wordnet(root: Root = None, *, labels: Sequence[int] | None = None) -> tuple[Any, np.ndarray]:
    """Glosses of WordNet as TF-IDF of words in two or more; the label is the number of the lexicographer file.

    Args:
        root: folder of the files data.noun, data.verb, data.adj and data.adv, or its parent.
        labels: the lexicographer files to take; of two, the first gets the label -1, the second 1. None: all 45.

    Raises:
        DataError: a file is missing or damaged.
    """
    folders = [DEBIAN_WORDNET] if root is None else [Path(root), Path(root) / "wordnet"]
    shared = data_root()
    if root is None and shared is not None:
        folders.insert(0, shared / "wordnet")
    folder = next((f for f in folders if (f / "data.noun").is_file()), None)
    if folder is None:
        raise DataError(
            f"no WordNet: looked for {', '.join(WORDNET_FILES)} in {', '.join(map(str, folders))}. "
            "Install Debian's wordnet-base, or point --root at the folder of these files"
        )
    found = [entry for name in WORDNET_FILES for entry in _glosses(folder / name)]
    if labels is not None:
        found = [(number, gloss) for number, gloss in found if number in labels]
    numbers = np.array([number for number, _ in found])
    X = TfidfVectorizer(min_df=2).fit_transform([gloss for _, gloss in found])
    if labels is not None and len(labels) == 2:
        numbers = np.where(numbers == labels[0], -1, 1)
    return X.tocsr(), numbers


def real_sim(root: Root = None) -> tuple[Any, np.ndarray]:
    """real-sim, 72,309 x 20,958, labels -1 and 1, from the LIBSVM page's file.

    Raises:
        DataError: there is none, or it is damaged.
    """
    folder = Path(root) if root is not None else data_root()
    names = ("real-sim", "real-sim.bz2", "real-sim.libsvm")
    places = [folder / inner / name for inner in ("", "real-sim") for name in names] if folder else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, places)) or "nothing, for neither --root nor EQUIPOISE_DATA names a folder"
        raise DataError(
            f"no real-sim: looked for {looked}. Fetch real-sim.bz2 from the LIBSVM data page (binary classification) "
            "and point --root at its folder"
        )
    return read_libsvm(path)


def _newsgroup_posts(root: Root) -> tuple[list[str], np.ndarray]:
    folders = [Path(root) / "20newsgroups", Path(root)] if root is not None else []
    shared = data_root()
    if root is None and shared is not None:
        folders = [shared / "20newsgroups"]
    folder = next((f for f in folders if any(f.glob("*.parquet"))), None)
    if folder is not None:
        columns, _ = read_columns(folder)
        if "text" not in columns or "label" not in columns:
            raise DataError(f"{folder} needs the columns text and label; it has {', '.join(columns)}")
        groups = columns["label"]
        if isinstance(groups, list):  # names; their numbers are those of the alphabet
            groups = np.unique(groups, return_inverse=True)[1]
        if len(np.unique(groups)) != 20:
            raise DataError(f"{folder} has {len(np.unique(groups))} labels, not 20; fetch it again")
        return to_strings(columns["text"]), groups
    home = Path(root if root is not None else os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
    if not (home / SKLEARN_NEWSGROUPS).is_file():
        looked = ", ".join(f"{f}/*.parquet" for f in folders) or "$EQUIPOISE_DATA/20newsgroups (it is not set)"
        raise DataError(
            f"no 20 Newsgroups: looked for {looked}, {home / SKLEARN_NEWSGROUPS}. With a network, run once: "
            "python -c \"from sklearn.datasets import fetch_20newsgroups as f; f(subset='all')\""
        )
    try:
        fetched = fetch_20newsgroups(data_home=str(home), subset="all", download_if_missing=False)
    except OSError as error:  # what scikit-learn tells of a damaged file, too
        raise DataError(f"{home / SKLEARN_NEWSGROUPS} is damaged: delete it and fetch it again") from error
    return fetched.data, fetched.target


def _glosses(path: Path) -> list[tuple[int, str]]:
    """Numbers of the lexicographer files and glosses in a data file of WordNet."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; install Debian's wordnet-base again") from error
    found, place = [], 0
    for line in content.splitlines(keepends=True):
        if not line.startswith(b"  "):  # the licence is indented
            fields, bar, gloss = line.partition(b" | ")
            offset, number, *_ = [*fields.split(b" ", 2), b"", b""]
            # Each line begins with its own place in the file.
            if offset != b"%08d" % place or not number.isdigit() or not bar or not line.endswith(b"\n"):
                raise DataError(f"{path} is damaged at byte {place:,}; install Debian's wordnet-base again")
            found.append((int(number), gloss.decode("utf-8", "replace").strip()))
        place += len(line)
    if not found:
        raise DataError(f"{path} holds no glosses; install Debian's wordnet-base again")
    return found


NAMED: dict[str, Loader] = {
    "breast-cancer": breast_cancer,
    "diabetes": diabetes,
    "20newsgroups": newsgroups,
    "wordnet-animal-plant": functools.partial(wordnet, labels=(ANIMAL, PLANT)),
    "wordnet-person-artifact": functools.partial(wordnet, labels=(PERSON, ARTIFACT)),
    "wordnet-45": wordnet,
    "real-sim": real_sim,
}
