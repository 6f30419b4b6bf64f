"""Tables of the benchmark of solver cost."""

from typing import Any

from benchmarks import harness

COLUMNS = ("forward_ratio", "backward_ratio", "evals", "seconds", "peak_states", "cosine")


def table(content: dict[str, Any]) -> str:
    """All methods by cell, then the figures that are not of a method."""
    figures = harness.figures_of(content)
    names = dict.fromkeys(key.rpartition("/")[0] for key in figures if key.count("/") == 2)
    others = [(key, harness.cell(value)) for key, value in figures.items() if key.count("/") == 1]
    columns = {key: (key.replace("_", " "), ".4g") for key in COLUMNS}
    return f"{harness.figure_table(names, columns, figures, {})}\n\n{harness.table(('figure', 'value'), others)}"
