"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

from equipoise.solvers import Picard
from equipoise.train import Adam, LRSchedule, TrainConfig
from equipoise.zoo.reasoning.model import ReasonerConfig
from equipoise.zoo.reasoning.puzzles import PrefixSums
from equipoise.zoo.reasoning.task import Reason


def prefix_sums() -> TrainConfig:
    """Prefix sums of 32 bits, tested on 512: about three minutes of a CPU core."""
    return TrainConfig(
        name="prefix-sums",
        data=PrefixSums(),
        model=ReasonerConfig(),
        task=Reason(),
        solver=Picard(max_steps=1000, rtol=1e-3),
        optimizer=Adam(lr=1e-3),
        schedule=LRSchedule(warmup_steps=50),
        epochs=2,
        batch_size=100,
        eval_batch_size=100,
        clip_norm=1.0,
    )


RECIPES = (prefix_sums,)
