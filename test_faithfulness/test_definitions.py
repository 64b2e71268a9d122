"""The instrument is right: its numbers are what their definitions say, and its judge errs as rarely as it states.

Each test states its claim, counts or measures what is wrong on a few prompts, and judges the claim by the number.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_the_engine import by_hand, known_truths, recounts
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.records import Unit

Check = Callable[[Verdict], None]

pytestmark = pytest.mark.identity

# Neurons of a ranking that is searched for what it misses.
K = 10
# Neurons whose scores are compared with gradients by hand.
RANKED = 50


def test_numbers_with_a_known_truth_get_the_verdicts_that_they_should(
    attribution_bench: Workbench, assert_claim: Check
) -> None:
    """A broken judge must not judge itself, so the verdict is put together by hand."""
    claim = Claim(
        id="judge: known verdicts",
        sentence="numbers with a known mean and spread get the verdicts that follow from these",
        source="ours",
        effect="samples with another verdict",
        test="at_most",
        threshold=0,
        control="each sample gets another verdict from a judge with one mistake (docs/faults.md)",
    )
    mistakes = known_truths.mistakes_of_the_judge()
    assert_claim(known_truths.verdict_by_hand(attribution_bench, claim, mistakes))


def test_logits_with_a_known_answer_are_measured_right(attribution_bench: Workbench, assert_claim: Check) -> None:
    claim = Claim(
        id="metrics: known outcomes",
        sentence="rank, reciprocal rank, probability, log-probability and the selection rule are right of logits made "
        "for the purpose",
        source="ours",
        effect="logits that are measured wrongly",
        test="at_most",
        threshold=0,
        control="each logit vector is measured otherwise with one mistake (docs/faults.md)",
    )
    mistakes = known_truths.mistakes_of_the_metrics()
    assert_claim(known_truths.verdict_by_hand(attribution_bench, claim, mistakes))


@pytest.mark.parametrize("unit", recounts.SCORED_UNITS)
def test_scores_are_what_they_are_defined_to_be(attribution_bench: Workbench, unit: Unit, assert_claim: Check) -> None:
    bench = attribution_bench.of_the_engine
    claim = Claim(
        id=f"scores by definition: {unit}",
        sentence=f"the {len(recounts.scores_defined_for(unit))} scores a) to h) of Table 2 that a {unit} candidate has "
        "are what they are defined to be, and none exceeds its bound",
        source="Eq. 13 and Table 2",
        effect="scores and bounds off by more than rounding",
        test="at_most",
        threshold=0,
        control="a wrong stream, scale, coefficient or vector puts scores off (docs/faults.md)",
    )
    assert_claim(bench.verdict(claim, recounts.scores_off(bench, unit)))


@pytest.mark.parametrize("unit", recounts.SEARCHED_UNITS)
def test_rankings_leave_nothing_better_out(attribution_bench: Workbench, unit: Unit, assert_claim: Check) -> None:
    bench = attribution_bench.of_the_engine
    claim = Claim(
        id=f"top {K} by definition: {unit}",
        sentence=f"rankings of the top {K} {unit} neurons by the scores of Table 2 leave nothing better out, stand in "
        "order and belong to their prompts",
        source="ours",
        effect="neurons out of place",
        test="at_most",
        threshold=0,
        control="a search that stops early or looks at the wrong end misplaces neurons (docs/faults.md)",
    )
    assert_claim(bench.verdict(claim, recounts.neurons_out_of_place(bench, unit, k=K)))


def test_query_scores_are_what_they_are_defined_to_be(attribution_bench: Workbench, assert_claim: Check) -> None:
    bench = attribution_bench.of_the_engine
    claim = Claim(
        id="query scores by definition",
        sentence="query scores are the shares that components and FFN neurons have in the value neurons' "
        "pre-activations, weighted by importance",
        source="arXiv 2312.12141, normalised as in its published code, with centring and biases",
        effect="scores off by more than rounding",
        test="at_most",
        threshold=0,
        control="a wrong position, norm, weight or component puts scores off (docs/faults.md)",
    )
    assert_claim(bench.verdict(claim, recounts.query_scores_off(bench)))


def test_controls_are_drawn_as_stated(attribution_bench: Workbench, assert_claim: Check) -> None:
    bench = attribution_bench.of_the_engine
    claim = Claim(
        id="controls by definition",
        sentence="random neurons are drawn uniformly, anew for each prompt and seed; matched ones are other neurons of "
        "the same layers; experiments with them are told apart",
        source="ours",
        effect="draws that are not as stated",
        test="at_most",
        threshold=0,
        control="one draw for all prompts, or among the chosen neurons, is not as stated (docs/faults.md)",
    )
    assert_claim(bench.verdict(claim, recounts.draws_not_as_stated(bench)))


@pytest.mark.parametrize("kind", by_hand.ABLATIONS)
def test_ablation_is_what_hooks_on_the_plain_model_do(
    attribution_bench: Workbench, kind: str, assert_claim: Check
) -> None:
    bench = attribution_bench.of_the_engine
    claim = Claim(
        id=f"ablation by hand: {kind}",
        sentence=f"ablation ({kind}) of chosen records is what hooks on the plain model do to the same neurons",
        source="ours",
        effect="difference of log-probabilities as a share of the change by ablation, L2 norms",
        test="at_most",
        # The square root of the machine epsilon of the weights: half of the digits.
        threshold=by_hand.tolerance(bench.model),
        control="an edit at another place, or with another value, differs by all of the change (docs/faults.md)",
    )
    assert_claim(bench.verdict(claim, by_hand.difference_of_ablations(bench, kind)))


@pytest.mark.parametrize("method", by_hand.BACKWARD)
def test_backward_passes_say_what_gradients_of_the_plain_model_say(
    attribution_bench: Workbench, method: str, assert_claim: Check
) -> None:
    bench = attribution_bench.of_the_engine
    claim = Claim(
        id=f"scores by hand: {method}",
        sentence=f"scores by {method} are what gradients of the plain model say",
        source="ours",
        effect=f"difference of the top {RANKED} scores of a unit as a share of them, L2 norms",
        test="at_most",
        # The square root of the machine epsilon of the weights: half of the digits.
        threshold=by_hand.tolerance(bench.model),
        control="a slope at another place or position differs by the score (docs/faults.md)",
    )
    assert_claim(bench.verdict(claim, by_hand.difference_of_scores(bench, method, k=RANKED)))
