"""Quality of a shared inverse estimate, in the direction of the outer gradient and elsewhere.

    python -m benchmarks inversion_quality [--quick]

Claim: with outer-problem awareness (OPA) the estimate of the forward solver is right in the prescribed direction, at a
few more evaluations (L-BFGS) or products (adjoint Broyden); without it, in the directions of its own steps alone.
Evidence: `results/2026-11-25.json`: 100 runs of L-BFGS, and one training of the MDEQ; x86-64, one thread, torch 2.13.0.

L-BFGS. The second figure of the SHINE paper: L2 logistic regression on a fifth of the breast-cancer data (113 samples,
features divided by their deviations, sum of losses plus |z|^2 / 2), 100 starts ~ N(0, I) in one batch, each with a
direction ~ N(0, I) of its own, absolute tolerance 1e-6, 60 pairs. M u is compared with the exact product for u the
prescribed direction, the Hessian times the last step ("krylov"), and another random direction.

    cosine, ratio   of M u with the exact H^-1 u; of their norms
    evals           gradients of the objective per run, mean

"nearly exact" searches (wolfe=9e-4, M_0 = I) are the published setting, "default" ones have wolfe=0.9 and M_0 = I. Ours
probe after the first step, then after every fifth; the published runs after every fifth.

MDEQ. The small model of the recipe mdeq-digits, trained with SHINE as in the recipe, and measured on the way. On
training images in evaluation mode, float64: cosine of w, as estimated from a forward solve with the settings of the
recipe, with the exact w at the exact equilibrium; median over the images. The exact one comes from a solve to 1e-9; the
largest residuals of both its solves are in the results, and images of which a solve did not converge are left out and
counted. One seed.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor

import equipoise as eq
from benchmarks import harness
from benchmarks.inversion_quality.report import KINDS, table
from equipoise import zoo
from equipoise.core.function_map import DescentMap
from equipoise.data import TensorSplit
from equipoise.train import StepInfo
from equipoise.zoo import EquilibriumClassifier, MDEQCell

# --- L-BFGS ---------------------------------------------------------------------------------------------------------

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


def invert(solver: eq.LBFGS, runs: int) -> dict[str, Any]:
    """Cosine and ratio of norms of each run, by direction, and mean evaluations."""
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
    found: dict[str, Any] = {"evals": float(solution.num_steps.double().mean()), "cosine": {}, "ratio": {}}
    for kind, u in zip(KINDS, (v, last, other), strict=True):
        estimate, exact = solution.inverse.mv(u), torch.linalg.solve(hessian, u)
        found["cosine"][kind] = F.cosine_similarity(estimate, exact).tolist()
        found["ratio"][kind] = (estimate.norm(dim=1) / exact.norm(dim=1)).tolist()
    return found


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
    """Adjoint solution `w` for the losses of a batch, by any solver and gradient, at some step of a training."""

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
        """Return `w` `(B, D)`, the gradient of a term added to the map, and the forward solution."""
        if isinstance(solver, eq.AdjointBroyden) and solver.outer_every is not None:
            solver = dataclasses.replace(solver, outer_loss=self.loss)
        added = [torch.zeros_like(level).requires_grad_() for level in self.z0]

        def f(z: tuple[Tensor, ...], u: Any, added: list[Tensor]) -> tuple[Tensor, ...]:
            return tuple(level + more for level, more in zip(self.cell(z, u), added, strict=True))

        solution = eq.fixed_point(f, self.z0, self.u, added, solver=solver, gradient=gradient, params=())
        grads = torch.autograd.grad(self.loss(solution.value, torch.arange(len(self.labels))).sum(), added)
        return torch.cat([grad.flatten(1) for grad in grads], dim=1), solution


def look(model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Cosines of all estimators, and residuals of the reference."""
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


def train(steps: Sequence[int], count: int) -> dict[str, dict[str, float]]:
    """Train as in the recipe and measure at the given steps, on `count` of the training images."""
    torch.manual_seed(0)
    split = RECIPE.data.load().train
    assert isinstance(split, TensorSplit)
    labels = split.labels
    images = RECIPE.data.prepare(split.images)
    model = RECIPE.build()
    objective = RECIPE.objective(model)
    figures = {}

    def losses() -> Iterator[Tensor]:
        for step in range(max(steps) + 1):
            if step in steps:
                figures[str(step)] = look(model, images[:count], labels[:count])
                with torch.no_grad():
                    predicted = copy.deepcopy(model).eval()(images[:count]).argmax(1)
                figures[str(step)]["accuracy"] = float((predicted == labels[:count]).double().mean())
            batch = torch.randint(len(images), (RECIPE.batch_size,))
            yield objective(images[batch], labels[batch], StepInfo(step=step, epoch=0, seed=0))[0]

    harness.descend(torch.optim.Adam(model.parameters(), lr=RECIPE.optimizer.lr), losses())
    return figures


def summary(content: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Median, least and largest values of the runs of L-BFGS, and the figures of the MDEQ."""
    figures = {f"lbfgs/{name}/evals": found["evals"] for name, found in content.get("lbfgs", {}).items()}
    for name, found in content.get("lbfgs", {}).items():
        for kind, key in itertools.product(KINDS, ("cosine", "ratio")):
            values = torch.tensor(found[key][kind], dtype=torch.float64)
            for statistic in ("median", "min", "max"):
                figures[f"lbfgs/{name}/{kind}/{key}_{statistic}"] = float(getattr(values, statistic)())
    return figures | harness.flatten({"mdeq": content.get("mdeq", {})}), {}


def main(argv: Sequence[str] | None = None) -> None:
    record = harness.Record(__name__, argv, quick="8 runs, and an untrained model on 4 images", summary=summary)
    quick = record.args.quick
    for name, solver in SETTINGS.items():
        record.measure(functools.partial(invert, solver, 8 if quick else 100), "lbfgs", name)
    looks = ([0, 2], 4) if quick else ([0, 60, 100, 160, 240, 320, 440], 48)
    record.measure(functools.partial(train, *looks), "mdeq")
    record.finish(table)
