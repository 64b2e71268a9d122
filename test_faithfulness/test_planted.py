"""What is planted in a copy of a model is found by attribution and undone by ablation.

Strength 1 is as loud as the loudest neuron of the model without plants, in the median over prompts. Every prompt is
asked for a word that is planted in the copy, and a second neuron, just as loud, writes another word.

Each test states its claim, measures it, and judges the claim by what was measured.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import planted
from attribution.claims.about_methods.common import BASELINES
from attribution.claims.about_methods.plants import KINDS, Kind
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict

Check = Callable[[Verdict], None]

# From where a method has no excuse down to where one neuron among many is not heard. To first order a neuron's
# importance is its output's inner product with one gradient. So at strength s no natural neuron of median loudness can
# win unless that gradient is more than arccos(1/s) away from the direction planted: 60 degrees at the greatest
# strength. Each further strength is half the one before.
STRENGTHS = (2.0, 1.0, 0.5, 0.25, 0.125)
# Nine of ten prompts, and nine tenths of an effect.
FOUND = 0.9
BROKEN = 0.9
# With fewer than three quarters of the 64 prompts, or of the categories, a share says little.
MIN_PROMPTS = 48
# Three kinds are found, a chain at both ends, and it breaks.
COMPARISONS = 5
WHAT = {
    "ffn": "a planted FFN neuron",
    "attention": "a planted attention neuron",
    "chain": "the value neuron of a planted chain",
}


@pytest.mark.planted
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_planted_to_write_the_answer_is_ranked_first(
    attribution_bench: Workbench, attribution_method: str, kind: Kind, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"planted {kind}, strength {STRENGTHS[0]:g}: found",
        sentence=f"{method} ranks {WHAT[kind]} first of all {planted.unit_of(kind)} neurons",
        source="ours",
        effect=f"share of prompts, at strength {STRENGTHS[0]:g}",
        test="above",
        threshold=FOUND,
        control="a second neuron, planted just as loud, that writes another word; and strength 0",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=COMPARISONS,
        effect_bounds="share",
        family="planted",
    )
    effects = planted.ranked_first(bench, method, kind, STRENGTHS)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.planted
def test_both_ends_of_a_planted_chain_are_ranked_first(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"planted chain, strength {STRENGTHS[0]:g}: both ends found",
        sentence=f"{method} ranks the value neuron of a planted chain first of all attention neurons, and its query "
        "neuron is first of all FFN neurons that wake it",
        source="ours",
        effect=f"share of prompts, at strength {STRENGTHS[0]:g}",
        test="above",
        threshold=FOUND,
        control="a second chain, planted just as loud, that writes another word; and strength 0",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=COMPARISONS,
        effect_bounds="share",
        family="planted",
    )
    effects = planted.both_ends_ranked_first(bench, method, STRENGTHS)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.planted
@pytest.mark.parametrize("kind", KINDS)
def test_ablating_what_was_planted_undoes_it(attribution_bench: Workbench, kind: Kind, assert_claim: Check) -> None:
    bench = attribution_bench
    claim = Claim(
        id=f"planted {kind}, strength {STRENGTHS[0]:g}: undone",
        sentence=f"ablating the planted {kind} neurons leaves the log-probability that the model has without its own "
        "neurons in their places",
        source="ours",
        effect="largest difference over prompts, in units of the rounding bound",
        test="at_most",
        threshold=1,
        control="the planted neurons, not ablated",
        min_prompts=MIN_PROMPTS,
        family="planted",
    )
    difference = planted.difference_after_ablation(bench, kind, STRENGTHS[0])
    assert_claim(bench.verdict(claim, difference))


@pytest.mark.planted
def test_ablating_the_query_neuron_breaks_a_planted_chain(attribution_bench: Workbench, assert_claim: Check) -> None:
    bench = attribution_bench
    claim = Claim(
        id=f"planted chain, strength {STRENGTHS[0]:g}: broken at its query neuron",
        sentence=f"ablating the query neuron of a planted chain takes over {BROKEN:.0%} of the log-probability that "
        "ablating both its ends takes",
        source="ours",
        effect="fall of mean log-probability without the query neuron, as a share of that without both ends",
        test="above",
        threshold=BROKEN,
        control="the second chain, which stays; and the value neuron's own reading of the stream",
        min_prompts=MIN_PROMPTS,
        comparisons=COMPARISONS,
        family="planted",
    )
    effects = planted.fall_without_query_neuron(bench, STRENGTHS[0])
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("kind", KINDS)
def test_how_a_method_loses_what_was_planted_as_it_grows_weaker(
    attribution_bench: Workbench, attribution_method: str, kind: Kind, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"planted {kind}, recovered by {method}",
        sentence=f"{method} ranks {'both ends' if kind == 'chain' else WHAT[kind]} first at some strength",
        source="ours",
        effect=f"share of prompts, mean over strengths {', '.join(f'{strength:g}' for strength in STRENGTHS)}",
        test="above",
        threshold=0,
        control="a second neuron, planted just as loud, that writes another word; and strength 0",
        method=method,
        comparisons=1 + len(BASELINES),
        effect_bounds="share",
        asserted=False,
    )
    effects = planted.ranked_first_over_strengths(bench, method, kind, STRENGTHS)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_how_a_baseline_loses_what_was_planted_as_it_grows_weaker(
    attribution_bench: Workbench, attribution_method: str, kind: Kind, baseline: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"planted {kind}, recovered by {baseline}",
        sentence=f"{baseline} ranks {WHAT[kind]} first at some strength",
        source="ours",
        effect=f"share of prompts, mean over strengths {', '.join(f'{strength:g}' for strength in STRENGTHS)}",
        test="above",
        threshold=0,
        control="a second neuron, planted just as loud, that writes another word; and strength 0",
        method=method,
        comparisons=1 + len(BASELINES),
        effect_bounds="share",
        asserted=False,
    )
    effects = planted.ranked_first_over_strengths(bench, baseline, kind, STRENGTHS)
    assert_claim(bench.verdict(claim, effects))
