"""What the measurements for claims about methods have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from attribution.claims.bench import STEPS, Workbench
from attribution.claims.measured import NotApplicable
from attribution.engine.methods import METHODS
from attribution.records import Unit, unit_named

__all__ = [
    "BASELINES",
    "METHOD",
    "METRIC_NAMES",
    "NO_FFN",
    "OTHER_KINDS",
    "PROMPTS",
    "RIVALS",
    "STEPS",
    "budget_of",
    "judged_methods",
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

PROMPTS = 300
"""How many prompts are measured where all of them would take too long: as many as a claim about their mean needs."""

NO_FFN = NotApplicable("the method does not score FFN neurons")
"""What is measured for a claim about FFN neurons if the method does not score them."""


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
