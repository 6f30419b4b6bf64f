"""Images read by Hugging Face `datasets`: the hub, local parquet files, image folders, streams."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from equipoise.data.base import Split, Splits, TensorSplit, batch_indices, derive_seed, generator, random_split
from equipoise.data.images import ImageData
from equipoise.data.readers import (
    open_image,
    random_resized_crop,
    resize_and_crop,
    to_mode,
    to_tensor,
)
from equipoise.files import DataError, data_root

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHUFFLE_BUFFER = 10_000  # images from which a stream draws the next one


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubImages(ImageData):
    """Images read by Hugging Face `datasets`: a name on the hub, a folder of parquet files, or a folder per class."""

    source: str
    """Name on the hub, such as `uoft-cs/cifar10`; used where `root` names no local copy."""
    root: str | None = None
    """Folder with a local copy; None: `$EQUIPOISE_DATA/<last part of the source>` if it exists, else the hub."""
    train_split: str = "train"
    """Name of the training split."""
    test_split: str = "test"
    """Name of the split for the final evaluation."""
    image_size: int
    """Side of the images in pixels."""
    image_channels: int = 3
    """3 for color, 1 for grayscale."""
    resize: int | None = None
    """Shorter side to which images are resized before the central square is cut out; None: they fit as they are."""
    random_resized_crop: bool = False
    """Whether training images are random parts of random size (8 to 100 %) and shape, resized."""
    in_memory: bool = True
    """Whether all images are decoded once and kept; otherwise workers decode them batch by batch."""
    streaming: bool = False
    """Whether images are read while training, without a local copy; in an order that is random within a buffer."""
    num_train: int | None = None
    """Number of training images, for a stream that does not state it."""
    num_workers: int = 4
    """Processes that decode images, if they are not in memory."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_memory and (self.streaming or self.random_resized_crop):
            raise ValueError("data.in_memory=true excludes data.streaming and data.random_resized_crop; set it false")
        if self.streaming and self.validation_fraction:
            raise ValueError("data.validation_fraction needs data.streaming=false; set it to 0")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"data.resize={self.resize}: must be at least data.image_size={self.image_size}, or None")

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.image_channels, self.image_size, self.image_size)

    @property
    def place(self) -> str:
        """Folder or name, for messages."""
        return self.root or self.source

    def load(self) -> Splits:
        train, classes = _open(self, self.train_split)
        test, _ = _open(self, self.test_split)
        if self.in_memory:
            training, validation = self._carve(*_decode_all(train, self, self.train_split, len(classes)))
            tested = _decode_all(test, self, self.test_split, len(classes))
            return Splits(training, validation, TensorSplit(*tested), classes)
        if self.streaming:
            count = self.num_train or _announced(train, self.train_split)
            if not count:
                raise DataError("the stream does not state its number of training images; give --data.num_train")
            streams = (
                StreamSplit(train, self, count, augment=True),
                StreamSplit(test, self, _announced(test, self.test_split), augment=False),
            )
            return Splits(streams[0], None, streams[1], classes)
        kept, held_out = random_split(len(train), round(self.validation_fraction * len(train)))
        return Splits(
            RowSplit(train, self, kept, augment=True),
            RowSplit(train, self, held_out, augment=False) if len(held_out) else None,
            RowSplit(test, self, torch.arange(len(test)), augment=False),
            classes,
        )


