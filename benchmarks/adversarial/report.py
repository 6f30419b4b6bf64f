"""Table of the adversarial benchmark."""

from typing import Any

from benchmarks import harness

SCORES = ("accuracy", "foolbox", "joint_attack", "foolbox_long", "foolbox_radius_4")
COLUMNS = {key: (key.replace("_", " "), ".1%") for key in SCORES} | {
    "evals": ("evaluations", ",.0f"),
    "vjps": ("products", ",.0f"),
    "seconds": ("seconds", ".1f"),
    "speedup_over_pgd": ("speedup over pgd", ".2f"),
    "speedup_over_pgd-tol": ("over pgd-tol", ".2f"),
}


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means and standard deviations over seeds; ratios of costs over the seeds that have both methods."""
    rows: dict[str, list[dict[str, float]]] = {}
    for data, seeds in content.get("runs", {}).items():
        for found in seeds.values():
            methods = {method: row for method, row in found.items() if isinstance(row, dict)}
            for method, row in methods.items():
                speedups = {f"speedup_over_{other}": methods[other]["seconds"] / row["seconds"]
                            for other in ("pgd", "pgd-tol") if other in methods}  # fmt: skip
                rows.setdefault(f"{data}/{method}", []).append(row | speedups)
    return harness.summarize(rows)


def table(content: dict[str, Any]) -> str:
    """Figures of all trainings."""
    means, spreads = summary(content)
    return harness.figure_table(dict.fromkeys(key.rpartition("/")[0] for key in means), COLUMNS, means, spreads)
