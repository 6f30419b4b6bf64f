"""Settings of the zoo that do not fit are refused, with the field, its value and the remedy."""

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch

from equipoise import zoo
from equipoise.data import Digits
from equipoise.inputs import Envelope
from equipoise.train import Pretraining
from equipoise.zoo import (
    Adversarial,
    Blur,
    Classify,
    DecoderConfig,
    DenseConfig,
    Downsample,
    FewShotConfig,
    Hole,
    MDEQConfig,
    Noise,
    Omniglot,
    PriorConfig,
    Reconstruct,
    ScaledLayers,
    SkipPenalty,
    SLLLayers,
)

GRAY = {"image_size": 8, "image_channels": 1}
ADVERSARIAL = functools.partial(dataclasses.replace, zoo.jiio_adversarial())
DENSE = DenseConfig(image_size=28, image_channels=1, num_classes=10)
LEARNER = FewShotConfig(image_size=28, image_channels=1, channels=4, num_groups=2, width=5, context=3)
DECODER = DecoderConfig(**GRAY, latent_size=4, width=24)
PRIOR = PriorConfig(image_size=8, channels=(6, 8, 10), num_corruptions=2)
MDEQ = functools.partial(
    dataclasses.replace, MDEQConfig(
        image_size=8, image_channels=2, num_classes=3, channels=(4, 8, 12), num_groups=2, head_channels=(2, 2, 3),
        final_channels=6,
    ),
)  # fmt: skip
GENERATIVE = functools.partial(dataclasses.replace, zoo.jiio_generative())
INVERSE = functools.partial(dataclasses.replace, zoo.jiio_inverse(), data=Digits(mean=(0.0,), std=(1.0,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ADVERSARIAL(data=Digits()), "would change the meaning of the radius; set them to zeros and ones"),
        (lambda: ADVERSARIAL(model=MDEQConfig.digits()), "the BatchNorm of a MDEQConfig does not; take a DenseConfig"),
        (lambda: Adversarial(radius=0), r"task.radius=0: must be > 0"),
        (lambda: SkipPenalty(weight=-1.0), r"skip\.weight=-1\.0: must be >= 0"),
        (lambda: SkipPenalty(weight=math.nan), r"skip\.weight=nan: must be >= 0"),
        (lambda: SkipPenalty(decay=0.0), r"skip\.decay=0\.0: must be > 0 and <= 1; 1 keeps the weight"),
        (lambda: SkipPenalty(decay=1.1), r"skip\.decay=1\.1: must be > 0 and <= 1"),
        (
            lambda: dataclasses.replace(zoo.continuous_mnist(), task=Classify(skip=SkipPenalty(weight=0.1))),
            r"skip\.weight=0\.1 would draw the equilibrium to zeros.*set model\.predictor=true",
        ),
        (lambda: dataclasses.replace(DENSE, width=0), "width=0: must be >= 1"),
        (lambda: dataclasses.replace(DENSE, cap=-0.5), r"cap=-0\.5: must be > 0, or None for no cap"),
        (lambda: dataclasses.replace(DENSE, explicit_steps=-1), "explicit_steps=-1: must be >= 0"),
        (lambda: DENSE.build()(torch.zeros(2, 3, 28, 28)), r"images must have shape \(B, 1, 28, 28\)"),
        (lambda: dataclasses.replace(LEARNER, width=0), "width=0: must be >= 1"),
        (lambda: dataclasses.replace(LEARNER, channels=5), "channels=5 must be a multiple of num_groups=2"),
        (lambda: dataclasses.replace(LEARNER, image_size=8), "image_size=8: must be >= 16"),
        (lambda: LEARNER.build().encode(torch.zeros(2, 1, 28, 28)), r"images must have shape \(B, n, 1, 28, 28\)"),
        (lambda: Omniglot(ways=0), r"data.ways=0: must be >= 1"),
        (lambda: Omniglot(flip=True), r"neither cropped nor mirrored"),
        (lambda: Omniglot(validation_fraction=0.1), r"name data.validation_alphabets"),
        (lambda: Omniglot(validation_alphabets=("Tagalog",)), r"Tagalog cannot be for validation and for the test"),
        (lambda: Blur(sigma=0.0), r"sigma=0\.0\): must be > 0"),
        (lambda: Noise(std=-1.0), r"std=-1\.0\): must be > 0"),
        (lambda: Hole(size=0), r"size=0\): must be >= 1"),
        (lambda: Downsample(factor=1), r"factor=1\): must be >= 2"),
        (lambda: DECODER.build().latents(1, 10, 8), "images of 8x8, not of 10x8"),
        (lambda: dataclasses.replace(DECODER, latent_size=0), "latent_size=0: must be >= 1"),
        (lambda: dataclasses.replace(DECODER, width=0), "width=0: must be >= 1"),
        (lambda: dataclasses.replace(DECODER, contraction=1.0), "contraction=1.0: must be > 0 and < 1"),
        (lambda: dataclasses.replace(DECODER, image_size=0), "image_size=0: must be >= 1"),
        (lambda: GENERATIVE(model=MDEQConfig.digits()), "needs a decoder"),
        (
            lambda: GENERATIVE(task=Reconstruct(corruptions=(Noise(),)), gradient=Envelope()),
            r"set gradient=Implicit\(\)",
        ),
        (lambda: Reconstruct(step_size=0.0), "step_size=0"),
        (
            lambda: INVERSE(model=PRIOR, task=Reconstruct(corruptions=(Noise(),))),
            "num_corruptions=2 must be the number of task.corruptions, 1",
        ),
        (lambda: INVERSE(model=PRIOR, task=Reconstruct(corruptions=(Noise(), Blur()))), "train Blur or Downsample al"),
        (
            lambda: INVERSE(
                model=dataclasses.replace(PRIOR, num_corruptions=1),
                task=Reconstruct(corruptions=(Downsample(factor=2),)),
            ),
            "sees the observation pixel by pixel, and Downsample leaves fewer of them",
        ),
        (
            lambda: INVERSE(model=DECODER, task=Reconstruct(pretraining=Pretraining(steps=1))),
            r"pretraining.steps=1: .* a DecoderConfig makes the same image every time",
        ),
        (lambda: PriorConfig(image_size=10), "image_size must be a multiple of 4, got 10"),
        (lambda: PriorConfig(image_size=8, channels=()), "at least one level"),
        (lambda: PriorConfig(image_size=8, gain=0.0), r"gain=0\.0: must be > 0"),
        (
            lambda: PRIOR.build().context(torch.zeros(1, 1, 10, 8), torch.ones(1, 1, 10, 8)),
            "multiples of 4, got 10x8",
        ),
        (lambda: SLLLayers(ceiling=1.0), r"ceiling=1.0: must be > 0 and < 1; with a budget of 1 or more the map need"),
        (lambda: SLLLayers(ceiling=1.2), "ceiling=1.2"),
        (lambda: SLLLayers(start=1.0), r"start=1.0: must be > 0 and < 1"),
        (lambda: SLLLayers(exchange=-0.1), r"exchange=-0.1: must be >= 0 and <= 1"),
        (lambda: ScaledLayers(slope=0.0), "slope=0.0: must be"),
        (lambda: ScaledLayers(update=1.1), "update=1.1: must be"),
        (lambda: ScaledLayers(cap=0.0), "cap=0.0: must be > 0"),
        (lambda: ScaledLayers(max_gamma=math.nan), "max_gamma=nan: must be > 0"),
        (lambda: ScaledLayers(weights="sum"), "weights='sum': must be softmax or uniform"),  # type: ignore[arg-type]
        (lambda: MDEQ(dropout=0.1, contraction=SLLLayers()), "dropout=0.1 has no place in SLLLayers"),
        (
            lambda: MDEQ(predictor=True, contraction=ScaledLayers()),
            r"predictor=true has no use with model\.contraction",
        ),
        (lambda: MDEQ(image_size=10), "image_size must be a multiple of 4, got 10"),
        (lambda: MDEQ(image_size=28, num_downsamplings=1), "multiple of 8, got 28"),
        (lambda: MDEQ(image_size=0), "image_size=0: must be >= 1"),
        (lambda: MDEQ(num_classes=0), "num_classes=0: must be >= 1"),
        (lambda: MDEQ(num_downsamplings=-1), "num_downsamplings=-1: must be >= 0"),
        (lambda: MDEQ(dropout=1.0), r"dropout=1.0: must be >= 0 and < 1"),
        (lambda: MDEQ(channels=()), "channels is empty"),
        (lambda: MDEQ(channels=(4, 8, 11)), r"channels must be multiples of num_groups 2, got \(4, 8, 11\)"),
        (lambda: MDEQ(num_groups=1), "num_groups must be even"),
        (lambda: MDEQ(head_channels=(2, 2)), "head_channels .* one entry per level"),
        (lambda: MDEQ(head_channels=(2, 2, 0)), r"head_channels=\(2, 2, 0\): must be >= 1"),
    ],
)  # fmt: skip
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
