"""Zoo: one folder per model, with its task and its recipes."""

import abc
import dataclasses
import inspect
from collections.abc import Callable

from equipoise import data, gradients, inputs, solvers, train
from equipoise.train import TrainConfig
from equipoise.zoo import (
    adversarial,
    classification,
    continuous,
    few_shot,
    generative,
    inverse,
    lipschitz_mdeq,
    mdeq,
    reasoning,
)
from equipoise.zoo.adversarial import (
    ATTACK,
    Adversarial,
    attack,
    jiio_adversarial,
    jiio_adversarial_fashion_mnist,
)
from equipoise.zoo.base import ImageModelConfig
from equipoise.zoo.classification import (
    ClassifierConfig,
    ClassifierTask,
    Classify,
    EquilibriumClassifier,
    JacobianPenalty,
    SkipPenalty,
)
from equipoise.zoo.continuous import (
    DenseClassifier,
    DenseConfig,
    continuous_mnist,
    skip_mnist,
    skip_reg_fashion_mnist,
    skip_reg_mnist,
)
from equipoise.zoo.few_shot import ADAPT, Episodes, FewShot, FewShotConfig, FewShotLearner, Omniglot, jiio_meta
from equipoise.zoo.generative import (
    EXPLAIN,
    Blur,
    Corruption,
    DecoderConfig,
    Downsample,
    Hole,
    ImageDecoder,
    ImageDecoderConfig,
    LatentDecoder,
    LatentPenalty,
    Noise,
    ObservationCost,
    Reconstruct,
    explain,
    jiio_generative,
    psnr,
)
from equipoise.zoo.inverse import EquilibriumPrior, PriorConfig, jiio_inverse
from equipoise.zoo.lipschitz_mdeq import (
    ScaledLayers,
    SLLLayers,
    contracting,
    lipschitz_cifar10,
    lipschitz_digits,
    lipschitz_fashion_mnist,
    lipschitz_tight_cifar10,
    lipschitz_tight_digits,
    lipschitz_tight_fashion_mnist,
)
from equipoise.zoo.mdeq import (
    Contraction,
    Layers,
    MDEQCell,
    MDEQClassifier,
    MDEQConfig,
    MDEQHead,
    MDEQPredictor,
    MDEQShape,
    MDEQStem,
    mdeq_cifar10_large,
    mdeq_cifar10_tiny,
    mdeq_digits,
    mdeq_fashion_mnist,
    mdeq_imagenet_large,
    mdeq_imagenet_small,
    mdeq_imagenet_xl,
)
from equipoise.zoo.reasoning import PrefixSums, Reason, Reasoner, ReasonerConfig, prefix_sums

MEMBERS = (classification, mdeq, lipschitz_mdeq, continuous, generative, inverse, adversarial, few_shot, reasoning)

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__.replace("_", "-"): recipe for member in MEMBERS for recipe in getattr(member, "RECIPES", ())
}
"""Recipes by name."""


CLASSES: tuple[type, ...] = tuple(
    cls
    for module in (solvers, gradients, inputs, data, train, *MEMBERS)
    for cls in (getattr(module, name) for name in module.__all__)
    if isinstance(cls, abc.ABCMeta) and dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)
)
"""Classes that a file may name: the public members of abstract families of dataclasses."""

__all__ = [
    "ADAPT",
    "ATTACK",
    "CLASSES",
    "EXPLAIN",
    "MEMBERS",
    "RECIPES",
    "Adversarial",
    "Blur",
    "ClassifierConfig",
    "ClassifierTask",
    "Classify",
    "Contraction",
    "Corruption",
    "DecoderConfig",
    "DenseClassifier",
    "DenseConfig",
    "Downsample",
    "Episodes",
    "EquilibriumClassifier",
    "EquilibriumPrior",
    "FewShot",
    "FewShotConfig",
    "FewShotLearner",
    "Hole",
    "ImageDecoder",
    "ImageDecoderConfig",
    "ImageModelConfig",
    "JacobianPenalty",
    "LatentDecoder",
    "LatentPenalty",
    "Layers",
    "MDEQCell",
    "MDEQClassifier",
    "MDEQConfig",
    "MDEQHead",
    "MDEQPredictor",
    "MDEQShape",
    "MDEQStem",
    "Noise",
    "ObservationCost",
    "Omniglot",
    "PrefixSums",
    "PriorConfig",
    "Reason",
    "Reasoner",
    "ReasonerConfig",
    "Reconstruct",
    "SLLLayers",
    "ScaledLayers",
    "SkipPenalty",
    "attack",
    "continuous_mnist",
    "contracting",
    "explain",
    "jiio_adversarial",
    "jiio_adversarial_fashion_mnist",
    "jiio_generative",
    "jiio_inverse",
    "jiio_meta",
    "lipschitz_cifar10",
    "lipschitz_digits",
    "lipschitz_fashion_mnist",
    "lipschitz_tight_cifar10",
    "lipschitz_tight_digits",
    "lipschitz_tight_fashion_mnist",
    "mdeq_cifar10_large",
    "mdeq_cifar10_tiny",
    "mdeq_digits",
    "mdeq_fashion_mnist",
    "mdeq_imagenet_large",
    "mdeq_imagenet_small",
    "mdeq_imagenet_xl",
    "prefix_sums",
    "psnr",
    "skip_mnist",
    "skip_reg_fashion_mnist",
    "skip_reg_mnist",
]
