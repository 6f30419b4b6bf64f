"""Interface of decoders, whose latents are optimized."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from equipoise.nn import DEQ
from equipoise.zoo.generative.corruptions import Corruption
from equipoise.zoo.images import ImageModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDecoderConfig(ImageModelConfig):
    """Shape of a decoder of latents; a subclass adds its own fields.

    Attributes:
        conditional: whether the map has the observation as an input. Then latents of zero are a guess, and the model
            has a penalty of latents and a data weight for each kind of corruption.
    """

    conditional: ClassVar[bool] = False

    def check_corruptions(self, corruptions: Sequence[Corruption]) -> None:
        """Check that the model can be trained for corruptions.

        Raises:
            ValueError: it cannot.
        """


class ImageDecoder(nn.Module, abc.ABC):
    """Decoder of latents by an equilibrium."""

    config: Any  # of the model's own class
    deq: DEQ

    @abc.abstractmethod
    def decode(self, z: Any) -> Tensor:
        """Images of states, `(B, C, H, W)`."""

    @abc.abstractmethod
    def latents(self, batch: int, height: int, width: int) -> Tensor:
        """Start of the search for latents, zeros.

        Args:
            batch: number of images.
            height: of the images.
            width: of the images.
        """

    @abc.abstractmethod
    def start(self, x: Tensor, *context: Tensor) -> Any:
        """Start of the solve for the state, zeros."""

    def context(self, observed: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Inputs of the map beside state and latents.

        Args:
            observed: `(B, C, H, W)`.
            mask: of the same shape.
        """
        return ()

    def penalty(self, x: Tensor) -> Tensor:
        """Penalty of latents, `(B,)`."""
        raise NotImplementedError(f"{type(self).__name__} has no penalty of latents")

    def weights(self) -> Tensor:
        """Data weight of each kind of corruption, `(num_corruptions,)`."""
        raise NotImplementedError(f"{type(self).__name__} has no data weights")
