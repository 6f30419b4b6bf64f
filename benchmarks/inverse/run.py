"""Denoising and inpainting by a decoder whose latents are optimized, beside methods without training.

    python -m benchmarks inverse [--quick] [--data fashion-mnist|photographs] [--seeds N] [--images N]
        [--first-order] [--pictures PNG]

Claim of the paper (Gurumurthy, Bai, Manchester and Kolter 2021): one decoder denoises and inpaints.
Evidence: `results/2026-11-26.json` (Fashion-MNIST, 3 seeds, `first-order` with one) and
`results/2026-11-26-photographs.json` (1 seed); 300 test images, one thread of x86-64, torch 2.13.0. It beats total
variation by 2 dB; on photographs biharmonic inpainting is better by 4 dB.

One `EquilibriumPrior` is trained for Gaussian noise of 0.1 and 0.2 and for a missing square of 9x9 pixels, by the
recipe `jiio-inverse` (pixels in [0, 1]; the paper's 0.2 and 0.4 are of pixels in [-1, 1]). On test images that were
never used before, it is compared with

    guess        the same model with latents of zero
    tv           total variation (scikit-image, Chambolle), its weight chosen on 60 validation images, for noise
    biharmonic   biharmonic inpainting (scikit-image), for the hole
    adam         Adam on the same latents of the same model: 50 steps, each with a cold solve of state and adjoint,
                 its rate chosen on validation images; on the first images alone, as it takes so long
    joint-few    ours on those images alone
    first-order  the same training with the gradient that holds latents constant (`FirstOrder`), as many steps

Keys `<task>/<method>/<psnr|ssim|median>`: means over images of each image's value, data range 1, of answers that are
clipped to it, and the median of PSNR; in the answers for the hole, observed pixels are kept. A PSNR counts as 60 dB
at most: a hole within a black ground is filled without error, and its PSNR is infinite. Means over seeds; standard
deviations under `spread`.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.generative.rivals import adam as adam_on_latents
from benchmarks.inverse.report import TASKS, draw, table
from equipoise import zoo
from equipoise.data import FashionMNIST, ImageData, Photographs, Splits, TensorSplit, generator
from equipoise.inputs import FirstOrder
from equipoise.train import TrainConfig, fit
from equipoise.zoo import Hole, ObservationCost, Reconstruct, explain
from equipoise.zoo.files import load
from equipoise.zoo.generative.task import LatentPenalty

TV_WEIGHTS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.14, 0.17, 0.2)
ADAM_RATES = (0.01, 0.03, 0.1)
HIGHEST = 60.0  # dB
COLD = eq.Anderson(max_steps=20, rtol=1e-3)
PRETRAINED = 0.925  # share of the steps with latents of zero, as in the recipe
DRAWS = {"validation": 1, "test": 2}  # seeds of the observations


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTests(ImageData):
    """Data whose test split is cut short, as the loop measures all of it."""

    of: ImageData
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.of.shape

    def load(self) -> Splits:
        splits = self.of.load()
        images, labels = next(splits.test.batches(len(splits.test)))
        return Splits(splits.train, None, TensorSplit(images[:12], labels[:12]), splits.classes)


def data_of(name: str) -> ImageData:
    if name == "photographs":
        return Photographs(validation_fraction=0.05)
    return FashionMNIST(validation_fraction=0.005, mean=(0.0,), std=(1.0,))


def config_of(data: ImageData, seed: int, steps: int, *, first_order: bool = False) -> TrainConfig:
    config: Any = zoo.jiio_inverse()
    if first_order:
        assert isinstance(config.gradient, eq.Implicit)
        config = dataclasses.replace(config, gradient=FirstOrder(solver=config.gradient.solver))
    return dataclasses.replace(
        config,
        data=FewTests(of=data, flip=True),
        model=dataclasses.replace(config.model, image_size=data.shape[1]),
        seed=seed,
        stop_after=steps,
        task=dataclasses.replace(
            config.task,
            pretraining=dataclasses.replace(config.task.pretraining, steps=round(PRETRAINED * steps)),
        ),
        epochs=100,
        tensorboard=False,
        accelerator="cpu",
    )


def task_of(config: TrainConfig) -> Reconstruct:
    assert isinstance(config.task, Reconstruct)
    return config.task


def trained(config: TrainConfig, folder: pathlib.Path) -> Any:
    """Model of a run; a finished one is loaded from its folder."""
    file = folder / "model.safetensors"
    return load(file) if file.exists() else fit(config, run_dir=folder, overwrite=True).model


def pictures_of(split: Any, count: int, seed: int) -> Tensor:
    """Random images of a split, float `(N, 1, H, W)` in [0, 1]."""
    images, _ = next(split.batches(len(split)))
    chosen = torch.randperm(len(images), generator=generator(seed))[:count]
    return images[chosen].float() / 255


def observed(config: TrainConfig, images: Tensor, task: int, draw: str) -> tuple[Tensor, Tensor]:
    seen: tuple[Tensor, Tensor] = task_of(config).corruptions[task].observe(images, generator(DRAWS[draw], task))
    return seen


def finished(answer: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    """Answer, clipped; pixels that were observed without noise are kept."""
    return torch.where(mask > 0, seen, answer).clamp(0, 1) if bool((mask == 0).any()) else answer.clamp(0, 1)


def scores(answer: Tensor, images: Tensor) -> dict[str, float]:
    """Means of PSNR and SSIM of each answer; there may be more images."""
    pairs = [(a[0].double().numpy(), b[0].double().numpy()) for a, b in zip(answer.detach(), images, strict=False)]
    with np.errstate(divide="ignore"):
        ratios = [min(HIGHEST, peak_signal_noise_ratio(b, a, data_range=1)) for a, b in pairs]
    return {
        "psnr": float(np.mean(ratios)),
        "median": float(np.median(ratios)),
        "ssim": float(np.mean([structural_similarity(b, a, data_range=1) for a, b in pairs])),
    }


@torch.no_grad()
def joint(model: Any, config: TrainConfig, seen: Tensor, mask: Tensor, task: int) -> Tensor:
    """Answer by joint inference and input optimization."""
    answers = []
    for y, m in zip(seen.split(50), mask.split(50), strict=True):
        solution = explain(
            model,
            y,
            m,
            size=(y.shape[2], y.shape[3]),
            kinds=torch.full((len(y),), task),
            optimizer=task_of(config).input_optimizer(config.eval_solver or config.solver),
        )
        answers.append(finished(model.decode(solution.value[0]), y, m))
    return torch.cat(answers)


@torch.no_grad()
def guess(model: Any, seen: Tensor, mask: Tensor) -> Tensor:
    """Answer at latents of zero."""
    x = model.latents(len(seen), seen.shape[2], seen.shape[3])
    with model.deq.using(solver=COLD):
        return finished(model(x, seen, mask), seen, mask)


def adam(model: Any, seen: Tensor, mask: Tensor, task: int, rate: float, steps: int) -> Tensor:
    """Answer by Adam on the latents."""
    kinds = torch.full((len(seen),), task)
    with torch.no_grad():
        context = model.context(seen, mask)
    error, penalty = ObservationCost(model), LatentPenalty(model)
    x, _, _ = adam_on_latents(
        model,
        model.latents(len(seen), seen.shape[2], seen.shape[3]),
        context,
        lambda z, x: error(z, x, seen, mask, kinds) + penalty(x),
        rate=rate,
        solver=COLD,
        steps=steps,
    )
    with torch.no_grad(), model.deq.using(solver=COLD):
        return finished(model.decode(model.deq(x, *context)), seen, mask)


def tv(seen: Tensor, weight: float) -> Tensor:
    return torch.stack([torch.from_numpy(denoise_tv_chambolle(y[0].numpy(), weight=weight)) for y in seen])[:, None]


def biharmonic(seen: Tensor, mask: Tensor) -> Tensor:
    filled = [inpaint_biharmonic(y[0].numpy(), m[0].numpy() == 0) for y, m in zip(seen, mask, strict=True)]
    return torch.from_numpy(np.stack(filled)).to(seen)[:, None]


def classical(config: TrainConfig, images: dict[str, Tensor], task: int) -> tuple[str, Tensor, Any]:
    """Name, answers on the test images, and the setting chosen on validation images."""
    seen, mask = observed(config, images["test"], task, "test")
    if isinstance(task_of(config).corruptions[task], Hole):
        return "biharmonic", finished(biharmonic(seen, mask), seen, mask), None
    known, _ = observed(config, images["validation"], task, "validation")
    best = max(TV_WEIGHTS, key=lambda w: scores(tv(known, w).clamp(0, 1), images["validation"])["psnr"])
    return "tv", tv(seen, best).clamp(0, 1), best


class Bench:
    """Images and extent of a run.

    Args:
        args: of the command line.
        folder: of the trainings.
    """

    def __init__(self, args: argparse.Namespace, folder: pathlib.Path) -> None:
        self.args, self.folder, self.data = args, folder, data_of(args.data)
        splits = self.data.load()
        self.images = {
            "validation": pictures_of(splits.validation, 6 if args.quick else 60, 1),
            "test": pictures_of(splits.test, 6 if args.quick else args.images, 2),
        }
        self.few: int = 2 if args.quick else args.adam_images
        self.steps: int = 2 if args.quick else args.steps
        self.adam_steps = 2 if args.quick else 50

    def measure(self, seed: int) -> dict[str, Any]:
        """Scores of one seed; rivals are measured, and pictures are drawn, with seed 0."""
        config, start, few = config_of(self.data, seed, self.steps), harness.clock(), self.few
        model = trained(config, self.folder / f"run-{seed}")
        found: dict[str, Any] = {"train_cpu_seconds": harness.clock() - start}
        shown: dict[str, Tensor] = {"clean": self.images["test"][:6]}
        other = None
        if self.args.first_order and not seed:
            other = trained(config_of(self.data, seed, self.steps, first_order=True), self.folder / "first-order")
        for number, task in enumerate(TASKS):
            seen, mask = observed(config, self.images["test"], number, "test")
            answers = {"joint": joint(model, config, seen, mask, number), "guess": guess(model, seen, mask)}
            if other is not None:
                answers["first-order"] = joint(other, config, seen, mask, number)
            if not seed:
                name, rival, found[f"{task}/tv_weight"] = classical(config, self.images, number)
                rate = found[f"{task}/adam_rate"] = self.best_rate(model, config, number)
                answers |= {name: rival, "adam": adam(model, seen[:few], mask[:few], number, rate, self.adam_steps)}
                answers["joint-few"] = answers["joint"][:few]
                shown |= {f"{task}/seen": seen[:6], f"{task}/{name}": rival[:6], f"{task}/joint": answers["joint"][:6]}
            for method, answer in answers.items():
                found |= {f"{task}/{method}/{k}": value for k, value in scores(answer, self.images["test"]).items()}
        if self.args.pictures and not seed:
            draw(shown).savefig(self.args.pictures)
        return found

    def best_rate(self, model: Any, config: TrainConfig, number: int) -> float:
        """Rate of Adam that is best on validation images."""
        images = self.images["validation"]
        seen, mask = (tensor[: self.few] for tensor in observed(config, images, number, "validation"))
        rates = ADAM_RATES[-2:] if self.args.quick else ADAM_RATES
        return max(
            rates, key=lambda rate: scores(adam(model, seen, mask, number, rate, self.adam_steps), images)["psnr"]
        )


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(
        __name__,
        argv,
        quick="two steps of training, six images",
        seeds=1,
        options={
            "--data": {"choices": ["fashion-mnist", "photographs"], "default": "fashion-mnist"},
            "--steps": {"type": int, "default": 4_000, "help": "of the training [4000]"},
            "--images": {"type": int, "default": 300, "help": "test images [300]"},
            "--adam-images": {"type": int, "default": 12, "help": "test and validation images for Adam [12]"},
            "--first-order": {"action": "store_true", "help": "train once more with FirstOrder"},
            "--pictures": {"type": pathlib.Path, "metavar": "PNG", "help": "picture of answers, of seed 0"},
        },
        free=["pictures"],
        packages=["scikit-image"],
        summary=harness.over_seeds,
    )
    bench = Bench(record.args, record.folder)
    for seed in range(record.args.seeds):
        record.measure(functools.partial(bench.measure, seed), "runs", seed)
    record.finish(table)
