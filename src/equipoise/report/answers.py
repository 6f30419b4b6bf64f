"""What a model says about the test images, and how each of them was solved."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor

from equipoise.models import EquilibriumClassifier
from equipoise.train import DataError, TrainConfig
from equipoise.train.data import Split
from equipoise.train.evaluation import make_fabric, to_device


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model says about N test images, and how its solves went.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: `(N,)` true classes.
        predicted: `(N,)` classes that the model names.
        confidence: `(N,)` probabilities that it gives them.
        num_steps: `(N,)` evaluations spent on each image.
        converged: `(N,)` whether the tolerance was met.
        trace: `(T, N)` norms of f(z) - z over that of the answer at each evaluation; NaN once an image was done.
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
        """`(N,)` whether the true class is named."""
        return self.labels == self.predicted

    def confusion(self, num_classes: int) -> Tensor:
        """`(K, K)` counts: true class down, predicted class across."""
        return torch.bincount(self.labels * num_classes + self.predicted, minlength=num_classes**2).view(
            num_classes, -1
        )

    def quantiles(self) -> np.ndarray:
        """`(3, T)` 10, 50 and 90 % quantiles of the trace over the images; one that is done keeps its last residual."""
        rows = self.trace.numpy().copy()
        for before, row in itertools.pairwise(rows):
            row[np.isnan(row)] = before[np.isnan(row)]
        rows[np.isnan(rows)] = np.inf  # never finite: worse than all others
        found = np.quantile(rows, (0.1, 0.5, 0.9), axis=1, method="inverted_cdf")
        return np.where(np.isfinite(found), found, np.nan)


@torch.no_grad()
def look(model: EquilibriumClassifier, split: Split, config: TrainConfig, max_images: int) -> Answers:
    """Classify test images as evaluation does, with a trace of every solve.

    Args:
        model: of the run.
        split: its test images.
        config: of the run: solver, batch size, precision and device are read from it.
        max_images: so many images are taken at random if there are more.

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
        with fabric.autocast(), model.deq.using(solver=config.task.forward_solver(config)):
            solution = model.deq.solve(model.stem(inputs), trace=True)
            best = model.head(solution.value).float().softmax(1).max(1)
        size = torch.linalg.vector_norm(solution.map.pack(solution.value).float(), dim=1)
        assert solution.trace is not None
        traces.append((solution.trace / size.clamp_min(torch.finfo(size.dtype).tiny)).cpu())
        part = (images, labels, best.indices, best.values, solution.num_steps, solution.converged)
        parts.append(tuple(x.cpu() for x in part))
        left -= len(labels)
        if not left:
            break
    if not parts:
        raise DataError("a report needs test images, and the data of the run has none")
    longest = max(map(len, traces))
    gaps = [trace.new_full((longest - len(trace), trace.shape[1]), torch.nan) for trace in traces]
    trace = torch.cat([torch.cat(pair) for pair in zip(traces, gaps, strict=True)], 1)
    images, labels, predicted, confidence, num_steps, converged = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return Answers(
        images, labels, predicted, confidence, num_steps, converged, trace, available=max(len(split), len(labels))
    )
