"""Tables of the benchmark of input optimization."""

from typing import Any

from benchmarks import harness

COLUMNS = ("step", "rounds", "evals", "vjps", "ms", "speedup over cold", "ratio to best warm", "lost")


def summary(content: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Work and times of each method, and ratios to the fastest cold and warm loops."""
    figures: dict[str, float | None] = {}
    for name, details in content.get("details", {}).items():
        seconds = content.get("times", {}).get(name, {})
        cold, warm = (
            min((s for label, s in seconds.items() if kind in label), default=None)
            for kind in ("-cold-paper", "-warm-")
        )
        for label, detail in details.items():
            taken = seconds.get(label)
            if label != "layer":
                figures |= {
                    f"{name}/{label}/seconds": taken,
                    f"{name}/{label}/evals": detail["evals"],
                    f"{name}/{label}/vjps": detail["vjps"],
                    f"{name}/{label}/speedup_over_cold": cold / taken if taken and cold else None,
                    f"{name}/{label}/ratio_to_best_warm": taken / warm if taken and warm else None,
                }
    return figures, {}


def table(content: dict[str, Any]) -> str:
    """A table for each problem."""
    figures, parts = harness.figures_of(content), ["# Input optimization to equal cost"]
    for name, details in content["details"].items():
        layer, rows = details["layer"], []
        for label, detail in details.items():
            if label == "layer":
                continue
            keys = ("evals", "vjps", "seconds", "speedup_over_cold", "ratio_to_best_warm")
            evals, vjps, seconds, speedup, ratio = (figures[f"{name}/{label}/{key}"] for key in keys)
            cells = [detail["step"], detail["rounds"], evals, vjps, seconds and 1000 * seconds, speedup, ratio]
            rows.append([label, *map(harness.cell, cells), f"{detail['lost']:.0%}"])
        parts += [
            f"## {name}",
            f"Spectral radius at the solution {layer['spectral_radius_median']:.2f} (median); mean cost "
            f"{layer['start_cost']:.3f} at the start, {layer['best_cost']:.3f} at best.",
            harness.table(("method", *COLUMNS), rows),
        ]
    return "\n\n".join(parts)
