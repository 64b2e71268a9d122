"""Query neurons wake the value neurons (Table 7), and as many random FFN neurons do nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import query_neurons
from attribution.claims.about_methods.value_neurons import SEEDS
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict
from attribution.engine.metrics import METRICS

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]


@pytest.mark.deletion
@pytest.mark.parametrize("metric", METRICS)
def test_zeroing_query_neurons_hurts_more_than_zeroing_random_ones(
    attribution_bench: Workbench,
    attribution_method: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, ablated.by_query_neurons)
    assert_claim(query_neurons.query_neurons_beat_random_ones(attribution_bench, attribution_method, metric))


@pytest.mark.reported
@pytest.mark.parametrize("metric", METRICS)
def test_query_neurons_beside_others_of_the_same_layers(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(
        query_neurons.query_neurons_beat_those_of_the_same_layers(attribution_bench, attribution_method, metric)
    )


@pytest.mark.reported
@pytest.mark.parametrize("metric", query_neurons.PAPER_CUTS)
def test_what_query_neurons_take_beside_the_papers(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(query_neurons.query_neurons_cut(attribution_bench, attribution_method, metric))


@pytest.mark.equivalence
@pytest.mark.parametrize("seed", SEEDS, ids="seed{}".format)
@pytest.mark.parametrize("metric", query_neurons.PAPER_CUTS)
def test_zeroing_as_many_random_ffn_neurons_has_no_effect(
    attribution_bench: Workbench, attribution_method: str, metric: str, seed: int, assert_claim: Check
) -> None:
    assert_claim(query_neurons.random_ffn_neurons_have_no_effect(attribution_bench, attribution_method, seed, metric))
