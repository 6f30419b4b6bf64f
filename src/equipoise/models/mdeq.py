r"""The multiscale deep equilibrium model (MDEQ): its map, and the stem that feeds it.

The state is a tuple of feature maps $z = (z_0, \dots, z_{n-1})$, finest first, `z_i` of shape
`(B, C_i, H / 2^i, W / 2^i)`. One evaluation of the map sends every level through a residual block, lets the levels
exchange what they found, and normalises the result:

$$b_i = \mathrm{block}_i(z_i, u_i), \quad y_i = \sum_j T_{ij}(b_j), \quad f_i(z) = \mathrm{post}_i(y_i).$$

Only the finest level receives the input, $u = (u_0, 0, \dots, 0)$.

Source: S. Bai, V. Koltun, J. Z. Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020 (arXiv 2006.08656).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equipoise.contraction import (
    CappedConv2d,
    IsometricUpsample,
    LevelWeights,
    MaxMin,
    MeanOnlyGroupNorm,
    NearestUpsample,
    ScaledReLU,
    SLLBlock,
    lipschitz_bound,
)
from equipoise.models.config import MDEQConfig
from equipoise.models.contraction import ScaledLayers, SLLLayers
from equipoise.nn import VariationalDropout, weight_norm


class ResidualBlock(nn.Module):
    r"""Residual block of one level, with the injection inside.

    $$h = \mathrm{ReLU}(\mathrm{GN}(\mathrm{conv}_1 z)), \quad r = \mathrm{GN}(\mathrm{drop}(\mathrm{conv}_2 h) + u),
    \quad b = \mathrm{GN}(\mathrm{ReLU}(r + z)).$$

    With `ScaledLayers`, the average $(1 - \alpha) z + \alpha r$ in the place of the sum.

    Args:
        level: number of the level.
        config: widths, groups, dropout and layers are read from it.

    Source: Bai et al. 2020, section 3; the last norm comes after the ReLU, as in the released code.
    """

    def __init__(self, level: int, config: MDEQConfig) -> None:
        super().__init__()
        channels = config.channels[level]
        hidden = config.expansion * channels
        self.conv1 = _conv(config, level, channels, hidden, 3, normed=True)
        self.norm1 = _norm(config, hidden)
        self.conv2 = _conv(config, level, hidden, channels, 3, normed=True)
        self.dropout = VariationalDropout(config.dropout)
        self.norm2 = _norm(config, channels)
        self.norm3 = _norm(config, channels)
        self.activation = _activation(config)
        self.update = config.contraction.update if isinstance(config.contraction, ScaledLayers) else None

    def forward(self, z: Tensor, u: Tensor | None = None) -> Tensor:
        """Evaluate the block.

        Args:
            z: `(B, C, H, W)` the level's state.
            u: `(B, C, H, W)` the level's injection; None stands for zeros.

        Returns:
            `(B, C, H, W)`.
        """
        h = self.activation(self.norm1(self.conv1(z)))
        r = self.dropout(self.conv2(h))
        r = self.norm2(r if u is None else r + u)
        return self.norm3(self.activation(r + z if self.update is None else torch.lerp(z, r, self.update)))

    def lipschitz_bound(self, training: bool) -> float:
        """Constant of the block, from those of its layers."""
        layers = (self.conv1, self.norm1, self.activation, self.conv2, self.dropout, self.norm2)
        found = math.prod(lipschitz_bound(layer, training=training) for layer in layers)
        outer = lipschitz_bound(self.norm3) * lipschitz_bound(self.activation)
        return outer * (1 + found if self.update is None else 1 - self.update + self.update * found)


class Fusion(nn.Module):
    r"""Exchange between the levels, $y_i = \sum_j A_{ij} T_{ij}(b_j)$ with $T_{ii}$ the identity.

    From coarse to fine, $T_{ij}$ is a 1x1 convolution, a GroupNorm and nearest up-sampling by $2^{j-i}$; from fine to
    coarse, $i - j$ stride-2 3x3 convolutions, each with a GroupNorm, with ReLUs between them. The width changes in the
    last of them. All $A_{ij}$ are one.

    With `ScaledLayers` the weights are averages. With `SLLLayers` they are learned, $\|A\|_2 = 1$, and $T_{ij}$ is
    isometric resampling and a capped 1x1 convolution with MaxMin.

    Args:
        config: widths, groups and layers are read from it.

    Source: Bai et al. 2020, section 3.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        levels = range(config.num_levels)
        path = _isometric_path if isinstance(config.contraction, SLLLayers) else _path
        self.paths = nn.ModuleDict({f"{j}_to_{i}": path(config, j, i) for i in levels for j in levels if j != i})
        self.weights: LevelWeights | None = None
        if isinstance(config.contraction, ScaledLayers):
            self.weights = LevelWeights(
                config.num_levels, config.contraction.weights, exchange=config.contraction.exchange
            )
        elif isinstance(config.contraction, SLLLayers):
            self.weights = LevelWeights(config.num_levels, "learned", exchange=config.contraction.exchange)

    def forward(self, b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add up, for every level, what all levels send it.

        Args:
            b: one `(B, C_i, H_i, W_i)` per level.

        Returns:
            The same shapes.
        """
        weights = None if self.weights is None else self.weights()
        fused = []
        for i, y in enumerate(b):
            if weights is not None:
                y = y * weights[i, i]
            for j, source in enumerate(b):
                if j != i:
                    sent = self.paths[f"{j}_to_{i}"](source)
                    y = y + sent if weights is None else torch.addcmul(y, sent, weights[i, j])
            fused.append(y)
        return tuple(fused)

    def block_matrix(self, training: bool) -> Tensor:
        """`(n, n)`, float64: weight times constant of each path."""
        n = round((1 + math.sqrt(1 + 4 * len(self.paths))) / 2)
        weights = torch.ones(n, n) if self.weights is None else self.weights().detach().cpu()
        matrix = weights.to(torch.float64, copy=True)
        for i in range(n):
            for j in range(n):
                if i != j:
                    matrix[i, j] *= lipschitz_bound(self.paths[f"{j}_to_{i}"], training=training)
        return matrix


class Post(nn.Sequential):
    """What follows the fusion at one level: activation, 1x1 convolution and norm.

    Args:
        level: number of the level.
        config: widths, groups and layers are read from it.
    """

    def __init__(self, level: int, config: MDEQConfig) -> None:
        width = config.channels[level]
        super().__init__(
            _activation(config),
            _conv(config, level, width, width, 1, normed=True),
            _norm(config, width, groups=config.num_groups // 2, affine=config.post_norm_affine),
        )

    def forward(self, y: Tensor, u: Tensor | None) -> Tensor:  # type: ignore[override]
        """`(B, C, H, W) -> (B, C, H, W)`; the injection has had its turn in the block."""
        return super().forward(y)

    def lipschitz_bound(self, training: bool) -> float:
        """Product of its layers' constants."""
        return math.prod(lipschitz_bound(layer, training=training) for layer in self)


class Budget(nn.Module):
    r"""$\kappa y + u$ with a learned budget $\kappa = \bar\kappa \sigma(k)$, the same at every level.

    Args:
        contraction: ceiling $\bar\kappa$ and start.
    """

    def __init__(self, contraction: SLLLayers) -> None:
        super().__init__()
        self.ceiling = contraction.ceiling
        start = contraction.start
        self.logit = nn.Parameter(torch.tensor(math.log(start / (1 - start))))

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """`(B, C, H, W), (B, C, H, W) -> (B, C, H, W)`."""
        return torch.addcmul(u, y, self.ceiling * torch.sigmoid(self.logit))

    def lipschitz_bound(self, training: bool) -> float:
        """The budget."""
        return self.ceiling * float(torch.sigmoid(self.logit.detach()))


class MDEQCell(nn.Module):
    r"""The map of an MDEQ, `f(z, u)`, on a tuple of levels.

    $$f_i(z, u) = \mathrm{post}_i(y_i, u_i), \qquad
    y = \mathrm{fusion}(\mathrm{block}_0(z_0, u_0), \mathrm{block}_1(z_1, 0), \dots).$$

    With a single level there is nothing to fuse and `f` is the residual block. Convolutions have no bias; those of the
    blocks and the last one are weight-normalised. `config.contraction` puts other layers in their places, with which
    `f` contracts.

    Args:
        config: shape of the model.

    Example:
        >>> import torch
        >>> from equipoise.models import MDEQCell, MDEQConfig
        >>> config = MDEQConfig.digits()
        >>> cell = MDEQCell(config).eval()
        >>> u = torch.randn(5, *config.level_shapes[0])
        >>> z = cell(cell.zeros(u), u)
        >>> [tuple(level.shape) for level in z] == [(5, *shape) for shape in config.level_shapes]
        True

    Source: Bai et al. 2020, section 3; with `ScaledLayers`, Sato and Iiduka 2026.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        self.config = config
        levels = range(config.num_levels)
        contraction = config.contraction
        if isinstance(contraction, SLLLayers):
            self.blocks = nn.ModuleList(SLLBlock(width, config.expansion * width) for width in config.channels)
            self.fusion = Fusion(config)
            self.budget = Budget(contraction)
            return
        self.blocks = nn.ModuleList(ResidualBlock(level, config) for level in levels)
        if config.num_levels > 1:
            self.fusion = Fusion(config)
            self.post = nn.ModuleList(Post(level, config) for level in levels)
        initialize(self)

    def forward(self, z: tuple[Tensor, ...], u: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Evaluate the map.

        Args:
            z: one `(B, C_i, H_i, W_i)` per level, finest first.
            u: `(B, C_0, H_0, W_0)` the injection of the finest level; with `SLLLayers`, what `MDEQEncoder` gives.

        Returns:
            A tuple of the shapes of `z`.
        """
        n = len(z)
        outer, inner = (((u,) + (None,) * (n - 1)),) * 2 if isinstance(u, Tensor) else (u[:n], u[n:])
        b = tuple(block(level, a) for block, level, a in zip(self.blocks, z, inner, strict=True))
        if not self._posts:
            return b
        return tuple(post(y, v) for post, y, v in zip(self._posts, self.fusion(b), outer, strict=True))

    @property
    def _posts(self) -> list[nn.Module]:
        """What follows the fusion at each level; nothing where there is none."""
        if isinstance(self.config.contraction, SLLLayers):
            return [self.budget] * self.config.num_levels
        return list(self.post) if self.config.num_levels > 1 else []

    def block_matrix(self, training: bool = False) -> Tensor:
        r"""Bounds $M$ of what the levels do to each other, $\|f_i(z) - f_i(z')\| \le \sum_j M_{ij} \|z_j - z'_j\|$.

        Args:
            training: count dropout.

        Returns:
            `(n, n)`, float64, on the CPU.

        Raises:
            UnknownConstant: a layer has no known constant, as the norms of the published MDEQ.
        """
        blocks = torch.tensor([lipschitz_bound(b, training=training) for b in self.blocks], dtype=torch.float64)
        if not self._posts:
            return blocks[:, None]
        posts = torch.tensor([lipschitz_bound(p, training=training) for p in self._posts], dtype=torch.float64)
        return posts[:, None] * self.fusion.block_matrix(training) * blocks

    def zeros(self, u: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state from which a solve starts: zeros at every level, for the batch and size of `u`.

        Args:
            u: as in `forward`.

        Returns:
            One `(B, C_i, H_0 / 2^i, W_0 / 2^i)` per level.
        """
        finest = u if isinstance(u, Tensor) else u[0]
        batch, _, height, width = finest.shape
        return tuple(
            finest.new_zeros(batch, channels, height // 2**i, width // 2**i)
            for i, channels in enumerate(self.config.channels)
        )


class MDEQStem(nn.Module):
    r"""From images to the injection `u_0`, once per input and outside the fixed point.

    Two or more 3x3 convolutions, each with BatchNorm and ReLU, as many of stride 2 as `num_downsamplings` says; then,
    unless the model has at most two levels and no down-sampling, $u_0 = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{1
    \times 1}(\cdot)))$.

    Args:
        config: shape of the model.

    Source: the code released with Bai et al. 2020.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        width = config.channels[0]
        layers: list[nn.Module] = []
        for number in range(max(2, config.num_downsamplings)):
            layers += [
                conv3x3(
                    width if number else config.image_channels, width, stride=1 + (number < config.num_downsamplings)
                ),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        if config.num_downsamplings > 0 or config.num_levels > 2:
            layers += [conv1x1(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, image_channels, H, W) -> (B, C_0, H_0, W_0)`."""
        return self.layers(images)


class MDEQEncoder(nn.Module):
    r"""From images to injections at every level, $u_i$ to the sum and $a_i$ into the block.

    $$x_0 = \mathrm{stem}(x), \quad x_{i+1} = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{3 \times 3,
    \mathrm{stride}\,2}\, x_i)), \quad u_i = \mathrm{BN}(\mathrm{conv}_{1 \times 1} x_i), \quad
    a_i = \mathrm{BN}(\mathrm{conv}_{3 \times 3} x_i).$$

    It runs once per input, outside the fixed point, so nothing in it is bounded.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        self.stem = MDEQStem(config)
        pairs = zip(config.channels, config.channels[1:], strict=False)
        self.downs = nn.ModuleList(
            nn.Sequential(conv3x3(fine, coarse, stride=2), nn.BatchNorm2d(coarse), nn.ReLU(inplace=True))
            for fine, coarse in pairs
        )
        self.outer = nn.ModuleList(nn.Sequential(conv1x1(c, c), nn.BatchNorm2d(c)) for c in config.channels)
        self.inner = nn.ModuleList(
            nn.Sequential(conv3x3(c, config.expansion * c), nn.BatchNorm2d(config.expansion * c))
            for c in config.channels
        )
        initialize(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`(B, image_channels, H, W)` to `u_i`, `(B, C_i, H_i, W_i)`, then `a_i`, `(B, expansion C_i, H_i, W_i)`."""
        features = [self.stem(images)]
        for down in self.downs:
            features.append(down(features[-1]))
        outer = tuple(layer(x) for layer, x in zip(self.outer, features, strict=True))
        return outer + tuple(layer(x) for layer, x in zip(self.inner, features, strict=True))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with zero padding 1 and no bias: the norm that follows has a shift of its own."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def initialize(module: nn.Module) -> None:
    r"""Draw weights and biases of all plain convolutions from $N(0, 0.01^2)$, in place.

    Weight-normalised convolutions keep PyTorch's default, as they do in the released code, whose initialisation
    writes to their derived weight without effect. Linear layers keep the default, norms start at scale 1, shift 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not parametrize.is_parametrized(layer, "weight"):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.01)


def _path(config: MDEQConfig, source: int, target: int) -> nn.Module:
    """What leads from level `source` to another level, `target`."""
    start, end = config.channels[source], config.channels[target]
    if source > target:
        return nn.Sequential(
            _conv(config, source, start, end, 1), _norm(config, end), NearestUpsample(2 ** (source - target))
        )
    layers: list[nn.Module] = []
    for level in range(source, target - 1):
        layers += [_conv(config, level, start, start, 3, stride=2), _norm(config, start), _activation(config)]
    layers += [_conv(config, target - 1, start, end, 3, stride=2), _norm(config, end)]
    return nn.Sequential(*layers)


def _isometric_path(config: MDEQConfig, source: int, target: int) -> nn.Module:
    """The same with constant 1."""
    start, end = config.channels[source], config.channels[target]
    if source > target:
        return nn.Sequential(
            CappedConv2d(start, end, 1, cap=1.0, size=config.level_shapes[source][1]),
            MaxMin(),
            IsometricUpsample(2 ** (source - target)),
        )
    factor = 2 ** (target - source)
    return nn.Sequential(
        nn.PixelUnshuffle(factor),
        CappedConv2d(start * factor**2, end, 1, cap=1.0, size=config.level_shapes[target][1]),
        MaxMin(),
    )


def _conv(
    config: MDEQConfig, level: int, inputs: int, outputs: int, kernel: int, *, stride: int = 1, normed: bool = False
) -> nn.Module:
    """A convolution of the map, on images of a level: with a capped norm, or with normed weights where it says so."""
    if isinstance(config.contraction, ScaledLayers):
        size = config.level_shapes[level][1]
        return CappedConv2d(inputs, outputs, kernel, stride=stride, cap=config.contraction.cap, size=size)
    conv = conv1x1(inputs, outputs) if kernel == 1 else conv3x3(inputs, outputs, stride=stride)
    return weight_norm(conv) if normed else conv


def _norm(config: MDEQConfig, channels: int, *, groups: int | None = None, affine: bool = True) -> nn.Module:
    groups = config.num_groups if groups is None else groups
    if isinstance(config.contraction, ScaledLayers):
        return MeanOnlyGroupNorm(groups, channels, max_gamma=config.contraction.max_gamma, affine=affine)
    return nn.GroupNorm(groups, channels, affine=affine)


def _activation(config: MDEQConfig) -> nn.Module:
    """The activation inside the map. In place: it follows a norm or a sum, whose results nothing else reads."""
    if isinstance(config.contraction, ScaledLayers):
        return ScaledReLU(config.contraction.slope)
    return nn.ReLU(inplace=True)
