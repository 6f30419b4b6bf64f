"""Few-shot tasks of characters: alphabets, held-out alphabets, reproducible tasks and damaged files."""

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


def drawing(character: int, number: int) -> bytes:
    """A horizontal bar in the upper half, black on white; its place tells the character, its length the drawing."""
    paper, buffer = np.full((105, 105), 255, dtype=np.uint8), io.BytesIO()
    paper[4 + 12 * character : 8 + 12 * character, 4 : 40 + 15 * number] = 0
    Image.fromarray(paper).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def content() -> dict[str, dict[str, bytes]]:
    """Files of each zip file, by name."""
    parts = {
        part: {
            f"{part}/{name}/character{character + 1:02}/{character:04}_{number + 1:02}.png": drawing(character, number)
            for name in alphabets
            for character in range(ALPHABETS[name])
            for number in range(DRAWINGS)
        }
        for part, alphabets in PARTS.items()
    }
    parts["all_runs"] = runs = {}
    for run in (1, 2):
        test, training = f"run{run:02}/test/item", f"run{run:02}/training/class"
        for number in range(3):
            runs[f"{training}{number + 1:02}.png"] = drawing(number, 0)
            runs[f"{test}{number + 1:02}.png"] = drawing((number + run) % 3, 1)
        lines = [f"{test}{n + 1:02}.png {training}{(n + run) % 3 + 1:02}.png" for n in range(3)]
        runs[f"run{run:02}/class_labels.txt"] = "\n".join(lines).encode()
    return parts


