"""A decoder trained by optimizing latents (JIIO) beside a VAE, and its use on images that are blurred or too small.

    python -m benchmarks.generative.run [--quick] [--seeds N] [--pictures FOLDER] --json FILE

The recipe `jiio-generative` on Fashion-MNIST, one thread. The VAE has the same decoder, an encoder besides, and as many
seconds; its divergence is annealed as by the authors of JIIO. Test images are read once, at the end.

    <method>/mse              error of a pixel in [0, 1]: for `jiio` of the equilibrium that is solved for once more at
                              the latents (`joint_mse`: of the joint iterate), for `vae` at the mean of the encoder;
                              `vae-jiio`: the decoder of the VAE at optimized latents, `autoencoder`: of seed 0, the
                              VAE without its divergence
    <method>/frechet_reconstructions, frechet_samples
                              squared distance of Gaussians on features of a classifier trained here, 64 of them, from
                              test images; samples from a Gaussian mixture fitted to latents of training images, for
                              `vae-prior` from the normal distribution
    <task>/<method>/psnr, ssim, evals, vjps, seconds
                              means over test images; evaluations and products for a batch. Latents are optimized by
                              `jiio`, or by `adam`: 50 steps, each a solve from zeros and a full adjoint solve. Step
                              size or learning rate, and the weight of |x|^2, are chosen on validation images for
                              each of the two, with the model of seed 0. `input`: what was observed, enlarged by
                              bicubic interpolation
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from skimage.metrics import structural_similarity
from sklearn.mixture import GaussianMixture
from torch import Tensor

import equipoise as eq
from benchmarks.generative.rivals import VAE, batches, frechet, train_features, train_vae
from equipoise import zoo
from equipoise.data import Digits, derive_seed
from equipoise.files import write_atomic
from equipoise.solvers import Anderson
from equipoise.train import StepInfo, TrainConfig
from equipoise.zoo import (
    EXPLAIN,
    Blur,
    Corruption,
    DecoderConfig,
    Downsample,
    LatentDecoder,
    ObservationCost,
    Reconstruct,
    explain,
    psnr,
)

TASKS: dict[str, Corruption] = {"deblur": Blur(sigma=1.5), "superres": Downsample(factor=4)}
ADAM_STEPS = 50
PLAIN = Anderson(max_steps=40, rtol=1e-4)
RATES = {"jiio": (0.0125, 0.05, 0.2, 0.8), "adam": (0.1, 0.3, 1.0)}
WEIGHTS = (0.0, 0.01, 0.1, 0.3)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is done."""

    config: TrainConfig
    test: int = 2000
    latents: int = 4000
    components: int = 10
    degraded: int = 48
    tuned: int = 24
    classifier: int = 600

    @property
    def model(self) -> DecoderConfig:
        assert isinstance(self.config.model, DecoderConfig)
        return self.config.model


def sizes(quick: bool) -> Sizes:
    config = zoo.jiio_generative()
    if not quick:
        return Sizes(config)
    model = dataclasses.replace(Sizes(config).model, image_size=8, latent_size=4, width=16)
    config = dataclasses.replace(config, data=Digits(validation_fraction=0.1, mean=(0.0,), std=(1.0,)), model=model)
    config = dataclasses.replace(config, stop_after=6)
    return Sizes(config, test=100, latents=100, components=2, degraded=4, tuned=4, classifier=5)


