"""`equipoise attack`: small changes of images that mislead the classifier of a run."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from equipoise.cli.display import facts_table
from equipoise.cli.errors import UsageError
from equipoise.cli.flags import Option
from equipoise.cli.runs import equilibrium_config, image_data, parse_run, report_packages, run_model
from equipoise.constraints import L2Ball, LInfBall
from equipoise.data import image_files, read_image
from equipoise.files import RunError
from equipoise.inputs import Nested
from equipoise.solvers import Picard
from equipoise.train import TrainConfig
from equipoise.zoo import ATTACK, CLASSES, Adversarial, EquilibriumClassifier
from equipoise.zoo import attack as find

BATCH = 50  # images per attack; the progress bar moves once per batch
SHOWN = 10  # images in the picture
SCHEME = Nested(steps=4)  # safe for maps that contract slowly or not at all

DESCRIPTION = """\
Change images within a small ball so that the classifier of a run errs, and show its predictions before and after. Image
and equilibrium are found together; each prediction is made at an equilibrium that is solved for again. Without IMAGE
the first test images are attacked against their labels; your own images are attacked against the prediction of the
classifier. Pixels stay in [0, 1]. A failed attack proves nothing."""
EXAMPLES = """\
examples:
  equipoise attack runs/demo
  equipoise attack runs/demo --radius 0.5 --images 500
  equipoise attack runs/demo --norm linf --radius 0.1 --out changed.png
  equipoise attack runs/demo digit.png
"""


OWN: list[Option] = [
    ("files", {"metavar": "IMAGE", "nargs": "*", "help": "image files, or folders of them, in place of test images"}),
    ("--radius", {"type": float, "metavar": "R", "help": "largest change [that of the run's training, or 1]"}),
    (
        "--norm",
        {
            "choices": ["l2", "linf"],
            "help": "Euclidean norm or largest change of a pixel [that of the training, or l2]",
        },
    ),
    ("--images", {"type": int, "metavar": "N", "default": 100, "help": "test images to attack"}),
    ("--rounds", {"type": int, "metavar": "N", "default": 40, "help": "steps of the image"}),
    ("--step-size", {"type": float, "metavar": "A", "default": 1.0, "help": "along the slope"}),
    ("--invert", {"action": "store_true", "help": "swap dark and light of image files"}),
    ("--out", {"metavar": "FILE", "help": "picture of the first images [RUN/attack.png]"}),
    ("--json", {"action": "store_true", "help": "print JSON"}),
]


@dataclasses.dataclass
class Found:
    """Result of an attack.

    Attributes:
        images: `(N, C, H, W)` pixels in [0, 1].
        attacked: the same after the attack.
        labels: `(N,)` reference classes.
        before: `(N, num_classes)` logits at the images.
        after: logits at the attacked images.
        evals: calls of the map, over all batches.
        vjps: products with its Jacobian.
    """

    images: Tensor
    attacked: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    evals: int = 0
    vjps: int = 0

    def add(self, other: Found) -> Found:
        joined = {
            field.name: torch.cat([getattr(self, field.name), getattr(other, field.name)])
            for field in dataclasses.fields(self)
            if field.name not in ("evals", "vjps")
        }
        return Found(**joined, evals=self.evals + other.evals, vjps=self.vjps + other.vjps)

    def facts(self) -> dict[str, Any]:
        """Return accuracies, losses and costs."""
        loss = [float(F.cross_entropy(logits, self.labels)) for logits in (self.before, self.after)]
        correct = [float((logits.argmax(1) == self.labels).double().mean()) for logits in (self.before, self.after)]
        return {
            "images": len(self.labels),
            "accuracy": correct[0],
            "robust_accuracy": correct[1],
            "loss": loss[0],
            "robust_loss": loss[1],
            "evals": self.evals,
            "vjps": self.vjps,
        }


def attack(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Attack the images of a run, or image files."""
    config, options = parse_run(
        arguments,
        "attack",
        classes,
        recipe="jiio-adversarial",
        own=OWN,
        fields=("data", "solver"),
        words=" [IMAGE...]",
        description=DESCRIPTION,
        examples=EXAMPLES,
        prepare=equilibrium_config,
    )
    _complete(options, config.task if isinstance(config.task, Adversarial) else Adversarial())
    console = Console()
    model, facts = run_model(Path(options.run), classes, console, quiet=options.json)
    if not isinstance(model, EquilibriumClassifier):
        raise RunError(f"{options.run} holds a {type(model).__name__}, and attack is for classifiers")
    model.eval().float()
    names = facts["about"].get("classes") or [str(number) for number in range(model.config.num_classes)]
    pixels, labels = _images(options, config)
    start = time.perf_counter()
    result = _run(model, config, pixels, labels, options, console)
    seconds = time.perf_counter() - start
    path = Path(options.out) if options.out else Path(options.run) / "attack.png"
    _draw(result, names, path)
    facts = {**result.facts(), "radius": options.radius, "norm": options.norm, "seconds": seconds, "picture": str(path)}
    if options.json:
        sys.stdout.write(json.dumps({"run": options.run, **facts}) + "\n")
        return 0
    console.print(facts_table(_rows(options, facts)))
    if options.files:
        for file, one, other in zip(image_files(options.files), result.before, result.after, strict=True):
            text = f"{file}: {_answer(names, one)} -> {_answer(names, other)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"picture {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _complete(options: Any, trained: Adversarial) -> None:
    """Fill in norm and radius, and check the numbers."""
    options.norm = options.norm or trained.norm
    if options.radius is None:
        if options.norm != trained.norm:
            raise UsageError(f"--norm {options.norm} needs --radius, such as 0.1 for linf or 1 for l2")
        options.radius = trained.radius
    for name in ("radius", "images", "rounds", "step_size"):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name):g}: must be > 0")


