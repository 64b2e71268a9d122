"""The instrument is right: a model's residual stream is the sum of what attribution scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims import Verdict
from attribution.decomposition import IDENTITIES
from attribution.suite.instrument import residual_stream_is_the_sum
from attribution.workbench import Workbench

pytestmark = pytest.mark.identity


@pytest.mark.parametrize("identity", IDENTITIES)
def test_residual_stream_is_the_sum_of_its_parts(
    attribution_bench: Workbench, identity: str, assert_claim: Callable[[Verdict], None]
) -> None:
    assert_claim(residual_stream_is_the_sum(attribution_bench.of_the_engine, identity))
