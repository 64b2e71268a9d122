"""Query neurons activate the value neurons (Table 7), and the same number of random FFN neurons does nothing.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import query_neurons
from attribution.claims.about_methods.common import METRIC_NAMES, budget_of
from attribution.claims.about_methods.query_neurons import query_budget
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict
from attribution.engine.metrics import METRICS

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

# Least and largest cell of the paper's Table 7: the share of each metric that 1,000 query neurons cut.
PAPER_CUTS = {"mrr": (0.78, 0.98), "prob": (0.88, 0.99)}
# One twentieth of the metric: far below what query neurons cut in the paper.
MARGIN = 0.05
SEEDS = (0, 1, 2)
# Fewer prompts than this decide no claim about a mean over all of them.
MIN_PROMPTS = 300


def _woken(bench: Workbench, method: str) -> str:
    number = budget_of(bench, method).get("attention", 0)
    return f"those that wake its top {number} attention value neurons by {method}"


@pytest.mark.deletion
@pytest.mark.parametrize("metric", METRICS)
def test_zeroing_query_neurons_hurts_more_than_zeroing_random_ones(
    attribution_bench: Workbench,
    attribution_method: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    """The random ones are drawn uniformly from all FFN neurons for each prompt; query neurons may be among them."""
    attribution_exhibit(attribution_bench, ablated.by_query_neurons)
    bench, method = attribution_bench, attribution_method
    budget = query_budget(bench)
    claim = Claim(
        id=f"{budget} query neurons vs random: {metric}",
        sentence=f"zeroing a prompt's {budget} query neurons, {_woken(bench, method)}, lowers {metric} more than "
        f"zeroing {budget} random FFN neurons",
        source="Table 7",
        effect=f"{METRIC_NAMES[metric]} left by random neurons minus that left by query neurons",
        test="above",
        threshold=0,
        control=f"the same prompts with {budget} random FFN neurons",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(METRICS),
        family="deletion",
    )
    effects = query_neurons.lead_over_random_neurons(bench, method, metric)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("metric", METRICS)
def test_query_neurons_beside_others_of_the_same_layers(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    """The harder control: query neurons are in shallow layers, where any neuron may matter more."""
    bench, method = attribution_bench, attribution_method
    budget = query_budget(bench)
    claim = Claim(
        id=f"{budget} query neurons vs the same layers: {metric}",
        sentence=f"zeroing a prompt's {budget} query neurons, {_woken(bench, method)}, lowers {metric} more than "
        "zeroing as many other FFN neurons of each layer",
        source="ours, after Table 7",
        effect=f"{METRIC_NAMES[metric]} left by the others minus that left by query neurons",
        test="above",
        threshold=0,
        control="the same prompts with as many random neurons of the same layers",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(METRICS),
        asserted=False,
    )
    effects = query_neurons.lead_over_the_same_layers(bench, method, metric)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("metric", PAPER_CUTS)
def test_what_query_neurons_take_beside_the_papers(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    budget = query_budget(bench)
    least, most = PAPER_CUTS[metric]
    claim = Claim(
        id=f"{budget} query neurons cut {metric}",
        sentence=f"zeroing a prompt's {budget} query neurons, {_woken(bench, method)}, cuts {metric} by over "
        f"{least:.0%}, the least of Table 7",
        source="Table 7",
        effect=f"fall of mean {metric} as a share of its start",
        test="above",
        threshold=least,
        control=f"{budget} random FFN neurons, judged by the equivalence claims",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(PAPER_CUTS),
        effect_bounds="fall",
        asserted=False,
    )
    note = f"the paper's 1,000 query neurons cut {least:.0%} to {most:.0%}"
    effects = query_neurons.fall_without_query_neurons(bench, method, metric, note=note)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.equivalence
@pytest.mark.parametrize("seed", SEEDS, ids="seed{}".format)
@pytest.mark.parametrize("metric", PAPER_CUTS)
def test_zeroing_as_many_random_ffn_neurons_has_no_effect(
    attribution_bench: Workbench, attribution_method: str, metric: str, seed: int, assert_claim: Check
) -> None:
    """The neurons are drawn uniformly from all FFN neurons, for every prompt separately."""
    bench, method = attribution_bench, attribution_method
    budget, seed = query_budget(bench), bench.seed + seed
    claim = Claim(
        id=f"{budget} random FFN neurons, seed {seed}: {metric}",
        sentence=f"zeroing {budget} random FFN neurons changes {metric} by less than {MARGIN:.0%}",
        source="Table 7, random neurons",
        effect=f"fall of mean {metric} as a share of its start",
        test="within",
        threshold=MARGIN,
        control=f"{budget} query neurons, judged by the claims that they do more than random ones",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(SEEDS) * len(PAPER_CUTS),
        effect_bounds="fall",
        family="equivalence",
    )
    effects = query_neurons.fall_without_random_ffn_neurons(bench, metric, seed=seed)
    assert_claim(bench.verdict(claim, effects))
