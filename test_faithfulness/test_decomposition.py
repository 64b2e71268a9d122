"""The instrument is right: a model's residual stream is the sum of what attribution scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims import Claim, Verdict, judge_exact
from attribution.decomposition import IDENTITIES
from attribution.workbench import Workbench

pytestmark = pytest.mark.identity


@pytest.mark.parametrize("identity", IDENTITIES)
def test_residual_stream_is_the_sum_of_its_parts(
    attribution_model: Workbench, identity: str, assert_claim: Callable[[Verdict], None]
) -> None:
    """At every layer and position of every known prompt."""
    claim = Claim(
        id=f"sum: {identity.replace('_', ' ')}",
        sentence=IDENTITIES[identity],
        source="residual decomposition",
        effect="worst error over layers and positions, in units of the rounding bound",
        test="at_most",
        threshold=1,
        control="leaving out a bias or one neuron exceeds the bound (test_attribution/test_identities.py)",
    )
    error = attribution_model.decomposition_errors[identity]
    n, facts = len(attribution_model.known), attribution_model.known_facts
    assert_claim(judge_exact(claim, model=attribution_model.model.name, effect=error, n=n, facts=facts))
