"""A scorer that is broken on purpose loses its effect: otherwise the effect was never the scorer's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import sanity
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict

pytestmark = pytest.mark.sanity

K = 10
# What is broken, and which neurons that gives.
CONTROLS = {
    "sign flip": "with the lowest scores",
    "label shuffle": "ranked for another answer of the same category",
    "weight randomisation": "ranked on a copy of the model with shuffled weights",
}
# Fewer prompts than this decide no claim about a mean over all of them.
MIN_PROMPTS = 300
# The lowest scores are known only after all are computed, so the sign flip is measured on fewer prompts.
MIN_FLIPPED = 50


@pytest.mark.parametrize("control", CONTROLS)
def test_broken_scorer_loses_its_effect(
    attribution_bench: Workbench, attribution_method: str, control: str, assert_claim: Callable[[Verdict], None]
) -> None:
    # 1. What is claimed.
    bench, method = attribution_bench, attribution_method
    claim = Claim(
        id=f"{control} destroys the effect",
        sentence=f"zeroing the {K} FFN neurons {CONTROLS[control]} takes less than half of what the top {K} by "
        f"{method} take",
        source="ours, after Adebayo et al. 2018",
        effect=f"half of the fall of log p(answer) without the top {K} minus the fall without those of the control, in "
        "nats",
        test="above",
        threshold=0,
        control=f"the same prompts with the top {K}",
        min_prompts=MIN_FLIPPED if control == "sign flip" else MIN_PROMPTS,
        method=method,
        comparisons=len(CONTROLS),
        family="sanity",
    )
    # 2. What is measured: one effect for each prompt.
    effects = sanity.lead_over_broken_scorer(bench, method, control, k=K, share=0.5)
    # 3. The claim is judged by it.
    assert_claim(bench.verdict(claim, effects))
