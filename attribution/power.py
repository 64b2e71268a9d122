"""How often a claim would be called supported: when it is false, and when it is as true as it was measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attribution.claims import Claim, Evidence, Status, decide, interval

__all__ = ["Rates", "error_rates"]


@dataclass(frozen=True)
class Rates:
    """What a simulation says of a claim.

    Attributes:
        false_positive: Share of samples in which the claim is called supported although it is false, at the edge
            where that is hardest to tell; the larger of both edges where there are two.
        power: Share of samples in which it is called supported where it is as true as it was measured.
        facts: Facts in a sample.
        samples: Number of samples.
    """

    false_positive: float
    power: float
    facts: int
    samples: int


def error_rates(claim: Claim, evidence: Evidence, *, facts: int, samples: int, seed: int = 0) -> Rates:
    """Simulate a claim on effects shaped like those that were measured for it.

    The measured facts stand for a population, from which samples of facts are drawn with replacement. For the false
    positives every effect is shifted, so that the mean of the population lies on the threshold: the claim is just
    false, while spread, skew and outliers stay what they are.

    Args:
        claim: A claim about a mean or a ratio of two means.
        evidence: What was measured for it.
        facts: How many facts a sample has.
        samples: How many samples to draw.
        seed: Seed of the draws.
    """
    _, cluster = np.unique(np.asarray(evidence.facts, dtype=str), return_inverse=True)
    baselines = evidence.baselines or (1.0,) * len(evidence.effects)
    parts = (np.bincount(cluster, part).astype(np.float64) for part in (evidence.effects, baselines))
    numerators, denominators = parts
    drawn = np.random.default_rng(seed).integers(len(numerators), size=(samples, facts))
    effect = numerators.sum() / denominators.sum()
    edges = [claim.threshold] if claim.test == "above" else [claim.threshold, -claim.threshold]
    # Adding a multiple of the denominator moves the ratio by that multiple and leaves its spread.
    false = [_supported(claim, numerators + (edge - effect) * denominators, denominators, drawn) for edge in edges]
    return Rates(max(false), _supported(claim, numerators, denominators, drawn), facts, samples)


def _supported(
    claim: Claim,
    numerators: npt.NDArray[np.float64],
    denominators: npt.NDArray[np.float64],
    drawn: npt.NDArray[np.int64],
) -> float:
    """Return the share of samples that a claim is supported by."""
    low, high = interval(numerators[drawn], denominators[drawn], claim.confidence)
    return float(np.mean([decide(claim, *ends) is Status.SUPPORTED for ends in zip(low, high, strict=True)]))
