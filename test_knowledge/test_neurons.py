"""Where knowledge lives, by neuron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attribution.claims.about_models import neurons, words
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict

Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

pytestmark = pytest.mark.knowledge


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_few_neurons_carry_most_of_the_total(
    attribution_bench: Workbench,
    kind: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, neurons.sums_of_neurons)
    assert_claim(neurons.few_neurons_carry_most(attribution_bench, kind))


@pytest.mark.parametrize("side", neurons.SIDES)
def test_prompts_of_a_category_share_neurons(
    attribution_bench: Workbench,
    attribution_category: str,
    side: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, neurons.shared_neurons)
    assert_claim(neurons.prompts_share_neurons(attribution_bench, attribution_category, side))


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_value_neurons_raise_words_of_their_category(
    attribution_bench: Workbench,
    attribution_category: str,
    kind: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, words.interpretable_neurons)
    assert_claim(words.neurons_raise_words_of_their_category(attribution_bench, attribution_category, kind))


def test_increase_of_probability_picks_deeper_neurons_than_that_of_log_probability(
    attribution_bench: Workbench,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, neurons.depth_of_methods)
    assert_claim(neurons.prob_increase_picks_deeper_neurons(attribution_bench))
