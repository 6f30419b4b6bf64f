"""How well a shared inverse estimate inverts, in the direction that the outer loss asks about.

    python -m benchmarks.inversion_quality.run [--quick] [--threads N] --json FILE [--plot PNG]

Claim: with outer-problem awareness (OPA) the estimate that the forward solver holds is right in the prescribed
direction, at a few more evaluations (L-BFGS) or products (adjoint Broyden), where without it it is right in the
directions of its own steps alone.

L-BFGS. The second figure of the SHINE paper: L2 logistic regression on a fifth of the breast-cancer data (113 samples,
features divided by their deviations, sum of losses plus |z|^2 / 2), 100 starts ~ N(0, I) in one batch, each with a
direction ~ N(0, I) of its own, absolute tolerance 1e-6, 60 pairs. M u is compared with the exact product for u the
prescribed direction, the Hessian times the last step ("krylov"), and another random direction.

    cosine, ratio   of M u with the exact H^-1 u; of their norms
    evals           gradients of the objective per run, mean

"nearly exact" searches (wolfe=9e-4, M_0 = I) are the published setting, "default" ones have wolfe=0.9 and M_0 = I. Ours
probe after the first step, then after every fifth; the published runs after every fifth.

MDEQ. The small model of the recipe mdeq-digits, trained with SHINE as the recipe says, and looked at on the way. On
training images in evaluation mode, float64: cosine of w, as estimated from a forward solve with the settings of the
recipe, with the exact w at the exact equilibrium; median over the images. The exact one comes from a solve to 1e-9; the
largest residuals of both its solves are in the results, and images where a solve did not arrive are left out and
counted. One seed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import pathlib
import platform
import time
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor

import equipoise as eq
from equipoise import zoo
from equipoise.core.function_map import DescentMap
from equipoise.data import TensorSplit
from equipoise.files import write_atomic
from equipoise.train import StepInfo
from equipoise.zoo import EquilibriumClassifier, MDEQCell

# --- L-BFGS ---------------------------------------------------------------------------------------------------------

KINDS = ("prescribed", "krylov", "random")
NEARLY_EXACT = eq.LBFGS(max_steps=500, memory=60, rtol=0, atol=1e-6, wolfe=9e-4, scaled=False)
DEFAULT = dataclasses.replace(NEARLY_EXACT, wolfe=0.9)
SETTINGS = {
    "nearly exact, OPA off": NEARLY_EXACT,
    "nearly exact, OPA 5": dataclasses.replace(NEARLY_EXACT, outer_every=5),
    "nearly exact, OPA 1": dataclasses.replace(NEARLY_EXACT, outer_every=1, memory=200),
    "default, OPA off": DEFAULT,
    "default, OPA 5": dataclasses.replace(DEFAULT, outer_every=5),
    "default, OPA 1": dataclasses.replace(DEFAULT, outer_every=1, memory=200),
}
# Median and least cosine, median ratio and its range: the authors' solver with their settings, run again.
PUBLISHED = {
    ("OPA 5", "prescribed"): (0.99996, 0.9957, 1.0003, 0.990, 1.047),
    ("OPA 5", "krylov"): (1.0, 1.0, 1.0, 1.0, 1.0),
    ("OPA 5", "random"): (0.99865, 0.9913, 1.035, 1.009, 1.112),
    ("OPA off", "prescribed"): (0.99909, 0.9882, 1.0325, 1.002, 1.125),
    ("OPA 1", "prescribed"): (1.0, 0.9978, 1.0, 1.0, 1.113),
}


@dataclasses.dataclass(frozen=True)
class Inversion:
    """Of each run: cosine and ratio of norms, by kind of direction, and evaluations."""

    cosine: dict[str, Tensor]
    ratio: dict[str, Tensor]
    evals: float


def invert(solver: eq.LBFGS, runs: int) -> Inversion:
    x, y = load_breast_cancer(return_X_y=True)
    x, _, y, _ = train_test_split(x / x.std(0), 2.0 * y - 1, train_size=0.2, random_state=3)
    margins = torch.tensor(x * y[:, None])
    size = margins.shape[1]
    z0, v, other = torch.randn(3, runs, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if solver.outer_every is not None:
        solver = dataclasses.replace(solver, outer_loss=lambda z, rows: (z * v[rows]).sum(1))
    f = DescentMap(lambda z: F.softplus(-z @ margins.T).sum(1) + 0.5 * z.square().sum(1), z0, params=())
    solution = solver.solve(f, z0).raise_for_status()
    pairs = eq.LBFGS.pairs_of(solution)
    assert solution.inverse is not None
    assert pairs is not None
    p = torch.sigmoid(-solution.value @ margins.T)
    hessian = torch.einsum("bn,ni,nj->bij", p * (1 - p), margins, margins) + torch.eye(size, dtype=torch.float64)
    last = torch.bmm(hessian, pairs[0][:, -1, :, None])[..., 0]
    cosine, ratio = {}, {}
    for kind, u in zip(KINDS, (v, last, other), strict=True):
        estimate, exact = solution.inverse.mv(u), torch.linalg.solve(hessian, u)
        cosine[kind] = F.cosine_similarity(estimate, exact)
        ratio[kind] = estimate.norm(dim=1) / exact.norm(dim=1)
    return Inversion(cosine, ratio, float(solution.num_steps.double().mean()))


# --- MDEQ -----------------------------------------------------------------------------------------------------------

RECIPE = zoo.mdeq_digits()
ADJOINT = eq.AdjointBroyden(max_steps=18, memory=18, rtol=1e-2)
AWARE = dataclasses.replace(ADJOINT, outer_every=5, memory=18 + 18 // 5 + 1)
VANILLA = eq.Shine(fallback_ratio=math.inf)
TIGHT = eq.Broyden(max_steps=400, memory=400, rtol=1e-9)
ESTIMATORS: dict[str, tuple[eq.Solver, eq.Gradient]] = {
    "Jacobian-free": (RECIPE.solver, eq.JacobianFree()),
    "SHINE, Broyden": (RECIPE.solver, VANILLA),
    "SHINE, adjoint Broyden": (ADJOINT, VANILLA),
    "SHINE, adjoint Broyden, OPA 5": (AWARE, VANILLA),
    "Neumann, 5 products": (RECIPE.solver, eq.Neumann(steps=5)),
    "SHINE refined by 5 steps": (
        RECIPE.solver,
        eq.Implicit(solver=eq.Broyden(max_steps=6, memory=6, rtol=0), start=VANILLA),
    ),
}


class Adjoint:
    """A model at some moment of its training: the cotangent `w` of a batch's losses, by any solver and gradient."""

    def __init__(self, model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.labels = labels
        with torch.no_grad():
            self.u = self.model.stem(images.double())
        self.cell = self.model.deq.cell
        assert isinstance(self.cell, MDEQCell)
        self.z0 = self.cell.zeros(self.u)

    def loss(self, z: Any, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.model.head(z), self.labels[rows], reduction="none")

    def w(self, solver: eq.Solver, gradient: eq.Gradient) -> tuple[Tensor, eq.Solution]:
        """The gradient of what is added to the map is `w` itself: `(B, D)`; and the forward solution."""
        if isinstance(solver, eq.AdjointBroyden) and solver.outer_every is not None:
            solver = dataclasses.replace(solver, outer_loss=self.loss)
        added = [torch.zeros_like(level).requires_grad_() for level in self.z0]

        def f(z: tuple[Tensor, ...], u: Any, added: list[Tensor]) -> tuple[Tensor, ...]:
            return tuple(level + more for level, more in zip(self.cell(z, u), added, strict=True))

        solution = eq.fixed_point(f, self.z0, self.u, added, solver=solver, gradient=gradient, params=())
        total = self.loss(solution.value, torch.arange(len(self.labels))).sum()
        grads = torch.autograd.grad(total, added)
        return torch.cat([grad.flatten(1) for grad in grads], dim=1), solution


def look(model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Cosines of all estimators, and what is known of the reference."""
    adjoint = Adjoint(model, images, labels)
    reports: list[eq.Solution] = []
    exact, solution = adjoint.w(TIGHT, eq.Implicit(solver=TIGHT, observe=reports.append))
    good = solution.converged & reports[0].converged
    size = torch.cat([level.detach().flatten(1) for level in solution.value], dim=1).norm(dim=1)
    figures = {
        "reference_images": float(good.sum()),
        "reference_residual_forward": float((solution.residual / size)[good].max()),
        "reference_residual_adjoint": float(reports[0].residual[good].max()),
        "spectral_radius": float(eq.nn.spectral_radius(solution)[good].median()),
    }
    for name, (solver, gradient) in ESTIMATORS.items():
        w, found = adjoint.w(solver, gradient)
        figures[f"{name}/cosine"] = float(F.cosine_similarity(w, exact)[good].median())
        figures[f"{name}/cosine of the batch"] = float(F.cosine_similarity(w[good].flatten(), exact[good].flatten(), 0))
        figures[f"{name}/ratio"] = float((w.norm(dim=1) / exact.norm(dim=1))[good].median())
        figures[f"{name}/evals"] = float(found.num_steps.double().mean())
        figures[f"{name}/forward products"] = float(found.num_vjps)
    return figures


def train(steps: list[int], count: int) -> dict[int, dict[str, float]]:
    """Train as the recipe says and look at the given steps, on `count` of the training images."""
    torch.manual_seed(0)
    split = RECIPE.data.load().train
    assert isinstance(split, TensorSplit)
    labels = split.labels
    images = RECIPE.data.prepare(split.images)
    model = RECIPE.build()
    objective = RECIPE.objective(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE.optimizer.lr)
    figures = {}
    for step in range(max(steps) + 1):
        if step in steps:
            figures[step] = look(model, images[:count], labels[:count])
            with torch.no_grad():
                answers = copy.deepcopy(model).eval()(images[:count]).argmax(1)
            figures[step]["accuracy"] = float((answers == labels[:count]).double().mean())
        batch = torch.randint(len(images), (RECIPE.batch_size,))
        loss, _ = objective(images[batch], labels[batch], StepInfo(step=step, epoch=0, seed=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return figures


# --- results --------------------------------------------------------------------------------------------------------


def five(inversion: Inversion, kind: str) -> tuple[float, float, float, float, float]:
    cosine, ratio = inversion.cosine[kind], inversion.ratio[kind]
    return tuple(map(float, (cosine.median(), cosine.min(), ratio.median(), ratio.min(), ratio.max())))  # type: ignore[return-value]


def table(inversions: dict[str, Inversion]) -> str:
    head = ("setting", "direction", "cosine: median", "least", "ratio: median", "least", "largest", "evals")
    lines = ["{:<24}{:<12}{:>16}{:>10}{:>16}{:>8}{:>9}{:>8}".format(*head)]
    row = "{:<24}{:<12}{:>16.7f}{:>10.5f}{:>16.4f}{:>8.3f}{:>9.3f}{:>8}"
    for name, inversion in inversions.items():
        for kind in KINDS:
            lines.append(row.format(name, kind, *five(inversion, kind), f"{inversion.evals:.0f}"))
    lines += [row.format(f"published, {name}", kind, *values, "") for (name, kind), values in PUBLISHED.items()]
    return "\n".join(lines)


def course(training: dict[int, dict[str, float]]) -> str:
    lines = ["{:<34}".format("MDEQ: median cosine at step") + "".join(f"{step:>8}" for step in training)]
    for name in ESTIMATORS:
        lines.append(f"{name:<34}" + "".join(f"{found[f'{name}/cosine']:>8.4f}" for found in training.values()))
    return "\n".join(lines)


FLOOR = 1e-9  # cosines nearer to one are drawn there
BLUE, ORANGE, GREEN, RED, GRAY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#5b6673", "#a04f86"
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#c3cad3",
    "grid.color": "#e8ebef",
    "legend.frameon": False,
    "axes.titlesize": 10,
}


def plot(inversions: dict[str, Inversion], training: dict[int, dict[str, float]]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.0), layout="constrained", dpi=130)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        for axes, awareness in ((left, "OPA off"), (middle, "OPA 5")):
            inversion = inversions[f"nearly exact, {awareness}"]
            for kind, color, marker in zip(KINDS, (RED, BLUE, GRAY), "oDs", strict=True):
                axes.scatter(
                    inversion.ratio[kind], (1 - inversion.cosine[kind]).clamp_min(FLOOR),
                    s=16, marker=marker, color=color, alpha=0.6, lw=0, label=kind,
                )  # fmt: skip
            axes.set(title=f"L-BFGS, {awareness}", xlabel="ratio of norms, estimate to exact", xlim=(0.94, 1.13))
            axes.set(yscale="log", ylim=(FLOOR / 3, 0.03))
            axes.invert_yaxis()
            axes.minorticks_off()
        left.set_ylabel("1 - cosine with the exact product, at least 1e-9")
        left.legend(loc="upper right")
        for (name, _), color in zip(ESTIMATORS.items(), (GRAY, ORANGE, BLUE, RED, PURPLE, GREEN), strict=True):
            steps = list(training)
            values = [training[step][f"{name}/cosine"] for step in steps]
            # Two lines nearly hide behind others.
            dashed = {"ls": "--", "zorder": 3} if name in ("SHINE, Broyden", "Neumann, 5 products") else {}
            right.plot(steps, values, color=color, marker="o", ms=4, label=name, **dashed)
        right.set(title="MDEQ on digits", xlabel="training step", ylabel="cosine with the exact adjoint, median")
        right.set_ylim(top=1.005)
        right.legend(loc="best", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 runs, and an untrained model on 4 images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    runs = 8 if args.quick else 100
    inversions = {name: invert(solver, runs) for name, solver in SETTINGS.items()}
    print(table(inversions), flush=True)
    training = train([0, 2], 4) if args.quick else train([0, 60, 100, 160, 240, 320, 440], 48)
    print(course(training))
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": platform.machine(),
        "threads": args.threads,
        "seeds": {"L-BFGS": 0, "MDEQ": 0},
        "runs": runs,
        "torch": torch.__version__,
        "equipoise": eq.__version__,
        "seconds": time.perf_counter() - start,
    }
    names = ("cosine_median", "cosine_min", "ratio_median", "ratio_min", "ratio_max")
    for name, inversion in inversions.items():
        figures[f"lbfgs/{name}/evals"] = inversion.evals
        for kind in KINDS:
            for key, value in zip(names, five(inversion, kind), strict=True):
                figures[f"lbfgs/{name}/{kind}/{key}"] = value
    for step, found in training.items():
        figures |= {f"mdeq/{step}/{key}": value for key, value in found.items()}
    write_atomic(args.json, (json.dumps(figures, indent=1) + "\n").encode())
    if args.plot is not None:
        plot(inversions, training).savefig(args.plot)


if __name__ == "__main__":
    main()
