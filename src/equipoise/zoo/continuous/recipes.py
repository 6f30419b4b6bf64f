"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

import dataclasses

from equipoise.data import MNIST5K
from equipoise.gradients import Implicit
from equipoise.solvers import GMRES, SteadyState
from equipoise.train import Adam, TrainConfig
from equipoise.zoo.classification import Classify, SkipPenalty
from equipoise.zoo.continuous.model import DenseConfig
from equipoise.zoo.mdeq import MDEQConfig, mdeq_fashion_mnist

DENSE = DenseConfig(image_size=28, image_channels=1, num_classes=10)


def continuous_mnist() -> TrainConfig:
    """Fully connected DEQ whose equilibrium is the steady state of a flow, on 5,000 digits: some minutes on a CPU."""
    return TrainConfig(
        name="continuous-mnist",
        data=MNIST5K(),
        model=DENSE,
        task=Classify(),
        solver=SteadyState(max_steps=50, rtol=5e-3),
        gradient=Implicit(solver=GMRES(max_steps=15, rtol=0.0, atol=5e-3)),
        optimizer=Adam(lr=1e-3),
        epochs=25,
        batch_size=32,
    )


def skip_mnist() -> TrainConfig:
    """Skip DEQ: `continuous-mnist` whose solve begins at the guess of a network trained to predict the equilibrium."""
    return dataclasses.replace(
        continuous_mnist(),
        name="skip-mnist",
        model=dataclasses.replace(DENSE, predictor=True),
        task=Classify(skip=SkipPenalty(weight=1.0)),
    )


def skip_reg_mnist() -> TrainConfig:
    """Skip Reg DEQ: `continuous-mnist` with a penalty on the distance of the equilibrium from one step of the map.

    With a weight of a tenth the map still depends on its state for many images; from one on it does for none.
    """
    return dataclasses.replace(
        continuous_mnist(),
        name="skip-reg-mnist",
        model=dataclasses.replace(DENSE, explicit_steps=1),
        task=Classify(skip=SkipPenalty(weight=0.1)),
    )


def skip_reg_fashion_mnist() -> TrainConfig:
    """Skip Reg DEQ with two levels, by the flow, on Fashion-MNIST."""
    config = mdeq_fashion_mnist()
    return dataclasses.replace(
        config,
        name="skip-reg-fashion-mnist",
        model=dataclasses.replace(MDEQConfig.fashion_mnist(), explicit_steps=1),
        solver=SteadyState(max_steps=18, rtol=5e-2),
        gradient=Implicit(solver=GMRES(max_steps=20, rtol=0.0, atol=5e-2)),
        task=Classify(pretraining=config.task.pretraining, skip=SkipPenalty(weight=0.1)),
        epochs=2,
    )


RECIPES = (continuous_mnist, skip_mnist, skip_reg_mnist, skip_reg_fashion_mnist)
