"""Importance of many updates at once, by the moments of their projections.

With u = bs(v) for a frozen scale of 1, c the coefficient over the frozen scale, and X = u - E_p u, Eq. 13 is

    Imp(cv|x) = c <e_w - p, u> - K(c),    K(c) = log E_p exp(cX) = log [1 + sum_{j=2..4} c^j mu_j / j! + R]

The first term is a dot product over the width; K is the KL divergence of :mod:`attribution.engine.importance`. The
moments mu_j = E_p X^j depend neither on the answer nor on the coefficient: one product of the vectors with the
unembedding serves all prompts, and an attention neuron's moments serve all its source positions. With
B = |c| max_t |X_t|, Taylor's theorem bounds the remainder, ``|R| <= c^4 mu_4 B e^B / 120``, which is below rounding for
the many neurons that move no logit by much. Of the others, exponentials are summed.

Logits are projected in float32, unless weights are wider, and the error that K has from that is bounded along with R.
As in the first-order bound, rounding errors are taken as independent, so that a sum of n terms errs by about sqrt(n)
eps times their sizes (Higham & Mary 2019), with a factor of 4 for safety.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.engine.segments import chunks_of, each_segment

__all__ = ["Moments", "cumulant", "moments_of", "summed_cumulants"]

# Tokens that are projected at a time, and updates whose exponentials are then summed at a time: what is made of them in
# float32 stays in a processor's cache.
_CHUNK_TOKENS, _CACHED_ROWS = 1024, 64
# Vectors whose moments are computed at a time.
_BLOCK_ROWS = 512
# Exponents are summed up to it, e^40 = 2e17: no sum in float32 overflows.
_LARGEST_EXPONENT = 40.0


@dataclass(frozen=True)
class Moments:
    """Moments E u^j of projections under several distributions, about a point near their means; float64.

    Attributes:
        powers: For j = 1, 2, 3 and 4, (4, n, distributions).
        largest: The largest of the absolute u over tokens, (n,).
        eps: Machine epsilon of what they were computed in.
        tokens: How many tokens there are.
    """

    powers: Tensor
    largest: Tensor
    eps: float
    tokens: int


def moments_of(vectors: Tensor, unembedding: Tensor, probs: Tensor) -> Moments:
    """Return moments of the projections of vectors under several distributions.

    Args:
        vectors: v behind the final norm, for a frozen scale of 1, (n, width), in the dtype to compute in.
        unembedding: W_U, (vocabulary, width).
        probs: The distributions, (distributions, vocabulary), in that dtype.
    """
    # About the mean under all distributions together, so that little cancels in central moments.
    average = probs.mean(0)
    centre = sum(each_segment(unembedding, lambda part: average[part] @ unembedding[part].to(vectors.dtype)))
    assert isinstance(centre, Tensor)
    origin = (vectors @ centre)[:, None]
    blocks = chunks_of(slice(0, len(vectors)), _BLOCK_ROWS)

    def of_segment(segment: slice) -> tuple[Tensor, Tensor]:
        powers = torch.zeros(4, len(vectors), len(probs), dtype=torch.float64, device=vectors.device)
        largest = vectors.new_zeros(len(vectors))
        for part in chunks_of(segment, _CHUNK_TOKENS):
            rows, own = unembedding[part].to(vectors.dtype).T, probs[:, part].T
            for block in blocks:
                logits = torch.addmm(origin[block], vectors[block], rows, beta=-1)
                largest[block] = torch.maximum(largest[block], _largest(logits))
                squares = logits * logits
                powers[0, block] += logits @ own
                powers[1, block] += squares @ own
                powers[2, block] += logits.mul_(squares) @ own
                powers[3, block] += squares.mul_(squares) @ own
        return powers, largest

    every = each_segment(unembedding, of_segment)
    total, most = every[0]
    for powers, largest in every[1:]:
        total += powers
        most = torch.maximum(most, largest)
    return Moments(total, most.double(), torch.finfo(vectors.dtype).eps, len(unembedding))


def _largest(logits: Tensor) -> Tensor:
    """Return the largest absolute value of each row: in two passes, which take a third of the time of a norm."""
    return torch.maximum(logits.amax(1), -logits.amin(1))


def cumulant(
    moments: Moments, rows: Tensor, column: int, coefficient: Tensor, slip: Tensor, most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return K(c) by the moments, and what bounds its error.

    Args:
        moments: The moments.
        rows: Which of the vectors, (m,).
        column: Which distribution.
        coefficient: c, (m,), float64.
        slip: How far rounding can move c u_t of each, (m,).
        most: The largest probability of the distribution.

    Returns:
        K, the remainder's part of its error, and that of rounding, (m,) each, in nats.
    """
    first, second, third, fourth = moments.powers[:, rows, column]
    size = coefficient.abs()
    central_second = (second - first**2).clamp(min=0)
    central_third = third - 3 * first * second + 2 * first**3
    central_fourth = (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4).clamp(min=0)
    quadratic = size**2 * central_second / 2
    cubic, quartic = coefficient**3 * central_third / 6, size**4 * central_fourth / 24
    # Where B is large, the series may be negative, which K is not.
    value = torch.log1p((quadratic + cubic + quartic).clamp(min=0))
    reach = size * (moments.largest[rows] + first.abs()) + slip
    growth = reach.clamp(max=_LARGEST_EXPONENT).exp()
    # Of each moment, sums err by a share of the sizes of their terms. |E u^j| is at most q^j, q the fourth root of
    # E u^4; central moments have 2^j terms of j factors.
    share = 4 * moments.tokens**0.5 * moments.eps
    root = size * fourth.clamp(min=0) ** 0.25
    off = share * size**2 * (second / 2 + first**2), share * 4 * root**3, share * 3 * root**4
    # A moment that is next to nothing may be nothing but rounding: what grows with it grows with its error as well.
    remainder = (quartic + off[2]) * reach * growth / 5
    rounding = sum(off) + slipped(quadratic + off[0], growth, slip, most)
    return value, remainder.where(reach <= _LARGEST_EXPONENT, float("inf")), rounding


