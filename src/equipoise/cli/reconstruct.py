"""`equipoise reconstruct`: recovery of a corrupted image by the decoder of a run."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from equipoise.cli.display import facts_table
from equipoise.cli.errors import UsageError
from equipoise.cli.flags import Option
from equipoise.cli.runs import evaluation_config, image_data, parse_run, report_packages, run_model
from equipoise.data import generator, read_cropped, read_image
from equipoise.files import RunError
from equipoise.train import TrainConfig
from equipoise.zoo import (
    CLASSES,
    Blur,
    Corruption,
    Downsample,
    Hole,
    Noise,
    PriorConfig,
    Reconstruct,
    explain,
    psnr,
)

DESCRIPTION = """\
Recover a corrupted image with the decoder of a run: the latents of the decoder and its equilibrium are optimized
together until the decoded image explains the observation. The file is the observation: noisy, blurred, small, or, with
--mask, incomplete. With --simulate the file is a clean image, which is corrupted first and compared at the end."""
EXAMPLES = """\
examples:
  equipoise reconstruct runs/decoder shirt.png --task deblur --sigma 1.5
  equipoise reconstruct runs/decoder small.png --task superres --out large.png
  equipoise reconstruct runs/decoder torn.png --task inpaint --mask missing.png
  equipoise reconstruct runs/decoder clean.png --task denoise --std 0.2 --simulate
