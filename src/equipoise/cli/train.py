"""`equipoise train` and `equipoise recipes`."""

import argparse
import errno
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from equipoise.cli.display import LiveDisplay, PlainDisplay
from equipoise.cli.errors import UsageError
from equipoise.cli.flags import Option, parse
from equipoise.cli.runs import report_packages
from equipoise.files import RunError
from equipoise.train import TrainConfig, fit
from equipoise.train.run_folder import config_yaml, new_folder
from equipoise.train.serialize import nearest
from equipoise.zoo import CLASSES, RECIPES
from equipoise.zoo.files import folder_config, read_config

DESCRIPTION = """\
Train a recipe or a configuration file, or go on with a run. In brackets: the values of {name}.
The recipes:
  """
EXAMPLES = """\
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
OWN: list[Option] = [
    ("recipe", {"metavar": "RECIPE", "nargs": "?", "help": "name of a recipe"}),
    ("--config", {"metavar": "FILE", "help": "YAML file with fields of the configuration, over the recipe's"}),
    ("--run-dir", {"metavar": "FOLDER", "help": "folder of the run [runs/RECIPE-NUMBER]"}),
    ("--resume", {"action": "store_true", "help": "go on with the run in the run folder"}),
    ("--overwrite", {"action": "store_true", "help": "replace the run that the folder holds"}),
    ("--no-report", {"action": "store_true", "help": "write no report.html at the end"}),
    ("--print-config", {"action": "store_true", "help": "print the configuration as YAML and stop"}),
]


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
    config, options = parse(
        arguments,
        lambda options: _base(options, classes),
        own=OWN,
        classes=classes,
        usage="equipoise train [RECIPE] [flags]",
        description=DESCRIPTION + "\n  ".join(RECIPES),
        examples=EXAMPLES,
    )
    if options.resume and options.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if options.resume and options.run_dir is None:
        raise UsageError("--resume needs --run-dir FOLDER, the run to go on with")
    if not (options.recipe or options.config or options.resume):
        raise UsageError(f"name a recipe ({', '.join(RECIPES)}), or give --config FILE or --resume with --run-dir")
    if not (options.recipe or options.config) and not (Path(options.run_dir) / "config.yaml").exists():
        raise RunError(f"{options.run_dir} holds no run to go on with: it has no config.yaml")
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
    if not options.no_report and _is_first_process():
        try:
            with report_packages("a report"):
                from equipoise.report import write_report
            display.say(f"report {write_report(result.run_dir, classes=classes)}")
        except RunError as error:
            display.say(f"no report: {error}")
    return 0


def _base(options: argparse.Namespace | None, classes: Sequence[type]) -> TrainConfig:
    """Return the configuration that flags change: that of a file, of a run to go on with, or of a recipe."""
    if options is None:
        return RECIPES["mdeq-digits"]()
    if options.recipe is not None and options.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {options.recipe!r}; {nearest(options.recipe, RECIPES)}")
    base = RECIPES[options.recipe]() if options.recipe is not None else None
    if options.config is not None:
        try:
            return read_config(options.config, base, classes=classes)
        except RunError as error:
            raise UsageError(str(error)) from error
    if options.resume and options.run_dir is not None and (Path(options.run_dir) / "config.yaml").exists():
        found = folder_config(Path(options.run_dir), classes=classes)
        if base is not None and base.name != found.name:
            raise RunError(f"{options.run_dir} holds a run of {found.name}, not of {base.name}; leave the recipe out")
        return found
    return RECIPES["mdeq-digits"]() if base is None else base


def _is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
