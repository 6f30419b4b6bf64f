"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

import dataclasses

from equipoise.data import Digits, FashionMNIST
from equipoise.inputs import Envelope, Nested
from equipoise.solvers import Picard
from equipoise.train import Adam, TrainConfig
from equipoise.zoo.adversarial.task import Adversarial
from equipoise.zoo.continuous import DenseConfig


def jiio_adversarial() -> TrainConfig:
    """Adversarial training on the digits, radius 1 in L2, attacks found with the equilibria: half a minute.

    The map is capped to contract: otherwise training finds maps whose joint iterate never reaches the equilibrium.
    """
    return TrainConfig(
        name="jiio-adversarial",
        data=Digits(mean=(0.0,), std=(1.0,)),
        model=DenseConfig(image_size=8, image_channels=1, num_classes=10, cap=0.8),
        task=Adversarial(step_size=3.0, scheme=Nested(steps=3)),
        solver=Picard(max_steps=10, rtol=1e-2),
        gradient=Envelope(),
        eval_solver=Picard(max_steps=40, rtol=1e-3),
        optimizer=Adam(lr=4e-3),
        epochs=30,
        batch_size=128,
    )


def jiio_adversarial_fashion_mnist() -> TrainConfig:
    """Adversarial training on Fashion-MNIST, radius 1 in L2: a few minutes."""
    return dataclasses.replace(
        jiio_adversarial(),
        name="jiio-adversarial-fashion-mnist",
        data=FashionMNIST(validation_fraction=0.05, mean=(0.0,), std=(1.0,)),
        model=DenseConfig(image_size=28, image_channels=1, num_classes=10, cap=0.8),
        task=Adversarial(),
        optimizer=Adam(lr=2e-3),
        epochs=2,
    )


RECIPES = (jiio_adversarial, jiio_adversarial_fashion_mnist)
