"""The instrument is right: a model's residual stream is the sum of what attribution scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_the_engine import instrument
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.decomposition import IDENTITIES

pytestmark = pytest.mark.identity


@pytest.mark.parametrize("identity", IDENTITIES)
def test_residual_stream_is_the_sum_of_its_parts(
    attribution_bench: Workbench, identity: str, assert_claim: Callable[[Verdict], None]
) -> None:
    bench = attribution_bench.of_the_engine
    # 1. What is claimed.
    claim = Claim(
        id=f"sum: {identity.replace('_', ' ')}",
        # Such as "heads + bias = attention output".
        sentence=IDENTITIES[identity],
        source="residual decomposition",
        effect="worst error over layers and positions, in units of the rounding bound",
        test="at_most",
        threshold=1,
        control="leaving out a bias or one neuron exceeds the bound (test_attribution/test_identities.py)",
    )
    # 2. What is measured: the largest error over all prompts.
    error = instrument.worst_error(bench, identity)
    # 3. The claim is judged by it.
    assert_claim(bench.verdict(claim, error))
