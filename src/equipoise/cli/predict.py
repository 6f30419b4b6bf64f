"""`equipoise predict`: classes of image files."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from equipoise.cli.errors import UsageError, fail
from equipoise.cli.runs import equilibrium_config, image_data, parse_run, run_model
from equipoise.data import image_files, read_image
from equipoise.files import DataError, RunError
from equipoise.train import TrainConfig
from equipoise.train.device import to_device
from equipoise.zoo import CLASSES, ClassifierConfig

DESCRIPTION = """\
Classify image files with a run. Images are converted to the model's size and colors.
A file that cannot be read is named on stderr, the others are classified, and the exit code is 1."""
EXAMPLES = """\
examples:
  equipoise predict runs/demo digit.png
  equipoise predict runs/demo scan1.png scan2.png --invert --top 1
  equipoise predict runs/demo scans/ --json
"""


def predict(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Classify image files."""
    config, options = parse_run(
        arguments,
        "predict",
        classes,
        recipe="mdeq-digits",
        own=[
            (
                "images",
                {"metavar": "IMAGE", "nargs": "+", "help": "image files, or folders of them"},
            ),
            ("--top", {"type": int, "default": 3, "help": "classes to show"}),
            ("--invert", {"action": "store_true", "help": "swap dark and light, for dark ink on light ground"}),
            ("--json", {"action": "store_true", "help": "print JSON, one line per image"}),
        ],
        fields=("solver",),
        words=" IMAGE...",
        description=DESCRIPTION,
        examples=EXAMPLES,
        prepare=equilibrium_config,
    )
    if options.top < 1:
        raise UsageError(f"--top {options.top}: must be >= 1")
    console = Console()
    model, facts = run_model(Path(options.run), classes, console, quiet=options.json)
    if not isinstance(config.model, ClassifierConfig):
        raise RunError(f"{options.run} is a run of {type(config.task).__name__}, and predict names classes")
    names = facts["about"].get("classes") or [str(number) for number in range(config.model.num_classes)]
    failed, data = False, image_data(config)
    files, size = image_files(options.images), config.eval_batch_size
    for start in range(0, len(files), size):
        images = {}
        for path in files[start : start + size]:
            try:
                images[path] = read_image(path, data, options.invert)
            except DataError as error:
                fail(str(error), 1)
                failed = True
        for line in _predictions(model, config, images, names, options.top) if images else ():
            if options.json:
                sys.stdout.write(json.dumps(line) + "\n")
            else:
                _print(console, line)
    return int(failed)


def _predictions(
    model: Any, config: TrainConfig, images: dict[Path, tuple[torch.Tensor, str]], names: list[str], top: int
) -> list[dict[str, Any]]:
    """Classify a batch of images."""
    pixels = torch.stack([pixels for pixels, _ in images.values()])
    batch, _ = to_device(config, pixels, torch.zeros(len(images)), torch.device("cpu"))
    with torch.no_grad(), model.deq.using(solver=config.solver):
        logits, solution = model.classify(batch)
    best = logits.softmax(1).topk(min(top, len(names)))
    return [
        {
            "image": str(path),
            "classes": {names[index]: value for value, index in zip(values, indices, strict=True)},
            "steps": steps,
            "converged": converged,
            "note": note,
        }
        for (path, (_, note)), values, indices, steps, converged in zip(
            images.items(),
            *(t.tolist() for t in (best.values, best.indices, solution.num_steps, solution.converged)),
            strict=True,
        )
    ]


def _print(console: Console, line: dict[str, Any]) -> None:
    ranked = ", ".join(f"{label} {value:.1%}" for label, value in line["classes"].items())
    end = f"{line['steps']} solver steps, {'' if line['converged'] else 'not '}converged"
    note = [f"  {line['note']}"] if line["note"] else []
    for text in (f"{line['image']}: {ranked}  ({end})", *note):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
