"""The instrument is right: what it reports is what its definitions say, and its judge errs as little as it states."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_the_engine import by_hand, known_truths, recounts
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict
from attribution.records import Unit

Check = Callable[[Verdict], None]

pytestmark = pytest.mark.identity


def test_numbers_with_a_known_truth_get_the_verdicts_that_they_should(
    attribution_bench: Workbench, assert_claim: Check
) -> None:
    assert_claim(known_truths.judge_gives_known_verdicts(attribution_bench))


def test_logits_with_a_known_answer_are_measured_right(attribution_bench: Workbench, assert_claim: Check) -> None:
    assert_claim(known_truths.metrics_give_known_outcomes(attribution_bench))


@pytest.mark.parametrize("unit", recounts.SCORED_UNITS)
def test_scores_are_what_they_are_defined_to_be(attribution_bench: Workbench, unit: Unit, assert_claim: Check) -> None:
    assert_claim(recounts.scores_follow_their_definition(attribution_bench.of_the_engine, unit))


@pytest.mark.parametrize("unit", recounts.SEARCHED_UNITS)
def test_rankings_leave_nothing_better_out(attribution_bench: Workbench, unit: Unit, assert_claim: Check) -> None:
    assert_claim(recounts.top_neurons_are_the_top(attribution_bench.of_the_engine, unit))


def test_query_scores_are_what_they_are_defined_to_be(attribution_bench: Workbench, assert_claim: Check) -> None:
    assert_claim(recounts.query_scores_follow_their_definition(attribution_bench.of_the_engine))


def test_controls_are_drawn_as_stated(attribution_bench: Workbench, assert_claim: Check) -> None:
    assert_claim(recounts.controls_are_drawn_as_stated(attribution_bench.of_the_engine))


@pytest.mark.parametrize("kind", by_hand.ABLATIONS)
def test_ablation_is_what_hooks_on_the_plain_model_do(
    attribution_bench: Workbench, kind: str, assert_claim: Check
) -> None:
    assert_claim(by_hand.ablation_is_what_hooks_do(attribution_bench.of_the_engine, kind))


@pytest.mark.parametrize("method", by_hand.BACKWARD)
def test_backward_passes_say_what_gradients_of_the_plain_model_say(
    attribution_bench: Workbench, method: str, assert_claim: Check
) -> None:
    assert_claim(by_hand.backward_passes_are_what_hooks_find(attribution_bench.of_the_engine, method))
