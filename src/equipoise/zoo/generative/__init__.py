"""Generative model: images from latents that are optimized."""

from equipoise.zoo.generative.corruptions import Blur, Corruption, Downsample, Hole, Noise
from equipoise.zoo.generative.model import DecoderConfig, ImageDecoder, ImageDecoderConfig, LatentDecoder
from equipoise.zoo.generative.recipes import RECIPES, jiio_generative
from equipoise.zoo.generative.task import EXPLAIN, LatentPenalty, ObservationCost, Reconstruct, explain, psnr

__all__ = [
    "EXPLAIN",
    "RECIPES",
    "Blur",
    "Corruption",
    "DecoderConfig",
    "Downsample",
    "Hole",
    "ImageDecoder",
    "ImageDecoderConfig",
    "LatentDecoder",
    "LatentPenalty",
    "Noise",
    "ObservationCost",
    "Reconstruct",
    "explain",
    "jiio_generative",
    "psnr",
]
