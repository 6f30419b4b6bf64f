"""Corruptions of images, the observation models of inverse problems."""

import abc
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.core.checks import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption(abc.ABC):
    """Observation model of images: a known linear map, noise, missing pixels."""

    @abc.abstractmethod
    def apply(self, images: Tensor) -> Tensor:
        """Apply the known map alone, differentiable, `(B, C, H, W) -> (B, C, h, w)`."""

    def observe(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Observe clean images.

        Args:
            images: `(B, C, H, W)`, between 0 and 1.
            generator: random source, on the CPU, so that it is the same on every device.

        Returns:
            Observations `(B, C, h, w)`, and a mask of that shape: 1 where a pixel was seen, 0 elsewhere.
        """
        observed = self.apply(images)
        return observed, torch.ones_like(observed)

    def complete(self, estimate: Tensor, observed: Tensor, mask: Tensor) -> Tensor:
        """Replace pixels of an estimate by those that were seen without noise.

        Args:
            estimate: `(B, C, H, W)`.
            observed: from `observe`.
            mask: from `observe`.
        """
        return estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Corruption):
    """Additive white Gaussian noise, not clipped to [0, 1]."""

    std: float = 0.1
    """Standard deviation, for pixels in [0, 1]."""

    def __post_init__(self) -> None:
        check_ranges(self, std="> 0 and < inf")

    def apply(self, images: Tensor) -> Tensor:
        return images

    def observe(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        return images + self.std * noise, torch.ones_like(images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hole(Corruption):
    """Square of missing pixels at a random place in each image; they are observed as zeros."""

    size: int = 9
    """Side in pixels."""

    def __post_init__(self) -> None:
        check_ranges(self, size=">= 1")

    def apply(self, images: Tensor) -> Tensor:
        return images

    def observe(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        batch, _, height, width = images.shape
        if self.size >= min(height, width):
            raise ValueError(f"Hole(size={self.size}) covers images of {height}x{width}; make it smaller")
        inside = []
        for side in (height, width):
            first = torch.randint(side - self.size + 1, (batch, 1), generator=generator)
            place = torch.arange(side)
            inside.append(((place >= first) & (place < first + self.size)).to(images.device))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        mask = (~hole).to(images.dtype).expand_as(images)
        return images * mask, mask

    def complete(self, estimate: Tensor, observed: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask > 0, observed, estimate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blur(Corruption):
    """Convolution with a Gaussian, cut off at three standard deviations; the edge of the image is continued."""

    sigma: float = 1.5
    """Standard deviation in pixels."""

    def __post_init__(self) -> None:
        check_ranges(self, sigma="> 0 and < inf")

    def apply(self, images: Tensor) -> Tensor:
        reach = math.ceil(3 * self.sigma)
        place = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-0.5 * (place / self.sigma).square())
        kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
        padded = F.pad(images, (reach,) * 4, mode="replicate")
        rows = F.conv2d(padded, kernel, groups=images.shape[1])
        return F.conv2d(rows, kernel.mT, groups=images.shape[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Downsample(Corruption):
    """Average pooling."""

    factor: int = 4
    """Side of a pooled square, a divisor of the sides of the images."""

    def __post_init__(self) -> None:
        check_ranges(self, factor=">= 2")

    def apply(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"Downsample(factor={self.factor}) does not divide images of {height}x{width}")
        return F.avg_pool2d(images, self.factor)
