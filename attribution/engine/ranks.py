"""Ranks of an answer in bs(v): bracketed for every vector v, and counted for a few.

Sorted once, the logits of a vector bracket the rank of any answer: of each vector the logits at some ranks r_1 < r_2 <
... are kept, and an answer whose own logit, one dot product, lies between two of them ranks between them. All is
computed in float32 with a margin for its rounding, so that the brackets hold for ranks in float64; those are counted
where it matters, with float64 only for the tokens that float32 cannot tell from the answer.

A rank counts from 1, in descending order, and tokens equal to the answer do not push it down.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribution.engine.projection import before_softmax, behind_norm, direction_of
from attribution.engine.segments import chunks_of, each_segment
from attribution.models.anatomy import Readout

__all__ = ["Levels", "bracketed", "counted", "kept_ranks", "levels_of", "ranks_of"]

# Every rank up to _FIRST is kept, then _PER_OCTAVE ranks between each power of two and the next, so that the ends of a
# bracket differ by about a fifth.
_FIRST, _PER_OCTAVE = 8, 4
# Logits, vectors x vocabulary, that are held at a time: 2**24 float32 numbers are 64 MiB.
_HELD_NUMBERS = 2**24
# Tokens and vectors whose logits are compared at a time: they stay in a processor's cache.
_CHUNK_TOKENS, _CACHED_ROWS = 1024, 128
# Beyond this part of the tokens it is faster to project all of them in float64 than to take each by itself.
_NEAR_SHARE, _FEW_NEAR = 64, 16


@dataclass(frozen=True)
class Levels:
    """The logits of vectors at some ranks.

    Attributes:
        ranks: Which ranks, rising from 1, (m,).
        logits: bs(v) at those ranks, for a frozen scale of 1, (n, m), falling.
    """

    ranks: Tensor
    logits: Tensor


def kept_ranks(vocabulary: int) -> list[int]:
    """Return the ranks at which logits are kept: each of the first, then some of every octave, and the last."""
    later = {int(2 ** (step / _PER_OCTAVE)) for step in range(_PER_OCTAVE * vocabulary.bit_length())}
    return sorted({rank for rank in {*range(1, _FIRST + 1), *later} if rank < vocabulary} | {vocabulary})


def ranks_of(readout: Readout) -> Tensor:
    """Return :func:`kept_ranks` of a vocabulary, (m,)."""
    return torch.tensor(kept_ranks(len(readout.unembedding)), device=readout.unembedding.device)


def levels_of(vectors: Tensor, readout: Readout) -> Tensor:
    """Return the logits of vectors, (n, width), at :func:`ranks_of` a vocabulary, (n, m), in the vectors' dtype."""
    ranks = ranks_of(readout)
    one = torch.ones((), dtype=vectors.dtype, device=vectors.device)
    rows = max(1, _HELD_NUMBERS // len(readout.unembedding))
    pieces = [_falling(before_softmax(part, one, readout))[:, ranks - 1] for part in vectors.split(rows)]
    return torch.cat(pieces)


def _falling(logits: Tensor) -> Tensor:
    """Sort each row, largest first."""
    if logits.device.type != "cpu":
        return logits.sort(dim=-1, descending=True).values
    # NumPy sorts a row several times faster, and leaves the interpreter to other threads meanwhile.
    numbers = logits.numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(lambda part: part.sort(axis=-1), np.array_split(numbers, torch.get_num_threads())))
    return logits.flip(-1)


