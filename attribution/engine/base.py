"""Over which distributions the importance of several prompts' candidates is taken, sublayer by sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.engine.importance import Candidates
from attribution.engine.projection import behind_norm, direction_of, pull_back, weighted
from attribution.engine.vectors import VectorTable
from attribution.models.anatomy import Readout
from attribution.models.norms import centre

__all__ = ["Base", "bases_of", "slips"]

# Tokens whose logits are made at a time: their rows in float64 stay in a processor's cache.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Base:
    """The distributions of one sublayer, for several prompts: p = softmax(bs(x)), or the uniform one for all of them.

    Attributes:
        log_probs: log p(w), the answer's, (prompts,), float64.
        probs: p, (vocabulary, prompts) or (vocabulary, 1), in the dtype that logits are swept in.
        most: The largest of each, (prompts,), float64.
        means: Pull-backs of p: <mean, v> = E_p u for u = bs(v) and a frozen scale of 1, (prompts, width), float64.
        answers: Pull-backs of the answers: <answer, v> = u_w, (prompts, width), float64.
    """

    log_probs: Tensor
    probs: Tensor
    most: Tensor
    means: Tensor
    answers: Tensor

    def column(self, prompt: int) -> int:
        """Return which column of :attr:`probs` is a prompt's."""
        return prompt if self.probs.shape[1] > 1 else 0

    def of(self, prompt: int) -> Tensor:
        """Return the distribution of a prompt, (vocabulary,)."""
        return self.probs[:, self.column(prompt)]


def bases_of(candidates: Sequence[Candidates], sublayers: Sequence[int], *, uniform: bool) -> list[Base]:
    """Return the distributions that the candidates of some sublayers add to, for each of these.

    Args:
        candidates: Those of each prompt.
        sublayers: Which sublayers, by index.
        uniform: Whether the uniform distribution is meant, instead of that of the stream.
    """
    table, readout = candidates[0].table, candidates[0].streams.readout
    tokens, number = len(readout.unembedding), len(candidates)
    answers = torch.tensor([each.answer for each in candidates], device=readout.unembedding.device)
    directions = direction_of(readout, answers)
    one = torch.ones((), dtype=torch.float64, device=answers.device)
    if uniform:
        probs = one.new_full((tokens, 1), 1 / tokens)
        same = Base(
            probs[0].log().expand(number),
            probs.to(table.scan_dtype),
            probs[0].expand(number),
            pull_back(probs.T, one, readout).expand(number, -1),
            directions,
        )
        return [same] * len(sublayers)
    scales = torch.stack([each.scale for each in candidates])
    states = torch.stack([each.streams.states[list(sublayers)] for each in candidates], 1)
    logs, probs, means = _softmax(behind_norm(states, scales, readout).flatten(0, 1), readout, table.scan_dtype)
    means = centre(weighted(means, one, readout), readout.norm)
    log_probs = (states * directions).sum(-1) / scales - logs.view(len(sublayers), number)
    most = probs.amax(1).double()
    return [
        Base(own, each.T.contiguous(), largest, mean, directions)
        for own, each, largest, mean in zip(
            log_probs,
            probs.view(len(sublayers), number, tokens),
            most.view(len(sublayers), number),
            means.view(len(sublayers), number, -1),
            strict=True,
        )
    ]


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
    number, tokens = len(states), len(readout.unembedding)
    probs = torch.empty(number, tokens, dtype=dtype, device=states.device)
    highest = states.new_full((number,), -float("inf"))
    total, means = states.new_zeros(number), states.new_zeros(number, states.shape[1])
    tops = []
    for start in range(0, tokens, _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
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
    logs = highest + total.log()
    for chunk, top in enumerate(tops):
        part = slice(chunk * _CHUNK_TOKENS, (chunk + 1) * _CHUNK_TOKENS)
        probs[:, part] *= (top - logs).exp().to(dtype)[:, None]
    return logs, probs, means / total[:, None]


def slips(table: VectorTable, norms: Tensor) -> Tensor:
    """Return how far rounding can move a logit of vectors for a frozen scale of 1, in what they are swept in, (n,).

    Args:
        table: Where the vectors are.
        norms: Their norms as they are written, (n,).
    """
    width, eps = table.readout.unembedding.shape[1], torch.finfo(table.scan_dtype).eps
    found: Tensor = 4 * width**0.5 * eps * table.largest_readout * norms
    return found
