"""Predictions of a classifier on test images, with the record of each solve."""

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.data import DataError, Split
from equipoise.train import TrainConfig
from equipoise.train.device import make_fabric, to_device
from equipoise.zoo import EquilibriumClassifier


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions on N test images, with the record of each solve.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: `(N,)` true classes.
        predicted: `(N,)` most probable classes.
        confidence: `(N,)` their probabilities.
        num_steps: `(N,)` evaluations spent on each image.
        converged: `(N,)` whether the tolerance was met.
        trace: `(T, N)` norm of f(z) - z at each evaluation over that of the returned z; NaN after an image has stopped.
        available: images in the test split.
    """

    images: Tensor
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    num_steps: Tensor
    converged: Tensor
    trace: Tensor
    available: int

    @property
    def correct(self) -> Tensor:
        """`(N,)` mask of correct predictions."""
        return self.labels == self.predicted

    def confusion(self, num_classes: int) -> Tensor:
        """Return `(K, K)` counts: true class down, predicted class across."""
        return torch.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2).view(
            num_classes, -1
        )

    def quantiles(self) -> np.ndarray:
        """Return `(3, T)` quantiles (10, 50, 90 %) of the trace; an image that has stopped keeps its last residual."""
        rows = self.trace.numpy().copy()
        for before, row in itertools.pairwise(rows):
            row[np.isnan(row)] = before[np.isnan(row)]
        rows[np.isnan(rows)] = np.inf  # never finite: worse than all others
        found = np.quantile(rows, (0.1, 0.5, 0.9), axis=1, method="inverted_cdf")
        return np.where(np.isfinite(found), found, np.nan)


@torch.no_grad()
def collect_predictions(
    model: EquilibriumClassifier, split: Split, config: TrainConfig, max_images: int
) -> Predictions:
    """Classify test images as evaluation does, with a trace of every solve.

    Args:
        model: of the run.
        split: its test images.
        config: of the run; it gives solver, batch size, precision and device.
        max_images: size of the random sample if there are more images.

    Raises:
        DataError: there are no test images.
    """
    fabric = make_fabric(dataclasses.replace(config, devices=1, num_nodes=1))
    model = model.to(fabric.device).eval()
    parts: list[tuple[Tensor, ...]] = []
    traces: list[Tensor] = []
    left = max_images
    shuffle = (config.seed, 0) if len(split) > max_images else None
    for images, labels in split.batches(min(config.eval_batch_size, max_images), shuffle=shuffle):
        images, labels = images[:left], labels[:left]
        inputs, _ = to_device(config, images, labels, fabric.device)
        with fabric.autocast(), model.deq.using(solver=config.forward_solver):
            solution = model.deq.solve(model.stem(inputs), trace=True)
            best = model.head(solution.value).float().softmax(1).max(1)
        size = torch.linalg.vector_norm(solution.map.pack(solution.value).float(), dim=1)
        assert solution.trace is not None
        traces.extend((solution.trace / size.clamp_min(torch.finfo(size.dtype).tiny)).cpu().unbind(1))
        part = (images, labels, best.indices, best.values, solution.num_steps, solution.converged)
        parts.append(tuple(x.cpu() for x in part))
        left -= len(labels)
        if not left:
            break
    if not parts:
        raise DataError("a report needs test images, and the data of the run has none; set its test split")
    trace = nn.utils.rnn.pad_sequence(traces, padding_value=torch.nan)
    images, labels, predicted, confidence, num_steps, converged = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return Predictions(
        images, labels, predicted, confidence, num_steps, converged, trace, available=max(len(split), len(labels))
    )
