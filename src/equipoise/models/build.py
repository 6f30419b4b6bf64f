"""Which model a configuration is of."""

from __future__ import annotations

from typing import Any

from equipoise.gradients import Gradient, Implicit
from equipoise.models.classifier import MDEQClassifier
from equipoise.models.config import MDEQConfig, ModelConfig
from equipoise.models.decoder import DecoderConfig, LatentDecoder
from equipoise.models.dense import DenseClassifier, DenseConfig
from equipoise.models.few_shot import FewShotConfig, FewShotLearner
from equipoise.models.prior import EquilibriumPrior, PriorConfig
from equipoise.solvers import Anderson, Solver

MODELS: dict[type[ModelConfig], Any] = {
    MDEQConfig: MDEQClassifier,
    DenseConfig: DenseClassifier,
    FewShotConfig: FewShotLearner,
    DecoderConfig: LatentDecoder,
    PriorConfig: EquilibriumPrior,
}


def build(config: ModelConfig, *, solver: Solver = Anderson(), gradient: Gradient = Implicit()) -> Any:
    """The model of a configuration, with weights drawn at random.

    Args:
        config: shape of the model.
        solver: finds the equilibrium.
        gradient: differentiates it.

    Raises:
        ValueError: the configuration is of an unknown kind.

    Example:
        >>> from equipoise.models import DenseConfig, build
        >>> type(build(DenseConfig(image_size=8, image_channels=1, num_classes=10))).__name__
        'DenseClassifier'
    """
    if type(config) not in MODELS:
        known = ", ".join(kind.__name__ for kind in MODELS)
        raise ValueError(f"no model of {type(config).__name__}; known: {known}")
    return MODELS[type(config)](config, solver=solver, gradient=gradient)