def slipped(quadratic: Tensor, growth: Tensor, slip: Tensor, most: Tensor) -> Tensor:
    """Return how far K moves when rounding moves logits: by <p' - p, slips> to first order.

    Slips are independent, so that the L2 norm of p' - p counts: ``|p' - p|_2^2 <= max p . c^2 mu_2`` to first order,
    and no more than 2 in any case.
    """
    apart = ((2 * most * quadratic).sqrt() * growth).clamp(max=2**0.5)
    return slip * apart + slip**2


def summed_cumulants(
    vectors: Tensor,
    unembedding: Tensor,
    probs: Tensor,
    *,
    vector: Tensor,
    state: Tensor,
    mean: Tensor,
    coefficient: Tensor,
    slip: Tensor,
    most: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return K(c) of updates by exponentials, and what bounds its error.

    Args:
        vectors: v behind the final norm, for a frozen scale of 1, (m, width), in the dtype to compute in.
        unembedding: W_U, (vocabulary, width).
        probs: The distributions, (states, vocabulary), in that dtype.
        vector: Which vector each update is a multiple of, (n,); faster where they rise.
        state: Which distribution its K is over, (n,).
        mean: E_p u of each, (n,), float64.
        coefficient: c, (n,), float64.
        slip: How far rounding can move c u_t of each, (n,).
        most: The largest probability of its distribution, (n,).

    Returns:
        (n,) each, in nats.
    """
    dtype = vectors.dtype
    factor, shift = coefficient.to(dtype)[:, None], -(coefficient * mean).to(dtype)[:, None]
    blocks = [
        (block, *vector[block].unique(return_inverse=True)) for block in chunks_of(slice(0, len(vector)), _CACHED_ROWS)
    ]

    def of_segment(segment: slice) -> tuple[Tensor, Tensor]:
        gained, largest = torch.zeros_like(coefficient), vectors.new_zeros(len(vector))
        for part in chunks_of(segment, _CHUNK_TOKENS):
            rows = unembedding[part].to(dtype).T
            for block, written, at_vector in blocks:
                moved = torch.addcmul(shift[block], (vectors[written] @ rows)[at_vector], factor[block])
                largest[block] = torch.maximum(largest[block], _largest(moved))
                # E (exp(x) - 1 - x): no term is negative, and a mean that is off by rounding counts only to second
                # order.
                terms = torch.expm1(moved).sub_(moved)
                gained[block] += torch.linalg.vecdot(terms, probs[state[block], part])
        return gained, largest

    sums, tops = zip(*each_segment(unembedding, of_segment), strict=True)
    gained, largest = torch.stack(sums).sum(0).clamp(min=0), torch.stack(tops).amax(0).double()
    eps, tokens = torch.finfo(dtype).eps, len(unembedding)
    # Half the mean square of x is no more than what is gained times e^B.
    growth = largest.clamp(max=_LARGEST_EXPONENT).exp()
    rounding = 4 * eps * (tokens**0.5 * gained + (2 * gained).sqrt() * growth) / (1 + gained)
    error = rounding + slipped(gained, growth, slip, most)
    # Larger exponents, and what is no number, are left to float64.
    known = (largest <= _LARGEST_EXPONENT) & error.isfinite()
    return torch.log1p(gained).where(known, 0.0), error.where(known, float("inf"))
