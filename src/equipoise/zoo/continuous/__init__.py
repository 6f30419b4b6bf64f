"""Continuous and skip DEQs: a fully connected classifier, its equilibrium as the steady state of a flow."""

from equipoise.zoo.continuous.model import DenseClassifier, DenseConfig
from equipoise.zoo.continuous.recipes import (
    RECIPES,
    continuous_mnist,
    skip_mnist,
    skip_reg_fashion_mnist,
    skip_reg_mnist,
)

__all__ = [
    "RECIPES",
    "DenseClassifier",
    "DenseConfig",
    "continuous_mnist",
    "skip_mnist",
    "skip_reg_fashion_mnist",
    "skip_reg_mnist",
]
