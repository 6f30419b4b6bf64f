"""Data: splits that do not overlap, readers that refuse damage, order and augmentation that can be repeated."""

import dataclasses
import gzip
import io
import itertools
import os
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from equipoise.data import (
    DataError,
    Digits,
    FashionMNIST,
    HubImages,
    Split,
    TensorSplit,
    derive_seed,
    generator,
    random_split,
)
from equipoise.data.images import random_crop, random_flip
from equipoise.data.readers import open_image, random_resized_crop, read_idx, resize_and_crop, to_mode, to_tensor

CIFAR = pathlib.Path(os.environ.get("EQUIPOISE_DATA") or pathlib.Path(__file__).parents[4] / "shared/data") / "cifar10"
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def _no_network(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what a test names is found, and nothing is kept."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Some versions rest for five seconds at the end of a stream, until the threads of Arrow are done.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.delenv("EQUIPOISE_DATA", raising=False)


def rows(count: int, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random color images and labels."""
    source = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, size, size), generator=source, dtype=torch.uint8)
    return images, torch.randint(len(CLASSES), (count,), generator=source)


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: pathlib.Path, images: Tensor, labels: Tensor, column: str = "image", raw: list[bytes] | None = None
) -> None:
    """A parquet file with the features of the hub's image data sets."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    features = {column: datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    raw = [png(picture(image)) for image in images] if raw is None else raw
    values = {column: [{"bytes": each, "path": None} for each in raw], "label": labels.tolist()}
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(path)


@pytest.fixture
def cifar(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the layout of the hub's CIFAR-10."""
    for split, count, seed in (("train", 20, 1), ("test", 7, 2)):
        write_parquet(tmp_path / f"cifar10/plain_text/{split}-00000-of-00001.parquet", *rows(count, seed=seed), "img")
    return tmp_path


def source(root: pathlib.Path, **changes: Any) -> HubImages:
    return HubImages(**{"source": "uoft-cs/cifar10", "root": str(root), "image_size": 6, "num_workers": 0, **changes})


def joined(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def content(split: Split) -> tuple[Tensor, Tensor]:
    return joined(split.batches(5))


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert [part.dtype for part in found] == [torch.uint8, torch.int64]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Digits and splitting


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_digits(fraction: float) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    splits = Digits(validation_fraction=fraction).load()
    parts = [part for part in (splits.train, splits.test, splits.validation) if part is not None]
    assert [len(part) for part in parts] == ([1078, 359, 360] if fraction else [1438, 359])
    images, labels = map(torch.cat, zip(*(content(part) for part in parts), strict=True))
    pixels, targets = sklearn.load_digits(return_X_y=True)
    keys = torch.cat([images.flatten(1).double() * 16 / 255, labels[:, None].double()], 1).round().int().tolist()
    expected = np.concatenate([pixels, targets[:, None]], 1).astype(int).tolist()
    assert sorted(keys) == sorted(expected)
    assert len({tuple(key) for key in keys}) == len(keys)  # no image is there twice, so none in two splits
    assert len(splits.classes) == 10


def test_random_split() -> None:
    rest, part = random_split(1000, 200)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(1000))
    assert (len(rest), len(part)) == (800, 200)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(random_split(1000, 200), (rest, part), strict=True))
    assert part[:6].tolist() == [3, 7, 13, 19, 21, 24]  # published accuracies refer to it


def test_derived_seeds() -> None:
    seeds = [derive_seed(a, b) for a in range(50) for b in range(50)]
    assert len(set(seeds)) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert abs(np.mean(seeds) / 2**63 - 0.5) < 0.03
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize("shuffle", [None, (3, 0)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches(shuffle: tuple[int, int] | None, world_size: int) -> None:
    split = TensorSplit(torch.zeros(20, 1, 2, 2, dtype=torch.uint8), torch.arange(20))
    whole = [labels.tolist() for _, labels in split.batches(6, shuffle=shuffle)]
    assert [len(batch) for batch in whole] == ([6, 6, 6, 2] if shuffle is None else [6, 6, 6])
    assert len({number for batch in whole for number in batch}) == sum(map(len, whole))
    if shuffle is None:
        assert [number for batch in whole for number in batch] == list(range(20))
    else:
        for other in ((3, 1), (4, 0)):
            assert [labels.tolist() for _, labels in split.batches(6, shuffle=other)] != whole
    for start in (0, 2):
        parts = [
            [
                labels.tolist()
                for _, labels in split.batches(6, shuffle=shuffle, start=start, rank=r, world_size=world_size)
            ]
            for r in range(world_size)
        ]
        together = [sorted(itertools.chain.from_iterable(batch)) for batch in zip(*parts, strict=True)]
        assert together == [sorted(batch) for batch in whole[start:]]
        assert all(max(map(len, batch)) - min(map(len, batch)) <= 1 for batch in zip(*parts, strict=True))


# Augmentation


def test_crops_and_flips() -> None:
    images = rows(40)[0]
    draws = torch.randint(5, (2, 40), generator=generator(5)).tolist()
    padded = F.pad(images, (2, 2, 2, 2))
    expected = torch.stack([p[:, y : y + 6, x : x + 6] for p, y, x in zip(padded, *draws, strict=True)])
    assert torch.equal(random_crop(images, 2, generator(5)), expected)
    assert len(set(zip(*draws, strict=True))) > 15  # of 25 places

    found = random_flip(images, generator(5))
    flipped = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(found, images, strict=True)])
    assert torch.equal(found[~flipped], images[~flipped])
    assert 10 < int(flipped.sum()) < 30
    assert torch.equal(flipped, torch.rand(40, generator=generator(5)) < 0.5)


def test_preparation() -> None:
    data = HubImages(source="x", image_size=6, crop_padding=2, flip=True, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    images = rows(8)[0]
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (data.mean, data.std))
    plain = data.prepare(images)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, (images.float() / 255 - mean) / std)
    first, again, other = (data.prepare(images, generator(0, step)) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    source = generator(0, 1)
    cropped = random_flip(random_crop(images, 2, source), source)
    assert torch.equal(first, data.prepare(cropped))


def test_random_resized_crop() -> None:
    boxes = []

    class Probe:
        size = (400, 300)

        def resize(self, size: tuple[int, int], method: Any, box: tuple[int, int, int, int]) -> None:
            boxes.append(box)

    for k in range(3000):
        random_resized_crop(Probe(), 32, generator(k))  # type: ignore[arg-type]
    left, top, right, bottom = torch.tensor(boxes).double().T
    w, h = right - left, bottom - top
    area, aspect = w * h / 120_000, w / h
    for value, least, most in (
        (left.min(), 0, 5),
        (top.min(), 0, 5),
        (right.max(), 395, 400),
        (bottom.max(), 295, 300),
        (area.min(), 0.07, 0.1),
        (area.max(), 0.95, 1),
        (aspect.min(), 0.73, 0.77),
        (aspect.max(), 1.30, 1.36),
    ):
        assert least <= float(value) <= most
    small = area < 0.5  # these always fit, so nothing is rejected
    assert abs(float(area[small].mean()) - 0.29) < 0.01
    assert abs(float(aspect[small].log().mean())) < 0.02


def test_resize_and_crop() -> None:
    image = F.interpolate(rows(1, 9)[0].double(), (90, 60), mode="bicubic").clamp(0, 255).round().to(torch.uint8)
    found = to_tensor(resize_and_crop(picture(image[0]), 20, 16))
    expected = F.interpolate(image.double(), (30, 20), mode="bilinear", antialias=True)[0, :, 7:23, 2:18]
    assert found.shape == (3, 16, 16)
    assert float((found - expected).abs().max()) <= 1.0


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("LA", (77, 255), [77, 77, 77]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 32768, [127, 127, 127]),
        ("F", 0.5, [127, 127, 127]),
    ],
)
def test_modes(mode: str, color: Any, expected: list[int]) -> None:
    image = Image.new(mode, (3, 2), color)
    found = to_tensor(to_mode(image, 3))
    assert found.shape == (3, 2, 3)
    assert (found[:, 0, 0].int() - torch.tensor(expected)).abs().max() <= 1
    gray = to_tensor(to_mode(image, 1))
    assert gray.shape == (1, 2, 3)
    r, g, b = expected
    assert abs(int(gray[0, 0, 0]) - (0.299 * r + 0.587 * g + 0.114 * b)) <= 1


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: pathlib.Path, count: int = 12, packed: bool = True) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{split}-{kind}": numbers.integers(0, high, shape, dtype=np.uint8)
        for split in ("train", "t10k")
        for kind, high, shape in (("images-idx3-ubyte", 256, (count, 28, 28)), ("labels-idx1-ubyte", 10, (count,)))
    }
    for name, array in arrays.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return arrays


