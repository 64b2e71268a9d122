"""Scores of single neurons predict what ablating each of them alone does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import single_neurons
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict

Check = Callable[[Verdict], None]


@pytest.mark.prediction
def test_importance_predicts_the_total_effect_of_single_neurons(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    assert_claim(single_neurons.predicts_effect(attribution_bench, attribution_method))


@pytest.mark.reported
def test_importance_beside_the_direct_effect_of_single_neurons(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    assert_claim(single_neurons.predicts_effect(attribution_bench, attribution_method, "direct"))


@pytest.mark.reported
@pytest.mark.parametrize("score", single_neurons.COMPARED)
def test_other_scores_beside_the_total_effect_of_single_neurons(
    attribution_bench: Workbench, attribution_method: str, score: str, assert_claim: Check
) -> None:
    assert_claim(single_neurons.predicts_effect(attribution_bench, attribution_method, scored_by=score))


@pytest.mark.reported
def test_later_layers_make_up_for_a_part_of_the_top_10(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    assert_claim(single_neurons.self_repair(attribution_bench, attribution_method))
