"""MDEQ whose layers make it contract."""

from equipoise.zoo.lipschitz_mdeq.recipes import (
    RECIPES,
    contracting,
    lipschitz_cifar10,
    lipschitz_digits,
    lipschitz_fashion_mnist,
    lipschitz_tight_cifar10,
    lipschitz_tight_digits,
    lipschitz_tight_fashion_mnist,
)
from equipoise.zoo.lipschitz_mdeq.scaled import ScaledLayers
from equipoise.zoo.lipschitz_mdeq.sll import SLLLayers

__all__ = [
    "RECIPES",
    "SLLLayers",
    "ScaledLayers",
    "contracting",
    "lipschitz_cifar10",
    "lipschitz_digits",
    "lipschitz_fashion_mnist",
    "lipschitz_tight_cifar10",
    "lipschitz_tight_digits",
    "lipschitz_tight_fashion_mnist",
]
