"""A few hundred value neurons carry the answer (Table 13), and as many random ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims import Claim, Verdict, judge
from attribution.registry import registry
from attribution.workbench import Workbench

METHOD = "log_prob_increase"
MIN_PROMPTS = 300
CUT = 0.90
# One twentieth of the mean reciprocal rank: far below the nine tenths that value neurons must cut.
MARGIN = 0.05


def _budget(model: str) -> dict[str, int]:
    return registry()[model].value_neurons


def _judge_cut(claim: Claim, bench: Workbench, method: str, seed: int) -> Verdict:
    """Judge the fall of the mean reciprocal rank, as a share of its start."""
    frame = bench.experiment((method,), _budget(bench.model.name), seed=seed)[method]
    return judge(
        claim,
        model=bench.model.name,
        effects=(frame["mrr_before"] - frame["mrr_after"]).tolist(),
        baselines=frame["mrr_before"].tolist(),
        facts=frame["fact"].tolist(),
        seed=seed if method == "random" else None,
    )


@pytest.mark.deletion
def test_ablating_value_neurons_removes_the_answer(
    attribution_model: Workbench, assert_claim: Callable[[Verdict], None]
) -> None:
    """Attention and FFN neurons in the paper's proportion of two to one, at all positions."""
    budget = _budget(attribution_model.model.name)
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} value neurons cut mrr",
        sentence=f"zeroing {budget['attention']} attention and {budget['ffn']} FFN value neurons cuts MRR by over 90%",
        source="Table 13",
        effect="fall of the mean reciprocal rank as a share of its start",
        test="above",
        threshold=CUT,
        control=f"{total} random neurons, judged by the equivalence claims",
        min_prompts=MIN_PROMPTS,
    )
    assert_claim(_judge_cut(claim, attribution_model, METHOD, seed=0))


@pytest.mark.equivalence
@pytest.mark.parametrize("seed", [0, 1, 2], ids="seed{}".format)
def test_ablating_as_many_random_neurons_has_no_effect(
    attribution_model: Workbench, seed: int, assert_claim: Callable[[Verdict], None]
) -> None:
    """Drawn uniformly from all neurons of each unit, anew for every prompt."""
    budget = _budget(attribution_model.model.name)
    total = sum(budget.values())
    claim = Claim(
        id=f"{total} random neurons, seed {seed}: mrr",
        sentence=f"zeroing {total} random neurons changes MRR by less than {MARGIN:.0%}",
        source="Table 13, random neurons",
        effect="fall of the mean reciprocal rank as a share of its start",
        test="within",
        threshold=MARGIN,
        control=f"{total} value neurons, judged by the deletion claim",
        min_prompts=MIN_PROMPTS,
    )
    assert_claim(_judge_cut(claim, attribution_model, "random", seed=seed))
