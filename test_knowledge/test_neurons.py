"""Where knowledge is stored, by neuron.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attribution.claims.about_methods.common import METHOD
from attribution.claims.about_models import neurons, words
from attribution.claims.about_models.survey import survey
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict

Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

pytestmark = pytest.mark.knowledge

K = 10
TOKENS = 10
# Fewer prompts decide nothing: of all categories together, of one, and of those on which every neuron is scored.
MIN_PROMPTS = 100
MIN_OF_CATEGORY = 20
MIN_SUMMED = 20


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_few_neurons_carry_most_of_the_total(
    attribution_bench: Workbench,
    kind: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, neurons.sums_of_neurons)
    bench = attribution_bench
    number = survey(bench).value_neurons(kind)
    claim = Claim(
        id=f"few {kind} neurons carry most",
        sentence=f"the top {number} {kind} neurons of a prompt sum to more than half of all of them together",
        source="Tables 5 and 12",
        effect="sum of the top neurons' importance minus half of the sum of all, in nats",
        test="above",
        threshold=0.0,
        control="as many random neurons, which sum to their share of all",
        min_prompts=MIN_SUMMED,
        # Attention and FFN.
        comparisons=2,
        family="sums of neurons",
        gated=False,
    )
    effects = neurons.sum_beyond_half(bench, kind)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.parametrize("side", neurons.SIDES)
def test_prompts_of_a_category_share_neurons(
    attribution_bench: Workbench,
    attribution_category: str,
    side: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    """Beyond what their layers explain."""
    attribution_exhibit(attribution_bench, neurons.shared_neurons)
    bench, category = attribution_bench, attribution_category
    number = survey(bench).shared_of
    claim = Claim(
        id=f"prompts share {side} neurons: {category}",
        sentence=f"FFN {side} neurons among the top {number} of more than half of some {category} prompts are among "
        "those of others as well, more than neurons of the same layers",
        source="Table 8",
        effect=f"shared neurons found in a prompt minus those expected by its layers, as a share of its top {number}",
        test="above",
        threshold=0.0,
        control="as many neurons drawn in each layer as the prompt has there",
        min_prompts=MIN_OF_CATEGORY,
        comparisons=len(neurons.SIDES) * len(bench.sample.knowledge.words),
        family="shared neurons",
        gated=False,
    )
    effects = neurons.found_in_other_prompts(bench, category, side)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_value_neurons_raise_words_of_their_category(
    attribution_bench: Workbench,
    attribution_category: str,
    kind: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, words.interpretable_neurons)
    bench, category = attribution_bench, attribution_category
    claim = Claim(
        id=f"{kind} value neurons raise words of their category: {category}",
        sentence=f"of the {TOKENS} tokens that a top {kind} neuron of a {category} prompt raises most, more are other "
        "words of the category than of those that random neurons raise",
        source="Table 9",
        effect="share of words of the category, without the answer itself, minus that of random neurons' tokens",
        test="above",
        threshold=0.0,
        control="as many random neurons of the same layers, by the sign of their coefficient as well",
        min_prompts=MIN_OF_CATEGORY,
        # Attention and FFN, in each category.
        comparisons=2 * len(bench.sample.knowledge.words),
        family="words",
        gated=False,
    )
    effects = words.words_raised(bench, category, kind, tokens=TOKENS)
    assert_claim(bench.verdict(claim, effects))


def test_increase_of_probability_picks_deeper_neurons_than_that_of_log_probability(
    attribution_bench: Workbench,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, neurons.depth_of_methods)
    bench = attribution_bench
    claim = Claim(
        id="prob_increase picks deeper neurons",
        sentence=f"the top {K} FFN neurons by prob_increase lie deeper than those by {METHOD}",
        source="Figures 2 and 9",
        effect="mean depth of the one minus that of the other, from 0 for the first layer to 1 for the last",
        test="above",
        threshold=0.0,
        control=f"the top {K} of the same prompts by {METHOD}",
        min_prompts=MIN_PROMPTS,
        family="depth of neurons",
        gated=False,
    )
    effects = neurons.how_much_deeper(bench, "prob_increase", METHOD, k=K)
    assert_claim(bench.verdict(claim, effects))
