"""What a run is worse at than a stored run: statistics, claim by claim and prompt by prompt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from attribution.claims.judge import Evidence, Verdict
from attribution.gate.stored_run import DEFINING, Key, StoredRun, is_finite, is_possible, key_of, label, some
from attribution.models.fingerprint import ModelFacts
from attribution.wording import pluralize

__all__ = ["ALLOWABLE", "ROUNDING", "Change", "Comparison", "Kind", "compare"]

ROUNDING = 1e-4
"""How far two machines may differ on one prompt, in the unit of a claim: nats, or a probability, rank or share of 1.

A float32 logit sums some n terms in an order that differs between machines, and rounding errors of n terms grow as
sqrt(n) eps (Higham & Mary 2019). With n = 2 x 12 sublayers x 768 of width, the size of GPT-2 small, and logits of
size 10 that is 136 * 6e-8 * 10 = 8e-5; with the bundled models' 2 x 8 x 128 it is 3e-5, where 1.2e-5 was measured
between AVX and SSE instructions. Effects are differences of such log-probabilities, or flatter functions of them. What
rounding may do beyond that, a neuron at place k + 1 that changes places with one at k, or a rank, it does to few
prompts and in both directions: that is the interval's matter.
"""

ALLOWABLE = ("dtype", "device")
"""What a comparison may differ in when asked to."""

CONFIDENCE = 0.95
RESAMPLES = 9999
# Fixed, so that a comparison does not change between two runs on the same numbers.
RESAMPLING_SEED = 20241113
# Resamples of fewer facts take too few values for an interval at this level.
MIN_FACTS = 10
# Of a resample, as a share of the sample's.
LEAST_SPREAD = 0.5
# Prompts of a claim that are shown.
HURT = 4

Kind: TypeAlias = Literal["unchanged", "changed", "improved", "regressed"]


@dataclass(frozen=True)
class Change:
    """What became of one claim.

    Attributes:
        before: As the stored run has it.
        after: As the run measured it.
        kind: ``"unchanged"`` up to rounding on every prompt; ``"regressed"`` if the interval of the worsening lies
            above the tolerance; ``"improved"`` if it lies below minus the tolerance; else ``"changed"``.
        worsening: Mean over prompts, in the unit of the claim; positive is worse.
        low: Lower end of its interval.
        high: Upper end.
        hurt: The prompts that lost most, with their effects before and after.
    """

    before: Verdict
    after: Verdict
    kind: Kind
    worsening: float = 0.0
    low: float = 0.0
    high: float = 0.0
    hurt: tuple[tuple[str, float, float], ...] = ()

    def sentence(self) -> str:
        """Return which claim changed, what it measures, by how much, and on which prompts most."""
        claim = self.after.claim
        was, now = self.before.effect, self.after.effect
        text = f"{label(key_of(self.after))}: {claim.effect} was {was:.4g} and is {now:.4g}"
        if claim.test == "at_most":
            return f"{text}, where at most {claim.threshold:g} is claimed; n = {self.after.n} prompts"
        text += (
            f", worse by {self.worsening:.3g} [{self.low:.3g}, {self.high:.3g}]; n = {self.after.n} prompts of "
            f"{self.after.facts} facts"
        )
        if self.hurt:
            text += "; hurt most: " + ", ".join(
                f"{prompt!r} {before:.3g} -> {after:.3g}" for prompt, before, after in self.hurt
            )
        return text


@dataclass(frozen=True)
class Comparison:
    """A run and the stored run that it is compared with.

    Attributes:
        problems: Why the two cannot be compared, one sentence each; empty if they can.
        changes: What became of each claim that could be compared.
    """

    problems: tuple[str, ...]
    changes: tuple[Change, ...]

    def of_kind(self, kind: Kind, *, asserted: bool) -> list[Change]:
        """Return the changes of a kind, of claims that are asserted or of those that are only reported."""
        return [each for each in self.changes if each.kind == kind and each.after.claim.asserted == asserted]


def compare(
    before: StoredRun, after: StoredRun, *, tolerance: float = ROUNDING, allow: Collection[str] = ()
) -> Comparison:
    """Pair a run with a stored run, claim by claim and prompt by prompt.

    Worse means, on the mean over prompts: less, where a claim says "above"; farther from zero, where it says "within";
    and above the bound although it was not, where it says "at most". It counts as a regression if the whole interval
    of the worsening lies above the tolerance, and if changes of these sizes with random signs seldom add up to as much
    (see :func:`_intervals`). The intervals are bootstrap-t intervals that resample facts, widened so
    that those of all claims that changed hold together with 95% (Westfall & Young's max-T): a harmless
    change is red in about 2.5% of cases at most however many claims there are, and claims that rise and fall together
    cost little. Only the 97.5% quantile of a maximum is needed, which 9,999 resamples give; an interval at the level
    of one among 300 claims (Bonferroni) would need half a million. Claims of the same facts are resampled together,
    others independently, which errs on the wide side.

    Args:
        before: The stored run.
        after: The run.
        tolerance: How much worse is not worth a word, in the unit of each claim.
        allow: Of :data:`ALLOWABLE`, what may differ. Weights are not compared across dtypes: they cannot be equal.
    """
    problems = _Problems()
    # 1. The same models.
    comparable = {
        name
        for name in before.models.keys() & after.models.keys()
        if _models_agree(name, before.models[name], after.models[name], allow, problems)
    }
    # 2. The same claims, none missing and none new.
    old, new = ({key_of(verdict): verdict for verdict in each.verdicts} for each in (before, after))
    for key in sorted(old.keys() - new.keys()):
        problems.add(
            "was not measured, and the stored run has it; run the whole suite that the stored run was made from "
            "(pytest test_faithfulness, without -k), and store a new run if it was renamed or dropped on purpose",
            key,
        )
    for key in sorted(new.keys() - old.keys()):
        problems.add(
            "was measured, and the stored run does not have it; update the stored run to take it in, or leave it "
            "out of the run",
            key,
        )
    for key, bound in sorted(before.binding.items()):
        if bound and not after.binding.get(key, True):
            problems.add(
                "was binding in the stored run and is only reported in this one; let the registry assert its family "
                "again, or pass --attribution-assert if the stored run was made with it, or store a new run",
                key,
            )
    # 3. Measured in the same way on the same prompts.
    pairs = [
        (old[key], new[key])
        for key in sorted(old.keys() & new.keys())
        if key[0] in comparable and _claims_agree(old[key], new[key], problems)
    ]
    # 4. How much worse each is, with an interval.
    changes = []
    for change in _changes(pairs, tolerance):
        if all(map(math.isfinite, (change.worsening, change.low, change.high))):
            changes.append(change)
        else:
            problems.add("has a change whose interval is not finite; find out what broke", key_of(change.after))
    return Comparison(problems.sentences(), tuple(changes))


class _Problems:
    """Sentences about claims; claims with the same problem share one."""

    def __init__(self) -> None:
        self._claims: dict[str, list[Key | None]] = defaultdict(list)

    def add(self, problem: str, key: Key | None = None) -> None:
        self._claims[problem].append(key)

    def sentences(self) -> tuple[str, ...]:
        found = []
        for problem, keys in self._claims.items():
            labels = [label(key) for key in keys if key is not None]
            found.append(f"{some(labels, 'claim')} {problem}." if labels else f"{problem}.")
        return tuple(found)


def _models_agree(
    name: str, before: ModelFacts, after: ModelFacts, allow: Collection[str], problems: _Problems
) -> bool:
    agree = True
    for field in ("dtype", "device"):
        was, now = getattr(before, field), getattr(after, field)
        if was != now and field not in allow:
            agree = False
            problems.add(
                f"model {name!r} has the {field} {now!r}, and the stored run was made with {was!r}; use that, or pass "
                f"--attribution-allow={field}"
            )
    if before.weights != after.weights and before.dtype == after.dtype:
        agree = False
        problems.add(
            f"model {name!r} has the weights {after.weights[:19]}, and the stored run was made with "
            f"{before.weights[:19]}; load those, or store a new run"
        )
    return agree


def _claims_agree(before: Verdict, after: Verdict, problems: _Problems) -> bool:
    """Say whether two verdicts are about the same claim, measured on the same prompts in the same way."""
    key = key_of(after)
    if not is_finite(after):
        problems.add("has an effect that is NaN or infinite; find out what broke", key)
        return False
    for verdict, where in ((after, "here"), (before, "in the stored run")):
        if not is_possible(verdict):
            problems.add(f"has an effect {where} that no measurement of its kind can have; find out what broke", key)
            return False
    different = [
        (name.replace("_", " "), getattr(before.claim, name), getattr(after.claim, name))
        for name in DEFINING
        if not _agree(getattr(before.claim, name), getattr(after.claim, name))
    ]
    different += [
        (name, was, now)
        for name, was, now in (("seed", before.seed, after.seed), ("number of prompts", before.n, after.n))
        if was != now and (name == "seed" or before.evidence is None or after.evidence is None)
    ]
    for name, was, now in different:
        problems.add(
            f"has another {name} than in the stored run, {now!r} instead of {was!r}; measure what the stored run did, "
            "or save a new one",
            key,
        )
    if different:
        return False
    if before.evidence is None or after.evidence is None:
        return True  # Of a claim that says "at most", as the definitions agree.
    was, now = (dict(zip(each.prompts, each.facts, strict=True)) for each in (before.evidence, after.evidence))
    lost, gained = sorted(was.keys() - now.keys()), sorted(now.keys() - was.keys())
    if lost or gained:
        parts = [f"lacks {len(lost)} of the {len(was)} prompts of the stored run, such as {lost[0]!r}"] if lost else []
        if gained:
            parts.append(f"has {pluralize(len(gained), 'prompt')} that the stored run has not, such as {gained[0]!r}")
        problems.add(f"{' and '.join(parts)}; measure on the prompts of the stored run, or save a new one", key)
        return False
    moved = next((prompt for prompt in sorted(was) if was[prompt] != now[prompt]), None)
    if moved is not None:
        problems.add(
            f"counts the prompt {moved!r} to the fact {now[moved]!r}, and the stored run to {was[moved]!r}; undo that, "
            "or save a new one",
            key,
        )
    if (before.evidence.baselines is None) != (after.evidence.baselines is None):
        problems.add("is a ratio in only one of the two runs; measure what the stored run did, or store a new one", key)
        return False
    return moved is None


def _agree(was: object, now: object) -> bool:
    # A bound on rounding errors is computed from what it bounds, and is rounded itself.
    if isinstance(was, float) and isinstance(now, float):
        return math.isclose(was, now, rel_tol=ROUNDING)
    return was == now


@dataclass(frozen=True)
class _Paired:
    """A claim that changed: its facts, and the worsening on each prompt."""

    before: Verdict
    after: Verdict
    prompts: tuple[str, ...]
    facts: tuple[str, ...]
    was: npt.NDArray[np.float64]
    now: npt.NDArray[np.float64]
    worse: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Interval:
    """What is known of a claim's worsening.

    Attributes:
        mean: Over prompts.
        low: Lower end of the interval.
        high: Upper end.
        chance_of_worse: How often changes of the same sizes with random signs are as bad, for the worst of all claims.
        chance_of_better: How often they are as good.
    """

    mean: float
    low: float
    high: float
    chance_of_worse: float = 0.0
    chance_of_better: float = 0.0

    def kind(self, tolerance: float) -> Kind:
        """Return what became of the claim."""
        least = (1 - CONFIDENCE) / 2
        if self.low > tolerance and self.chance_of_worse <= least:
            return "regressed"
        return "improved" if self.high < -tolerance and self.chance_of_better <= least else "changed"


def _changes(pairs: Sequence[tuple[Verdict, Verdict]], tolerance: float) -> Iterator[Change]:
    paired: dict[Key, _Paired] = {}
    for before, after in pairs:
        if after.claim.test != "at_most":
            each = _paired(before, after)
            if np.abs(each.now - each.was).max(initial=0) > min(tolerance, ROUNDING):
                paired[key_of(after)] = each
    intervals = dict(zip(paired, _intervals(list(paired.values())), strict=True))
    for before, after in pairs:
        if after.claim.test == "at_most":
            yield Change(before, after, _exact_kind(before, after))
        elif key_of(after) not in paired:
            yield Change(before, after, "unchanged")
        else:
            each, interval = paired[key_of(after)], intervals[key_of(after)]
            worst = [place for place in np.argsort(-each.worse, kind="stable")[:HURT] if each.worse[place] > 0]
            yield Change(
                before,
                after,
                interval.kind(tolerance),
                interval.mean,
                interval.low,
                interval.high,
                tuple((each.prompts[place], float(each.was[place]), float(each.now[place])) for place in worst),
            )


def _exact_kind(before: Verdict, after: Verdict) -> Kind:
    if after.n == 0:
        # Before, too: the numbers of prompts agree.
        return "unchanged"
    bound = after.claim.threshold
    kept, keeps = before.effect <= bound, after.effect <= bound
    return "unchanged" if kept == keeps else "improved" if keeps else "regressed"


def _paired(before: Verdict, after: Verdict) -> _Paired:
    """Return two measurements of a claim in its unit, prompt by prompt."""
    assert before.evidence is not None
    assert after.evidence is not None
    place = {prompt: number for number, prompt in enumerate(after.evidence.prompts)}
    order = [place[prompt] for prompt in before.evidence.prompts]
    was = _in_unit(before.evidence)
    now = _in_unit(after.evidence)[order]
    if after.claim.test == "within":
        # |mean now| - |mean before|: what counts is the distance from zero, on whichever side.
        worse = math.copysign(1, now.sum()) * now - math.copysign(1, was.sum()) * was
    else:
        worse = was - now
    return _Paired(before, after, before.evidence.prompts, before.evidence.facts, was, now, worse)


def _in_unit(evidence: Evidence) -> npt.NDArray[np.float64]:
    """Return effects whose mean is the claim's effect: those of a ratio are divided by the mean of its baselines."""
    effects = np.asarray(evidence.effects, dtype=np.float64)
    if evidence.baselines is None or not len(effects):
        return effects
    return np.asarray(effects / np.mean(evidence.baselines))


def _intervals(paired: Sequence[_Paired]) -> list[_Interval]:
    """Return mean worsening and the ends of its interval for each claim; all intervals hold together.

    Resampling knows of no other facts than those that changed, so where a harmless change moves few of them, and all
    happen to get worse, the interval is too narrow. A harmless change may as well have moved a fact the other way. So
    each fact's change gets a random sign, the same one for all claims. A claim's total is the sum of its changes
    divided by the root of the sum of their squares; the chances say how often the largest total of all claims reaches
    this one's. If m facts changed, all for the worse, that is at least 2^-m: a loss on fewer than six facts is never
    red.

    With fewer than ten facts there is no interval: both ends are the mean, and every worsening counts.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for number, each in enumerate(paired):
        groups[each.after.model, each.facts].append(number)
    rng = np.random.default_rng(RESAMPLING_SEED)
    most, least = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    means, errors, sums_in_units = np.zeros(len(paired)), np.zeros(len(paired)), np.zeros(len(paired))
    flipped = np.zeros(RESAMPLES)
    for (_, facts), members in groups.items():
        names, cluster = np.unique(np.asarray(facts, dtype=str), return_inverse=True)
        size = np.bincount(cluster).astype(np.float64)
        sums = np.stack([np.bincount(cluster, paired[member].worse) for member in members], axis=1)
        mean = sums.sum(0) / size.sum()
        means[members] = mean
        if len(names) < MIN_FACTS:
            continue
        spread = sums - mean * size[:, None]
        errors[members] = np.sqrt((spread**2).sum(0)) / size.sum()
        upper, lower = _extremes(spread, size, rng)
        most, least = np.maximum(most, upper), np.minimum(least, lower)
        root = np.sqrt((sums**2).sum(0))
        sums_in_units[members] = np.divide(sums.sum(0), root, out=np.zeros_like(root), where=root > 0)
        flipped = np.maximum(flipped, _flipped(sums / np.where(root > 0, root, 1), rng))
    above = float(np.quantile(most, (1 + CONFIDENCE) / 2, method="higher"))
    below = float(np.quantile(least, (1 - CONFIDENCE) / 2, method="lower"))
    found = []
    for mean, error, total in zip(means.tolist(), errors.tolist(), sums_in_units.tolist(), strict=True):
        if not total:
            found.append(_Interval(mean, mean, mean))
            continue
        # The same worsening of every fact leaves no error, whatever it is multiplied by.
        ends = (mean - above * error, mean - below * error) if error else (mean, mean)
        # Signs of sums are drawn alike for both ends, so one set of largest sums serves both.
        chances = [(1 + int((flipped >= each - 1e-12).sum())) / (1 + RESAMPLES) for each in (total, -total)]
        found.append(_Interval(mean, *ends, *chances))
    return found


def _flipped(shares: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return, for each draw of a sign for every fact, the largest sum over the claims.

    Args:
        shares: Each fact's change as a share of the root of the squares of all, (facts, claims).
        rng: Where draws come from.
    """
    largest = np.empty(RESAMPLES)
    step = max(1, 2_000_000 // len(shares))
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        signs = rng.integers(2, size=(rows, len(shares))) * 2.0 - 1
        largest[start : start + rows] = (signs @ shares).max(1)
    return largest


def _extremes(
    spread: npt.NDArray[np.float64], size: npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return, for each resample of facts, the largest and the smallest t = (mean* - mean) / se* over the claims.

    Args:
        spread: Sum over the prompts of each fact of (worsening - mean), (facts, claims).
        size: Number of prompts of each fact, (facts,).
        rng: Where draws come from.
    """
    count = len(spread)
    # A resample that missed the few facts which changed has next to no spread, and t would be without bound: one
    # claim of that kind would then widen the intervals of all. At least half the sample's spread is taken.
    least_variance = LEAST_SPREAD**2 * (spread**2).sum(0)
    largest, smallest = np.empty(RESAMPLES), np.empty(RESAMPLES)
    step = max(1, 2_000_000 // count)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        draws = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        total, prompts = times @ spread, (times @ size)[:, None]
        shift = total / prompts
        # Sum of (spread - shift * size)^2 over the facts of a resample.
        squares, mixed = times @ spread**2, times @ (spread * size[:, None])
        variance = squares - 2 * shift * mixed + shift**2 * (times @ size**2)[:, None]
        error = np.sqrt(np.maximum(variance, least_variance))
        t = np.divide(total, error, out=np.zeros_like(total), where=error > 0)
        largest[start : start + rows], smallest[start : start + rows] = t.max(1), t.min(1)
    return largest, smallest
