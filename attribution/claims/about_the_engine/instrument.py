"""How far a model's residual stream is from the sum of what attribution scores."""

from __future__ import annotations

from attribution.claims.bench import Workbench
from attribution.claims.measured import Exact

__all__ = ["worst_error"]


def worst_error(bench: Workbench, identity: str) -> Exact:
    """Measure the largest error of an identity of the residual decomposition, in units of the rounding bound.

    It covers every layer and position of every prompt.
    """
    prompts = len(bench.prompts)
    return Exact(bench.decomposition_errors[identity], prompts=prompts, facts=prompts)
