"""The method is faithful: ablating its top 10 FFN neurons hurts the answer more than any baseline's (Table 2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims import Claim, Verdict, judge
from attribution.metrics import METRICS
from attribution.workbench import Workbench

pytestmark = pytest.mark.superiority

METHOD = "log_prob_increase"
BASELINES = (
    "log_prob",
    "prob_increase",
    "vector_norm",
    "coefficient",
    "reciprocal_rank",
    "output_norm",
    "coefficient_by_rank",
)
K = 10
MIN_PROMPTS = 300
UNITS = {"mrr": "mean reciprocal rank", "prob": "mean probability", "logp": "mean log-probability in nats"}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_ablating_the_top_10_hurts_more_than_a_baselines_top_10(
    attribution_model: Workbench, baseline: str, metric: str, assert_claim: Callable[[Verdict], None]
) -> None:
    """Each verdict stands alone; that all hold at once needs no correction, since each must."""
    claim = Claim(
        id=f"top {K} vs {baseline}: {metric}",
        sentence=f"zeroing the top {K} FFN neurons by {METHOD} lowers {metric} more than the top {K} by {baseline}",
        source="Table 2",
        effect=f"{UNITS[metric]} left by the baseline minus that left by the method",
        test="above",
        threshold=0,
        control=f"the same prompts with the top {K} by {baseline}",
        min_prompts=MIN_PROMPTS,
    )
    frames = attribution_model.experiment((METHOD, *BASELINES), {"ffn": K})
    method, other = frames[METHOD], frames[baseline]
    effects = other[f"{metric}_after"] - method[f"{metric}_after"]
    verdict = judge(claim, model=attribution_model.model.name, effects=effects.tolist(), facts=method["fact"].tolist())
    assert_claim(verdict)
