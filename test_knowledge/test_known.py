"""What the models know: the facts that every claim about their neurons stands on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict, judge

pytestmark = pytest.mark.knowledge


def test_model_knows_the_facts_of_a_category(
    attribution_bench: Workbench, attribution_category: str, assert_claim: Callable[[Verdict], None]
) -> None:
    """By the paper's selection rule: the answer in the top 10 and above every other word of its type."""
    bench, category = attribution_bench, attribution_category
    claim = Claim(
        id=f"knows {category}",
        sentence=f"{category} prompts pass the selection rule",
        source="the paper's selection rule",
        effect="share of prompts that pass, minus the share that pass with another fact's answer",
        test="above",
        threshold=bench.entry.known_share,
        control="the same prompts with the answer of another fact of the category",
        family="known facts",
        # About a model; what methods are compared by is in test_faithfulness.
        gated=False,
    )
    prompts = [prompt for prompt in bench.sample.knowledge.prompts if prompt.category == category]
    known, fooled = (
        {prompt.text for prompt in each} for each in (bench.sample.known, bench.sample.known_with_swapped_answers)
    )
    effects = [(prompt.text in known) - (prompt.text in fooled) for prompt in prompts]
    facts = [prompt.fact for prompt in prompts]
    assert_claim(judge(claim, model=bench.model.name, effects=effects, facts=facts))
