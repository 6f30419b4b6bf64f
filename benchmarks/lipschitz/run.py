"""What a proof of convergence costs in accuracy, and what it saves in evaluations and time.

    python -m benchmarks.lipschitz.run [--quick] [--seeds N] [--workers N] [--show] --json FILE [--plot PNG]

Claim of the paper (Sato and Iiduka 2026): up to 4.75 times faster than MDEQ with a minor loss of accuracy. One small
MDEQ on Fashion-MNIST, the same widths, epochs, optimizer, data and tolerance (relative residual 1e-3) for all:

    mdeq               the published layers; Broyden, at most 18 evaluations forward and 20 backward, as published;
                       the first 300 steps at fixed depth, without which it trains worse
    mdeq-jacobian      the same with the Jacobian penalty, weight 0.5 on a twentieth of the steps
    mdeq-shine         the cheapest that we know for the published layers: eight forward evaluations, no adjoint solve
    lipschitz-sS       ScaledLayers with slope S; where S is above 0.4 the cap of the convolutions is lowered until the
                       constant of the settings is at most 0.99; Picard iteration
    tight-C            SLLLayers with ceiling C; Anderson acceleration with the safeguard that proves its rate

Every figure is the mean over seeds, with its standard deviation under `details`:

    test_accuracy         of the trained model
    train_step_ratio      time of an optimizer step (loss, gradient, Adam) over that of `mdeq`, and
    inference_ratio       of a batch of test images: medians over batches on which the trained models take turns, in one
                          process with one thread; without the penalty, which is for a twentieth of the steps
    evals_forward         evaluations of the map for a training image, and
    evals_backward        products with its transposed Jacobian, in the adjoint solve alone
    evals_ratio           the sum of both over that of `mdeq`
    converged_fraction    of the test images, at the tolerance
    certified_L           Lipschitz constant proved from the trained weights; null without a proof
    tightness             largest norm of the Jacobian found at 100 test images, over certified_L
    median_residual       relative, of the test images

Results are written after each training; a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter
from rich.console import Console
from rich.table import Table

import equipoise as eq
from equipoise.data import Digits, FashionMNIST
from equipoise.files import write_atomic
from equipoise.report.figures import BLUE, GRAY, GREEN, INK, STYLE
from equipoise.train import Adam, Objective, Pretraining, StepInfo, TrainConfig, fit
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

RTOL = 1e-3
FORWARD, BACKWARD = 18, 20  # evaluations, as published
TRAINED = StepInfo(step=2**40, epoch=0, seed=0)  # past all fixed-depth steps
BASELINE = "mdeq"
COUNTED = 5  # training batches on which evaluations are counted
TIMED = 12  # batches on which the models take turns


def base(quick: bool) -> TrainConfig:
    """What all variants share."""
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
    return {name: dataclasses.replace(config, name=name) for name, config in chosen.items()}


def train(name: str, seed: int, folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """Train a variant and say what came out."""
    torch.set_num_threads(1)
    config = dataclasses.replace(variants(quick)[name], seed=seed)
    result = fit(config, run_dir=folder, resume=True)
    model = result.model.cpu().eval()
    splits = config.data.load()
    images, _ = to_device(config, *next(splits.test.batches(100)), torch.device("cpu"))
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
            relative_residual(model.classify(to_device(config, *batch, torch.device("cpu"))[0])[1])
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
    with model.deq.using(gradient=gradient):
        for number, batch in enumerate(config.data.load().train.batches(config.batch_size, shuffle=(seed, -1))):
            if number == COUNTED:
                break
            loss, sums = objective(*to_device(config, *batch, torch.device("cpu")), TRAINED)
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            forward.append(float(sums[3] / sums[0]))
    model.eval()
    return {"evals_forward": statistics.fmean(forward), "evals_backward": statistics.fmean(backward or [0.0])}


def times(folders: dict[str, pathlib.Path], quick: bool) -> dict[str, dict[str, float]]:
    """Ratios to the baseline of a training step and of inference, with trained models in turn on the same batches."""
    torch.set_num_threads(1)
    configs = variants(quick)
    models = {name: load(folder / "model.safetensors") for name, folder in folders.items()}
    for name, model in models.items():
        if configs[name].channels_last:
            model.to(memory_format=torch.channels_last)
    names = list(models)
    config = configs[BASELINE]
    splits = config.data.load()
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, split, size in (
        ("train_step_ratio", splits.train, config.batch_size),
        ("inference_ratio", splits.test, 100 if quick else 250),
    ):
        training = key == "train_step_ratio"
        seconds: dict[str, list[float]] = {name: [] for name in names}
        objectives = {name: Objective(model, Classify()).train(training) for name, model in models.items()}
        # So slow that the models stay what they are, and yet every kernel changes, which the caps must follow.
        optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-6) for name, model in models.items()}
        for number, batch in enumerate(split.batches(size, shuffle=(0, -2))):
            if number > (2 if quick else TIMED):
                break
            images, labels = to_device(config, *batch, torch.device("cpu"))
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.process_time()
                with torch.set_grad_enabled(training):
                    loss, _ = objectives[name](images, labels, TRAINED if training else None)
                if training:
                    loss.backward()
                    optimizers[name].step()
                    optimizers[name].zero_grad()
                if number:  # the first batch warms up
                    seconds[name].append(time.process_time() - start)
        for name in names:
            ratios = [own / other for own, other in zip(seconds[name], seconds[BASELINE], strict=True)]
            found[name][key] = statistics.median(ratios)
            found[name][key.replace("ratio", "ms")] = 1000 * statistics.median(seconds[name])
    return found


def summary(record: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over seeds as `<variant>/<figure>`, and their standard deviations."""
    means: dict[str, float | None] = {}
    spreads: dict[str, float] = {}
    runs: dict[str, dict[str, dict[str, Any]]] = {name: seeds for name, seeds in record["runs"].items() if seeds}
    for name, seeds in runs.items():
        rows = [run | record["times"].get(seed, {}).get(name, {}) for seed, run in seeds.items()]
        means[f"{name}/seeds"] = len(rows)
        for figure in dict.fromkeys(key for row in rows for key in row):
            values = [row[figure] for row in rows if row.get(figure) is not None]
            means[f"{name}/{figure}"] = statistics.fmean(values) if values else None
            if len(values) > 1:
                spreads[f"{name}/{figure}"] = statistics.stdev(values)
    spent = {name: sum(means[f"{name}/evals_{way}"] or 0.0 for way in ("forward", "backward")) for name in runs}
    for name in runs:
        if BASELINE in runs:
            means[f"{name}/evals_ratio"] = spent[name] / spent[BASELINE]
    return means, spreads


