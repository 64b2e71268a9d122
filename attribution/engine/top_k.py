"""The top k candidates, found without scoring all of them where the method has a bound.

Ties fall by the order of records: by layer, attention before FFN, then (index) or (head, dim, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.engine.all_scores import (
    LARGEST_ERROR,
    AllScores,
    block_rows,
    descending,
    score,
    score_all,
    worth_brackets,
)
from attribution.engine.importance import Candidates
from attribution.engine.methods import Method, bound_candidates
from attribution.engine.search import MORE, ORDERED, Together, least_tied
from attribution.errors import BadInputError

__all__ = ["Bounds", "Certificate", "TopK", "bounds_of", "searched_together", "top_k", "top_k_together"]


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
        error: How far a score that is returned can be off besides: more than 0 where all are asked for, as those whose
            order needs no float64 are computed in float32.
    """

    scored: int
    total: int
    slack: float
    tolerance: float
    error: float = 0.0


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


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on all scores, and where a search begins.

    Attributes:
        values: The bounds, (n,).
        order: The candidates of the largest, best first: a search seldom goes far, and sorting every bound would take
            longer than the rest of it.
        first: How many of them are scored first.
    """

    values: Tensor
    order: Tensor
    first: int


def bounds_of(candidates: Candidates, method: Method, k: int | None) -> Bounds | None:
    """Return the bounds that a search for the k best goes by; ``None`` where all are scored."""
    if method.bound is None or k is None or k >= len(candidates):
        return None
    values = bound_candidates(method, candidates)
    # The first block already holds the top k in most prompts.
    first = k + MORE
    if method.floor is not None:
        # No score among the k best is below the k-th floor.
        least = method.floor(candidates).topk(k).values[-1]
        first = max(first, int((values >= least - candidates.tolerance).sum()))
    order = values.topk(min(len(candidates), max(first, ORDERED * (k + MORE)))).indices
    return Bounds(values, order, first)


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
    (best,) = top_k_together([candidates], method, k, with_first_order=with_first_order, exact_scores=True)
    return best


def searched_together(candidates: Sequence[Candidates], method: Method, k: int | None) -> bool:
    """Say whether the k best of several prompts are found by :class:`attribution.engine.search.Together`."""
    table = candidates[0].table
    return (
        k is not None
        and method.rising is not None
        and worth_brackets(table)
        and all(each.table is table and k < len(each) for each in candidates)
    )


def top_k_together(
    candidates: Sequence[Candidates],
    method: Method,
    k: int | None,
    *,
    together: Together | None = None,
    with_first_order: bool = False,
    exact_scores: bool = False,
) -> list[TopK]:
    """Return the k best candidates of each of several prompts, as :func:`top_k` does.

    Args:
        candidates: Those of each prompt, of one unit.
        method: The method.
        k: How many; all of them when ``None``.
        together: The same candidates, if other methods search them as well.
        with_first_order: Return the first-order terms of the scores as well, of methods that have them.
        exact_scores: Compute all scores that a search returns in float64, not only those that its order hangs on.
    """
    numbers = [_number(each, k) for each in candidates]
    if k is not None and method.rising is not None and searched_together(candidates, method, k):
        searched = (together or Together(candidates)).best(method, method.rising, int(k), exact_scores=exact_scores)
        return [
            TopK(
                each.indices,
                each.scores,
                Certificate(each.scored, len(own), each.slack, own.tolerance, each.error),
                each.first_order if with_first_order and method.first_order is not None else None,
            )
            for each, own in zip(searched, candidates, strict=True)
        ]
    if method.floor is not None:
        candidates[0].table.know_ranks_of([each.answer for each in candidates])
    bounds = [bounds_of(each, method, k) for each in candidates]
    if all(each is None for each in bounds) or (method.rising is not None and worth_brackets(candidates[0].table)):
        scored = score_all(candidates, method, with_first_order=with_first_order)
        return [
            _best_of_all(each, number, exact_scores=exact_scores) for each, number in zip(scored, numbers, strict=True)
        ]
    return [
        _searched(each, method, number, own, with_first_order=with_first_order)
        for each, number, own in zip(candidates, numbers, bounds, strict=True)
    ]


def _searched(candidates: Candidates, method: Method, k: int, bounds: Bounds | None, *, with_first_order: bool) -> TopK:
    """Return the k best of one prompt, scored in float64."""
    if bounds is None:
        (scores,) = score_all([candidates], method, with_first_order=with_first_order)
        return _best_of_all(scores, k)
    total = len(candidates)
    values, order, tolerance = bounds.values, bounds.order, candidates.tolerance
    blocks: list[tuple[Tensor, Tensor | None]] = []
    # Doubling keeps the number of blocks small.
    done, size, slack = 0, bounds.first, float("-inf")
    while done < total and slack <= tolerance:
        if done + size >= len(order):
            left = values.scatter(0, order, float("-inf")).argsort(descending=True, stable=True)
            order = torch.cat([order, left[: total - len(order)]])
        block = order[done : done + min(size, block_rows(candidates))]
        if method.bound is method.score and method.first_order is None:
            exact, first_order = values[block], None
        else:
            exact, first_order = score(method, candidates, block, with_first_order=with_first_order)
        excess = exact - values[block]
        if (excess > tolerance).any():
            worst = candidates.records(block[excess.argmax()][None])[0]
            raise BadInputError(
                f"method {method.name!r} scored {worst} {float(excess.max()):.3g} above its bound; register a bound "
                "that no score exceeds, or none."
            )
        blocks.append((exact, first_order))
        done, size = done + len(block), 2 * size
        if done == total:
            slack = float("inf")
        elif done >= k:
            slack = least_tied(torch.cat([each for each, _ in blocks]), k, tolerance) - float(values[order[done]])
    return _selected(order[:done], blocks, k, tolerance, slack, total)


def _number(candidates: Candidates, k: int | None) -> int:
    """Return how many are wanted."""
    total = len(candidates)
    if k is not None and not (isinstance(k, int | np.integer) and 1 <= k <= total):
        raise BadInputError(
            f"k = {k!r} is not between 1 and {total}, the number of candidates of unit {candidates.table.unit!r} "
            "here; choose a whole number in that range, or None for all."
        )
    # A number out of a frame may be NumPy's.
    return total if k is None else int(k)


def _best_of_all(scores: AllScores, k: int, *, exact_scores: bool = False) -> TopK:
    """Return the k best where all candidates are scored, with exact scores if those of fewer than all are wanted."""
    best = (scores.order() if k == len(scores.values) else scores.at(range(k)))[:k]
    scores.close(best[scores.errors[best] > (0.0 if exact_scores and k < len(scores.values) else LARGEST_ERROR)])
    error = float(scores.errors[best].max()) if len(best) else 0.0
    terms = None if scores.first_order is None else scores.first_order[best]
    certificate = Certificate(len(scores.values), len(scores.values), float("inf"), scores.tolerance, error)
    return TopK(best, scores.values[best], certificate, terms)


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
    best = descending(scores, tolerance)[:k]
    terms = [term for _, term in blocks if term is not None]
    first_order = torch.cat(terms)[back][best] if terms else None
    return TopK(indices[best], scores[best], Certificate(len(scores), total, slack, tolerance), first_order)
