"""The judge: verdicts on effects whose truth is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from attribution.claims import judge as claims
from attribution.claims.judge import Claim, Status, judge, judge_exact
from attribution.errors import BadInputError


def _claim(test: str, threshold: float, min_prompts: int = 0) -> Claim:
    return Claim("c", "a sentence", "ours", "an effect", test, threshold, "a control", min_prompts)  # type: ignore[arg-type]


def _alone(n: int) -> list[str]:
    """One prompt per fact."""
    return [str(number) for number in range(n)]


@pytest.mark.parametrize(
    ("mean", "status"), [(1.0, Status.SUPPORTED), (-1.0, Status.REFUTED), (0.05, Status.INCONCLUSIVE)]
)
def test_effect_above_threshold_is_judged_by_its_interval(mean: float, status: Status) -> None:
    effects = np.random.default_rng(0).normal(mean, 1, 60)
    verdict = judge(_claim("above", 0), model="m", effects=effects.tolist(), facts=_alone(60))
    assert verdict.status is status
    assert verdict.low < verdict.effect < verdict.high
    assert verdict.effect == pytest.approx(effects.mean())


@pytest.mark.parametrize(
    ("mean", "spread", "status"),
    [
        (0.0, 0.1, Status.SUPPORTED),
        (0.5, 0.1, Status.REFUTED),
        (-0.5, 0.1, Status.REFUTED),
        (0, 5, Status.INCONCLUSIVE),
    ],
)
def test_no_effect_is_shown_only_by_an_interval_inside_the_margin(mean: float, spread: float, status: Status) -> None:
    effects = np.random.default_rng(1).normal(mean, spread, 80)
    verdict = judge(_claim("within", 0.1), model="m", effects=effects.tolist(), facts=_alone(80))
    assert verdict.status is status


def test_interval_agrees_with_the_t_interval_on_normal_effects() -> None:
    effects = np.random.default_rng(2).normal(0.3, 1, 400)
    verdict = judge(_claim("above", 0), model="m", effects=effects.tolist(), facts=_alone(400))
    low, high = stats.t.interval(0.95, 399, effects.mean(), stats.sem(effects))
    assert (verdict.low, verdict.high) == pytest.approx((low, high), abs=0.01)


def test_prompts_of_one_fact_count_as_one_observation() -> None:
    effects = np.random.default_rng(3).normal(0.3, 1, 100)
    alone = judge(_claim("above", 0), model="m", effects=effects.tolist(), facts=_alone(100))
    copied = judge(
        _claim("above", 0), model="m", effects=effects.repeat(4).tolist(), facts=np.repeat(_alone(100), 4).tolist()
    )
    assert (copied.n, copied.facts) == (400, 100)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


def test_relative_effect_is_a_ratio_of_sums() -> None:
    before, after = [1.0, 0.5, 0.25, 1.0], [0.1, 0.1, 0.05, 0.2]
    falls = [b - a for b, a in zip(before, after, strict=True)]
    verdict = judge(_claim("above", 0.5), model="m", effects=falls, baselines=before, facts=_alone(4))
    assert verdict.effect == pytest.approx(sum(falls) / sum(before))


def test_constant_effects_have_an_interval_without_width() -> None:
    verdict = judge(_claim("within", 0.1), model="m", effects=[0.0] * 10, facts=_alone(10))
    assert (verdict.status, verdict.low, verdict.high) == (Status.SUPPORTED, 0.0, 0.0)
    dusty = judge(_claim("above", 0.5), model="m", effects=[0.6, 0.6 + 1e-16, 0.1 + 0.5, 0.2 * 3], facts=_alone(4))
    assert (dusty.status, dusty.low, dusty.high) == (Status.SUPPORTED, pytest.approx(0.6), pytest.approx(0.6))


def test_intervals_of_several_samples_are_those_of_each() -> None:
    rng = np.random.default_rng(10)
    numerators, denominators = rng.normal(0.3, 1, (3, 40)), rng.uniform(1, 2, (3, 40))
    numerators[1], denominators[1] = 0.5, 2
    low, high = claims.interval(numerators, denominators, 0.95)
    for row in range(3):
        alone = claims.interval(numerators[row], denominators[row], 0.95)
        assert (low[row], high[row]) == pytest.approx([float(end) for end in alone])
    assert (low[1], high[1]) == (0.25, 0.25)


def test_verdict_is_the_same_each_time_and_in_any_order_of_prompts() -> None:
    effects = np.random.default_rng(4).normal(0.1, 1, 50).tolist()
    first = judge(_claim("above", 0), model="m", effects=effects, facts=_alone(50))
    again = judge(_claim("above", 0), model="m", effects=effects[::-1], facts=_alone(50)[::-1])
    assert (first.low, first.high, first.status) == pytest.approx((again.low, again.high, again.status))


def test_too_few_prompts_decide_nothing_and_say_how_many_are_needed() -> None:
    effects = np.random.default_rng(5).normal(5, 1, 20).tolist()
    verdict = judge(_claim("above", 0, min_prompts=300), model="m", effects=effects, facts=_alone(20))
    assert verdict.low > 0, "the interval alone would support it"
    assert verdict.status is Status.UNDECIDED
    assert verdict.needed == 300
    assert verdict.sentence().startswith("undecided: 20 of 300 prompts: ")
    assert judge(_claim("above", 0), model="m", effects=[], facts=[]).status is Status.UNDECIDED


def test_inconclusive_verdict_estimates_how_many_prompts_would_decide() -> None:
    rng = np.random.default_rng(6)
    verdict = judge(_claim("above", 0), model="m", effects=rng.normal(0.1, 1, 100).tolist(), facts=_alone(100))
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.needed is not None
    # z^2 * sd^2 / effect^2, the textbook sample size.
    assert verdict.needed == pytest.approx(1.96**2 / verdict.effect**2, rel=0.3)


def test_wrong_side_needs_no_number_of_prompts() -> None:
    rng = np.random.default_rng(7)
    effects = rng.normal(0, 1, 100)
    verdict = judge(
        _claim("above", 0), model="m", effects=(effects - effects.mean() - 0.01).tolist(), facts=_alone(100)
    )
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.needed is None
    assert "wrong side" in verdict.sentence()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_effects_that_are_not_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(BadInputError, match="NaN or infinite"):
        judge(_claim("above", 0), model="m", effects=[1.0, bad], facts=_alone(2))


def test_prompt_measured_twice_is_an_error() -> None:
    with pytest.raises(BadInputError, match="2 effects of 1 different prompts"):
        judge(_claim("above", 0), model="m", effects=[1.0, 2.0], facts=_alone(2), prompts=["same", "same"])


def test_interval_of_a_family_is_wider_by_the_number_of_its_claims() -> None:
    effects = np.random.default_rng(9).normal(0.3, 1, 300).tolist()
    one = judge(_claim("above", 0), model="m", effects=effects, facts=_alone(300))
    many = judge(replace(_claim("above", 0), comparisons=21), model="m", effects=effects, facts=_alone(300))
    low, high = stats.t.interval(1 - 0.05 / 21, 299, np.mean(effects), stats.sem(effects))
    assert (many.low, many.high) == pytest.approx((low, high), abs=0.03)
    assert many.low < one.low < one.high < many.high


def test_lengths_must_agree() -> None:
    with pytest.raises(BadInputError, match="2 effects, 2 baselines and 3 facts"):
        judge(_claim("above", 0), model="m", effects=[1.0, 2.0], facts=_alone(3))


@pytest.mark.parametrize(
    ("effect", "n", "status"),
    [
        (0.5, 3, Status.SUPPORTED),
        (2.0, 3, Status.REFUTED),
        (math.nan, 3, Status.REFUTED),
        (0.5, 0, Status.UNDECIDED),
    ],
)
def test_exact_number_is_compared_with_its_bound(effect: float, n: int, status: Status) -> None:
    assert judge_exact(_claim("at_most", 1), model="m", effect=effect, n=n, facts=n).status is status


def test_sentence_names_measurement_expectation_and_control() -> None:
    verdict = judge(_claim("above", 0.9), model="tiny", effects=[0.1, 0.2, 0.3], facts=_alone(3))
    sentence = verdict.sentence()
    for part in ("refuted", "a sentence", "tiny", "an effect is 0.2", "above 0.9", "n = 3 prompts", "a control"):
        assert part in sentence


@pytest.mark.parametrize(("test", "truth"), [("above", 0.0), ("within", 0.5)])
def test_claims_that_are_false_are_supported_in_at_most_5_percent_of_samples(
    monkeypatch: pytest.MonkeyPatch, test: str, truth: float
) -> None:
    """Simulated at the edge, where a false claim is hardest to tell from a true one: 60 facts of 3 prompts."""
    monkeypatch.setattr(claims, "RESAMPLES", 999)
    rng = np.random.default_rng(8)
    facts = list(itertools.chain.from_iterable([name] * 3 for name in _alone(60)))
    samples, supported = 200, 0
    for _ in range(samples):
        # Prompts of one fact share most of their effect, as phrasings do.
        effects = truth + np.repeat(rng.normal(0, 1, 60), 3) + rng.normal(0, 0.3, 180)
        claim = _claim(test, truth)
        supported += judge(claim, model="m", effects=effects.tolist(), facts=facts).status is Status.SUPPORTED
    # 17 of 200 or more would have a chance of under 2% if the rate were 5%.
    assert stats.binomtest(supported, samples, 0.05, alternative="greater").pvalue > 0.02
