"""Ablation: rerun the model with chosen components replaced, many variants in one forward pass, or edit its weights.

Two mechanisms, equal where METHOD says so. An edit of activations lives inside one trace and ends with it; the weights
are never touched. An edit of parameters is made on a copy that shares every other tensor and is undone with its block.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from attribution.anatomy import Anatomy, read_anatomy, resolve
from attribution.errors import BadInputError
from attribution.model import Model
from attribution.questions import by_batch
from attribution.records import AttentionNeuron, Component, FFNNeuron, Head, HeadPosition, Layer
from attribution.tokens import TokenBatch, chunk_by_length, pad
from attribution.trace import Edits, Filler, PlainRun, on_site, rerun, run, wrap

__all__ = [
    "AblationKind",
    "Donors",
    "Masks",
    "Means",
    "Reference",
    "ablated_logits",
    "ablation_kind",
    "ablation_masks",
    "edited_copy",
    "reference_of",
    "zeroed_parameters",
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


@dataclass(frozen=True)
class Means:
    """Mean coefficients over a reference set, float64.

    Attributes:
        coefficients: m of FFN neurons, (layers, ffn_neurons).
        mixed_values: Mixed values, (layers, heads * head_dim).
        sources: alpha * val of a source position as read by the last position, (layers, heads, head_dim).
    """

    coefficients: Tensor
    mixed_values: Tensor
    sources: Tensor


@dataclass(frozen=True)
class Donors:
    """Prompts that ablated ones take their coefficients from.

    Attributes:
        prompts: Distinct prompts, as token ids.
        seed: Seed of the draws.
    """

    prompts: tuple[tuple[int, ...], ...]
    seed: int

    def donor_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the prompt that one takes its coefficients from: any other one, drawn by its tokens and the seed.

        Raises:
            BadInputError: If there is no other.
        """
        # Seeded by the prompt, so that its donor does not depend on its place in a batch. Of two distinct prompts one
        # at least is another.
        drawn = random.Random(f"{self.seed} {ids}").sample(self.prompts, min(2, len(self.prompts)))
        for prompt in drawn:
            if prompt != ids:
                return prompt
        raise BadInputError(
            f"kind 'resample' found {len(self.prompts)} reference prompts and none that differs from the ablated one; "
            "add others to the reference."
        )


Reference: TypeAlias = Means | Donors
"""What ablated coefficients are replaced with, other than zero."""