COLUMNS = {
    "test_accuracy": "test accuracy",
    "evals_forward": "evals forward",
    "evals_backward": "backward",
    "evals_ratio": "ratio",
    "train_step_ratio": "step time",
    "inference_ratio": "inference",
    "converged_fraction": "converged",
    "median_residual": "residual",
    "certified_L": "certified L",
    "tightness": "tightness",
}


def table(record: dict[str, Any]) -> Table:
    """One line a variant; standard deviations of accuracies beside them."""
    means, spreads = summary(record)
    view = Table("variant", "seeds", *COLUMNS.values(), box=None, header_style="bold", pad_edge=False)
    for name in (name for name, seeds in record["runs"].items() if seeds):
        cells = []
        for column in COLUMNS:
            value, spread = means.get(f"{name}/{column}"), spreads.get(f"{name}/{column}")
            if value is None:
                cells.append("-")
            elif column == "test_accuracy":
                cells.append(f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
            elif column == "median_residual":
                cells.append(f"{value:.1e}")
            else:
                cells.append(f"{value:.1%}" if column == "converged_fraction" else f"{value:.3g}")
        view.add_row(name, f"{means[f'{name}/seeds']:.0f}", *cells)
    return view


@matplotlib.rc_context(STYLE)
def plot(record: dict[str, Any]) -> Figure:
    """Accuracy against the time of a training step."""
    means, spreads = summary(record)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    families = {"mdeq": ("published layers", GRAY, "s"), "lipschitz": ("scaled layers, slope s", BLUE, "o")}
    families["tight"] = ("SLL layers, ceiling of the budget", GREEN, "D")
    for family, (label, color, marker) in families.items():
        names = [n for n in record["runs"] if n.split("-")[0] == family and f"{n}/train_step_ratio" in means]
        x, y = ([means[f"{name}/{key}"] or 0.0 for name in names] for key in ("train_step_ratio", "test_accuracy"))
        spread = [spreads.get(f"{name}/test_accuracy", 0.0) for name in names]
        axes.errorbar(x, y, spread, color=color, marker=marker, ls="none", label=label, capsize=3, elinewidth=0.9)
        # The two kinds of layers lie among each other: one is named on the left, the other on the right.
        for name, a, b in zip(names, x, y, strict=True):
            text = name if family == "mdeq" else name.split("-")[1]
            side, ha = (-6, "right") if family == "lipschitz" or 0.9 < a < 1 else (6, "left")
            above = 5 if family == "tight" or b == max(y) else -12
            axes.annotate(text, (a, b), (side, above), textcoords="offset points", color=color, fontsize=8.5, ha=ha)
    axes.set_xlabel("time of a training step, over that of mdeq")
    axes.set_ylabel("test accuracy")
    axes.set_xscale("log")
    axes.set_xlim(0.22, 1.4)
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    seeds = sorted({seed for runs in record["runs"].values() for seed in runs}, key=int)
    axes.set_title(f"mean and standard deviation of seeds {', '.join(seeds)}", color=INK, fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, six steps, one seed: seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that train, each with one thread")
    parser.add_argument("--show", action="store_true", help="what FILE holds, finished or not; nothing is run")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # of the processes that start below
    seeds = 1 if args.quick else args.seeds
    record: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.show and not record:
        raise SystemExit(f"--show: {args.json} does not exist")
    record = {"minutes": 0.0, "runs": {}, "times": {}} | record
    if not args.show:
        run(record, args.json, seeds, args.quick, 1 if args.quick else args.workers)
    Console(width=170).print(table(record))
    if args.plot:
        plot(record).savefig(args.plot, dpi=160)


def run(record: dict[str, Any], path: pathlib.Path, seeds: int, quick: bool, workers: int) -> None:
    """Train what the record lacks, then time it; the record is written after each step."""
    began, before = time.time(), record["minutes"]
    names = list(variants(quick))
    record["runs"] = {name: record["runs"].get(name, {}) for name in names}
    place = path.with_suffix(".runs").absolute()
    folders = {(name, seed): place / name / str(seed) for seed in range(seeds) for name in names}

    def save() -> None:
        means, spreads = summary(record)
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": before + (time.time() - began) / 60,
            "workers": workers,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "equipoise": eq.__version__,
        }
        record.update(facts)
        content = {**facts, **means, "details": spreads, "runs": record["runs"], "times": record["times"]}
        if any(isinstance(value, float) and not math.isfinite(value) for value in means.values()):
            raise SystemExit(f"a figure is not finite: {means}")
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())

    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {}
        for (name, seed), folder in folders.items():
            if str(seed) not in record["runs"][name]:
                folder.parent.mkdir(parents=True, exist_ok=True)
                waiting[pool.submit(train, name, seed, folder, quick)] = name, seed
        for done in concurrent.futures.as_completed(waiting):
            name, seed = waiting[done]
            record["runs"][name][str(seed)] = found = done.result()
            print(f"{time.strftime('%H:%M:%S')} {name}/{seed}: {found['test_accuracy']:.4f}", flush=True)
            save()
    for seed in range(seeds):
        if str(seed) not in record["times"]:
            record["times"][str(seed)] = times({name: folders[name, seed] for name in names}, quick)
            save()


if __name__ == "__main__":
    main()
