"""`equipoise tune`: fit a linear model to a table, with penalties found by gradient."""

import argparse
import io
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from equipoise.bilevel import OuterStep
from equipoise.cli.display import TwoLines, facts_table
from equipoise.cli.errors import UsageError
from equipoise.cli.flags import Option, parse_own
from equipoise.files import RunError, write_atomic
from equipoise.gradients import Gradient, Implicit, JacobianFree, Shine
from equipoise.solvers import CG
from equipoise.train.run_folder import new_folder
from equipoise.train.serialize import nearest

GRADIENTS: dict[str, Gradient] = {
    "Shine": Shine(fallback_ratio=math.inf),
    "Implicit": Implicit(solver=CG(max_steps=1000)),
    "JacobianFree": JacobianFree(),
}
NAMES = {"accuracy": "accuracy", "r2": "R²"}
PENALTIES = {"shared": None, "per-feature": "feature", "per-class": "output"}
MAX_CLASSES = 100  # integer labels with more values are targets of a regression
FILES = ("config.json", "history.jsonl", "model.safetensors", "result.json", "loss.png")
EXAMPLES = """\
examples:
  equipoise tune breast-cancer
  equipoise tune rows.csv --label price --task regression --run-dir runs/price
  equipoise tune letters.parquet --penalty per-class --gradient Implicit --seed 1
  equipoise tune rows.libsvm --penalty per-feature --max-steps 60 --json

The model predicts new rows in Python:
  from equipoise.estimators import load, read_rows
  model = load("runs/price/model.safetensors")
  model.predict(read_rows("new.csv", model.encoding_))
"""


def tune(arguments: list[str], classes: Sequence[type] = ()) -> int:
    """Tune the penalties of a linear model by gradient."""
    options = _parse(arguments)
    # The other commands work without scikit-learn.
    from equipoise.estimators import read_table, save

    table = read_table(options.data, label=options.label, drop=options.drop)
    console = Console(quiet=options.json)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for note in table.notes:
        say(note)
    task, reason = _task(table.y, options.task)
    say(f"{table.name}: {table.X.shape[0]:,} rows, {table.X.shape[1]:,} features; {task}, {reason}")
    model = _model(task, options, len(np.unique(table.y)))
    train, test = _split(table.y, task, options)
    folder = Path(options.run_dir) if options.run_dir is not None else new_folder(f"tune-{Path(options.data).stem}")
    score = "accuracy" if task == "classification" else "r2"
    run = _Run(folder, score, {**vars(options), "task": task})
    say(f"run folder {folder}")
    start = time.perf_counter()
    for warning in _fit(model, table.X[train], table.y[train], run, console):
        say(f"note: {warning}")
    seconds = time.perf_counter() - start
    tested = float(model.score(table.X[test], table.y[test])) if len(test) else None
    alphas = np.atleast_1d(model.alpha_).tolist()
    result = {
        "data": table.name,
        "task": task,
        "alpha": alphas,
        "held_out_loss": model.validation_loss_,
        f"held_out_{score}": _finite(model.validation_score_),
        f"test_{score}": tested,
        "status": model.outer_status_.name,
        "outer_steps": model.n_iter_,
        "gradient_evals": model.outer_history_[-1].gradient_evals,
        "seconds": seconds,
        "run_dir": str(folder),
    }
    save(model, folder / "model.safetensors", encoding=table.encoding, about={"result": result})
    run.finish(result, say)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    named = NAMES[score]
    facts = {
        "penalty alpha": _span(alphas),
        "held-out loss": f"{model.validation_loss_:.6g}",
        f"held-out {named}": f"{model.validation_score_:.4f}",
        f"test {named}": "no test rows" if tested is None else f"{tested:.4f}, {len(test):,} rows",
        "search": f"{model.outer_status_.name}: {model.outer_status_.remedy}",
        "outer steps": str(model.n_iter_),
        "gradients of the training loss": f"{result['gradient_evals']:,}",
        "time": f"{seconds:.1f} s",
        "run folder": str(folder),
    }
    console.print(facts_table(facts))
    return 0


