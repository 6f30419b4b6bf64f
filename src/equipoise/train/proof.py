"""Certificates of a model, for its file, its result and its reports."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from equipoise.contraction.certificate import ROUNDING, Certificate, CertificateError, UnprovedConstant, certify
from equipoise.core.solution import Solution
from equipoise.solvers import Solver
from equipoise.train.config import TrainConfig

MEASURED = 32  # samples at which the norm of the Jacobian is measured, at most
FACTS = ("certified_lipschitz", "predicted_evaluations", "measured_lipschitz", "tightness", "not_certified")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """Certificates of a model's map, or the reason why there are none.

    Args:
        evaluation: certificate of the map in evaluation; None: a layer has no known constant.
        training: the same weights with dropout; in training mode caps are followed within some percent.
        reason: why the map is not proved to contract in evaluation; None: it is.
        solver: that finds the equilibrium in evaluation.
        guessed: whether a solve begins at a guess; a certificate predicts the evaluations from zeros.
    """

    evaluation: Certificate | None
    training: Certificate | None
    reason: str | None
    solver: Solver
    guessed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for the file of the model."""
        return {
            "evaluation": None if self.evaluation is None else self.evaluation.as_dict(),
            "training": None if self.training is None else self.training.as_dict(),
            "reason": self.reason,
        }

    def facts(self) -> dict[str, Any]:
        """Return the entries of `result.json`; None where nothing is proved or measured."""
        found = self.evaluation
        if found is None:
            return dict.fromkeys(FACTS[:-1]) | {"not_certified": self.reason}
        predicted = None if self.guessed else found.evaluations_of(self.solver)
        return dict(zip(FACTS, (found.lipschitz, predicted, found.measured, found.tightness, self.reason), strict=True))

    def supports(self, claimed: Mapping[str, Any]) -> None:
        """Check that the file of a model claims no more than its weights prove.

        Args:
            claimed: certificates in the file, from `as_dict`.

        Raises:
            CertificateError: it claims more.
        """
        for mode, found in (("evaluation", self.evaluation), ("training", self.training)):
            said = claimed.get(mode)
            if said is None or not said["contracts"]:
                continue
            if found is None or not found.contracts:
                raise CertificateError(f"it claims that the map contracts in {mode}, and its weights do not prove it")
            for name in ("norm", "radius"):
                if getattr(found, name) > said[name] * (1 + ROUNDING):
                    raise CertificateError(
                        f"it claims that the block matrix has {name} {said[name]:.4f} in {mode}, and its weights prove "
                        f"{getattr(found, name):.4f} only"
                    )


def prove(
    model: Any, *, solver: Solver | None = None, solve: Callable[[Any], Solution[Any] | None] | None = None
) -> Proof:
    """Certify the map of a model in evaluation mode, whatever mode the model is in.

    Args:
        model: stays as it is.
        solver: that finds the equilibrium in evaluation; None: the model's.
        solve: returns equilibria of a model, at which the norm of the Jacobian is measured; None: it is not.

    Raises:
        CertificateError: the solver was given a Lipschitz constant that the weights do not prove.
    """
    if model.training:
        model = copy.deepcopy(model).eval()
    solver = solver or model.deq.solver
    try:
        with model.deq.using(solver=solver):
            with torch.no_grad():
                solution = None if solve is None else solve(model)
            evaluation = certify(model, solution=solution)
        # Of the cell alone: the constants of the solvers are for the mode in which they are used.
        training = certify(model.deq.cell, training=True)
    except UnprovedConstant:
        raise
    except CertificateError as error:
        return Proof(evaluation=None, training=None, reason=str(error), solver=solver)
    reason = None
    try:
        evaluation.require()
    except CertificateError as error:
        reason = str(error)
    return Proof(evaluation=evaluation, training=training, reason=reason, solver=solver, guessed=model.config.guesses)


def summarize(facts: Mapping[str, Any], max_steps: int | None = None) -> str:
    """Summarize `Proof.facts` in a line.

    Args:
        facts: of a proof.
        max_steps: of the solver, if it may stop before the predicted number.
    """
    if facts["not_certified"] is not None:
        reason = facts["not_certified"].partition("; ")[0]  # the advice may begin within a parenthesis
        return f"not certified: {reason}{')' if reason.count('(') > reason.count(')') else ''}"
    constant = math.ceil(facts["certified_lipschitz"] * 1e4) / 1e4  # a bound is rounded up
    text = f"contracts: L = {constant:.4g}"
    if facts["measured_lipschitz"] is not None:
        text += f" (measured {facts['measured_lipschitz']:.2f}, {facts['tightness']:.0%} tight)"
    predicted = facts["predicted_evaluations"]
    if predicted is None:
        return text + ", and the solver promises nothing"
    capped = max_steps is not None and max_steps < predicted
    return text + f", at most {predicted} evaluations" + (f", cut at {max_steps}" if capped else "")


def check_claims(config: TrainConfig) -> None:
    """Check that the layers cannot exceed the Lipschitz constants of the solvers.

    Raises:
        CertificateError: they can; the message has the flag and the constant of the layers.
    """
    solvers = {
        "solver": (config.solver, True),
        "gradient.solver": (getattr(config.gradient, "solver", None), True),
        "eval_solver": (config.eval_solver, False),
    }
    for name, (solver, training) in solvers.items():
        claimed = getattr(solver, "lipschitz", None)
        if claimed is None or getattr(solver, "one_sided", None) is not None:
            continue
        allowed = config.model.lipschitz_limit(training=training)
        if allowed is None:
            raise CertificateError(
                f"{name}.lipschitz={claimed:g}: nothing proves it, as the layers of the model may have any constant; "
                "leave it out, or choose layers that contract, such as model.contraction"
            )
        if allowed > claimed * (1 + 1e-6):
            remedy = f"set it to {allowed:.6g} or more, or " if allowed < 0.999999 else ""
            raise CertificateError(
                f"{name}.lipschitz={claimed:g}: the layers of the model may have {allowed:.4g}; {remedy}lower "
                "the constants of the layers, or leave it out"
            )
