"""Ablation hurts what neurons and heads are for, and leaves unrelated facts and categories alone (Table 11).

Language, capital and country are related kinds of knowledge: in Table 11 the heads of each matter for the others. All
other pairs of categories are unrelated, and so are their facts.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import specificity
from attribution.claims.about_methods.common import METRIC_NAMES
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

# Which value neurons of a fact are zeroed: its top 10 FFN neurons, or as many as the deletion claims zero.
VALUE_SETS = ("top 10", "value neurons")
# Or the query neurons that activate them. Those of one fact need not leave others alone: the paper finds many shared.
SETS = (*VALUE_SETS, "query neurons")
HEAD_METRICS = ("mrr", "logp")
# Means of the paper's Table 11 for its two models: the cut of a category's own metric, and of an unrelated one's.
PAPER_HEADS = {"mrr": ("33 to 45%", "4 to 9%"), "prob": ("48 to 53%", "9 to 10%")}
# That of random neurons: what is specific does to others no more than neurons that are drawn blindly.
MARGIN = 0.05
# Fewer prompts than this decide no claim about a mean over all of them.
MIN_PROMPTS = 300
# Every fact is paired with an unrelated one. If two thirds of the prompts are of related categories, as they are among
# the bundled facts, two thirds of MIN_PROMPTS find a partner of their own.
MIN_PAIRED = 200


def _named(bench: Workbench, method: str, chosen: str) -> str:
    budget = specificity.budget_of_set(bench, method, chosen)
    if chosen == "value neurons":
        return " and ".join(f"{number} {unit}" for unit, number in budget.items()) + f" value neurons by {method}"
    if chosen == "query neurons":
        return f"{budget.get('ffn', 0)} query neurons, those that wake its top attention value neurons by {method}"
    return f"top 10 FFN neurons by {method}"


@pytest.mark.specificity
@pytest.mark.parametrize("chosen", SETS)
def test_zeroing_a_facts_neurons_hurts_it_more_than_an_unrelated_fact(
    attribution_bench: Workbench, attribution_method: str, chosen: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"specific to a fact, {chosen}: logp",
        sentence=f"zeroing a fact's {_named(bench, method, chosen)} lowers the log-probability of its own answer more "
        "than that of an unrelated fact",
        source="ours",
        effect="mean log-probability in nats left by the neurons of an unrelated fact minus that left by a prompt's "
        "own",
        test="above",
        threshold=0,
        control="the same prompts without the neurons of an unrelated fact",
        min_prompts=MIN_PAIRED,
        method=method,
        comparisons=len(SETS),
        family="specificity",
    )
    effects = specificity.lead_over_unrelated_facts(bench, method, chosen)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.specificity
@pytest.mark.parametrize("chosen", VALUE_SETS)
def test_zeroing_a_facts_neurons_leaves_unrelated_facts_alone(
    attribution_bench: Workbench, attribution_method: str, chosen: str, assert_claim: Check
) -> None:
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"unrelated facts stay, {chosen}: mrr",
        sentence=f"zeroing a fact's {_named(bench, method, chosen)} changes mrr of an unrelated fact by less than "
        f"{MARGIN:.0%}",
        source="ours",
        effect="fall of mean mrr as a share of its start",
        test="within",
        threshold=MARGIN,
        control="the same neurons lower the answer of their own fact, judged by the claims of specificity",
        min_prompts=MIN_PAIRED,
        method=method,
        comparisons=len(VALUE_SETS),
        effect_bounds="fall",
        family="specificity",
    )
    effects = specificity.fall_of_unrelated_facts(bench, method, chosen, "mrr")
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.specificity
@pytest.mark.parametrize("metric", HEAD_METRICS)
def test_zeroing_the_heads_of_a_category_hurts_it_more_than_zeroing_unrelated_ones(
    attribution_bench: Workbench,
    attribution_method: str,
    metric: str,
    assert_claim: Check,
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, ablated.by_heads)
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"specific to a category, top 1% heads: {metric}",
        sentence=f"zeroing the top 1% heads of a prompt's category by {method} lowers {metric} more than zeroing those "
        "of unrelated categories",
        source="Table 11",
        effect=f"{METRIC_NAMES[metric]} left by heads of unrelated categories minus that left by those of its own",
        test="above",
        threshold=0,
        control="the same prompts without as many heads of each unrelated category",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(HEAD_METRICS),
        family="specificity",
    )
    effects = specificity.lead_over_unrelated_heads(bench, method, metric)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.reported
@pytest.mark.parametrize("metric", PAPER_HEADS)
def test_what_heads_of_related_categories_take_beside_the_papers(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    """Only prompts on language, capital and country have related categories."""
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"related categories share heads: {metric}",
        sentence=f"zeroing the top 1% heads of the categories related to a prompt's own by {method} lowers {metric} "
        "more than zeroing those of unrelated categories",
        source="Table 11",
        effect=f"mean {metric} left by heads of unrelated categories minus that left by related ones', as a share of "
        "its start",
        test="above",
        threshold=0,
        control="the same prompts without as many heads of each unrelated category",
        method=method,
        comparisons=len(PAPER_HEADS),
        asserted=False,
    )
    own, unrelated = PAPER_HEADS[metric]
    paper = f"the paper's own {own}, unrelated {unrelated}"
    effects = specificity.lead_of_related_heads(bench, method, metric, paper=paper)
    assert_claim(bench.verdict(claim, effects))
