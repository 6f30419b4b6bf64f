"""Named recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from equipoise.contraction.certificate import contraction_solver
from equipoise.gradients import Implicit, Shine
from equipoise.inputs import Envelope, Joint, Nested
from equipoise.models import (
    ClassifierConfig,
    Contraction,
    DecoderConfig,
    DenseConfig,
    FewShotConfig,
    MDEQConfig,
    PriorConfig,
    ScaledLayers,
    SLLLayers,
)
from equipoise.solvers import GMRES, Anderson, Broyden, Picard, SteadyState
from equipoise.train.config import SGD, Adam, Pretraining, Schedule, SkipPenalty, TrainConfig
from equipoise.train.corruptions import Hole, Noise
from equipoise.train.data import MNIST5K, Digits, FashionMNIST, HubImages
from equipoise.train.omniglot import Omniglot
from equipoise.train.tasks import Adversarial, FewShot, Reconstruct

# Published for CIFAR-10. Where the proof needs more steps, an image stops with what it has: in training an equilibrium
# that is somewhat off costs less than the worst case that almost no image meets. Evaluation takes what the proof needs.
FORWARD_STEPS, BACKWARD_STEPS = 18, 20

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def mdeq_digits() -> TrainConfig:
    """Small MDEQ with SHINE gradients on scikit-learn's 8x8 digits: a minute or two on two CPU cores."""
    return TrainConfig(
        name="mdeq-digits",
        data=Digits(),
        model=MDEQConfig.digits(),
        solver=Broyden(max_steps=18, memory=18, rtol=1e-2),
        gradient=Shine(fallback_ratio=1.3),
        optimizer=Adam(lr=2e-3),
        epochs=20,
        batch_size=64,
        pretraining=Pretraining(steps=60, depth=5),
    )


def mdeq_fashion_mnist() -> TrainConfig:
    """MDEQ with SHINE gradients on Fashion-MNIST: under half an hour on two CPU cores."""
    return TrainConfig(
        name="mdeq-fashion-mnist",
        data=FashionMNIST(validation_fraction=0.05, flip=True),
        model=MDEQConfig.fashion_mnist(),
        solver=Broyden(max_steps=8, memory=8, rtol=1e-2),
        gradient=Shine(fallback_ratio=1.3),
        optimizer=Adam(lr=1.5e-3),
        epochs=5,
        batch_size=64,
        pretraining=Pretraining(steps=600, depth=4),
        channels_last=True,
    )


def mdeq_cifar10_tiny() -> TrainConfig:
    """CIFAR-10 without augmentation, 159 k parameters, 50 epochs; published: 87.1 % (MDEQ), 84.7 % (SHINE's tables)."""
    return TrainConfig(
        name="mdeq-cifar10-tiny",
        data=_cifar10(),
        model=MDEQConfig.cifar10_tiny(),
        solver=Broyden(max_steps=18, memory=18),
        gradient=Implicit(solver=Broyden(max_steps=20, memory=20)),
        optimizer=Adam(lr=1e-3, weight_decay=2.5e-6),
        epochs=50,
        batch_size=128,
        pretraining=Pretraining(steps=3_000, depth=10),
    )


def mdeq_cifar10_large() -> TrainConfig:
    """CIFAR-10 with augmentation, 11.1 M parameters, 220 epochs; published: 93.8 % (MDEQ)."""
    return TrainConfig(
        name="mdeq-cifar10-large",
        data=dataclasses.replace(_cifar10(), crop_padding=4, flip=True),
        model=MDEQConfig.cifar10_large(),
        solver=Broyden(max_steps=18, memory=18),
        gradient=Implicit(solver=Broyden(max_steps=20, memory=20)),
        optimizer=Adam(lr=1e-3),
        epochs=220,
        batch_size=128,
        pretraining=Pretraining(steps=20_000, depth=10),
    )


def mdeq_imagenet_small() -> TrainConfig:
    """ImageNet, 16.8 M parameters, 100 epochs; published: 75.4 %."""
    return _imagenet("small", MDEQConfig.imagenet_small(), weight_decay=5e-5, depth=5)


def mdeq_imagenet_large() -> TrainConfig:
    """ImageNet, 67.1 M parameters, 100 epochs; published: 77.5 %."""
    return _imagenet("large", MDEQConfig.imagenet_large(), weight_decay=1e-4, depth=4)


