"""What the gradient of an equilibrium costs in the backward pass, and what it is worth in test accuracy.

    python -m benchmarks.backward_cost.run [--data fashion-mnist|cifar10] [--device cpu|cuda] [--seeds N] [--threads N]
        [--quick] [--show] --json FILE [--plot PNG]

Question, after the third figure of the SHINE paper (Ramzi et al. 2022): how much accuracy does each gradient give up
for a cheaper backward pass? One model and one schedule are trained from the same weights with each gradient:

    original/k    the adjoint equation w = J^T w + g by k steps of Broyden's method from w = 0
    jfb/k         the same from w = g; k = 0 is the Jacobian-free gradient w = g itself
    shine/k       the same from SHINE's estimate, preconditioned with the forward inverse, fallback at ratio 1.3;
                  k = 0 is the estimate itself
    shine-opa/0   SHINE behind a forward solve by adjoint Broyden that is told the loss every fifth evaluation,
                  fallback at ratio 1.8

k steps make k + 1 products with J^T, for the start is judged, too, and the best iterate is the answer. `Implicit` by
default starts at w = g, so `Implicit(solver=Broyden(...))` is jfb/k here. The published original/k starts at zero: its
first product, J^T 0, is wasted, and its first step leads to g; from there original/k + 1 does what jfb/k does, with one
update more. original/0 is no gradient at all. original/full, k = 20, is the reference. The other families tend to the
same gradient: their full solves are timed and not trained.

    test_accuracy   after training, mean over seeds; validation_accuracy on training images set aside
    backward_ms     loss to gradients of all parameters, stem and head included; the median over batches of one process
                    in which the variants take turns on the same batch and on the same model, that trained by
                    original/full; mean over seeds. On a GPU the clock is read after synchronising; on one CPU thread it
                    is the processor's, which leaves out what other programs take.
                    backward_ratio: the median of the ratios to original/full, batch by batch
    forward_ms      loss from images, for adjoint Broyden pays products there
    vjps            products with J^T beside the one into parameters that every gradient needs; a product of fewer rows,
                    because some have converged, counts as one
    cosine          of the gradient of stem and cell with the exact one at the same equilibrium, of which exact_residual
                    is the largest relative residual; the head's is exact whatever the estimator and is left out
    fallback_rate   k = 0: share of samples that fell back on the model trained with this variant, over all of 100
                    batches of 32 (the published script counts over 100 batches and divides by the samples of 1,000)
    radius_*        spectral radius of J at the equilibria of 100 images, of the model trained with this variant
    nonlinear_gain  the published figure for the same purpose: norm of f(z) after 20 rounds of z = f(z) / |f(z)|. f ends
                    in a normalisation, so that it is near the square root of the size of the state whatever J is

Results are written after each training, and a run that was interrupted goes on where it was; run folders lie beside
FILE. CIFAR-10 is the recipe `mdeq-cifar10-tiny` and needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter
from torch import Tensor

import equipoise as eq
from equipoise import zoo
from equipoise.data import Digits, FashionMNIST, Split
from equipoise.files import write_atomic
from equipoise.report.figures import BLUE, GRAY, GREEN, INK, ORANGE, STYLE
from equipoise.train import Adam, Objective, Pretraining, StepInfo, TrainConfig, fit
from equipoise.train.device import to_device
from equipoise.train.serialize import to_plain
from equipoise.zoo import Classify, EquilibriumClassifier, MDEQConfig
from equipoise.zoo.files import load

FULL = 20  # steps of the reference
REFERENCE = "original/full"
TRAINED = StepInfo(step=2**40, epoch=0, seed=0)  # past all fixed-depth steps
FAMILIES = {  # label, color, marker, and where its points are named
    "original": ("implicit from zero, k steps", GRAY, "s", (-6, -13)),
    "jfb": ("Jacobian-free, refined by k steps", ORANGE, "o", (-6, 7)),
    "shine": ("SHINE, refined by k steps", BLUE, "D", (5, -13)),
    "shine-opa": ("SHINE-OPA", GREEN, "^", (-9, -13)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(eq.Gradient):
    """The adjoint vector zero: a start."""

    def cotangent(self, adjoint: Any, g: Tensor, solution: eq.Solution[Tensor]) -> Tensor:
        return torch.zeros_like(g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how much is measured."""

    config: TrainConfig
    steps: tuple[int, ...] = (5, 1, 10, 2)  # k, beside 0 and the full solve, in the order of training
    timed_batches: int = 15
    cosine_batches: int = 4
    fallback_batches: int = 100
    probed_images: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A gradient, and the forward solver that it needs."""

    solver: eq.Solver
    gradient: eq.Gradient
    trained: bool = True  # or timed alone


def fashion_mnist() -> Setting:
    """A single level of 7x7 pixels and 16 channels, and 22,400 images seen once: a core trains it in about a minute."""
    config = TrainConfig(
        name="backward-fashion-mnist",
        data=FashionMNIST(validation_fraction=0.02),
        model=MDEQConfig(
            image_size=28,
            image_channels=1,
            num_classes=10,
            channels=(16,),
            num_downsamplings=2,
            expansion=2,
            num_groups=4,
            head_channels=(8,),
            final_channels=64,
        ),
        solver=eq.Broyden(max_steps=10, memory=10, rtol=1e-2),
        optimizer=Adam(lr=1e-2),
        epochs=1,
        stop_after=350,
        batch_size=64,
    )
    return Setting(config=config)


def cifar10() -> Setting:
    """The recipe."""
    return Setting(config=zoo.mdeq_cifar10_tiny())


def quick() -> Setting:
    """Digits for seconds: that everything runs, not what comes out."""
    config = dataclasses.replace(
        zoo.mdeq_digits(),
        data=Digits(validation_fraction=0.1),
        model=dataclasses.replace(MDEQConfig.digits(), channels=(8,), head_channels=(4,), final_channels=16),
        solver=eq.Broyden(max_steps=8, memory=8, rtol=1e-2),
        task=Classify(pretraining=Pretraining(steps=2, depth=2)),
        stop_after=4,
    )
    return Setting(
        config=config, steps=(1,), timed_batches=3, cosine_batches=2, fallback_batches=2, probed_images=20
    )  # fmt: skip


def variants(setting: Setting) -> dict[str, Variant]:
    """All variants by name, the reference first."""
    forward = setting.config.solver
    assert isinstance(forward, eq.Broyden)
    shine = eq.Shine(fallback_ratio=1.3)
    aware = eq.Shine(fallback_ratio=1.8)
    adjoint = eq.AdjointBroyden(
        max_steps=forward.max_steps, memory=forward.max_steps + forward.max_steps // 5, rtol=forward.rtol, outer_every=5
    )

    def refined(start: eq.Gradient, k: int) -> Variant:
        # As published, the tolerance is never met: the number of steps is what limits.
        solver = eq.Broyden(max_steps=k + 1, memory=max(1, k), rtol=1e-6)
        return Variant(solver=forward, gradient=eq.Implicit(solver=solver, start=start))

    return {
        REFERENCE: refined(Nothing(), FULL),
        "jfb/full": dataclasses.replace(refined(eq.JacobianFree(), FULL), trained=False),
        "shine/full": dataclasses.replace(refined(shine, FULL), trained=False),
        "jfb/0": Variant(solver=forward, gradient=eq.JacobianFree()),
        "shine/0": Variant(solver=forward, gradient=shine),
        "shine-opa/0": Variant(solver=adjoint, gradient=aware),
        **{
            f"{family}/{k}": refined(start, k)
            for k in setting.steps
            for family, start in (("original", Nothing()), ("jfb", eq.JacobianFree()), ("shine", shine))
        },
    }


def train(setting: Setting, variant: Variant, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Train with a variant and say what came out."""
    config = dataclasses.replace(
        setting.config,
        solver=variant.solver,
        gradient=variant.gradient,
        eval_solver=setting.config.solver,
        seed=seed,
        tensorboard=False,
    )
    result = fit(config, run_dir=folder, resume=True)
    splits = config.data.load()
    validation = [line["accuracy"] for line in result.history if line["split"] == "validation"]
    figures = {
        "test_accuracy": result.test_accuracy,
        "validation_accuracy": validation[-1] if validation else None,
        **{name: result.test[name] for name in ("seconds", "backward_share", "mean_steps", "converged", "residual")},
        **probe(result.model, config, splits.test, setting.probed_images),
    }
    if isinstance(variant.gradient, eq.Shine):
        figures["fallback_rate"] = fallback_rate(result.model, config, splits.train, setting.fallback_batches)
    return figures


