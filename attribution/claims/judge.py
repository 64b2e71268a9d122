"""Claims as data, verdicts as evidence: the one place where measurements are judged.

Prompts that ask for the same fact in other words are not independent, so intervals come from resampling facts
with all their prompts (a cluster bootstrap). With one prompt per fact it is the ordinary paired bootstrap over
prompts; with three it is wider, and honest.

A bootstrap knows only what it has seen: where nearly all facts agree and a few differ much, a sample that missed the
few has next to no interval. So each end is the farther one of two: of the bootstrap, and of the facts weighted at
random with one fact more that is as bad, or as good, as one can be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from attribution.errors import BadInputError

__all__ = [
    "EXTREMES",
    "Claim",
    "Evidence",
    "Extremes",
    "Status",
    "Verdict",
    "bootstrap",
    "decide",
    "interval",
    "judge",
    "judge_exact",
    "with_one_more",
]

RESAMPLES = 9999
# Fixed, so that a verdict does not change between two runs on the same numbers.
BOOTSTRAP_SEED = 20241112

Extremes: TypeAlias = Literal["seen", "fall", "share", "left", "correlation"]

EXTREMES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "fall": ((-1, 0), (1, 1)),
    "share": ((0, 1), (1, 1)),
    "left": ((0, 1), (1, 0)),
    "correlation": ((-1, 1), (1, 1)),
}
"""Effect and baseline of the worst and of the best prompt there can be, by what the effect is, see :class:`Claim`."""


class Status(str, Enum):
    """What the evidence says of a claim."""

    SUPPORTED = "supported"
    """The whole interval lies where the claim says."""
    REFUTED = "refuted"
    """The whole interval lies where the claim says it does not."""
    INCONCLUSIVE = "inconclusive"
    """The interval straddles the threshold."""
    UNDECIDED = "undecided"
    """There are fewer prompts than the claim needs, whatever they show."""


@dataclass(frozen=True)
class Claim:
    """One statement about a model that a measurement can contradict.

    Attributes:
        id: Short name, for tables; unique among the claims about a model and a method.
        sentence: What is claimed, in words.
        source: Table or equation of the paper, or ``"ours"``.
        effect: What the effect is, with its unit.
        test: ``"above"``: the 95% interval lies above ``threshold``. ``"within"``: the 90% interval lies between
            ``-threshold`` and ``threshold`` (two one-sided tests at 5%: the absence of an effect is shown, not
            the absence of significance). ``"at_most"``: a number without sampling error is at most ``threshold``.
        threshold: The threshold, in the unit of the effect.
        control: What shows that the claim could have failed.
        min_prompts: Fewer prompts decide nothing.
        method: The attribution method that the claim is about; empty if it is about a model or the instrument.
        comparisons: How many claims of one family are judged together, this one included. The interval is widened so
            that the chance that any false claim of the family is supported stays what it is for one (Bonferroni).
        effect_bounds: How bad and how good a prompt that was not drawn may be: ``"fall"`` of a metric between 0 and 1,
            with its start as baseline, or of the difference of two such falls; ``"share"`` between 0 and 1; what is
            ``"left"`` of a metric, with its start as baseline; ``"correlation"`` between -1 and 1; or, of effects
            without such limits and of two arms that are the same if the claim is false, as bad and as good as any
            that was ``"seen"``.
        asserted: Whether a test fails unless the claim is supported; the others are measured and reported.
        family: The family, of :data:`attribution.models.registry.FAMILIES`, by which the registry says whether the
            claim is asserted on a model; one without a family is asserted on every model.
        gated: Whether the claim belongs to the stored run that a change is compared with.
        version: Raised whenever what is measured changes although no other field does.
    """

    id: str
    sentence: str
    source: str
    effect: str
    test: Literal["above", "within", "at_most"]
    threshold: float
    control: str
    min_prompts: int = 0
    method: str = ""
    comparisons: int = 1
    effect_bounds: Extremes = "seen"
    asserted: bool = True
    family: str = ""
    gated: bool = True
    version: int = 1

    @property
    def confidence(self) -> float:
        """Level of the two-sided interval that decides the claim; each side errs in at most 5% of cases."""
        return 1 - (0.10 if self.test == "within" else 0.05) / self.comparisons


@dataclass(frozen=True)
class Evidence:
    """What was measured for a claim, one entry per prompt.

    Attributes:
        prompts: What tells the prompts apart: their texts with their answers.
        facts: What each prompt asks about.
        effects: The effect on each prompt.
        baselines: What effects are relative to, if the claim is about a ratio of two means.
    """

    prompts: tuple[str, ...]
    facts: tuple[str, ...]
    effects: tuple[float, ...]
    baselines: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """A claim, judged.

    Attributes:
        claim: The claim.
        model: The model's name.
        status: The verdict.
        effect: Effect size, in the claim's unit.
        low: Lower end of the interval; the effect itself where nothing was sampled.
        high: Upper end.
        n: Number of prompts.
        facts: Number of facts behind them, the units of resampling.
        seed: Seed of the measurement's random draws, or ``None`` if it has none.
        needed: How many prompts an undecided claim needs, and about how many would decide an inconclusive one if the
            effect is what it seems; ``None`` if it is decided or no number would.
        evidence: What was measured, prompt by prompt.
        note: What a table says beside the verdict, such as what the measurement cost.
    """

    claim: Claim
    model: str
    status: Status
    effect: float
    low: float
    high: float
    n: int
    facts: int
    seed: int | None = None
    needed: int | None = None
    evidence: Evidence | None = field(default=None, repr=False)
    note: str = ""

    def in_words(self) -> str:
        """Return the status; of an undecided claim with how many prompts it has, and how many it needs."""
        counted = f": {self.n} of {self.needed} prompts" if self.status is Status.UNDECIDED else ""
        return self.status.value + counted

    def sentence(self) -> str:
        """Return what was claimed, what was measured, and what to do about it."""
        claim = self.claim
        wanted = {
            "above": f"above {claim.threshold:g}",
            "within": f"within ±{claim.threshold:g}",
            "at_most": f"at most {claim.threshold:g}",
        }[claim.test]
        text = (
            f"{self.in_words()}: {claim.sentence} ({claim.source}) on {self.model}: {claim.effect} is "
            f"{self.effect:.4g} [{self.low:.4g}, {self.high:.4g}], expected {wanted}; n = {self.n} prompts of "
            f"{self.facts} facts; control: {claim.control}."
        )
        if self.status is Status.INCONCLUSIVE:
            text += (
                f" About {self.needed} prompts would decide it."
                if self.needed
                else " More prompts of this kind would not decide it; the effect lies on the wrong side."
            )
        return text


def interval(
    numerators: npt.NDArray[np.float64],
    denominators: npt.NDArray[np.float64],
    confidence: float,
    effect_bounds: Extremes = "seen",
    size: float = 1,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the ends of an interval of sum(numerators) / sum(denominators): the wider ones of two methods.

    Args:
        numerators: One sum for each fact, (..., facts).
        denominators: The same, (..., facts).
        confidence: Level of the two-sided interval, 0 to 1.
        effect_bounds: How bad and how good a fact that was not drawn may be, see :class:`Claim`.
        size: Prompts of the largest fact.

    Returns:
        Lower and upper ends, (...,) each.
    """
    low, high = bootstrap(numerators, denominators, confidence)
    lower, higher = with_one_more(numerators, denominators, confidence, effect_bounds, size)
    return np.minimum(low, lower), np.maximum(high, higher)


