"""Models: each a module and its frozen configuration."""

from equipoise.models.classifier import MDEQClassifier
from equipoise.models.mdeq import MDEQCell, MDEQConfig

__all__ = ["MDEQCell", "MDEQClassifier", "MDEQConfig"]
