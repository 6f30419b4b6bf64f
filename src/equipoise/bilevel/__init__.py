"""Bilevel optimization: hyperparameters that minimize an outer loss of the solution of an inner problem."""

from equipoise.bilevel.inner import Inner, InnerLoss, InnerMap
from equipoise.bilevel.minimize import minimize_outer
from equipoise.bilevel.search import grid_search, random_search
from equipoise.bilevel.solution import OuterSolution, OuterStatus, OuterStep
from equipoise.bilevel.steps import HoagStep, Proposal, StepRule, Trial
from equipoise.bilevel.tolerance import Tolerance
from equipoise.bilevel.trust_region import TrustRegion

__all__ = [
    "HoagStep",
    "Inner",
    "InnerLoss",
    "InnerMap",
    "OuterSolution",
    "OuterStatus",
    "OuterStep",
    "Proposal",
    "StepRule",
    "Tolerance",
    "Trial",
    "TrustRegion",
    "grid_search",
    "minimize_outer",
    "random_search",
]
