"""Reasoning: puzzles whose answer is the equilibrium of a small convolutional network."""

from equipoise.zoo.reasoning.model import Reasoner, ReasonerConfig
from equipoise.zoo.reasoning.puzzles import PrefixSums
from equipoise.zoo.reasoning.recipes import RECIPES, prefix_sums
from equipoise.zoo.reasoning.task import Reason

__all__ = ["RECIPES", "PrefixSums", "Reason", "Reasoner", "ReasonerConfig", "prefix_sums"]
