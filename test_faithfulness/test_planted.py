"""What is planted in a copy of a model is found by attribution and undone by ablation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import planted
from attribution.claims.about_methods.common import BASELINES
from attribution.claims.about_methods.plants import KINDS, Kind
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict

Check = Callable[[Verdict], None]


@pytest.mark.planted
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_planted_to_write_the_answer_is_ranked_first(
    attribution_bench: Workbench, attribution_method: str, kind: Kind, assert_claim: Check
) -> None:
    assert_claim(planted.is_found(attribution_bench, attribution_method, kind))


@pytest.mark.planted
def test_both_ends_of_a_planted_chain_are_ranked_first(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    assert_claim(planted.both_ends_of_a_chain_are_found(attribution_bench, attribution_method))


@pytest.mark.planted
@pytest.mark.parametrize("kind", KINDS)
def test_ablating_what_was_planted_undoes_it(attribution_bench: Workbench, kind: Kind, assert_claim: Check) -> None:
    assert_claim(planted.is_undone(attribution_bench, kind))


@pytest.mark.planted
def test_ablating_the_query_neuron_breaks_a_planted_chain(attribution_bench: Workbench, assert_claim: Check) -> None:
    assert_claim(planted.chain_breaks_at_its_query_neuron(attribution_bench))


@pytest.mark.reported
@pytest.mark.parametrize("kind", KINDS)
def test_how_a_method_loses_what_was_planted_as_it_grows_weaker(
    attribution_bench: Workbench, attribution_method: str, kind: Kind, assert_claim: Check
) -> None:
    assert_claim(planted.recovery(attribution_bench, attribution_method, kind, attribution_method))


@pytest.mark.reported
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_how_a_baseline_loses_what_was_planted_as_it_grows_weaker(
    attribution_bench: Workbench, attribution_method: str, kind: Kind, baseline: str, assert_claim: Check
) -> None:
    assert_claim(planted.recovery(attribution_bench, attribution_method, kind, baseline))