def mdeq_imagenet_xl() -> TrainConfig:
    """ImageNet, 90.5 M parameters, 100 epochs; published: 79.2 %."""
    return _imagenet("xl", MDEQConfig.imagenet_xl(), weight_decay=1e-4, depth=4, batch_size=256)


def lipschitz_digits() -> TrainConfig:
    """MDEQ that provably contracts, layers as published, on the digits: a minute on a CPU."""
    config = contracting(mdeq_digits(), ScaledLayers(), rtol=1e-2)
    return dataclasses.replace(config, name="lipschitz-digits", epochs=10)


def lipschitz_fashion_mnist() -> TrainConfig:
    """MDEQ that provably contracts, layers as published, on Fashion-MNIST."""
    config = contracting(mdeq_fashion_mnist(), ScaledLayers(), rtol=1e-2)
    return dataclasses.replace(config, name="lipschitz-fashion-mnist")


def lipschitz_cifar10() -> TrainConfig:
    """CIFAR-10 with augmentation, 11.1 M parameters, 200 epochs: published settings, convolutions truly capped."""
    config = contracting(mdeq_cifar10_large(), ScaledLayers())
    return dataclasses.replace(config, name="lipschitz-cifar10", epochs=200)


def lipschitz_tight_digits() -> TrainConfig:
    """MDEQ of layers whose bounds are nearly reached, on the digits: a minute or two on a CPU."""
    config = contracting(mdeq_digits(), SLLLayers(), rtol=1e-2)
    return dataclasses.replace(config, name="lipschitz-tight-digits", epochs=10)


def lipschitz_tight_fashion_mnist() -> TrainConfig:
    """MDEQ of layers whose bounds are nearly reached, on Fashion-MNIST."""
    config = contracting(mdeq_fashion_mnist(), SLLLayers(), rtol=1e-2)
    return dataclasses.replace(config, name="lipschitz-tight-fashion-mnist")


def lipschitz_tight_cifar10() -> TrainConfig:
    """CIFAR-10 with augmentation, layers whose bounds are nearly reached, 200 epochs."""
    config = contracting(mdeq_cifar10_large(), SLLLayers())
    return dataclasses.replace(config, name="lipschitz-tight-cifar10", epochs=200)


def continuous_mnist() -> TrainConfig:
    """Fully connected DEQ whose equilibrium is the steady state of a flow, on 5,000 digits: some minutes on a CPU."""
    return TrainConfig(
        name="continuous-mnist",
        data=MNIST5K(),
        model=DenseConfig(image_size=28, image_channels=1, num_classes=10),
        solver=SteadyState(max_steps=50, rtol=5e-3),
        gradient=Implicit(solver=GMRES(max_steps=15, rtol=0.0, atol=5e-3)),
        optimizer=Adam(lr=1e-3),
        epochs=25,
        batch_size=32,
    )


def skip_mnist() -> TrainConfig:
    """Skip DEQ: `continuous-mnist`, begun at the guess of a network that learns to predict the equilibrium."""
    config = continuous_mnist()
    model = dataclasses.replace(_classifier(config), predictor=True)
    return dataclasses.replace(config, name="skip-mnist", model=model, skip=SkipPenalty(weight=1.0))


def skip_reg_mnist() -> TrainConfig:
    """Skip Reg DEQ: `continuous-mnist`, begun at the first step of the map, to which the equilibrium is drawn.

    With a weight of a tenth the map still depends on its state for many images; from one on it does for none.
    """
    config = continuous_mnist()
    model = dataclasses.replace(_classifier(config), explicit_steps=1)
    return dataclasses.replace(config, name="skip-reg-mnist", model=model, skip=SkipPenalty(weight=0.1))


def skip_reg_fashion_mnist() -> TrainConfig:
    """Skip Reg DEQ with two levels, by the flow, on Fashion-MNIST."""
    config = mdeq_fashion_mnist()
    return dataclasses.replace(
        config,
        name="skip-reg-fashion-mnist",
        model=dataclasses.replace(_classifier(config), explicit_steps=1),
        solver=SteadyState(max_steps=18, rtol=5e-2),
        gradient=Implicit(solver=GMRES(max_steps=20, rtol=0.0, atol=5e-2)),
        epochs=2,
        skip=SkipPenalty(weight=0.1),
    )


