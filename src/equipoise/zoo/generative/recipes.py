"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

from equipoise.data import FashionMNIST
from equipoise.inputs import Envelope, Nested
from equipoise.solvers import Anderson
from equipoise.train import Adam, TrainConfig
from equipoise.zoo.generative.model import DecoderConfig
from equipoise.zoo.generative.task import Reconstruct


def jiio_generative() -> TrainConfig:
    """Generative decoder trained by optimizing latents, on Fashion-MNIST: a minute or two on a CPU core."""
    return TrainConfig(
        name="jiio-generative",
        data=FashionMNIST(validation_fraction=0.02, mean=(0.0,), std=(1.0,)),
        model=DecoderConfig(image_size=28, image_channels=1),
        task=Reconstruct(step_size=0.05, scheme=Nested(steps=3)),
        solver=Anderson(memory=8, max_steps=18, rtol=1e-4, ridge=1e-3),
        gradient=Envelope(),
        eval_solver=Anderson(memory=8, max_steps=40, rtol=1e-4, ridge=1e-3),
        optimizer=Adam(lr=3e-3),
        epochs=1,
        stop_after=500,
        batch_size=64,
    )


RECIPES = (jiio_generative,)
