"""Patches of the photographs that scikit-image and scikit-learn ship."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.data.base import Splits, TensorSplit
from equipoise.data.images import ImageData
from equipoise.files import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photographs(ImageData):
    """Square patches side by side of grayscale photographs; the test split has other photographs.

    Attributes:
        train_names: photographs to train on.
        test_names: photographs for the final evaluation.

    Example:
        >>> from equipoise.data import Photographs
        >>> Photographs(image_size=64).shape
        (1, 64, 64)
    """

    train_names: ClassVar[tuple[str, ...]] = (
        *("astronaut", "brick", "china", "clock", "coins", "grass", "gravel", "moon", "rocket"),
    )
    test_names: ClassVar[tuple[str, ...]] = ("camera", "chelsea", "coffee", "flower")

    image_size: int = 32
    """Side of a patch in pixels."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, self.image_size, self.image_size)

    def load(self) -> Splits:
        names = self.train_names + self.test_names
        patches = [self.patches(name) for name in names]
        labels = [torch.full((len(part),), number) for number, part in enumerate(patches)]
        cut = len(self.train_names)
        train, validation = self._carve(torch.cat(patches[:cut]), torch.cat(labels[:cut]))
        return Splits(train, validation, TensorSplit(torch.cat(patches[cut:]), torch.cat(labels[cut:])), names)

    def patches(self, name: str) -> Tensor:
        """Cut a photograph into patches, row by row, uint8 `(N, 1, image_size, image_size)`."""
        image, side = photograph(name), self.image_size
        rows, columns = (n // side for n in image.shape)
        squares = image[: rows * side, : columns * side].view(rows, side, columns, side)
        return squares.transpose(1, 2).reshape(-1, 1, side, side).contiguous()


def photograph(name: str) -> Tensor:
    """Load a photograph of scikit-image or scikit-learn by its name there, in gray, uint8 `(H, W)`.

    Raises:
        DataError: the package that ships it is missing.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise DataError("photographs come with scikit-image and scikit-learn: pip install scikit-image") from error
    pixels = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(data, name)()
    image = torch.tensor(pixels, dtype=torch.float32)
    if image.ndim == 3:
        image = image @ image.new_tensor([0.2125, 0.7154, 0.0721])  # luminance, as in scikit-image
    return image.round().clamp(0, 255).to(torch.uint8)