def reference_of(
    model: Model,
    kind: str,
    prompts: Sequence[Sequence[int]] | None,
    *,
    ablated: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> Reference | None:
    """Prepare what a kind of ablation takes its values from.

    Args:
        model: A loaded model.
        kind: An ablation kind.
        prompts: Reference prompts, as token ids. One that is listed twice counts twice in the means, and once among
            donors.
        ablated: Prompts that will be ablated, to complain early of one that no other could be the donor of.
        seed: Seed for ``"resample"``.

    Returns:
        ``None`` for ``"zero"``.

    Raises:
        BadInputError: If the kind is unknown, has a reference that it does not take, lacks one, or a prompt lacks a
            donor.
    """
    chosen = ablation_kind(kind)
    if chosen is AblationKind.ZERO:
        if prompts is not None:
            raise BadInputError(
                f"kind 'zero' takes nothing from a reference, but one of {len(prompts)} prompts was given; leave it "
                "out, or use kind 'mean' or 'resample'."
            )
        return None
    if not prompts:
        raise BadInputError(
            f"kind {chosen.value!r} takes its values from reference prompts, but none were given; pass reference=[...] "
            "or use kind 'zero'."
        )
    if chosen is AblationKind.MEAN:
        return _means(model, prompts)
    donors = Donors(tuple(dict.fromkeys(tuple(prompt) for prompt in prompts)), seed)
    for ids in ablated:
        donors.donor_of(tuple(ids))
    return donors


def _means(model: Model, prompts: Sequence[Sequence[int]]) -> Means:
    totals: dict[str, Tensor] = {}

    def sums(rows: list[int]) -> dict[str, Tensor]:
        return on_site(model, _sums, [prompts[row] for row in rows])

    for _, found in by_batch(model, [len(prompt) for prompt in prompts], sums):
        for name, total in found.items():
            totals[name] = totals[name] + total if name in totals else total
    # A last position reads as many source positions as its prompt has tokens, so one number divides all three.
    tokens = sum(len(prompt) for prompt in prompts)
    return Means(**{name: total / tokens for name, total in totals.items()})


def _sums(model: Model, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the sums over one batch that the fields of :class:`Means` are made of."""
    batch = pad(prompts, device=model.device)
    anatomy, family = model.anatomy, model.anatomy.family
    real, rows = batch.mask.bool(), torch.arange(len(batch.last), device=batch.last.device)

    def visit(network: Any, saved: dict[str, Any]) -> None:
        sums: dict[str, list[Tensor]] = {"coefficients": [], "mixed_values": [], "sources": []}
        for block in anatomy.blocks(network):
            mixed = resolve(block, family.attention_out).input.detach().reshape(*batch.ids.shape, -1).to(model.device)
            sums["mixed_values"].append(mixed[real].sum(0, dtype=torch.float64))
            # What a head takes of all source positions together is its mixed value.
            taken = mixed[rows, batch.last].sum(0, dtype=torch.float64)
            sums["sources"].append(taken.unflatten(-1, (anatomy.heads, anatomy.head_dim)))
            coefficients = resolve(block, family.ffn_out).input.detach().reshape(*batch.ids.shape, -1).to(model.device)
            sums["coefficients"].append(coefficients[real].sum(0, dtype=torch.float64))
        saved.update({name: torch.stack(layers) for name, layers in sums.items()})

    return run(model, batch, visit, whole=False)


def _edits(
    masks: Masks,
    device: torch.device,
    *,
    coefficients: Sequence[Filler],
    mixed_values: Sequence[Filler],
    sources: Sequence[Filler],
) -> Edits:
    """Return the edits that put each layer's filler where the masks say."""

    def by_layer(mask: Tensor, fillers: Sequence[Filler]) -> dict[int, tuple[Tensor, Filler]]:
        mask = mask.to(device)
        return {layer: (mask[layer], filler) for layer, filler in enumerate(fillers) if mask[layer].any()}

    return Edits(
        coefficients=by_layer(masks.ffn[:, :, None], coefficients),
        mixed_values=by_layer(masks.attention.flatten(-2)[:, :, None], mixed_values),
        sources=by_layer(masks.sources, sources),
    )


def ablated_logits(
    model: Model,
    batch: TokenBatch,
    variants: Sequence[Collection[Component]],
    *,
    reference: Reference | None = None,
    at_source: bool = False,
    plain: tuple[PlainRun, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rerun a batch, each row with its own components replaced.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
        variants: What to replace in each row.
        reference: What with; zero when ``None``.
        at_source: See :func:`ablation_masks`.
        plain: See :func:`attribution.trace.rerun`; of no use to donors, which run along.

    Returns:
        Logits at each row's last real token, (batch, vocabulary), and how many distinct coefficients were replaced in
        each row, (batch,).

    Raises:
        BadInputError: If a record cannot be ablated, or a row has no donor.
    """
    if isinstance(reference, Donors):
        return _resampled_logits(model, batch, variants, reference, at_source)
    masks = ablation_masks(variants, model.anatomy, batch, at_source=at_source)
    if reference is None:
        zeros: list[Filler] = [torch.zeros((), device=model.device)] * model.anatomy.layers
        edits = _edits(masks, model.device, coefficients=zeros, mixed_values=zeros, sources=zeros)
    else:
        edits = _edits(
            masks,
            model.device,
            coefficients=list(reference.coefficients.to(model.device)),
            mixed_values=list(reference.mixed_values.to(model.device)),
            sources=list(reference.sources[..., None].to(model.device)),
        )
    return rerun(model, batch, edits, plain=plain), masks.distinct()


def _resampled_logits(
    model: Model, batch: TokenBatch, variants: Sequence[Collection[Component]], donors: Donors, at_source: bool
) -> tuple[Tensor, Tensor]:
    """Rerun a batch with its donors in the same forward pass, so that none of their activations has to be kept."""
    rows = [tuple(ids[: last + 1]) for ids, last in zip(batch.ids.tolist(), batch.last.tolist(), strict=True)]
    # A row without edits needs no donor.
    chosen = [donors.donor_of(row) if variant else row for row, variant in zip(rows, variants, strict=True)]
    weights = model.anatomy.readout.unembedding
    logits = weights.new_empty(len(rows), model.anatomy.vocabulary)
    distinct = torch.zeros(len(rows), dtype=torch.long)
    lengths = [max(len(row), len(donor)) for row, donor in zip(rows, chosen, strict=True)]
    # A donor may be much longer than the batch that was planned.
    for part in chunk_by_length(lengths, model.batch_tokens):
        extra = list(dict.fromkeys(chosen[row] for row in part if chosen[row] != rows[row]))
        places = {donor: place for place, donor in enumerate(extra, start=len(part))}
        giver = [places.get(chosen[row], place) for place, row in enumerate(part)] + list(places.values())
        joined = pad([*(rows[row] for row in part), *extra], device=model.device)
        masks = ablation_masks(
            [*(variants[row] for row in part), *([] for _ in extra)], model.anatomy, joined, at_source=at_source
        )
        take = partial(_aligned, giver=torch.tensor(giver, device=model.device), last=joined.last)
        everywhere: list[Filler] = [partial(take, axis=1)] * model.anatomy.layers
        sources: list[Filler] = [partial(take, axis=-1)] * model.anatomy.layers
        edits = _edits(masks, model.device, coefficients=everywhere, mixed_values=everywhere, sources=sources)
        logits[part] = rerun(model, joined, edits)[: len(part)]
        distinct[part] = masks.distinct()[: len(part)]
    return logits, distinct


def _aligned(tensor: Tensor, giver: Tensor, last: Tensor, *, axis: int) -> Tensor:
    """Return for each row what its giver has, aligned at the last real token.

    Args:
        tensor: (batch, ...).
        giver: Row that each row takes from, (batch,).
        last: Position of each row's last real token, (batch,).
        axis: The axis of positions.
    """
    by_position = tensor.movedim(axis, 1)
    positions = torch.arange(by_position.shape[1], device=tensor.device) + (last[giver] - last)[:, None]
    # Behind a row's last token stands padding, which may lie beyond the giver's.
    return by_position[giver[:, None], positions.clamp(0, by_position.shape[1] - 1)].movedim(1, axis)


@contextmanager
def edited_copy(model: Model, edited: Collection[Tensor]) -> Iterator[Model]:
    """Give a copy of a model whose named weights are its own, to be edited through the views that its anatomy holds.

    The copy shares every other tensor with the original, which is not touched. On leaving the block, also by an
    exception, the copy's weights are the original's again, so that no reference to it carries an edit on.

    Args:
        model: A loaded model.
        edited: What is to be edited, as the model's anatomy has it: weights, or views of them.

    Yields:
        The copy, with its own network and anatomy.

    Raises:
        BadInputError: If the weights are not here, whole and on one device.
    """
    if model.remote or model.anatomy.spread:
        raise BadInputError(
            f"the weights of model {model.name!r} are to be edited, and they are elsewhere or spread over devices or "
            "processes; load it here on one device."
        )
    module = model.network._module
    stored = {tensor.untyped_storage().data_ptr() for tensor in edited}
    # What the memo names is not copied.
    shared = {
        id(tensor): tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.untyped_storage().data_ptr() not in stored
    }
    twin = copy.deepcopy(module, shared)
    other = replace(model, network=wrap(twin, model.tokenizer), anatomy=read_anatomy(twin, model.name))
    try:
        yield other
    finally:
        for own, original in zip(twin.parameters(), module.parameters(), strict=True):
            if own is not original:
                own.detach().copy_(original)
        # What the model computed from the edited weights and kept goes with them.
        for kept in vars(other).keys() - {each.name for each in fields(other)}:
            del vars(other)[kept]


@contextmanager
def zeroed_parameters(model: Model, neurons: Collection[Component]) -> Iterator[Model]:
    """Give a model whose value vectors are zero for some components: the paper's way of switching them off.

    The vectors are rows of the down projection and of the attention's output projection; biases stay. The model is a
    copy, see :func:`edited_copy`.

    Args:
        model: A loaded model.
        neurons: What to switch off. An attention neuron is its (layer, head, dim); what is ablated at one source
            position has no parameters of its own.

    Yields:
        The edited model, with its own network and anatomy.

    Raises:
        BadInputError: If a record cannot be ablated by parameters.
    """
    anatomy = model.anatomy
    masks = ablation_masks([neurons], anatomy)
    chosen = [
        (sublayer, layer, mask[layer, 0].flatten())
        for sublayer, mask in (("attention", masks.attention), ("ffn", masks.ffn))
        for layer in range(anatomy.layers)
        if mask[layer].any()
    ]

    def vectors(of: Anatomy, sublayer: str, layer: int) -> Tensor:
        """The value vectors of a sublayer: a view of its weight."""
        return (of.value_vectors if sublayer == "attention" else of.subvalues)[layer]

    with edited_copy(model, [vectors(anatomy, sublayer, layer) for sublayer, layer, _ in chosen]) as other:
        for sublayer, layer, mask in chosen:
            vectors(other.anatomy, sublayer, layer)[mask.to(model.device)] = 0
        yield other
