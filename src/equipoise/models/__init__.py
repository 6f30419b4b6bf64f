"""Models: each a module and its frozen configuration."""

from equipoise.models.classifier import MDEQClassifier
from equipoise.models.config import MDEQConfig
from equipoise.models.contraction import Contraction, ScaledLayers, SLLLayers
from equipoise.models.mdeq import MDEQCell

__all__ = ["Contraction", "MDEQCell", "MDEQClassifier", "MDEQConfig", "SLLLayers", "ScaledLayers"]
