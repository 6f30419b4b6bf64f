r"""Map of the multiscale deep equilibrium model (MDEQ).

The state is a tuple of feature maps $z = (z_0, \dots, z_{n-1})$, finest first, `z_i` of shape
`(B, C_i, H / 2^i, W / 2^i)`. One evaluation of the map sends every level through a residual block, lets the levels
exchange their results, and normalizes the sum:

$$b_i = \mathrm{block}_i(z_i, u_i), \quad y_i = \sum_j T_{ij}(b_j), \quad f_i(z) = \mathrm{post}_i(y_i).$$

Only the finest level receives the input, $u = (u_0, 0, \dots, 0)$.

Source: S. Bai, V. Koltun, J. Z. Kolter, "Multiscale Deep Equilibrium Models", NeurIPS 2020 (arXiv 2006.08656).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from equipoise.contraction import LevelWeights, NearestUpsample, lipschitz_bound
from equipoise.nn import VariationalDropout, weight_norm
from equipoise.zoo.mdeq.config import MDEQShape
from equipoise.zoo.mdeq.stem import conv1x1, conv3x3, initialize


class Layers:
    """Layers of the map of the published MDEQ; a subclass has others."""

    def convolution(
        self, inputs: int, outputs: int, kernel: int, *, size: int, stride: int = 1, normed: bool = False
    ) -> nn.Module:
        """Build a convolution.

        Args:
            inputs: channels that come in.
            outputs: channels that go out.
            kernel: 1 or 3.
            size: side of the images.
            stride: of the convolution.
            normed: whether its weights are normalized.
        """
        conv = conv1x1(inputs, outputs) if kernel == 1 else conv3x3(inputs, outputs, stride=stride)
        return weight_norm(conv) if normed else conv

    def norm(self, groups: int, channels: int, *, affine: bool = True) -> nn.Module:
        """Build a norm of groups of channels."""
        return nn.GroupNorm(groups, channels, affine=affine)

    def activation(self) -> nn.Module:
        """Build an activation. In place: it follows a norm or a sum, whose results nothing else reads."""
        return nn.ReLU(inplace=True)

    def level_weights(self, num_levels: int) -> LevelWeights | None:
        """Build the weights of the sum over the levels; None: all are one."""
        return None

    def residual(self, z: Tensor, r: Tensor) -> Tensor:
        """Combine the state of a level with the result of its residual branch, both `(B, C, H, W)`."""
        return r + z

    def residual_bound(self, branch: float) -> float:
        """Return the Lipschitz constant of `residual`, from that of the branch."""
        return 1 + branch


class ResidualBlock(nn.Module):
    r"""Residual block of one level, with the injection inside.

    $$h = \mathrm{ReLU}(\mathrm{GN}(\mathrm{conv}_1 z)), \quad r = \mathrm{GN}(\mathrm{drop}(\mathrm{conv}_2 h) + u),
    \quad b = \mathrm{GN}(\mathrm{ReLU}(r + z)).$$

    Args:
        level: number of the level.
        shape: widths, groups and dropout are read from it.
        layers: of the block.

    Source: Bai et al. 2020, section 3; the last norm comes after the ReLU, as in the released code.
    """

    def __init__(self, level: int, shape: MDEQShape, layers: Layers = Layers()) -> None:
        super().__init__()
        channels, size = shape.channels[level], shape.level_shapes[level][1]
        hidden = shape.expansion * channels
        self.layers = layers
        self.conv1 = layers.convolution(channels, hidden, 3, size=size, normed=True)
        self.norm1 = layers.norm(shape.num_groups, hidden)
        self.conv2 = layers.convolution(hidden, channels, 3, size=size, normed=True)
        self.dropout = VariationalDropout(shape.dropout)
        self.norm2 = layers.norm(shape.num_groups, channels)
        self.norm3 = layers.norm(shape.num_groups, channels)
        self.activation = layers.activation()

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
        return self.norm3(self.activation(self.layers.residual(z, r)))

    def lipschitz_bound(self, training: bool) -> float:
        """Return the constant of the block, from those of its layers."""
        layers = (self.conv1, self.norm1, self.activation, self.conv2, self.dropout, self.norm2)
        found = math.prod(lipschitz_bound(layer, training=training) for layer in layers)
        outer = lipschitz_bound(self.norm3) * lipschitz_bound(self.activation)
        return outer * self.layers.residual_bound(found)


class Fusion(nn.Module):
    r"""Exchange between levels, $y_i = \sum_j A_{ij} T_{ij}(b_j)$ with $T_{ii}$ the identity.

    From coarse to fine, $T_{ij}$ is a 1x1 convolution, a GroupNorm and nearest up-sampling by $2^{j-i}$; from fine to
    coarse, $i - j$ stride-2 3x3 convolutions, each with a GroupNorm, with ReLUs between them. The width changes in the
    last of them.

    Args:
        num_levels: number of the levels.
        path: builds $T_{ij}$, from level `j` to another level `i`.
        weights: $A$; None: all are one.

    Source: Bai et al. 2020, section 3.
    """

    def __init__(
        self, num_levels: int, path: Callable[[int, int], nn.Module], weights: LevelWeights | None = None
    ) -> None:
        super().__init__()
        levels = range(num_levels)
        self.paths = nn.ModuleDict({f"{j}_to_{i}": path(j, i) for i in levels for j in levels if j != i})
        self.weights = weights

    def forward(self, b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add up, for every level, the contributions of all levels.

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
        """Return the weight times the constant of each path, `(n, n)`, float64."""
        n = round((1 + math.sqrt(1 + 4 * len(self.paths))) / 2)
        weights = torch.ones(n, n) if self.weights is None else self.weights().detach().cpu()
        matrix = weights.to(torch.float64, copy=True)
        for i in range(n):
            for j in range(n):
                if i != j:
                    matrix[i, j] *= lipschitz_bound(self.paths[f"{j}_to_{i}"], training=training)
        return matrix


class Post(nn.Sequential):
    """End of the map at one level, after the fusion: activation, 1x1 convolution and norm.

    Args:
        level: number of the level.
        shape: widths and groups are read from it.
        layers: of the map.
    """

    def __init__(self, level: int, shape: MDEQShape, layers: Layers = Layers()) -> None:
        width, size = shape.channels[level], shape.level_shapes[level][1]
        super().__init__(
            layers.activation(),
            layers.convolution(width, width, 1, size=size, normed=True),
            layers.norm(shape.num_groups // 2, width, affine=shape.post_norm_affine),
        )

    def lipschitz_bound(self, training: bool) -> float:
        """Return the product of the constants of its layers."""
        return math.prod(lipschitz_bound(layer, training=training) for layer in self)


class MDEQCell(nn.Module):
    r"""Map of an MDEQ, `f(z, u)`, on a tuple of levels.

    $$f_i(z, u) = \mathrm{post}_i(y_i), \qquad
    y = \mathrm{fusion}(\mathrm{block}_0(z_0, u), \mathrm{block}_1(z_1, 0), \dots).$$

    With a single level there is nothing to fuse and `f` is the residual block. Convolutions have no bias; those of the
    blocks and the last one are weight-normalized.

    Args:
        shape: shape of the model.
        layers: of the map.

    Example:
        >>> import torch
        >>> from equipoise.zoo import MDEQCell, MDEQConfig
        >>> config = MDEQConfig.digits()
        >>> cell = MDEQCell(config).eval()
        >>> u = torch.randn(5, *config.level_shapes[0])
        >>> z = cell(cell.zeros(u), u)
        >>> [tuple(level.shape) for level in z] == [(5, *shape) for shape in config.level_shapes]
        True

    Source: Bai et al. 2020, section 3.
    """

    def __init__(self, shape: MDEQShape, layers: Layers = Layers()) -> None:
        super().__init__()
        self.shape, self.layers = shape, layers
        levels = range(shape.num_levels)
        self.blocks = nn.ModuleList(ResidualBlock(level, shape, layers) for level in levels)
        if shape.num_levels > 1:
            self.fusion = Fusion(shape.num_levels, self._path, layers.level_weights(shape.num_levels))
            self.post = nn.ModuleList(Post(level, shape, layers) for level in levels)
        initialize(self)

    def forward(self, z: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        """Evaluate the map.

        Args:
            z: one `(B, C_i, H_i, W_i)` per level, finest first.
            u: `(B, C_0, H_0, W_0)` the injection of the finest level.

        Returns:
            A tuple of the shapes of `z`.
        """
        b = (self.blocks[0](z[0], u), *(block(level) for block, level in zip(self.blocks[1:], z[1:], strict=True)))
        if len(b) == 1:
            return b
        return tuple(post(y) for post, y in zip(self.post, self.fusion(b), strict=True))

    def block_matrix(self, training: bool = False) -> Tensor:
        r"""Bounds of the influence of the levels on each other.

        $\|f_i(z) - f_i(z')\| \le \sum_j M_{ij} \|z_j - z'_j\|$

        Args:
            training: count dropout.

        Returns:
            $M$, `(n, n)`, float64, on the CPU.

        Raises:
            UnknownConstant: a layer has no known constant, as the norms of the published MDEQ.
        """
        blocks = constants(self.blocks, training)
        if len(self.blocks) == 1:
            return blocks[:, None]
        return constants(self.post, training)[:, None] * self.fusion.block_matrix(training) * blocks

    def zeros(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return the start of a solve: zeros at every level, for the batch and size of `u`."""
        return zeros(u, self.shape.channels)

    def _path(self, source: int, target: int) -> nn.Module:
        """Build the path from level `source` to another level, `target`."""
        shape, layers = self.shape, self.layers
        start, end = shape.channels[source], shape.channels[target]
        sizes = [size for _, size, _ in shape.level_shapes]
        groups = shape.num_groups
        if source > target:
            return nn.Sequential(
                layers.convolution(start, end, 1, size=sizes[source]),
                layers.norm(groups, end),
                NearestUpsample(2 ** (source - target)),
            )
        path: list[nn.Module] = []
        for level in range(source, target - 1):
            path += [
                layers.convolution(start, start, 3, size=sizes[level], stride=2),
                layers.norm(groups, start),
                layers.activation(),
            ]
        path += [layers.convolution(start, end, 3, size=sizes[target - 1], stride=2), layers.norm(groups, end)]
        return nn.Sequential(*path)


def constants(modules: Iterable[nn.Module], training: bool) -> Tensor:
    """Return the Lipschitz constants of modules, `(n,)`, float64."""
    return torch.tensor([lipschitz_bound(module, training=training) for module in modules], dtype=torch.float64)


def zeros(finest: Tensor, channels: Sequence[int]) -> tuple[Tensor, ...]:
    """Return zeros `(B, C_i, H_0 / 2^i, W_0 / 2^i)` at every level, for a finest level `(B, C, H_0, W_0)`."""
    batch, _, height, width = finest.shape
    return tuple(finest.new_zeros(batch, c, height // 2**i, width // 2**i) for i, c in enumerate(channels))
