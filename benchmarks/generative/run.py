"""A decoder trained by optimizing latents (JIIO) beside a VAE, and its use on images that are blurred or too small.

    python -m benchmarks generative [--quick] [--seeds N] [--pictures FOLDER]

Claim of the paper (Gurumurthy, Bai, Manchester and Kolter 2021): the decoder reconstructs better than a VAE.
Evidence: `results/2026-11-26.json`: Fashion-MNIST, 3 seeds, one thread of x86-64, torch 2.13.0: half the error, half
the distance of samples.

The recipe `jiio-generative` on Fashion-MNIST, one thread. The VAE has the same decoder, an encoder besides, and as many
seconds; its divergence is annealed as by the authors of joint inference and input optimization (JIIO). Test images are
read once, at the end.

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
                              each of the two, with the model of seed 0. `input`: the observation, enlarged by bicubic
                              interpolation
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from skimage.metrics import structural_similarity
from sklearn.mixture import GaussianMixture
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.generative.report import draw, table
from benchmarks.generative.rivals import VAE, adam, frechet, images_of, train_features, train_vae
from equipoise import zoo
from equipoise.data import Digits, derive_seed
from equipoise.solvers import Anderson
from equipoise.train import StepInfo, TrainConfig
from equipoise.zoo import (
    EXPLAIN,
    Blur,
    Corruption,
    Downsample,
    LatentDecoder,
    ObservationCost,
    Reconstruct,
    explain,
    psnr,
)

CORRUPTIONS: dict[str, Corruption] = {"deblur": Blur(sigma=1.5), "superres": Downsample(factor=4)}
PLAIN = Anderson(max_steps=40, rtol=1e-4)
RATES = {"jiio": (0.0125, 0.05, 0.2, 0.8), "adam": (0.1, 0.3, 1.0)}
WEIGHTS = (0.0, 0.01, 0.1, 0.3)
Settings = dict[str, tuple[float, float]]  # rate and weight by task and method
SIZES = {"test": 2000, "latents": 4000, "components": 10, "degraded": 48, "tuned": 24, "classifier": 600, "trials": 99}
QUICK = {"test": 100, "latents": 100, "components": 2, "degraded": 4, "tuned": 4, "classifier": 5, "trials": 2}


def train(config: TrainConfig, split: Any, seed: int) -> tuple[LatentDecoder, float]:
    """The decoder of the recipe and the seconds of its training."""
    torch.manual_seed(derive_seed(seed))
    model, start, steps = config.build(), harness.clock(), config.stop_after or 0
    objective = config.objective(model).train()
    losses = (
        objective(images, images.new_zeros(len(images)), StepInfo(step, 0, seed))[0]
        for step, images in enumerate(itertools.islice(images_of(split, config.batch_size, seed), steps))
    )
    rate = functools.partial(config.schedule.lr, total=steps, peak=config.optimizer.lr)
    harness.descend(config.optimizer.build(model.parameters()), losses, rate)
    return model.eval().requires_grad_(False), harness.clock() - start


def explained(model: LatentDecoder, images: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Latents of images, and the images of the joint iterates."""
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
    cost, norm, mask = ObservationCost(model, corruption), Norm(weight), torch.ones_like(observed)
    latents = model.latents(len(observed), side, side)
    return adam(model, latents, (), lambda z, x: cost(z, x, observed, mask) + norm(x), rate=rate, solver=PLAIN)


METHODS: dict[str, Callable[..., Any]] = {"jiio": by_jiio, "adam": by_adam}


def ssim(found: Tensor, truth: Tensor) -> float:
    """Mean over the images of the structural similarity."""
    pairs = zip(found.clamp(0, 1)[:, 0].numpy(), truth[:, 0].numpy(), strict=True)
    return statistics.fmean(structural_similarity(a, b, data_range=1.0) for a, b in pairs)


@torch.no_grad()
def decode(model: LatentDecoder, x: Tensor) -> Tensor:
    with model.deq.using(solver=PLAIN):
        images: Tensor = model(x)
    return images


