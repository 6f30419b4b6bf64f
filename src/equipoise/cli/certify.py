"""`equipoise certify`: certificate of the map of a run, and measurements at images."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from equipoise.cli.display import facts_table
from equipoise.cli.errors import UsageError
from equipoise.cli.runs import parse_run, run_model
from equipoise.contraction.certificate import Certificate
from equipoise.core.solution import Solution
from equipoise.files import RunError
from equipoise.gradients import Implicit
from equipoise.train.device import to_device
from equipoise.train.proof import Proof, prove
from equipoise.zoo import CLASSES, EquilibriumClassifier, MDEQConfig

DESCRIPTION = """\
Prove from the weights of a run that its map contracts: the Lipschitz constant without and with the dropout of training,
the largest number of evaluations per image, and the number that test images take. All bounds are computed from the
weights in evaluation mode; in training mode caps are followed within some percent.
The exit code is 0 if the map provably contracts in evaluation, and 1 if not."""
EXAMPLES = """\
examples:
  equipoise certify runs/demo
  equipoise certify runs/demo --images 200 --rtol 1e-6
  equipoise certify runs/demo --json
"""


def certify(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Prove that the map of a run contracts."""
    config, options = parse_run(
        arguments,
        "certify",
        classes,
        recipe="lipschitz-digits",
        own=[
            (
                "--images",
                {"type": int, "metavar": "N", "default": 32, "help": "test images to measure at [32]"},
            ),
            ("--rtol", {"type": float, "metavar": "R", "default": 1e-3, "help": "wanted relative error [0.001]"}),
            ("--json", {"action": "store_true", "help": "print JSON"}),
        ],
        fields=("data",),
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    if options.images < 0:
        raise UsageError(f"--images {options.images}: must be >= 0")
    if not options.rtol > 0:
        raise UsageError(f"--rtol {options.rtol:g}: must be > 0")
    console = Console()
    model, _ = run_model(Path(options.run), classes, console, quiet=options.json)
    if not isinstance(model, EquilibriumClassifier):
        raise RunError(f"{options.run} holds a {type(model).__name__}, and certify is for classifiers")
    images, labels = None, None
    if options.images:
        batch = next(iter(config.data.load().test.batches(options.images)))
        images, labels = to_device(config, *batch, torch.device("cpu"))
    proof = prove(
        model,
        solver=config.eval_solver,
        solve=None if images is None else lambda model: config.task.solve(model, images),
    )
    observed = None
    if proof.reason is None and images is not None and labels is not None:
        observed = _observe(model, proof, images, labels, options.rtol)
    if options.json:
        content = {
            "run": options.run,
            "certified": proof.reason is None,
            **proof.as_dict(),
            "rtol": options.rtol,
            "images": 0 if images is None else len(images),
            "predicted": {mode: _predicted(found, options.rtol) for mode, found in _modes(proof)},
            "observed": observed,
        }
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        _show(console, options.run, model, proof, options.rtol, observed, 0 if images is None else len(images))
    return 0 if proof.reason is None else 1


def _modes(proof: Proof) -> Iterator[tuple[str, Certificate]]:
    """Yield the available certificates with their modes."""
    for mode, found in (("evaluation", proof.evaluation), ("training", proof.training)):
        if found is not None:
            yield mode, found


def _predicted(certificate: Certificate, rtol: float) -> int | None:
    """Return the largest number of evaluations of the certified solver, forward and backward."""
    return certificate.solver(rtol=rtol).max_steps if certificate.contracts else None


def _observe(
    model: EquilibriumClassifier, proof: Proof, images: Tensor, labels: Tensor, rtol: float
) -> dict[str, dict[str, Any]]:
    """Count evaluations at images, forward and backward, with the certified solver."""
    assert proof.evaluation is not None
    solver = proof.evaluation.solver(rtol=rtol)
    adjoint: list[Solution[Tensor]] = []
    with model.deq.using(solver=solver, gradient=Implicit(solver=solver, observe=adjoint.append)):
        logits, forward = model.classify(images)
        F.cross_entropy(logits, labels).backward()
    model.zero_grad()
    return {"forward": _counts(forward), "backward": _counts(adjoint[0])}


def _counts(solution: Solution[Any]) -> dict[str, Any]:
    steps = solution.num_steps.double()
    return {
        "mean": float(steps.mean()),
        "most": int(steps.max()),
        "converged": float(solution.converged.double().mean()),
    }


def _show(
    console: Console,
    run: str,
    model: EquilibriumClassifier,
    proof: Proof,
    rtol: float,
    observed: dict[str, dict[str, Any]] | None,
    count: int,
) -> None:
    """Print the certificate."""
    facts = {"run": run, "model": type(model).__name__}
    if isinstance(model.config, MDEQConfig):
        layers, dropout = model.config.contraction, model.config.dropout
        facts["layers"] = "those of the published MDEQ" if layers is None else str(layers)
        facts["dropout"] = f"{dropout:g}, counted in training alone" if dropout else "none"
    console.print(facts_table(facts))
    modes = dict(_modes(proof))
    if modes:
        console.print("\n[bold]how far level z_j can move f_i[/bold]  |f_i(z) - f_i(z')| <= sum_j M_ij |z_j - z'_j|")
        console.print(Columns([_matrix(mode, found) for mode, found in modes.items()]))
        console.print(_numbers(modes, rtol, observed, count))
    verdict = "[green]certified[/green]" if proof.reason is None else "[red]not certified[/red]"
    console.print(f"{verdict}: {escape(_verdict(proof, rtol))}", highlight=False)


def _verdict(proof: Proof, rtol: float) -> str:
    if proof.evaluation is None or proof.reason is not None:
        return str(proof.reason)
    found = proof.evaluation
    norm = "" if found.norm < 1 else "weighted "
    text = (
        f"every input has one equilibrium, and each step of plain iteration brings the {norm}distance to it down to "
        f"{math.ceil((found.lipschitz or 0) * 1000) / 10:.1f}% at most"
    )
    if proof.training is not None and not proof.training.contracts:
        text += "; in training, with dropout, this is not proved"
    return text


def _matrix(mode: str, found: Certificate) -> Table:
    """Return the block matrix as a table, one row and one column per level."""
    table = Table(title=f"M in {mode}", title_justify="left")
    table.add_column("", style="bold")
    for j in range(len(found.block_matrix)):
        table.add_column(f"z_{j}", justify="right")
    for i, row in enumerate(found.block_matrix):
        table.add_row(f"f_{i}", *(f"{value:.4f}" for value in row))
    return table


def _numbers(
    modes: dict[str, Certificate], rtol: float, observed: dict[str, dict[str, Any]] | None, count: int
) -> Table:
    """Return a table of the bounds of each mode and of the measurements."""
    table = Table()
    table.add_column("", style="bold")
    for mode in modes:
        table.add_column(mode, justify="right")

    def row(name: str, value: Callable[[Certificate], str]) -> None:
        table.add_row(name, *map(value, modes.values()))

    row("Euclidean norm of M", lambda found: f"{found.norm:.4f}")
    row("Perron radius of M", lambda found: f"{found.radius:.4f}")
    row("weights of the levels", lambda found: ", ".join(f"{weight:.3f}" for weight in found.weights))
    row(
        f"largest norm of the Jacobian at {count} images",
        lambda found: "" if found.measured is None else f"{found.measured:.4f}",
    )
    row("share of the bound", lambda found: "" if found.tightness is None else f"{found.tightness:.0%}")
    row("solver", lambda found: type(found.solver(rtol=rtol)).__name__ if found.contracts else "")
    row(
        f"evaluations to rtol {rtol:g}, forward and backward, at most",
        lambda found: str(_predicted(found, rtol)) if found.contracts else "no bound",
    )
    for way, seen in (observed or {}).items():
        text = f"{seen['most']}, {seen['mean']:.1f} on average"
        row(f"most of {count} images, {way}", lambda found, text=text: "" if found.training else text)  # type: ignore[misc]
    return table
