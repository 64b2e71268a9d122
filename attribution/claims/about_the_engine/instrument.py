"""The instrument is right: a model's residual stream is the sum of what attribution scores."""

from __future__ import annotations

from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict, judge_exact
from attribution.engine.decomposition import IDENTITIES

__all__ = ["residual_stream_is_the_sum"]


def residual_stream_is_the_sum(bench: Workbench, identity: str) -> Verdict:
    """Judge one identity of the residual decomposition, at every layer and position of every prompt."""
    claim = Claim(
        id=f"sum: {identity.replace('_', ' ')}",
        sentence=IDENTITIES[identity],
        source="residual decomposition",
        effect="worst error over layers and positions, in units of the rounding bound",
        test="at_most",
        threshold=1,
        control="leaving out a bias or one neuron exceeds the bound (test_attribution/test_identities.py)",
    )
    error, prompts = bench.decomposition_errors[identity], bench.prompts
    return judge_exact(claim, model=bench.model.name, effect=error, n=len(prompts), facts=len(prompts))
