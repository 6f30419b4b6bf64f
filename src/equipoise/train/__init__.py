"""Training: complete configurations, named recipes, data, one loop, checkpoints."""

from equipoise.files import CheckpointError, DataError
from equipoise.train import checkpoint, recipes
from equipoise.train.checkpoint import load, save
from equipoise.train.config import SGD, Adam, AdamW, JacobianPenalty, Optimizer, Pretraining, Schedule, TrainConfig
from equipoise.train.data import Digits, FashionMNIST, HubImages, ImageData
from equipoise.train.evaluation import evaluate
from equipoise.train.loop import NonFiniteLoss, Observer, Result, fit
from equipoise.train.run import RunError

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CheckpointError",
    "DataError",
    "Digits",
    "FashionMNIST",
    "HubImages",
    "ImageData",
    "JacobianPenalty",
    "NonFiniteLoss",
    "Observer",
    "Optimizer",
    "Pretraining",
    "Result",
    "RunError",
    "Schedule",
    "TrainConfig",
    "checkpoint",
    "evaluate",
    "fit",
    "load",
    "recipes",
    "save",
]
