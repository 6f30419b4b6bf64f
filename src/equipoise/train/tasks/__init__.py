"""Tasks: what a model is trained for."""

from equipoise.train.tasks.adversarial import Adversarial, AdversarialClassification
from equipoise.train.tasks.base import COMMON, SCORES, Moment, Objective, Task, relative_residual
from equipoise.train.tasks.classify import Classification, Classify
from equipoise.train.tasks.few_shot import FewShot, QueryLoss
from equipoise.train.tasks.reconstruct import ObservationCost, Reconstruct, Reconstruction, explain, psnr

__all__ = [
    "COMMON",
    "SCORES",
    "Adversarial",
    "AdversarialClassification",
    "Classification",
    "Classify",
    "FewShot",
    "Moment",
    "Objective",
    "ObservationCost",
    "QueryLoss",
    "Reconstruct",
    "Reconstruction",
    "Task",
    "explain",
    "psnr",
    "relative_residual",
]
