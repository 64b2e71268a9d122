"""The k best of several prompts that rank the same vectors, by a method that rises with the importance.

Bounds need no projection: they are first-order terms. Vectors that any of the prompts has to look at go through the
unembedding once for all of them, in float32, and give brackets; float64 closes those that overlap where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attribution.engine.all_scores import AllScores, block_rows, bracket
from attribution.engine.base import Base, bases_of, slips
from attribution.engine.importance import Candidates, log_prob_increase
from attribution.engine.methods import Method, Rising
from attribution.engine.moments import summed_cumulant
from attribution.engine.projection import before_softmax, behind_norm

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
        bases: By sublayer.
        means: E_p u of every vector for each prompt, (vectors, prompts).
        answers: u_w, (vectors, prompts).
    """

    bases: list[Base]
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
        while wanted := {column: index for column, each in enumerate(searches) if len(index := each.wanted())}:
            for column, brackets in self._brackets(wanted, rising, terms).items():
                searches[column].take(wanted[column], *brackets)
        found = [each.found() for each in searches]
        if not exact_scores:
            return found
        scores = self._in_float64([each.indices for each in found], rising)
        return [replace(each, scores=own, error=0.0) for each, own in zip(found, scores, strict=True)]

    def _in_float64(self, indices: Sequence[Tensor], rising: Rising) -> list[Tensor]:
        """Return the scores of some candidates of each prompt; one product serves all prompts."""
        table, sublayers = self.table, len(self.table.sublayers)
        parts = [each.take(index) for each, index in zip(self.candidates, indices, strict=True)]
        column = torch.cat([torch.full_like(index, place) for place, index in enumerate(indices)])
        vector = torch.cat([part.vector for part in parts])
        stream = column * sublayers + torch.cat([part.sublayer_index for part in parts])
        coefficient = torch.cat([part.coefficient / part.scale for part in parts])
        states = torch.cat([each.streams.states for each in self.candidates])
        scales = torch.stack([each.scale for each in self.candidates]).repeat_interleave(sublayers)
        one, scores = torch.ones_like(scales[0]), torch.empty_like(coefficient)
        for block in vector.argsort().split(block_rows(self.candidates[0])):
            vectors, at_vector = vector[block].unique(return_inverse=True)
            streams, at_stream = stream[block].unique(return_inverse=True)
            update = before_softmax(table.written_at(vectors), one, table.readout)[at_vector]
            update *= coefficient[block, None]
            logits = before_softmax(states[streams], scales[streams], table.readout)
            log_probs = (torch.zeros_like(logits) if rising.uniform else logits).log_softmax(-1)[at_stream]
            for place in column[block].unique().tolist():
                own, answer = column[block] == place, self.candidates[place].answer
                increase = log_prob_increase(log_probs[own], update[own], answer)
                scores[block[own]] = rising.score(increase, log_probs[own, answer])
        return list(scores.split([len(index) for index in indices]))

    def _of(self, rising: Rising) -> _Terms:
        if rising.uniform not in self._terms:
            every = range(len(self.table.sublayers))
            bases = bases_of(self.candidates, every, uniform=rising.uniform)
            means, answers = [], []
            for sublayer_index, base in zip(every, bases, strict=True):
                written = self.table.every(sublayer_index)
                means.append(written @ base.means.T)
                answers.append(written @ base.answers.T)
            self._terms[rising.uniform] = _Terms(bases, torch.cat(means), torch.cat(answers))
        return self._terms[rising.uniform]

    def _bounds(self, rising: Rising, column: int) -> tuple[Tensor, Tensor]:
        """Return the bounds of a prompt's candidates, and the first-order terms that they follow from, (n,) each."""
        terms, candidates = self._of(rising), self.candidates[column]
        first = _first_order(candidates, column, terms)
        log_probs = torch.stack([base.log_probs[column] for base in terms.bases])
        return rising.score(first, log_probs[candidates.sublayer_index]), first

    def _brackets(
        self, wanted: Mapping[int, Tensor], rising: Rising, terms: _Terms
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the scores of some candidates of each prompt, and how far each can be off."""
        table, device = self.table, self.table.offsets.device
        found = {
            column: torch.empty(2, len(index), dtype=torch.float64, device=device) for column, index in wanted.items()
        }
        vectors = {column: self.candidates[column].vector[index] for column, index in wanted.items()}
        slip = slips(table, table.norms)
        one = torch.ones((), dtype=torch.float64, device=device)
        for block in torch.cat(list(vectors.values())).unique().split(block_rows(self.candidates[0])):
            normed = behind_norm(table.written_at(block), one, table.readout).to(table.scan_dtype)
            logits = normed @ table.readout.unembedding.to(table.scan_dtype).T
            for column, own in vectors.items():
                here = ((own >= block[0]) & (own <= block[-1])).nonzero()[:, 0]
                if len(here):
                    part = self.candidates[column].take(wanted[column][here])
                    seen = logits[torch.searchsorted(block, own[here])]
                    found[column][:, here] = torch.stack(_bracketed(part, column, seen, slip[own[here]], rising, terms))
        return {column: (own[0], own[1]) for column, own in found.items()}


def _first_order(candidates: Candidates, column: int, terms: _Terms) -> Tensor:
    vector = candidates.vector
    apart: Tensor = terms.answers[vector, column] - terms.means[vector, column]
    return candidates.coefficient / candidates.scale * apart


def _bracketed(
    candidates: Candidates, column: int, logits: Tensor, slip: Tensor, rising: Rising, terms: _Terms
) -> tuple[Tensor, Tensor]:
    """Return the scores of a prompt's candidates, whose vectors were projected, and how far each can be off."""
    logits -= terms.means[candidates.vector, column, None].to(logits.dtype)
    coefficient = candidates.coefficient / candidates.scale
    slip = slip * coefficient.abs()
    first = _first_order(candidates, column, terms)
    values, errors = torch.empty_like(first), torch.empty_like(first)
    for sublayer_index in candidates.sublayer_index.unique().tolist():
        own, base = (candidates.sublayer_index == sublayer_index).nonzero()[:, 0], terms.bases[sublayer_index]
        spent, error = summed_cumulant(logits[own], base.of(column), coefficient[own], slip[own], base.most[column])
        increase, log_prob = first[own] - spent, base.log_probs[column]
        values[own], errors[own] = bracket(rising, increase, error, log_prob)
    return values, errors


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
        self.best: AllScores | None = None

    def wanted(self) -> Tensor:
        """Return the candidates that have to be looked at next, best bound first; none when the search is done."""
        if not len(self.seen):
            return self._next(-float("inf"))
        values, errors = self.brackets
        # The k-th best is no worse than that.
        further = self._next(float((values - errors).topk(self.k).values[-1]))
        if len(further) or self.best is not None:
            return further
        # What is left cannot be better; whether it is tied is known when the k best are.
        order = self.seen.argsort()
        values, errors = self.brackets[:, order]
        scores = AllScores(self.candidates.take(self.seen[order]), self.method, values, errors, self.tolerance)
        self.ranked = scores.at(range(self.k))
        self.best = scores
        self.seen, self.brackets = self.seen[order], torch.stack([scores.values, scores.errors])
        further = self._next(least_tied(scores.values, self.k, self.tolerance))
        if len(further):
            self.best = None
        return further

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
        assert self.best is not None, "the search is done"
        chosen = self.seen[self.ranked]
        slack = float("inf")
        if len(self.seen) < len(self.bounds):
            least = least_tied(self.best.values, self.k, self.tolerance)
            slack = least - float(self.bounds[self.order[len(self.seen)]])
        return Found(
            chosen,
            self.best.values[self.ranked],
            float(self.best.errors[self.ranked].max()),
            self.first_order[chosen],
            len(self.seen),
            slack,
        )
