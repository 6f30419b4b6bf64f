"""Recipes: each function returns a complete configuration; vary it with `dataclasses.replace`."""

import dataclasses

from equipoise.contraction.certificate import contraction_solver
from equipoise.gradients import Implicit
from equipoise.train import Pretraining, TrainConfig
from equipoise.zoo.classification import Classify
from equipoise.zoo.lipschitz_mdeq.scaled import ScaledLayers
from equipoise.zoo.lipschitz_mdeq.sll import SLLLayers
from equipoise.zoo.mdeq import Contraction, MDEQConfig, mdeq_cifar10_large, mdeq_digits, mdeq_fashion_mnist

# Published for CIFAR-10. In training a solve stops here even if the proof needs more steps: a slightly inexact
# equilibrium costs less than the worst case, which almost no image needs. Evaluation makes all steps of the proof.
FORWARD_STEPS, BACKWARD_STEPS = 18, 20


def lipschitz_digits() -> TrainConfig:
    """MDEQ that provably contracts, layers as published, on the digits: a minute on a CPU."""
    return dataclasses.replace(
        contracting(mdeq_digits(), ScaledLayers(), rtol=1e-2), name="lipschitz-digits", epochs=10
    )


def lipschitz_fashion_mnist() -> TrainConfig:
    """MDEQ that provably contracts, layers as published, on Fashion-MNIST."""
    return dataclasses.replace(
        contracting(mdeq_fashion_mnist(), ScaledLayers(), rtol=1e-2), name="lipschitz-fashion-mnist"
    )


def lipschitz_cifar10() -> TrainConfig:
    """CIFAR-10 with augmentation, 11.1 M parameters, 200 epochs: published settings, convolutions capped with proof."""
    return dataclasses.replace(contracting(mdeq_cifar10_large(), ScaledLayers()), name="lipschitz-cifar10", epochs=200)


def lipschitz_tight_digits() -> TrainConfig:
    """MDEQ of layers with tight bounds, on the digits: a minute or two on a CPU."""
    return dataclasses.replace(
        contracting(mdeq_digits(), SLLLayers(), rtol=1e-2), name="lipschitz-tight-digits", epochs=10
    )


def lipschitz_tight_fashion_mnist() -> TrainConfig:
    """MDEQ of layers with tight bounds, on Fashion-MNIST."""
    return dataclasses.replace(
        contracting(mdeq_fashion_mnist(), SLLLayers(), rtol=1e-2), name="lipschitz-tight-fashion-mnist"
    )


def lipschitz_tight_cifar10() -> TrainConfig:
    """CIFAR-10 with augmentation, layers with tight bounds, 200 epochs."""
    return dataclasses.replace(
        contracting(mdeq_cifar10_large(), SLLLayers()), name="lipschitz-tight-cifar10", epochs=200
    )


def contracting(config: TrainConfig, contraction: Contraction, *, rtol: float = 1e-3) -> TrainConfig:
    """Return a run with layers that make the map contract, and with the solvers that their constant allows.

    Training counts dropout in the constant, evaluation does not, and so has a solver of its own. There is no
    pretraining: a map that contracts has its equilibrium from the first step on.

    Args:
        config: of a run; its dropout is set to 0 with layers that allow none.
        contraction: the layers.
        rtol: relative error of the equilibrium and of its adjoint.

    Raises:
        ValueError: the layers do not contract in training, or the model is no MDEQ.

    Example:
        >>> from equipoise.zoo import SLLLayers, contracting, mdeq_digits
        >>> config = contracting(mdeq_digits(), SLLLayers(ceiling=0.5))
        >>> config.solver.lipschitz, config.solver.max_steps
        (0.5, 13)
    """
    if not (isinstance(config.model, MDEQConfig) and isinstance(config.task, Classify)):
        raise ValueError(f"only an MDEQ has layers that contract, and {config.name} is a {type(config.model).__name__}")
    dropout = config.model.dropout if contraction.allows_dropout else 0.0
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
        task=dataclasses.replace(config.task, pretraining=Pretraining()),
        solver=contraction_solver(bound, rtol=rtol, max_steps=FORWARD_STEPS),
        gradient=Implicit(solver=contraction_solver(bound, rtol=rtol, max_steps=BACKWARD_STEPS)),
        eval_solver=contraction_solver(evaluated, rtol=rtol),
    )


RECIPES = (
    lipschitz_digits,
    lipschitz_fashion_mnist,
    lipschitz_cifar10,
    lipschitz_tight_digits,
    lipschitz_tight_fashion_mnist,
    lipschitz_tight_cifar10,
)
