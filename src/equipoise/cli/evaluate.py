"""`equipoise evaluate`: loss, scores and solver statistics of a run on a split."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from equipoise.cli.display import facts_table
from equipoise.cli.runs import evaluation_config, parse_run, run_model
from equipoise.files import RunError
from equipoise.train import evaluate as evaluate_split
from equipoise.train.proof import summarize
from equipoise.train.task import SCORES
from equipoise.zoo import CLASSES

EXAMPLES = """\
examples:
  equipoise evaluate runs/demo
  equipoise evaluate runs/demo --solver.max_steps 6 --split train
  equipoise evaluate runs/demo --solver Anderson --solver.rtol 1e-5 --json
"""


def evaluate(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Evaluate a run on a split."""
    config, options = parse_run(
        arguments,
        "evaluate",
        classes,
        recipe="mdeq-digits",
        own=[
            ("--split", {"choices": ["test", "validation", "train"], "default": "test", "help": "samples [test]"}),
            ("--json", {"action": "store_true", "help": "print JSON"}),
        ],
        fields=("data", "solver", "eval_batch_size", "precision", "accelerator", "channels_last"),
        description="Loss, scores and solver statistics of a run. In brackets: the values of the run.",
        examples=EXAMPLES,
        prepare=evaluation_config,
    )
    console = Console()
    model, _ = run_model(Path(options.run), classes, console, quiet=options.json)
    split = getattr(config.data.load(), options.split)
    if split is None:
        raise RunError("the run set no validation samples aside; evaluate --split test")
    model.to(torch.float64 if config.precision == "64-true" else torch.float32)
    start = time.perf_counter()
    found = evaluate_split(model, split, config, solver=config.solver)
    seconds = time.perf_counter() - start
    if options.json:
        sys.stdout.write(json.dumps({"run": options.run, "split": options.split, **found, "seconds": seconds}) + "\n")
        return 0
    rows = {
        "run": options.run,
        f"{options.split} samples": f"{found['count']:,}",
        **{SCORES[name]: f"{found[name]:.4f}" for name in config.task.scores},
        "loss": f"{found['loss']:.4f}",
        "mean solver steps per sample": f"{found['mean_steps']:.1f}",
        "converged": f"{found['converged']:.1%}",
        "mean relative residual": f"{found['residual']:.2e}",
        "certificate": summarize(found, config.solver.max_steps),
        "time": f"{seconds:.1f} s",
    }
    console.print(facts_table(rows))
    return 0
