"""Classification of images by an equilibrium: configuration and base class of the models."""

import dataclasses
from typing import ClassVar

from torch import Tensor, nn

from equipoise.core.checks import check_ranges
from equipoise.core.solution import Solution
from equipoise.nn import DEQ
from equipoise.zoo.base import ImageModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ImageModelConfig):
    """Shape of a classifier of images by an equilibrium; a subclass adds its own fields.

    Attributes:
        batch_statistics: whether images of a batch influence each other in training, by BatchNorm.

    Raises:
        ValueError: a field is out of range.
    """

    batch_statistics: ClassVar[bool] = False

    num_classes: int
    """Number of logits."""
    predictor: bool = False
    """Whether the solve begins at the guess of a predictor network: a Skip DEQ."""
    explicit_steps: int = 0
    """Applications of the map before the solve, through which its start is differentiable; 1: a Skip Reg DEQ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "model.", num_classes=">= 1", explicit_steps=">= 0")

    @property
    def guesses(self) -> bool:
        return self.predictor


class EquilibriumClassifier(nn.Module):
    r"""Base of classifiers of images: stem, equilibrium, head.

    $$u = \mathrm{stem}(x), \quad z^* = f(z^*, u), \quad \mathrm{logits} = \mathrm{head}(z^*).$$

    Args:
        config: shape of the model.
        stem: from images to the input of the map.
        deq: the equilibrium.
        head: from the equilibrium to logits.
    """

    def __init__(self, config: ClassifierConfig, *, stem: nn.Module, deq: DEQ, head: nn.Module) -> None:
        super().__init__()
        self.config, self.stem, self.deq, self.head = config, stem, deq, head

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: `(B, image_channels, image_size, image_size)`.

        Returns:
            `(B, num_classes)` logits.

        Raises:
            ValueError: `images` has another shape.
        """
        return self.classify(images)[0]

    def classify(self, images: Tensor) -> tuple[Tensor, Solution]:
        """Classify images, and return the equilibria.

        Args:
            images: `(B, image_channels, image_size, image_size)`.

        Returns:
            `(B, num_classes)` logits, and the `Solution` that the head read: steps and statuses for the training log,
            the map for a Jacobian penalty.

        Raises:
            ValueError: `images` has another shape.
        """
        expected = self.config.image_shape
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}; resize them, "
                "or build the model with another image_size"
            )
        solution = self.deq.solve(self.stem(images))
        return self.head(solution.value), solution
