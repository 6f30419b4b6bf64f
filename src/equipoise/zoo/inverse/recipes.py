"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

from equipoise.data import FashionMNIST
from equipoise.gradients import Implicit
from equipoise.inputs import Joint
from equipoise.solvers import GMRES, Anderson
from equipoise.train import Adam, Pretraining, TrainConfig
from equipoise.zoo.generative import Hole, Noise, Reconstruct
from equipoise.zoo.inverse.model import PriorConfig


def jiio_inverse() -> TrainConfig:
    """Denoising and inpainting by optimized latents, on Fashion-MNIST: twelve minutes on a CPU core."""
    return TrainConfig(
        name="jiio-inverse",
        data=FashionMNIST(validation_fraction=0.005, flip=True, mean=(0.0,), std=(1.0,)),
        model=PriorConfig(image_size=28, num_corruptions=3),
        task=Reconstruct(
            corruptions=(Noise(std=0.1), Noise(std=0.2), Hole(size=9)),
            step_size=0.1,
            scheme=Joint(),
            pretraining=Pretraining(steps=3_700, depth=6),
        ),
        solver=Anderson(memory=8, max_steps=15, rtol=1e-3, ridge=1e-3),
        gradient=Implicit(solver=GMRES(max_steps=20, rtol=0.0, atol=2e-2)),
        eval_solver=Anderson(memory=10, max_steps=30, rtol=1e-3, ridge=1e-3),
        optimizer=Adam(lr=1e-2),
        epochs=2,
        stop_after=4_000,
        batch_size=16,
        eval_batch_size=100,
        clip_norm=1.0,
    )


RECIPES = (jiio_inverse,)
