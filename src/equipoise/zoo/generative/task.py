"""Reconstruction of images by a decoder whose latents are optimized: generative models, and inverse problems."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.core.solution import Solution
from equipoise.data import Data, derive_seed, generator
from equipoise.gradients import Gradient, Unrolled
from equipoise.inputs import Envelope, InputOptimizer, InputSolution, optimize_inputs
from equipoise.solvers import Picard
from equipoise.train import BatchResult, ModelConfig, Objective, Pretraining, StepInfo
from equipoise.zoo.base import InputTask, check_shapes
from equipoise.zoo.generative.corruptions import Corruption, Hole, Noise
from equipoise.zoo.generative.model import ImageDecoder, ImageDecoderConfig

EXPLAIN = InputOptimizer(gradient=Envelope(), verify_solver=None)
"""Default method of `explain`; vary it with `dataclasses.replace`."""
FLOOR = 1e-4  # mean squared error, of pixels in [0, 1], below which the logarithm hardly falls further


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(InputTask):
    r"""Reconstruct images, or corrupted images, from optimized latents of a decoder.

    Without corruptions this trains a generative model: latents and weights minimize the same squared error. With
    corruptions, the latents explain the observation, and the loss is that of the clean image; a model such as
    `EquilibriumPrior` then sees the observation, has a penalty of latents, and learns a data weight for each kind:

    $$ x^* = \arg\min_x \; \lambda_k \|m \odot (A\, h(z^*(x)) - y)\|^2 + r(x), \qquad
       L = \operatorname{mean} \log \overline{(h(z^*(x^*)) - \mathrm{image})^2} $$

    The logarithm, of the mean over the pixels of an image, lets strong and weak corruptions count alike. Around a hole
    the observation is kept, and the loss is that of the filled pixels. In evaluation the images are those of the
    equilibrium, found by another solve at the optimized latents.
    """

    scores: ClassVar[tuple[str, ...]] = ("psnr",)

    corruptions: tuple[Corruption, ...] = ()
    """Corruptions of the images, applied round-robin to the images of a batch."""
    pretraining: Pretraining = Pretraining()
    """First steps, with latents of zero and the map applied a fixed number of times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "corruptions", tuple(self.corruptions))

    def check(self, model: ModelConfig, data: Data, gradient: Gradient) -> None:
        if not isinstance(model, ImageDecoderConfig):
            raise ValueError(
                f"the task Reconstruct needs a decoder such as DecoderConfig, and {type(model).__name__} is none"
            )
        check_shapes(model, data)
        if self.corruptions and isinstance(gradient, Envelope):
            raise ValueError(
                "gradient=Envelope() is exact only where the loss is what the latents minimize, and with "
                "task.corruptions it is not; set gradient=Implicit()"
            )
        if len(self.corruptions) > 1 and not all(isinstance(c, (Noise, Hole)) for c in self.corruptions):
            raise ValueError(
                f"task.corruptions={self.corruptions}: only Noise and Hole, which leave pixels where they are, can be "
                "trained together; train Blur or Downsample alone"
            )
        if self.pretraining.steps and not model.conditional:
            raise ValueError(
                f"task.pretraining.steps={self.pretraining.steps}: with latents of zero a {type(model).__name__} makes "
                "the same image every time; set it to 0"
            )
        model.check_corruptions(self.corruptions)

    def loss(self, objective: Objective, images: Tensor, labels: Tensor, info: StepInfo | None) -> BatchResult:
        model = objective.model
        observed, mask = self.observe(images, info)
        solution: Solution[Any]
        if info is not None and info.step < self.pretraining.steps:
            x = model.latents(len(observed), *observed.shape[-2:])
            with model.deq.using(solver=Picard(max_steps=0), gradient=Unrolled(steps=self.pretraining.depth)):
                solution = model.deq.solve(x, *model.context(observed, mask))
            z = solution.value
        else:
            weighted = model.config.conditional
            solution = explain(
                model,
                observed,
                mask,
                size=(images.shape[2], images.shape[3]),
                kinds=torch.arange(len(images), device=images.device) % len(self.corruptions) if weighted else None,
                corruption=self.corruptions[0] if len(self.corruptions) == 1 else None,
                optimizer=self.input_optimizer(objective.solver_at(info), objective.gradient),
            )
            z, _, x = solution.value
            if info is None:
                with model.deq.using(solver=self.equilibrium_solver):
                    z = model.deq(x, *model.context(observed, mask), z0=z)
        found = self._complete(model.decode(z), observed, mask)
        error = (found - images).square().flatten(1).mean(1)
        loss = (error + FLOOR).log().mean() if self.corruptions else error.mean()
        return BatchResult(loss, solution, {"psnr": psnr(found, images).sum()})

    def observe(self, images: Tensor, info: StepInfo | None) -> tuple[Tensor, Tensor]:
        """Corrupt images; in evaluation an image determines its noise, whatever else is in the batch.

        Args:
            images: `(B, C, H, W)`.
            info: position in the training; None in evaluation.

        Returns:
            Observations `(B, C, h, w)`, and a mask of that shape: 1 where a pixel was seen.
        """
        if not self.corruptions:
            return images, torch.ones_like(images)
        count = len(self.corruptions)
        if info is None:
            sources = [generator(*(255 * image).round().int().flatten().tolist()) for image in images]
            single = [
                self.corruptions[number % count].observe(image[None], source)
                for number, (image, source) in enumerate(zip(images, sources, strict=True))
            ]
            return torch.cat([observed for observed, _ in single]), torch.cat([mask for _, mask in single])
        source = generator(derive_seed(info.seed, info.step, 5))
        parts = [c.observe(images[number::count], source) for number, c in enumerate(self.corruptions)]
        return _interleaved([observed for observed, _ in parts]), _interleaved([mask for _, mask in parts])

    def _complete(self, estimate: Tensor, observed: Tensor, mask: Tensor) -> Tensor:
        """Put the pixels that were seen without noise into estimates of the images."""
        if not self.corruptions:
            return estimate
        tensors, count = (estimate, observed, mask), len(self.corruptions)
        return _interleaved([c.complete(*(t[k::count] for t in tensors)) for k, c in enumerate(self.corruptions)])


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several tensors in turn."""
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for number, part in enumerate(parts):
        whole[number :: len(parts)] = part
    return whole


class ObservationCost(nn.Module):
    r"""Squared distance between the observed image and that of a state, over the pixels that were seen.

    $$ c(z) = \lambda_k \sum_i m_i \, (A \, h(z) - y)_i^2 $$

    Args:
        model: decoder; the data weights are its `weights()`, and one if it has none.
        corruption: whose map $A$ is; None: the identity.
    """

    def __init__(self, model: ImageDecoder, corruption: Corruption | None = None) -> None:
        super().__init__()
        self.model, self.corruption = model, corruption

    def forward(self, z: Any, x: Any, observed: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        """`(B,)` costs; `kinds` are the numbers $k$ of the data weights."""
        images = self.model.decode(z)
        if self.corruption is not None:
            images = self.corruption.apply(images)
        cost: Tensor = (mask * (images - observed)).square().flatten(1).sum(1)
        return cost if kinds is None else self.model.weights()[kinds] * cost


class LatentPenalty(nn.Module):
    """Penalty of a model's latents, as a module with the model's parameters.

    Args:
        model: decoder with a method `penalty`.
    """

    def __init__(self, model: ImageDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        """`(B,)` penalties."""
        penalty: Tensor = self.model.penalty(x)
        return penalty


def explain(
    model: ImageDecoder,
    observed: Tensor,
    mask: Tensor,
    *,
    size: tuple[int, int],
    kinds: Tensor | None = None,
    corruption: Corruption | None = None,
    regularizer: Callable[[Any], Tensor] | None = None,
    optimizer: InputOptimizer = EXPLAIN,
) -> InputSolution:
    """Find the latents whose images explain an observation best.

    Args:
        model: decoder.
        observed: `(B, C, h, w)`.
        mask: of the same shape, 1 where a pixel was seen.
        size: height and width of the clean images.
        kinds: `(B,)` numbers of the model's data weights, which come with a penalty of its latents; None: neither.
        corruption: of the observation; None: none.
        regularizer: penalty of latents, `(B, ...) -> (B,)`, where the model has none of its own; None: none.
        optimizer: method of the optimization.
    """
    x0 = model.latents(len(observed), *size)
    return optimize_inputs(
        model.deq.cell,
        z0=model.start(x0),
        x0=x0,
        inputs=model.context(observed, mask),
        cost=ObservationCost(model, corruption),
        targets=(observed, mask) if kinds is None else (observed, mask, kinds),
        regularizer=regularizer if kinds is None else LatentPenalty(model),
        optimizer=optimizer,
    )


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, `(B,)`, of pixels in [0, 1]; others are clipped."""
    error = (found.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return -10 * error.clamp_min(torch.finfo(error.dtype).tiny).log10()
