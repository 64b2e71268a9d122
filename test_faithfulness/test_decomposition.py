"""The instrument is right: a model's residual stream is the sum of what attribution scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_the_engine.instrument import residual_stream_is_the_sum
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict
from attribution.engine.decomposition import IDENTITIES

pytestmark = pytest.mark.identity


@pytest.mark.parametrize("identity", IDENTITIES)
def test_residual_stream_is_the_sum_of_its_parts(
    attribution_bench: Workbench, identity: str, assert_claim: Callable[[Verdict], None]
) -> None:
    assert_claim(residual_stream_is_the_sum(attribution_bench.of_the_engine, identity))
