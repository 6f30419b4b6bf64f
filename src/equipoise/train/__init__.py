"""Engine of training: configuration, loop, checkpoints, evaluation. It imports no model and no data set by name."""

from equipoise.files import CheckpointError, RunError
from equipoise.train import checkpoint
from equipoise.train.checkpoint import save
from equipoise.train.config import SGD, Adam, AdamW, LRSchedule, Optimizer, TrainConfig
from equipoise.train.evaluation import evaluate
from equipoise.train.loop import NonFiniteLoss, fit
from equipoise.train.progress import Observer, Result
from equipoise.train.task import BatchResult, ModelConfig, Objective, Pretraining, StepInfo, Task

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BatchResult",
    "CheckpointError",
    "LRSchedule",
    "ModelConfig",
    "NonFiniteLoss",
    "Objective",
    "Observer",
    "Optimizer",
    "Pretraining",
    "Result",
    "RunError",
    "StepInfo",
    "Task",
    "TrainConfig",
    "checkpoint",
    "evaluate",
    "fit",
    "save",
]
