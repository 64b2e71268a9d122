"""The best neurons alone keep more of the answer than as many random ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import sufficiency
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict
from attribution.engine.metrics import METRICS

Check = Callable[[Verdict], None]


@pytest.mark.sufficiency
@pytest.mark.parametrize("metric", METRICS)
def test_keeping_the_top_neurons_keeps_more_than_keeping_random_ones(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(sufficiency.top_neurons_keep_more_than_random_ones(attribution_bench, attribution_method, metric))


@pytest.mark.reported
@pytest.mark.parametrize("metric", sufficiency.KEPT_METRICS)
def test_what_each_share_of_the_neurons_keeps(
    attribution_bench: Workbench, attribution_method: str, metric: str, assert_claim: Check
) -> None:
    assert_claim(sufficiency.top_neurons_keep_more_than_their_share(attribution_bench, attribution_method, metric))