class RowSplit(Split):
    """Images that worker processes decode batch by batch from a data set with random access."""

    def __init__(self, rows: Any, data: HubImages, index: Tensor, *, augment: bool) -> None:
        self.rows, self.data, self.index, self.augment = rows, data, index, augment

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        """Decode the image of a row, augmented by a seed if there is one."""
        index, seed = key
        source = None if seed is None else torch.Generator().manual_seed(seed)
        return _decode(self.rows[index], self.data, f"image {index}", source)

    def batches(
        self,
        size: int,
        *,
        shuffle: tuple[int, int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        seed = None if shuffle is None or not self.augment else shuffle
        sampler = [
            [(int(self.index[i]), None if seed is None else derive_seed(*seed, int(i), 2)) for i in numbers]
            for numbers in batch_indices(len(self), size, shuffle, start, rank, world_size)
            if len(numbers)  # the last batch of an evaluation may be too small for every process
        ]
        yield from DataLoader(self, batch_sampler=sampler, num_workers=self.data.num_workers)  # type: ignore[arg-type]


class StreamSplit(Split):
    """Images of a stream, in an order that is random within a buffer."""

    def __init__(self, stream: Any, data: HubImages, count: int, *, augment: bool) -> None:
        self.stream, self.data, self.count, self.augment = stream, data, count, augment

    def __len__(self) -> int:
        return self.count

    def batches(
        self,
        size: int,
        *,
        shuffle: tuple[int, int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        own = len(range(rank, size, world_size))
        if shuffle is None:
            yield from itertools.islice(self._pass(own, None, 0, rank, world_size), start, None)
            return
        passes = (self._pass(own, shuffle, number, rank, world_size) for number in itertools.count())
        batches = itertools.chain.from_iterable(map(self._not_empty, passes))
        # A resumed epoch reads and skips the batches before: a stream has no random access.
        yield from itertools.islice(batches, start, self.count // size)

    def _not_empty(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        first = next(batches, None)
        if first is None:  # each worker fills batches from its own files
            raise DataError(
                f"{self.data.place}: one pass over the stream fills no batch; lower batch_size or data.num_workers"
            )
        yield first
        yield from batches

    def _pass(
        self, own: int, shuffle: tuple[int, int] | None, number: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from datasets.distributed import split_dataset_by_node

        stream = self.stream
        if shuffle is not None:
            stream = stream.shuffle(seed=derive_seed(*shuffle, number) % 2**32, buffer_size=SHUFFLE_BUFFER)
        stream = split_dataset_by_node(stream, rank=rank, world_size=world_size)
        seed = derive_seed(*shuffle, number, rank, 2) if shuffle is not None and self.augment else None
        rows, workers = _Decoded(stream, self.data, seed), min(self.data.num_workers, stream.num_shards)
        yield from DataLoader(rows, batch_size=own, num_workers=workers, drop_last=shuffle is not None)


class _Decoded(IterableDataset):
    """Decoded images of a stream, augmented by a seed if there is one."""

    def __init__(self, stream: Any, data: HubImages, seed: int | None) -> None:
        self.stream, self.data, self.seed = stream, data, seed

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = torch.utils.data.get_worker_info()
        for number, row in enumerate(self.stream):
            source = None if self.seed is None else generator(self.seed, worker.id if worker else 0, number)
            yield _decode(row, self.data, f"image {number} of the stream", source)


def _decode(
    row: dict[str, Any], data: HubImages, name: str, source: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """Decode image and label of a row; with a random source a random part of the image, if the data is cropped so."""
    name = f"{data.place}, {name}"
    if row["label"] is None or int(row["label"]) < 0:
        raise DataError(f"{name} has no label; such a split cannot be used")
    content = row["image"]
    raw = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
    picture = to_mode(open_image(raw, name), data.image_channels)
    if source is not None and data.random_resized_crop:
        picture = random_resized_crop(picture, data.image_size, source)
    elif data.resize is not None:
        picture = resize_and_crop(picture, data.resize, data.image_size)
    elif picture.size != (data.image_size, data.image_size):
        raise DataError(
            f"{name} has {picture.width}x{picture.height} pixels, not {data.image_size}x{data.image_size}; give "
            "--data.resize to have images resized and cut"
        )
    return to_tensor(picture), int(row["label"])


def _decode_all(rows: Any, data: HubImages, split: str, num_classes: int) -> tuple[Tensor, Tensor]:
    images = torch.empty(len(rows), *data.shape, dtype=torch.uint8)
    labels = torch.empty(len(rows), dtype=torch.int64)

    def decode(first: int) -> None:
        part = rows[first : first + 500]
        for number, (image, label) in enumerate(zip(part["image"], part["label"], strict=True), first):
            row = {"image": image, "label": label}
            images[number], labels[number] = _decode(row, data, f"{split} image {number}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(0, len(rows), 500)))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DataError(
            f"{data.place}: labels of split {split!r} range from {int(labels.min())} to {int(labels.max())}, but there "
            f"are {num_classes} classes; a split without labels cannot be used"
        )
    return images, labels


def _open(data: HubImages, split: str) -> tuple[Any, tuple[str, ...]]:
    """Open a split; return its rows, with the columns `image` and `label`, and the names of the classes."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("this data is read by Hugging Face datasets: pip install 'equipoise[data]'") from error
    path, looked_for = _locate(data)
    try:
        with _quiet(datasets):
            rows = datasets.load_dataset(path, split=split, streaming=data.streaming)
    except ValueError as error:
        if "split" in str(error):
            raise DataError(
                f"{path} has no split {split!r} ({error}); set --data.train_split or --data.test_split"
            ) from error
        raise DataError(f"{path} cannot be read: {error}. Looked for: {looked_for}") from error
    except (OSError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{path} cannot be read: {type(cause).__name__}: {cause}. Looked for: {looked_for}. With a network, any "
            "name on the hub works; without one, point --data.root at a folder with the parquet files of the data set "
            "or with one folder of images per class, in folders named after the splits"
        ) from error
    features = rows.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise DataError(f"{data.place} needs a column of images and one of class labels; it has {features}")
    label = "label" if "label" in labels else labels[0]
    rows = rows.select_columns([images[0], label]).cast_column(images[0], datasets.Image(decode=False))
    renamed = {old: new for old, new in ((images[0], "image"), (label, "label")) if old != new}
    return rows.rename_columns(renamed) if renamed else rows, tuple(features[label].names)


def _locate(data: HubImages) -> tuple[str, str]:
    """Return the path for `load_dataset`, and the places of the search for messages."""
    folder = data.source.rpartition("/")[2]
    if data.root is not None:
        root = Path(data.root)
        if not root.is_dir():
            raise DataError(f"--data.root={data.root} is not a folder")
        return str(root / folder if (root / folder).is_dir() else root), f"--data.root={data.root}"
    shared = data_root()
    if shared is not None and (shared / folder).is_dir():
        return str(shared / folder), f"$EQUIPOISE_DATA/{folder}"
    places = f"{shared / folder} ($EQUIPOISE_DATA)" if shared else f"$EQUIPOISE_DATA/{folder} (the variable is not set)"
    return data.source, f"{places}, then {data.source} on the hub"


def _announced(stream: Any, split: str) -> int:
    """Return the number of images that a stream states; 0: none."""
    sizes = stream.info.splits or {}
    return int(sizes[split].num_examples or 0) if split in sizes else 0


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
