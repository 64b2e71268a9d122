"""Ablation: rerun the model with chosen neurons switched off, many variants in one forward pass.

With :mod:`attribution.trace` the only module that imports nnsight. The weights are never touched: an edit lives
inside one trace and ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attribution.anatomy import Anatomy, resolve
from attribution.errors import BadInputError
from attribution.records import AttentionNeuron, FFNNeuron, Neuron
from attribution.tokens import TokenBatch

if TYPE_CHECKING:
    from attribution.model import Model

__all__ = ["AblationKind", "ablation_masks", "last_logits"]


class AblationKind(str, Enum):
    """What an ablated neuron's coefficient is replaced with, at every position."""

    ZERO = "zero"
    """Zero, as in the paper: equal to setting the neuron's value vector to zero in the weights."""


def ablation_kind(kind: str) -> AblationKind:
    """Return the kind of that name.

    Raises:
        BadInputError: If there is none.
    """
    try:
        return AblationKind(kind)
    except ValueError:
        names = ", ".join(member.value for member in AblationKind)
        raise BadInputError(f"ablation kind {kind!r} is unknown; use {names}.") from None


def _check_inside(neuron: Neuron, *sizes: tuple[str, int]) -> None:
    for name, size in sizes:
        if not 0 <= getattr(neuron, name) < size:
            raise BadInputError(
                f"{neuron!r} has {name} {getattr(neuron, name)}, but the model has {size}; count from 0."
            )


def _mask(shape: tuple[int, int, int], places: list[tuple[int, int, int]]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if places:
        mask[tuple(torch.tensor(places).T)] = True
    return mask


def ablation_masks(variants: Sequence[Iterable[Neuron]], anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Return which coefficients each variant switches off.

    An attention neuron is switched off as a (layer, head, dim), at all source and query positions: its value
    vector is shared by them, so 200 ranked attention neurons may be fewer dimensions.

    Args:
        variants: One collection of neurons per row of the batch.
        anatomy: The model's anatomy.

    Returns:
        Two boolean masks, (layers, variants, ffn_neurons) and (layers, variants, heads * head_dim).

    Raises:
        BadInputError: If a neuron is of another kind or lies outside the model.
    """
    # Places are gathered first: one indexed assignment is far cheaper than one per neuron.
    ffn_places: list[tuple[int, int, int]] = []
    attention_places: list[tuple[int, int, int]] = []
    for variant, neurons in enumerate(variants):
        for neuron in neurons:
            if isinstance(neuron, FFNNeuron):
                _check_inside(neuron, ("layer", anatomy.layers), ("index", anatomy.ffn_neurons))
                ffn_places.append((neuron.layer, variant, neuron.index))
            elif isinstance(neuron, AttentionNeuron):
                _check_inside(neuron, ("layer", anatomy.layers), ("head", anatomy.heads), ("dim", anatomy.head_dim))
                attention_places.append((neuron.layer, variant, neuron.head * anatomy.head_dim + neuron.dim))
            else:
                raise BadInputError(f"{neuron!r} cannot be ablated; pass FFNNeuron or AttentionNeuron records.")
    ffn = _mask((anatomy.layers, len(variants), anatomy.ffn_neurons), ffn_places)
    attention = _mask((anatomy.layers, len(variants), anatomy.heads * anatomy.head_dim), attention_places)
    return ffn, attention


def last_logits(model: Model, batch: TokenBatch, variants: Sequence[Iterable[Neuron]] | None = None) -> Tensor:
    """Rerun a batch, each row with its own neurons set to zero, and return the logits after it.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
        variants: The neurons to switch off in each row; nothing is edited when ``None``.

    Returns:
        (batch, vocabulary), at each row's last real token.
    """
    import nnsight

    anatomy, family, network = model.anatomy, model.anatomy.family, model.network
    empty: Sequence[Iterable[Neuron]] = [()] * len(batch.last)
    ffn, attention = (mask.to(batch.ids.device) for mask in ablation_masks(variants or empty, anatomy))
    rows = torch.arange(len(batch.last), device=batch.last.device)
    logits: Tensor
    with network.trace(batch.inputs()):
        for layer, block in enumerate(anatomy.blocks(network)):
            for mask, path in ((attention[layer], family.attention_out), (ffn[layer], family.ffn_out)):
                if mask.any():
                    projection = resolve(block, path)
                    projection.input = projection.input.masked_fill(mask[:, None], 0)
        logits = nnsight.save(resolve(network, family.unembedding).output[rows, batch.last].detach())
    return logits