"""


OWN: list[Option] = [
    ("image", {"metavar": "IMAGE", "help": "PNG, JPEG or other image file"}),
    (
        "--task",
        {
            "choices": ["inpaint", "denoise", "deblur", "superres"],
            "required": True,
            "help": "kind of corruption to undo",
        },
    ),
    ("--mask", {"metavar": "FILE", "help": "inpaint: image that is white where pixels are missing"}),
    ("--std", {"type": float, "default": 0.1, "help": "denoise: standard deviation, pixels in [0, 1]"}),
    ("--sigma", {"type": float, "default": 1.5, "help": "deblur: standard deviation of the blur in pixels"}),
    ("--factor", {"type": int, "default": 4, "help": "superres: how many times larger the answer is"}),
    ("--simulate", {"action": "store_true", "help": "damage the image first, and compare at the end"}),
    ("--noise-seed", {"type": int, "default": 0, "help": "seed of the noise of --simulate"}),
    ("--invert", {"action": "store_true", "help": "swap dark and light, for dark marks on light ground"}),
    ("--out", {"metavar": "FILE", "help": "picture: observed, answer, and the truth if known [IMAGE-TASK.png]"}),
    ("--json", {"action": "store_true", "help": "print JSON"}),
]


def reconstruct(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Recover an image file."""
    config, options = parse_run(
        arguments,
        "reconstruct",
        classes,
        recipe="jiio-generative",
        own=OWN,
        fields=("solver",),
        words=" IMAGE --task TASK",
        description=DESCRIPTION,
        examples=EXAMPLES,
        prepare=evaluation_config,
    )
    task = config.task
    if not isinstance(task, Reconstruct):
        raise RunError(
            f"{options.run} is a run of {type(task).__name__}, and reconstruct needs a decoder: equipoise train "
            "jiio-generative"
        )
    corruption = _corruption(options)
    console = Console()
    if isinstance(config.model, PriorConfig) and options.task in ("deblur", "superres"):
        raise UsageError(
            f"{options.run} has learned to denoise and inpaint; for --task {options.task} take a run of jiio-generative"
        )
    model, _ = run_model(Path(options.run), classes, console, quiet=options.json)
    model.eval().float().requires_grad_(False)
    problem = _read(options, config, corruption)
    start = time.perf_counter()
    columns = TextColumn("optimizing latents and equilibrium together"), BarColumn(bar_width=None), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=options.json or not console.is_terminal) as bar:
        solving = bar.add_task("solve", total=_most_calls(task, config))
        with model.deq.cell.register_forward_hook(lambda *_: bar.advance(solving)):
            answer, facts = _solve(model, config, task, problem, corruption)
    facts["seconds"] = time.perf_counter() - start
    path = Path(options.out or f"{Path(options.image).stem}-{options.task}.png")
    panels = {"observed": _shown(problem, options.task), "answer": answer[0]}
    if problem.truth is not None:
        panels["truth"] = problem.truth[0]
        facts |= {"psnr": float(psnr(answer, problem.truth)), "ssim": _ssim(answer, problem.truth)}
    _draw(panels, path)
    if options.json:
        line = {"run": options.run, "image": options.image, "task": options.task, **facts, "note": problem.note}
        sys.stdout.write(json.dumps({**line, "picture": str(path)}) + "\n")
        return 0
    console.print(facts_table(_rows(options, facts)))
    for text in (problem.note, f"picture {path}"):
        if text:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Inverse problem of one image, with a batch dimension of one.

    Attributes:
        observed: `(1, C, h, w)` what was seen.
        mask: 1 where a pixel was seen.
        size: height and width of the answer.
        truth: `(1, C, H, W)`; None where it is not known.
        note: what was converted.
    """

    observed: Tensor
    mask: Tensor
    size: tuple[int, int]
    truth: Tensor | None
    note: str


def _corruption(options: Any) -> Corruption:
    if options.mask is not None and options.task != "inpaint":
        raise UsageError(f"--mask belongs to --task inpaint, not to {options.task}")
    if options.task == "inpaint" and options.mask is None and not options.simulate:
        raise UsageError("--task inpaint needs --mask FILE, an image that is white where pixels are missing")
    try:
        if options.task == "denoise":
            return Noise(std=options.std)
        if options.task == "deblur":
            return Blur(sigma=options.sigma)
        return Downsample(factor=options.factor) if options.task == "superres" else Hole()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read(options: Any, config: TrainConfig, corruption: Corruption) -> _Problem:
    """Read the image in the format of the decoder, and its mask."""
    factor = corruption.factor if isinstance(corruption, Downsample) else 1
    free = isinstance(config.model, PriorConfig)
    read = _read_free if free else _read_fixed
    pixels, note = read(options.image, options.invert, config, factor, options.simulate)
    image = pixels[None].float() / 255
    size = (image.shape[2], image.shape[3]) if options.simulate else (factor * image.shape[2], factor * image.shape[3])
    mask = torch.ones_like(image)
    if options.mask is not None:
        marks, _ = read(options.mask, False, config, factor, options.simulate)
        if marks.shape != pixels.shape:
            raise UsageError(f"{options.mask} has another size than {options.image}; a mask has one pixel for each")
        mask = (marks[None] < 128).float()
        if not bool(mask.any()):
            raise UsageError(f"{options.mask} is white all over: nothing was observed")
    if not options.simulate:
        return _Problem(image * mask, mask, size, None, note)
    if options.mask is not None:
        return _Problem(image * mask, mask, size, image, note)
    return _Problem(*corruption.observe(image, generator(options.noise_seed)), size, image, note)


def _read_fixed(name: str, invert: bool, config: TrainConfig, factor: int, simulate: bool) -> tuple[Tensor, str]:
    """Read an image for a decoder of images of one size."""
    side = config.data.shape[1]
    if side % factor:
        raise UsageError(f"--factor {factor} does not divide the {side} pixels of the decoder's images")
    return read_image(Path(name), image_data(config), invert, side=side if simulate else side // factor)


def _read_free(name: str, invert: bool, config: TrainConfig, factor: int, simulate: bool) -> tuple[Tensor, str]:
    """Read an image for a decoder of images of any size."""
    assert isinstance(config.model, PriorConfig)
    sides = config.model.stride
    multiple = math.lcm(sides, factor) if simulate else sides // math.gcd(sides, factor)
    return read_cropped(Path(name), config.data.shape[0], invert, multiple=multiple)


def _kind(task: Reconstruct, corruption: Corruption) -> int:
    """Return the index of the most similar trained corruption; its data weight is used.

    What the decoder was not trained for is taken as free of noise, so next to the weakest of what it was.
    """
    if isinstance(corruption, Hole) and (holes := [k for k, c in enumerate(task.corruptions) if isinstance(c, Hole)]):
        return holes[0]
    wanted = corruption.std if isinstance(corruption, Noise) else 0.0
    noises = [(abs(c.std - wanted), k) for k, c in enumerate(task.corruptions) if isinstance(c, Noise)]
    return min(noises)[1] if noises else 0


def _most_calls(task: Reconstruct, config: TrainConfig) -> int:
    """Return the largest number of evaluations in `_solve`, without those that measure a step."""
    return config.solver.max_steps * getattr(task.scheme, "steps", 1) + task.equilibrium_solver.max_steps


def _solve(
    model: Any, config: TrainConfig, task: Reconstruct, problem: _Problem, corruption: Corruption
) -> tuple[Tensor, dict[str, Any]]:
    """Return the reconstruction, made at an equilibrium that is solved for again at the optimized latents."""
    linear = isinstance(corruption, (Blur, Downsample))
    weighted = isinstance(config.model, PriorConfig)
    solution = explain(
        model,
        problem.observed,
        problem.mask,
        size=problem.size,
        kinds=torch.tensor([_kind(task, corruption)]) if weighted else None,
        corruption=corruption if linear else None,
        optimizer=(dataclasses.replace(task, step_size=None) if linear else task).input_optimizer(config.solver),
    )
    x = solution.value[2]
    with torch.no_grad(), model.deq.using(solver=task.equilibrium_solver):
        estimate = model.decode(model.deq(x, *model.context(problem.observed, problem.mask)))
        answer = corruption.complete(estimate, problem.observed, problem.mask)
        seen = corruption.apply(answer) if linear else answer
    error = (problem.mask * (seen - problem.observed)).square().sum() / problem.mask.sum()
    return answer, {
        "rounds": int(solution.num_steps),
        "evals": solution.num_evals,
        "vjps": solution.num_vjps,
        "converged": bool(solution.converged),
        "rms": float(error.sqrt()),
    }


def _shown(problem: _Problem, task: str) -> Tensor:
    """Return the observation with missing pixels in gray."""
    return torch.where(problem.mask > 0, problem.observed, 0.5)[0] if task == "inpaint" else problem.observed[0]


def _ssim(answer: Tensor, truth: Tensor) -> float | None:
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    images = (t[0].clamp(0, 1).numpy() for t in (answer, truth))
    side = min(answer.shape[2:])
    window = min(7, side - 1 + side % 2)  # odd; 7 is the function's own
    return float(structural_similarity(*images, data_range=1.0, channel_axis=0, win_size=window))


def _draw(panels: dict[str, Tensor], path: Path) -> None:
    with report_packages("the picture"):
        from equipoise.report.pictures import draw_reconstruction
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_reconstruction(panels, path)


def _rows(options: Any, facts: dict[str, Any]) -> dict[str, str]:
    rows = {"run": options.run, "image": options.image, "task": options.task}
    if "psnr" in facts:
        rows["PSNR"] = f"{facts['psnr']:.2f} dB"
        rows["SSIM"] = "needs scikit-image" if facts["ssim"] is None else f"{facts['ssim']:.4f}"
    rows["not explained"] = f"{facts['rms']:.4f} of a pixel seen, root mean square"
    rows["cost"] = f"{facts['rounds']} rounds, {facts['evals']} calls of the map, {facts['vjps']} products"
    return {**rows, "time": f"{facts['seconds']:.1f} s"}
