"""Ablation hurts what neurons and heads are for, and leaves unrelated facts and categories alone (Table 11)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import specificity
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]


@pytest.mark.specificity
@pytest.mark.parametrize("chosen", specificity.SETS)
def test_zeroing_a_facts_neurons_hurts_it_more_than_an_unrelated_fact(
    attribution_bench: Workbench, attribution_method: str, chosen: str, assert_claim: Check
) -> None:
    assert_claim(specificity.neurons_hurt_their_fact_most(attribution_bench, attribution_method, chosen))


@pytest.mark.specificity
@pytest.mark.parametrize("chosen", specificity.VALUE_SETS)
def test_zeroing_a_facts_neurons_leaves_unrelated_facts_alone(
    attribution_bench: Workbench, attribution_method: str, chosen: str, assert_claim: Check
) -> None:
    assert_claim(specificity.unrelated_facts_stay(attribution_bench, attribution_method, chosen))


@pytest.mark.specificity
@pytest.mark.parametrize("metric", specificity.HEAD_METRICS)
def test_zeroing_the_heads_of_a_category_hurts_it_more_than_zeroing_unrelated_ones(
    attribution_bench: Workbench,
    attribution_method: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, ablated.by_heads)
    assert_claim(specificity.heads_hurt_their_category_most(attribution_bench, attribution_method, metric))


@pytest.mark.reported
@pytest.mark.parametrize("metric", specificity.PAPER_HEADS)
def test_what_heads_of_related_categories_take_beside_the_papers(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(specificity.heads_of_related_categories_hurt_more(attribution_bench, attribution_method, metric))
