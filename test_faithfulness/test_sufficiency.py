"""The best neurons alone keep more of the answer than as many random ones.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import sufficiency
from attribution.claims.about_methods.common import METRIC_NAMES
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.metrics import METRICS

Check = Callable[[Verdict], None]

# Shares of the FFN neurons, and of the dimensions of heads, that are kept.
SHARES = (0.05, 0.10, 0.20, 0.50)
KEPT_METRICS = ("mrr", "prob")
# As many as are measured.
MIN_PROMPTS = 50


def _units(method: str) -> str:
    names = {"attention": "dimensions of heads", "ffn": "FFN neurons"}
    return " and of ".join(names[unit] for unit in sufficiency.units_kept(method))


def _percent() -> str:
    *first, last = (f"{share * 100:g}" for share in SHARES)
    return f"{', '.join(first)} and {last}%"


@pytest.mark.sufficiency
@pytest.mark.parametrize("metric", METRICS)
def test_keeping_the_top_neurons_keeps_more_than_keeping_random_ones(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"sufficient, kept vs random: {metric}",
        sentence=f"with all {_units(method)} at their mean but the top {_percent()} by {method}, more of {metric} is "
        "left than with as many random ones kept",
        source="ours",
        effect=f"{METRIC_NAMES[metric]} left by the method's minus that left by random ones, averaged over the shares",
        test="above",
        threshold=0,
        control="the same prompts with as many random ones kept",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(METRICS),
        family="sufficiency",
    )
    effects = sufficiency.lead_over_random_neurons(bench, method, metric, shares=SHARES)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("metric", KEPT_METRICS)
def test_what_each_share_of_the_neurons_keeps(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    """The note has the whole curve: what each share of the neurons keeps, by the method and at random."""
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"sufficient, kept share: {metric}",
        sentence=f"with all {_units(method)} at their mean but the top {_percent()} by {method}, a larger share of "
        f"{metric} is left than of neurons",
        source="ours",
        effect=f"mean {metric} left, averaged over the shares, as a share of its start",
        test="above",
        threshold=sum(SHARES) / len(SHARES),
        control="as many random ones kept, in the note",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(KEPT_METRICS),
        effect_bounds="left",
        asserted=False,
    )
    effects = sufficiency.share_left(bench, method, metric, shares=SHARES)
    assert_claim(bench.verdict(claim, effects))
