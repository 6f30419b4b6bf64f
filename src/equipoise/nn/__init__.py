"""The DEQ module, layers that are safe inside it or have known constants, and penalties."""

from equipoise.nn.capped import CappedConv2d
from equipoise.nn.deq import DEQ
from equipoise.nn.frozen import frozen
from equipoise.nn.layers import VariationalDropout, spectral_norm, weight_norm
from equipoise.nn.lipschitz import (
    IsometricUpsample,
    LevelWeights,
    MaxMin,
    MeanOnlyGroupNorm,
    NearestUpsample,
    ScaledReLU,
    SLLBlock,
    UnknownConstant,
    lipschitz_bound,
)
from equipoise.nn.operator_norm import conv_norm_bound
from equipoise.nn.penalties import jacobian_penalty, skip_penalty, spectral_radius

__all__ = [
    "DEQ",
    "CappedConv2d",
    "IsometricUpsample",
    "LevelWeights",
    "MaxMin",
    "MeanOnlyGroupNorm",
    "NearestUpsample",
    "SLLBlock",
    "ScaledReLU",
    "UnknownConstant",
    "VariationalDropout",
    "conv_norm_bound",
    "frozen",
    "jacobian_penalty",
    "lipschitz_bound",
    "skip_penalty",
    "spectral_norm",
    "spectral_radius",
    "weight_norm",
]
