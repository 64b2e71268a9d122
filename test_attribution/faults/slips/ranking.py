"""Slips in the search for the best candidates, and in the methods that score them."""

from dataclasses import replace

import torch
from fault import PLANTED, SCORES, TOP, VALUE, Faults

from attribution.engine.methods import METHODS, bound_candidates

FAULTS = Faults()


@FAULTS.patch("the least important come first", "descending", claims=TOP + VALUE + PLANTED)
def _(original, scores):
    return original(scores=-scores)


@FAULTS.patch("the best is left out", "_selected", claims=TOP + PLANTED)
def _(original, k):
    found = original(k=k + 1)
    return replace(found, indices=found.indices[1:], scores=found.scores[1:])


@FAULTS.patch("the search stops at the first block", "_searched", claims=TOP)
def _(original, candidates, method, k):
    if method.bound is None or k is None:
        return original()
    first = bound_candidates(method, candidates).topk(k).indices.sort().values
    found = original(candidates=candidates.take(first), bounds=None)
    return replace(found, indices=first[found.indices])


@FAULTS.patch("ties are broken by memory order", "_searched", claims=TOP)
def _(original, candidates):
    memory = torch.arange(len(candidates)).flip(0)
    found = original(candidates=candidates.take(memory), bounds=None)
    return replace(found, indices=memory[found.indices])


@FAULTS.patch("the bound has the wrong sign", "first_order_bound", claims=SCORES + TOP)
def _(original):
    return -original()


@FAULTS.patch("the rank counts from the wrong end", "VectorTable.reciprocal_ranks", claims=SCORES)
def _(original, self):
    return 1 / (1 + len(self.readout.unembedding) - 1 / original())


@FAULTS.patch("a baseline keeps the coefficient's sign", 'METHODS["coefficient"].score', claims=SCORES)
def _(original, candidates):
    return candidates.coefficient


@FAULTS.patch("a baseline ranks by the vector's sum, not its norm", "VectorTable.norms", claims=SCORES)
def _(original, self):
    return torch.cat(
        [self.written(sublayer_index, torch.arange(size)).sum(-1) for sublayer_index, size in enumerate(self.sizes)]
    )


@FAULTS.patch("a baseline is the method", 'METHODS["prob_increase"].score', claims=SCORES)
def _(original, candidates):
    return METHODS["log_prob_increase"].score(candidates)


@FAULTS.patch("rankings come in order of length", "rank_all", claims=TOP)
def _(original):
    return sorted(original(), key=_length)


def _length(by_method):
    """Return the number of tokens of the prompt that was ranked."""
    return len(next(iter(next(iter(by_method.values())).values())).tokens)
