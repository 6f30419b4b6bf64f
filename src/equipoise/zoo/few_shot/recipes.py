"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

from equipoise.gradients import Implicit
from equipoise.solvers import GMRES, Anderson
from equipoise.train import Adam, LRSchedule, TrainConfig
from equipoise.zoo.few_shot.model import FewShotConfig
from equipoise.zoo.few_shot.omniglot import Omniglot
from equipoise.zoo.few_shot.task import FewShot


def jiio_meta() -> TrainConfig:
    """Few-shot learner of characters, whose context and head are optimized inputs: some five minutes of a CPU core."""
    return TrainConfig(
        name="jiio-meta",
        task=FewShot(),
        data=Omniglot(queries=3, tasks=4800),
        model=FewShotConfig(image_size=28, image_channels=1),
        solver=Anderson(memory=10, max_steps=60, rtol=1e-2, ridge=1e-3),
        gradient=Implicit(solver=GMRES(max_steps=40, rtol=0.0, atol=3e-2)),
        eval_solver=Anderson(memory=10, max_steps=100, rtol=1e-3, ridge=1e-3),
        optimizer=Adam(lr=3e-3),
        schedule=LRSchedule(warmup_steps=40),
        epochs=2,
        batch_size=8,
        eval_batch_size=50,
        clip_norm=1.0,
    )


RECIPES = (jiio_meta,)
