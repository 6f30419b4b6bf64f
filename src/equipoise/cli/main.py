"""Commands: `equipoise recipes | train | evaluate | certify | predict | attack | reconstruct | tune | report`."""

import importlib
import sys
from collections.abc import Sequence

import equipoise
from equipoise.cli.errors import UsageError, fail
from equipoise.train.serialize import nearest

HELP = """\
usage: equipoise COMMAND ...

Train, evaluate and use equilibrium models; tune penalties by gradient.

commands:
  recipes      list the named recipes
  train        train a recipe, or a configuration file
  evaluate     accuracy and solver statistics of a run
  certify      prove from a run's weights that its map contracts, and how fast
  predict      classify image files with a run
  attack       change images slightly, such that a run's classifier errs
  reconstruct  recover an image from a noisy, blurred, small or torn one by a decoder
  tune         tune the penalties of a linear model of a table by gradient
  report       write report.html into a run's folder: curves, solver, mistakes

options:
  -h, --help     show this help; `equipoise COMMAND --help` shows that of a command
  --version      show the version
  --debug        with any command: show the traceback of an error

examples:
  equipoise train mdeq-digits --run-dir runs/demo
  equipoise train mdeq-digits --epochs 5 --solver Anderson --solver.memory 6 --gradient JacobianFree
  equipoise train --config runs/demo/config.yaml --run-dir runs/again
  equipoise evaluate runs/demo --solver.max_steps 6
  equipoise certify runs/demo
  equipoise predict runs/demo digit.png
  equipoise attack runs/demo --radius 0.5
  equipoise reconstruct runs/decoder small.png --task superres
  equipoise report runs/demo
  equipoise tune breast-cancer
"""


COMMANDS = {  # command: module
    "recipes": "train",
    **{name: name for name in ("train", "evaluate", "certify", "predict", "attack", "reconstruct", "report", "tune")},
}


def main(argv: Sequence[str] | None = None, *, classes: Sequence[type] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command and its arguments; None: those of the process.
        classes: that flags and files may name; None: `equipoise.zoo.CLASSES`.

    Returns:
        Exit code: 0, 1 for a failure, 2 for a command line that is not understood.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return run(arguments, classes)
    except KeyboardInterrupt as stop:
        return fail(f"interrupted{''.join(f'; {advice}' for advice in stop.args)}", 130)
    except SystemExit as end:  # raised by argparse after a help text
        return int(end.code or 0)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except UsageError as error:
        if debug:
            raise
        return fail(str(error), 2)
    except ImportError as error:
        if debug:
            raise
        return fail(f"{error}; the command line needs: pip install 'equipoise[train,data]'", 1)
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, (ValueError, OSError, ArithmeticError))
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows the traceback)"
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        return fail(text, 1)


def run(arguments: list[str], classes: Sequence[type] | None = None) -> int:
    """Run one command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        sys.stdout.write(f"equipoise {equipoise.__version__}\n")
        return 0
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command!r}; {nearest(command, COMMANDS)}")
    module = importlib.import_module(
        f"equipoise.cli.{COMMANDS[command]}"
    )  # torch takes seconds to import: not for --help
    from equipoise.zoo import CLASSES

    return int(getattr(module, command)(rest, CLASSES if classes is None else classes))
