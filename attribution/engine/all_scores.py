"""Every candidate's score, exactly where that matters: intervals for all, and float64 for what they cannot tell apart.

Where a method's score rises with the importance over some distribution, one sweep over the vectors brackets it for all
candidates of many prompts, see :mod:`attribution.engine.moments`. Whoever asks for ranks then has those candidates
scored in float64 whose brackets overlap there: the answer is that of scoring all of them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attribution.engine.base import Base, base_of, slips
from attribution.engine.importance import Candidates
from attribution.engine.in_float64 import increases
from attribution.engine.methods import Method, Rising, checked, score_candidates
from attribution.engine.moments import cumulant, moments_of, summed_cumulants
from attribution.engine.progress import Progress
from attribution.engine.projection import behind_norm
from attribution.engine.vectors import VectorTable
from attribution.records import NEURON_UNITS

__all__ = [
    "LARGEST_ERROR",
    "AllScores",
    "at_each",
    "block_rows",
    "bracket",
    "close_together",
    "descending",
    "first_vectors_of_each",
    "score",
    "score_all",
    "score_parts",
    "summed_within",
    "worth_brackets",
]

# Numbers in one block of updates, candidates x vocabulary: 2**23 float64 numbers are 64 MiB. Each block reads the whole
# unembedding, except where logits are kept: there a block does better that fits a processor's cache.
_BLOCK_NUMBERS = 2**23
_KEPT_BLOCK_NUMBERS = 2**18
# Probabilities of several prompts that are held at a time, prompts x vocabulary: 2**24 float64 numbers are 128 MiB.
_HELD_NUMBERS = 2**24
# Vectors of heads or layers that are scored at a time.
_HELD_VECTORS = 2**13
# With fewer logits than this, vectors x vocabulary, scoring everything in float64 is faster than computing brackets.
_WORTH_BRACKETS = 2**21
# By how much the remainder of the series may move a score, in nats, before exponentials are summed instead.
_LARGEST_REMAINDER = 1e-6
LARGEST_ERROR = 1e-5
"""No score that is handed on is further off, in nats."""
# How many brackets one round closes, the widest first: one in 64 of those still open, but at least 256.
_CLOSED_SHARE, _CLOSED_AT_LEAST = 64, 256


def descending(scores: Tensor, tolerance: float) -> Tensor:
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


def block_rows(candidates: Candidates) -> int:
    """Return how many candidates are scored at a time."""
    numbers = _KEPT_BLOCK_NUMBERS if candidates.table.keeps_logits else _BLOCK_NUMBERS
    return max(1, numbers // candidates.table.readout.unembedding.shape[0])


def worth_brackets(table: VectorTable) -> bool:
    """Say whether brackets of what these vectors write save more than they cost."""
    # Whether others are asked along must not change what a prompt's scores are.
    return not table.keeps_logits and sum(table.sizes) * len(table.readout.unembedding) >= _WORTH_BRACKETS


@dataclass
class AllScores:
    """The scores of all candidates of one prompt: values, and how far each can be off.

    Asking for ranks closes brackets: scores that decide them are computed in float64.

    Attributes:
        candidates: The candidates.
        method: What scores them.
        values: Their scores, (n,), float64.
        errors: How far each can be off, (n,); 0 for what was scored in float64, whose rounding is ``tolerance``.
        tolerance: How far float64 rounding can move a score; scores closer than this are tied.
        first_order: First-order terms of the scores, (n,), float64, of methods that have them.
        closed: How many brackets were closed by scoring in float64.
    """

    candidates: Candidates
    method: Method
    values: Tensor
    errors: Tensor
    tolerance: float
    first_order: Tensor | None = None
    closed: int = 0

    def within(self, error: float) -> Tensor:
        """Return the scores, (n,), none of them further off than an error, float64 rounding aside."""
        self.close((self.errors > error).nonzero()[:, 0])
        return self.values

    def in_sums(self, error: float) -> Tensor:
        """Return the candidates to score in float64, so that no sum of scores is further off than an error."""
        rising = self.errors.sort()
        return rising.indices[rising.values.cumsum(0) > error]

    def order(self) -> Tensor:
        """Return all candidates, best first, (n,)."""
        _decide([self], [self._overlapping])
        return descending(self.values, self.tolerance)

    def at(self, ranks: Sequence[int]) -> Tensor:
        """Return the candidates at some ranks, counted from 0, (m,)."""
        (found,) = at_each([self], [ranks])
        return found

    def best_of_vectors(self, scores: Tensor) -> Tensor:
        """Return the largest score of each vector's candidates, (vectors,): attention neurons of several positions."""
        vectors = self.candidates.vector
        none = torch.full((int(vectors.max()) + 1,), -float("inf"), dtype=scores.dtype, device=scores.device)
        return none.scatter_reduce(0, vectors, scores, "amax")

    def at_edges(self, numbers: Sequence[int]) -> Tensor:
        """Say of each candidate whether it may be the best of a vector of which the first numbers of them hang."""
        vectors = self.candidates.vector
        lower, upper = (self.best_of_vectors(self.values + side * self.errors) for side in (-1, 1))
        order = descending(self.best_of_vectors(self.values), self.tolerance)
        at_edge = torch.zeros(len(order), dtype=torch.bool, device=vectors.device)
        for each in numbers:
            inside, outside = order[:each], order[each:]
            if len(outside) and each:
                at_edge[inside] |= lower[inside] <= upper[outside].max() + self.tolerance
                at_edge[outside] |= upper[outside] >= lower[inside].min() - self.tolerance
        return at_edge[vectors] & (self.values + self.errors >= lower[vectors])

    def _overlapping(self) -> Tensor:
        """Say of each candidate whether its bracket meets that of one that is ranked before or behind it."""
        order = self.values.argsort(descending=True, stable=True)
        lower, upper = (self.values - self.errors)[order], (self.values + self.errors)[order]
        least = lower.cummin(0).values[:-1]
        most = upper.flip(0).cummax(0).values.flip(0)[1:]
        meets = torch.zeros_like(lower, dtype=torch.bool)
        meets[1:] |= upper[1:] >= least - self.tolerance
        meets[:-1] |= lower[:-1] <= most + self.tolerance
        return torch.zeros_like(meets).index_copy(0, order, meets)

    def overlapping_at(self, ranks: Sequence[int]) -> Tensor:
        """Say of each candidate whether its bracket meets that of one at some ranks, or another's if it is there."""
        order = self.values.argsort(descending=True, stable=True)
        lower, upper = self.values - self.errors - self.tolerance, self.values + self.errors + self.tolerance
        places = order[torch.tensor(ranks, dtype=torch.long, device=order.device)].unique()

        def others(index: Tensor) -> Tensor:
            """Return how many brackets each bracket meets among those of an index, its own one included if it is."""
            rising, ends = lower[index].sort().values, upper[index].sort().values
            return torch.searchsorted(rising, upper, right=True) - torch.searchsorted(ends, lower)

        meets = others(places) > 0
        meets[places] = others(order)[places] > 1
        return meets

    def undecided_at(self, ranks: Sequence[int]) -> Tensor:
        """Return the candidates to score in float64 next, so that those at some ranks can be told; none if they can."""
        return self.next_open(lambda: self.overlapping_at(ranks))

    def next_open(self, undecided: Callable[[], Tensor]) -> Tensor:
        """Return those with the widest brackets of what is undecided: without them, most of the others are decided."""
        if not self.errors.any():
            return torch.zeros(0, dtype=torch.long, device=self.values.device)
        open_ones = (undecided() & (self.errors > 0)).nonzero()[:, 0]
        number = max(_CLOSED_AT_LEAST, len(open_ones) // _CLOSED_SHARE)
        return open_ones[self.errors[open_ones].topk(min(number, len(open_ones))).indices]

    def close(self, index: Tensor) -> None:
        """Score candidates in float64."""
        close_together([self], [index])


def close_together(found: Sequence[AllScores], chosen: Sequence[Tensor]) -> None:
    """Score candidates of several prompts in float64, by one method, in one pass over the unembedding.

    Args:
        found: Scores that are brackets.
        chosen: Which candidates of each.
    """
    asked = [(each, index) for each, index in zip(found, chosen, strict=True) if len(index)]
    if not asked:
        return
    rising = found[0].method.rising
    assert rising is not None, "no other score has a bracket"
    scored = increases([[each.candidates.take(index)] for each, index in asked], uniform=rising.uniform)
    for (each, index), ((increase, log_prob),) in zip(asked, scored, strict=True):
        each.values[index] = rising.score(increase, log_prob)
        each.errors[index] = 0
        each.closed += len(index)


def _decide(found: Sequence[AllScores], undecided: Sequence[Callable[[], Tensor]]) -> None:
    """Score in float64 what is undecided of several prompts until nothing is, in passes that all of them share.

    Args:
        found: Scores that are brackets, by one method.
        undecided: What says of each prompt's candidates whether they are.
    """
    left = list(range(len(found)))
    while left:
        index = {place: found[place].next_open(undecided[place]) for place in left}
        left = [place for place in left if len(index[place])]
        close_together([found[place] for place in left], [index[place] for place in left])


def at_each(found: Sequence[AllScores], ranks: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the candidates of each prompt at some ranks of its own, counted from 0, (m,) each."""
    _decide(found, [partial(each.overlapping_at, own) for each, own in zip(found, ranks, strict=True)])
    orders = (descending(each.values, each.tolerance) for each in found)
    return [
        order[torch.tensor(own, dtype=torch.long, device=order.device)]
        for order, own in zip(orders, ranks, strict=True)
    ]


def first_vectors_of_each(found: Sequence[AllScores], numbers: Sequence[int]) -> list[list[Tensor]]:
    """Return the first vectors of each prompt's ranking, as many as each number says, in no order within.

    Several candidates may write one vector, an attention neuron's source positions: the best of them places it.

    Returns:
        For each prompt, places among the rows of all sublayers, (number,) each; all of them where there are fewer.
    """
    _decide(found, [partial(each.at_edges, numbers) for each in found])
    orders = (descending(each.best_of_vectors(each.values), each.tolerance) for each in found)
    return [[order[:number] for number in numbers] for order in orders]


def summed_within(found: Sequence[AllScores], error: float) -> list[Tensor]:
    """Return each prompt's scores, (n,), no sum of which is further off than an error, float64 rounding aside."""
    close_together(found, [each.in_sums(error) for each in found])
    return [each.values for each in found]


def score_all(
    candidates: Sequence[Candidates],
    method: Method,
    *,
    with_first_order: bool = False,
    progress: Progress | None = None,
) -> list[AllScores]:
    """Return the scores of all candidates of each of several prompts, of one unit.

    Args:
        candidates: Those of each prompt. Vectors that prompts share are projected once for all of them.
        method: The method.
        with_first_order: Return the first-order terms of the scores as well, of methods that have them.
        progress: The bar.
    """
    if not candidates:
        return []
    table = candidates[0].table
    found: list[AllScores] = []
    if method.rising is not None and table.unit not in NEURON_UNITS:
        return _of_own_vectors(candidates, method, method.rising, with_first_order=with_first_order, progress=progress)
    if method.rising is None or not worth_brackets(table):
        with _shown(progress, len(candidates), "prompt") as update:
            for each in candidates:
                # Kept, the distributions of many prompts would fill memory.
                alone = each if len(candidates) == 1 else each.afresh()
                scored = _in_float64(alone, method, with_first_order=with_first_order)
                found.append(replace(scored, candidates=each))
                update(1)
        return found
    held = max(1, _HELD_NUMBERS // len(table.readout.unembedding))
    groups = [candidates[start : start + held] for start in range(0, len(candidates), held)]
    with _shown(progress, len(groups) * len(table.sublayers), "sublayer") as update:
        for group in groups:
            own = [_opened(each, method, with_first_order=with_first_order) for each in group]
            for sublayer_index in range(len(table.sublayers)):
                _bracket(own, group, sublayer_index, method.rising)
                update(1)
            found += own
    return found


def _shown(progress: Progress | None, total: int, of: str) -> AbstractContextManager[Callable[[int], object]]:
    """Give a function to call with how many are done besides."""
    # A machine that holds the weights elsewhere is sent none: a bar would be seen by nobody.
    return nullcontext(_nothing) if progress is None else progress.over(total, of)


def _nothing(_: int) -> None:
    pass


def score(
    method: Method, candidates: Candidates, block: Tensor, *, with_first_order: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the scores of some candidates in float64, and their first-order terms if these are wanted and defined."""
    part = candidates.take(block)
    first_order = method.first_order(part) if with_first_order and method.first_order is not None else None
    return score_candidates(method, part), first_order


def _in_float64(candidates: Candidates, method: Method, *, with_first_order: bool) -> AllScores:
    everything = torch.arange(len(candidates), device=candidates.index.device)
    blocks = everything.split(block_rows(candidates))
    scored = [score(method, candidates, block, with_first_order=with_first_order) for block in blocks]
    none = torch.zeros(0, dtype=torch.float64, device=everything.device)
    values = torch.cat([none, *(scores for scores, _ in scored)])
    terms = [term for _, term in scored if term is not None]
    # Only a score that is projected is known to no more than the rounding of a projection.
    tolerance = 0.0 if method.bound is None else candidates.tolerance
    first_order = torch.cat(terms) if terms else None
    return AllScores(candidates, method, values, torch.zeros_like(values), tolerance, first_order, len(values))


def _of_own_vectors(
    candidates: Sequence[Candidates],
    method: Method,
    rising: Rising,
    *,
    with_first_order: bool,
    progress: Progress | None,
) -> list[AllScores]:
    """Return the scores of heads or layers, whose vectors each prompt has for itself: all in float64."""
    found: list[AllScores] = []
    held = max(1, _HELD_VECTORS // len(candidates[0]))
    with _shown(progress, len(candidates), "prompt") as update:
        for start in range(0, len(candidates), held):
            group = candidates[start : start + held]
            terms: Sequence[Tensor | None] = [None] * len(group)
            if with_first_order and method.first_order is not None:
                terms = _first_orders(group, uniform=rising.uniform)
            for each, term, (scores,) in zip(group, terms, score_parts([[own] for own in group], method), strict=True):
                found.append(
                    AllScores(each, method, scores, torch.zeros_like(scores), each.tolerance, term, len(scores))
                )
            update(len(group))
    return found


def score_parts(by_prompt: Sequence[Sequence[Candidates]], method: Method) -> list[list[Tensor]]:
    """Return the scores of some candidates of several prompts, (n,) each, float64.

    Args:
        by_prompt: For each prompt candidates of one unit or of several, such as its heads and its layers, for one
            answer or for several; what these have in common is computed once.
        method: The method.
    """
    if method.rising is None:
        return [[score_candidates(method, each.afresh()) for each in own] for own in by_prompt]
    found: list[list[Tensor]] = []
    held = max(1, _HELD_VECTORS // max(sum(map(len, own)) for own in by_prompt))
    for start in range(0, len(by_prompt), held):
        group = by_prompt[start : start + held]
        for own, scored in zip(group, increases(group, uniform=method.rising.uniform), strict=True):
            found.append(
                [
                    checked(method, method.rising.score(increase, log_prob), each)
                    for each, (increase, log_prob) in zip(own, scored, strict=True)
                ]
            )
    return found


def _first_orders(candidates: Sequence[Candidates], *, uniform: bool) -> list[Tensor]:
    """Return the first-order terms of the importance of all heads or layers of each prompt, (n,) each."""
    found = [torch.empty_like(each.coefficient) for each in candidates]
    for sublayer_index in range(len(candidates[0].table.sublayers)):
        base = base_of(candidates, [sublayer_index], uniform=uniform)
        for each, terms, answer, mean in zip(candidates, found, base.answers, base.means[0], strict=True):
            place = (each.sublayer_index == sublayer_index).nonzero()[:, 0]
            written = each.table.written(sublayer_index, each.row[place])
            terms[place] = each.coefficient[place] / each.scale * (written @ (answer - mean))
    return found


def bracket(rising: Rising, increase: Tensor, error: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of importances, and how far they can be off where these can be so far off, (n,) each."""
    value = rising.score(increase, log_prob)
    ends = [rising.score(increase + sign * error, log_prob) for sign in (1, -1)]
    # What was not scored in float64 says so, however little it can be off.
    least = torch.finfo(torch.float64).eps
    return value, torch.stack([(end - value).abs() for end in ends]).amax(0).clamp(min=least)


def _opened(candidates: Candidates, method: Method, *, with_first_order: bool) -> AllScores:
    """Return scores that are to be bracketed."""
    terms = with_first_order and method.first_order is not None
    empty = torch.empty(3, len(candidates), dtype=torch.float64, device=candidates.index.device)
    return AllScores(candidates, method, empty[0], empty[1], candidates.tolerance, empty[2] if terms else None)


def _bracket(found: Sequence[AllScores], candidates: Sequence[Candidates], sublayer_index: int, rising: Rising) -> None:
    """Bracket the scores of all candidates of one sublayer, whose vectors all prompts share."""
    base = base_of(candidates, [sublayer_index], uniform=rising.uniform)
    for column, (place, first, spent, error) in enumerate(_swept(candidates, sublayer_index, base)):
        own, log_prob = found[column], base.log_probs[0, column]
        own.values[place], own.errors[place] = bracket(rising, first - spent, error, log_prob)
        if own.first_order is not None:
            own.first_order[place] = first


def _swept(
    candidates: Sequence[Candidates], sublayer_index: int, base: Base
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return of each prompt its candidates in a sublayer, their first-order terms, K, and the error of K."""
    table = candidates[0].table
    written = table.every(sublayer_index)
    one = torch.ones((), dtype=torch.float64, device=written.device)
    normed = behind_norm(written, one, table.readout).to(table.scan_dtype)
    moments = moments_of(normed, table.readout.unembedding, base.probs)
    means, own = written @ base.means[0].T, written @ base.answers.T
    slip_of = slips(table, table.norms_of(sublayer_index))
    swept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    wide: list[tuple[Tensor, ...]] = []
    for column, each in enumerate(candidates):
        place = (each.sublayer_index == sublayer_index).nonzero()[:, 0]
        rows, coefficient = each.row[place], each.coefficient[place] / each.scale
        first = coefficient * (own[rows, column] - means[rows, column])
        slip = coefficient.abs() * slip_of[rows]
        value, remainder, rounding = cumulant(
            moments, rows, min(column, len(base.probs) - 1), coefficient, slip, base.most[0, column]
        )
        swept.append((place, first, value, remainder + rounding))
        # NaN, where moments of a very long vector overflow, counts as large.
        far = (~(remainder <= _LARGEST_REMAINDER)).nonzero()[:, 0]
        wide.append((torch.full_like(far, column), far, rows[far], coefficient[far], slip[far]))
    # What moves a logit by much, through the unembedding once more: exponentials of few.
    columns, far, rows, coefficient, slip = (torch.cat(each) for each in zip(*wide, strict=True))
    order = rows.argsort()
    spent, error = summed_cumulants(
        normed,
        table.readout.unembedding,
        base.probs,
        vector=rows[order],
        state=base.rows(torch.zeros_like(columns), columns)[order],
        mean=means[rows, columns][order],
        coefficient=coefficient[order],
        slip=slip[order],
        most=base.most[0, columns][order],
    )
    back = order.argsort()
    for (_, _, value, off), own_far, own_spent, own_error in zip(
        swept, *(each.split([len(one[1]) for one in wide]) for each in (far, spent[back], error[back])), strict=True
    ):
        value[own_far], off[own_far] = own_spent, own_error
    return swept
