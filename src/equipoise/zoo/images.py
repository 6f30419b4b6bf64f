"""Models of square images: their configuration, and the check that the data fits."""

import dataclasses

from equipoise.core.checks import check_ranges
from equipoise.data import Data
from equipoise.train import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageModelConfig(ModelConfig):
    """Shape of a model of images; a subclass adds its own fields.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: int
    """Side of the square images in pixels."""
    image_channels: int = 3
    """Channels of the images: 3 for color, 1 for grayscale."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.", image_size=">= 1", image_channels=">= 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of an image."""
        return (self.image_channels, self.image_size, self.image_size)


def check_shapes(model: ImageModelConfig, data: Data) -> None:
    """Check that the data has images of the model's shape.

    Raises:
        ValueError: it has others.
    """
    if data.shape != model.image_shape:
        raise ValueError(
            f"the data has images of shape {data.shape}, the model takes {model.image_shape}; set model.image_size and "
            "model.image_channels, or data.image_size"
        )
