"""Images: augmentation, scaling, validation split."""

import abc
import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.core.checks import check_ranges
from equipoise.data.base import Data, TensorSplit, random_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData(Data):
    """Images with labels.

    Raises:
        ValueError: a field is out of range.
    """

    image_batches: ClassVar[bool] = True

    validation_fraction: float = 0.0
    """Share of the training images that is set aside for validation."""
    crop_padding: int = 0
    """Pixels of padding from which a training image is cropped at random; 0: not cropped."""
    flip: bool = False
    """Whether training images are mirrored with probability one half."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels in [0, 1]; it is subtracted."""
    std: tuple[float, ...]
    """Standard deviation of each channel; the divisor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        check_ranges(self, "data.", validation_fraction=">= 0 and < 1", crop_padding=">= 0")
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0] or min(self.std) <= 0:
            raise ValueError(
                f"data.mean={self.mean} and data.std={self.std} need {self.shape[0]} entries, one per channel, "
                "and standard deviations > 0"
            )

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of an image."""

    def prepare(self, samples: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Augment, scale and center images.

        Args:
            samples: uint8 `(B, C, H, W)` on any device.
            augment: random source of the crops and flips; None: no augmentation.

        Returns:
            float32 `(B, C, H, W)`.
        """
        if augment is not None and self.crop_padding:
            samples = random_crop(samples, self.crop_padding, augment)
        if augment is not None and self.flip:
            samples = random_flip(samples, augment)
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=samples.device)[..., None, None]
        return (samples.to(torch.float32) / 255 - mean) / std

    def _carve(self, images: Tensor, labels: Tensor) -> tuple[TensorSplit, TensorSplit | None]:
        count = round(self.validation_fraction * len(labels))
        train, validation = random_split(len(labels), count)
        if not count:
            return TensorSplit(images, labels), None
        return TensorSplit(images[train], labels[train]), TensorSplit(images[validation], labels[validation])


def random_crop(images: Tensor, padding: int, source: torch.Generator) -> Tensor:
    """Pad images with zeros, and cut a random window of the old size out of each: `(B, C, H, W) -> (B, C, H, W)`."""
    batch, _, height, width = images.shape
    corner = torch.randint(2 * padding + 1, (2, batch), generator=source).to(images.device)
    rows = corner[0, :, None] + torch.arange(height, device=images.device)
    columns = corner[1, :, None] + torch.arange(width, device=images.device)
    padded = F.pad(images, (padding,) * 4)
    batches = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batches, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, source: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half: `(B, C, H, W) -> (B, C, H, W)`."""
    flipped = torch.rand(len(images), generator=source).to(images.device) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)
