"""Classification of images by an equilibrium: base classes, task and penalties."""

from equipoise.zoo.classification.model import ClassifierConfig, EquilibriumClassifier
from equipoise.zoo.classification.task import ClassifierTask, Classify, JacobianPenalty, SkipPenalty

__all__ = [
    "ClassifierConfig",
    "ClassifierTask",
    "Classify",
    "EquilibriumClassifier",
    "JacobianPenalty",
    "SkipPenalty",
]
