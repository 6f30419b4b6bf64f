"""Shapes of multiscale deep equilibrium models: a frozen configuration, and the published ones by name.

Source: S. Bai, V. Koltun, J. Z. Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020 (arXiv 2006.08656);
widths and training lengths as in the code released by its authors. The "regularized" configurations are those of
S. Bai, V. Koltun, J. Z. Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", ICML 2021
(arXiv 2106.14342).
"""

from __future__ import annotations

import abc
import dataclasses

from equipoise.models.contraction import Contraction, ScaledLayers, SLLLayers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """What every model of images by an equilibrium has; a subclass adds the shape of its own.

    Raises:
        ValueError: a field is out of range.
    """

    image_size: int
    """Side of the square images in pixels."""
    image_channels: int = 3
    """Channels of the images: 3 for color, 1 for grayscale."""

    def __post_init__(self) -> None:
        for name in ("image_size", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    @abc.abstractmethod
    def state_size(self) -> int:
        """Number of elements `D` of one sample's state."""

    @property
    def guesses(self) -> bool:
        """Whether a solve begins at a guess of the equilibrium."""
        return False

    def lipschitz_limit(self, *, training: bool) -> float | None:
        """Largest Lipschitz constant that the layers of the map allow, whatever the weights; None: any.

        Args:
            training: count dropout.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """What every classifier of images by an equilibrium has.

    Raises:
        ValueError: a field is out of range.
    """

    num_classes: int
    """Number of logits."""
    predictor: bool = False
    """Whether a network of its own guesses the equilibrium, and the solve begins there: a Skip DEQ."""
    explicit_steps: int = 0
    """Applications of the map before the solve, through which its start is differentiable; 1: a Skip Reg DEQ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.explicit_steps < 0:
            raise ValueError(f"explicit_steps must not be negative, got {self.explicit_steps}")

    @property
    def guesses(self) -> bool:
        return self.predictor


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDEQConfig(ClassifierConfig):
    """Shape of an MDEQ classifier; a variant is `dataclasses.replace(config, field=value)`.

    The side of the images is a multiple of `2^(num_downsamplings + levels - 1)`.

    Raises:
        ValueError: a field is out of range, or two fields do not fit each other.

    Example:
        >>> from equipoise.models import MDEQConfig
        >>> config = MDEQConfig.cifar10_large()
        >>> config.level_shapes
        ((32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4))
        >>> config.state_size
        61440
    """

    channels: tuple[int, ...]
    """Width of each level, finest first; its length is the number of levels. Multiples of `num_groups`."""
    num_downsamplings: int = 0
    """Stride-2 convolutions in the stem: the finest level has side `image_size / 2^num_downsamplings`."""
    expansion: int = 5
    """Width inside a residual block, as a multiple of the level's width."""
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
    """Layers that make the map contract; None: those of the published MDEQ, which promise nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Lists, as read from YAML, would make equal configurations differ and unhashable.
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "head_channels", tuple(self.head_channels))
        for name in ("expansion", "num_groups", "final_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_downsamplings < 0:
            raise ValueError(f"num_downsamplings must not be negative, got {self.num_downsamplings}; 0 keeps the size")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}; 0 turns it off")
        if not self.channels:
            raise ValueError("channels is empty; give the width of at least one level, for example (24, 24)")
        if len(self.head_channels) != len(self.channels):
            raise ValueError(
                f"head_channels {self.head_channels} must have one entry per level, as channels {self.channels} has"
            )
        if min(self.head_channels) < 1:
            raise ValueError(f"head_channels must all be at least 1, got {self.head_channels}")
        if self.num_levels > 1 and self.num_groups % 2:
            raise ValueError(
                f"num_groups must be even with more than one level, got {self.num_groups}: the norm after the fusion "
                "has half as many groups"
            )
        if any(width < 1 or width % self.num_groups for width in self.channels):
            raise ValueError(
                f"channels must be multiples of num_groups {self.num_groups}, got {self.channels}; change one of them"
            )
        if self.contraction is not None and not isinstance(self.contraction, (ScaledLayers, SLLLayers)):
            raise TypeError(f"contraction must be ScaledLayers, SLLLayers or None, got {self.contraction!r}")
        if self.contraction is not None and self.predictor:
            raise ValueError(
                "predictor=true has no use with model.contraction: the evaluations that a certificate predicts are "
                "those from zeros; set explicit_steps=1, or leave one of them out"
            )
        if isinstance(self.contraction, SLLLayers) and self.dropout:
            raise ValueError(
                f"dropout={self.dropout} has no place in SLLLayers, whose blocks would expand; set it to 0"
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

    @classmethod
    def digits(cls) -> MDEQConfig:
        """8x8 grayscale digits, two levels, small enough to train in a minute."""
        return cls(
            image_size=8,
            image_channels=1,
            num_classes=10,
            channels=(16, 32),
            expansion=2,
            num_groups=4,
            dropout=0.1,
            head_channels=(8, 16),
            final_channels=64,
        )

    @classmethod
    def fashion_mnist(cls) -> MDEQConfig:
        """28x28 grayscale images, two levels, 14x14 and 7x7, small enough to train on a CPU."""
        return cls(
            image_size=28,
            image_channels=1,
            num_classes=10,
            channels=(32, 64),
            num_downsamplings=1,
            expansion=2,
            head_channels=(16, 32),
            final_channels=128,
        )

    @classmethod
    def cifar10_tiny(cls) -> MDEQConfig:
        """CIFAR-10 without augmentation, two levels, 158,890 parameters (published as "170K")."""
        return cls(
            image_size=32,
            num_classes=10,
            channels=(24, 24),
            dropout=0.25,
            head_channels=(8, 16),
            final_channels=200,
        )

    @classmethod
    def cifar10_large(cls) -> MDEQConfig:
        """CIFAR-10 with augmentation, four levels, 11,097,438 parameters (published as "10M")."""
        return cls(
            image_size=32,
            num_classes=10,
            channels=(32, 64, 128, 256),
            dropout=0.3,
            head_channels=(14, 28, 56, 112),
            final_channels=1680,
        )

    @classmethod
    def cifar10_large_regularized(cls) -> MDEQConfig:
        """`cifar10_large` for training with a Jacobian penalty: less dropout, 11,097,438 parameters."""
        return dataclasses.replace(cls.cifar10_large(), dropout=0.22)

    @classmethod
    def imagenet_small(cls) -> MDEQConfig:
        """ImageNet, four levels from 56x56, 16,808,936 parameters (published as "18M")."""
        return cls(
            image_size=224,
            num_classes=1000,
            channels=(32, 64, 128, 256),
            num_downsamplings=2,
            post_norm_affine=True,
            head_channels=(24, 48, 96, 192),
            final_channels=2048,
        )

    @classmethod
    def imagenet_small_regularized(cls) -> MDEQConfig:
        """`imagenet_small` for training with a Jacobian penalty: wider head, 18,613,496 parameters."""
        return dataclasses.replace(
            cls.imagenet_small(), dropout=0.02, post_norm_affine=False, head_channels=(28, 56, 112, 224)
        )

    @classmethod
    def imagenet_large(cls) -> MDEQConfig:
        """ImageNet, four levels from 56x56, 67,063,624 parameters (published as "63M")."""
        return dataclasses.replace(cls.imagenet_small(), channels=(80, 160, 320, 640), head_channels=(32, 64, 128, 256))

    @classmethod
    def imagenet_large_regularized(cls) -> MDEQConfig:
        """`imagenet_large` for training with a Jacobian penalty, 67,061,224 parameters."""
        return dataclasses.replace(cls.imagenet_large(), post_norm_affine=False)

    @classmethod
    def imagenet_xl(cls) -> MDEQConfig:
        """ImageNet, four levels from 56x56, 90,463,280 parameters (published as "81M")."""
        return dataclasses.replace(cls.imagenet_large(), channels=(88, 176, 352, 704), expansion=6)
