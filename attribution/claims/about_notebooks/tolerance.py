"""How near a recomputed number must come to a printed one, and a recomputed order to a printed one.

A printed number is off by at most half a unit of its last digit, and by what float32 did to it. The notebooks ran in
float32, as this engine runs the model; the kernels, and so the order of each sum, are others.

Float32 rounds a stored number by at most u = 2**-24 of its size. Errors of independent roundings add up as the root of
their number (Higham & Mary, 2019). A sum of n terms that a library makes in blocks of about sqrt(n) goes through
2 sqrt(n) roundings (Blanchard, Higham & Mary, 2020), and the stream behind 2 L sublayers, with one unembedding for each
of the two logits of a difference, through 2 L + 2 such sums one after the other. So with N the longest of them

    r = u sqrt((2 L + 2) 2 sqrt(N))

is the relative error of a logit, or of what an attention score or the input of a neuron is made of. From r follow, and
nothing was tuned by what the figures are:

    log p, and log p(x + v) - log p(x):  r log V; log V is |log p(w)| of a token as likely as all others, where the
                                         stream of a prompt starts
    logits of a vector:                  r max |logit|
    an attention weight alpha:           alpha r max |log alpha| of its row
    query scores:                        see :mod:`attribution.claims.about_notebooks.recount`

Other versions of transformers and torch compute the same functions, so they add nothing to it. A notebook that ran with
TF32 would: PyTorch has it off by default for matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from attribution.models.anatomy import Anatomy

__all__ = ["Difference", "Ranked", "Rounding", "difference", "half_a_unit", "largest", "same"]

T = TypeVar("T", bound=Hashable)
_TINY = torch.finfo(torch.float64).tiny
_UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


class Difference(NamedTuple):
    """One printed figure beside the recomputed one.

    Attributes:
        what: Which figure.
        size: How far they are apart, in tolerances; above 1 they disagree.
    """

    what: str
    size: float


@dataclass(frozen=True)
class Rounding:
    """What float32 may do to a model's numbers, see the top of this module.

    Attributes:
        relative: r.
        nats: r log V, of a log-probability or of the difference of two.
    """

    relative: float
    nats: float

    @classmethod
    def of(cls, anatomy: Anatomy) -> Rounding:
        """Return it for a model by its sizes."""
        longest = max(anatomy.width, anatomy.ffn_neurons, anatomy.heads * anatomy.head_dim)
        relative = _UNIT_ROUNDOFF * math.sqrt((2 * anatomy.layers + 2) * 2 * math.sqrt(longest))
        return cls(relative, relative * math.log(anatomy.vocabulary))


def half_a_unit(decimals: int) -> float:
    """Return half a unit of the last of so many decimals."""
    return 0.5 * 10.0**-decimals


def difference(what: str, printed: float, recomputed: float, tolerance: float) -> Difference:
    """Compare two numbers."""
    return Difference(what, abs(printed - recomputed) / tolerance)


def same(what: str, printed: object, recomputed: object) -> Difference:
    """Compare what must be equal."""
    return Difference(what, 0.0 if printed == recomputed else math.inf)


@dataclass(frozen=True)
class Ranked(Generic[T]):
    """Items with recomputed scores, and how far each score may be from what the notebook had.

    Attributes:
        items: All that could be printed; or the leading ones, well beyond what was printed.
        scores: Their scores, (n,), float64.
        errors: Tolerance of each score, (n,).
    """

    items: Sequence[T]
    scores: Tensor
    errors: Tensor

    @cached_property
    def place(self) -> dict[T, int]:
        """Place of each item in ``items``."""
        return {item: place for place, item in enumerate(self.items)}

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        """Return the k-th largest score, and how far it may be from the k-th largest of the notebook, (n,) each.

        If every score is within its error of the notebook's, the k-th largest of the notebook lies between the k-th
        largest of ``scores - errors`` and of ``scores + errors``.
        """
        middle, low, high = (
            each.sort(descending=True).values
            for each in (self.scores, self.scores - self.errors, self.scores + self.errors)
        )
        return middle, torch.maximum(high - middle, middle - low)

    def order(self, what: str, printed: Sequence[T]) -> Iterator[Difference]:
        """Compare a printed order, from the first on, with the recomputed one.

        The item at place k has the notebook's k-th largest score, so its own cannot be farther from the k-th largest
        recomputed one than the errors of the two together. Whatever is within them may swap places, or one stand at
        the last place instead of the other.
        """
        levels, spreads = self._levels
        seen: set[T] = set()
        for number, item in enumerate(printed):
            named = f"{what}, place {number + 1}"
            if item not in self.place or item in seen:
                yield Difference(named, math.inf)
                continue
            seen.add(item)
            place = self.place[item]
            yield Difference(
                named,
                # What comes too late to be a component scores zero without any error.
                float((self.scores[place] - levels[number]).abs() / (self.errors[place] + spreads[number] + _TINY)),
            )

    def members(self, number: int) -> tuple[set[T], set[T]]:
        """Return which items are surely among the first, and which may be."""
        if number >= len(self.items):
            return set(self.items), set(self.items)
        low, high = self.scores - self.errors, self.scores + self.errors
        last = low.sort(descending=True).values[number - 1]
        first_out = high.sort(descending=True).values[number]
        surely, maybe = (low > first_out).tolist(), (high >= last).tolist()
        return (
            {item for item, sure in zip(self.items, surely, strict=True) if sure},
            {item for item, may in zip(self.items, maybe, strict=True) if may},
        )


def largest(differences: Iterable[Difference]) -> Difference:
    """Return the largest difference; one that is no number counts as larger than all."""
    return max(differences, key=lambda each: math.inf if math.isnan(each.size) else each.size)