def train(config: TrainConfig, split: Any, seed: int) -> tuple[LatentDecoder, float]:
    """The decoder of the recipe and the seconds of its training."""
    torch.manual_seed(derive_seed(seed))
    model, start = config.build(), time.process_time()
    objective, optimizer = config.objective(model).train(), config.optimizer.build(model.parameters())
    steps = config.stop_after or 0
    for step, images in enumerate(itertools.islice(batches(split, config.batch_size, seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = config.schedule.lr(step, steps, config.optimizer.lr)
        optimizer.zero_grad()
        objective(images, images.new_zeros(len(images)), StepInfo(step, 0, seed))[0].backward()
        optimizer.step()
    return model.eval().requires_grad_(False), time.process_time() - start


def explained(model: LatentDecoder, images: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Latents of images, and what the joint iterate shows."""
    parts, task = [], config.task
    assert isinstance(task, Reconstruct)
    for part in images.split(500):
        solution = explain(
            *(model, part, torch.ones_like(part)),
            size=(part.shape[2], part.shape[3]),
            optimizer=task.input_optimizer(config.eval_solver or config.solver),
        )
        parts.append((solution.value[2].detach(), model.decode(solution.value[0]).detach()))
    return torch.cat([x for x, _ in parts]), torch.cat([shown for _, shown in parts])


def mixture_samples(latents: Tensor, count: int, components: int) -> Tensor:
    """Draws from a Gaussian mixture with full covariances, in random order."""
    mixture = GaussianMixture(components, covariance_type="full", reg_covar=1e-4, random_state=0)
    drawn = torch.from_numpy(mixture.fit(latents.double().numpy()).sample(count)[0]).float()
    return drawn[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def generative(model: LatentDecoder, vae: VAE, auto: VAE | None, data: Any, size: Sizes) -> tuple[dict[str, Any], Any]:
    """Errors and distances, and pictures of both kinds."""
    config = size.config
    test, real, training, features = data
    figures: dict[str, Any] = {}
    with model.deq.using(solver=PLAIN), vae.decoder.deq.using(solver=PLAIN):
        latents, joint = explained(model, test, config)
        shown = {"jiio": model(latents), "vae": vae(test)}
        shown["vae-jiio"] = vae.decoder(explained(vae.decoder, test, config)[0])
        if auto is not None:
            shown["autoencoder"] = auto(test)
        for name, images in shown.items():
            figures[f"{name}/mse"] = float((images - test).square().mean())
            figures[f"{name}/frechet_reconstructions"] = frechet(features, images, real)
        figures["jiio/joint_mse"] = float((joint - test).square().mean())
        codes = explained(model, training, config)[0], vae.encode(training)[0]
        drawn = [mixture_samples(x, len(test), size.components) for x in codes]
        generator = torch.Generator().manual_seed(0)
        samples = {
            "jiio": model(drawn[0]),
            "vae": vae.decoder(drawn[1]),
            "vae-prior": vae.decoder(torch.randn(drawn[0].shape, generator=generator)),
        }
        for name, images in samples.items():
            figures[f"{name}/frechet_samples"] = frechet(features, images, real)
        figures["test-images/frechet_samples"] = frechet(features, test, real)
    return figures, {"truth": test, **shown, **{f"{name} samples": t for name, t in samples.items()}}


class Norm(torch.nn.Module):
    """A weight times the squared norm of the latents."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.square().sum(1)


def by_jiio(model: Any, observed: Tensor, corruption: Corruption, rate: float, weight: float, side: int) -> Any:
    solution = explain(
        *(model, observed, torch.ones_like(observed)),
        size=(side, side),
        corruption=corruption,
        regularizer=Norm(weight),
        optimizer=dataclasses.replace(
            EXPLAIN,
            solver=Anderson(memory=8, max_steps=60, rtol=1e-3, ridge=1e-3),
            scheme=eq.inputs.Nested(steps=3),
            step_size=rate * (16 if isinstance(corruption, Downsample) else 1),  # the cost has so many terms fewer
        ),
    )
    return solution.value[2].detach(), solution.num_evals, solution.num_vjps


def by_adam(model: Any, observed: Tensor, corruption: Corruption, rate: float, weight: float, side: int) -> Any:
    x = model.latents(len(observed), side, side).requires_grad_()
    optimizer, cost, norm = torch.optim.Adam([x], lr=rate), ObservationCost(model, corruption), Norm(weight)
    evals, vjps = 0, 0
    adjoint = eq.Implicit(solver=PLAIN)
    with model.deq.using(solver=PLAIN, gradient=adjoint):
        for _ in range(ADAM_STEPS):
            solution = model.deq.solve(x)
            loss = cost(solution.value, x, observed, torch.ones_like(observed)).sum() + norm(x).sum()
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            evals, vjps = evals + solution.map.counts.evals, vjps + solution.map.counts.vjps
    return x.detach(), evals, vjps


METHODS: dict[str, Callable[..., Any]] = {"jiio": by_jiio, "adam": by_adam}


def ssim(found: Tensor, truth: Tensor) -> float:
    """Mean over the images of the structural similarity."""
    pairs = zip(found.clamp(0, 1)[:, 0].numpy(), truth[:, 0].numpy(), strict=True)
    return statistics.fmean(structural_similarity(a, b, data_range=1.0) for a, b in pairs)


def inverse(
    model: LatentDecoder, tuning: Tensor, test: Tensor, settings: dict[str, tuple[float, float]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """PSNR and SSIM of both tasks, and pictures; settings that are not given are chosen on images for tuning."""
    figures: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    side = test.shape[2]
    for task, corruption in TASKS.items():
        seen, observed = corruption.observe(tuning)[0], corruption.observe(test)[0]
        enlarged = torch.nn.functional.interpolate(observed, size=(side, side), mode="bicubic", align_corners=False)
        figures[f"{task}/input/psnr"] = float(psnr(enlarged, test).mean())
        figures[f"{task}/input/ssim"] = ssim(enlarged, test)
        pictures |= {f"{task} truth": test, f"{task} input": enlarged}
        for name, method in METHODS.items():
            if f"{task}/{name}" not in settings:
                scores = {}
                for setting in itertools.product(RATES[name], WEIGHTS):
                    found = decode(model, method(model, seen, corruption, *setting, side)[0])
                    scores[setting] = float(psnr(found, tuning).mean())
                settings[f"{task}/{name}"] = max(scores, key=scores.__getitem__)
            best = settings[f"{task}/{name}"]
            start = time.process_time()
            x, evals, vjps = method(model, observed, corruption, *best, side)
            seconds = time.process_time() - start
            found = decode(model, x)
            figures |= {
                f"{task}/{name}/psnr": float(psnr(found, test).mean()),
                f"{task}/{name}/ssim": ssim(found, test),
                f"{task}/{name}/evals": evals,
                f"{task}/{name}/vjps": vjps,
                f"{task}/{name}/seconds": seconds,
                f"{task}/{name}/setting": best,
            }
            pictures[f"{task} {name}"] = found
    return figures, pictures


@torch.no_grad()
def decode(model: LatentDecoder, x: Tensor) -> Tensor:
    with model.deq.using(solver=PLAIN):
        images: Tensor = model(x)
    return images


def grid(rows: list[Tensor], path: pathlib.Path, scale: int = 3) -> None:
    """Rows of images, light marks on dark ground, as a PNG file."""
    lines = [torch.cat([framed(image) for image in row[:, 0].clamp(0, 1)], dim=1) for row in rows]
    pixels = (torch.cat(lines, dim=0) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def framed(image: Tensor) -> Tensor:
    return torch.nn.functional.pad(image, (1, 1, 1, 1), value=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, six steps, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for image grids of seed 0")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, runs = sizes(args.quick), []
    config, splits = size.config, size.config.data.load()
    every, training = (next(s.batches(10_000))[0].float() / 255 for s in (splits.test, splits.train))
    assert splits.validation is not None
    validation = next(splits.validation.batches(size.tuned))[0].float() / 255
    features = train_features(splits.train, size.classifier)
    data = every[: size.test], every[-2 * size.test :], training[: size.latents], features
    settings: dict[str, tuple[float, float]] = {}
    for seed in range(1 if args.quick else args.seeds):
        model, seconds = train(config, splits.train, seed)
        rival = functools.partial(train_vae, size.model, splits.train, seed=seed, seconds=seconds, lr=1e-3)
        vae, auto = rival(kl=1.0), rival(kl=0.0) if seed == 0 else None
        found, pictures = generative(model, vae, auto, data, size)
        solved, degraded = inverse(model, validation, every[: size.degraded], settings)
        count = {f"{n}/parameters": sum(p.numel() for p in m.parameters()) for n, m in (("jiio", model), ("vae", vae))}
        runs.append({"jiio/train_seconds": seconds, **count, **found, **solved})
        print(f"{time.strftime('%H:%M:%S')} seed {seed}: {json.dumps(runs[-1])}", flush=True)
        if seed == 0 and args.pictures:
            draw(pictures | degraded, args.pictures)
        report(runs, args.json)


def draw(pictures: dict[str, Tensor], folder: pathlib.Path) -> None:
    """Image grids: reconstructions, samples, and both tasks."""
    names = {"reconstructions": ("truth", "jiio", "vae"), "samples": ("jiio samples", "vae samples")}
    names |= {task: tuple(f"{task} {kind}" for kind in ("input", "adam", "jiio", "truth")) for task in TASKS}
    for name, kinds in names.items():
        rows = [pictures[kind][:12] for kind in kinds]
        if name == "samples":
            rows = [pictures[kind][first : first + 12] for kind in kinds for first in (0, 12)]
        grid(rows, folder / f"generative-{name}.png")


def report(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Write means and spreads, and show them."""
    numbers = sorted(key for key, value in runs[0].items() if isinstance(value, (int, float)))
    values = {key: [run[key] for run in runs if key in run] for key in numbers}
    means = {key: statistics.fmean(found) for key, found in values.items()}
    spread = {key: statistics.stdev(found) if len(found) > 1 else None for key, found in values.items()}
    versions = {"torch": torch.__version__, "equipoise": eq.__version__}
    content = {"date": time.strftime("%Y-%m-%d"), **versions, "figures": means, "spread": spread, "runs": runs}
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    lines = [f"| {key} | {means[key]:.4g} | {'' if spread[key] is None else f'{spread[key]:.2g}'} |" for key in numbers]
    path.with_suffix(".md").write_text("\n".join(["| figure | mean | spread |", "|---|---|---|", *lines]) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
