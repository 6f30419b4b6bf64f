"""Layers with known Lipschitz constants, and certificates that a map contracts."""

from equipoise.contraction.bounds import UnknownConstant, lipschitz_bound
from equipoise.contraction.capped import CappedConv2d
from equipoise.contraction.certificate import Certificate, CertificateError, certify, contraction_solver, jacobian_norm
from equipoise.contraction.layers import (
    IsometricUpsample,
    LevelWeights,
    MaxMin,
    MeanOnlyGroupNorm,
    NearestUpsample,
    ScaledReLU,
    SLLBlock,
)
from equipoise.contraction.operator_norm import conv_norm_bound

__all__ = [
    "CappedConv2d",
    "Certificate",
    "CertificateError",
    "IsometricUpsample",
    "LevelWeights",
    "MaxMin",
    "MeanOnlyGroupNorm",
    "NearestUpsample",
    "SLLBlock",
    "ScaledReLU",
    "UnknownConstant",
    "certify",
    "contraction_solver",
    "conv_norm_bound",
    "jacobian_norm",
    "lipschitz_bound",
]
