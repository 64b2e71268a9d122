"""Which coefficients an ablation replaces: records of neurons, heads and layers as masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from attribution.errors import BadInputError
from attribution.models.anatomy import Anatomy
from attribution.prompts.tokens import TokenBatch
from attribution.records import AttentionNeuron, Component, FFNNeuron, Head, HeadPosition, Layer

__all__ = [
    "AblationKind",
    "Found",
    "Masks",
    "ablation_kind",
    "ablation_masks",
]


class AblationKind(str, Enum):
    """What an ablated coefficient is replaced with.

    The coefficient of an FFN neuron is m, of a dimension of a head its mixed value, both at every position; of one
    source position it is alpha * val as read by the last position.
    """

    ZERO = "zero"
    """Zero, as in the paper: equal to setting the value vector to zero in the weights."""

    MEAN = "mean"
    """Its mean over a reference set: over all real tokens of all prompts, each token once. For one source position,
    the mean of alpha * val over all source positions that the prompts' last positions read."""

    RESAMPLE = "resample"
    """What it is in another prompt, drawn from a reference set for each ablated prompt. Both are aligned at their
    last token, where the answer is read; positions before the donor's first take what it has there."""


def ablation_kind(kind: str) -> AblationKind:
    """Return the kind of that name.

    Raises:
        BadInputError: If there is none.
    """
    try:
        return AblationKind(kind)
    except ValueError:
        names = ", ".join(member.value for member in AblationKind)
        raise BadInputError(f"ablation kind {kind!r} is unknown; use one of {names}.") from None


@dataclass(frozen=True)
class Masks:
    """Which coefficients each variant replaces.

    Attributes:
        ffn: FFN neurons, at every position, (layers, variants, ffn_neurons).
        attention: Dimensions of heads, at every query and source position, (layers, variants, heads, head_dim).
        sources: Dimensions of heads at one source position, as read by the last position, (layers, variants, heads,
            head_dim, positions); none that ``attention`` replaces anyway. There are no positions if none is marked.
    """

    ffn: Tensor
    attention: Tensor
    sources: Tensor

    def distinct(self) -> Tensor:
        """Return how many coefficients each variant replaces, (variants,)."""
        masks = (self.ffn, self.attention.flatten(2), self.sources.flatten(2))
        return torch.stack([mask.sum(-1, dtype=torch.int32).sum(0) for mask in masks]).sum(0)


Found: TypeAlias = list[tuple[int, list[Any]]]
"""Variants by number, each with its records of one kind."""


def _columns(found: Found, **sizes: int) -> tuple[Tensor, ...]:
    """Return variants and the named fields of their records, each (n,), checked against what the model has.

    Raises:
        BadInputError: If a field lies outside.
    """
    records = [record for _, own in found for record in own]
    if not records:
        return torch.empty(1 + len(sizes), 0, dtype=torch.long).unbind()
    # numpy reads long lists several times faster than torch does.
    values = torch.from_numpy(np.array([list(map(attrgetter(name), records)) for name in sizes]))
    limits = torch.tensor(list(sizes.values()))[:, None]
    outside = (values < 0) | (values >= limits)
    if outside.any():
        place, row = outside.nonzero()[0].tolist()
        (name, size), record = list(sizes.items())[place], records[row]
        raise BadInputError(f"{record!r} has {name} {getattr(record, name)}, but the model has {size}; count from 0.")
    variants = np.repeat([number for number, _ in found], [len(own) for _, own in found])
    return torch.from_numpy(variants), *values