def _finite(value: float) -> float | None:
    """Return a number as JSON has it."""
    return value if math.isfinite(value) else None


def _span(alphas: Sequence[float]) -> str:
    """Format one penalty, or the range of several."""
    return f"{alphas[0]:.4g}" if len(alphas) == 1 else f"{min(alphas):.3g} to {max(alphas):.3g} ({len(alphas)})"


class _Run:
    """Run folder of a search: configuration, outer steps, model, result and figure.

    Args:
        folder: path of the folder.
        score: key of the score, `accuracy` or `r2`.
        config: options of the search.

    Raises:
        RunError: the folder holds a run that the options do not overwrite.
    """

    def __init__(self, folder: Path, score: str, config: dict[str, Any]) -> None:
        self.folder, self.score = folder, score
        self.lines: list[dict[str, Any]] = []
        if any((folder / name).exists() for name in (*FILES, "config.yaml")) and not config["overwrite"]:
            raise RunError(f"{folder} already holds a run; replace it with --overwrite, or choose another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def log(self, step: OuterStep, score: float) -> None:
        """Append an outer step and its score to `history.jsonl`."""
        line = {
            "step": step.step,
            "held_out_loss": _finite(step.value),
            f"held_out_{self.score}": _finite(score),
            "log_alpha": step.hyper[0].tolist(),
            "gradient_norm": _finite(step.gradient_norm),
            "accepted": step.accepted,
            "inner_converged": step.inner_converged,
            "gradient_evals": step.gradient_evals,
            "seconds": step.seconds,
        }
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.lines.append(line)

    def finish(self, result: dict[str, Any], say: Any) -> None:
        """Write the figure, then `result.json`."""
        try:
            from equipoise.report.tuning import search_figure
        except ImportError as error:
            say(f"no figure: it needs {error.name}: pip install 'equipoise[report]'")
        else:
            picture = io.BytesIO()
            search_figure(self.lines, "held-out loss").savefig(picture, format="png", dpi=140)
            write_atomic(self.folder / "loss.png", picture.getvalue())
        write_atomic(self.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())


def _fit(model: Any, X: Any, y: np.ndarray, run: _Run, console: Console) -> list[str]:
    """Fit with a progress bar on a terminal and a line for each outer step elsewhere; returns the warnings."""
    bar = TwoLines(
        TextColumn("outer step"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("at most"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("tune", total=model.max_iter, figures="")

    def observe(step: OuterStep, score: float) -> None:
        run.log(step, score)
        text = (
            f"alpha {_span(step.hyper[0].exp().tolist())}  held-out loss {step.value:.6g}  "
            f"{NAMES[run.score]} {score:.4f}{'' if step.accepted else '  (rejected)'}  "
            f"gradients {step.gradient_evals:,}"
        )
        bar.update(task, completed=step.step, figures=text)
        if not console.is_terminal:
            console.print(f"step {step.step:>3}  {text}  {step.seconds:.1f} s", highlight=False, soft_wrap=True)

    with bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, y, observe=observe)
    return [str(warning.message) for warning in caught]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    flags: list[Option] = [
        (
            "data",
            {"metavar": "DATA", "help": "file (.csv, .tsv, .parquet, .npz, libsvm text), breast-cancer or diabetes"},
        ),
        ("--task", {"choices": ["classification", "regression"], "help": "kind of model [guessed from the labels]"}),
        ("--label", {"metavar": "COLUMN", "help": "label column [label, or else the last]"}),
        ("--drop", {"metavar": "COLUMN", "nargs": "+", "default": [], "help": "columns to leave out"}),
        ("--penalty", {"default": "shared", "help": f"{', '.join(PENALTIES)} [shared]"}),
        ("--gradient", {"default": "Shine", "help": f"{', '.join(GRADIENTS)} [Shine]"}),
        ("--validation-fraction", {"type": float, "default": 0.25, "help": "share held out to choose the penalties"}),
        ("--test-fraction", {"type": float, "default": 0.2, "help": "share held out to test the final model"}),
        ("--max-steps", {"type": int, "default": 30, "help": "largest number of outer steps"}),
        ("--seed", {"type": int, "default": 0, "help": "seed of the splits"}),
        ("--run-dir", {"metavar": "FOLDER", "help": "run folder [runs/tune-DATA-NUMBER]"}),
        ("--overwrite", {"action": "store_true", "help": "replace the run in the folder"}),
        ("--json", {"action": "store_true", "help": "print only the result, as JSON"}),
    ]
    options = parse_own(
        arguments,
        flags,
        usage="equipoise tune DATA [flags]",
        description="Fit a logistic or a ridge regression to a table, with the penalties that minimize the loss on\n"
        "held-out rows, found by gradient.",
        examples=EXAMPLES,
    )
    for name, choices in (("penalty", PENALTIES), ("gradient", GRADIENTS)):
        if getattr(options, name) not in choices:
            raise UsageError(
                f"--{name}: unknown {getattr(options, name)!r}; {nearest(getattr(options, name), choices)}"
            )
    if not 0 < options.validation_fraction < 1:
        raise UsageError(f"--validation-fraction {options.validation_fraction:g}: must lie between 0 and 1")
    if not 0 <= options.test_fraction < 1:
        raise UsageError(f"--test-fraction {options.test_fraction:g}: must be at least 0 and less than 1")
    if options.max_steps < 1:
        raise UsageError(f"--max-steps {options.max_steps}: must be >= 1")
    return options


def _task(y: np.ndarray, given: str | None) -> tuple[str, str]:
    """Return classification or regression, and the reason."""
    values = len(np.unique(y))
    if y.dtype.kind == "U":
        if given == "regression":
            raise UsageError("--task regression: the labels are strings; name a numeric column with --label")
        return "classification", f"{values:,} classes"
    whole = y.dtype.kind == "i"
    guess = "classification" if whole and values <= min(MAX_CLASSES, max(2, len(y) // 10)) else "regression"
    if given == "classification" and not whole:
        raise UsageError(f"--task classification: the labels are {values:,} different numbers, not integers")
    if given is not None:
        return given, f"as given by --task {given}"
    if not whole:
        return guess, f"as the labels are {values:,} different numbers"
    other = "regression" if guess == "classification" else "classification"
    return guess, f"as the labels are {values:,} different integers (--task {other} overrides)"


def _model(task: str, options: argparse.Namespace, values: int) -> Any:
    from equipoise.estimators import BilevelLogisticRegression, BilevelRidge

    if values < 2:
        raise RunError(f"{options.data}: all labels are the same; name another column with --label")
    if options.penalty == "per-class" and (task == "regression" or values == 2):
        raise UsageError("--penalty per-class: needs three or more classes; take shared or per-feature")
    cls = BilevelLogisticRegression if task == "classification" else BilevelRidge
    return cls(
        groups=PENALTIES[options.penalty],
        gradient=GRADIENTS[options.gradient],
        validation_fraction=options.validation_fraction,
        max_iter=options.max_steps,
        random_state=options.seed,
    )


def _split(y: np.ndarray, task: str, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return training and test rows, with about the same share of each class."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(y))
    if options.test_fraction == 0:
        return rows, rows[:0]
    classes = y if task == "classification" else None
    try:
        train, test = train_test_split(
            rows, test_size=options.test_fraction, random_state=options.seed, stratify=classes
        )
    except ValueError as error:
        raise RunError(f"{options.data} cannot be split: {error}; --test-fraction 0 holds out no test rows") from error
    return train, test
