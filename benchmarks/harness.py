"""Arguments, machine facts, records, clocks, means and tables of all benchmarks."""

import argparse
import concurrent.futures
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from equipoise.files import write_atomic
from equipoise.train import StepInfo

T = TypeVar("T")
Means = Mapping[str, float | None]
Options = Mapping[str, Mapping[str, Any]]  # keywords of `add_argument` by flag
FREE = ("out", "resume", "seeds", "workers")
TRAINED = StepInfo(step=2**40, epoch=0, seed=0)  # past all fixed-depth steps, the skip weight not decayed
DEVICE: Options = {"--device": {"choices": ("cpu", "cuda"), "default": "cpu"}}


class Record:
    """Arguments of a benchmark, and the JSON file of what it has measured.

    The file is written after each measurement, at once or not at all. With `--resume` it is read first, and
    measurements that it holds are not repeated.

    Args:
        name: of the benchmark's module, whose header `--help` prints.
        argv: arguments; None: those of the command line.
        quick: help text of `--quick`.
        seeds: default of `--seeds`; 0: there is no such argument.
        workers: default of `--workers`; 0: there is no such argument.
        options: further arguments.
        free: those of them that may differ when a record is resumed.
        packages: distributions whose versions are recorded, besides those of all benchmarks.
        summary: means and standard deviations, by key, of a record's content.

    Raises:
        SystemExit: the file exists and is not to be resumed, or is of other settings.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str] | None,
        *,
        quick: str,
        seeds: int = 0,
        workers: int = 0,
        options: Options | None = None,
        free: Sequence[str] = (),
        packages: Sequence[str] = (),
        summary: Callable[[dict[str, Any]], tuple[Means, Means]],
    ) -> None:
        _, self.question, _ = name.split(".")
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {self.question}",
            description=sys.modules[name].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--quick", action="store_true", help=quick)
        parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="[results/<date>.json]")
        parser.add_argument("--resume", action="store_true", help="keep what FILE holds, and measure what it lacks")
        parser.add_argument("--threads", type=int, default=1, help="of each process [1]")
        if seeds:
            parser.add_argument("--seeds", type=int, help=f"number of seeds [{seeds}; with --quick, 1]")
        if workers:
            parser.add_argument("--workers", type=int, help=f"processes that train [{workers}; with --quick, 1]")
        for flag, keywords in (options or {}).items():
            parser.add_argument(flag, **keywords)
        self.args = args = parser.parse_args(argv)
        for flag, default in (("seeds", seeds), ("workers", workers)):
            setattr(args, flag, getattr(args, flag, None) or (1 if args.quick else default))
        self.packages, self.summary = ("equipoise", *packages), summary
        self.path = args.out or self._default()
        settings = {key: value for key, value in vars(args).items() if key not in (*FREE, *free)}
        self.content: dict[str, Any] = {
            "date": "",
            "minutes": 0.0,
            "machine": {},
            "versions": {},
            "settings": json.loads(json.dumps(settings, default=str)),
            "figures": {},
            "spread": {},
        }
        if self.path.exists():
            self._resume(parser)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.began = time.time() - 60 * self.content["minutes"]
        torch.set_num_threads(args.threads)
        # Processes that start later read it when they import their libraries.
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(args.threads))

    def _default(self) -> pathlib.Path:
        if self.args.quick:
            return pathlib.Path(tempfile.mkdtemp()) / "quick.json"
        return pathlib.Path(__file__).parent / self.question / "results" / f"{time.strftime('%Y-%m-%d')}.json"

    def _resume(self, parser: argparse.ArgumentParser) -> None:
        if not self.args.resume:
            parser.error(f"--out: {self.path} exists; add --resume to continue it, or choose another FILE")
        content = json.loads(self.path.read_text())
        if content["settings"] != self.content["settings"]:
            parser.error(f"--out: {self.path} is of the settings {content['settings']}; choose another FILE")
        self.content = content

    @property
    def folder(self) -> pathlib.Path:
        """Folder beside the file for weights and runs."""
        return self.path.with_suffix(".runs").absolute()

    def find(self, *keys: object) -> Any:
        """Return the entry under nested keys, or None."""
        place: Any = self.content
        for key in keys:
            place = (place or {}).get(str(key))
        return place

    def put(self, value: Any, *keys: object) -> None:
        """Store an entry under nested keys, write the file and report progress."""
        *path, last = map(str, keys)
        place = self.content
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
        self.save()
        print(f"{self.content['minutes']:6.1f} min  {'/'.join(map(str, keys))}", flush=True)

    def measure(self, call: Callable[[], Any], *keys: object) -> Any:
        """Return the entry under nested keys; if there is none, call for it and store it."""
        if self.find(*keys) is None:
            self.put(call(), *keys)
        return self.find(*keys)

    def measure_all(self, jobs: Mapping[Any, Callable[[], Any]]) -> None:
        """Measure by several processes what the record lacks; with one worker, here."""
        waiting = {keys: call for keys, call in jobs.items() if self.find(*keys) is None}
        if self.args.workers == 1:
            for keys, call in waiting.items():
                self.measure(call, *keys)
            return
        with concurrent.futures.ProcessPoolExecutor(
            self.args.workers,
            multiprocessing.get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(self.args.threads,),
        ) as pool:
            futures = {pool.submit(call): keys for keys, call in waiting.items()}
            for done in concurrent.futures.as_completed(futures):
                self.put(done.result(), *futures[done])

    def save(self) -> None:
        """Write the file: facts, means and standard deviations first."""
        means, spreads = self.summary(self.content)
        self.content |= {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": (time.time() - self.began) / 60,
            "machine": machine(getattr(self.args, "device", "cpu")),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in self.packages},
            },
            "figures": means,
            "spread": spreads,
        }
        write_atomic(self.path, (json.dumps(self.content, indent=1, allow_nan=False) + "\n").encode())

    def finish(self, table: Callable[[dict[str, Any]], str]) -> None:
        """Write the file, and its tables beside it in Markdown; print them."""
        self.save()
        text = table(self.content)
        self.path.with_suffix(".md").write_text(text + "\n")
        print(f"\n{text}\n\n{self.path}")


def report(argv: Sequence[str] | None = None) -> None:
    """Print the tables of a record, finished or not, and draw its figure if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=report.__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSON record")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG")
    args = parser.parse_args(argv)
    content = json.loads(args.file.read_text())
    question = content.get("question") or args.file.absolute().parents[1].name  # committed records lie in its folder
    module = importlib.import_module(f"benchmarks.{question}.report")
    if args.plot is not None and not hasattr(module, "plot"):
        parser.error(f"--plot: {question} has no figure; leave the flag out")
    print(module.table(content))
    if args.plot is not None:
        module.plot(content).savefig(args.plot)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts about the machine, and how busy it is."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def clock(device: str = "cpu") -> float:
    """Seconds: of the processor on one CPU thread, so that other programs do not count; else of the wall clock."""
    if device == "cpu":
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(names: Iterable[str], batches: Iterable[T]) -> Iterator[tuple[int, T, str]]:
    """Number, batch and name: all names take each batch, and another one is first from batch to batch."""
    order = list(names)
    for number, batch in enumerate(batches):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            yield number, batch, name


