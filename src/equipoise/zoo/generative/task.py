"""Images explained by a decoder whose latents are optimized: generative models, and inverse problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.core.solution import Solution
from equipoise.data.base import Data, derive_seed, generator
from equipoise.gradients import Gradient, Implicit, Unrolled
from equipoise.inputs import Envelope, InputOptimizer, InputSolution, Nested, UpdateScheme, optimize_inputs
from equipoise.solvers import Anderson, Picard, Solver
from equipoise.train.model import ModelConfig
from equipoise.train.pretraining import Pretraining
from equipoise.train.task import Objective, StepInfo, Task
from equipoise.zoo.generative.corruptions import Corruption, Hole, Noise
from equipoise.zoo.generative.decoder import ImageDecoder, ImageDecoderConfig
from equipoise.zoo.images import check_shapes

EXPLAIN = InputOptimizer(gradient=Envelope(), verify_solver=None)
"""Default method of `explain`; vary it with `dataclasses.replace`."""
FLOOR = 1e-4  # mean squared errors, of pixels in [0, 1], below which a loss hardly falls further


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(Task):
    r"""Explain images, or what is left of them, by optimized latents of a decoder.

    Without corruptions this trains a generative model: what is minimized over the latents is what is minimized over
    the weights. With some, the latents explain what was observed, and the loss is that of the clean image; a model such
    as `EquilibriumPrior` then sees the observation, has a penalty on latents, and learns a data weight for each kind:

    $$ x^* = \arg\min_x \; \lambda_k \|m \odot (A\, h(z^*(x)) - y)\|^2 + r(x), \qquad
       L = \operatorname{mean} \log \overline{(h(z^*(x^*)) - \mathrm{image})^2} $$

    The logarithm, of the mean over the pixels of an image, lets strong and weak corruptions count alike. What a hole
    leaves to be seen is kept as it is, and the loss is of what fills it.
    """

    scores: ClassVar[tuple[str, ...]] = ("psnr",)

    corruptions: tuple[Corruption, ...] = ()
    """What was done to the images; if there are several, each image of a batch meets one of them in turn."""
    equilibrium: Solver = Anderson(max_steps=40, rtol=1e-4)
    """Finds the equilibrium alone, at latents that are given."""
    step_size: float | None = None
    """Step of the latents; None: measured at each solve."""
    schedule: UpdateScheme = Nested(steps=2)
    """How often state and adjoint move between two steps of the latents."""
    pretraining: Pretraining = Pretraining()
    """First steps, with latents of zero and the map applied a fixed number of times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "corruptions", tuple(self.corruptions))
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"task.step_size={self.step_size!r}: must be > 0, or None to measure it")

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

    def forward_solver(self, solver: Solver, eval_solver: Solver | None) -> Solver:
        return self.equilibrium

    def build(self, model: ModelConfig, solver: Solver, gradient: Gradient) -> Any:
        return model.build(solver=self.equilibrium, gradient=Implicit())

    def objective(
        self, model: Any, *, data: Data, solver: Solver, gradient: Gradient, eval_solver: Solver | None
    ) -> Objective:
        return Reconstruction(model, self, solver=solver, gradient=gradient, eval_solver=eval_solver)


