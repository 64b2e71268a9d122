"""The method is faithful: ablating its top FFN neurons hurts the answer more than any baseline's (Table 2).

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import top_neurons
from attribution.claims.about_methods.common import BASELINES, METRIC_NAMES, OTHER_KINDS, RIVALS
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict
from attribution.engine.metrics import METRICS

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

# As many neurons as in the paper's Table 2.
K = 10
# From one neuron to ten times as many.
CURVE = (1, 2, 5, 10, 20, 50, 100)
SUMMARIES = {
    "area": "area under the curve of mean log-probability over log k, divided by its width, in nats",
    "comprehensiveness": "mean probability, averaged over k",
}
# Fewer prompts than this decide no claim about a mean over all of them.
MIN_PROMPTS = 300


@pytest.mark.superiority
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_zeroing_the_top_10_hurts_more_than_a_baselines_top_10(
    attribution_bench: Workbench,
    attribution_method: str,
    baseline: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    """One cell of Table 2."""
    attribution_exhibit(attribution_bench, ablated.by_method)
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"top {K} vs {baseline}: {metric}",
        sentence=f"zero ablation of the top {K} FFN neurons by {method} lowers {metric} more than of the top {K} by "
        f"{baseline}",
        source="Table 2",
        effect=f"{METRIC_NAMES[metric]} left by the baseline minus that left by the method",
        test="above",
        threshold=0,
        control=f"the same prompts with the top {K} by {baseline}",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(BASELINES) * len(METRICS),
        family="superiority",
    )
    effects = top_neurons.lead_over_baseline(bench, method, baseline, metric, k=K)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.superiority
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_zeroing_the_top_k_hurts_more_than_a_baselines_over_the_whole_curve(
    attribution_bench: Workbench, attribution_method: str, baseline: str, summary: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"deletion curve vs {baseline}: {summary}",
        sentence=f"over k = {', '.join(map(str, CURVE))}, zeroing the top k FFN neurons by {method} takes more than by "
        f"{baseline}",
        source="ours, after Table 2; comprehensiveness from DeYoung et al. 2020",
        effect=f"{SUMMARIES[summary]}, left by the baseline minus that left by the method",
        test="above",
        threshold=0,
        control=f"the same prompts with the curve of {baseline}",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(BASELINES) * len(SUMMARIES),
        family="superiority",
    )
    effects = top_neurons.lead_over_the_curve(bench, method, baseline, summary, ks=CURVE)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_top_10_beside_a_baselines_by_other_kinds_of_ablation(
    attribution_bench: Workbench, attribution_method: str, baseline: str, kind: str, assert_claim: Check
) -> None:
    """The paper ablates to zero; mean and resample ablation are reported."""
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"top {K} vs {baseline}: logp, {kind} ablation",
        sentence=f"{kind} ablation of the top {K} FFN neurons by {method} lowers logp more than of the top {K} by "
        f"{baseline}",
        source="Table 2, with another ablation",
        effect="mean log-probability in nats left by the baseline minus that left by the method",
        test="above",
        threshold=0,
        control=f"the same prompts with the top {K} by {baseline}",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(BASELINES) * len(OTHER_KINDS),
        asserted=False,
        family="superiority",
    )
    effects = top_neurons.lead_over_baseline(bench, method, baseline, "logp", k=K, kind=kind)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_kinds_of_ablation_order_the_methods_alike(
    attribution_bench: Workbench, attribution_method: str, kind: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"order of methods, zero and {kind} ablation",
        sentence=f"zero and {kind} ablation order {method} and its seven baselines alike",
        source="ours",
        effect="Spearman's rank correlation of the log-probabilities left, mean over prompts",
        test="above",
        threshold=0,
        control="0 for orders that have nothing to do with each other",
        method=method,
        comparisons=len(OTHER_KINDS),
        effect_bounds="correlation",
        asserted=False,
    )
    effects = top_neurons.agreement_of_kinds(bench, method, kind, k=K)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("rival", RIVALS)
def test_top_10_beside_those_of_methods_with_backward_passes(
    attribution_bench: Workbench, attribution_method: str, rival: str, assert_claim: Check
) -> None:
    """Reported with what each method costs."""
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"top {K} vs {rival}: logp",
        sentence=f"zeroing the top {K} FFN neurons by {method} lowers logp more than the top {K} by {rival}",
        source="ours",
        # Not the mean in nats: a few of the few prompts make up most of it, and its interval errs in up to 10% of
        # simulated samples.
        effect=f"share of prompts in which {rival} leaves more than the method",
        test="above",
        threshold=0.5,
        control=f"the same prompts with the top {K} by {rival}",
        method=method,
        comparisons=len(RIVALS),
        effect_bounds="share",
        asserted=False,
    )
    effects = top_neurons.lead_over_rival(bench, method, rival, k=K)
    assert_claim(bench.verdict(claim, effects))
