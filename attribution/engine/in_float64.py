"""Importance in float64 of chosen candidates of many prompts, in one pass over the unembedding.

Eq. 13 in two parts: with z = bs(x) and u = bs(v) for a frozen scale of 1,

    Imp(cv|x) = c u_w - [LSE(z + c u) - LSE(z)]

Only the first part depends on the answer, and it is a dot product over the width. The second is summed token by token:
neither the distributions nor the updates of all tokens are held. A pass converts the unembedding to float64 once,
whatever the number of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.engine.importance import Candidates
from attribution.engine.projection import behind_norm, direction_of
from attribution.engine.segments import chunks_of, each_segment
from attribution.engine.vectors import VectorTable
from attribution.records import Layer

__all__ = ["increases"]

# Tokens that are projected at a time, and candidates whose exponentials are then summed at a time: what is made of them
# in float64 stays in a processor's cache.
_CHUNK_TOKENS, _CACHED_ROWS = 512, 64


@dataclass(frozen=True)
class _Group:
    """Candidates of one prompt that write the same to the same streams, whatever the answer.

    Attributes:
        candidates: One of those that share all but the answer.
        vector: Which of the gathered vectors each writes, (n,).
        state: Which of the gathered states each adds to, (n,).
    """

    candidates: Candidates
    vector: Tensor
    state: Tensor


def increases(by_prompt: Sequence[Sequence[Candidates]], *, uniform: bool = False) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the importance of all given candidates, and log p(w) of what each adds to.

    Args:
        by_prompt: For each prompt its candidates: of one unit or of several, for one answer or for several. What they
            have in common is computed once.
        uniform: Whether the importance over the uniform distribution is meant, instead of that of the stream.

    Returns:
        In the same arrangement, importance and log p(w) of each candidate, (n,) each, float64, in nats.
    """
    every = [each for own in by_prompt for each in own]
    if not every:
        return [[] for _ in by_prompt]
    # 1. Vectors and states, each once.
    vectors, place_of = _vectors(every)
    states: list[Tensor] = []
    groups: dict[tuple[int, int, int], _Group] = {}
    for number, own in enumerate(by_prompt):
        known: dict[Layer, int] = {}
        for each in own:
            key = _key(number, each)
            if key not in groups:
                state = _places_of_states(each, known, states)
                groups[key] = _Group(each, place_of[id(each.table)][each.vector], state)
    # 2. What each spends on the rest of the distribution, in passes that memory holds.
    partition, spent = _spent(vectors, torch.stack(states), list(groups.values()), uniform=uniform)
    found = dict(zip(groups, spent, strict=True))
    # 3. What it does for its answer.
    return [
        [_increase(each, vectors, groups[key], found[key], partition, uniform=uniform) for each, key in pairs]
        for pairs in ([(each, _key(number, each)) for each in own] for number, own in enumerate(by_prompt))
    ]


def _key(number: int, candidates: Candidates) -> tuple[int, int, int]:
    return number, id(candidates.table), id(candidates.coefficient)


def _vectors(every: Sequence[Candidates]) -> tuple[Tensor, dict[int, Tensor]]:
    """Return all vectors that candidates write, (m, width), and for each table where among them each of its rows is."""
    tables: dict[int, VectorTable] = {id(each.table): each.table for each in every}
    written, place_of, number = [], {}, 0
    for key, table in tables.items():
        wanted = torch.cat([each.vector for each in every if each.table is table]).unique()
        places = torch.full((sum(table.sizes),), -1, dtype=torch.long, device=wanted.device)
        places[wanted] = torch.arange(number, number + len(wanted), device=wanted.device)
        written.append(table.written_at(wanted))
        place_of[key] = places
        number += len(wanted)
    return torch.cat(written), place_of


def _places_of_states(candidates: Candidates, known: dict[Layer, int], states: list[Tensor]) -> Tensor:
    """Return which of the gathered states each candidate adds to, (n,); those of the prompt that are new join them."""
    table, streams = candidates.table, candidates.streams
    places = torch.zeros(len(table.sublayers), dtype=torch.long, device=candidates.index.device)
    for sublayer_index in candidates.sublayer_index.unique().tolist():
        sublayer = table.sublayers[sublayer_index]
        if sublayer not in known:
            known[sublayer] = len(states)
            states.append(behind_norm(streams.states[sublayer_index], streams.scale, streams.readout))
        places[sublayer_index] = known[sublayer]
    return places[candidates.sublayer_index]


def _spent(vectors: Tensor, states: Tensor, groups: Sequence[_Group], *, uniform: bool) -> tuple[Tensor, list[Tensor]]:
    """Return LSE(z) of every state, and LSE(z + c u) - LSE(z) of every candidate.

    Args:
        vectors: v, (m, width).
        states: As the unembedding multiplies them, (q, width).
        groups: The candidates.
        uniform: Whether z is 0 instead.
    """
    readout = groups[0].candidates.table.readout
    one = torch.ones((), dtype=torch.float64, device=vectors.device)
    normed = behind_norm(vectors, one, readout)
    vector, state = (torch.cat([getattr(each, name) for each in groups]) for name in ("vector", "state"))
    coefficient = torch.cat([each.candidates.coefficient / each.candidates.scale for each in groups])
    blocks = chunks_of(slice(0, len(vector)), _CACHED_ROWS)

    def partition(segment: slice) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the sum of exponentials over some tokens, of every state and of every candidate."""
        before, after = [], []
        for part in chunks_of(segment, _CHUNK_TOKENS):
            rows = readout.unembedding[part].double()
            seen, moved = states @ rows.T, normed @ rows.T
            if uniform:
                seen.zero_()
            before.append(seen.logsumexp(-1))
            of_blocks = [
                torch.addcmul(seen[state[block]], moved[vector[block]], coefficient[block, None]).logsumexp(-1)
                for block in blocks
            ]
            after.append(torch.cat(of_blocks))
        return torch.stack(before).logsumexp(0), torch.stack(after).logsumexp(0)

    before, after = (
        torch.stack(parts).logsumexp(0) for parts in zip(*each_segment(readout.unembedding, partition), strict=True)
    )
    sizes = [len(each.vector) for each in groups]
    return before, list((after - before[state]).split(sizes))


def _increase(
    candidates: Candidates, vectors: Tensor, group: _Group, spent: Tensor, partition: Tensor, *, uniform: bool
) -> tuple[Tensor, Tensor]:
    """Return the importance of candidates for their answer, and log p(w) of what they add to."""
    streams = candidates.streams
    direction = direction_of(streams.readout, candidates.answer)
    own = candidates.coefficient / candidates.scale * (vectors @ direction)[group.vector]
    at_answer = (streams.states @ direction / streams.scale)[candidates.sublayer_index]
    return own - spent, (torch.zeros_like(at_answer) if uniform else at_answer) - partition[group.state]