def median_ratio(own: Iterable[float], other: Iterable[float]) -> float:
    """Median of the ratios of paired times."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def endless(split: Any, size: int, seed: int) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
    """Epoch, number and batch of training data, shuffled anew in each epoch."""
    for epoch in itertools.count():
        for number, batch in enumerate(split.batches(size, shuffle=(seed, epoch))):
            yield epoch, number, batch


def descend(
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Tensor],
    rate: Callable[[int], float] | None = None,
    *,
    clip_norm: float | None = None,
) -> list[Tensor]:
    """Take an optimizer step on each loss, at the learning rate of its number; return the losses."""
    history = []
    for step, loss in enumerate(losses):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), clip_norm)
        optimizer.step()
        history.append(loss.detach())
    return history


def summarize(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means and sample standard deviations over the rows of each name, as `<name>/<figure>`.

    Values that are not numbers are left out; the mean of none is None.
    """
    means: dict[str, float | None] = {}
    spreads: dict[str, float] = {}
    for name, every in rows.items():
        found = list(every)
        for key in dict.fromkeys(key for row in found for key in row):
            values = [row[key] for row in found if isinstance(row.get(key), (int, float))]
            if values or all(row.get(key) is None for row in found):
                means[f"{name}/{key}".strip("/")] = statistics.fmean(values) if values else None
            if len(values) > 1:
                spreads[f"{name}/{key}".strip("/")] = statistics.stdev(values)
    return means, spreads


def over_seeds(content: Mapping[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over the runs of all seeds, and their standard deviations."""
    return summarize({"": content.get("runs", {}).values()})


def cell(value: float | None, form: str = ".3g", spread: float | None = None, missing: str = "-") -> str:
    """Number in a format, with its standard deviation if there is one."""
    if value is None:
        return missing
    return f"{value:{form}}" if spread is None else f"{value:{form}} ± {spread:{form}}"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown table."""
    titles = list(head)
    lines = [f"| {' | '.join(map(str, line))} |" for line in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]])


def figure_table(names: Iterable[str], columns: Mapping[str, tuple[str, str]], means: Means, spreads: Means) -> str:
    """Table of figures, a line for each name that has one; columns are title and format by figure."""
    rows = []
    for name in names:
        keys = {f"{name}/{key}": form for key, (_, form) in columns.items()}
        if keys.keys() & means.keys():
            rows.append([name, *(cell(means.get(key), form, spreads.get(key)) for key, form in keys.items())])
    return table(["", *(title for title, _ in columns.values())], rows)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries, by keys that are joined with slashes."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def figures_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a record; files of November 2026 hold them at the top level."""
    return content.get("figures") or {key: value for key, value in content.items() if "/" in key}


def spreads_of(content: Mapping[str, Any]) -> dict[str, float]:
    """Standard deviations of a record; files of November 2026 hold them beside the means, as `<figure>_std`."""
    found = {key[:-4]: value for key, value in figures_of(content).items() if key.endswith("_std")}
    return content.get("spread") or {key: value for key, value in found.items() if value is not None}