class ObservationCost(nn.Module):
    r"""Sum of squares of what an observed image and that of a state differ by, where pixels were seen.

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
    """The penalty of a model's latents as a module, so that its weights are found.

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
    """The latents whose images explain best what was observed.

    Args:
        model: decoder.
        observed: `(B, C, h, w)`.
        mask: of the same shape, 1 where a pixel was seen.
        size: height and width of the clean images.
        kinds: `(B,)` numbers of the model's data weights, which come with a penalty of its latents; None: neither.
        corruption: through which they were seen; None: directly.
        regularizer: of latents, `(B, ...) -> (B,)`, in the place of a penalty of the model's own; None: none.
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


class Reconstruction(Objective):
    """Mean squared error of images whose latents explain what was observed.

    In evaluation the images are those of the equilibrium, solved for once more at the latents that were found.

    Args:
        model: decoder.
        task: corruptions, step, schedule, fixed-depth steps and the solver of an equilibrium alone.
        solver: of state, adjoint and latents together.
        gradient: through the answer.
        eval_solver: in place of `solver` in evaluation; None: the same.
    """

    def __init__(
        self,
        model: ImageDecoder,
        task: Reconstruct,
        *,
        solver: Solver,
        gradient: Gradient,
        eval_solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.solver, self.gradient, self.eval_solver = solver, gradient, eval_solver

    @property
    def scores(self) -> tuple[str, ...]:
        return Reconstruct.scores

    def forward(self, images: Tensor, labels: Tensor, info: StepInfo | None = None) -> tuple[Tensor, Tensor]:
        observed, mask = self._observe(images, info)
        solution: Solution[Any]
        if info is not None and info.step < self.task.pretraining.steps:
            solution = self._guess(observed, mask)
            z = solution.value
        else:
            solution = self._explain(images, observed, mask, info)
            z, _, x = solution.value
            if info is None:
                with self.model.deq.using(solver=self.task.equilibrium):
                    z = self.model.deq(x, *self.model.context(observed, mask), z0=z)
        found = self._complete(self.model.decode(z), observed, mask)
        error = (found - images).square().flatten(1).mean(1)
        loss = (error + FLOOR).log().mean() if self.task.corruptions else error.mean()
        scores = {"psnr": psnr(found, images).sum()}
        return loss, self.sums(loss, solution, scores, torch.zeros_like(loss))

    def _guess(self, observed: Tensor, mask: Tensor) -> Solution[Any]:
        """The state after some applications of the map, with latents of zero."""
        x = self.model.latents(len(observed), *observed.shape[-2:])
        with self.model.deq.using(solver=Picard(max_steps=0), gradient=Unrolled(steps=self.task.pretraining.depth)):
            guess: Solution[Any] = self.model.deq.solve(x, *self.model.context(observed, mask))
        return guess

    def _explain(self, images: Tensor, observed: Tensor, mask: Tensor, info: StepInfo | None) -> InputSolution:
        corruptions = self.task.corruptions
        weighted = self.model.config.conditional
        solver = self.solver if info is not None else self.eval_solver or self.solver
        return explain(
            self.model,
            observed,
            mask,
            size=(images.shape[2], images.shape[3]),
            kinds=torch.arange(len(images), device=images.device) % len(corruptions) if weighted else None,
            corruption=corruptions[0] if len(corruptions) == 1 else None,
            optimizer=InputOptimizer(
                solver=solver,
                scheme=self.task.schedule,
                step_size=self.task.step_size,
                gradient=self.gradient,
                verify_solver=None,
            ),
        )

    def _complete(self, estimate: Tensor, observed: Tensor, mask: Tensor) -> Tensor:
        """The answers to estimates of the images."""
        if not self.task.corruptions:
            return estimate
        answer, count = torch.empty_like(estimate), len(self.task.corruptions)
        for number, corruption in enumerate(self.task.corruptions):
            answer[number::count] = corruption.complete(*(t[number::count] for t in (estimate, observed, mask)))
        return answer

    def _observe(self, images: Tensor, info: StepInfo | None) -> tuple[Tensor, Tensor]:
        """What is seen of the images, each of which meets the next of the corruptions.

        In evaluation what is random follows from the image, whatever else is in the batch.
        """
        if not self.task.corruptions:
            return images, torch.ones_like(images)
        count = len(self.task.corruptions)
        if info is None:
            parts = []
            for number, image in enumerate(images):
                source = generator(*(255 * image).round().int().flatten().tolist())
                parts.append(self.task.corruptions[number % count].observe(image[None], source))
            observed, mask = (torch.cat(part) for part in zip(*parts, strict=True))
            return observed, mask
        source = generator(derive_seed(info.seed, info.step, 5))
        if count == 1:
            return self.task.corruptions[0].observe(images, source)
        observed, mask = torch.empty_like(images), torch.empty_like(images)
        for number, corruption in enumerate(self.task.corruptions):
            observed[number::count], mask[number::count] = corruption.observe(images[number::count], source)
        return observed, mask


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, `(B,)`, of pixels in [0, 1]; what lies outside is clipped."""
    error = (found.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return -10 * error.clamp_min(torch.finfo(error.dtype).tiny).log10()
