"""Cost of the gradient of an equilibrium in the backward pass, and its worth in test accuracy.

    python -m benchmarks backward_cost [--data fashion-mnist|cifar10] [--device cpu|cuda] [--seeds N] [--quick]

Claim, after the third figure of the SHINE paper (Ramzi et al. 2022): a cheaper backward pass loses little accuracy.
Evidence: `results/2026-11-25-fashion-mnist.json`: Fashion-MNIST, 3 seeds, one thread of x86-64, torch 2.13.0. Backward
passes are 5.6 to 6 times faster; the accuracies do not tell the variants apart. CIFAR-10 was not run: it needs a GPU.

One model and one schedule are trained from the same weights with each gradient:

    original/k    the adjoint equation w = J^T w + g by k steps of Broyden's method from w = 0
    jfb/k         the same from w = g; k = 0 is the Jacobian-free gradient w = g itself
    shine/k       the same from SHINE's estimate, preconditioned with the forward inverse, fallback at ratio 1.3;
                  k = 0 is the estimate itself
    shine-opa/0   SHINE behind a forward solve by adjoint Broyden, outer-problem aware (OPA): it takes the gradient of
                  the loss every fifth evaluation; fallback at ratio 1.8

k steps make k + 1 products with J^T, because the start is evaluated, too, and the best iterate is returned. `Implicit`
by default starts at w = g, so `Implicit(solver=Broyden(...))` is jfb/k here. The published original/k starts at zero:
its first product, J^T 0, is wasted, and its first step leads to g; from there original/k + 1 does the same as jfb/k,
with one update more. original/0 is no gradient at all. original/full, k = 20, is the reference. The other families tend
to the same gradient: their full solves are timed and not trained.

    test_accuracy   after training, mean over seeds; validation_accuracy on training images set aside
    backward_ms     loss to gradients of all parameters, stem and head included; the median over batches of one process
                    in which the variants take turns on the same batch and on the same model, that trained by
                    original/full; mean over seeds. On a GPU the clock is read after synchronizing; on one CPU thread it
                    is the processor's, which leaves out other programs.
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
                    in a normalization, so that it is near the square root of the size of the state whatever J is

Run folders lie beside FILE, and an interrupted training continues. CIFAR-10 is the recipe `mdeq-cifar10-tiny`.
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.backward_cost.report import table
from equipoise import zoo
from equipoise.data import Digits, FashionMNIST, Split
from equipoise.train import Adam, Objective, Pretraining, TrainConfig, fit
from equipoise.train.device import to_device
from equipoise.zoo import Classify, EquilibriumClassifier, MDEQConfig
from equipoise.zoo.files import load

FULL = 20  # steps of the reference
REFERENCE = "original/full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(eq.Gradient):
    """The adjoint vector zero, as a start."""

    def cotangent(self, adjoint: Any, g: Tensor, solution: eq.Solution[Tensor]) -> Tensor:
        return torch.zeros_like(g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Training, and amount of measurements."""

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
        task=Classify(),
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