def jiio_adversarial() -> TrainConfig:
    """Adversarial training on the digits, radius 1 in L2: the attack is found with the equilibrium, half a minute.

    The map is capped to contract: otherwise training makes maps whose equilibrium the joint iterate never meets.
    """
    return TrainConfig(
        name="jiio-adversarial",
        data=Digits(mean=(0.0,), std=(1.0,)),
        model=DenseConfig(image_size=8, image_channels=1, num_classes=10, cap=0.8),
        task=Adversarial(step_size=3.0, schedule=Nested(steps=3)),
        solver=Picard(max_steps=10, rtol=1e-2),
        gradient=Envelope(),
        eval_solver=Picard(max_steps=40, rtol=1e-3),
        optimizer=Adam(lr=4e-3),
        epochs=30,
        batch_size=128,
    )


def jiio_adversarial_fashion_mnist() -> TrainConfig:
    """Adversarial training on Fashion-MNIST, radius 1 in L2: a few minutes."""
    return dataclasses.replace(
        jiio_adversarial(),
        name="jiio-adversarial-fashion-mnist",
        data=FashionMNIST(validation_fraction=0.05, mean=(0.0,), std=(1.0,)),
        model=DenseConfig(image_size=28, image_channels=1, num_classes=10, cap=0.8),
        task=Adversarial(),
        optimizer=Adam(lr=2e-3),
        epochs=2,
    )


def jiio_generative() -> TrainConfig:
    """Decoder trained by optimizing latents, generative, on Fashion-MNIST: a minute or two on a CPU core."""
    return TrainConfig(
        name="jiio-generative",
        data=FashionMNIST(validation_fraction=0.02, mean=(0.0,), std=(1.0,)),
        model=DecoderConfig(image_size=28, image_channels=1),
        task=Reconstruct(step_size=0.05, schedule=Nested(steps=3)),
        solver=Anderson(memory=8, max_steps=18, rtol=1e-4, ridge=1e-3),
        gradient=Envelope(),
        eval_solver=Anderson(memory=8, max_steps=40, rtol=1e-4, ridge=1e-3),
        optimizer=Adam(lr=3e-3),
        epochs=1,
        stop_after=500,
        batch_size=64,
    )


def jiio_inverse() -> TrainConfig:
    """Denoising and inpainting by latents found with the equilibrium, on Fashion-MNIST: a dozen minutes on a core."""
    return TrainConfig(
        name="jiio-inverse",
        data=FashionMNIST(validation_fraction=0.005, flip=True, mean=(0.0,), std=(1.0,)),
        model=PriorConfig(image_size=28, num_corruptions=3),
        task=Reconstruct(corruptions=(Noise(std=0.1), Noise(std=0.2), Hole(size=9)), step_size=0.1, schedule=Joint()),
        solver=Anderson(memory=8, max_steps=15, rtol=1e-3, ridge=1e-3),
        gradient=Implicit(solver=GMRES(max_steps=20, rtol=0.0, atol=2e-2)),
        eval_solver=Anderson(memory=10, max_steps=30, rtol=1e-3, ridge=1e-3),
        optimizer=Adam(lr=1e-2),
        epochs=2,
        stop_after=4_000,
        batch_size=16,
        eval_batch_size=100,
        clip_norm=1.0,
        pretraining=Pretraining(steps=3_700, depth=6),
    )


def contracting(config: TrainConfig, contraction: Contraction, *, rtol: float = 1e-3) -> TrainConfig:
    """The same run with layers that make the map contract, and with the solvers that their constant admits.

    Training counts dropout in the constant, evaluation does not, and so has a solver of its own. There is no
    pretraining: a map that contracts has its equilibrium from the first step on.

    Args:
        config: of a run; its dropout is set to 0 with `SLLLayers`, which have no place for it.
        contraction: the layers.
        rtol: relative error of the equilibrium and of its adjoint.

    Raises:
        ValueError: the layers do not contract in training, or the model is no MDEQ.

    Example:
        >>> from equipoise.models import SLLLayers
        >>> from equipoise.train import recipes
        >>> config = recipes.contracting(recipes.mdeq_digits(), SLLLayers(ceiling=0.5))
        >>> config.solver.lipschitz, config.solver.max_steps
        (0.5, 13)
    """
    if not isinstance(config.model, MDEQConfig):
        raise ValueError(f"only an MDEQ has layers that contract, and {config.name} is a {type(config.model).__name__}")
    dropout = 0.0 if isinstance(contraction, SLLLayers) else config.model.dropout
    model = dataclasses.replace(config.model, contraction=contraction, dropout=dropout)
    bound, evaluated = (contraction.constant(model.num_levels, dropout=p) for p in (dropout, 0.0))
    if bound >= 1:
        raise ValueError(
            f"{contraction} allows a constant of {bound:.3f} with dropout={dropout}, and only below 1 does the map "
            "contract; lower slope, cap, exchange or dropout"
        )
    return dataclasses.replace(
        config,
        model=model,
        solver=contraction_solver(bound, rtol=rtol, max_steps=FORWARD_STEPS),
        gradient=Implicit(solver=contraction_solver(bound, rtol=rtol, max_steps=BACKWARD_STEPS)),
        eval_solver=contraction_solver(evaluated, rtol=rtol),
        pretraining=Pretraining(),
    )


