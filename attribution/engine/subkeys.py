"""What neurons read, and which component of the residual stream it comes from: the arithmetic of the query side.

:mod:`attribution.engine.queries` gives the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from attribution.engine.trace import Activations
from attribution.models.anatomy import Anatomy, Subkeys
from attribution.models.norms import Norm, frozen_scale, normalise
from attribution.records import AttentionNeuron, FFNNeuron, Neuron, SublayerKind

__all__ = [
    "SUBKEYS",
    "Readings",
    "Shares",
    "SubkeyKind",
    "components_of",
    "ffn_subkeys",
    "folded_subkeys",
    "query_neuron_scores",
    "read_subkeys",
    "shares",
]

SubkeyKind: TypeAlias = Literal["first_order", "gate", "up", "down"]
SUBKEYS: tuple[SubkeyKind, ...] = ("first_order", "gate", "up", "down")


@dataclass(frozen=True)
class Readings:
    """How value neurons read their streams. C = 2 * layers + 2 components: embedding, A^0, F^0, ..., and the biases.

    Attributes:
        folded: k', (n, width).
        terms: <z_c, k'>, and last sigma (<beta, k> + b), (C, n); zero for components that come too late.
        counts: Number of terms that each neuron has, (n,).
        scale: sigma, (n,); 1 where no norm comes before.
    """

    folded: Tensor
    terms: Tensor
    counts: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Shares:
    """How each value neuron's pre-activation divides among its terms.

    Attributes:
        share: (C, n); columns add up to 1, or are zero where not kept.
        denominator: Sum of the terms, (n,).
        kept: Whether the denominator can be told from zero, (n,).
        amplification: Sum of |terms| over |denominator|, (n,); infinite where not kept.
    """

    share: Tensor
    denominator: Tensor
    kept: Tensor
    amplification: Tensor


def folded_subkeys(subkeys: Tensor, norm: Norm | None, *, centring: bool = True) -> Tensor:
    """Return k', with which ``<x, k'> / sigma = <norm(x) - beta, k>``.

    LayerNorm subtracts the mean of its input; the same inner product comes of subtracting the mean of the key
    instead, so that every component of the input can be left as it is.

    Args:
        subkeys: k, (n, width).
        norm: The norm before the projection, or ``None``.
        centring: Whether to subtract the mean where the norm is a LayerNorm; the published code does not.

    Returns:
        (n, width).
    """
    if norm is None:
        return subkeys
    folded = subkeys if norm.weight is None else subkeys * norm.weight.to(subkeys.dtype)
    return folded - folded.mean(-1, keepdim=True) if norm.centred and centring else folded


def ffn_subkeys(
    subkeys: Subkeys, subvalues: Tensor, rows: Tensor, normed: Tensor, kind: SubkeyKind
) -> tuple[Tensor, Tensor]:
    """Return the subkeys of FFN neurons and the bias that goes with each.

    A gated neuron, ``m = act(g) u``, reads two rows. To first order in its input it follows

        k = act(g) up + u act'(g) gate,    bias = act(g) b_up + u act'(g) b_gate

    with g and u as they are at this position, so ``<norm(x), k> + bias = act(g) u + u act'(g) g``. A plain neuron's
    first-order subkey, ``act'(g) up``, has the same shares as its row, which is what is returned.

    Args:
        subkeys: The layer's projections.
        subvalues: Its value vectors, (ffn_neurons, width).
        rows: Indices of the neurons, (n,).
        normed: What the FFN reads, (width,), float64.
        kind: ``"first_order"``; ``"gate"`` or ``"up"``, that row alone; or ``"down"``, the subvalue, which is what
            the notebook published for Llama takes for the subkey by mistake.

    Returns:
        (n, width) and (n,), float64.
    """

    def of(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return weight[rows].double(), normed.new_zeros(len(rows)) if bias is None else bias[rows].double()

    if kind == "down":
        return of(subvalues, None)
    up, up_bias = of(subkeys.up, subkeys.up_bias)
    if kind == "up" or subkeys.gate is None:
        return up, up_bias
    gate, gate_bias = of(subkeys.gate, subkeys.gate_bias)
    if kind == "gate":
        return gate, gate_bias
    # Callers may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        g = (gate @ normed + gate_bias).clone().requires_grad_()
        activated = subkeys.activation(g)
        # The activation works on each entry by itself, so that the gradient of the sum holds every slope.
        (slope,) = torch.autograd.grad(activated.sum(), g)
    of_up, of_gate = activated.detach(), slope * (up @ normed + up_bias)
    return of_up[:, None] * up + of_gate[:, None] * gate, of_up * up_bias + of_gate * gate_bias


def components_of(activations: Activations, prompt: int, length: int) -> Tensor:
    """Return what the residual stream of one prompt is the sum of: embedding, A^0, F^0, A^1, ...

    Args:
        activations: Read with ``positions="all"``.
        prompt: Row of the batch.
        length: Number of real tokens of that row.

    Returns:
        (2 * layers + 1, length, width), float64.
    """
    embedding = activations.resid_pre[0, prompt, :length]
    sublayers = torch.stack([activations.attention_output[:, prompt], activations.ffn_output[:, prompt]], dim=1)
    return torch.cat([embedding[None], sublayers[:, :, :length].flatten(0, 1)]).double()


def _by_layer(neurons: Sequence[Neuron]) -> dict[tuple[SublayerKind, int], list[int]]:
    """Return the numbers of the neurons of each sublayer."""
    groups: dict[tuple[SublayerKind, int], list[int]] = {}
    for number, neuron in enumerate(neurons):
        groups.setdefault(("ffn" if isinstance(neuron, FFNNeuron) else "attention", neuron.layer), []).append(number)
    return groups


def read_subkeys(
    anatomy: Anatomy,
    components: Tensor,
    neurons: Sequence[Neuron],
    *,
    subkey: SubkeyKind = "first_order",
    centring: bool = True,
    biases: bool = True,
) -> Readings:
    """Return how each neuron's pre-activation comes of the components of the stream that it reads.

    An FFN neuron of layer l reads the last position: the components before layer l, and A^l unless the block is
    parallel. An attention neuron reads its source position: the components before layer l. Heads that share a
    key/value head share subkeys.

    Args:
        anatomy: The model's anatomy.
        components: (2 * layers + 1, length, width), float64, of one prompt.
        neurons: FFN and attention neurons inside the model and the prompt.
        subkey: The subkey of FFN neurons.
        centring: Whether to include LayerNorm's centring.
        biases: Whether to include the biases of norms and projections.
    """
    indices, length, width = components.shape
    folded = components.new_zeros(len(neurons), width)
    terms = components.new_zeros(indices + 1, len(neurons))
    counts = components.new_zeros(len(neurons))
    scale = components.new_ones(len(neurons))

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, device=components.device)

    for (sublayer, layer), group in _by_layer(neurons).items():
        numbers = whole(group)
        if sublayer == "ffn":
            norm, reach = anatomy.sublayer(layer, "ffn").input_norm, 2 * layer + (1 if anatomy.parallel else 2)
            positions = torch.full_like(numbers, length - 1)
            rows = whole([cast(FFNNeuron, neurons[number]).index for number in group])
            normed = normalise(components[:reach, -1].sum(0), norm)
            keys, bias = ffn_subkeys(
                anatomy.subkeys[layer], anatomy.sublayer(layer, "ffn").vectors, rows, normed, subkey
            )
        else:
            norm, reach = anatomy.sublayer(layer, "attention").input_norm, 2 * layer + 1
            readers = [cast(AttentionNeuron, neurons[number]) for number in group]
            positions = whole([neuron.position for neuron in readers])
            rows = whole([neuron.head * anatomy.head_dim + neuron.dim for neuron in readers])
            weight, values_bias = anatomy.value_subkeys(layer)
            keys = weight[rows].double()
            bias = keys.new_zeros(len(rows)) if values_bias is None else values_bias[rows].double()
        if norm is not None and norm.bias is not None:
            bias = bias + keys @ norm.bias.double()
        folded[numbers] = keys = folded_subkeys(keys, norm, centring=centring)
        counts[numbers] = reach + float(biases)
        for position in positions.unique().tolist():
            here = positions == position
            read = components[:reach, position]
            terms[:reach, numbers[here]] = read @ keys[here].T
            if norm is not None:
                scale[numbers[here]] = frozen_scale(read.sum(0), norm)
        if biases:
            terms[-1, numbers] = scale[numbers] * bias
    return Readings(folded, terms, counts, scale)


def shares(terms: Tensor, counts: Tensor, eps: float) -> Shares:
    """Return each term's share of the sum of its column.

    A sum of C terms in a precision of eps errs by at most ``C * eps * sum |terms|``. A sum no larger than that may be
    zero, or of the other sign: its shares are undefined. Any larger one counts, however large its shares. Terms are
    taken to be as precise as the components that they come from; that a term nearly cancels by itself is not seen.

    Args:
        terms: (C, n); zero where a column has fewer terms.
        counts: Number of terms of each column, (n,).
        eps: Machine epsilon of the dtype that the terms come from.
    """
    denominator, size = terms.sum(0), terms.abs().sum(0)
    kept = denominator.abs() > counts * eps * size
    safe = torch.where(kept, denominator, 1.0)
    return Shares(
        share=torch.where(kept, terms / safe, 0.0),
        denominator=denominator,
        kept=kept,
        amplification=torch.where(kept, size / safe.abs(), inf),
    )


def query_neuron_scores(
    anatomy: Anatomy,
    coefficients: Tensor,
    post_scales: Tensor,
    *,
    folded: Tensor,
    weights: Tensor,
    layers: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Return the query score of every FFN neuron below the attention value neurons.

    Neuron k of layer i writes ``z = m^i_{p,k} * post_scale * post_weight * v^i_k`` at position p, so

        Q(i, k) = sum_{n above i} weight_n <z at p_n, k'_n>

    Value neurons that read the same position share their inner products with the subvalues: one matrix product per
    layer, with as many columns as there are positions.

    Args:
        anatomy: The model's anatomy.
        coefficients: m at every position of one prompt, (layers, length, ffn_neurons).
        post_scales: Scale of the norm after the FFN, (layers, length).
        folded: k' of the attention value neurons, (n, width), float64.
        weights: S_n over the denominator, (n,), float64.
        layers: Layer of each value neuron.
        positions: Its source position.

    Returns:
        (layers below the highest value neuron, ffn_neurons), float64; in the unit of S_n.
    """
    highest = max(layers, default=0)
    scores = folded.new_zeros(highest, anatomy.ffn_neurons)
    above = torch.tensor(layers, device=folded.device)
    # Row n picks the position that value neuron n reads, with its weight.
    indices = torch.tensor(positions, dtype=torch.long, device=folded.device)
    reads = torch.nn.functional.one_hot(indices, coefficients.shape[1]) * weights[:, None]
    for layer in range(highest):
        keys = reads[above > layer].T @ folded[above > layer]
        post_weight = anatomy.sublayer(layer, "ffn").post_weight
        if post_weight is not None:
            keys = keys * post_weight.double()
        written = coefficients[layer].double() * post_scales[layer, :, None].double()
        scores[layer] = (written * (keys @ anatomy.sublayer(layer, "ffn").vectors.double().T)).sum(0)
    return scores
