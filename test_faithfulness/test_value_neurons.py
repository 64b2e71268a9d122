"""A few hundred value neurons carry the answer (Table 13), and as many random ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import value_neurons
from attribution.claims.about_methods.common import OTHER_KINDS
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]


@pytest.mark.deletion
@pytest.mark.parametrize("metric", value_neurons.CUTS)
def test_zeroing_value_neurons_removes_the_answer(
    attribution_bench: Workbench,
    attribution_method: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, ablated.by_value_neurons)
    assert_claim(value_neurons.value_neurons_cut(attribution_bench, attribution_method, metric))


@pytest.mark.reported
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("metric", value_neurons.CUTS)
def test_what_value_neurons_take_by_other_kinds_of_ablation(
    attribution_bench: Workbench, attribution_method: str, metric: str, kind: str, assert_claim: Check
) -> None:
    assert_claim(value_neurons.value_neurons_cut(attribution_bench, attribution_method, metric, kind))


@pytest.mark.equivalence
@pytest.mark.parametrize("seed", value_neurons.SEEDS, ids="seed{}".format)
@pytest.mark.parametrize("metric", value_neurons.CUTS)
def test_zeroing_as_many_random_neurons_has_no_effect(
    attribution_bench: Workbench, attribution_method: str, metric: str, seed: int, assert_claim: Check
) -> None:
    assert_claim(value_neurons.random_neurons_have_no_effect(attribution_bench, attribution_method, seed, metric))


@pytest.mark.reported
@pytest.mark.parametrize("metric", value_neurons.CUTS)
def test_zeroing_as_many_neurons_of_matched_layer_and_norm(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(value_neurons.matched_neurons_have_no_effect(attribution_bench, attribution_method, metric))


@pytest.mark.deletion
@pytest.mark.parametrize("metric", value_neurons.CUTS)
def test_zeroing_value_neurons_takes_more_than_zeroing_matched_ones(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(value_neurons.value_neurons_beat_matched_ones(attribution_bench, attribution_method, metric))