def _images(options: Any, config: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """Return pixels in [0, 1] and labels; None: the predictions of the classifier serve as labels."""
    if options.files:
        return torch.stack(
            [read_image(path, image_data(config), options.invert)[0] for path in image_files(options.files)]
        ).float() / 255, None
    images, labels = next(iter(config.data.load().test.batches(options.images)))
    return images.float() / 255, labels


def _run(
    model: EquilibriumClassifier,
    config: TrainConfig,
    pixels: Tensor,
    labels: Tensor | None,
    options: Any,
    console: Console,
) -> Found:
    """Attack all images, batch by batch."""
    data = image_data(config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    kind = L2Ball if options.norm == "l2" else LInfBall
    result: Found | None = None
    columns = TextColumn("attacking"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = options.json or not console.is_terminal
    with (
        Progress(*columns, console=console, transient=True, disable=quiet) as bar,
        model.deq.using(solver=config.solver),
    ):
        task = bar.add_task("attack", total=len(pixels))
        for start in range(0, len(pixels), BATCH):
            x = pixels[start : start + BATCH]
            with torch.no_grad():
                before = model((x - mean) / std)
            y = before.argmax(1) if labels is None else labels[start : start + BATCH]
            solution = find(
                model,
                x,
                y,
                constraint=kind(radius=options.radius, center=x, lower=0.0, upper=1.0),
                mean=data.mean,
                std=data.std,
                optimizer=dataclasses.replace(
                    ATTACK,
                    solver=Picard(max_steps=options.rounds, rtol=1e-3),
                    scheme=SCHEME,
                    step_size=options.step_size,
                    verify_solver=None,
                ),
            )
            changed = solution.value[2].detach()
            with torch.no_grad():
                after = model((changed - mean) / std)
            part = Found(x, changed, y, before, after, solution.num_evals, solution.num_vjps)
            result = part if result is None else result.add(part)
            bar.advance(task, len(x))
    assert result is not None
    return result


def _draw(result: Found, names: list[str], path: Path) -> None:
    with report_packages("the picture"):
        from equipoise.report.pictures import draw_attack
    answers = [
        [
            (names[int(logits.argmax())], bool(logits.argmax() == label))
            for logits, label in zip(side[:SHOWN], result.labels, strict=False)
        ]
        for side in (result.before, result.after)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_attack(result.images[:SHOWN], result.attacked[:SHOWN], answers[0], answers[1], path)


def _rows(options: Any, found: dict[str, Any]) -> dict[str, str]:
    count = found["images"]
    ball = "Euclidean" if options.norm == "l2" else "of the largest pixel"
    facts = {"run": options.run, "largest change": f"{options.radius:g} ({ball})"}
    if options.files:
        facts["images"] = f"{count:,}"
        facts["keep their class"] = f"{found['robust_accuracy']:.1%}"
    else:
        facts["test images"] = f"{count:,}"
        facts["accuracy"] = f"{found['accuracy']:.4f}"
        facts["accuracy under attack"] = f"{found['robust_accuracy']:.4f}"
    facts["cross-entropy"] = f"{found['loss']:.3f}, under attack {found['robust_loss']:.3f}"
    facts["cost"] = f"{found['evals']:,} calls of the map and {found['vjps']:,} products with its Jacobian, in batches"
    return {**facts, "time": f"{found['seconds']:.1f} s"}


def _answer(names: list[str], logits: Tensor) -> str:
    value, index = logits.softmax(0).max(0)
    return f"{names[int(index)]} {float(value):.1%}"