def bracketed(levels: Levels, own: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest rank that an answer can have in each vector, (n,) each.

    Args:
        levels: Of the vectors.
        own: The answer's logit in each, (n,).
        reach: How far rounding can move the difference of two logits, (n,).
    """
    # Levels fall, and searchsorted wants what rises.
    rising = -levels.logits
    beyond = torch.cat([levels.ranks.new_zeros(1), levels.ranks])
    # All tokens up to the last level above the answer are ahead of it; from the first level below it on, none is.
    upper, lower = ((own + each).to(rising.dtype)[:, None] for each in (reach, -reach))
    ahead = torch.searchsorted(rising, -upper)[:, 0]
    behind = torch.searchsorted(rising, -lower, right=True)[:, 0]
    # The answer itself is above that level.
    largest = torch.cat([levels.ranks - 1, levels.ranks[-1:]])[behind]
    return 1 + beyond[ahead].clamp(max=levels.ranks[-1] - 1), largest


def counted(vectors: Tensor, answer: int, readout: Readout, dtype: torch.dtype, reach: Tensor) -> Tensor:
    """Return the rank of the answer in each vector, (n,).

    Args:
        vectors: v, (n, width), float64.
        answer: The answer's token id.
        readout: The final norm and unembedding.
        dtype: What logits are computed in where it can tell them apart.
        reach: How far rounding in it can move the difference of two logits, (n,).
    """
    if not len(vectors):
        return torch.zeros(0, dtype=torch.long, device=vectors.device)
    one = torch.ones((), dtype=dtype, device=vectors.device)
    normed = behind_norm(vectors.to(dtype), one, readout)
    own = _along(vectors, torch.full((len(vectors),), answer, device=vectors.device), readout)
    above, below = ((own + sign * reach).to(dtype)[:, None] for sign in (1, -1))
    blocks = chunks_of(slice(0, len(vectors)), _CACHED_ROWS)

    def of_segment(segment: slice) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Return how many of some tokens are ahead, which rows have many near ones, and the near ones of the others."""
        ahead = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
        flat = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        near_rows, near_tokens = [], []
        for part in chunks_of(segment, _CHUNK_TOKENS):
            rows = readout.unembedding[part].to(dtype).T
            for block in blocks:
                logits = normed[block] @ rows
                over = logits > above[block]
                # Counted in 32 bits, which takes less than half of the time.
                ahead[block] += over.sum(-1, dtype=torch.int32)
                near = over.logical_xor_(logits >= below[block])
                many = near.sum(-1, dtype=torch.int32) > max(_FEW_NEAR, near.shape[1] // _NEAR_SHARE)
                flat[block] |= many
                row, token = (near & ~many[:, None]).nonzero(as_tuple=True)
                near_rows.append(row + block.start)
                near_tokens.append(token + part.start)
        return ahead, flat, near_rows, near_tokens

    ahead, flat, near_rows, near_tokens = zip(*each_segment(readout.unembedding, of_segment), strict=True)
    ranks, many = 1 + torch.stack(ahead).sum(0), torch.stack(flat).any(0)
    # What is nearer is told apart in float64. The answer itself is among it, so that equal tokens stay equal.
    row, token = (torch.cat([each for own in lists for each in own]) for lists in (near_rows, near_tokens))
    for part in torch.arange(len(row), device=row.device).split(max(1, _HELD_NUMBERS // vectors.shape[1])):
        closer = _along(vectors[row[part]], token[part], readout) > own[row[part]]
        ranks.index_add_(0, row[part], closer.to(ranks.dtype))
    # Of a vector that hardly moves a logit every token is near: it is projected in float64 as a whole.
    if many.any():
        ranks[many] = _counted_in_full(vectors[many], answer, readout)
    return ranks


def _along(vectors: Tensor, tokens: Tensor, readout: Readout) -> Tensor:
    """Return the logit of one token in each vector, (n,), float64."""
    return (vectors * direction_of(readout, tokens)).sum(-1)


def _counted_in_full(vectors: Tensor, answer: int, readout: Readout) -> Tensor:
    """Return the rank of the answer in each vector, (n,), by all its logits in float64."""
    one = torch.ones((), dtype=vectors.dtype, device=vectors.device)
    rows = max(1, _HELD_NUMBERS // len(readout.unembedding))
    # Equal tokens need not come out equal of one product.
    others = (readout.unembedding != readout.unembedding[answer]).any(-1)
    found = [before_softmax(part, one, readout) for part in vectors.split(rows)]
    return 1 + torch.cat([(others & (logits > logits[:, answer, None])).sum(-1) for logits in found])
