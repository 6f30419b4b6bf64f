"""Denoising and inpainting by an equilibrium that has the observation as an input."""

from equipoise.zoo.inverse.model import EquilibriumPrior, PriorConfig
from equipoise.zoo.inverse.recipes import RECIPES, jiio_inverse

__all__ = ["RECIPES", "EquilibriumPrior", "PriorConfig", "jiio_inverse"]
