"""Selection: the top k neurons, found without scoring all of them where the method has a bound.

Ties fall by the order of records: (layer, index), or (layer, head, dim, position).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.errors import BadInputError
from attribution.importance import Candidates
from attribution.methods import Method, bound_candidates, score_candidates

__all__ = ["Certificate", "top_k"]

# Numbers in one block of updates, neurons x vocabulary: 2**23 float64 numbers are 64 MiB.
_BLOCK_NUMBERS = 2**23


@dataclass(frozen=True)
class Certificate:
    """Why a top k is exact although not all neurons were scored.

    Attributes:
        scored: How many neurons were scored exactly.
        total: How many there are.
        slack: The k-th best exact score minus the largest bound among the neurons not scored; infinite if all
            were scored. No neuron left out can be in the top k while this exceeds ``tolerance``.
        tolerance: How far rounding can move a bound or a score.
    """

    scored: int
    total: int
    slack: float
    tolerance: float


def _descending(scores: Tensor) -> Tensor:
    """Return the order of scores, largest first, equal scores by index."""
    return torch.argsort(scores, descending=True, stable=True)


def _block_rows(candidates: Candidates) -> int:
    return max(1, _BLOCK_NUMBERS // candidates.table.readout.unembedding.shape[0])


def _score_all(candidates: Candidates, method: Method) -> Tensor:
    everything = torch.arange(len(candidates), device=candidates.index.device)
    blocks = everything.split(_block_rows(candidates))
    return torch.cat([score_candidates(method, candidates.take(block)) for block in blocks])


def top_k(candidates: Candidates, method: Method, k: int | None) -> tuple[Tensor, Tensor, Certificate]:
    """Return the k best candidates, best first.

    With a bound, candidates are scored in decreasing bound until the k-th best exact score is above every
    bound left, by more than rounding can move either: the result equals that of scoring all.

    Args:
        candidates: All neurons of a unit for one prompt.
        method: The method.
        k: How many; all of them, in order of score, when ``None``.

    Returns:
        Indices into ``candidates``, (k,); their scores, (k,); and the certificate.

    Raises:
        BadInputError: If k is not between 1 and the number of candidates.
    """
    total = len(candidates)
    if k is not None and not (isinstance(k, int) and 1 <= k <= total):
        raise BadInputError(
            f"k = {k!r} is not between 1 and {total}, the number of {candidates.table.unit} neurons here; choose a "
            "whole number in that range, or None for all."
        )
    if method.bound is None or k is None or k == total:
        scores = _score_all(candidates, method)
        order = _descending(scores)[:k]
        return order, scores[order], Certificate(total, total, float("inf"), 0.0)
    bounds = bound_candidates(method, candidates)
    order = _descending(bounds)
    scores = torch.empty(0, dtype=torch.float64, device=bounds.device)
    # The first block already holds the top k in most prompts; doubling keeps the number of blocks small.
    size = min(k + 16, _block_rows(candidates))
    slack = float("-inf")
    while len(scores) < total and slack <= candidates.tolerance:
        block = order[len(scores) : len(scores) + size]
        exact = score_candidates(method, candidates.take(block))
        excess = exact - bounds[block]
        if (excess > candidates.tolerance).any():
            worst = candidates.records(block[excess.argmax()][None])[0]
            raise BadInputError(
                f"method {method.name!r} scored {worst} {float(excess.max()):.3g} above its bound; register a bound "
                "that no score exceeds, or none."
            )
        scores = torch.cat([scores, exact])
        size = min(2 * size, _block_rows(candidates))
        if len(scores) == total:
            slack = float("inf")
        elif len(scores) >= k:
            slack = float(scores.topk(k).values[-1] - bounds[order[len(scores)]])
    # Back in order of records, so that a stable sort breaks ties by it.
    scored, back = order[: len(scores)].sort()
    best = _descending(scores[back])[:k]
    return scored[best], scores[back][best], Certificate(len(scores), total, slack, candidates.tolerance)
