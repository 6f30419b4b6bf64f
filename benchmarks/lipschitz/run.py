"""Cost of a proof of convergence in accuracy, and its savings in evaluations and time.

    python -m benchmarks lipschitz [--quick] [--seeds N] [--workers N]

Claim of the paper (Sato and Iiduka 2026): up to 4.75 times faster than MDEQ with a minor loss of accuracy.
Evidence: `results/2026-11-26.json`: Fashion-MNIST, 3 seeds, two processes of one thread on two x86-64 cores, 116
minutes, torch 2.13.0. Certified models take 0.26 to 0.40 of the time of a step, and lose no accuracy.

One small MDEQ; widths, epochs, optimizer, data and tolerance (relative residual 1e-3) are the same for all:

    mdeq               the published layers; Broyden, at most 18 evaluations forward and 20 backward, as published;
                       the first 300 steps at fixed depth, without which it trains worse
    mdeq-jacobian      the same with the Jacobian penalty, weight 0.5 on a twentieth of the steps
    mdeq-shine         the cheapest known setting of the published layers: eight forward evaluations, no adjoint solve
    lipschitz-sS       ScaledLayers with slope S; if S is above 0.4, the cap of the convolutions is lowered until the
                       constant of the settings is at most 0.99; Picard iteration
    tight-C            SLLLayers with ceiling C; Anderson acceleration with the safeguard that proves its rate

Every figure is the mean over seeds, with its standard deviation under `spread`:

    test_accuracy         of the trained model
    train_step_ratio      time of an optimizer step (loss, gradient, Adam) over that of `mdeq`, and
    inference_ratio       of a batch of test images: medians over batches on which the trained models take turns, in one
                          process with one thread; without the penalty, which applies to a twentieth of the steps
    evals_forward         evaluations of the map for a training image, and
    evals_backward        products with its transposed Jacobian, in the adjoint solve alone
    evals_ratio           the sum of both over that of `mdeq`
    converged_fraction    of the test images, at the tolerance
    certified_L           Lipschitz constant proved from the trained weights; null without a proof
    tightness             largest norm of the Jacobian found at 100 test images, over certified_L
    median_residual       relative, of the test images
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import equipoise as eq
from benchmarks import harness
from benchmarks.lipschitz.report import BASELINE, summary, table
from equipoise.data import Digits, FashionMNIST
from equipoise.train import Adam, Objective, Pretraining, TrainConfig, fit
from equipoise.train.device import to_device
from equipoise.train.task import relative_residual
from equipoise.zoo import (
    Classify,
    EquilibriumClassifier,
    JacobianPenalty,
    MDEQConfig,
    ScaledLayers,
    SLLLayers,
)
from equipoise.zoo.files import load

CPU = torch.device("cpu")
RTOL = 1e-3
FORWARD, BACKWARD = 18, 20  # evaluations, as published
COUNTED = 5  # training batches on which evaluations are counted
TIMED = 12  # batches on which the models take turns


def base(quick: bool) -> TrainConfig:
    """Common settings of all variants."""
    if quick:
        model = dataclasses.replace(
            MDEQConfig.digits(), channels=(8, 8), head_channels=(4, 4), final_channels=16, dropout=0.0
        )
        return TrainConfig(
            data=Digits(), model=model, task=Classify(), epochs=1, stop_after=6, batch_size=32, tensorboard=False
        )
    model = dataclasses.replace(
        MDEQConfig.fashion_mnist(), channels=(8, 16), head_channels=(8, 16), num_groups=4, final_channels=64
    )
    return TrainConfig(
        task=Classify(),
        data=FashionMNIST(validation_fraction=0.05, flip=True),
        model=model,
        optimizer=Adam(lr=5e-3),
        epochs=2,
        stop_after=1336,  # one and a half epochs
        batch_size=64,
        eval_batch_size=500,
        channels_last=True,
        tensorboard=False,
    )


def variants(quick: bool) -> dict[str, TrainConfig]:
    """All variants by name, the baseline first."""
    shared = base(quick)
    shape = shared.model
    assert isinstance(shape, MDEQConfig)

    def broyden(steps: int) -> eq.Broyden:
        return eq.Broyden(max_steps=steps, memory=steps, rtol=RTOL)

    pretrained = Classify(pretraining=Pretraining(steps=2 if quick else 300, depth=4))
    penalty = JacobianPenalty(weight=0.5, probability=0.05)
    mdeq = dataclasses.replace(
        shared,
        solver=broyden(FORWARD),
        gradient=eq.Implicit(solver=broyden(BACKWARD)),
        task=pretrained,
    )
    chosen = {
        BASELINE: mdeq,
        "mdeq-jacobian": dataclasses.replace(mdeq, task=dataclasses.replace(pretrained, penalty=penalty)),
        "mdeq-shine": dataclasses.replace(mdeq, solver=broyden(8), gradient=eq.Shine(fallback_ratio=1.3)),
    }
    for slope in (0.2, 0.4, 0.6, 0.8, 1.0):
        layers = ScaledLayers(slope=slope).capped(shape.num_levels, dropout=shape.dropout)
        chosen[f"lipschitz-s{slope}"] = dataclasses.replace(
            shared,
            model=dataclasses.replace(shape, contraction=layers),
            solver=eq.Picard(max_steps=FORWARD, rtol=RTOL),
            gradient=eq.Implicit(solver=eq.Picard(max_steps=BACKWARD, rtol=RTOL)),
        )
    for ceiling in (0.5, 0.7, 0.9):
        # With a constant, the tolerance is one of the error: this is the same residual.
        error = RTOL / (1 - ceiling)
        chosen[f"tight-{ceiling}"] = dataclasses.replace(
            shared,
            model=dataclasses.replace(shape, contraction=SLLLayers(ceiling=ceiling)),
            solver=eq.Anderson(max_steps=FORWARD, lipschitz=ceiling, rtol=error),
            gradient=eq.Implicit(solver=eq.Anderson(max_steps=BACKWARD, lipschitz=ceiling, rtol=error)),
        )
    names = ("mdeq", "mdeq-shine", "lipschitz-s0.4", "tight-0.7") if quick else chosen
    return {name: dataclasses.replace(chosen[name], name=name) for name in names}


def train(name: str, seed: int, folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """Train a variant and measure it."""
    config = dataclasses.replace(variants(quick)[name], seed=seed)
    result = fit(config, run_dir=folder, resume=True)
    model = result.model.cpu().eval()
    splits = config.data.load()
    images, _ = to_device(config, *next(splits.test.batches(100)), CPU)
    with torch.no_grad():
        _, solution = model.classify(images)
    try:
        proved, measured = eq.certify(model), float(eq.jacobian_norm(solution).amax())
        certificate: dict[str, float | None] = {
            "certified_L": proved.norm,
            "certified_radius": proved.radius,
            "certified_L_training": eq.certify(model, training=True).norm,
            "tightness": measured / proved.norm,
        }
    except eq.CertificateError:
        certificate = {"certified_L": None}
    with torch.no_grad():
        residuals = [
            relative_residual(model.classify(to_device(config, *batch, CPU)[0])[1])
            for batch in splits.test.batches(config.eval_batch_size)
        ]
    validation = [line["accuracy"] for line in result.history if line["split"] == "validation"]
    return {
        "test_accuracy": result.test_accuracy,
        "validation_accuracy": validation[-1] if validation else None,
        "converged_fraction": result.test["converged"],
        "median_residual": float(torch.cat(residuals).median()),
        "seconds": result.test["seconds"],
        **certificate,
        **evaluations(model, config, seed),
    }


def evaluations(model: EquilibriumClassifier, config: TrainConfig, seed: int) -> dict[str, float]:
    """Mean evaluations of a training image, forward and in the adjoint solve."""
    forward: list[float] = []
    backward: list[float] = []
    gradient = config.gradient
    if isinstance(gradient, eq.Implicit):
        gradient = dataclasses.replace(gradient, observe=lambda s: backward.append(float(s.num_steps.double().mean())))
    objective = Objective(model, Classify()).train()
    batches = config.data.load().train.batches(config.batch_size, shuffle=(seed, -1))
    with model.deq.using(gradient=gradient):
        for batch in itertools.islice(batches, COUNTED):
            loss, sums = objective(*to_device(config, *batch, CPU), harness.TRAINED)
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            forward.append(float(sums[3] / sums[0]))
    model.eval()
    return {"evals_forward": statistics.fmean(forward), "evals_backward": statistics.fmean(backward or [0.0])}


def times(folders: dict[str, pathlib.Path], quick: bool) -> dict[str, dict[str, float]]:
    """Ratios to the baseline of a training step and of inference, with trained models in turn on the same batches."""
    configs = variants(quick)
    models = {name: load(folder / "model.safetensors") for name, folder in folders.items()}
    for name, model in models.items():
        if configs[name].channels_last:
            model.to(memory_format=torch.channels_last)
    config = configs[BASELINE]
    splits = config.data.load()
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for key, split, size in (
        ("train_step", splits.train, config.batch_size),
        ("inference", splits.test, 100 if quick else 250),
    ):
        training = key == "train_step"
        seconds: dict[str, list[float]] = {name: [] for name in models}
        objectives = {name: Objective(model, Classify()).train(training) for name, model in models.items()}
        # So slow that the models stay unchanged, and yet every kernel changes, which the caps must follow.
        optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-6) for name, model in models.items()}
        batches = itertools.islice(split.batches(size, shuffle=(0, -2)), 1 + (2 if quick else TIMED))
        for number, batch, name in harness.in_turn(models, (to_device(config, *batch, CPU) for batch in batches)):
            start = harness.clock()
            with torch.set_grad_enabled(training):
                loss, _ = objectives[name](*batch, harness.TRAINED if training else None)
            if training:
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
            if number:  # the first batch warms up
                seconds[name].append(harness.clock() - start)
        for name in models:
            found[name][f"{key}_ratio"] = harness.median_ratio(seconds[name], seconds[BASELINE])
            found[name][f"{key}_ms"] = 1000 * statistics.median(seconds[name])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__, argv, quick="digits, six steps, four variants, one seed: seconds", seeds=3, workers=2, summary=summary
    )
    quick = record.args.quick
    folders = {s: {name: record.folder / name / str(s) for name in variants(quick)} for s in range(record.args.seeds)}
    jobs = {}
    for seed, places in folders.items():
        for name, folder in places.items():
            folder.parent.mkdir(parents=True, exist_ok=True)
            jobs["runs", name, seed] = functools.partial(train, name, seed, folder, quick)
    record.measure_all(jobs)
    for seed, places in folders.items():
        record.measure(functools.partial(times, places, quick), "times", seed)
    record.finish(table)
