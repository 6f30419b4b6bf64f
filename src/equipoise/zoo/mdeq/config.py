"""Shape of a multiscale deep equilibrium model, and the interface of layers that make it contract."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from torch import nn

from equipoise.core.checks import check_ranges
from equipoise.zoo.classification import ClassifierConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contraction(abc.ABC):
    """Layers with known constants in place of those of an MDEQ; `equipoise.certify` proves the constant of the map.

    Attributes:
        allows_dropout: whether the blocks have dropout.
    """

    allows_dropout: ClassVar[bool] = True

    @abc.abstractmethod
    def constant(self, num_levels: int, *, dropout: float = 0.0) -> float:
        """Return the Lipschitz constant of the map, in the Euclidean norm, with every layer at its bound.

        It is known before training, and decides which solver a recipe takes.

        Args:
            num_levels: of the model.
            dropout: probability of dropping a channel, in training; 0 in evaluation.
        """

    @abc.abstractmethod
    def stem(self, shape: MDEQShape) -> nn.Module:
        """Build the modules from images to injections."""

    @abc.abstractmethod
    def cell(self, shape: MDEQShape) -> nn.Module:
        """Build the map."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDEQShape(ClassifierConfig):
    """Shape of an MDEQ: the fields that its parts read.

    The side of the images is a multiple of `2^(num_downsamplings + levels - 1)`.

    Raises:
        ValueError: a field is out of range, or two fields do not fit each other.
    """

    batch_statistics: ClassVar[bool] = True

    channels: tuple[int, ...]
    """Width of each level, finest first; its length is the number of levels. Multiples of `num_groups`."""
    num_downsamplings: int = 0
    """Stride-2 convolutions in the stem: the finest level has side `image_size / 2^num_downsamplings`."""
    expansion: int = 5
    """Width inside a residual block, as a multiple of the width of the level."""
    num_groups: int = 8
    """Groups of every GroupNorm inside the map, even; the norm after the fusion has half as many."""
    dropout: float = 0.0
    """Probability with which a residual block drops a channel, for a whole solve, in training mode."""
    post_norm_affine: bool = False
    """Whether the norm after the fusion has a learned scale and shift."""
    head_channels: tuple[int, ...]
    """Inner width of the head's bottleneck at each level; the bottleneck returns four times as many channels."""
    final_channels: int
    """Width of the features that are averaged over the image and classified."""
    contraction: Contraction | None = None
    """Layers that make the map contract; None: those of the published MDEQ, which need not contract."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # A list would make equal configurations differ, and unhashable.
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "head_channels", tuple(self.head_channels))
        check_ranges(
            self,
            "model.",
            **dict.fromkeys(("expansion", "num_groups", "channels", "head_channels", "final_channels"), ">= 1"),
            num_downsamplings=">= 0; 0 keeps the size",
            dropout=">= 0 and < 1; 0 turns it off",
        )
        if not self.channels:
            raise ValueError("channels is empty; give the width of at least one level, for example (24, 24)")
        if len(self.head_channels) != len(self.channels):
            raise ValueError(
                f"head_channels {self.head_channels} must have one entry per level, as channels {self.channels} has"
            )
        if self.num_levels > 1 and self.num_groups % 2:
            raise ValueError(
                f"num_groups must be even with more than one level, got {self.num_groups}: the norm after the fusion "
                "has half as many groups"
            )
        if any(width % self.num_groups for width in self.channels):
            raise ValueError(
                f"channels must be multiples of num_groups {self.num_groups}, got {self.channels}; change one of them"
            )
        if self.contraction is not None and not isinstance(self.contraction, Contraction):
            raise TypeError(f"contraction must be a Contraction such as ScaledLayers(), or None: {self.contraction!r}")
        if self.contraction is not None and self.predictor:
            raise ValueError(
                "predictor=true has no use with model.contraction: a certificate predicts the evaluations from "
                "zeros; set explicit_steps=1, or leave one of them out"
            )
        if self.contraction is not None and self.dropout and not self.contraction.allows_dropout:
            raise ValueError(
                f"dropout={self.dropout} has no place in {type(self.contraction).__name__}, whose blocks would expand; "
                "set it to 0"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of {self.stride}, got {self.image_size}: {self.num_downsamplings} "
                f"downsamplings and {self.num_levels} levels halve it {self.num_downsamplings + self.num_levels - 1} "
                "times; use fewer of them, or pad or resize the images"
            )

    @property
    def num_levels(self) -> int:
        """Number of resolutions `n`."""
        return len(self.channels)

    @property
    def stride(self) -> int:
        """Ratio of the image's side to that of the coarsest level."""
        return 2 ** (self.num_downsamplings + self.num_levels - 1)

    @property
    def level_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shape `(C_i, H_i, W_i)` of each level of one sample, finest first."""
        finest = self.image_size // 2**self.num_downsamplings
        return tuple((width, finest // 2**i, finest // 2**i) for i, width in enumerate(self.channels))

    @property
    def state_size(self) -> int:
        """Number of elements `D` of one sample's state."""
        return sum(width * height * breadth for width, height, breadth in self.level_shapes)

    def lipschitz_limit(self, *, training: bool) -> float | None:
        if self.contraction is None:
            return None
        return self.contraction.constant(self.num_levels, dropout=self.dropout if training else 0.0)
