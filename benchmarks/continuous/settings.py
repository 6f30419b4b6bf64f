"""Data, models and variants of the continuous benchmark."""

import dataclasses
import functools
from typing import ClassVar

import torch.nn.functional as F

import equipoise as eq
from equipoise.data import MNIST5K, Digits, FashionMNIST, HubImages, ImageData, Split, Splits, TensorSplit
from equipoise.solvers import VCAB3, Stepper, Tsit5
from equipoise.train import Adam, Pretraining, TrainConfig
from equipoise.zoo import ClassifierConfig, Classify, DenseConfig, JacobianPenalty, MDEQConfig, SkipPenalty
from equipoise.zoo.mdeq.recipes import CIFAR_MEAN, CIFAR_STD

SOLVERS = ("anderson", "broyden", "vcab3", "tsit5")
WEIGHTS = (0.01, 0.1, 1.0, 5.0)  # of the skip penalty, those that are compared
SWEPT = "vcab3"  # the solver with which they are
# Of the grid. With one, Skip loses a point on validation images of MNIST, and the map of Skip Reg ceases to depend on
# its state; a tenth, at which neither happens, is among the weights that are compared.
SKIP = {"mnist": 1.0, "fashion-mnist": 1.0, "multiscale": 0.1}
MILD, JACOBIAN = 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Extent of a run.

    Args:
        quick: digits and three steps.
        multiscale: data of the multiscale model.
        device: of training and timing.
    """

    DATA: ClassVar = ("mnist", "fashion-mnist", "multiscale")

    quick: bool = False
    multiscale: str = "fashion-mnist"
    device: str = "cpu"

    def timed(self, data: str) -> int:
        """Batches on which the models take turns."""
        return 1 if self.quick else 11 if data == "multiscale" else 21


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table.

    Args:
        config: of its training.
        vanilla: the variant without predictor and explicit step that has the same solver and penalty; of `node`, none.
    """

    config: TrainConfig
    vanilla: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallFashionMNIST(FashionMNIST):
    """Fashion-MNIST at 14x14: means of 2x2 pixels."""

    shape = (1, 14, 14)

    def load(self) -> Splits:
        whole = super().load()
        train, validation, test = (self._pooled(split) for split in (whole.train, whole.validation, whole.test))
        assert train is not None
        assert test is not None
        return Splits(train, validation, test, whole.classes)

    @staticmethod
    def _pooled(split: Split | None) -> TensorSplit | None:
        if split is None:
            return None
        assert isinstance(split, TensorSplit)
        return TensorSplit(F.avg_pool2d(split.images.float(), 2).round().to(split.images.dtype), split.labels)


@functools.cache
def splits(data: ImageData) -> Splits:
    """The images, read once a process."""
    return data.load()


def solver(name: str, steps: int, rtol: float) -> eq.Solver:
    """A solver by name."""
    steppers: dict[str, Stepper] = {"vcab3": VCAB3(), "tsit5": Tsit5()}
    if name in steppers:
        return eq.SteadyState(stepper=steppers[name], max_steps=steps, rtol=rtol)
    if name == "anderson":
        return eq.Anderson(max_steps=steps, rtol=rtol)
    return eq.Broyden(max_steps=steps, memory=steps, rtol=rtol)


def adjoint(steps: int, tolerance: float) -> eq.Implicit:
    """Relative to the right-hand side, which is scaled to one."""
    return eq.Implicit(solver=eq.GMRES(max_steps=steps, memory=steps, rtol=0.0, atol=tolerance))


def shared(data: str, settings: Settings) -> tuple[TrainConfig, int, float]:
    """Common configuration of all variants on some data, with the cap and the tolerance of their solves."""
    if settings.quick:
        small = MDEQConfig.digits()
        model = (
            dataclasses.replace(small, channels=(8, 8), head_channels=(4, 4), final_channels=16, dropout=0.0)
            if data == "multiscale"
            else DenseConfig(image_size=8, image_channels=1, num_classes=10, width=16)
        )
        config = TrainConfig(
            data=Digits(validation_fraction=0.1),
            model=model,
            task=Classify(),
            stop_after=3,
            batch_size=16,
            gradient=adjoint(10, 5e-2),
        )
        return config, 12, 5e-2
    if data == "multiscale" and settings.multiscale == "cifar10":
        config = TrainConfig(
            data=HubImages(
                source="uoft-cs/cifar10", image_size=32, mean=CIFAR_MEAN, std=CIFAR_STD, validation_fraction=0.05
            ),
            model=MDEQConfig.cifar10_tiny(),
            optimizer=Adam(lr=1e-3),
            stop_after=700,
            batch_size=128,
            eval_batch_size=1000,
            gradient=adjoint(20, 5e-2),
            task=Classify(pretraining=Pretraining(steps=105, depth=5)),
        )
        return config, 18, 5e-2
    if data == "multiscale":
        model = dataclasses.replace(
            MDEQConfig.fashion_mnist(), image_size=14, channels=(8, 16), head_channels=(8, 16), num_groups=4,
            final_channels=64, expansion=2, dropout=0.0, num_downsamplings=0,
        )  # fmt: skip
        config = TrainConfig(
            data=SmallFashionMNIST(validation_fraction=0.05),
            model=model,
            optimizer=Adam(lr=5e-3),
            stop_after=300,
            batch_size=64,
            eval_batch_size=500,
            gradient=adjoint(20, 5e-2),
            task=Classify(pretraining=Pretraining(steps=60, depth=5)),
        )
        return config, 18, 5e-2
    source: ImageData = MNIST5K(validation_fraction=0.1) if data == "mnist" else FashionMNIST(validation_fraction=0.05)
    config = TrainConfig(
        data=source,
        model=DenseConfig(image_size=28, image_channels=1, num_classes=10, width=128),
        task=Classify(),
        optimizer=Adam(lr=3e-3),
        stop_after=600,
        batch_size=64,
        eval_batch_size=500,
        gradient=adjoint(20, 5e-3),
    )
    return config, 50, 5e-3


@functools.cache
def variants(data: str, settings: Settings) -> dict[str, Variant]:
    """All variants on some data, by name."""
    config, steps, rtol = shared(data, settings)
    dense, skipping = data != "multiscale", ("skip", "skip-reg")
    grid = [
        (model, name, penalized, SKIP[data])
        for model in ("vanilla", *skipping)
        for name in ((SWEPT,) if settings.quick else SOLVERS if dense else ("broyden", "vcab3"))
        for penalized in ([False, True] if dense else [False])
    ]
    if data == "mnist":
        others = [MILD] if settings.quick else [weight for weight in WEIGHTS if weight != SKIP[data]]
        grid += [(model, SWEPT, False, weight) for model in skipping for weight in others]
    found = {}
    for model, name, penalized, weight in grid:
        assert isinstance(config.model, ClassifierConfig)
        kind = dataclasses.replace(
            config.model, predictor=model == "skip", explicit_steps=1 if model == "skip-reg" else 0
        )
        end = name + ("-jac" if penalized else "")
        full = f"{model}-{end}" + (f"-w{weight:g}" if weight != SKIP[data] else "")
        found[full] = Variant(
            dataclasses.replace(
                config,
                name=full,
                model=kind,
                solver=solver(name, steps, rtol),
                task=Classify(
                    pretraining=config.task.pretraining,
                    skip=SkipPenalty(weight=0.0 if model == "vanilla" else weight),
                    penalty=JacobianPenalty(weight=JACOBIAN if penalized else 0.0),
                ),
            ),
            f"vanilla-{end}",
        )
    found["node"] = Variant(dataclasses.replace(config, name="node"), "")
    return found
