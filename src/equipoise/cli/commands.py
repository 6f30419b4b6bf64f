"""What the commands do."""

from __future__ import annotations

import dataclasses
import errno
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from equipoise.cli.display import LiveDisplay, PlainDisplay, facts_table
from equipoise.cli.errors import UsageError, fail
from equipoise.cli.flags import parse
from equipoise.data import image_files, read_image
from equipoise.files import DataError, RunError
from equipoise.gradients import JacobianFree
from equipoise.train import CheckpointError, TrainConfig, checkpoint, fit
from equipoise.train import evaluate as evaluate_split
from equipoise.train.device import to_device
from equipoise.train.proof import summarize
from equipoise.train.run_folder import config_yaml, new_folder
from equipoise.train.serialize import nearest
from equipoise.train.task import SCORES
from equipoise.zoo import CLASSES, RECIPES, ClassifierConfig
from equipoise.zoo.files import folder_config, load, read_config

TRAIN_EXAMPLES = """\
fields of a class are flags, too; --solver.help Anderson lists those of a class. Dashes and underscores in flags
mean the same. Lists are written [16,32].

examples:
  equipoise train mdeq-digits --run-dir runs/demo
  equipoise train mdeq-digits --solver Anderson --solver.memory 6 --gradient Implicit --gradient.solver.rtol 1e-6
  equipoise train mdeq-cifar10-tiny --data.root data/cifar10 --task.penalty.weight 0.5 --task.penalty.probability 0.05
  equipoise train mdeq-digits --print_config > mine.yaml
  equipoise train --config mine.yaml --seed 1
  equipoise train --run-dir runs/demo --resume
  torchrun --nproc-per-node 4 -m equipoise train mdeq-cifar10-large --run-dir runs/large
"""


