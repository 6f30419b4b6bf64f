"""Run folders on the command line: their configuration, their model and the options of a command on them."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from equipoise.cli.flags import Option, parse
from equipoise.data import ImageData
from equipoise.files import CheckpointError, RunError
from equipoise.gradients import JacobianFree
from equipoise.train import TrainConfig, checkpoint
from equipoise.zoo import RECIPES
from equipoise.zoo.files import folder_config, load


def parse_run(
    arguments: list[str],
    command: str,
    classes: Sequence[type],
    *,
    recipe: str,
    own: Sequence[Option],
    fields: Sequence[str],
    words: str = "",
    description: str,
    examples: str,
    prepare: Callable[[TrainConfig], TrainConfig] = lambda config: config,
) -> tuple[TrainConfig, argparse.Namespace]:
    """Read a command line that names a run folder first.

    Args:
        arguments: words after the command.
        command: its name.
        classes: that the configuration of the run, and flags, may name.
        recipe: whose values the help shows where no run is named.
        own: options of the command beside the run.
        fields: of the configuration that have flags.
        words: of the usage, after the run.
        description: paragraph of the help.
        examples: end of the help.
        prepare: changes the configuration of the run before flags do.

    Raises:
        UsageError: no run is named, or an option is not understood.
        RunError: the folder holds no run.
    """
    return parse(
        arguments,
        lambda options: (
            RECIPES[recipe]() if options is None else prepare(folder_config(Path(options.run), classes=classes))
        ),
        own=[("run", {"metavar": "RUN", "help": "run folder"}), *own],
        fields=fields,
        classes=classes,
        usage=f"equipoise {command} RUN{words} [flags]",
        description=description,
        examples=examples,
    )


def evaluation_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration for evaluation: its solver, a gradient that reads no inverse, one device."""
    return dataclasses.replace(
        config,
        solver=config.eval_solver or config.solver,
        eval_solver=None,
        gradient=JacobianFree(),
        devices=1,
        num_nodes=1,
        strategy="auto",
    )


def equilibrium_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration for evaluation with the solver of an equilibrium alone."""
    return dataclasses.replace(evaluation_config(config), solver=config.forward_solver)


def run_model(folder: Path, classes: Sequence[type], console: Console, *, quiet: bool) -> tuple[Any, dict[str, Any]]:
    """Return the model of a run and its facts: the final one, or that of the newest whole checkpoint."""
    path = folder / "model.safetensors"
    if path.exists():
        return load(path, classes=classes), checkpoint.describe(path)
    state, problems = checkpoint.read_newest_state(folder / "checkpoints")
    if state is None:
        raise CheckpointError("; ".join([*problems, f"{folder} has no model yet: its run has saved no checkpoint"]))
    model = checkpoint.model_of_state(state, folder_config(folder, classes=classes))
    if not quiet:
        for problem in problems:
            console.print(f"{problem}. The checkpoint before it is used", markup=False, soft_wrap=True)
        console.print(f"the run is not finished: its checkpoint at step {state.facts['progress']['step']} is used")
    return model, {"about": {}}


def image_data(config: TrainConfig) -> ImageData:
    """Return the data of a configuration.

    Raises:
        RunError: the data is no source of images.
    """
    if not isinstance(config.data, ImageData):
        raise RunError(f"data {type(config.data).__name__} holds no images; the command needs a run on images")
    return config.data


@contextlib.contextmanager
def report_packages(product: str) -> Iterator[None]:
    """Within the block, a missing package is an error that names the extra which brings it.

    Args:
        product: of the block, such as "a report".

    Raises:
        RunError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise RunError(f"{product} needs {missing}: pip install 'equipoise[report]'") from error
