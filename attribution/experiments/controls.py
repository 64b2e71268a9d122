"""Random neurons that are like chosen ones: what a claim about the chosen ones has to be compared with."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from attribution.engine.importance import Candidates
from attribution.engine.methods import method_named, score_candidates

__all__ = ["matched"]

# A control is drawn among this many neurons of nearest norm.
_NEAREST = 5


def matched(candidates: Candidates, chosen: Tensor) -> Tensor:
    """Draw as many other neurons from the same layers, each of about the norm of the one that it stands for.

    The norm is that of what a neuron writes, |m| |v|. A neuron that shares its vector with a chosen one, such as the
    same dimension of a head at another position, is never drawn: ablating it would ablate the chosen one.

    Args:
        candidates: All neurons of a unit for one prompt; its seed decides the draw.
        chosen: Places of the chosen ones, (k,).

    Returns:
        Places of the drawn ones, layer by layer, those for the largest first; fewer than k where a layer has too few
        others.
    """
    norms = score_candidates(method_named("output_norm", candidates.table.unit), candidates)
    vectors = candidates.table.offsets[candidates.sublayer_index] + candidates.row
    taken = torch.zeros(sum(candidates.table.sizes), dtype=torch.bool, device=vectors.device)
    taken[vectors[chosen]] = True
    free, sublayer_indices = ~taken[vectors], candidates.sublayer_index
    generator = torch.Generator().manual_seed(candidates.seed)
    draws = iter(torch.rand(len(chosen), generator=generator, dtype=torch.float64).tolist())
    drawn: list[int] = []
    for sublayer_index in sublayer_indices[chosen].unique():
        others = (free & (sublayer_indices == sublayer_index)).nonzero().flatten()
        rising, order = norms[others].sort(stable=True)
        # Lists, because one element of a list is far cheaper to look up and to remove than one of a tensor.
        indices, sizes = others[order].tolist(), rising.tolist()
        # The largest first: they have the fewest neighbours.
        for size in norms[chosen[sublayer_indices[chosen] == sublayer_index]].sort(descending=True).values.tolist():
            if not indices:
                break
            pick = _draw_near(sizes, size, next(draws))
            drawn.append(indices.pop(pick))
            del sizes[pick]
    return torch.tensor(drawn, dtype=torch.long, device=chosen.device)


def _draw_near(rising: list[float], size: float, draw: float) -> int:
    """Return the place of one of the numbers nearest to ``size``, picked by a uniform draw from [0, 1)."""
    place = bisect_left(rising, size)
    low, high = max(0, place - _NEAREST), min(len(rising), place + _NEAREST)
    while high - low > _NEAREST:
        if size - rising[low] > rising[high - 1] - size:
            low += 1
        else:
            high -= 1
    return low + int(draw * (high - low))
