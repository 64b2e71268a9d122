"""How often a claim would be called supported: when it is false, and when it is as true as it was measured.

The measured facts stand for a population, from which samples of facts are drawn with replacement. What was measured
says little about what it would be if the claim were false, so several false worlds are tried, each just false: its
mean lies on the threshold, where it is hardest to tell. See :data:`WORLDS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from attribution.claims.judge import EXTREMES, Claim, Evidence, Status, Verdict, bootstrap, decide, with_one_more

__all__ = ["LIMIT", "WORLDS", "Rates", "error_rates", "rates_of"]

WORLDS = {
    "shifted": "every effect is moved by the same amount; spread, skew and outliers stay what they are. Left out where "
    "it would make effects that cannot be",
    "tilted": "the measured effects occur with other frequencies, those nearest to the measured ones that make the "
    "claim false (exponential tilting). Left out where no frequencies do",
    "mixed": "some facts have the worst effect there can be, the others what was measured. Only of effects with limits",
    "swapped": "the two arms of a difference are exchanged at random, fact by fact. Only of a difference that is "
    "claimed to be above 0",
}
"""The worlds in which a claim is false."""

LIMIT = 0.05
"""The largest share of samples in which a false claim may be supported."""

RESAMPLES = 1999
"""Of each sample: a fifth of what a verdict draws, which moves its ends little and takes a fifth of the time."""

# Power is told to a few hundredths, where the bootstrap of every sample would take most of the time.
_POWER_SAMPLES = 50

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """What a simulation says of a claim.

    Attributes:
        false_positives: World to the share of samples in which the claim is called supported although it is false
            there; of a claim with two edges the larger share.
        power: Share of samples in which it is called supported where it is as true as it was measured.
        facts: Facts in a sample.
        samples: Number of samples from each false world; power is that of 50, or of as many if there are fewer.
    """

    false_positives: Mapping[str, float]
    power: float
    facts: int
    samples: int

    @property
    def false_positive(self) -> float:
        """The largest share over all worlds; 0 where no false world resembles what was measured."""
        return max(self.false_positives.values(), default=0.0)


@dataclass(frozen=True)
class _World:
    """A population of facts: effects and baselines, and how often each occurs."""

    numerators: _Floats
    denominators: _Floats
    frequencies: _Floats
    swapped: bool = False


def rates_of(verdict: Verdict, *, samples: int, seed: int = 0) -> Rates:
    """Simulate a claim on what was measured for a verdict, with as few facts as it can be decided by.

    A rate of more than 5% is measured again by ten times as many other samples: of 400, one of 4% is over 5% in every
    eighth case.

    Args:
        verdict: A verdict with evidence.
        samples: How many samples to draw from each world.
        seed: Seed of the draws.
    """
    assert verdict.evidence is not None
    facts = min(verdict.claim.min_prompts or verdict.facts, verdict.facts)
    rates = error_rates(verdict.claim, verdict.evidence, facts=facts, samples=samples, seed=seed)
    if rates.false_positive > LIMIT:
        rates = error_rates(verdict.claim, verdict.evidence, facts=facts, samples=10 * samples, seed=seed + 1)
    return rates


def error_rates(claim: Claim, evidence: Evidence, *, facts: int, samples: int, seed: int = 0) -> Rates:
    """Simulate a claim on effects shaped like those that were measured for it.

    Args:
        claim: A claim about a mean or a ratio of two means.
        evidence: What was measured for it.
        facts: How many facts a sample has.
        samples: How many samples to draw from each world.
        seed: Seed of the draws.
    """
    _, cluster = np.unique(np.asarray(evidence.facts, dtype=str), return_inverse=True)
    baselines = evidence.baselines or (1.0,) * len(evidence.effects)
    numerators, denominators = (np.bincount(cluster, part).astype(np.float64) for part in (evidence.effects, baselines))
    size = float(np.bincount(cluster).max())
    found: dict[str, float] = {}
    edges = [claim.threshold] if claim.test == "above" else [claim.threshold, -claim.threshold]
    for edge in edges:
        for name, world in _false_worlds(claim, numerators, denominators, edge, size):
            rate = _supported(claim, world, size, facts, samples, seed)
            found[name] = max(rate, found.get(name, 0.0))
    equal = np.full(len(numerators), 1 / len(numerators))
    as_measured = _World(numerators, denominators, equal)
    power = _supported(claim, as_measured, size, facts, min(samples, _POWER_SAMPLES), seed)
    return Rates(found, power, facts, samples)


def _false_worlds(
    claim: Claim, numerators: _Floats, denominators: _Floats, edge: float, size: float
) -> Iterator[tuple[str, _World]]:
    """Yield the worlds of :data:`WORLDS` in which the effect is the edge."""
    equal = np.full(len(numerators), 1 / len(numerators))
    # A fact's pull is how far it moves the effect from the edge; the claim is just false where they cancel.
    pulls = numerators - edge * denominators
    shift = pulls.sum() / denominators.sum()
    shifted = _World(numerators - shift * denominators, denominators, equal)
    if pulls.min() < 0 < pulls.max():
        yield "tilted", _World(numerators, denominators, _tilted(pulls))
    if claim.effect_bounds == "seen":
        yield "shifted", shifted
        if claim.test == "above" and claim.threshold == 0:
            yield "swapped", _World(numerators, denominators, equal, swapped=True)
        return
    ends = [(size * numerator, size * denominator) for numerator, denominator in EXTREMES[claim.effect_bounds]]
    least, most = (numerator - edge * denominator for numerator, denominator in ends)
    moved = shifted.numerators - edge * denominators
    if moved.min() >= least and moved.max() <= most:
        yield "shifted", shifted
    (numerator, denominator), pull = (ends[0], least) if shift > 0 else (ends[1], most)
    if shift:
        share = pulls.mean() / (pulls.mean() - pull)
        yield (
            "mixed",
            _World(
                np.append(numerators, numerator),
                np.append(denominators, denominator),
                np.append(equal * (1 - share), share),
            ),
        )


def _tilted(pulls: _Floats) -> _Floats:
    """Return frequencies proportional to exp(t * pull), with the t that makes the mean pull 0."""

    def frequencies(t: float) -> _Floats:
        powers = np.exp(t * pulls - np.max(t * pulls))
        return np.asarray(powers / powers.sum())

    # Beyond this, all but the facts of the largest pull on either side have the frequency 0.
    most = 800 / min(pulls.max(), -pulls.min())
    return frequencies(optimize.brentq(lambda t: frequencies(t) @ pulls, -most, most))


def _supported(claim: Claim, world: _World, size: float, facts: int, samples: int, seed: int) -> float:
    """Return the share of samples of a world that a claim is supported by."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(world.numerators), size=(samples, facts), p=world.frequencies)
    numerators, denominators = world.numerators[drawn], world.denominators[drawn]
    if world.swapped:
        numerators = numerators * rng.choice([-1.0, 1.0], size=drawn.shape)
    # Both methods have to support it. The bootstrap takes far longer, so it is asked only where the other one does.
    ends = with_one_more(numerators, denominators, claim.confidence, claim.effect_bounds, size, resamples=RESAMPLES)
    supported = _decided(claim, *ends)
    if supported.any():
        left = numerators[supported], denominators[supported]
        supported[supported] = _decided(claim, *bootstrap(*left, claim.confidence, resamples=RESAMPLES))
    return float(supported.mean())


def _decided(claim: Claim, low: _Floats, high: _Floats) -> npt.NDArray[np.bool_]:
    return np.array([decide(claim, *ends) is Status.SUPPORTED for ends in zip(low, high, strict=True)])
