"""`equipoise report`: a page about a run."""

from collections.abc import Sequence

from rich.console import Console

from equipoise.cli.errors import UsageError
from equipoise.cli.runs import parse_run, report_packages
from equipoise.zoo import CLASSES

DESCRIPTION = """\
Write report.html into the folder of a run, finished or not: learning curves, solver statistics, residuals per solver
step, mistakes and confusion matrix, in one file that needs no network."""
EXAMPLES = "examples:\n  equipoise report runs/demo\n  equipoise report runs/demo --images 10000\n"


def report(arguments: list[str], classes: Sequence[type] = CLASSES) -> int:
    """Write the report of a run."""
    _, options = parse_run(
        arguments,
        "report",
        classes,
        recipe="mdeq-digits",
        own=[("--images", {"type": int, "metavar": "N", "default": 2000, "help": "test images to look at, at most"})],
        fields=(),
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    if options.images < 1:
        raise UsageError(f"--images {options.images}: must be >= 1")
    with report_packages("a report"):
        from equipoise.report import write_report
    path = write_report(options.run, max_images=options.images, classes=classes)
    Console().print(f"report {path}", markup=False, highlight=False, soft_wrap=True)
    return 0