@pytest.mark.parametrize(("place", "packed"), [("", True), ("fashion-mnist", True), ("FashionMNIST/raw", False)])
def test_idx_files(place: str, packed: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_idx(tmp_path / place, packed=packed)
    monkeypatch.setenv("EQUIPOISE_DATA", str(tmp_path))
    root = None if place == "fashion-mnist" else str(tmp_path)
    splits = FashionMNIST(root=root, validation_fraction=0.25).load()
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 3, 12)
    images, labels = (torch.from_numpy(arrays[f"t10k-{k}"]) for k in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    assert_same(content(splits.test), (images[:, None], labels.long()))
    rest, held = (content(split)[0].flatten(1).tolist() for split in (splits.train, splits.validation))
    assert sorted(rest + held) == sorted(arrays["train-images-idx3-ubyte"].reshape(12, -1).tolist())


@pytest.mark.slow
def test_real_fashion_mnist() -> None:
    if not FASHION.is_dir():
        pytest.skip(f"no {FASHION}: install Debian's dataset-fashion-mnist")
    splits = FashionMNIST(root=str(FASHION)).load()
    images, labels = content(splits.train)
    assert images.shape == (60_000, 1, 28, 28)
    assert labels.bincount().tolist() == [6000] * 10
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as published
    found = (float(images.double().mean() / 255), float(images.double().std() / 255))
    assert found == pytest.approx((*FashionMNIST().mean, *FashionMNIST().std), abs=1e-4)
    tested, targets = content(splits.test)
    assert (tested.shape, targets.bincount().tolist()) == ((10_000, 1, 28, 28), [1000] * 10)
    assert splits.classes[9] == "Ankle boot"


GOOD = idx(np.arange(8, dtype=np.uint8).reshape(2, 2, 2))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not an IDX file of unsigned bytes: its header is empty"),
        (GOOD[:3], "is not an IDX file"),
        (GOOD[:9], "is not an IDX file"),
        (b"\x00\x00\x0d\x01" + GOOD[4:], "is not an IDX file of unsigned bytes: its header is 00000d01"),
        (GOOD[:-1], r"announces 8 bytes of shape \(2, 2, 2\) and holds 7"),
        (GOOD + b"\0", r"announces 8 bytes of shape \(2, 2, 2\) and holds 9"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12 + b"\0", "announces .* and holds 1"),
        (b"\x00\x00\x08\x04" + b"\x00\x01\x00\x00" * 4, "announces .* and holds 0"),  # the product is 2^64
        (idx(np.zeros((0, 2, 2), dtype=np.uint8)), "holds no data"),
    ],
)
def test_damaged_idx(raw: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "good").write_bytes(GOOD)
    assert read_idx(tmp_path / "good").flatten().tolist() == list(range(8))
    (tmp_path / "bad").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "bad")


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "no gzip"])
def test_damaged_gzip(damage: str, tmp_path: pathlib.Path) -> None:
    write_idx(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes({"truncated": raw[:2000], "corrupt": raw, "no gzip": b"<html>"}[damage])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz cannot be read .*; it is truncated or corrupt"):
        FashionMNIST(root=str(tmp_path)).load()


def test_idx_files_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    for array, message in (
        (np.zeros(11, dtype=np.uint8), r"train images \(12, 28, 28\) and labels \(11,\) do not fit"),
        (np.full(12, 10, dtype=np.uint8), "train labels go up to 10, but there are 10 classes"),
    ):
        labels.write_bytes(gzip.compress(idx(array)))
        with pytest.raises(DataError, match=message):
            FashionMNIST(root=str(tmp_path)).load()
    labels.unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\(.gz\) is missing; download the four IDX files"):
        FashionMNIST(root=str(tmp_path)).load()
    write_idx(tmp_path / "small")
    (tmp_path / "small/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((12, 8, 8), np.uint8))))
    with pytest.raises(DataError, match=r"images have 8x8 pixels, not 28x28"):
        FashionMNIST(root=str(tmp_path / "small")).load()


def test_missing_fashion_mnist(tmp_path: pathlib.Path) -> None:
    looked = re.escape(f"looked for train-images-idx3-ubyte(.gz) in {tmp_path}, {tmp_path}/fashion-mnist, ")
    with pytest.raises(DataError, match=rf"{looked}.*Point --data.root at the folder"):
        FashionMNIST(root=str(tmp_path)).load()


# Hugging Face data sets


@pytest.mark.parametrize("in_memory", [True, False])
def test_local_cifar10(in_memory: bool, cifar: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = rows(20, seed=1), rows(7, seed=2)
    for data in (source(cifar, in_memory=in_memory), source(cifar / "cifar10", in_memory=in_memory)):
        splits = data.load()
        assert (splits.classes, splits.validation) == (tuple(CLASSES), None)
        assert_same(content(splits.train), train)
        assert_same(content(splits.test), test)
    monkeypatch.setenv("EQUIPOISE_DATA", str(cifar))
    splits = dataclasses.replace(data, root=None, validation_fraction=0.25).load()
    assert splits.validation is not None
    rest, held = random_split(20, 5)
    assert_same(content(splits.train), (train[0][rest], train[1][rest]))
    assert_same(content(splits.validation), (train[0][held], train[1][held]))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_decoded_while_training(rank: int, world_size: int, cifar: pathlib.Path) -> None:
    kept, decoded = (source(cifar, in_memory=flag).load() for flag in (True, False))
    options: dict[str, Any] = {"start": 1, "rank": rank, "world_size": world_size}
    for shuffle in ((0, 1), None):
        first, second = (splits.train.batches(6, shuffle=shuffle, **options) for splits in (kept, decoded))
        assert_same(joined(first), joined(second))
    # Six images, then one, which is for the first process: the others get none of it.
    first, second = (splits.test.batches(6, rank=rank, world_size=world_size) for splits in (kept, decoded))
    assert_same(joined(first), joined(second))


def imagenet(folder: pathlib.Path) -> tuple[HubImages, Tensor, Tensor]:
    """A folder with the layout of the hub's ImageNet, with larger images and two files of training images."""
    images, labels = rows(12, 20, seed=3)
    for part in (0, 1):
        each = slice(6 * part, 6 * part + 6)
        write_parquet(folder / f"data/train-{part:05d}-of-00002.parquet", images[each], labels[each])
    write_parquet(folder / "data/validation-00000-of-00001.parquet", *rows(5, 20, seed=4))
    data = source(
        folder, source="ILSVRC/imagenet-1k", test_split="validation", image_size=8, resize=10, in_memory=False,
        random_resized_crop=True,
    )  # fmt: skip
    return data, images, labels


def test_random_parts(tmp_path: pathlib.Path) -> None:
    data, images, labels = imagenet(tmp_path)
    splits = data.load()
    tested = torch.stack([to_tensor(resize_and_crop(picture(image), 10, 8)) for image in rows(5, 20, seed=4)[0]])
    assert_same(content(splits.test), (tested, rows(5, 20, seed=4)[1]))
    order = torch.randperm(12, generator=generator(7, 2))
    expected = torch.stack(
        [to_tensor(random_resized_crop(picture(images[i]), 8, generator(7, 2, int(i), 2))) for i in order]
    )
    for size in (3, 4):
        assert_same(joined(splits.train.batches(size, shuffle=(7, 2))), (expected, labels[order]))
    workers = dataclasses.replace(data, num_workers=2).load()
    assert_same(joined(workers.train.batches(3, shuffle=(7, 2), start=2)), (expected[6:], labels[order][6:]))
    other = joined(splits.train.batches(3, shuffle=(7, 3)))[0]
    assert not torch.equal(other[other.flatten(1).sum(1).argsort()], expected[expected.flatten(1).sum(1).argsort()])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streams(workers: int, tmp_path: pathlib.Path) -> None:
    data, images, _ = imagenet(tmp_path)
    data = dataclasses.replace(data, streaming=True, random_resized_crop=False, resize=20, image_size=20)
    data = dataclasses.replace(data, num_train=12, num_workers=workers)
    splits = data.load()
    assert len(splits.train) == 12
    assert_same(content(splits.test), rows(5, 20, seed=4))
    found = list(splits.train.batches(3, shuffle=(0, 0)))
    assert [len(batch[1]) for batch in found] == [3, 3, 3, 3]
    assert sorted(joined(iter(found))[0].flatten(1).tolist()) == sorted(images.flatten(1).tolist())
    assert_same(joined(splits.train.batches(3, shuffle=(0, 0))), joined(iter(found)))
    assert_same(joined(splits.train.batches(3, shuffle=(0, 0), start=2)), joined(iter(found[2:])))
    assert not torch.equal(joined(splits.train.batches(3, shuffle=(0, 1)))[0], joined(iter(found))[0])
    parts = [joined(splits.train.batches(4, shuffle=(0, 0), rank=r, world_size=2))[0] for r in (0, 1)]
    if not workers:  # each worker leaves out what does not fill a batch, and starts another pass
        assert sorted(torch.cat(parts).flatten(1).tolist()) == sorted(images.flatten(1).tolist())
    assert [len(part) for part in parts] == [6, 6]


def test_short_stream(tmp_path: pathlib.Path) -> None:
    """An error, and not an endless loop."""
    data, _, _ = imagenet(tmp_path)
    data = dataclasses.replace(data, streaming=True, num_train=12, num_workers=2)
    assert len(list(dataclasses.replace(data, num_workers=0).load().train.batches(7, shuffle=(0, 0)))) == 1
    with pytest.raises(DataError, match=r"does not state its number of training images; give --data.num_train"):
        dataclasses.replace(data, num_train=None).load()
    with pytest.raises(DataError, match=r"fills no batch; lower batch_size or data.num_workers"):
        next(data.load().train.batches(7, shuffle=(0, 0)))


def test_folder_per_class(tmp_path: pathlib.Path) -> None:
    images, labels = rows(9)
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = tmp_path / "pets" / split / CLASSES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(image).save(path)
    splits = source(tmp_path, source="me/pets").load()
    assert splits.classes == tuple(CLASSES)
    found, expected = (
        sorted((*image.flatten().tolist(), int(label)) for image, label in zip(*part, strict=True))
        for part in (content(splits.train), (images, labels))
    )
    assert found == expected


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("size", r"test image 3 has 9x9 pixels, not 6x6; give --data.resize|image 3 has 9x9 pixels, not 6x6"),
        ("cut", "image 3 is a damaged image"),
        ("text", "image 3 is not an image that Pillow can read"),
        ("empty", "image 3 is empty"),
        ("label", "image 3 has no label; such a split cannot be used"),
    ],
)
@pytest.mark.slow
def test_damaged_images(damage: str, message: str, in_memory: bool, cifar: pathlib.Path) -> None:
    images, labels = rows(7, seed=2)
    raw = [png(picture(image)) for image in images]
    large = png(picture(rows(1, 9)[0][0]))
    raw[3] = {"cut": raw[3][: len(raw[3]) // 2], "text": b"hello", "empty": b"", "size": large}.get(damage, raw[3])
    if damage == "label":
        labels[3] = -1
    write_parquet(cifar / "cifar10/plain_text/test-00000-of-00001.parquet", images, labels, "img", raw)
    with pytest.raises(DataError, match=message) as raised:
        content(source(cifar, in_memory=in_memory).load().test)
    assert str(cifar) in str(raised.value)


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = png(Image.new("L", (50, 50)))
    assert open_image(raw, "it").size == (50, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="it has too many pixels"):
        open_image(raw, "it")


def test_missing_data(cifar: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = cifar / "cifar10/plain_text/train-00000-of-00001.parquet"
    for name in ("empty", "torn", "tables"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn/train.parquet").write_bytes(parquet.read_bytes()[:-100])
    for split in ("train", "test"):
        (tmp_path / f"tables/{split}.csv").write_text("a,b\n1,2\n")
    nowhere = HubImages(source="uoft-cs/nothing", image_size=6)
    for data, message in (
        (
            nowhere,
            r"Looked for: \$EQUIPOISE_DATA/nothing \(the variable is not set\), then uoft-cs/nothing on the hub"
            ".*without one, point --data.root at a folder with the parquet files",
        ),
        (source(tmp_path / "absent"), r"--data.root=.*absent is not a folder"),
        (
            source(cifar, test_split="validation"),
            r"has no split 'validation'.*set --data.train_split or --data.test_split",
        ),
        (source(tmp_path / "empty"), r"empty cannot be read: .*point --data.root at"),
        (source(tmp_path / "torn"), r"torn cannot be read: .*[Pp]arquet"),
        (source(tmp_path / "tables"), r"needs a column of images and one of class labels; it has .*a"),
    ):
        with pytest.raises(DataError, match=message):
            data.load()
    monkeypatch.setenv("EQUIPOISE_DATA", str(cifar))
    with pytest.raises(DataError, match=f"Looked for: {cifar}/nothing"):
        nowhere.load()


@pytest.mark.extended
def test_real_cifar10() -> None:
    if not CIFAR.is_dir():
        pytest.skip(f"no {CIFAR}: point EQUIPOISE_DATA at the folder above a copy of uoft-cs/cifar10")
    data = HubImages(source="uoft-cs/cifar10", root=str(CIFAR), image_size=32)
    splits = data.load()
    images, labels = content(splits.train)
    assert images.shape == (50_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5000] * 10
    assert content(splits.test)[1].bincount().tolist() == [1000] * 10
    assert splits.classes[:3] == ("airplane", "automobile", "bird")
    mean = images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-3, rtol=0)
    streamed = dataclasses.replace(data, in_memory=False, streaming=True, num_train=50_000, num_workers=0).load()
    first = next(streamed.test.batches(16))
    assert_same(first, next(splits.test.batches(16)))
