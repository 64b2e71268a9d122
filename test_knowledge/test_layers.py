"""Where knowledge is stored, by layer and by head.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attribution.claims.about_models import layers
from attribution.claims.about_models.survey import survey
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict

Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

pytestmark = pytest.mark.knowledge

# Fewer prompts decide nothing: of all categories together, and of one.
MIN_PROMPTS = 100
MIN_OF_CATEGORY = 20


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_layers_raise_the_answer_over_another(
    attribution_bench: Workbench,
    kind: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, layers.contributions)
    bench = attribution_bench
    claim = Claim(
        id=f"{kind} layers contribute",
        sentence=f"the {kind} layers together raise a fact's answer more than another answer of its category",
        source="Table 3",
        effect="sum of the importance of the layers for the answer, minus that for the answer of another fact, in nats",
        test="above",
        threshold=0.0,
        control="the same prompts with the answer of another fact of the category",
        min_prompts=MIN_PROMPTS,
        # Attention and FFN.
        comparisons=2,
        family="layers",
        gated=False,
    )
    effects = layers.importance_of_layers(bench, kind)
    assert_claim(bench.verdict(claim, effects))


def test_top_layers_lie_in_the_deeper_half(
    attribution_bench: Workbench,
    attribution_category: str,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, layers.top_layers)
    bench, category = attribution_bench, attribution_category
    number = survey(bench).top_layers
    claim = Claim(
        id=f"top layers lie deep: {category}",
        sentence=f"the {number} most important layers of {category} prompts lie in the deeper half of the model",
        source="Table 4",
        effect="mean depth of the top layers, from 0 for the first to 1 for the last, minus that of all layers",
        test="above",
        threshold=0.0,
        control="as many layers drawn at random, whose mean depth is that of all",
        min_prompts=MIN_OF_CATEGORY,
        comparisons=len(bench.sample.knowledge.words),
        family="depth of layers",
        gated=False,
    )
    effects = layers.depth_of_top_layers(bench, category)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.parametrize("part", layers.PARTS)
def test_related_categories_share_more_than_unrelated_ones(
    attribution_bench: Workbench,
    part: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    """Language, capital and country are related."""
    attribution_exhibit(attribution_bench, layers.top_layers if part == "layers" else layers.top_heads)
    bench = attribution_bench
    number = layers.top_number(survey(bench), part)
    claim = Claim(
        id=f"related categories share {part}",
        sentence=f"the {number} most important {part} of a prompt are among those of a related category more often "
        "than among those of an unrelated one",
        source="Table 4" if part == "layers" else "Table 10",
        effect=f"share of a prompt's top {part} among those of related categories, minus that for unrelated ones",
        test="above",
        threshold=0.0,
        control="the unrelated categories; and every other choice of three categories to be called related",
        min_prompts=MIN_PROMPTS,
        comparisons=len(layers.PARTS),
        family="shared parts",
        gated=False,
    )
    effects = layers.shared_with_related(bench, part)
    assert_claim(bench.verdict(claim, effects))
