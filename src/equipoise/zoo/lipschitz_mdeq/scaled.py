"""Layers of the published MDEQ, each with a bounded constant."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from equipoise.contraction import CappedConv2d, LevelWeights, MeanOnlyGroupNorm, ScaledReLU
from equipoise.core.checks import check_ranges
from equipoise.zoo.mdeq import Contraction, Layers, MDEQCell, MDEQShape, MDEQStem


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledLayers(Contraction, Layers):
    r"""Layers of the published MDEQ, each with a bounded constant, and averages in place of sums.

    $$ b_i = \mathrm{MGN}(s\,\mathrm{ReLU}((1 - \alpha) z_i + \alpha r_i)), \qquad
       y_i = (1 - \beta) b_i + \beta \sum_{j \ne i} w_{ij} T_{ij}(b_j) $$

    MGN is `MeanOnlyGroupNorm`. Convolutions are `CappedConv2d`, without weight normalization.

    Raises:
        ValueError: a field is out of range.

    Source: Sato and Iiduka, "Lipschitz Multiscale Deep Equilibrium Models", AISTATS 2026 (arXiv 2602.03297); values of
        the released code.
    """

    slope: float = 0.4
    """Slope $s$ of the activations, in (0, 1]; the constant grows at least with its square."""
    update: float = 0.5
    """Share $\\alpha$ of the residual branch, in [0, 1]; the rest is the state."""
    exchange: float = 0.3
    """Share $\\beta$ of the other levels in the sum, in [0, 1]."""
    weights: Literal["softmax", "uniform"] = "softmax"
    """Split of this share among the other levels."""
    max_gamma: float = 1.0
    """Bound of the scales of the norms."""
    cap: float = 2.0
    """Bound of the operator norm of every convolution."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "model.contraction.",
            slope="> 0 and <= 1",
            update=">= 0 and <= 1",
            exchange=">= 0 and <= 1",
            max_gamma="> 0",
            cap="> 0",
        )
        if self.weights not in ("softmax", "uniform"):
            raise ValueError(f"weights={self.weights!r}: must be softmax or uniform")

    def stem(self, shape: MDEQShape) -> nn.Module:
        return MDEQStem(shape)

    def cell(self, shape: MDEQShape) -> nn.Module:
        return MDEQCell(shape, self)

    def convolution(
        self, inputs: int, outputs: int, kernel: int, *, size: int, stride: int = 1, normed: bool = False
    ) -> nn.Module:
        return CappedConv2d(inputs, outputs, kernel, stride=stride, cap=self.cap, size=size)

    def norm(self, groups: int, channels: int, *, affine: bool = True) -> nn.Module:
        return MeanOnlyGroupNorm(groups, channels, max_gamma=self.max_gamma, affine=affine)

    def activation(self) -> nn.Module:
        return ScaledReLU(self.slope)

    def level_weights(self, num_levels: int) -> LevelWeights:
        return LevelWeights(num_levels, self.weights, exchange=self.exchange)

    def residual(self, z: Tensor, r: Tensor) -> Tensor:
        return torch.lerp(z, r, self.update)

    def residual_bound(self, branch: float) -> float:
        return 1 - self.update + self.update * branch

    def block_matrix(self, num_levels: int, *, dropout: float = 0.0) -> Tensor:
        r"""Bounds of the influence of the levels on each other, with every layer at its bound.

        $\|f_i(z) - f_i(z')\| \le \sum_j M_{ij} \|z_j - z'_j\|$; known before training.

        Args:
            num_levels: $n$.
            dropout: probability of dropping a channel, in training; 0 in evaluation.

        Returns:
            `(n, n)` $M$, float64.

        Example:
            >>> import torch
            >>> from equipoise.zoo import ScaledLayers
            >>> round(float(torch.linalg.matrix_norm(ScaledLayers().block_matrix(4), ord=2)), 3)
            0.732
        """
        s, g, c = self.slope, self.max_gamma, self.cap
        block = g * s * self.residual_bound(g * c * s * g * c / (1 - dropout))
        if num_levels == 1:
            return torch.tensor([[block]], dtype=torch.float64)
        share = self.level_weights(num_levels)().double()
        paths = torch.ones_like(share)
        for i in range(num_levels):
            for j in range(num_levels):
                if j > i:
                    paths[i, j] = 2 ** (j - i) * g * c
                elif j < i:
                    paths[i, j] = (g * c) ** (i - j) * s ** (i - j - 1)
        return max(1.0, g) * c * s * share * paths * block  # the norm after the fusion may have no scales

    def constant(self, num_levels: int, *, dropout: float = 0.0) -> float:
        return float(torch.linalg.matrix_norm(self.block_matrix(num_levels, dropout=dropout), ord=2))

    def capped(self, num_levels: int, *, dropout: float = 0.0, limit: float = 0.99) -> ScaledLayers:
        """Return these layers with the largest cap, at most the present one, that keeps the constant below a limit.

        Args:
            num_levels: of the model.
            dropout: of the model.
            limit: of the norm of the block matrix in training, below 1.

        Raises:
            ValueError: a limit outside (0, 1), or none of the caps reaches it.
        """
        if not 0 < limit < 1:
            raise ValueError(f"limit={limit!r}: must lie in (0, 1); only below 1 is there a contraction")

        def norm(cap: float) -> float:
            return dataclasses.replace(self, cap=cap).constant(num_levels, dropout=dropout)

        if norm(self.cap) <= limit:
            return self
        low, high = 0.0, self.cap
        for _ in range(60):
            low, high = ((low + high) / 2, high) if norm((low + high) / 2) <= limit else (low, (low + high) / 2)
        cap = math.floor(low * 1000) / 1000
        if cap <= 0:
            raise ValueError(
                f"slope={self.slope!r} and update={self.update!r} admit no cap with a constant <= {limit!r}"
            )
        return dataclasses.replace(self, cap=cap)