def recipes(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """List the recipes."""
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write("usage: equipoise recipes\n\nList the named recipes of `equipoise train`.\n")
        return 0
    if arguments:
        raise UsageError(f"recipes takes no arguments, got {arguments[0]!r}")
    table = Table("recipe", "what it trains")
    for name, recipe in RECIPES.items():
        table.add_row(f"[bold]{name}[/bold]", (recipe.__doc__ or "").splitlines()[0])
    Console().print(table)
    return 0


def train(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Train a recipe or a configuration file, or go on with a run."""
    own: list[tuple[str, dict[str, Any]]] = [
        ("--config", {"metavar": "FILE", "help": "YAML file with fields of the configuration, over the recipe's"}),
        ("--run-dir", {"metavar": "FOLDER", "help": "folder of the run [runs/RECIPE-NUMBER]"}),
        ("--resume", {"action": "store_true", "help": "go on with the run in the run folder"}),
        ("--overwrite", {"action": "store_true", "help": "replace the run that the folder holds"}),
        ("--no-report", {"action": "store_true", "help": "write no report.html at the end"}),
        ("--print-config", {"action": "store_true", "help": "print the configuration as YAML and stop"}),
    ]
    recipe, flags = _recipe(arguments)
    base = _base(
        recipe, _value(flags, "config"), _value(flags, "run-dir"), any(f == "--resume" for f in flags), classes
    )
    config, options = parse(
        flags,
        base,
        usage="equipoise train [RECIPE] [flags]",
        description="Train a recipe, a configuration file, or go on with a run. The recipes:\n  "
        + "\n  ".join(RECIPES)
        + f"\nIn brackets: the values of {base.name}; those of another recipe: equipoise train RECIPE --help",
        examples=TRAIN_EXAMPLES,
        own=own,
        classes=classes,
    )
    if options.resume and options.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if options.resume and options.run_dir is None:
        raise UsageError("--resume needs --run-dir FOLDER, the run to go on with")
    if (
        recipe is None
        and options.resume
        and not options.config
        and not (Path(options.run_dir) / "config.yaml").exists()
    ):
        raise RunError(f"{options.run_dir} holds no run to go on with: it has no config.yaml")
    if recipe is None and not options.config and not options.resume:
        raise UsageError(f"name a recipe ({', '.join(RECIPES)}), or give --config FILE or --resume with --run-dir")
    if options.print_config:
        sys.stdout.write(config_yaml(config))
        return 0
    console = Console()
    display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
    folder = Path(options.run_dir) if options.run_dir is not None else new_folder(config.name)
    advice = f"equipoise train --run-dir {shlex.quote(str(folder))} --resume"
    try:
        result = fit(config, run_dir=folder, resume=options.resume, overwrite=options.overwrite, observer=display)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{advice} goes on from the last checkpoint") from stop
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{error.filename or folder}: {error.strerror}; make room, then {advice}") from error
    finally:
        display.stop()
    first = not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )
    if first and not options.no_report:
        try:
            write_report = _report_writer()
        except RunError as error:
            display.say(f"no report: {error}")
        else:
            display.say(f"report {write_report(result.run_dir, classes=classes)}")
    return 0


def evaluate(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Accuracy and solver statistics of a run on a split."""
    own: list[tuple[str, dict[str, Any]]] = [
        ("run", {"metavar": "RUN", "help": "run folder"}),
        ("--split", {"choices": ["test", "validation", "train"], "default": "test", "help": "images [test]"}),
        ("--json", {"action": "store_true", "help": "print JSON"}),
    ]
    folder = run_folder(arguments, "evaluate")
    base = evaluated(folder_config(folder, classes=classes) if folder is not None else RECIPES["mdeq-digits"]())
    config, options = parse(
        arguments,
        base,
        usage="equipoise evaluate RUN [flags]",
        description="Loss, scores and solver statistics of a run. In brackets: the values of the run.",
        examples="examples:\n  equipoise evaluate runs/demo\n"
        "  equipoise evaluate runs/demo --solver.max_steps 6 --split train\n"
        "  equipoise evaluate runs/demo --solver Anderson --solver.rtol 1e-5 --json\n",
        own=own,
        classes=classes,
        fields=("data", "solver", "eval_batch_size", "precision", "accelerator", "channels_last"),
    )
    console = Console()
    model, _ = run_model(Path(options.run), console, quiet=options.json, classes=classes)
    split = getattr(config.data.load(), options.split)
    if split is None:
        raise RunError("the run set no validation images aside; evaluate --split test")
    model.to(torch.float64 if config.precision == "64-true" else torch.float32)
    start = time.perf_counter()
    found = evaluate_split(model, split, config, solver=config.solver)
    seconds = time.perf_counter() - start
    if options.json:
        sys.stdout.write(json.dumps({"run": options.run, "split": options.split, **found, "seconds": seconds}) + "\n")
        return 0
    console.print(
        facts_table(
            {
                "run": options.run,
                f"{options.split} images": f"{found['count']:,}",
                **{SCORES[name]: f"{found[name]:.4f}" for name in config.task.scores},
                "loss": f"{found['loss']:.4f}",
                "mean solver steps per sample": f"{found['mean_steps']:.1f}",
                "converged": f"{found['converged']:.1%}",
                "mean relative residual": f"{found['residual']:.2e}",
                "certificate": summarize(found, config.solver.max_steps),
                "time": f"{seconds:.1f} s",
            }
        )
    )
    return 0


def predict(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Classify image files."""
    own: list[tuple[str, dict[str, Any]]] = [
        ("run", {"metavar": "RUN", "help": "run folder"}),
        ("images", {"metavar": "IMAGE", "nargs": "+", "help": "PNG, JPEG or other image files, or folders of them"}),
        ("--top", {"type": int, "default": 3, "help": "classes to show"}),
        ("--invert", {"action": "store_true", "help": "swap dark and light, for dark ink on light ground"}),
        ("--json", {"action": "store_true", "help": "print JSON, one line per image"}),
    ]
    folder = run_folder(arguments, "predict")
    found = folder_config(folder, classes=classes) if folder is not None else RECIPES["mdeq-digits"]()
    base = dataclasses.replace(evaluated(found), solver=found.forward_solver)
    config, options = parse(
        arguments,
        base,
        usage="equipoise predict RUN IMAGE... [flags]",
        description="Classify image files with a run. Images are converted to the model's size and colors.\n"
        "A file that cannot be read is named on stderr, the others are classified, and the exit code is 1.",
        examples="examples:\n  equipoise predict runs/demo digit.png\n"
        "  equipoise predict runs/demo scan1.png scan2.png --invert --top 1\n"
        "  equipoise predict runs/demo scans/ --json\n",
        own=own,
        classes=classes,
        fields=("solver",),
    )
    if options.top < 1:
        raise UsageError(f"--top {options.top}: must be >= 1")
    console = Console()
    model, facts = run_model(Path(options.run), console, quiet=options.json, classes=classes)
    if not isinstance(config.model, ClassifierConfig):
        raise RunError(f"{options.run} is a run of {type(config.task).__name__}, and predict names classes")
    names = facts["about"].get("classes") or [str(number) for number in range(config.model.num_classes)]
    failed = False
    files, size = image_files(options.images), config.eval_batch_size
    for start in range(0, len(files), size):
        images = {}
        for path in files[start : start + size]:
            try:
                images[path] = read_image(path, config.data, options.invert)
            except DataError as error:
                fail(str(error), 1)
                failed = True
        if images:
            _predict_batch(model, config, images, names, console, top=options.top, as_json=options.json)
    return int(failed)


def _predict_batch(
    model: Any,
    config: TrainConfig,
    images: dict[Path, tuple[torch.Tensor, str]],
    names: list[str],
    console: Console,
    *,
    top: int,
    as_json: bool,
) -> None:
    """Classify some images, and tell the result of each."""
    pixels = torch.stack([pixels for pixels, _ in images.values()])
    batch, _ = to_device(config, pixels, torch.zeros(len(images)), torch.device("cpu"))
    with torch.no_grad(), model.deq.using(solver=config.solver):
        logits, solution = model.classify(batch)
    probabilities = logits.softmax(1)
    for number, (path, (_, note)) in enumerate(images.items()):
        best = probabilities[number].topk(min(top, len(names)))
        ranked = [(names[index], value) for value, index in zip(*(t.tolist() for t in best), strict=True)]
        steps, converged = int(solution.num_steps[number]), bool(solution.converged[number])
        if as_json:
            line = {"image": str(path), "classes": dict(ranked), "steps": steps, "converged": converged, "note": note}
            sys.stdout.write(json.dumps(line) + "\n")
            continue
        end = f"{steps} solver steps, {'' if converged else 'not '}converged"
        text = f"{path}: " + ", ".join(f"{label} {value:.1%}" for label, value in ranked) + f"  ({end})"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        if note:
            console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)


def report(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Write the report of a run."""
    own: list[tuple[str, dict[str, Any]]] = [
        ("run", {"metavar": "RUN", "help": "run folder"}),
        ("--images", {"type": int, "metavar": "N", "default": 2000, "help": "test images to look at, at most"}),
    ]
    run_folder(arguments, "report")
    _, options = parse(
        arguments,
        RECIPES["mdeq-digits"](),
        usage="equipoise report RUN [flags]",
        description="Write report.html into the folder of a run, finished or not: learning curves, solver statistics,\n"
        "residuals per solver step, mistakes and confusion matrix, in one file that needs no network.",
        examples="examples:\n  equipoise report runs/demo\n  equipoise report runs/demo --images 10000\n",
        own=own,
        classes=classes,
        fields=(),
    )
    if options.images < 1:
        raise UsageError(f"--images {options.images}: must be >= 1")
    path = _report_writer()(options.run, max_images=options.images, classes=classes)
    Console().print(f"report {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _report_writer() -> Callable[..., Path]:
    """The function that writes reports; it needs packages that the rest of the command line does not."""
    try:
        from equipoise.report import write_report
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise RunError(f"a report needs {missing}: pip install 'equipoise[report]'") from error
    return write_report


def _recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe that a command line names, and the rest of it."""
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else ""
        if argument in RECIPES and before not in ("--run-dir", "--run_dir", "--config"):
            return argument, [*arguments[:position], *arguments[position + 1 :]]
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"unknown recipe {arguments[0]!r}; {nearest(arguments[0], RECIPES)}")
    return None, arguments


def _base(
    recipe: str | None, file: str | None, run_dir: str | None, resume: bool, classes: Sequence[type]
) -> TrainConfig:
    """The configuration that flags change."""
    base = RECIPES[recipe]() if recipe is not None else None
    if file is not None:
        try:
            return read_config(file, base, classes=classes)
        except RunError as error:
            raise UsageError(str(error)) from error
    if resume and run_dir is not None and (Path(run_dir) / "config.yaml").exists():
        found = folder_config(Path(run_dir), classes=classes)
        if base is not None and base.name != found.name:
            raise RunError(f"{run_dir} holds a run of {found.name}, not of {base.name}; leave the recipe out")
        return found
    return base if base is not None else RECIPES["mdeq-digits"]()


def _value(arguments: list[str], name: str) -> str | None:
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            return value if equals else (arguments[position + 1] if position + 1 < len(arguments) else None)
    return None


def run_folder(arguments: list[str], command: str) -> Path | None:
    """The run folder that a command line names first; None if it only asks for help."""
    if not arguments or arguments[0].startswith("-"):
        if "-h" in arguments or "--help" in arguments:
            return None
        raise UsageError(f"name the run folder first: equipoise {command} RUN")
    return Path(arguments[0])


def evaluated(config: TrainConfig) -> TrainConfig:
    """A run's configuration as evaluation needs it: no gradient that asks for a certain solver, one device."""
    solver = config.eval_solver or config.solver
    return dataclasses.replace(
        config, solver=solver, eval_solver=None, gradient=JacobianFree(), devices=1, num_nodes=1, strategy="auto"
    )


def run_model(
    folder: Path, console: Console, *, quiet: bool, classes: Sequence[type] = CLASSES
) -> tuple[Any, dict[str, Any]]:
    """The model of a run and its facts: the final one, or that of the newest whole checkpoint."""
    path = folder / "model.safetensors"
    if path.exists():
        return load(path, classes=classes), checkpoint.describe(path)
    state, problems = checkpoint.read_newest_state(folder / "checkpoints")
    if state is None:
        raise CheckpointError("; ".join([*problems, f"{folder} has no model yet: its run has saved no checkpoint"]))
    config = folder_config(folder, classes=classes)
    model = checkpoint.model_of_state(state, config)
    if not quiet:
        for problem in problems:
            console.print(f"{problem}. The checkpoint before it is used", markup=False, soft_wrap=True)
        console.print(f"the run is not finished: its checkpoint at step {state.facts['progress']['step']} is used")
    return model, {"about": {}}
