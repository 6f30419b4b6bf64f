"""Few-shot learning of characters."""

from equipoise.zoo.few_shot.model import ADAPT, FewShotConfig, FewShotLearner
from equipoise.zoo.few_shot.omniglot import Episodes, Omniglot
from equipoise.zoo.few_shot.recipes import RECIPES, jiio_meta
from equipoise.zoo.few_shot.task import FewShot

__all__ = ["ADAPT", "RECIPES", "Episodes", "FewShot", "FewShotConfig", "FewShotLearner", "Omniglot", "jiio_meta"]
