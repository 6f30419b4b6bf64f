"""Data sources: splits, batches and seeds.

A data source is a frozen dataclass, part of the configuration; `load` returns its splits. Every random choice is a
function of the seed and of the position in the run, so a run can be continued anywhere.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

TEST_SEED = 20_210_601  # of the fixed permutations that set test and validation samples aside


def derive_seed(*numbers: int) -> int:
    """Hash integers to a seed in [0, 2^63); neighbors give unrelated seeds."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*numbers: int) -> torch.Generator:
    """Random generator on the CPU, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


class Split(abc.ABC):
    """Samples of one kind (training, validation, test), in batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

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
        """Yield batches of `(images, labels)`: uint8 `(b, C, H, W)` and int64 `(b,)`.

        Args:
            size: images per batch, over all devices.
            shuffle: seed and epoch of the random order, without an incomplete last batch; None: all images in
                their own order.
            start: number of the first batch.
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
    """Yield the sample numbers of each batch of `Split.batches`."""
    order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=generator(*shuffle))
    stop = count if shuffle is None else count - count % size
    for first in range(start * size, stop, size):
        yield order[first : first + size][rank::world_size]


@dataclasses.dataclass(frozen=True)
class Splits:
    """Splits of a data source.

    Args:
        train: for training.
        validation: set aside from the training samples, for development; None: none.
        test: for the final evaluation only.
        classes: names of the labels.
    """

    train: Split
    validation: Split | None
    test: Split
    classes: tuple[str, ...]


def random_split(total: int, count: int) -> tuple[Tensor, Tensor]:
    """Split `range(total)` at random, the same way every time, into the rest and `count` numbers."""
    order = torch.randperm(total, generator=generator(TEST_SEED, total))
    return order[count:].sort().values, order[:count].sort().values


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(abc.ABC):
    """Samples with labels, part of a configuration.

    Attributes:
        image_batches: whether a batch has the shape `(B, C, H, W)`, which `channels_last` needs.
    """

    image_batches: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample."""

    @abc.abstractmethod
    def load(self) -> Splits:
        """Read the data.

        Raises:
            DataError: it is missing or damaged; the message has the places of the search and the remedy.
        """

    @abc.abstractmethod
    def prepare(self, samples: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Augment and scale a batch for the model.

        Args:
            samples: `(B, ...)` as `Split.batches` yields them, on any device.
            augment: random source of the augmentation, on the CPU, so that it is the same on every device; None: no
                augmentation.
        """