def batches(config: TrainConfig, split: Split, size: int, count: int, device: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training images, in an order that no training has."""
    for *_, batch in itertools.islice(harness.endless(split, size, -1), count):
        yield to_device(config, *batch, torch.device(device))


def probe(model: EquilibriumClassifier, config: TrainConfig, split: Split, count: int) -> dict[str, float]:
    """Spectral radius of the Jacobian at equilibria, and what was published in its place."""
    images, _ = to_device(config, *next(split.batches(count)), next(model.parameters()).device)
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
    objective = Objective(model, Classify()).train()
    with model.deq.using(solver=config.solver, gradient=dataclasses.replace(config.gradient, observe=masks.append)):
        for images, labels in batches(config, split, 32, count, next(model.parameters()).device):
            loss, _ = objective(images, labels, harness.TRAINED)
            loss.backward()
    return float(torch.cat(masks).double().mean())


def costs(setting: Setting, path: pathlib.Path, device: str) -> dict[str, dict[str, float]]:
    """Time, products and error of each variant's backward pass, on one model and in turn on the same batches."""
    config, chosen, model = setting.config, variants(setting), load(path, classes=(*zoo.CLASSES, Nothing)).to(device)
    objective = Objective(model, Classify()).train()
    inner = [*model.stem.parameters(), *model.deq.parameters()]
    wanted = [*inner, *model.head.parameters()]
    reports: list[eq.Solution] = []

    def run(solver: eq.Solver, gradient: eq.Gradient, images: Tensor, labels: Tensor) -> tuple[float, float, Tensor]:
        """Seconds of forward and backward pass, and the gradient of stem and cell."""
        if isinstance(gradient, eq.Implicit):
            gradient = dataclasses.replace(gradient, observe=reports.append)
        with model.deq.using(solver=solver, gradient=gradient):
            torch.manual_seed(0)  # dropout masks
            start = harness.clock(device)
            loss, _ = objective(images, labels, harness.TRAINED)
            middle = harness.clock(device)
            grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            end = harness.clock(device)
        return middle - start, end - middle, torch.cat([g.flatten() for g in grads[: len(inner)]])

    exact = eq.Implicit(solver=eq.Broyden(max_steps=300, memory=300, rtol=1e-5))
    forward, backward, cosines, products = ({name: [] for name in chosen} for _ in range(4))  # type: ignore[var-annotated]
    truth: dict[tuple[int, eq.Solver], Tensor] = {}
    worst = 0.0
    timed = batches(config, config.data.load().train, config.batch_size, setting.timed_batches + 1, device)
    for number, batch, name in harness.in_turn(chosen, timed):
        variant, compared = chosen[name], number < setting.cosine_batches
        key = number, variant.solver
        if compared and key not in truth:
            truth[key] = run(variant.solver, exact, *batch)[2]
            worst = max(worst, float(reports.pop().residual.max()))
        *seconds, grad = run(variant.solver, variant.gradient, *batch)
        products[name].append(reports.pop().num_vjps if reports else 0)
        if number:  # the first batch warms up
            forward[name].append(seconds[0])
            backward[name].append(seconds[1])
        if compared:
            cosines[name].append(float(torch.cosine_similarity(grad, truth[key], dim=0)))
    return {
        name: {
            "backward_ms": 1000 * statistics.median(backward[name]),
            "backward_ratio": harness.median_ratio(backward[name], backward[REFERENCE]),
            "forward_ms": 1000 * statistics.median(forward[name]),
            "vjps": statistics.fmean(products[name]),
            "cosine": statistics.fmean(cosines[name]),
            "exact_residual": worst,
        }
        for name in chosen
    }


def summary(content: dict[str, Any]) -> tuple[harness.Means, harness.Means]:
    """Means over the seeds that are done, as `<data>/<variant>/<k>/<figure>`, and their standard deviations."""
    runs, costs = content.get("runs", {}), content.get("costs", {})
    data = "digits" if content["settings"]["quick"] else content["settings"]["data"]
    means, spreads = harness.summarize(
        {f"{data}/{name}": [*runs.get(name, {}).values(), *(found[name] for found in costs.values() if name in found)]
         for name in {**runs, **next(iter(costs.values()), {})}}
    )  # fmt: skip
    seeds = {f"{name.rpartition('/')[0]}/seeds": 0 for name in means}
    return {**means, **seeds, **{f"{data}/{name}/seeds": len(found) for name, found in runs.items()}}, spreads


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="digits, four steps, one seed: seconds",
        seeds=3,
        options={"--data": {"choices": ("fashion-mnist", "cifar10"), "default": "fashion-mnist"}, **harness.DEVICE},
        summary=summary,
    )
    args = record.args
    setting = quick() if args.quick else {"fashion-mnist": fashion_mnist, "cifar10": cifar10}[args.data]()
    setting = dataclasses.replace(setting, config=dataclasses.replace(setting.config, accelerator=args.device))
    for name, variant in variants(setting).items():  # all seeds of one before the next: equal weight of means
        for seed in range(args.seeds) if variant.trained else ():
            folder = record.folder / name.replace("/", "-") / str(seed)
            folder.parent.mkdir(parents=True, exist_ok=True)
            record.measure(functools.partial(train, setting, variant, seed, folder), "runs", name, seed)
            if name == REFERENCE:
                model = folder / "model.safetensors"
                record.measure(functools.partial(costs, setting, model, args.device), "costs", seed)
    record.finish(table)
