"""A few hundred value neurons carry the answer (Table 13), and as many random ones do not.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from attribution.claims.about_methods import value_neurons
from attribution.claims.about_methods.common import OTHER_KINDS, budget_of
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

# What has to be cut of each metric, as a share of its start: the paper's Table 13.
CUTS = {"mrr": 0.90, "prob": 0.95}
# One twentieth of the metric: far below the nine tenths that value neurons must cut.
MARGIN = 0.05
# Neurons that are chosen to be alike are a harder control, so the margin is twice as wide.
MATCHED_MARGIN = 0.10
SEEDS = (0, 1, 2)
# Fewer prompts than this decide no claim about a mean over all of them.
MIN_PROMPTS = 300


def _counted(budget: Mapping[str, int]) -> str:
    return " and ".join(f"{number} {unit}" for unit, number in budget.items())


@pytest.mark.deletion
@pytest.mark.parametrize("metric", CUTS)
def test_zeroing_value_neurons_removes_the_answer(
    attribution_bench: Workbench,
    attribution_method: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, ablated.by_value_neurons)
    bench, method = attribution_bench, attribution_method
    budget = budget_of(bench, method)
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} value neurons cut {metric}",
        sentence=f"zero ablation of {_counted(budget)} value neurons by {method} cuts {metric} by over "
        f"{CUTS[metric]:.0%}",
        source="Table 13",
        effect=f"fall of mean {metric} as a share of its start",
        test="above",
        threshold=CUTS[metric],
        control=f"{total} random neurons, judged by the equivalence claims",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(CUTS),
        effect_bounds="fall",
        family="deletion",
    )
    effects = value_neurons.fall_without_value_neurons(bench, method, metric)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("metric", CUTS)
def test_what_value_neurons_take_by_other_kinds_of_ablation(
    attribution_bench: Workbench, attribution_method: str, metric: str, kind: str, assert_claim: Check
) -> None:
    """The paper ablates to zero; mean and resample ablation are reported."""
    bench, method = attribution_bench, attribution_method
    budget = budget_of(bench, method)
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} value neurons cut {metric}, {kind} ablation",
        sentence=f"{kind} ablation of {_counted(budget)} value neurons by {method} cuts {metric} by over "
        f"{CUTS[metric]:.0%}",
        source="Table 13, with another ablation",
        effect=f"fall of mean {metric} as a share of its start",
        test="above",
        threshold=CUTS[metric],
        control=f"{total} random neurons, judged by the equivalence claims",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(CUTS),
        effect_bounds="fall",
        asserted=False,
        family="deletion",
    )
    effects = value_neurons.fall_without_value_neurons(bench, method, metric, kind)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.equivalence
@pytest.mark.parametrize("seed", SEEDS, ids="seed{}".format)
@pytest.mark.parametrize("metric", CUTS)
def test_zeroing_as_many_random_neurons_has_no_effect(
    attribution_bench: Workbench, attribution_method: str, metric: str, seed: int, assert_claim: Check
) -> None:
    """The neurons are drawn uniformly from all neurons of each unit, for every prompt separately."""
    bench, method = attribution_bench, attribution_method
    budget, seed = budget_of(bench, method), bench.seed + seed
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} random neurons, seed {seed}: {metric}",
        sentence=f"zeroing {_counted(budget)} random neurons changes {metric} by less than {MARGIN:.0%}",
        source="Table 13, random neurons",
        effect=f"fall of mean {metric} as a share of its start",
        test="within",
        threshold=MARGIN,
        control=f"{total} value neurons, judged by the deletion claims",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(SEEDS) * len(CUTS),
        effect_bounds="fall",
        family="equivalence",
    )
    effects = value_neurons.fall_without_random_neurons(bench, method, metric, seed=seed)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("metric", CUTS)
def test_zeroing_as_many_neurons_of_matched_layer_and_norm(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    """The harder control: neurons of the same layers that write vectors of about the same norm."""
    bench, method = attribution_bench, attribution_method
    budget = budget_of(bench, method)
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} matched neurons: {metric}",
        sentence=f"zeroing {_counted(budget)} other neurons of the same layers and about the same norms changes "
        f"{metric} by less than {MATCHED_MARGIN:.0%}",
        source="ours",
        effect=f"fall of mean {metric} as a share of its start",
        test="within",
        threshold=MATCHED_MARGIN,
        control=f"{total} value neurons, judged by the deletion claims",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(CUTS),
        effect_bounds="fall",
        asserted=False,
    )
    effects = value_neurons.fall_without_matched_neurons(bench, method, metric)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.deletion
@pytest.mark.parametrize("metric", CUTS)
def test_zeroing_value_neurons_takes_more_than_zeroing_matched_ones(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    """What value neurons take is not explained by their layers and norms."""
    bench, method = attribution_bench, attribution_method
    budget = budget_of(bench, method)
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} value neurons vs matched: {metric}",
        sentence=f"zeroing {_counted(budget)} value neurons by {method} takes at least half of {metric} more than "
        "other neurons of the same layers and about the same norms",
        source="ours",
        effect=f"what matched neurons leave of mean {metric} minus what value neurons leave, as a share of its start",
        test="above",
        threshold=0.5,
        control="the same prompts with the matched neurons",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(CUTS),
        effect_bounds="fall",
        family="deletion",
    )
    effects = value_neurons.lead_over_matched_neurons(bench, method, metric)
    assert_claim(bench.verdict(claim, effects))
