"""Attacks on classifiers, and adversarial training."""

from equipoise.zoo.adversarial.attack import ATTACK, attack
from equipoise.zoo.adversarial.recipes import RECIPES, jiio_adversarial, jiio_adversarial_fashion_mnist
from equipoise.zoo.adversarial.task import Adversarial, AdversarialClassification

__all__ = [
    "ATTACK",
    "RECIPES",
    "Adversarial",
    "AdversarialClassification",
    "attack",
    "jiio_adversarial",
    "jiio_adversarial_fashion_mnist",
]
