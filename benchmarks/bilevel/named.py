"""Text sets of the papers: 20 Newsgroups, glosses of WordNet and real-sim, prepared as published."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import fetch_20newsgroups
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize

from equipoise.estimators.readers import read_columns, read_libsvm, to_strings
from equipoise.estimators.tables import read_table
from equipoise.files import DataError, data_root

SKLEARN_NEWSGROUPS = "20news-bydate_py3.pkz"
DEBIAN_WORDNET = Path("/usr/share/wordnet")
WORDNET_FILES = ("data.adj", "data.adv", "data.noun", "data.verb")
ANIMAL, ARTIFACT, PERSON, PLANT = 5, 6, 18, 20  # numbers of WordNet's lexicographer files


def breast_cancer() -> tuple[Any, np.ndarray]:
    """Return the data set of `--quick`, part of scikit-learn."""
    table = read_table("breast-cancer")
    return table.X, table.y


def newsgroups() -> tuple[Any, np.ndarray]:
    """Return 20 Newsgroups: word counts in rows of length 1; groups 0 to 9 (label -1) against 10 to 19 (label 1).

    The posts are read from `$EQUIPOISE_DATA/20newsgroups/*.parquet`, with the columns `text` and `label`, or from
    scikit-learn's cache.

    Raises:
        DataError: they are missing or damaged.
    """
    texts, groups = _newsgroup_posts()
    counts = CountVectorizer(dtype=np.float64).fit_transform(texts)
    return normalize(counts).tocsr(), np.where(groups < 10, -1, 1)


def wordnet(*labels: int) -> tuple[Any, np.ndarray]:
    """Return the glosses of WordNet as TF-IDF of words in two or more glosses, labeled by their lexicographer file.

    Args:
        labels: two lexicographer files, which get the labels -1 and 1; none: all 45.

    Raises:
        DataError: a file is missing or damaged.
    """
    root = data_root()
    folders = [*([] if root is None else [root / "wordnet"]), DEBIAN_WORDNET]
    folder = next((f for f in folders if (f / "data.noun").is_file()), None)
    if folder is None:
        raise DataError(
            f"no WordNet: looked for {', '.join(WORDNET_FILES)} in {', '.join(map(str, folders))}. "
            "Install Debian's wordnet-base, or copy these files to $EQUIPOISE_DATA/wordnet"
        )
    found = [entry for name in WORDNET_FILES for entry in _glosses(folder / name)]
    found = [(number, gloss) for number, gloss in found if not labels or number in labels]
    numbers = np.array([number for number, _ in found])
    X = TfidfVectorizer(min_df=2).fit_transform([gloss for _, gloss in found])
    return X.tocsr(), np.where(numbers == labels[0], -1, 1) if labels else numbers


def real_sim() -> tuple[Any, np.ndarray]:
    """Return real-sim of the LIBSVM page, 72,309 x 20,958, labels -1 and 1.

    Raises:
        DataError: the file is missing or damaged.
    """
    root = data_root()
    names = ("real-sim", "real-sim.bz2", "real-sim.libsvm")
    places = [] if root is None else [root / folder / name for folder in ("", "real-sim") for name in names]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, places)) or "nothing: EQUIPOISE_DATA names no folder"
        raise DataError(
            f"no real-sim: looked for {looked}. Copy real-sim.bz2 from the LIBSVM data page (binary classification) to "
            "$EQUIPOISE_DATA"
        )
    return read_libsvm(path)


def _newsgroup_posts() -> tuple[Sequence[str], np.ndarray]:
    root = data_root()
    folder = None if root is None else root / "20newsgroups"
    if folder is not None and any(folder.glob("*.parquet")):
        columns, _ = read_columns(folder)
        if "text" not in columns or "label" not in columns:
            raise DataError(f"{folder} needs the columns text and label; it has {', '.join(columns)}")
        # Groups by name have the numbers of the alphabet.
        values, groups = np.unique(columns["label"], return_inverse=True)
        if len(values) != 20:
            raise DataError(f"{folder} has {len(values)} labels, not 20; fetch it again")
        return to_strings(columns["text"]), groups
    home = Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")).expanduser()
    archive = home / SKLEARN_NEWSGROUPS
    if not archive.is_file():  # scikit-learn would make its folder before it looks
        raise DataError(
            f"no 20 Newsgroups: looked for $EQUIPOISE_DATA/20newsgroups/*.parquet and {archive}. With a network, run "
            "once: python -c \"from sklearn.datasets import fetch_20newsgroups as f; f(subset='all')\""
        )
    try:
        fetched = fetch_20newsgroups(data_home=str(home), subset="all", download_if_missing=False)
    except OSError as error:  # raised for a damaged file, too
        raise DataError(f"{archive} is damaged: delete it and fetch it again") from error
    return fetched.data, fetched.target


def _glosses(path: Path) -> list[tuple[int, str]]:
    """Return the numbers of the lexicographer files and the glosses in a data file of WordNet."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; install Debian's wordnet-base again") from error
    found, place = [], 0
    for line in content.splitlines(keepends=True):
        if not line.startswith(b"  "):  # the license is indented
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


NAMED: dict[str, Callable[[], tuple[Any, np.ndarray]]] = {
    "breast-cancer": breast_cancer,
    "20newsgroups": newsgroups,
    "wordnet-animal-plant": functools.partial(wordnet, ANIMAL, PLANT),
    "wordnet-person-artifact": functools.partial(wordnet, PERSON, ARTIFACT),
    "wordnet-45": wordnet,
    "real-sim": real_sim,
}
