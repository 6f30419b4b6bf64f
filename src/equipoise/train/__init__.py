"""Training: complete configurations, named recipes, data, one loop, checkpoints."""

from equipoise.files import CheckpointError, DataError
from equipoise.train import checkpoint, recipes
from equipoise.train.checkpoint import load, save
from equipoise.train.config import (
    SGD,
    Adam,
    AdamW,
    Optimizer,
    Schedule,
    TrainConfig,
)
from equipoise.train.corruptions import Blur, Corruption, Downsample, Hole, Noise
from equipoise.train.data import MNIST5K, Digits, FashionMNIST, HubImages, ImageData
from equipoise.train.evaluation import evaluate
from equipoise.train.loop import NonFiniteLoss, Observer, Result, fit
from equipoise.train.omniglot import Omniglot
from equipoise.train.penalties import JacobianPenalty, Pretraining, SkipPenalty
from equipoise.train.photographs import Photographs
from equipoise.train.run import RunError
from equipoise.train.tasks import Adversarial, Classify, FewShot, Objective, Reconstruct, Task

__all__ = [
    "MNIST5K",
    "SGD",
    "Adam",
    "AdamW",
    "Adversarial",
    "Blur",
    "CheckpointError",
    "Classify",
    "Corruption",
    "DataError",
    "Digits",
    "Downsample",
    "FashionMNIST",
    "FewShot",
    "Hole",
    "HubImages",
    "ImageData",
    "JacobianPenalty",
    "Noise",
    "NonFiniteLoss",
    "Objective",
    "Observer",
    "Omniglot",
    "Optimizer",
    "Photographs",
    "Pretraining",
    "Reconstruct",
    "Result",
    "RunError",
    "Schedule",
    "SkipPenalty",
    "Task",
    "TrainConfig",
    "checkpoint",
    "evaluate",
    "fit",
    "load",
    "recipes",
    "save",
]
