"""The vectors that neurons, heads and layers write, and what of them does not depend on the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from attribution.engine.kept_levels import kept_levels
from attribution.engine.projection import before_softmax, direction_of, largest_row_norm
from attribution.engine.ranks import Levels, bracketed, counted, levels_of, ranks_of
from attribution.models.anatomy import Anatomy, ByLayer, Readout
from attribution.models.model import Model
from attribution.records import (
    NEURON_UNITS,
    SUBLAYERS,
    AttentionNeuron,
    Component,
    FFNNeuron,
    Head,
    HeadPosition,
    Layer,
    SublayerKind,
    Unit,
)

__all__ = ["VectorTable", "largest_readout_of", "sublayers_of", "vector_table"]

# Projected vectors are kept up to this many float64 numbers per table: 128 MiB.
_KEPT_NUMBERS = 2**24

# Ranks in so small a part of the vectors are not kept.
_FEW_OF_ALL = 8


def sublayers_of(unit: Unit, anatomy: Anatomy) -> tuple[Layer, ...]:
    """Return the sublayers that hold a unit, in forward order."""
    return tuple(Layer(layer, kind) for layer in range(anatomy.layers) for kind in SUBLAYERS[unit])


class VectorTable:
    """The vectors that the candidates of one unit write, and what of them does not depend on the prompt.

    Only sublayers that hold candidates are in it, in forward order; a sublayer's index is its place among these. The
    table remembers what it has computed: norms, bounds, ranks by answer, and records, for prompts rank the same neurons
    again and again.

    Args:
        unit: The unit.
        sublayers: The sublayers that hold candidates.
        vectors: Per sublayer, subvalues or attention output vectors, (rows, width), in the model's dtype.
        post_weights: Per sublayer, what a vector is multiplied by elementwise on its way to the residual stream,
            (width,), or ``None`` for ones.
        readout: Final norm and unembedding.
        per_head: Rows per head in an attention sublayer: dimensions, source positions, or 1.
        largest_readout: :func:`attribution.engine.projection.largest_row_norm` where it is known: one pass over the
            unembedding, the same for all tables of a model.
    """

    def __init__(
        self,
        unit: Unit,
        sublayers: tuple[Layer, ...],
        vectors: Sequence[Tensor],
        post_weights: tuple[Tensor | None, ...],
        readout: Readout,
        per_head: int,
        largest_readout: float | None = None,
    ) -> None:
        self.unit = unit
        self.sublayers = sublayers
        self.vectors = vectors
        self.post_weights = post_weights
        self.readout = readout
        self.per_head = per_head
        self._largest_readout = largest_readout
        self._records: dict[tuple[int, int, int], Component] = {}
        self._ranks: dict[int, Tensor] = {}
        self._brackets: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts: dict[int, Tensor] = {}
        self._indices: dict[int, tuple[Tensor, ...]] = {}

    @classmethod
    def of(cls, unit: Unit, anatomy: Anatomy) -> VectorTable:
        """Return the table of a model's neurons: of one sublayer per block, or of both for ``"neuron"``."""
        sublayers = sublayers_of(unit, anatomy)
        own = [anatomy.sublayer(each.layer, each.kind) for each in sublayers]
        chosen = ByLayer(lambda sublayer_index: own[sublayer_index].vectors, len(sublayers))
        return cls(
            unit,
            sublayers,
            chosen if anatomy.spread else tuple(chosen),
            tuple(each.post_weight for each in own),
            anatomy.readout,
            anatomy.head_dim,
            anatomy.once(largest_readout_of),
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each sublayer."""
        return [len(vectors) for vectors in self.vectors]

    @cached_property
    def offsets(self) -> Tensor:
        """Index of each sublayer's first row among all rows, (sublayers,)."""
        return torch.tensor([0, *self.sizes]).cumsum(0)[:-1].to(self.readout.unembedding.device)

    @cached_property
    def norms(self) -> Tensor:
        """|v|, the L2 norm of each vector as it is written, float64, (rows of all sublayers,)."""
        return torch.cat([self.every(sublayer_index).norm(dim=-1) for sublayer_index in range(len(self.vectors))])

    def norms_of(self, sublayer_index: int) -> Tensor:
        """Return the norms of one sublayer's vectors, (rows,)."""
        first = int(self.offsets[sublayer_index])
        return self.norms[first : first + self.sizes[sublayer_index]]

    @property
    def largest_readout(self) -> float:
        """The largest |gamma * W_t| over tokens t: no bs(v)_t exceeds |v| times this over the scale."""
        if self._largest_readout is None:
            self._largest_readout = float(largest_row_norm(self.readout))
        return self._largest_readout

    @cached_property
    def scan_dtype(self) -> torch.dtype:
        """What bounds are computed in: float32, unless the weights are float64."""
        return torch.promote_types(torch.float32, self.readout.unembedding.dtype)

    def indices(self, positions: int) -> tuple[Tensor, ...]:
        """Return index, sublayer index, row and position, each (n,), of every candidate.

        They are in the order in which ties fall: by sublayer, row, and, for attention neurons, source position.

        Args:
            positions: Number of source positions of an attention neuron; 1 for other units.
        """
        if positions not in self._indices:
            parts = []
            for sublayer_index, size in enumerate(self.sizes):
                depth = positions if self.sublayers[sublayer_index].kind == "attention" else 1
                row, position = torch.unravel_index(torch.arange(size * depth), (size, depth))
                parts.append((torch.full_like(row, sublayer_index), row, position))
            sublayer_indices, rows, sources = (torch.cat(each) for each in zip(*parts, strict=True))
            device = self.readout.unembedding.device
            indices = (torch.arange(len(rows)), sublayer_indices, rows, sources)
            self._indices[positions] = tuple(each.to(device) for each in indices)
        return self._indices[positions]

    def record(self, sublayer_index: int, row: int, position: int) -> Component:
        """Return the record of a candidate: looking one up takes a fifth of making it again."""
        place = sublayer_index, row, position
        if place not in self._records:
            self._records[place] = self._make_record(*place)
        return self._records[place]

    def _make_record(self, sublayer_index: int, row: int, position: int) -> Component:
        sublayer, (head, dim) = self.sublayers[sublayer_index], divmod(row, self.per_head)
        if self.unit == "layer":
            return sublayer
        if self.unit == "head":
            return Head(sublayer.layer, row)
        if self.unit == "head_position":
            return HeadPosition(sublayer.layer, head, dim)
        if sublayer.kind == "ffn":
            return FFNNeuron(sublayer.layer, row)
        return AttentionNeuron(sublayer.layer, head, dim, position)

    def place_of(self, record: Component, positions: int) -> int | None:
        """Return the index of a record among the candidates of :meth:`indices`; ``None`` if it is not one of them."""
        kind = record.kind if isinstance(record, Layer) else "ffn" if isinstance(record, FFNNeuron) else "attention"
        sublayer_index = self._index_of.get((record.layer, kind))
        if sublayer_index is None:
            return None
        depths = [positions if each.kind == "attention" else 1 for each in self.sublayers]
        row, position = self._row_and_position(record)
        inside = 0 <= row < self.sizes[sublayer_index] and 0 <= position < depths[sublayer_index]
        # A dimension beyond its head, or a record of another unit, comes back as something else.
        if not inside or self.record(sublayer_index, row, position) != record:
            return None
        before = sum(size * depth for size, depth in zip(self.sizes[:sublayer_index], depths, strict=False))
        return before + row * depths[sublayer_index] + position

    def _row_and_position(self, record: Component) -> tuple[int, int]:
        """Return which row of its sublayer a record is, and at which source position; :meth:`record` undoes it."""
        if isinstance(record, AttentionNeuron):
            return record.head * self.per_head + record.dim, record.position
        if isinstance(record, HeadPosition):
            return record.head * self.per_head + record.position, 0
        if isinstance(record, Head):
            return record.head, 0
        return (record.index, 0) if isinstance(record, FFNNeuron) else (0, 0)

    @cached_property
    def _index_of(self) -> dict[tuple[int, SublayerKind], int]:
        """The index of each sublayer, by layer and kind."""
        return {(each.layer, each.kind): sublayer_index for sublayer_index, each in enumerate(self.sublayers)}

    def written(self, sublayer_index: int, rows: Tensor) -> Tensor:
        """Return vectors as they are written for a coefficient and a post-norm scale of 1, float64, (rows, width)."""
        post_weight = self.post_weights[sublayer_index]
        vectors = self.vectors[sublayer_index][rows].double()
        return vectors if post_weight is None else vectors * post_weight.double()

    def every(self, sublayer_index: int) -> Tensor:
        """Return all vectors of a sublayer as :meth:`written` does."""
        vectors = self.vectors[sublayer_index]
        return self.written(sublayer_index, torch.arange(len(vectors), device=vectors.device))

    @cached_property
    def _levels(self) -> Levels:
        """Logits of every vector at some ranks, which are the same for all prompts and answers."""

        def make(sublayer_index: int, rows: Tensor) -> Tensor:
            return levels_of(self.written(sublayer_index, rows).to(self.scan_dtype), self.readout)

        kinds = [each.kind for each in self.sublayers]
        found = kept_levels(kinds, self.vectors, self.post_weights, self.readout, make)
        return Levels(ranks_of(self.readout), torch.cat(found))

    @cached_property
    def _reach(self) -> Tensor:
        """How far rounding of logits in ``scan_dtype`` can move the difference of two, (rows of all sublayers,).

        A sum of n terms errs by about sqrt(n) eps times their sizes, as in the margin of the first-order bound; by
        Cauchy-Schwarz these are at most |v| times the largest readout. The factor is 4, as there, for each of the two.
        """
        width, eps = self.readout.unembedding.shape[1], torch.finfo(self.scan_dtype).eps
        reach: Tensor = 8 * width**0.5 * eps * self.largest_readout * self.norms
        return reach

    def know_ranks_of(self, answers: Sequence[int]) -> None:
        """Bracket the ranks of some answers in every vector, in one product; those of others are forgotten."""
        missing = [answer for answer in dict.fromkeys(answers) if answer not in self._brackets]
        if missing:
            directions = direction_of(self.readout, torch.tensor(missing, device=self.offsets.device)).T
            own = []
            for vectors, post_weight in zip(self.vectors, self.post_weights, strict=True):
                seen = directions if post_weight is None else directions * post_weight.double()[:, None]
                own.append(vectors.to(self.scan_dtype) @ seen.to(self.scan_dtype))
            kept = {answer: self._brackets[answer] for answer in answers if answer in self._brackets}
            for answer, logits in zip(missing, torch.cat(own).unbind(1), strict=True):
                least, largest = bracketed(self._levels, logits, self._reach)
                # A vector that is zero has the answer first, with all others.
                kept[answer] = least, largest.where(self.norms > 0, least)
            self._brackets = kept
            self._counts = {answer: counts for answer, counts in self._counts.items() if answer in kept}

    def rank_brackets(self, answer: int) -> tuple[Tensor, Tensor]:
        """Return the least and the largest rank that the answer can have in bs(v), (rows of all sublayers,) each."""
        if answer not in self._brackets:
            self.know_ranks_of([answer])
        return self._brackets[answer]

    def reciprocal_rank_bounds(self, answer: int) -> Tensor:
        """Return what 1 / rank of the answer in bs(v) cannot exceed, float64, (rows of all sublayers,)."""
        return 1 / self.rank_brackets(answer)[0].double()

    def reciprocal_rank_floors(self, answer: int) -> Tensor:
        """Return what 1 / rank of the answer in bs(v) cannot be below, float64, (rows of all sublayers,)."""
        return 1 / self.rank_brackets(answer)[1].double()

    def reciprocal_ranks(self, sublayer_index: Tensor, row: Tensor, answer: int) -> Tensor:
        """Return 1 / rank of the answer in bs(v), (n,).

        The rank counts from 1, in descending order; tokens equal to the answer do not push it down. The frozen
        scale does not change it.
        """
        if self.keeps_logits:
            known = self._ranks.get(answer)
            if known is None:
                # A search asks for a few vectors; what needs most of them is asked again for other prompts.
                if len(row) < sum(self.sizes) // _FEW_OF_ALL:
                    return _reciprocal_ranks(self.unscaled_logits(sublayer_index, row), answer)
                known = self._ranks[answer] = _reciprocal_ranks(self._kept_logits, answer)
            return known[self.offsets[sublayer_index] + row]
        every = self.offsets[sublayer_index] + row
        least, largest = (each[every] for each in self.rank_brackets(answer))
        # Several methods ask for the ranks of one answer.
        counts = self._counts.setdefault(answer, torch.zeros_like(self.norms, dtype=torch.int32))
        unsure = ((least < largest) & (counts[every] == 0)).nonzero()[:, 0]
        vectors = self._written(sublayer_index[unsure], row[unsure])
        ranks = counted(vectors, answer, self.readout, self.scan_dtype, self._reach[every[unsure]])
        counts[every[unsure]] = ranks.to(counts.dtype)
        return 1 / least.where(least == largest, counts[every]).double()

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the logits of every vector are projected once and kept: a large model's would not fit."""
        return self.unit in NEURON_UNITS and sum(self.sizes) * len(self.readout.unembedding) <= _KEPT_NUMBERS

    @cached_property
    def _kept_logits(self) -> Tensor:
        """bs(v) of every vector for a frozen scale of 1, float64, (rows of all sublayers, vocabulary)."""
        written = torch.cat([self.every(sublayer_index) for sublayer_index in range(len(self.vectors))])
        return before_softmax(written, torch.ones((), dtype=torch.float64, device=written.device), self.readout)

    def unscaled_logits(self, sublayer_index: Tensor, row: Tensor) -> Tensor:
        """Return bs(v) for a frozen scale of 1, float64, (n, vocabulary)."""
        if self.keeps_logits:
            return self._kept_logits[self.offsets[sublayer_index] + row]
        one = torch.ones((), dtype=torch.float64, device=row.device)
        # All sublayers in one product: the unembedding is by far the largest thing to read.
        return before_softmax(self._written(sublayer_index, row), one, self.readout)

    def written_at(self, rows: Tensor) -> Tensor:
        """Return vectors, by their places among the rows of all sublayers, as :meth:`written` does, (n, width)."""
        sublayer_index = torch.searchsorted(self.offsets, rows, right=True) - 1
        return self._written(sublayer_index, rows - self.offsets[sublayer_index])

    def _written(self, sublayer_index: Tensor, row: Tensor) -> Tensor:
        """Return vectors of several sublayers as :meth:`written` does, float64, (n, width)."""
        vectors = torch.empty(len(row), self.readout.unembedding.shape[1], dtype=torch.float64, device=row.device)
        for each in sublayer_index.unique().tolist():
            chosen = sublayer_index == each
            vectors[chosen] = self.written(each, row[chosen])
        return vectors


def largest_readout_of(anatomy: Anatomy) -> float:
    """Return :func:`attribution.engine.projection.largest_row_norm` of a model, for ``anatomy.once``."""
    return float(largest_row_norm(anatomy.readout))


def _tables(anatomy: Anatomy) -> dict[Unit, VectorTable]:
    return {unit: VectorTable.of(unit, anatomy) for unit in NEURON_UNITS}


def vector_table(model: Model, unit: Unit) -> VectorTable | None:
    """Return the vectors of a unit's neurons; ``None`` for heads and layers, whose vectors depend on the prompt."""
    return model.anatomy.once(_tables).get(unit)


def _reciprocal_ranks(logits: Tensor, answer: int) -> Tensor:
    """Return 1 / rank of the answer in each row of logits, float64, (n,); equal tokens do not push it down."""
    # Counted in 32 bits, which takes less than half of the time.
    return 1 / (1 + (logits > logits[:, answer, None]).sum(-1, dtype=torch.int32)).double()