def _classifier(config: TrainConfig) -> ClassifierConfig:
    assert isinstance(config.model, ClassifierConfig)
    return config.model


def _cifar10() -> HubImages:
    return HubImages(source="uoft-cs/cifar10", image_size=32, mean=CIFAR_MEAN, std=CIFAR_STD)


def _imagenet(size: str, model: MDEQConfig, *, weight_decay: float, depth: int, batch_size: int = 128) -> TrainConfig:
    return TrainConfig(
        name=f"mdeq-imagenet-{size}",
        data=HubImages(
            source="ILSVRC/imagenet-1k",
            test_split="validation",
            image_size=224,
            resize=256,
            random_resized_crop=True,
            flip=True,
            in_memory=False,
            num_workers=8,
        ),
        model=model,
        # Published with an absolute tolerance of 1e-3 on the whole batch, which it never meets: all steps are used.
        solver=Broyden(max_steps=26, memory=26),
        gradient=Implicit(solver=Broyden(max_steps=27, memory=27)),
        optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=weight_decay),
        epochs=100,
        batch_size=batch_size,
        pretraining=Pretraining(steps=510_000, depth=depth),
    )


def jiio_meta() -> TrainConfig:
    """Few-shot learner of characters, whose context and head are optimized inputs: some five minutes of a CPU core."""
    return TrainConfig(
        name="jiio-meta",
        task=FewShot(),
        data=Omniglot(fonts="/usr/share/fonts/truetype/noto", queries=3, tasks=4800),
        model=FewShotConfig(image_size=28, image_channels=1),
        solver=Anderson(memory=10, max_steps=60, rtol=1e-2, ridge=1e-3),
        gradient=Implicit(solver=GMRES(max_steps=40, rtol=0.0, atol=3e-2)),
        eval_solver=Anderson(memory=10, max_steps=100, rtol=1e-3, ridge=1e-3),
        optimizer=Adam(lr=3e-3),
        schedule=Schedule(warmup_steps=40),
        epochs=2,
        batch_size=8,
        eval_batch_size=50,
        clip_norm=1.0,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "mdeq-digits": mdeq_digits,
    "mdeq-fashion-mnist": mdeq_fashion_mnist,
    "mdeq-cifar10-tiny": mdeq_cifar10_tiny,
    "mdeq-cifar10-large": mdeq_cifar10_large,
    "mdeq-imagenet-small": mdeq_imagenet_small,
    "mdeq-imagenet-large": mdeq_imagenet_large,
    "mdeq-imagenet-xl": mdeq_imagenet_xl,
    "lipschitz-digits": lipschitz_digits,
    "lipschitz-fashion-mnist": lipschitz_fashion_mnist,
    "lipschitz-cifar10": lipschitz_cifar10,
    "lipschitz-tight-digits": lipschitz_tight_digits,
    "lipschitz-tight-fashion-mnist": lipschitz_tight_fashion_mnist,
    "lipschitz-tight-cifar10": lipschitz_tight_cifar10,
    "continuous-mnist": continuous_mnist,
    "skip-mnist": skip_mnist,
    "skip-reg-mnist": skip_reg_mnist,
    "skip-reg-fashion-mnist": skip_reg_fashion_mnist,
    "jiio-adversarial": jiio_adversarial,
    "jiio-adversarial-fashion-mnist": jiio_adversarial_fashion_mnist,
    "jiio-meta": jiio_meta,
    "jiio-generative": jiio_generative,
    "jiio-inverse": jiio_inverse,
}
