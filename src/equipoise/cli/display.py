"""Output of the command line: live progress on a terminal, plain lines elsewhere, tables at the end."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from equipoise.train import Observer, Result
from equipoise.train.proof import summarize
from equipoise.train.task import SCORES


class PlainDisplay(Observer):
    """Display of one line per epoch and evaluation.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = 0

    def started(self, folder: Path, total_steps: int, done_steps: int, parameters: int) -> None:
        self.total = total_steps
        self.say(f"run folder {folder}, {parameters:,} parameters, {total_steps:,} steps")

    def logged(self, line: dict[str, Any]) -> None:
        self.say(describe(line, self.total))

    def noted(self, text: str) -> None:
        self.say(text)

    def finished(self, result: Result) -> None:
        self.console.print(result_table(result))

    def stop(self) -> None:
        """Restore the terminal."""

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class TwoLines(Progress):
    """Progress bar with the latest figures in a second line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


class LiveDisplay(PlainDisplay):
    """Progress bar with remaining time and latest figures, below the plain lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = TwoLines(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("train", total=None, epoch=0, figures="")

    def started(self, folder: Path, total_steps: int, done_steps: int, parameters: int) -> None:
        super().started(folder, total_steps, done_steps, parameters)
        self.progress.update(self.task, total=total_steps, completed=done_steps)
        self.progress.start()

    def stepped(self, line: dict[str, Any]) -> None:
        self.progress.update(
            self.task,
            completed=line["step"],
            epoch=line["epoch"] + 1,
            figures=f"loss {line['loss']:.3f}  {_scores(line, 3)}  solver steps {line['mean_steps']:.1f}  "
            f"converged {line['converged']:.0%}",
        )

    def evaluating(self, split: str, done: int, total: int) -> None:
        self.progress.update(self.task, figures=f"{split} samples: {done:,} of {total:,}")

    def finished(self, result: Result) -> None:
        self.stop()
        super().finished(result)

    def stop(self) -> None:
        self.progress.stop()


def describe(line: Mapping[str, Any], total: int) -> str:
    """Format a line of the log."""
    place = f"step {line['step']}/{total}  " if line["split"] == "train" else ""
    lr = f"  lr {line['lr']:.2e}" if "lr" in line else ""
    epoch = line["epoch"] + (line["split"] != "test")  # counted from zero; the test follows the last epoch
    return (
        f"epoch {epoch:>3}  {line['split']:<10}  {place}"
        f"loss {line['loss']:.4f}  {_scores(line, 4)}  solver steps {line['mean_steps']:.1f}  "
        f"converged {line['converged']:.1%}{lr}  {line['seconds']:.1f} s"
    )


def _scores(line: Mapping[str, Any], digits: int) -> str:
    return "  ".join(f"{name} {line[key]:.{digits}f}" for key, name in SCORES.items() if key in line)


def result_table(result: Result) -> Table:
    """Return the table at the end of a training run."""
    return facts_table(
        {
            **{f"test {SCORES[name]}": f"{result.test[f'test_{name}']:.4f}" for name in result.scores},
            "mean solver steps per sample": f"{result.test['mean_steps']:.1f}",
            "certificate": summarize(result.test),
            "share of time in backward": f"{result.test['backward_share']:.0%}",
            "time": f"{result.test['seconds']:.0f} s",
            "run folder": str(result.run_dir),
        }
    )


def facts_table(facts: Mapping[str, str]) -> Table:
    """Return a table of names and values."""
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table