def ablation_masks(
    variants: Sequence[Collection[Component]],
    anatomy: Anatomy,
    batch: TokenBatch | None = None,
    *,
    at_source: bool = False,
) -> Masks:
    """Return which coefficients each variant replaces.

    Records of all kinds may be mixed; what several of them name counts once. By default an attention neuron is its
    (layer, head, dim), at all query and source positions: its value vector is shared by them, so 200 ranked attention
    neurons may be fewer dimensions. A head is all of its dimensions, a layer all neurons of the sublayer. Biases of
    the output projections belong to none and stay.

    Args:
        variants: One collection of records per row of the batch.
        anatomy: The model's anatomy.
        batch: The tokens; only what is ablated at one source position needs them.
        at_source: Take attention neurons at their own source position, as read by the last position, and nowhere
            else.

    Raises:
        BadInputError: If a record is of no known kind or lies outside the model or its prompt.
    """
    found: dict[type, Found] = {kind: [] for kind in (FFNNeuron, AttentionNeuron, Head, HeadPosition, Layer)}
    for number, records in enumerate(variants):
        # By kind, not record by record: pairs of millions of records would keep the garbage collector busy.
        for kind in set(map(type, records)):
            own: list[Any] = [record for record in records if type(record) is kind]
            if kind not in found:
                raise BadInputError(
                    f"{own[0]!r} cannot be ablated; pass records: {', '.join(each.__name__ for each in found)}."
                )
            found[kind].append((number, own))
    sizes = {"layer": anatomy.layers, "head": anatomy.heads}
    # Places are gathered first: one indexed assignment is far cheaper than one per record.
    ffn = torch.zeros(anatomy.layers, len(variants), anatomy.ffn_neurons, dtype=torch.bool)
    variant, layer, index = _columns(found[FFNNeuron], layer=anatomy.layers, index=anatomy.ffn_neurons)
    ffn[layer, variant, index] = True
    attention = torch.zeros(anatomy.layers, len(variants), anatomy.heads, anatomy.head_dim, dtype=torch.bool)
    variant, layer, head = _columns(found[Head], **sizes)
    attention[layer, variant, head] = True
    sublayers = {"ffn": ffn, "attention": attention}
    for _, own in found[Layer]:
        for record in own:
            if record.kind not in sublayers:
                raise BadInputError(f"{record!r} has kind {record.kind!r}; use {' or '.join(sublayers)}.")
    for sublayer, mask in sublayers.items():
        of_kind = [(number, [each for each in own if each.kind == sublayer]) for number, own in found[Layer]]
        variant, layer = _columns(of_kind, layer=anatomy.layers)
        mask[layer, variant] = True
    if not at_source:
        variant, layer, head, dim = _columns(found[AttentionNeuron], **sizes, dim=anatomy.head_dim)
        attention[layer, variant, head, dim] = True
    sources = _source_mask(found[HeadPosition], found[AttentionNeuron] if at_source else [], attention, batch)
    return Masks(ffn, attention, sources)


def _source_mask(heads: Found, dims: Found, attention: Tensor, batch: TokenBatch | None) -> Tensor:
    """Return what is replaced at one source position but nowhere else, as in :class:`Masks`."""
    if not heads and not dims:
        return attention.new_zeros(*attention.shape, 0)
    if batch is None:
        raise BadInputError(
            f"{(heads + dims)[0][1][0]!r} has no parameters of its own: all source positions share them; ablate the "
            "Head."
        )
    tokens = (batch.last + 1).tolist()
    for number, own in heads + dims:
        for record in own:
            if not 0 <= record.position < tokens[number]:
                raise BadInputError(
                    f"{record!r} has position {record.position}, but its prompt has {tokens[number]} tokens; count "
                    "from 0."
                )
    (layers, _, each_layer, head_dim), positions = attention.shape, batch.ids.shape[1]
    sources = attention.new_zeros(*attention.shape, positions)
    variant, layer, head, position = _columns(heads, layer=layers, head=each_layer, position=positions)
    sources[layer, variant, head, :, position] = True
    variant, layer, head, dim, position = _columns(
        dims, layer=layers, head=each_layer, dim=head_dim, position=positions
    )
    sources[layer, variant, head, dim, position] = True
    return sources & ~attention[..., None]
