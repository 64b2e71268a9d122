"""The k best of several prompts that rank the same vectors, by a method that rises with the importance.

Bounds need no projection: they are first-order terms. Vectors that any of the prompts has to look at go through the
unembedding once for all of them, in float32, and give brackets; float64 closes those that overlap where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attribution.engine.all_scores import AllScores, bracket, close_together
from attribution.engine.base import Base, base_of, slips
from attribution.engine.importance import Candidates
from attribution.engine.in_float64 import increases
from attribution.engine.methods import Method, Rising
from attribution.engine.moments import summed_cumulants
from attribution.engine.projection import behind_norm

__all__ = ["MORE", "ORDERED", "Found", "Together", "least_tied"]

MORE = 6
"""Candidates that are looked at first besides the k that are wanted: in most prompts these hold the top k."""

ORDERED = 8
"""So many times as many bounds are put in order at first: a search seldom goes far, and sorting all would take longer
than the rest of it."""


def least_tied(scores: Tensor, k: int, tolerance: float) -> float:
    """Return the k-th largest score, or the least that is tied with it by way of others."""
    falling = scores.sort(descending=True).values
    apart = (falling[k - 1 : -1] - falling[k:] > tolerance).nonzero()
    return float(falling[k - 1 + int(apart[0])] if len(apart) else falling[-1])


@dataclass(frozen=True)
class Found:
    """The k best of one prompt.

    Attributes:
        indices: Which candidates, best first, (k,).
        scores: Their scores, (k,), float64.
        error: How far these can be off, besides float64 rounding.
        first_order: First-order terms of the importances behind them, (k,).
        scored: How many candidates were looked at.
        slack: The k-th best score, or the least that is tied with it, minus the largest bound of those not looked at.
    """

    indices: Tensor
    scores: Tensor
    error: float
    first_order: Tensor
    scored: int
    slack: float


@dataclass(frozen=True)
class _Terms:
    """What the importances of all candidates over some distributions have in common.

    Attributes:
        base: The distributions of all sublayers.
        means: E_p u of every vector for each prompt, (vectors, prompts).
        answers: u_w, (vectors, prompts).
    """

    base: Base
    means: Tensor
    answers: Tensor


class Together:
    """Candidates of several prompts that share their vectors; what methods have in common is made once.

    Args:
        candidates: Those of each prompt, of one unit.
    """

    def __init__(self, candidates: Sequence[Candidates]) -> None:
        self.candidates = candidates
        self.table = candidates[0].table
        self._terms: dict[bool, _Terms] = {}

    def best(self, method: Method, rising: Rising, k: int, *, exact_scores: bool = False) -> list[Found]:
        """Return the k best of each prompt; k is less than there are candidates.

        Args:
            method: The method.
            rising: What it makes of an importance.
            k: How many.
            exact_scores: Compute the scores that are returned in float64, besides those that the order hangs on.
        """
        terms = self._of(rising)
        searches = [
            _Search(each, method, k, *self._bounds(rising, column)) for column, each in enumerate(self.candidates)
        ]
        left = list(range(len(searches)))
        while left:
            wanted = {column: index for column in left if len(index := searches[column].wanted())}
            left = [column for column in left if column in wanted or len(searches[column].undecided)]
            if wanted:
                for column, brackets in self._brackets(wanted, rising, terms).items():
                    searches[column].take(wanted[column], *brackets)
            # Float64 tells apart what brackets cannot, for all prompts in one pass.
            unsure = [searches[column] for column in left if column not in wanted]
            close_together([each.sorted_out() for each in unsure], [each.undecided for each in unsure])
        found = [each.found() for each in searches]
        if not exact_scores:
            return found
        chosen = [[each.take(own.indices)] for each, own in zip(self.candidates, found, strict=True)]
        scored = increases(chosen, uniform=rising.uniform)
        return [
            replace(each, scores=rising.score(increase, log_prob), error=0.0)
            for each, ((increase, log_prob),) in zip(found, scored, strict=True)
        ]

    def _of(self, rising: Rising) -> _Terms:
        if rising.uniform not in self._terms:
            every = range(len(self.table.sublayers))
            base = base_of(self.candidates, every, uniform=rising.uniform)
            means, answers = [], []
            for sublayer_index, mean in zip(every, base.means, strict=True):
                written = self.table.every(sublayer_index)
                means.append(written @ mean.T)
                answers.append(written @ base.answers.T)
            self._terms[rising.uniform] = _Terms(base, torch.cat(means), torch.cat(answers))
        return self._terms[rising.uniform]

    def _bounds(self, rising: Rising, column: int) -> tuple[Tensor, Tensor]:
        """Return the bounds of a prompt's candidates, and the first-order terms that they follow from, (n,) each."""
        terms, candidates = self._of(rising), self.candidates[column]
        first = _first_order(candidates, column, terms)
        return rising.score(first, terms.base.log_probs[candidates.sublayer_index, column]), first

    def _brackets(
        self, wanted: Mapping[int, Tensor], rising: Rising, terms: _Terms
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the scores of some candidates of each prompt, and how far each can be off."""
        table, base = self.table, terms.base
        # 1. Every candidate that is looked at, of all prompts, in the order of the vectors.
        parts = {column: self.candidates[column].take(index) for column, index in wanted.items()}
        sublayer_index, vector = (
            torch.cat([getattr(part, name) for part in parts.values()]) for name in ("sublayer_index", "vector")
        )
        coefficient = torch.cat([part.coefficient / part.scale for part in parts.values()])
        column = torch.cat([torch.full_like(part.vector, number) for number, part in parts.items()])
        order = vector.argsort()
        # 2. What each spends on the rest of its distribution, with what bounds the error of that.
        written, place = vector.unique(return_inverse=True)
        one = torch.ones((), dtype=torch.float64, device=vector.device)
        state = base.rows(sublayer_index, column)
        spent, error = summed_cumulants(
            behind_norm(table.written_at(written), one, table.readout).to(table.scan_dtype),
            table.readout.unembedding,
            base.probs,
            vector=place[order],
            state=state[order],
            mean=terms.means[vector, column][order],
            coefficient=coefficient[order],
            slip=(slips(table, table.norms)[vector] * coefficient.abs())[order],
            most=base.most[sublayer_index, column][order],
        )
        # 3. Scores, and how far they can be off.
        first = coefficient * (terms.answers[vector, column] - terms.means[vector, column])
        back = order.argsort()
        values, errors = bracket(rising, first - spent[back], error[back], base.log_probs[sublayer_index, column])
        sizes = [len(index) for index in wanted.values()]
        return dict(zip(wanted, zip(values.split(sizes), errors.split(sizes), strict=True), strict=True))


def _first_order(candidates: Candidates, column: int, terms: _Terms) -> Tensor:
    vector = candidates.vector
    apart: Tensor = terms.answers[vector, column] - terms.means[vector, column]
    return candidates.coefficient / candidates.scale * apart


class _Search:
    """The search for the k best of one prompt: which candidates it has to look at, and what was found of them.

    Args:
        candidates: All candidates.
        method: What scores them.
        k: How many are wanted.
        bounds: Upper bounds on their scores, (n,).
        first_order: The first-order terms of the importances behind them, (n,).
    """

    def __init__(self, candidates: Candidates, method: Method, k: int, bounds: Tensor, first_order: Tensor) -> None:
        self.candidates, self.method, self.k = candidates, method, k
        self.bounds, self.first_order = bounds, first_order
        self.order = bounds.topk(min(len(bounds), ORDERED * (k + MORE))).indices
        self.tolerance = candidates.tolerance
        self.size = k + MORE
        self.seen = self.order[:0]
        self.brackets = bounds.new_zeros(2, 0)
        self.scores: AllScores | None = None
        self.undecided = self.seen

    def wanted(self) -> Tensor:
        """Return the candidates that have to be looked at next, best bound first; none if no other can be among the k.

        In that case :attr:`undecided` says which of :attr:`scores` have to be told apart in float64 first; when these
        are none, the search is done.
        """
        if not len(self.seen):
            return self._next(-float("inf"))
        if self.scores is not None:
            self.brackets = torch.stack([self.scores.values, self.scores.errors])
        values, errors = self.brackets
        # The k-th best is no worse than that.
        further = self._next(float((values - errors).topk(self.k).values[-1]))
        if not len(further):
            scores = self.sorted_out()
            self.undecided = scores.undecided_at(range(self.k))
            # What is left cannot be better; whether it is tied is known when the k best are.
            if not len(self.undecided):
                further = self._next(least_tied(scores.values, self.k, self.tolerance))
        if len(further):
            self.scores = None
        return further

    def sorted_out(self) -> AllScores:
        """Return the scores of what was looked at, in the order in which ties fall."""
        if self.scores is None:
            order = self.seen.argsort()
            self.seen, self.brackets = self.seen[order], self.brackets[:, order]
            values, errors = self.brackets
            self.scores = AllScores(self.candidates.take(self.seen), self.method, values, errors, self.tolerance)
        return self.scores

    def _next(self, least: float) -> Tensor:
        """Return the next candidates whose bounds reach a score."""
        done = len(self.seen)
        if done + self.size >= len(self.order) and len(self.order) < len(self.bounds):
            left = self.bounds.scatter(0, self.order, -float("inf")).argsort(descending=True, stable=True)
            self.order = torch.cat([self.order, left[: len(self.bounds) - len(self.order)]])
        block = self.order[done : done + self.size]
        return block[self.bounds[block] >= least - 2 * self.tolerance]

    def take(self, index: Tensor, values: Tensor, errors: Tensor) -> None:
        """Take the scores of candidates that were looked at, and how far each can be off."""
        self.seen = torch.cat([self.seen, index])
        self.brackets = torch.cat([self.brackets, torch.stack([values, errors])], 1)
        # Doubling keeps the number of blocks small.
        self.size *= 2

    def found(self) -> Found:
        """Return the k best."""
        assert self.scores is not None, "the search is done"
        ranked = self.scores.at(range(self.k))
        chosen = self.seen[ranked]
        slack = float("inf")
        if len(self.seen) < len(self.bounds):
            least = least_tied(self.scores.values, self.k, self.tolerance)
            slack = least - float(self.bounds[self.order[len(self.seen)]])
        error = float(self.scores.errors[ranked].max())
        return Found(chosen, self.scores.values[ranked], error, self.first_order[chosen], len(self.seen), slack)
