"""Attacks on classifiers, and adversarial training."""

from equipoise.zoo.adversarial.recipes import RECIPES, jiio_adversarial, jiio_adversarial_fashion_mnist
from equipoise.zoo.adversarial.task import ATTACK, Adversarial, attack

__all__ = [
    "ATTACK",
    "RECIPES",
    "Adversarial",
    "attack",
    "jiio_adversarial",
    "jiio_adversarial_fashion_mnist",
]
