"""Models: each a module and its frozen configuration."""

from equipoise.models.attack import attack
from equipoise.models.build import build
from equipoise.models.classifier import EquilibriumClassifier, MDEQClassifier
from equipoise.models.config import ClassifierConfig, MDEQConfig, ModelConfig
from equipoise.models.contraction import Contraction, ScaledLayers, SLLLayers
from equipoise.models.decoder import DecoderConfig, LatentDecoder
from equipoise.models.dense import DenseClassifier, DenseConfig
from equipoise.models.few_shot import FewShotConfig, FewShotLearner
from equipoise.models.mdeq import MDEQCell
from equipoise.models.predictor import MDEQPredictor
from equipoise.models.prior import EquilibriumPrior, PriorConfig

__all__ = [
    "ClassifierConfig",
    "Contraction",
    "DecoderConfig",
    "DenseClassifier",
    "DenseConfig",
    "EquilibriumClassifier",
    "EquilibriumPrior",
    "FewShotConfig",
    "FewShotLearner",
    "LatentDecoder",
    "MDEQCell",
    "MDEQClassifier",
    "MDEQConfig",
    "MDEQPredictor",
    "ModelConfig",
    "PriorConfig",
    "SLLLayers",
    "ScaledLayers",
    "attack",
    "build",
]
