"""The vectors that neurons, heads and layers write, and what of them does not depend on the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from attribution.engine.projection import before_softmax, largest_row_norm
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

__all__ = ["VectorTable", "slots_of", "vector_table"]

# Projected vectors are kept up to this many float64 numbers per table: 128 MiB.
_KEPT_NUMBERS = 2**24

# Ranks in so small a part of the vectors are not kept.
_FEW_OF_ALL = 8

# How many of the tokens that a vector raises most are remembered.
_LEADING = 64


def slots_of(unit: Unit, anatomy: Anatomy) -> tuple[Layer, ...]:
    """Return the sublayers that hold a unit, in forward order."""
    return tuple(Layer(layer, kind) for layer in range(anatomy.layers) for kind in SUBLAYERS[unit])


class VectorTable:
    """The vectors that the candidates of one unit write, and what of them does not depend on the prompt.

    A slot is a sublayer whose vectors are candidates; slots come in forward order. The table remembers what it has
    computed: norms, bounds, ranks by answer, and records, for prompts rank the same neurons again and again.

    Args:
        unit: The unit.
        sublayers: The sublayer of each slot.
        vectors: Per slot, subvalues or attention output vectors, (rows, width), in the model's dtype.
        post_weights: Per slot, what a vector is multiplied by elementwise on its way to the residual stream, (width,),
            or ``None`` for ones.
        readout: Final norm and unembedding.
        per_head: Rows per head in attention slots: dimensions, source positions, or 1.
    """

    def __init__(
        self,
        unit: Unit,
        sublayers: tuple[Layer, ...],
        vectors: Sequence[Tensor],
        post_weights: tuple[Tensor | None, ...],
        readout: Readout,
        per_head: int,
    ) -> None:
        self.unit = unit
        self.sublayers = sublayers
        self.vectors = vectors
        self.post_weights = post_weights
        self.readout = readout
        self.per_head = per_head
        self._records: dict[tuple[int, int, int], Component] = {}
        self._ranks: dict[int, Tensor] = {}
        self._places: dict[int, tuple[Tensor, ...]] = {}

    @classmethod
    def of(cls, unit: Unit, anatomy: Anatomy) -> VectorTable:
        """Return the table of a model's neurons: of one sublayer per block, or of both for ``"neuron"``."""
        sublayers = slots_of(unit, anatomy)
        own = [anatomy.sublayer(each.layer, each.kind) for each in sublayers]
        chosen = ByLayer(lambda slot: own[slot].vectors, len(sublayers))
        return cls(
            unit,
            sublayers,
            chosen if anatomy.spread else tuple(chosen),
            tuple(each.post_weight for each in own),
            anatomy.readout,
            anatomy.head_dim,
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each slot."""
        return [len(vectors) for vectors in self.vectors]

    @cached_property
    def offsets(self) -> Tensor:
        """Place of each slot's first row among all rows, (slots,)."""
        return torch.tensor([0, *self.sizes]).cumsum(0)[:-1].to(self.readout.unembedding.device)

    @cached_property
    def norms(self) -> Tensor:
        """|v|, the L2 norm of each vector as it is written, float64, (rows of all slots,)."""
        pieces = []
        for slot, vectors in enumerate(self.vectors):
            rows = torch.arange(len(vectors), device=vectors.device)
            pieces.append(self.written(slot, rows).norm(dim=-1))
        return torch.cat(pieces)

    @cached_property
    def largest_readout(self) -> float:
        """The largest |gamma * W_t| over tokens t: no bs(v)_t exceeds |v| times this over the scale."""
        return float(largest_row_norm(self.readout))

    @cached_property
    def scan_dtype(self) -> torch.dtype:
        """What bounds are computed in: float32, unless the weights are float64."""
        return torch.promote_types(torch.float32, self.readout.unembedding.dtype)

    def places(self, positions: int) -> tuple[Tensor, ...]:
        """Return index, slot, row and position, each (n,), of every candidate.

        They are in the order in which ties fall: by slot, row, and, for attention neurons, source position.

        Args:
            positions: Number of source positions of an attention neuron; 1 for other units.
        """
        if positions not in self._places:
            parts = []
            for slot, size in enumerate(self.sizes):
                depth = positions if self.sublayers[slot].kind == "attention" else 1
                row, position = torch.unravel_index(torch.arange(size * depth), (size, depth))
                parts.append((torch.full_like(row, slot), row, position))
            slots, rows, sources = (torch.cat(each) for each in zip(*parts, strict=True))
            device = self.readout.unembedding.device
            places = (torch.arange(len(rows)), slots, rows, sources)
            self._places[positions] = tuple(each.to(device) for each in places)
        return self._places[positions]

    def record(self, slot: int, row: int, position: int) -> Component:
        """Return the record of a candidate: looking one up takes a fifth of making it again."""
        place = slot, row, position
        if place not in self._records:
            self._records[place] = self._make_record(*place)
        return self._records[place]

    def _make_record(self, slot: int, row: int, position: int) -> Component:
        sublayer, (head, dim) = self.sublayers[slot], divmod(row, self.per_head)
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
        """Return the index of a record among the candidates of :meth:`places`; ``None`` if it is not one of them."""
        kind = record.kind if isinstance(record, Layer) else "ffn" if isinstance(record, FFNNeuron) else "attention"
        slot = self._slots.get((record.layer, kind))
        if slot is None:
            return None
        depths = [positions if each.kind == "attention" else 1 for each in self.sublayers]
        row, position = self._row_and_position(record)
        inside = 0 <= row < self.sizes[slot] and 0 <= position < depths[slot]
        # A dimension beyond its head, or a record of another unit, comes back as something else.
        if not inside or self.record(slot, row, position) != record:
            return None
        before = sum(size * depth for size, depth in zip(self.sizes[:slot], depths, strict=False))
        return before + row * depths[slot] + position

    def _row_and_position(self, record: Component) -> tuple[int, int]:
        """Return which row of its slot a record is, and at which source position: what :meth:`record` is made of."""
        if isinstance(record, AttentionNeuron):
            return record.head * self.per_head + record.dim, record.position
        if isinstance(record, HeadPosition):
            return record.head * self.per_head + record.position, 0
        if isinstance(record, Head):
            return record.head, 0
        return (record.index, 0) if isinstance(record, FFNNeuron) else (0, 0)

    @cached_property
    def _slots(self) -> dict[tuple[int, SublayerKind], int]:
        """The slot of each sublayer, by layer and kind."""
        return {(each.layer, each.kind): slot for slot, each in enumerate(self.sublayers)}

    def written(self, slot: int, rows: Tensor) -> Tensor:
        """Return vectors as they are written for a coefficient and a gain of 1, float64, (rows, width)."""
        post_weight = self.post_weights[slot]
        vectors = self.vectors[slot][rows].double()
        return vectors if post_weight is None else vectors * post_weight.double()

    @cached_property
    def _leading_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the tokens that each vector raises most, and for each and for all others a bound on 1 / rank.

        Read off float32 logits once for all prompts and answers. Only tokens ahead by more than rounding count as
        ahead, so that no rank is smaller than its bound says.

        Returns:
            Tokens, (rows of all slots, M), and bounds, (rows of all slots, M + 1), the last for tokens not listed.
        """
        unembedding, dtype = self.readout.unembedding, self.scan_dtype
        one = torch.ones((), dtype=dtype, device=unembedding.device)
        number = min(_LEADING, len(unembedding))
        rounding = 4 * unembedding.shape[1] ** 0.5 * torch.finfo(dtype).eps * self.largest_readout
        tokens, bounds = [], []
        for slot, vectors in enumerate(self.vectors):
            for rows in torch.arange(len(vectors), device=vectors.device).split(
                _KEPT_NUMBERS // 4 // len(unembedding) + 1
            ):
                written = self.written(slot, rows)
                largest, token = before_softmax(written.to(dtype), one, self.readout).topk(number)
                # What is listed j-th is ahead of nobody's bound unless it leads by more than both can be off.
                reach = largest.double() + rounding * written.norm(dim=-1, keepdim=True)
                ahead = torch.searchsorted(-largest.double(), -reach)
                tokens.append(token.int())
                bounds.append(1 / (1 + torch.cat([ahead, ahead[:, -1:]], dim=-1)).double())
        return torch.cat(tokens), torch.cat(bounds)

    def reciprocal_rank_bounds(self, answer: int) -> Tensor:
        """Return what 1 / rank of the answer in bs(v) cannot exceed, (rows of all slots,)."""
        tokens, bounds = self._leading_tokens
        listed = tokens == answer
        place = torch.where(listed.any(-1), listed.int().argmax(-1), tokens.shape[1])
        return bounds.gather(1, place[:, None])[:, 0]

    def reciprocal_ranks(self, slot: Tensor, row: Tensor, answer: int) -> Tensor:
        """Return 1 / rank of the answer in bs(v), (n,).

        The rank counts from 1, in descending order; tokens equal to the answer do not push it down. The frozen
        scale does not change it.
        """
        known = self._ranks.get(answer)
        if known is None:
            # A search asks for a few vectors; what needs most of them is asked again for other prompts of the answer.
            if not self.keeps_logits or len(row) < sum(self.sizes) // _FEW_OF_ALL:
                return _reciprocal_ranks(self.unscaled_logits(slot, row), answer)
            known = self._ranks[answer] = _reciprocal_ranks(self._kept_logits, answer)
        return known[self.offsets[slot] + row]

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the logits of every vector are projected once and kept: a large model's would not fit."""
        return self.unit in NEURON_UNITS and sum(self.sizes) * len(self.readout.unembedding) <= _KEPT_NUMBERS

    @cached_property
    def _kept_logits(self) -> Tensor:
        """bs(v) of every vector for a frozen scale of 1, float64, (rows of all slots, vocabulary)."""
        rows = [torch.arange(len(vectors), device=vectors.device) for vectors in self.vectors]
        written = torch.cat([self.written(slot, every) for slot, every in enumerate(rows)])
        return before_softmax(written, torch.ones((), dtype=torch.float64, device=written.device), self.readout)

    def unscaled_logits(self, slot: Tensor, row: Tensor) -> Tensor:
        """Return bs(v) for a frozen scale of 1, float64, (n, vocabulary)."""
        if self.keeps_logits:
            return self._kept_logits[self.offsets[slot] + row]
        one = torch.ones((), dtype=torch.float64, device=row.device)
        # All slots in one product: the unembedding is by far the largest thing to read.
        vectors = torch.empty(len(row), self.readout.unembedding.shape[1], dtype=torch.float64, device=row.device)
        for each in slot.unique().tolist():
            chosen = slot == each
            vectors[chosen] = self.written(each, row[chosen])
        return before_softmax(vectors, one, self.readout)


def _tables(anatomy: Anatomy) -> dict[Unit, VectorTable]:
    return {unit: VectorTable.of(unit, anatomy) for unit in NEURON_UNITS}


def vector_table(model: Model, unit: Unit) -> VectorTable | None:
    """Return the vectors of a unit's neurons; ``None`` for heads and layers, whose vectors depend on the prompt."""
    return model.anatomy.once(_tables).get(unit)


def _reciprocal_ranks(logits: Tensor, answer: int) -> Tensor:
    """Return 1 / rank of the answer in each row of logits, float64, (n,); equal tokens do not push it down."""
    # Counted in 32 bits, which takes less than half of the time.
    return 1 / (1 + (logits > logits[:, answer, None]).sum(-1, dtype=torch.int32)).double()