class Bench:
    """Recipe, images and extent of a run, and the classifier whose features measure distances."""

    def __init__(self, quick: bool) -> None:
        config: Any = zoo.jiio_generative()
        size = QUICK if quick else SIZES
        if quick:
            data = Digits(validation_fraction=0.1, mean=(0.0,), std=(1.0,))
            model = dataclasses.replace(config.model, image_size=8, latent_size=4, width=16)
            config = dataclasses.replace(config, data=data, model=model, stop_after=6)
        self.config, self.size, splits = config, size, config.data.load()
        self.training, self.features = splits.train, train_features(splits.train, size["classifier"])
        test, training = (next(s.batches(10_000))[0].float() / 255 for s in (splits.test, splits.train))
        assert splits.validation is not None
        self.validation = next(splits.validation.batches(size["tuned"]))[0].float() / 255
        self.images = test[: size["test"]], test[-2 * size["test"] :], training[: size["latents"]]

    def measure(self, seed: int, settings: Settings, pictures: pathlib.Path | None) -> dict[str, Any]:
        """Figures of one seed; its pictures are drawn if a folder for them is given."""
        model, seconds = train(self.config, self.training, seed)
        rival = functools.partial(train_vae, self.config.model, self.training, seed=seed, seconds=seconds, lr=1e-3)
        vae, auto = rival(kl=1.0), rival(kl=0.0) if seed == 0 else None
        found, images = self.generative(model, vae, auto)
        solved, degraded = self.inverse(model, settings)
        if pictures is not None:
            draw(images | degraded, pictures)
        count = {f"{n}/parameters": sum(p.numel() for p in m.parameters()) for n, m in (("jiio", model), ("vae", vae))}
        return {"jiio/train_seconds": seconds, **count, **found, **solved}

    @torch.no_grad()
    def generative(self, model: LatentDecoder, vae: VAE, auto: VAE | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Errors and distances, and pictures of both kinds."""
        config, (test, real, training) = self.config, self.images
        figures: dict[str, Any] = {}
        with model.deq.using(solver=PLAIN), vae.decoder.deq.using(solver=PLAIN):
            latents, joint = explained(model, test, config)
            shown = {"jiio": model(latents), "vae": vae(test)}
            shown["vae-jiio"] = vae.decoder(explained(vae.decoder, test, config)[0])
            if auto is not None:
                shown["autoencoder"] = auto(test)
            for name, images in shown.items():
                figures[f"{name}/mse"] = float((images - test).square().mean())
                figures[f"{name}/frechet_reconstructions"] = frechet(self.features, images, real)
            figures["jiio/joint_mse"] = float((joint - test).square().mean())
            codes = explained(model, training, config)[0], vae.encode(training)[0]
            drawn = [mixture_samples(x, len(test), self.size["components"]) for x in codes]
            generator = torch.Generator().manual_seed(0)
            samples = {
                "jiio": model(drawn[0]),
                "vae": vae.decoder(drawn[1]),
                "vae-prior": vae.decoder(torch.randn(drawn[0].shape, generator=generator)),
            }
            for name, images in samples.items():
                figures[f"{name}/frechet_samples"] = frechet(self.features, images, real)
            figures["test-images/frechet_samples"] = frechet(self.features, test, real)
        return figures, {"truth": test, **shown, **{f"{name} samples": t for name, t in samples.items()}}

    def inverse(self, model: LatentDecoder, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
        """PSNR and SSIM of both tasks, and pictures; settings that are not given are chosen on validation images."""
        figures: dict[str, Any] = {}
        pictures: dict[str, Any] = {}
        tuning, test = self.validation, self.images[0][: self.size["degraded"]]
        side = test.shape[2]
        for task, corruption in CORRUPTIONS.items():
            seen, observed = corruption.observe(tuning)[0], corruption.observe(test)[0]
            enlarged = torch.nn.functional.interpolate(observed, size=(side, side), mode="bicubic", align_corners=False)
            figures[f"{task}/input/psnr"] = float(psnr(enlarged, test).mean())
            figures[f"{task}/input/ssim"] = ssim(enlarged, test)
            pictures |= {f"{task} truth": test, f"{task} input": enlarged}
            for name, method in METHODS.items():
                if f"{task}/{name}" not in settings:
                    scores = {}
                    for setting in itertools.islice(itertools.product(RATES[name], WEIGHTS), self.size["trials"]):
                        found = decode(model, method(model, seen, corruption, *setting, side)[0])
                        scores[setting] = float(psnr(found, tuning).mean())
                    settings[f"{task}/{name}"] = max(scores, key=scores.__getitem__)
                best = settings[f"{task}/{name}"]
                start = harness.clock()
                x, evals, vjps = method(model, observed, corruption, *best, side)
                seconds = harness.clock() - start
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


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="digits, six steps, one seed",
        seeds=3,
        options={"--pictures": {"type": pathlib.Path, "metavar": "FOLDER", "help": "folder for image grids of seed 0"}},
        free=["pictures"],
        packages=["scikit-image"],
        summary=harness.over_seeds,
    )
    bench = Bench(record.args.quick)
    for seed in range(record.args.seeds):
        first = record.find("runs", 0) or {}
        settings = {key.removesuffix("/setting"): value for key, value in first.items() if key.endswith("/setting")}
        pictures = None if seed else record.args.pictures
        record.measure(functools.partial(bench.measure, seed, settings, pictures), "runs", seed)
    record.finish(table)
