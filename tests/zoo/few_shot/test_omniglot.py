"""Few-shot tasks of characters: alphabets read once, held-out ones kept out, tasks that can be repeated, no damage."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.few_shot import letters
from equipoise.data import DataError
from equipoise.zoo import Omniglot
from equipoise.zoo.few_shot.omniglot import Episodes, read_alphabets

REAL = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or pathlib.Path(__file__).parents[4] / "shared/data") / "omniglot"
NOTO = pathlib.Path("/usr/share/fonts/truetype/noto")
ALPHABETS = {"Greek": 3, "Latin": 4, "Tagalog": 3, "Balinese": 2}
PARTS = {"images_background_small1": ("Greek", "Latin", "Balinese"), "images_background_small2": ("Greek", "Tagalog")}
DRAWINGS = 4


def drawing(alphabet: str, character: int, number: int) -> bytes:
    """A horizontal bar in the upper half, black on white; its place tells the character, its length the drawing."""
    paper = np.full((105, 105), 255, dtype=np.uint8)
    row = 4 + 12 * character
    paper[row : row + 4, 4 : 40 + 15 * number] = 0
    buffer = io.BytesIO()
    Image.fromarray(paper).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def content() -> dict[str, dict[str, bytes]]:
    """Files of each zip file, by name."""
    parts: dict[str, dict[str, bytes]] = {}
    for part, alphabets in PARTS.items():
        parts[part] = {
            f"{part}/{name}/character{character + 1:02}/{character:04}_{number + 1:02}.png": drawing(
                name, character, number
            )
            for name in alphabets
            for character in range(ALPHABETS[name])
            for number in range(DRAWINGS)
        }
    runs: dict[str, bytes] = {}
    for run in (1, 2):
        folder = f"run{run:02}"
        for number in range(3):
            runs[f"{folder}/training/class{number + 1:02}.png"] = drawing("", number, 0)
            runs[f"{folder}/test/item{number + 1:02}.png"] = drawing("", (number + run) % 3, 1)
        lines = [
            f"{folder}/test/item{n + 1:02}.png {folder}/training/class{(n + run) % 3 + 1:02}.png" for n in range(3)
        ]
        runs[f"{folder}/class_labels.txt"] = "\n".join(lines).encode()
    return {**parts, "all_runs": runs}


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    for part, files in content().items():
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    return tmp_path


def source(root: pathlib.Path, **changes: Any) -> Omniglot:
    given: dict[str, Any] = {
        "root": str(root),
        "ways": 2,
        "shots": 1,
        "queries": 2,
        "tasks": 6,
        "held_out_tasks": 4,
        "test_alphabets": ("Tagalog",),
        **changes,
    }
    return Omniglot(**given)


def test_alphabets_in_both_files_count_once_and_ink_is_bright(root: pathlib.Path) -> None:
    known = read_alphabets(root, "images_background")
    assert {name: len(characters) for name, characters in known.items()} == ALPHABETS
    images = known["Latin"]["character03"]
    assert images.shape == (DRAWINGS, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert int(images[0, 0, 8, 3]) > 100  # of the bar at pixels 28 to 32 of 105, from the left
    assert int(images[:, 0, 14:].max()) == 0
    assert int((images[3] > 80).sum()) > int((images[0] > 80).sum())


@pytest.mark.parametrize("layout", ["parts", "alphabets"])
def test_folders_are_read_like_the_zip_files(root: pathlib.Path, tmp_path: pathlib.Path, layout: str) -> None:
    folder = tmp_path / "unpacked"
    for part, files in content().items():
        for name, data in files.items():
            inside = f"{part}/{name}" if part == "all_runs" else name
            path = folder / (inside.split("/", 1)[1] if layout == "alphabets" and part != "all_runs" else inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    packed, unpacked = (read_alphabets(place, "images_background") for place in (root, folder))
    assert packed.keys() == unpacked.keys() - {"run01", "run02"}
    for name, characters in packed.items():
        for character, images in characters.items():
            assert torch.equal(images, unpacked[name][character])
    for one, other in zip(
        source(root).one_shot_runs().batches(2), source(folder).one_shot_runs().batches(2), strict=True
    ):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_whole_alphabets_are_held_out(root: pathlib.Path) -> None:
    splits = source(root).load()
    assert isinstance(splits.train, Episodes)
    assert isinstance(splits.validation, Episodes)
    assert isinstance(splits.test, Episodes)
    assert [len(split.classes) for split in (splits.train, splits.validation, splits.test)] == [7, 2, 3]
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [6, 4, 4]
    assert splits.train.rotate
    assert not splits.validation.rotate
    assert not splits.test.rotate
    assert source(root, validation_alphabets=()).load().validation is None


def test_no_test_alphabets_named_means_those_of_the_evaluation(root: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"no images_evaluation"):
        source(root, test_alphabets=()).load()
    with zipfile.ZipFile(root / "images_evaluation.zip", "w") as archive:
        for character in range(2):
            for number in range(DRAWINGS):
                name = f"images_evaluation/Tengwar/character{character}/{number}.png"
                archive.writestr(name, drawing("Tengwar", character, number))
    splits = source(root, test_alphabets=()).load()
    assert isinstance(splits.train, Episodes)
    assert isinstance(splits.test, Episodes)
    assert (len(splits.train.classes), len(splits.test.classes)) == (10, 2)


def numbered(classes: int = 5, images: int = 6) -> list[Tensor]:
    """Images that tell their class by one pixel, their number by another, and which way is up by a third."""
    found = torch.zeros(classes, images, 1, 4, 4, dtype=torch.uint8)
    found[..., 0, 0, 1] = torch.arange(1, classes + 1, dtype=torch.uint8)[:, None]
    found[..., 0, 1, 1] = torch.arange(1, images + 1, dtype=torch.uint8)
    return list(found)


def test_a_task_has_new_labels_and_no_image_twice() -> None:
    split = Episodes(numbered(), tasks=20, ways=3, shots=2, queries=3)
    ((images, labels),) = split.batches(20)
    assert images.shape == (20, 15, 1, 4, 4)
    assert labels.tolist() == [[0, 0, 1, 1, 2, 2, *[0] * 3, *[1] * 3, *[2] * 3]] * 20
    classes, numbers = images[:, :, 0, 0, 1], images[:, :, 0, 1, 1]
    for task in range(20):
        names = [set(classes[task][labels[task] == label].tolist()) for label in range(3)]
        assert all(len(name) == 1 for name in names)
        assert len(set.union(*names)) == 3
        assert len(set(zip(classes[task].tolist(), numbers[task].tolist(), strict=True))) == 15
    assert len({tuple(row) for row in classes.tolist()}) > 10


def test_training_turns_a_class_of_a_task_as_a_whole() -> None:
    ((images, labels),) = Episodes(numbered(), tasks=30, ways=2, shots=1, queries=2, rotate=True).batches(30)
    turned = (images[:, :, 0].flatten(2) > 0).to(torch.uint8)
    seen = set()
    for task in range(30):
        for label in range(2):
            patterns = {tuple(row) for row in turned[task][labels[task] == label].tolist()}
            assert len(patterns) == 1
            seen |= patterns
    assert len(seen) == 4


def test_a_task_depends_on_its_place_alone() -> None:
    split = Episodes(numbered(), tasks=10, ways=2, shots=1, queries=1, rotate=True)
    whole = torch.cat([images for images, _ in split.batches(5, shuffle=(3, 1))])
    resumed = torch.cat([images for images, _ in split.batches(5, shuffle=(3, 1), start=1)])
    assert torch.equal(whole[5:], resumed)
    ranks = [
        torch.cat([images for images, _ in split.batches(2, shuffle=(3, 1), rank=r, world_size=2)]) for r in (0, 1)
    ]
    assert torch.equal(whole, torch.stack(ranks, 1).flatten(0, 1))
    other = torch.cat([images for images, _ in split.batches(5, shuffle=(3, 2))])
    assert not torch.equal(whole, other)
    (first, _), (again, _) = next(split.batches(10)), next(split.batches(10))
    assert torch.equal(first, again)


def test_the_one_shot_runs_pair_test_and_training_images(root: pathlib.Path) -> None:
    ((images, labels),) = source(root).one_shot_runs().batches(2)
    assert images.shape == (2, 6, 1, 28, 28)
    assert labels.tolist() == [[0, 1, 2, 1, 2, 0], [0, 1, 2, 2, 0, 1]]
    rows = images[:, :, 0].float().sum(3).argmax(2)  # where the bar is
    for run in range(2):
        assert torch.equal(rows[run, 3:], rows[run, labels[run, 3:]])


def rewritten(root: pathlib.Path, part: str, name: str, data: bytes) -> None:
    files = content()[part]
    files[next(n for n in files if n.endswith(name))] = data
    with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
        for each, value in files.items():
            archive.writestr(each, value)


def test_damage_is_named(root: pathlib.Path) -> None:
    rewritten(root, "images_background_small1", "0001_02.png", drawing("", 0, 0)[:60])
    with pytest.raises(DataError, match=r"images_background_small1\.zip: .*0001_02\.png is a damaged image"):
        source(root).load()
    (root / "images_background_small1.zip").write_bytes(b"PK no zip file")
    with pytest.raises(DataError, match=r"images_background_small1\.zip is no zip file, or damaged"):
        source(root).load()
    rewritten(root, "all_runs", "run02/class_labels.txt", b"only-one-word\n")
    with pytest.raises(DataError, match=r"run02/class_labels\.txt is damaged"):
        source(root).one_shot_runs()
    rewritten(root, "all_runs", "run02/class_labels.txt", b"run02/test/none.png run02/training/class01.png\n")
    with pytest.raises(DataError, match=r"run02/test/none\.png cannot be read"):
        source(root).one_shot_runs()


def replaced(**changes: Any) -> Omniglot:
    """The source of the folder that the environment names."""
    return dataclasses.replace(source(pathlib.Path("any"), **changes), root=None)


def test_what_is_missing_is_named(root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no Omniglot in .*nowhere: fetch .*--data.root"):
        source(tmp_path / "nowhere").load()
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    with pytest.raises(DataError, match=r"no Omniglot in \$EQUIPOISE_DATA/omniglot"):
        Omniglot().load()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "omniglot").symlink_to(root)
    monkeypatch.setenv("EQUIPOISE_DATA", str(folder))
    assert len(replaced().load().test) == 4
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="has no images_background"):
        source(folder / "empty").load()
    with pytest.raises(DataError, match=r"has no all_runs\.zip"):
        source(folder / "empty").one_shot_runs()
    with pytest.raises(DataError, match=r"no alphabet 'Klingon', but Balinese, Greek, Latin, Tagalog"):
        replaced(test_alphabets=("Klingon",)).load()
    with pytest.raises(DataError, match=r"2 classes of at least 4 images do not give tasks of 3 ways"):
        replaced(ways=3).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 0}, r"data.ways=0: must be >= 1"),
        ({"flip": True}, r"neither cropped nor mirrored"),
        ({"validation_fraction": 0.1}, r"name data.validation_alphabets"),
        ({"validation_alphabets": ("Tagalog",)}, r"Tagalog cannot be for validation and for the test"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(pathlib.Path("any"), **changes)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="Omniglot is not at hand")
def test_the_small_background_sets_and_the_official_runs() -> None:
    known = read_alphabets(REAL, "images_background")
    assert {name: len(characters) for name, characters in known.items()} == {
        "Balinese": 24,
        "Early_Aramaic": 22,
        "Greek": 24,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Sanskrit": 42,
        "Tagalog": 17,
    }
    assert {len(images) for characters in known.values() for images in characters.values()} == {20}
    ((images, labels),) = Omniglot(root=str(REAL)).one_shot_runs().batches(20)
    assert images.shape == (20, 40, 1, 28, 28)
    assert all(sorted(row[20:].tolist()) == list(range(20)) for row in labels)
    ink = images.double() / 255
    assert 0.03 < float(ink.mean()) < 0.2


@pytest.mark.slow
@pytest.mark.skipif(not NOTO.is_dir(), reason="Debian's fonts-noto-core is not installed")
def test_letters_of_fonts_without_scripts_for_evaluation(tmp_path: pathlib.Path) -> None:
    for name in ("NotoSansArmenian-Regular", "NotoSansTibetan-Regular", "NotoSerifTibetan-Regular", "NotoSans-Italic"):
        if (NOTO / f"{name}.ttf").exists():
            (tmp_path / f"{name}.ttf").symlink_to(NOTO / f"{name}.ttf")
    first, again = letters.render(tmp_path, 28), letters.render(tmp_path, 28)
    assert letters.PER_SCRIPT <= len(first) <= 2 * letters.PER_SCRIPT  # Armenian, and perhaps a few Latin letters
    assert {tuple(images.shape) for images in first} == {(20, 1, 28, 28)}
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(len(images.flatten(1).unique(dim=0)) > 15 for images in first)  # each is drawn otherwise


def test_fonts_that_are_none_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"has no fonts .* fonts-noto-core, or name another folder"):
        letters.render(tmp_path, 28)
    (tmp_path / "broken.ttf").write_bytes(b"no font at all")
    with pytest.raises(DataError, match=r"broken\.ttf is a damaged font"):
        letters.render(tmp_path, 28)
