"""The method is faithful: ablating its top FFN neurons hurts the answer more than any baseline's (Table 2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import top_neurons
from attribution.claims.about_methods.common import BASELINES, OTHER_KINDS, RIVALS
from attribution.claims.about_models import ablated
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict
from attribution.engine.metrics import METRICS

Check = Callable[[Verdict], None]
Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]


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
    attribution_exhibit(attribution_bench, ablated.by_method)
    assert_claim(top_neurons.beats_a_baseline(attribution_bench, attribution_method, baseline, metric))


@pytest.mark.superiority
@pytest.mark.parametrize("summary", top_neurons.SUMMARIES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_zeroing_the_top_k_hurts_more_than_a_baselines_over_the_whole_curve(
    attribution_bench: Workbench, attribution_method: str, baseline: str, summary: str, assert_claim: Check
) -> None:
    assert_claim(top_neurons.beats_a_baseline_over_the_curve(attribution_bench, attribution_method, baseline, summary))


@pytest.mark.reported
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_top_10_beside_a_baselines_by_other_kinds_of_ablation(
    attribution_bench: Workbench, attribution_method: str, baseline: str, kind: str, assert_claim: Check
) -> None:
    assert_claim(top_neurons.beats_a_baseline(attribution_bench, attribution_method, baseline, "logp", kind))


@pytest.mark.reported
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_kinds_of_ablation_order_the_methods_alike(
    attribution_bench: Workbench, attribution_method: str, kind: str, assert_claim: Check
) -> None:
    assert_claim(top_neurons.kinds_agree(attribution_bench, attribution_method, kind))


@pytest.mark.reported
@pytest.mark.parametrize("rival", RIVALS)
def test_top_10_beside_those_of_methods_with_backward_passes(
    attribution_bench: Workbench, attribution_method: str, rival: str, assert_claim: Check
) -> None:
    assert_claim(top_neurons.compared_with_a_rival(attribution_bench, attribution_method, rival))
