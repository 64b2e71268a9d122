"""The top k candidates, found without scoring all of them where the method has a bound.

Ties fall by the order of records: by layer, attention before FFN, then (index) or (head, dim, position).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.engine.importance import Candidates
from attribution.engine.methods import Method, bound_candidates, score_candidates
from attribution.errors import BadInputError

__all__ = ["Certificate", "TopK", "top_k"]

# Numbers in one block of updates, candidates x vocabulary: 2**23 float64 numbers are 64 MiB. Each block reads the whole
# unembedding, except where logits are kept: there a block does better that fits a processor's cache.
_BLOCK_NUMBERS = 2**23
_KEPT_BLOCK_NUMBERS = 2**18


@dataclass(frozen=True)
class Certificate:
    """Why a top k is exact although not all candidates were scored.

    Attributes:
        scored: How many were scored exactly.
        total: How many there are.
        slack: The k-th best exact score, or the least that is tied with it, minus the largest bound among those not
            scored, which holds a margin for float32 rounding; infinite if all were scored. None of those left out can
            be in the top k while this exceeds ``tolerance``.
        tolerance: How far float64 rounding can move an exact score.
    """

    scored: int
    total: int
    slack: float
    tolerance: float


@dataclass(frozen=True)
class TopK:
    """The k best candidates, best first.

    Attributes:
        indices: Which candidates, (k,).
        scores: Their scores, float64, (k,).
        certificate: Why they are the best.
        first_order: First-order terms of their scores, (k,), if they were asked for and the method has them.
    """

    indices: Tensor
    scores: Tensor
    certificate: Certificate
    first_order: Tensor | None


def _descending(scores: Tensor, tolerance: float) -> Tensor:
    """Return the order of scores, largest first.

    Scores that rounding cannot tell apart are tied, and fall by index: the last bits of a score depend on which
    others are computed beside it.
    """
    falling, order = torch.sort(scores, descending=True, stable=True)
    steps = falling[:-1] - falling[1:]
    # Equal scores fall by index already.
    if not ((steps > 0) & (steps <= tolerance)).any():
        return order
    group = torch.zeros_like(order)
    group[1:] = (steps > tolerance).cumsum(0)
    by_index = torch.argsort(order, stable=True)
    return order[by_index[torch.argsort(group[by_index], stable=True)]]


def _least_tied(scores: Tensor, k: int, tolerance: float) -> float:
    """Return the k-th largest score, or the least that is tied with it by way of others."""
    falling = scores.sort(descending=True).values
    apart = (falling[k - 1 : -1] - falling[k:] > tolerance).nonzero()
    return float(falling[k - 1 + int(apart[0])] if len(apart) else falling[-1])


def _block_rows(candidates: Candidates) -> int:
    numbers = _KEPT_BLOCK_NUMBERS if candidates.table.keeps_logits else _BLOCK_NUMBERS
    return max(1, numbers // candidates.table.readout.unembedding.shape[0])


def _score(
    method: Method, candidates: Candidates, block: Tensor, *, with_first_order: bool
) -> tuple[Tensor, Tensor | None]:
    part = candidates.take(block)
    first_order = method.first_order(part) if with_first_order and method.first_order is not None else None
    return score_candidates(method, part), first_order


def top_k(candidates: Candidates, method: Method, k: int | None, *, with_first_order: bool = False) -> TopK:
    """Return the k best candidates, best first.

    With a bound, candidates are scored in decreasing bound until the k-th best exact score is above every
    bound left: the result equals that of scoring all.

    Args:
        candidates: All candidates of a unit for one prompt.
        method: The method.
        k: How many; all of them, in order of score, when ``None``.
        with_first_order: Return the first-order terms of the scores as well, of methods that have them.

    Raises:
        BadInputError: If k is not between 1 and the number of candidates, or the method returns nonsense.
    """
    total = len(candidates)
    if k is not None and not (isinstance(k, int | np.integer) and 1 <= k <= total):
        raise BadInputError(
            f"k = {k!r} is not between 1 and {total}, the number of candidates of unit {candidates.table.unit!r} "
            "here; choose a whole number in that range, or None for all."
        )
    everything = torch.arange(total, device=candidates.index.device)
    # A number out of a frame may be NumPy's.
    k = total if k is None else int(k)
    if method.bound is None or k == total:
        # Only a method whose scores are projected is scored to no more than the rounding of a projection.
        tolerance = 0.0 if method.bound is None else candidates.tolerance
        scored = [
            _score(method, candidates, block, with_first_order=with_first_order)
            for block in everything.split(_block_rows(candidates))
        ]
        return _selected(everything, scored, k, tolerance, float("inf"), total)
    bounds, tolerance = bound_candidates(method, candidates), candidates.tolerance
    # A search seldom goes far: sorting every bound would take longer than the rest of it.
    order = bounds.topk(min(total, 8 * (k + 6))).indices
    blocks: list[tuple[Tensor, Tensor | None]] = []
    # The first block already holds the top k in most prompts; doubling keeps the number of blocks small.
    done, size, slack = 0, min(k + 6, _block_rows(candidates)), float("-inf")
    while done < total and slack <= tolerance:
        if done + size >= len(order):
            left = bounds.scatter(0, order, float("-inf")).argsort(descending=True, stable=True)
            order = torch.cat([order, left[: total - len(order)]])
        block = order[done : done + size]
        if method.bound is method.score and method.first_order is None:
            exact, first_order = bounds[block], None
        else:
            exact, first_order = _score(method, candidates, block, with_first_order=with_first_order)
        excess = exact - bounds[block]
        if (excess > tolerance).any():
            worst = candidates.records(block[excess.argmax()][None])[0]
            raise BadInputError(
                f"method {method.name!r} scored {worst} {float(excess.max()):.3g} above its bound; register a bound "
                "that no score exceeds, or none."
            )
        blocks.append((exact, first_order))
        done, size = done + len(block), min(2 * size, _block_rows(candidates))
        if done == total:
            slack = float("inf")
        elif done >= k:
            scores = torch.cat([each for each, _ in blocks])
            slack = _least_tied(scores, k, tolerance) - float(bounds[order[done]])
    return _selected(order[:done], blocks, k, tolerance, slack, total)


def _selected(
    indices: Tensor,
    blocks: list[tuple[Tensor, Tensor | None]],
    k: int,
    tolerance: float,
    slack: float,
    total: int,
) -> TopK:
    """Return the k best of what was scored; ``indices`` are the candidates in the order of the blocks."""
    # Back in order of records, so that ties fall by it.
    indices, back = indices.sort()
    scores = torch.cat([scores for scores, _ in blocks])[back]
    best = _descending(scores, tolerance)[:k]
    terms = [term for _, term in blocks if term is not None]
    first_order = torch.cat(terms)[back][best] if terms else None
    return TopK(indices[best], scores[best], Certificate(len(scores), total, slack, tolerance), first_order)