def bootstrap(
    numerators: npt.NDArray[np.float64],
    denominators: npt.NDArray[np.float64],
    confidence: float,
    *,
    resamples: int | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the ends of a bias-corrected and accelerated bootstrap interval of sum(numerators) / sum(denominators).

    Facts are resampled, a numerator together with its denominator; as often as for a verdict, if ``resamples`` does
    not say otherwise. See :func:`interval` for the other arguments and the result.
    """
    # Where all ratios are equal, up to rounding, so is that of every resample, which the bias correction cannot divide
    # by. Compared without dividing: a fact may have nothing to divide by.
    crossed = numerators * denominators[..., :1] - numerators[..., :1] * denominators
    sizes = np.abs(numerators).max(axis=-1) * np.abs(denominators).max(axis=-1)
    varies = np.abs(crossed).max(axis=-1) > 8 * np.finfo(np.float64).eps * sizes
    low = np.asarray(numerators.sum(-1) / denominators.sum(-1))
    high = low.copy()
    if not np.any(varies):
        return low, high
    numerators, denominators = numerators[varies], denominators[varies]

    def ratio(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], axis: int = -1) -> npt.NDArray[np.float64]:
        return np.asarray(a.sum(axis) / b.sum(axis))

    alike = np.ptp(denominators) == 0
    result = stats.bootstrap(
        (numerators / denominators,) if alike else (numerators, denominators),
        np.mean if alike else ratio,
        axis=-1,
        paired=True,
        vectorized=True,
        n_resamples=resamples or RESAMPLES,
        batch=500,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    )
    low[varies], high[varies] = result.confidence_interval
    return low, high


def with_one_more(
    numerators: npt.NDArray[np.float64],
    denominators: npt.NDArray[np.float64],
    confidence: float,
    effect_bounds: Extremes = "seen",
    size: float = 1,
    *,
    resamples: int | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the ends of an interval that allows for facts which were not drawn.

    The facts and one more, the worst there can be, get random weights that are uniform over all weights that add to 1
    (Dirichlet(1, ..., 1), as in the Bayesian bootstrap). The quantile of the weighted ratio is the lower end; with the
    best there can be it is the upper one. Of effects that are 0 or 1 these are the ends of Clopper and Pearson, and of
    n equal effects the lower one lies as far towards the worst as the share of facts that n draws can miss. That it
    covers a bounded mean at any number of facts and at any level is a conjecture for which no exception is known
    (Gaffke 2005; Learned-Miller & Thomas 2019, arXiv 1905.06208); :mod:`attribution.claims.error_rates` measures it for
    each claim.

    See :func:`bootstrap` for ``resamples``, and :func:`interval` for the other arguments and the result.
    """
    resamples = resamples or RESAMPLES
    weights = _random_weights(numerators.shape[-1], resamples)
    drawn, one_more = weights[:, :-1].T, weights[:, -1]
    above, below = numerators @ drawn, denominators @ drawn
    ends = []
    for side, (numerator, denominator) in enumerate(_extreme_facts(numerators, denominators, effect_bounds, size)):
        ratios = (above + numerator[..., None] * one_more) / (below + denominator[..., None] * one_more)
        # The order statistic on the safe side.
        place = math.floor((1 - confidence) / 2 * (resamples - 1))
        place = resamples - 1 - place if side else place
        ends.append(np.partition(ratios, place, axis=-1)[..., place])
    # Rounding may not widen an interval of equal ratios that can be no other.
    effect = numerators.sum(-1) / denominators.sum(-1)
    low, high = (np.where(np.isclose(end, effect, rtol=1e-12, atol=0), effect, end) for end in ends)
    return low, high


def _extreme_facts(
    numerators: npt.NDArray[np.float64], denominators: npt.NDArray[np.float64], effect_bounds: Extremes, size: float
) -> tuple[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], ...]:
    """Return numerator and denominator of the worst fact there can be, and of the best, (...,) each."""
    if effect_bounds != "seen":
        shape = numerators.shape[:-1]
        worst, best = ((np.full(shape, size * a), np.full(shape, size * b)) for a, b in EXTREMES[effect_bounds])
        return worst, best
    effect = numerators.sum(-1, keepdims=True) / denominators.sum(-1, keepdims=True)
    pulls = numerators - effect * denominators
    found = []
    for indices in (pulls.argmin(-1, keepdims=True), pulls.argmax(-1, keepdims=True)):
        found.append(tuple(np.take_along_axis(each, indices, -1)[..., 0] for each in (numerators, denominators)))
    return (found[0][0], found[0][1]), (found[1][0], found[1][1])


