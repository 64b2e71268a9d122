"""Over which distributions the importance of several prompts' candidates is taken, sublayer by sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.engine.importance import Candidates
from attribution.engine.projection import behind_norm, direction_of, pull_back, weighted
from attribution.engine.segments import chunks_of, each_segment, segments_of
from attribution.engine.vectors import VectorTable
from attribution.models.anatomy import Readout
from attribution.models.norms import centre

__all__ = ["Base", "base_of", "slips"]

# Tokens whose logits are made at a time: their rows in float64 stay in a processor's cache.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Base:
    """Distributions of some sublayers for several prompts: p = softmax(bs(x)), or the uniform one for all of them.

    Attributes:
        log_probs: log p(w), the answer's, (sublayers, prompts), float64.
        probs: p, (sublayers * prompts, vocabulary) or (1, vocabulary), in the dtype that logits are swept in.
        most: The largest of each, (sublayers, prompts), float64.
        means: Pull-backs of p: <mean, v> = E_p u for u = bs(v) and a frozen scale of 1, (sublayers, prompts, width),
            float64.
        answers: Pull-backs of the answers: <answer, v> = u_w, (prompts, width), float64.
    """

    log_probs: Tensor
    probs: Tensor
    most: Tensor
    means: Tensor
    answers: Tensor

    def rows(self, sublayer: Tensor, prompt: Tensor) -> Tensor:
        """Return which row of :attr:`probs` is that of a sublayer, by its place among those of the base, and prompt."""
        return sublayer * self.log_probs.shape[1] + prompt if len(self.probs) > 1 else torch.zeros_like(prompt)


def base_of(candidates: Sequence[Candidates], sublayers: Sequence[int], *, uniform: bool) -> Base:
    """Return the distributions that the candidates of some sublayers add to.

    Args:
        candidates: Those of each prompt.
        sublayers: Which sublayers, by index.
        uniform: Whether the uniform distribution is meant, instead of that of the stream.
    """
    table, readout = candidates[0].table, candidates[0].streams.readout
    tokens, shape = len(readout.unembedding), (len(sublayers), len(candidates))
    answers = torch.tensor([each.answer for each in candidates], device=readout.unembedding.device)
    directions = direction_of(readout, answers)
    one = torch.ones((), dtype=torch.float64, device=answers.device)
    if uniform:
        share = one / tokens
        probs = share.expand(1, tokens)
        mean = pull_back(probs, one, readout)
        return Base(
            share.log().expand(shape),
            probs.to(table.scan_dtype),
            share.expand(shape),
            mean.expand(*shape, -1),
            directions,
        )
    scales = torch.stack([each.scale for each in candidates])
    states = torch.stack([each.streams.states[list(sublayers)] for each in candidates], 1)
    logs, probs, means = _softmax(behind_norm(states, scales, readout).flatten(0, 1), readout, table.scan_dtype)
    means = centre(weighted(means, one, readout), readout.norm)
    log_probs = (states * directions).sum(-1) / scales - logs.view(shape)
    return Base(log_probs, probs, probs.amax(1).double().view(shape), means.view(*shape, -1), directions)


def _softmax(states: Tensor, readout: Readout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax of the logits of states in float64, in one pass over the unembedding.

    Args:
        states: As the unembedding multiplies them, (n, width), float64.
        readout: The unembedding.
        dtype: What the probabilities are returned in.

    Returns:
        The logarithm of the sum of exponentials, (n,); probabilities, (n, vocabulary); and the mean row of the
        unembedding under them, (n, width).
    """
    probs = torch.empty(len(states), len(readout.unembedding), dtype=dtype, device=states.device)

    def of_segment(segment: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the highest logits of some tokens, sums of exponentials about these, and the rows so weighted."""
        highest = states.new_full((len(states),), -float("inf"))
        total, means = states.new_zeros(len(states)), torch.zeros_like(states)
        tops = []
        for part in chunks_of(segment, _CHUNK_TOKENS):
            rows = readout.unembedding[part].double()
            logits = states @ rows.T
            # Sums so far are those of exponentials about the highest logit so far.
            before, highest = highest, torch.maximum(highest, logits.amax(1))
            shrunk = (before - highest).exp()
            logits.sub_(highest[:, None]).exp_()
            total = total * shrunk + logits.sum(1)
            means = means * shrunk[:, None] + logits @ rows
            probs[:, part] = logits.to(dtype)
            tops.append(highest)
        for part, top in zip(chunks_of(segment, _CHUNK_TOKENS), tops, strict=True):
            probs[:, part] *= (top - highest).exp().to(dtype)[:, None]
        return highest, total, means

    every = each_segment(readout.unembedding, of_segment)
    tops, totals, means = (torch.stack(each) for each in zip(*every, strict=True))
    highest = tops.amax(0)
    share = (tops - highest).exp()
    total = (totals * share).sum(0)
    share /= total
    for segment, factor in zip(segments_of(readout.unembedding), share, strict=True):
        probs[:, segment] *= factor.to(dtype)[:, None]
    return highest + total.log(), probs, (means * share[:, :, None]).sum(0)


def slips(table: VectorTable, norms: Tensor) -> Tensor:
    """Return how far rounding can move a logit of vectors for a frozen scale of 1, in what they are swept in, (n,).

    Args:
        table: Where the vectors are.
        norms: Their norms as they are written, (n,).
    """
    width, eps = table.readout.unembedding.shape[1], torch.finfo(table.scan_dtype).eps
    found: Tensor = 4 * width**0.5 * eps * table.largest_readout * norms
    return found
