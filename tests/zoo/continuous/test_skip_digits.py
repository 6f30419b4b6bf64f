"""What drawing the equilibrium to its start is for: fewer evaluations at the same accuracy, on handwritten digits."""

import dataclasses
import functools
import tempfile

import pytest
from torch import Tensor, nn

import equipoise as eq
from equipoise.data import Digits
from equipoise.train import Adam, LRSchedule, TrainConfig, fit
from equipoise.zoo import Classify, DenseConfig, SkipPenalty

pytestmark = pytest.mark.slow

# Relative residual of the forward solve, and that of the adjoint: the published ones of the dense MNIST model.
TOLERANCE = 5e-3


def config(name: str, **fields: bool | int | float) -> TrainConfig:
    """The 8x8 digits by a dense model of 128 numbers: Picard iteration, 6 epochs in batches of 32, Adam at 1e-3."""
    weight = fields.pop("weight", 0.0)
    return TrainConfig(
        name=name,
        data=Digits(),
        model=DenseConfig(image_size=8, image_channels=1, num_classes=10, **fields),  # type: ignore[arg-type]
        solver=eq.Picard(max_steps=50, rtol=TOLERANCE),
        gradient=eq.Implicit(solver=eq.GMRES(max_steps=17, rtol=0.0, atol=TOLERANCE)),
        optimizer=Adam(lr=1e-3),
        schedule=LRSchedule(final_lr=1e-3),
        epochs=6,
        batch_size=32,
        task=Classify(skip=SkipPenalty(weight=weight)),
        tensorboard=False,
    )


CONFIGS = {
    "vanilla": config("vanilla"),
    "skip 0.01": config("skip", predictor=True, weight=0.01),
    "skip reg 0.01": config("skip-reg", explicit_steps=1, weight=0.01),
    "skip 5": config("skip", predictor=True, weight=5.0),
    "skip reg 5": config("skip-reg", explicit_steps=1, weight=5.0),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    accuracy: float
    evaluations: float  # mean of a test image, those of the start too
    products: float  # mean of a test image, in the adjoint of its cross-entropy


@functools.cache
def outcome(name: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        result = fit(CONFIGS[name], run_dir=folder)
    data, model, reports = Digits(), result.model, list[eq.Solution[Tensor]]()
    images, labels = next(iter(data.load().test.batches(1000)))
    adjoint = eq.GMRES(max_steps=40, rtol=0.0, atol=TOLERANCE)
    with model.deq.using(gradient=eq.Implicit(solver=adjoint, observe=reports.append)):
        logits, solution = model.classify(data.prepare(images))
        nn.functional.cross_entropy(logits, labels).backward()
    assert bool(solution.converged.all())
    # The network of a Skip DEQ is counted as one evaluation; explicit steps of the map are counted already.
    evaluations = solution.num_steps.double().mean() + model.config.predictor
    return Outcome(result.test_accuracy, float(evaluations), float(reports[0].num_steps.double().mean()))


# The scratch figures of the specification count one more application, that of the released layer, and no start: 17
# evaluations without penalty, 11 and 14 at weight 0.01, 4 and 3 at weight 5, after 12 epochs; then measured here: 13.1;
# 11.5, 12.6; 3.7, 2.0, at accuracies of 0.981; 0.981, 0.978; 0.981, 0.978. Half the epochs show it, too.
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("vanilla", 11, 17),
        pytest.param("skip 0.01", 10, 14, marks=pytest.mark.extended),
        pytest.param("skip reg 0.01", 10, 14.5, marks=pytest.mark.extended),
        ("skip 5", 3, 4.5),
        ("skip reg 5", 2, 3),
    ],
)
def test_evaluations(name: str, least: float, most: float) -> None:
    found = outcome(name)
    assert least <= found.evaluations <= most, found
    assert found.accuracy > max(0.96, outcome("vanilla").accuracy - 0.02), found


def test_products() -> None:
    """The tolerance is relative, so products fall since J is small: to 5.0 and 1.0 from 9.7 after 12 epochs."""
    vanilla, skip, skip_reg = (outcome(name).products for name in ("vanilla", "skip 5", "skip reg 5"))
    assert vanilla > 7
    assert skip < 0.7 * vanilla
    assert skip_reg < 2