@lru_cache(maxsize=4)
def _random_weights(facts: int, resamples: int) -> npt.NDArray[np.float64]:
    """Return random weights of facts and of one more, up to a factor, (resamples, facts + 1)."""
    return np.random.default_rng(BOOTSTRAP_SEED).standard_exponential((resamples, facts + 1))


def decide(claim: Claim, low: float, high: float) -> Status:
    """Return what an interval says of a claim about a mean or a ratio."""
    if claim.test == "above":
        inside, outside = low > claim.threshold, high <= claim.threshold
    else:
        inside = -claim.threshold < low and high < claim.threshold
        outside = low >= claim.threshold or high <= -claim.threshold
    return Status.SUPPORTED if inside else Status.REFUTED if outside else Status.INCONCLUSIVE


def _needed(claim: Claim, effect: float, low: float, high: float, n: int) -> int | None:
    """Return about how many prompts would decide: an interval's width falls with the square root of n."""
    if claim.test == "above":
        room, width = effect - claim.threshold, effect - low
    else:
        room, width = claim.threshold - abs(effect), max(high - effect, effect - low)
    return math.ceil(n * (width / room) ** 2) if room > 0 else None


def judge(
    claim: Claim,
    *,
    model: str,
    effects: Sequence[float],
    facts: Sequence[str],
    baselines: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
    seed: int | None = None,
) -> Verdict:
    """Judge a claim about a mean over prompts, or about a ratio of two means.

    Args:
        claim: The claim; its test is ``"above"`` or ``"within"``.
        model: The model's name.
        effects: One number per prompt, such as a paired difference.
        facts: What each prompt asks about; prompts of one fact are resampled together.
        baselines: If given, the effect is sum(effects) / sum(baselines), such as a fall relative to the start.
        prompts: What tells the prompts apart, so that a later run can be paired with this one; the facts with a
            running number when ``None``.
        seed: Seed of the measurement's random draws, to be reported.

    Raises:
        BadInputError: If lengths differ or a number is not finite.
    """
    values = np.asarray(effects, dtype=np.float64)
    weights = np.ones_like(values) if baselines is None else np.asarray(baselines, dtype=np.float64)
    if not len(values) == len(weights) == len(facts):
        raise BadInputError(
            f"claim {claim.id!r} got {len(values)} effects, {len(weights)} baselines and {len(facts)} facts; "
            "give one of each per prompt."
        )
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise BadInputError(f"claim {claim.id!r} got effects that are NaN or infinite; a measurement is broken.")
    named = _numbered(facts) if prompts is None else tuple(prompts)
    if len(set(named)) != len(facts):
        raise BadInputError(
            f"claim {claim.id!r} got {len(facts)} effects of {len(set(named))} different prompts; measure each once."
        )
    evidence = Evidence(
        prompts=named,
        facts=tuple(facts),
        effects=tuple(values.tolist()),
        baselines=None if baselines is None else tuple(weights.tolist()),
    )
    names, cluster = np.unique(np.asarray(facts, dtype=str), return_inverse=True)
    if len(names) < 2:
        nothing = float("nan")
        return Verdict(
            claim, model, Status.UNDECIDED, nothing, nothing, nothing, len(values), len(names), seed,
            max(claim.min_prompts, 2), evidence,
        )  # fmt: skip
    numerators, denominators = (np.bincount(cluster, part).astype(np.float64) for part in (values, weights))
    effect = float(numerators.sum() / denominators.sum())
    size = float(np.bincount(cluster).max())
    low, high = (float(end) for end in interval(numerators, denominators, claim.confidence, claim.effect_bounds, size))
    needed = None
    if len(values) < claim.min_prompts:
        status, needed = Status.UNDECIDED, claim.min_prompts
    else:
        status = decide(claim, low, high)
        if status is Status.INCONCLUSIVE:
            needed = _needed(claim, effect, low, high, len(values))
    return Verdict(claim, model, status, effect, low, high, len(values), len(names), seed, needed, evidence)


def _numbered(facts: Sequence[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    names = []
    for fact in facts:
        seen[fact] += 1
        names.append(f"{fact} #{seen[fact]}")
    return tuple(names)


def judge_exact(claim: Claim, *, model: str, effect: float, n: int, facts: int) -> Verdict:
    """Judge a claim about a number that has no sampling error, such as the worst error of an identity.

    Args:
        claim: The claim; its test is ``"at_most"``.
        model: The model's name.
        effect: The number; NaN refutes.
        n: How many prompts it covers; 0 decide nothing.
        facts: How many facts are behind them.
    """
    if n < max(claim.min_prompts, 1):
        needed = max(claim.min_prompts, 1)
        return Verdict(claim, model, Status.UNDECIDED, effect, effect, effect, n, facts, None, needed)
    status = Status.SUPPORTED if effect <= claim.threshold else Status.REFUTED
    return Verdict(claim, model, status, effect, effect, effect, n, facts)
