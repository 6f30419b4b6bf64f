"""Multiscale deep equilibrium classifier (MDEQ)."""

from equipoise.zoo.mdeq.cell import Layers, MDEQCell
from equipoise.zoo.mdeq.config import Contraction, MDEQShape
from equipoise.zoo.mdeq.head import MDEQHead
from equipoise.zoo.mdeq.model import MDEQClassifier, MDEQConfig, MDEQPredictor
from equipoise.zoo.mdeq.recipes import (
    RECIPES,
    mdeq_cifar10_large,
    mdeq_cifar10_tiny,
    mdeq_digits,
    mdeq_fashion_mnist,
    mdeq_imagenet_large,
    mdeq_imagenet_small,
    mdeq_imagenet_xl,
)
from equipoise.zoo.mdeq.stem import MDEQStem

__all__ = [
    "RECIPES",
    "Contraction",
    "Layers",
    "MDEQCell",
    "MDEQClassifier",
    "MDEQConfig",
    "MDEQHead",
    "MDEQPredictor",
    "MDEQShape",
    "MDEQStem",
    "mdeq_cifar10_large",
    "mdeq_cifar10_tiny",
    "mdeq_digits",
    "mdeq_fashion_mnist",
    "mdeq_imagenet_large",
    "mdeq_imagenet_small",
    "mdeq_imagenet_xl",
]