def batches(config: TrainConfig, split: Split, size: int, count: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """As many batches of training images as are asked for, in an order of no training."""
    done = 0
    while done < count:
        for images, labels in split.batches(size, shuffle=(-1, done)):
            yield to_device(config, images, labels, torch.device(device))
            done += 1
            if done == count:
                return


def probe(model: EquilibriumClassifier, config: TrainConfig, split: Split, count: int) -> dict[str, float]:
    """Spectral radius of the Jacobian at equilibria, and what was published in its place."""
    device = next(model.parameters()).device
    images, _ = to_device(config, *next(split.batches(count)), device)
    torch.manual_seed(0)
    with torch.no_grad(), model.deq.using(solver=config.eval_solver):
        _, solution = model.classify(images)
    radius = eq.nn.spectral_radius(solution)
    f = solution.map
    with torch.no_grad(), f.solve_context():
        z = torch.randn_like(f.pack(solution.value))
        for _ in range(20):
            fz = f.call(z)
            gain = torch.linalg.vector_norm(fz, dim=1)
            z = fz / gain[:, None]
    return {
        "radius_min": float(radius.min()),
        "radius_median": float(radius.median()),
        "radius_max": float(radius.max()),
        "nonlinear_gain": float(gain.mean()),
    }


def fallback_rate(model: EquilibriumClassifier, config: TrainConfig, split: Split, count: int) -> float:
    """Share of the samples of which SHINE's estimate is replaced."""
    assert isinstance(config.gradient, eq.Shine)
    masks: list[Tensor] = []
    device = next(model.parameters()).device
    objective = Objective(model, Classify()).train()
    with model.deq.using(solver=config.solver, gradient=dataclasses.replace(config.gradient, observe=masks.append)):
        for images, labels in batches(config, split, 32, count, str(device)):
            loss, _ = objective(images, labels, TRAINED)
            loss.backward()
    return float(torch.cat(masks).double().mean())


def costs(setting: Setting, model: EquilibriumClassifier, split: Split, device: str) -> dict[str, dict[str, float]]:
    """Time, products and error of each variant's backward pass, on one model and in turn on the same batches."""
    config, chosen = setting.config, variants(setting)
    objective = Objective(model.to(device), Classify()).train()
    inner = [*model.stem.parameters(), *model.deq.parameters()]
    outer = list(model.head.parameters())
    clock = clock_of(device)
    reports: list[eq.Solution] = []

    def run(solver: eq.Solver, gradient: eq.Gradient, images: Tensor, labels: Tensor) -> tuple[float, float, Tensor]:
        """Seconds of forward and backward pass, and the gradient of stem and cell."""
        if isinstance(gradient, eq.Implicit):
            gradient = dataclasses.replace(gradient, observe=reports.append)
        with model.deq.using(solver=solver, gradient=gradient):
            torch.manual_seed(0)  # dropout masks
            start = clock()
            loss, _ = objective(images, labels, TRAINED)
            middle = clock()
            grads = torch.autograd.grad(loss, [*inner, *outer], allow_unused=True, materialize_grads=True)
            end = clock()
        return middle - start, end - middle, torch.cat([g.flatten() for g in grads[: len(inner)]])

    exact = eq.Implicit(solver=eq.Broyden(max_steps=300, memory=300, rtol=1e-5))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    cosines: dict[str, list[float]] = {name: [] for name in chosen}
    products: dict[str, list[int]] = {name: [] for name in chosen}
    names, worst = list(chosen), 0.0
    for number, (images, labels) in enumerate(
        batches(config, split, config.batch_size, setting.timed_batches + 1, device)
    ):
        truth: dict[eq.Solver, Tensor] = {}
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            variant = chosen[name]
            if number < setting.cosine_batches and variant.solver not in truth:
                truth[variant.solver] = run(variant.solver, exact, images, labels)[2]
                worst = max(worst, float(reports.pop().residual.max()))
            forward, backward, grad = run(variant.solver, variant.gradient, images, labels)
            products[name].append(reports.pop().num_vjps if reports else 0)
            if number:  # the first batch warms up
                times[name].append((forward, backward))
            if number < setting.cosine_batches:
                cosines[name].append(float(torch.cosine_similarity(grad, truth[variant.solver], dim=0)))
    reference = [backward for _, backward in times[REFERENCE]]
    return {
        name: {
            "backward_ms": 1000 * statistics.median(backward for _, backward in times[name]),
            "backward_ratio": statistics.median(b / r for (_, b), r in zip(times[name], reference, strict=True)),
            "forward_ms": 1000 * statistics.median(forward for forward, _ in times[name]),
            "vjps": statistics.fmean(products[name]),
            "cosine": statistics.fmean(cosines[name]),
            "exact_residual": worst,
        }
        for name in chosen
    }


def clock_of(device: str) -> Callable[[], float]:
    """Seconds of work done until now."""
    if device == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def summary(data: str, names: list[str], record: dict[str, Any]) -> dict[str, float]:
    """Means over the seeds that are done, as `<data>/<variant>/<k>/<figure>`, and their spread as `<figure>_std`."""
    flat: dict[str, float] = {}
    for name in names:
        runs = [run for key, run in record["runs"].items() if key.rsplit("/", 1)[0] == name]
        timed = [found[name] for found in record["costs"].values()]
        flat[f"{data}/{name}/seeds"] = len(runs)
        for rows in (runs, timed):
            for figure in rows[0] if rows else ():
                values = [row[figure] for row in rows if row[figure] is not None]
                if not values:
                    continue
                mean, spread = mean_and_spread(values)
                flat[f"{data}/{name}/{figure}"] = mean
                if not math.isnan(spread):
                    flat[f"{data}/{name}/{figure}_std"] = spread
    return flat


COLUMNS = {
    "seeds": "seeds",
    "test_accuracy": "test",
    "test_accuracy_std": "std",
    "validation_accuracy": "valid",
    "backward_ms": "ms",
    "backward_ratio": "ratio",
    "forward_ms": "fwd ms",
    "vjps": "vjps",
    "cosine": "cosine",
    "exact_residual": "exact",
    "fallback_rate": "fallback",
    "radius_min": "rho min",
    "radius_median": "median",
    "radius_max": "max",
    "nonlinear_gain": "gain",
    "converged": "conv",
    "seconds": "train s",
}


def table(data: str, names: list[str], record: dict[str, Any]) -> str:
    """The figures, one line a variant."""
    lines = [f"{'variant':<15}" + "".join(f"{head:>10}" for head in COLUMNS.values())]
    for name in sorted(names, key=_order):
        cells = (record["figures"].get(f"{data}/{name}/{column}") for column in COLUMNS)
        lines.append(f"{name:<15}" + "".join(f"{'' if cell is None else format(cell, '.4g'):>10}" for cell in cells))
    return "\n".join(lines)


def _order(name: str) -> tuple[int, int]:
    family, k = name.split("/")
    return list(FAMILIES).index(family), FULL if k == "full" else int(k)


@matplotlib.rc_context(STYLE)
def plot(data: str, names: list[str], record: dict[str, Any]) -> Figure:
    """Accuracy against the time of a backward pass, a line a family, points named by k, of variants with all seeds."""
    figures = record["figures"]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for family, (label, color, marker, offset) in FAMILIES.items():
        members = [name for name in sorted(names, key=_order) if name.split("/")[0] == family]
        # A mean of fewer seeds than the others' has no place beside them.
        members = [name for name in members if figures[f"{data}/{name}/seeds"] == len(record["costs"])]
        if not members:
            continue
        x = [figures[f"{data}/{name}/backward_ms"] for name in members]
        y = [figures[f"{data}/{name}/test_accuracy"] for name in members]
        spread = [figures.get(f"{data}/{name}/test_accuracy_std", 0.0) for name in members]
        axes.errorbar(x, y, spread, color=color, marker=marker, label=label, capsize=3, elinewidth=0.9)
        for name, a, b in zip(members, x, y, strict=True):
            k = name.split("/")[1]
            side = "left" if offset[0] > 0 else "right"
            axes.annotate(k, (a, b), offset, textcoords="offset points", color=color, fontsize=8.5, ha=side)
    axes.set_xscale("log")
    axes.set_xlabel("backward pass of a batch, ms")
    axes.set_ylabel("test accuracy")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    figure.legend(loc="outside lower center", ncols=2)
    title = f"{data}: mean and standard deviation of seeds 0 to {len(record['costs']) - 1}"
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("fashion-mnist", "cifar10"), default="fashion-mnist")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="digits, four steps, one seed: seconds")
    parser.add_argument("--show", action="store_true", help="what FILE holds, finished or not; nothing is run")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = quick() if args.quick else {"fashion-mnist": fashion_mnist, "cifar10": cifar10}[args.data]()
    config = dataclasses.replace(setting.config, accelerator=args.device)
    setting = dataclasses.replace(setting, config=config)
    data = "digits" if args.quick else args.data
    seeds = 1 if args.quick else args.seeds
    if args.show and not args.json.exists():
        parser.error(f"--show: {args.json} does not exist; leave --show out to measure, and write it")
    chosen = variants(setting)
    names = list(chosen)
    record = begin(args.json, setting, args.device, args.threads)
    folders = args.json.with_suffix(".runs")
    split = config.data.load().train

    def save() -> None:
        record["figures"] = summary(data, names, record)
        record["date"] = time.strftime("%Y-%m-%d")
        write_atomic(args.json, (json.dumps(record, indent=1) + "\n").encode())

    for name, variant in chosen.items():  # all seeds of one before the next: what is done is of equal weight
        for seed in range(seeds) if variant.trained and not args.show else ():
            folder = folders / name.replace("/", "-") / str(seed)
            if f"{name}/{seed}" not in record["runs"]:
                folder.parent.mkdir(parents=True, exist_ok=True)
                found = train(setting, variant, seed, folder)
                record["runs"][f"{name}/{seed}"] = found
                print(f"{time.strftime('%H:%M:%S')} {name}/{seed}: {found['test_accuracy']:.4f}", flush=True)
                save()
            if name == REFERENCE and str(seed) not in record["costs"]:
                model = load(folder / "model.safetensors")
                record["costs"][str(seed)] = costs(setting, model, split, args.device)
                save()
    if not args.show:
        save()
    print(table(data, names, record))
    if args.plot:
        plot(data, names, record).savefig(args.plot, dpi=160)


def begin(path: pathlib.Path, setting: Setting, device: str, threads: int) -> dict[str, Any]:
    """A new record, or the one in the file if it is of the same setting.

    Raises:
        SystemExit: it is of another.
    """
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "equipoise": eq.__version__,
        "setting": json.loads(json.dumps(to_plain(setting))),
    }
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        different = [name for name, fact in facts.items() if record.get(name) != fact]
        if different:
            raise SystemExit(f"{path} holds results of another {', '.join(different)}; give another file")
        return record
    return {**facts, "runs": {}, "costs": {}}


if __name__ == "__main__":
    main()
