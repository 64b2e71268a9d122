"""Scores of single neurons predict what ablating each of them alone does.

A neuron's total effect is measured by a rerun without it. Its direct effect is what is missing if only its output is
taken out of the final state, so that later layers do not react.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import single_neurons
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict

Check = Callable[[Verdict], None]

K = 10
# A moderate correlation by the convention of Cohen 1988.
MODERATE = 0.3
# What is averaged over prompts is a correlation over 40 neurons, whose standard error is about 1 / sqrt(40 - 3). So the
# mean of 50 is known to a few hundredths, far less than the distance from no correlation to a moderate one.
MIN_PROMPTS = 50


@pytest.mark.prediction
def test_importance_predicts_the_total_effect_of_single_neurons(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id="importance predicts total effect",
        sentence=f"scores by {method} order the FFN neurons of a prompt, sampled by their rank by {method}, as the "
        "fall of log p(answer) after a rerun without the neuron does",
        source="ours",
        effect="Spearman's rank correlation over the sampled neurons, mean over prompts",
        test="above",
        threshold=MODERATE,
        control="random scores on the same sample, reported as a claim of their own",
        min_prompts=MIN_PROMPTS,
        method=method,
        effect_bounds="correlation",
        family="prediction",
    )
    effects = single_neurons.correlations(bench, method, "total", scored_by=method)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
def test_importance_beside_the_direct_effect_of_single_neurons(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id="importance predicts direct effect",
        sentence=f"scores by {method} order the FFN neurons of a prompt, sampled by their rank by {method}, as the "
        "fall of log p(answer) when only what the neuron writes into the final state is missing does",
        source="ours",
        effect="Spearman's rank correlation over the sampled neurons, mean over prompts",
        test="above",
        threshold=MODERATE,
        control="random scores on the same sample, reported as a claim of their own",
        min_prompts=MIN_PROMPTS,
        method=method,
        effect_bounds="correlation",
        asserted=False,
        family="prediction",
    )
    effects = single_neurons.correlations(bench, method, "direct", scored_by=method)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("score", single_neurons.COMPARED)
def test_other_scores_beside_the_total_effect_of_single_neurons(
    attribution_bench: Workbench, attribution_method: str, score: str, assert_claim: Check
) -> None:
    """The seven baselines, and random scores: the control of the claims above."""
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"importance predicts total effect, by {score}",
        sentence=f"scores by {score} order the FFN neurons of a prompt, sampled by their rank by {method}, as the "
        "fall of log p(answer) after a rerun without the neuron does",
        source="ours",
        effect="Spearman's rank correlation over the sampled neurons, mean over prompts",
        test="above",
        threshold=MODERATE,
        control="random scores on the same sample, reported as a claim of their own",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(single_neurons.COMPARED),
        effect_bounds="correlation",
        asserted=False,
        family="prediction",
    )
    effects = single_neurons.correlations(bench, method, "total", scored_by=score)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
def test_later_layers_make_up_for_a_part_of_the_top_10(
    attribution_bench: Workbench, attribution_method: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"self-repair of the top {K}",
        sentence=f"zeroing one of the top {K} FFN neurons by {method} takes less than what it writes is worth: later "
        "layers make up for a part",
        source="ours, after McGrath et al. 2023",
        # Not the mean in nats: a few of the few prompts make up most of it, and its interval errs in up to 29% of
        # simulated samples.
        effect=f"share of prompts in which the direct effects of the top {K} add up to more than the total ones",
        test="above",
        threshold=0.5,
        control="below one half where later layers carry the loss on",
        min_prompts=MIN_PROMPTS,
        method=method,
        effect_bounds="share",
        asserted=False,
    )
    effects = single_neurons.repaired(bench, method, k=K)
    assert_claim(bench.verdict(claim, effects))