def zipped(folder: pathlib.Path, part: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    for part, files in content().items():
        zipped(tmp_path, part, files)
    return tmp_path


def source(root: pathlib.Path | None, **changes: Any) -> Omniglot:
    base = Omniglot(ways=2, shots=1, queries=2, tasks=6, held_out_tasks=4, test_alphabets=("Tagalog",))
    return dataclasses.replace(base, root=None if root is None else str(root), **changes)


def one_shot(root: pathlib.Path) -> tuple[Tensor, Tensor]:
    (batch,) = source(root).one_shot_runs().batches(2)
    return batch


def test_alphabets(root: pathlib.Path) -> None:
    """One that is in both files counts once; ink is bright."""
    known = read_alphabets(root, "images_background")
    assert {name: len(characters) for name, characters in known.items()} == ALPHABETS
    images = known["Latin"]["character03"]
    assert (images.shape, images.dtype) == ((DRAWINGS, 1, 28, 28), torch.uint8)
    assert int(images[0, 0, 8, 3]) > 100  # of the bar at pixels 28 to 32 of 105, from the left
    assert not images[:, 0, 14:].any()
    assert int((images[3] > 80).sum()) > int((images[0] > 80).sum())


@pytest.mark.parametrize("layout", ["parts", "alphabets"])
def test_folders(root: pathlib.Path, tmp_path: pathlib.Path, layout: str) -> None:
    """They are read like the zip files."""
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
        torch.testing.assert_close(unpacked[name], characters, rtol=0, atol=0)
    torch.testing.assert_close(one_shot(folder), one_shot(root), rtol=0, atol=0)


def test_held_out_alphabets(root: pathlib.Path) -> None:
    splits = source(root).load()
    parts = [(len(split.classes), len(split), split.rotate) for split in (splits.train, splits.validation, splits.test)]
    assert parts == [(7, 6, True), (2, 4, False), (3, 4, False)]
    assert source(root, validation_alphabets=()).load().validation is None


def numbered(classes: int = 5, images: int = 8) -> list[Tensor]:
    """Classes of images whose pixels hold their class and their number, with a corner that shows how they lie."""
    found = torch.zeros(classes, images, 1, 4, 4, dtype=torch.uint8)
    found[..., 0, 0, 1] = torch.arange(1, classes + 1, dtype=torch.uint8)[:, None]
    found[..., 0, 1, 1] = torch.arange(1, images + 1, dtype=torch.uint8)
    return list(found)


def test_tasks() -> None:
    """Each has new labels, and no image twice."""
    ((images, labels),) = Episodes(numbered(), tasks=20, ways=3, shots=2, queries=3).batches(20)
    assert images.shape == (20, 15, 1, 4, 4)
    assert labels.tolist() == [[0, 0, 1, 1, 2, 2, *[0] * 3, *[1] * 3, *[2] * 3]] * 20
    classes, numbers = images[:, :, 0, 0, 1], images[:, :, 0, 1, 1]
    for task in range(20):
        names = {(label, name) for label, name in zip(labels[task].tolist(), classes[task].tolist(), strict=True)}
        assert len(names) == len({name for _, name in names}) == 3
        assert len(set(zip(classes[task].tolist(), numbers[task].tolist(), strict=True))) == 15
    assert len({tuple(row) for row in classes.tolist()}) > 10


def test_rotations() -> None:
    """Training turns a class of a task as a whole."""
    ((images, labels),) = Episodes(numbered(), tasks=30, ways=2, shots=1, queries=2, rotate=True).batches(30)
    turned = (images[:, :, 0].flatten(2) > 0).to(torch.uint8)
    patterns = [turned[task][labels[task] == label].unique(dim=0) for task in range(30) for label in range(2)]
    assert {len(pattern) for pattern in patterns} == {1}
    assert len(torch.cat(patterns).unique(dim=0)) == 4


def test_reproducible_tasks() -> None:
    """A task depends on its place alone."""
    split = Episodes(numbered(), tasks=10, ways=2, shots=1, queries=1, rotate=True)

    def images(*place: Any, **options: int) -> Tensor:
        return torch.cat([images for images, _ in split.batches(*place, **options)])

    whole = images(5, shuffle=(3, 1))
    assert torch.equal(whole[5:], images(5, shuffle=(3, 1), start=1))
    ranks = [images(2, shuffle=(3, 1), rank=r, world_size=2) for r in (0, 1)]
    assert torch.equal(whole, torch.stack(ranks, 1).flatten(0, 1))
    assert not torch.equal(whole, images(5, shuffle=(3, 2)))
    assert torch.equal(images(10), images(10))


def test_one_shot_runs(root: pathlib.Path) -> None:
    images, labels = one_shot(root)
    assert images.shape == (2, 6, 1, 28, 28)
    assert labels.tolist() == [[0, 1, 2, 1, 2, 0], [0, 1, 2, 2, 0, 1]]
    rows = images[:, :, 0].float().sum(3).argmax(2)  # of the bars
    assert torch.equal(rows[:, 3:], rows.gather(1, labels[:, 3:]))


@pytest.mark.parametrize(
    ("part", "name", "data", "message"),
    [
        (
            "images_background_small1",
            "Latin/character01/0000_02.png",
            drawing(0, 0)[:60],
            r"images_background_small1\.zip: .*0000_02\.png is a damaged image",
        ),
        ("all_runs", "run02/class_labels.txt", b"only-one-word\n", r"run02/class_labels\.txt is damaged"),
        (
            "all_runs",
            "run02/class_labels.txt",
            b"run02/test/none.png run02/training/class01.png\n",
            r"run02/test/none\.png cannot be read",
        ),
        ("images_background_small1", None, b"PK no zip file", r"small1\.zip is no zip file, or damaged"),
    ],
)
def test_damage(part: str, name: str | None, data: bytes, message: str, root: pathlib.Path) -> None:
    if name is None:
        (root / f"{part}.zip").write_bytes(data)
    else:
        zipped(root, part, content()[part] | {name if part == "all_runs" else f"{part}/{name}": data})
    with pytest.raises(DataError, match=message):
        one_shot(root) if part == "all_runs" else source(root).load()


def test_missing_files(root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)
    with pytest.raises(DataError, match=r"no Omniglot in \$EQUIPOISE_DATA/omniglot"):
        Omniglot().load()
    empty, folder = tmp_path / "empty", tmp_path / "data"
    empty.mkdir()
    folder.mkdir()
    (folder / "omniglot").symlink_to(root)
    monkeypatch.setenv("EQUIPOISE_DATA", str(folder))
    assert len(source(None).load().test) == 4
    for load, message in (
        (source(tmp_path / "nowhere").load, r"no Omniglot in .*nowhere: fetch .*--data.root"),
        (source(empty).load, "has no images_background"),
        (source(empty).one_shot_runs, r"has no all_runs\.zip"),
        (
            source(None, test_alphabets=("Klingon",)).load,
            r"no alphabet 'Klingon', but Balinese, Greek, Latin, Tagalog",
        ),
        (source(None, ways=3).load, r"2 classes of at least 4 images do not give tasks of 3 ways"),
    ):
        with pytest.raises(DataError, match=message):
            load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 0}, r"data.ways=0: must be >= 1"),
        ({"flip": True}, r"neither cropped nor mirrored"),
        ({"validation_fraction": 0.1}, r"name data.validation_alphabets"),
        ({"validation_alphabets": ("Tagalog",)}, r"Tagalog cannot be for validation and for the test"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(None, **changes)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="Omniglot is not at hand")
def test_real_omniglot() -> None:
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
    assert 0.03 < float(images.double().mean() / 255) < 0.2


@pytest.mark.slow
@pytest.mark.skipif(not NOTO.is_dir(), reason="Debian's fonts-noto-core is not installed")
def test_letters(tmp_path: pathlib.Path) -> None:
    """Of fonts, without the scripts that are for evaluation."""
    for name in ("NotoSansArmenian-Regular", "NotoSansTibetan-Regular", "NotoSerifTibetan-Regular", "NotoSans-Italic"):
        if (NOTO / f"{name}.ttf").exists():
            (tmp_path / f"{name}.ttf").symlink_to(NOTO / f"{name}.ttf")
    first, again = letters.render(tmp_path, 28), letters.render(tmp_path, 28)
    assert letters.PER_SCRIPT <= len(first) <= 2 * letters.PER_SCRIPT  # Armenian, and perhaps a few Latin letters
    assert {tuple(images.shape) for images in first} == {(20, 1, 28, 28)}
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert all(len(images.flatten(1).unique(dim=0)) > 15 for images in first)  # each is drawn otherwise


def test_bad_fonts(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"has no fonts .* fonts-noto-core, or name another folder"):
        letters.render(tmp_path, 28)
    (tmp_path / "broken.ttf").write_bytes(b"no font at all")
    with pytest.raises(DataError, match=r"broken\.ttf is a damaged font"):
        letters.render(tmp_path, 28)
