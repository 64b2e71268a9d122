"""What the claims about methods have in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from attribution.claims.bench import STEPS, Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.methods import METHODS
from attribution.records import Unit, unit_named

__all__ = [
    "BASELINES",
    "METHOD",
    "METRIC_NAMES",
    "MIN_PROMPTS",
    "NO_FFN",
    "OTHER_KINDS",
    "RIVALS",
    "STEPS",
    "budget_of",
    "judged_methods",
    "not_applicable",
    "rank_correlation",
]

METHOD = "log_prob_increase"
"""The paper's method, score a) of its Table 2."""

BASELINES = (
    "log_prob",
    "prob_increase",
    "vector_norm",
    "coefficient",
    "reciprocal_rank",
    "output_norm",
    "coefficient_by_rank",
)
"""Scores b) to h) of Table 2, in its order."""

RIVALS = ("gradient_x_activation", "integrated_gradients", "atp_star", "relp")
"""Methods with backward passes, reported beside the paper's."""

METRIC_NAMES = {"mrr": "mean reciprocal rank", "prob": "mean probability", "logp": "mean log-probability in nats"}

OTHER_KINDS = ("mean", "resample")
"""Kinds of ablation that are reported beside the paper's."""

MIN_PROMPTS = 300
"""Fewer prompts than this decide no claim about a mean over all of them."""


NO_FFN = "the method does not score FFN neurons"


def judged_methods() -> list[str]:
    """Return the methods that the suite judges: the paper's, and every registered one that is not built in."""
    return [METHOD, *(name for name, method in METHODS.items() if not method.built_in)]


def budget_of(bench: Workbench, method: str) -> dict[str, int]:
    """Return how many value neurons of each unit the deletion claims ablate, of the units that a method can score."""
    units: tuple[Unit, ...] = METHODS[method].units
    return {unit: number for unit, number in bench.entry.value_neurons.items() if unit_named(unit) in units}


def rank_correlation(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation; 0 where one of the two is constant and so puts nothing in order."""
    first, second = (ranks - ranks.mean() for ranks in (stats.rankdata(one), stats.rankdata(other)))
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size else 0.0


def not_applicable(bench: Workbench, claim: Claim, reason: str) -> Verdict:
    """Return the verdict on a claim about what a method does not score: nothing measured, reported with the reason.

    It does not belong to a baseline, so that a method which stops scoring a unit misses a claim there.
    """
    unasked = replace(claim, asserted=False, gated=False)
    return bench.judge(unasked, [], places=[], note=f"not applicable: {reason}")
