"""Denoising and inpainting by a decoder whose latents are optimized, beside what needs no training.

    python -m benchmarks.inverse.run [--quick] [--data fashion-mnist|photographs] [--seeds N] [--images N]
        [--first-order] --json FILE [--pictures PNG]

One `EquilibriumPrior` is trained for Gaussian noise of 0.1 and 0.2 and for a missing square of 9x9 pixels, by the
recipe `jiio-inverse` (pixels in [0, 1]; the paper's 0.2 and 0.4 are of pixels in [-1, 1]). On test images that were
never looked at it is compared with

    guess        the same model with latents of zero
    tv           total variation (scikit-image, Chambolle), its weight chosen on 60 validation images, for noise
    biharmonic   biharmonic inpainting (scikit-image), for the hole
    adam         Adam on the same latents of the same model: 50 steps, each with a cold solve of state and adjoint,
                 its rate chosen on validation images; on the first images alone, as it takes so long
    joint-few    ours on those images alone
    first-order  the same training with the gradient that holds latents constant (`FirstOrder`), as many steps

Keys `<task>/<method>/<psnr|ssim|median>`: means over images of each image's value, data range 1, of answers that are
clipped to it, and the median of PSNR; in the hole's answers the pixels that were seen are kept. A PSNR counts as 60 dB
at most: a hole within a black ground is filled without error, and its PSNR is infinite. Means over seeds; deviations
under `details`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic
from torch import Tensor

import equipoise as eq
from equipoise import zoo
from equipoise.data import FashionMNIST, ImageData, Photographs, Splits, TensorSplit, generator
from equipoise.inputs import FirstOrder
from equipoise.train import TrainConfig, fit
from equipoise.zoo import Hole, LatentPenalty, ObservationCost, Reconstruct, explain
from equipoise.zoo.files import load

TASKS = ("noise-0.1", "noise-0.2", "hole-9")
TV_WEIGHTS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.14, 0.17, 0.2)
ADAM_RATES = (0.01, 0.03, 0.1)
ADAM_STEPS = 50
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
        few = TensorSplit(images[:12], labels[:12])
        return Splits(splits.train, None, few, splits.classes)


def data_of(name: str) -> ImageData:
    if name == "photographs":
        return Photographs(validation_fraction=0.05)
    return FashionMNIST(validation_fraction=0.005, mean=(0.0,), std=(1.0,))


def config_of(data: ImageData, seed: int, steps: int, *, first_order: bool = False) -> TrainConfig:
    config = zoo.jiio_inverse()
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
    """The model of a run, which is not done again if its folder holds the end of it."""
    file = folder / "model.safetensors"
    return load(file) if file.exists() else fit(config, run_dir=folder, overwrite=True).model


def pictures_of(split: Any, count: int, seed: int) -> Tensor:
    """Some images of a split at random, float `(N, 1, H, W)` in [0, 1]."""
    images, _ = next(split.batches(len(split)))
    chosen = torch.randperm(len(images), generator=generator(seed))[:count]
    return images[chosen].float() / 255


def observed(config: TrainConfig, images: Tensor, task: int, draw: str) -> tuple[Tensor, Tensor]:
    seen: tuple[Tensor, Tensor] = task_of(config).corruptions[task].observe(images, generator(DRAWS[draw], task))
    return seen


def finished(answer: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    """What is compared: clipped, and what was seen without noise is kept."""
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
    """The answer of latents of zero."""
    x = model.latents(len(seen), seen.shape[2], seen.shape[3])
    with model.deq.using(solver=COLD):
        return finished(model(x, seen, mask), seen, mask)


def adam(model: Any, seen: Tensor, mask: Tensor, task: int, rate: float) -> Tensor:
    """Adam on the latents, each step with a cold solve of the state and one of its adjoint."""
    kinds = torch.full((len(seen),), task)
    x = model.latents(len(seen), seen.shape[2], seen.shape[3]).requires_grad_()
    with torch.no_grad():
        context = model.context(seen, mask)
    cost, penalty = ObservationCost(model), LatentPenalty(model)
    optimizer = torch.optim.Adam([x], lr=rate)
    with model.deq.using(solver=COLD, gradient=eq.Implicit(solver=COLD)):
        for _ in range(ADAM_STEPS):
            value = cost(model.deq(x, *context), x, seen, mask, kinds) + penalty(x)
            (x.grad,) = torch.autograd.grad(value.sum(), x)
            optimizer.step()
        with torch.no_grad():
            return finished(model.decode(model.deq(x, *context)), seen, mask)


def tv(seen: Tensor, weight: float) -> Tensor:
    return torch.stack([torch.from_numpy(denoise_tv_chambolle(y[0].numpy(), weight=weight)) for y in seen])[:, None]


def biharmonic(seen: Tensor, mask: Tensor) -> Tensor:
    filled = [inpaint_biharmonic(y[0].numpy(), m[0].numpy() == 0) for y, m in zip(seen, mask, strict=True)]
    return torch.from_numpy(np.stack(filled)).to(seen)[:, None]


def classical(config: TrainConfig, images: dict[str, Tensor], task: int) -> tuple[str, Tensor, Any]:
    """Name, answers on the test images, and the setting that validation images chose."""
    seen, mask = observed(config, images["test"], task, "test")
    if isinstance(task_of(config).corruptions[task], Hole):
        return "biharmonic", finished(biharmonic(seen, mask), seen, mask), None
    known, _ = observed(config, images["validation"], task, "validation")
    best = max(TV_WEIGHTS, key=lambda w: scores(tv(known, w).clamp(0, 1), images["validation"])["psnr"])
    return "tv", tv(seen, best).clamp(0, 1), best


def measure(options: argparse.Namespace, workplace: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    data = data_of(options.data)
    splits = data.load()
    count = 6 if options.quick else options.images
    few, steps = (2, 2) if options.quick else (options.adam_images, options.steps)
    images = {
        "validation": pictures_of(splits.validation, 6 if options.quick else 60, 1),
        "test": pictures_of(splits.test, count, 2),
    }
    found: dict[str, list[float]] = {}
    chosen: dict[str, Any] = {}
    shown: dict[str, Tensor] = {"clean": images["test"][:6]}

    def note(task: str, method: str, answer: Tensor) -> None:
        for name, value in scores(answer, images["test"]).items():
            found.setdefault(f"{task}/{method}/{name}", []).append(value)

    for seed in range(options.seeds):
        config = config_of(data, seed, steps)
        start = time.process_time()
        model = trained(config, workplace / f"run-{seed}")
        chosen[f"train_cpu_seconds/{seed}"] = time.process_time() - start
        other = None
        if options.first_order and seed == 0:
            plain = config_of(data, seed, steps, first_order=True)
            other = trained(plain, workplace / "first-order")
        for number, task in enumerate(TASKS):
            seen, mask = observed(config, images["test"], number, "test")
            answer = joint(model, config, seen, mask, number)
            note(task, "joint", answer)
            if other is not None:
                note(task, "first-order", joint(other, config, seen, mask, number))
            note(task, "guess", guess(model, seen, mask))
            if seed:
                continue
            name, rival, setting = classical(config, images, number)
            note(task, name, rival)
            known, hidden = observed(config, images["validation"], number, "validation")
            rate = max(
                ADAM_RATES[-2:] if options.quick else ADAM_RATES,
                key=lambda r: scores(adam(model, known[:few], hidden[:few], number, r), images["validation"])["psnr"],
            )
            note(task, "adam", adam(model, seen[:few], mask[:few], number, rate))
            note(task, "joint-few", answer[:few])
            chosen |= {f"{task}/tv_weight": setting, f"{task}/adam_rate": rate}
            shown |= {f"{task}/seen": seen[:6], f"{task}/{name}": rival[:6], f"{task}/joint": answer[:6]}
            print(task, {key: values[-1] for key, values in found.items() if key.startswith(task)}, flush=True)
    figures = {key: statistics.mean(values) for key, values in found.items()}
    details = {key: values for key, values in found.items() if len(values) > 1}
    return {
        "figures": figures,
        "details": details,
        "chosen": chosen,
        "settings": {"data": options.data, "seeds": options.seeds, "images": count, "adam_images": few, "steps": steps},
        "versions": {"equipoise": eq.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }, shown


def table(figures: dict[str, float]) -> str:
    methods = ("joint", "guess", "tv", "biharmonic", "joint-few", "adam", "first-order")
    lines = [f"| | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for task in TASKS:
        cells = []
        for method in methods:
            key = f"{task}/{method}/psnr"
            known = key in figures
            values = [figures[key[:-4] + name] for name in ("psnr", "median", "ssim")] if known else []
            cells.append("{:.2f} ({:.2f}) dB, {:.3f}".format(*values) if known else "")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(shown: dict[str, Tensor], path: pathlib.Path) -> None:
    """Before and after: a column of images for each task and method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(shown)
    count = len(shown["clean"])
    figure, axes = plt.subplots(count, len(keys), figsize=(1.05 * len(keys), 1.05 * count + 0.4), squeeze=False)
    for column, key in enumerate(keys):
        for row in range(count):
            axes[row, column].imshow(shown[key][row, 0], cmap="gray", vmin=0, vmax=1)
            axes[row, column].axis("off")
        axes[0, column].set_title(key.replace("/", "\n"), fontsize=8)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test: a few steps and images")
    parser.add_argument("--data", choices=["fashion-mnist", "photographs"], default="fashion-mnist")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4_000, help="of the training [4000]")
    parser.add_argument("--images", type=int, default=300, help="test images [300]")
    parser.add_argument("--adam-images", type=int, default=12, help="test and validation images for Adam [12]")
    parser.add_argument("--first-order", action="store_true", help="train once more with FirstOrder")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--pictures", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result, shown = measure(options, options.json.with_suffix(".runs"))
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(table(result["figures"]) + "\n")
    print(table(result["figures"]))
    if options.pictures is not None:
        draw(shown, options.pictures)


if __name__ == "__main__":
    main()
