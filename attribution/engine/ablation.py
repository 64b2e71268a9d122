"""Ablation: rerun the model with chosen components replaced, many variants in one forward pass, or edit its weights.

Two mechanisms, equal where METHOD says so. An edit of activations lives inside one trace and ends with it; the weights
are never touched. An edit of parameters is made on a copy that shares every other tensor and is undone with its block.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attribution.engine.batching import each_batch, map_batches
from attribution.engine.masks import AblationKind, Masks, ablation_kind, ablation_masks
from attribution.engine.metrics import Outcome, measure_each
from attribution.engine.progress import Progress
from attribution.engine.questions import Question, encode_all
from attribution.engine.trace import Edits, Filler, PlainRun, rerun, run_plainly
from attribution.errors import BadInputError
from attribution.models.anatomy import resolve
from attribution.models.model import Model
from attribution.models.running import run
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import TokenBatch, chunk_by_length, pad
from attribution.records import Component
from attribution.wording import pluralize

__all__ = [
    "WORTH_PLAIN",
    "Donors",
    "Means",
    "Reference",
    "ablate",
    "ablated_logits",
    "measure_ablated",
    "measure_variants",
    "outcomes",
    "reference_of",
]

WORTH_PLAIN = 3
"""Variants of a prompt, on average, from which on a plain run of it saves more than it costs."""


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
    for _, found in each_batch(model, prompts, _sums, lengths=[len(prompt) for prompt in prompts]):
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

    return run(model, batch.inputs(), visit, whole=False)


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
        plain: See :func:`attribution.engine.trace.rerun`; of no use to donors, which run along.

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
    breaks = model.anatomy.breaks
    for row, length in zip(rows, lengths, strict=True):
        if any(len(row) <= each < length for each in breaks):
            raise BadInputError(
                f"a prompt of {len(row)} tokens was to take its coefficients from one of {length}, and model "
                f"{model.name!r} reads positions otherwise in texts of more than {max(breaks)} tokens; use reference "
                "prompts that are as short, or kind 'mean'."
            )
    # A donor may be much longer than the batch that was planned.
    for part in chunk_by_length(lengths, model.batch_tokens, breaks=breaks):
        extra = list(dict.fromkeys(chosen[row] for row in part if chosen[row] != rows[row]))
        indices = {donor: place for place, donor in enumerate(extra, start=len(part))}
        giver = [indices.get(chosen[row], place) for place, row in enumerate(part)] + list(indices.values())
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


def ablate(
    model: Model,
    prompt: str | Prompt | Sequence[str | Prompt],
    neurons: Sequence[Component] | Sequence[Sequence[Component]],
    *,
    kind: str = "zero",
    reference: str | Prompt | Sequence[str | Prompt] | None = None,
    seed: int = 0,
    at_source: bool = False,
) -> Tensor:
    """Rerun the model with components replaced by zero, or by what they are in other prompts.

    Args:
        model: A loaded model.
        prompt: A text, a :class:`Prompt`, or a list of either.
        neurons: What to replace; for a list of prompts, one collection per prompt. Records of all kinds may be mixed:
            FFN neurons, heads (all their dimensions) and layers (all neurons of the sublayer) are replaced at every
            position; a :class:`HeadPosition` only as read by the last position. Attention neurons are replaced as
            (layer, head, dim), at all positions, unless ``at_source``.
        kind: ``"zero"``, as in the paper; ``"mean"``; or ``"resample"``: see
            :class:`attribution.engine.masks.AblationKind`.
        reference: Prompts that ``"mean"`` and ``"resample"`` take their values from. A prompt never is its own donor.
        seed: Seed of the donors that ``"resample"`` draws, one for each prompt.
        at_source: Replace attention neurons only at their own source position, as read by the last position.

    Returns:
        Logits at the last position: (vocabulary,), or (prompts, vocabulary) for a list of prompts.

    Raises:
        BadInputError: If an argument cannot be used.
    """
    # 1. What is asked: which components to replace, prompt by prompt.
    single = isinstance(prompt, str | Prompt)
    encoded = encode_all(model, prompt)
    chosen = _collections([neurons] if single else neurons, len(encoded))
    # 2. What to replace them by: nothing, means over the reference prompts, or donors among them.
    others = None if reference is None else encode_all(model, reference)
    values = reference_of(model, kind, others, ablated=encoded, seed=seed)
    # 3. Where the weights are, batch by batch: masks and a rerun from the first block that is edited.
    asked = list(zip(encoded, chosen, strict=True))
    rows = map_batches(model, asked, _logits, values, at_source, lengths=[len(ids) for ids in encoded])
    # 4. One tensor. Where the weights are, they may have another dtype than a model without weights has here.
    logits = torch.stack(rows).to(model.anatomy.readout.unembedding.dtype)
    return logits[0] if single else logits


def _collections(given: Sequence[Any], prompts: int) -> list[list[Component]]:
    """Return the records to replace in each prompt."""
    for each in given:
        if not isinstance(each, list | tuple | set | frozenset):
            raise BadInputError(f"{each!r} is not a collection of neurons; pass a list of records for each prompt.")
    if len(given) != prompts:
        raise BadInputError(
            f"{pluralize(prompts, 'prompt')} came with {pluralize(len(given), 'collection')} of neurons; give one each."
        )
    return [list(each) for each in given]


def _logits(
    model: Model,
    jobs: Sequence[tuple[Sequence[int], Collection[Component]]],
    reference: Reference | None,
    at_source: bool,
) -> Sequence[Tensor]:
    """Rerun one batch with components replaced; return the logits of each prompt."""
    batch = pad([ids for ids, _ in jobs], device=model.device)
    variants = [variant for _, variant in jobs]
    logits, _ = ablated_logits(model, batch, variants, reference=reference, at_source=at_source)
    return list(logits.cpu())


def outcomes(
    model: Model,
    questions: Sequence[Question],
    variants: Sequence[Collection[Component]],
    *,
    reference: Reference | None = None,
    at_source: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Outcome], list[int]]:
    """Rerun the model once per question with components replaced, and measure each answer.

    Args:
        model: A loaded model.
        questions: What is asked; the same question may come with several variants.
        variants: What to replace, one collection per question; an empty one is the plain model.
        reference: What to replace with, see :func:`attribution.engine.ablation.reference_of`; zero when ``None``.
        at_source: See :func:`ablate`.
        progress: The bar.

    Returns:
        One outcome per question, and how many distinct coefficients were replaced in it.
    """
    rows: dict[Question, list[int]] = {}
    for row, question in enumerate(questions):
        rows.setdefault(question, []).append(row)
    items = [(question, [list(variants[row]) for row in own]) for question, own in rows.items()]
    lengths = [len(question.ids) for question in rows]
    measured = map_batches(model, items, _measure_each, reference, at_source, lengths=lengths, progress=progress)
    found: dict[int, tuple[Outcome, int]] = {}
    for own, results in zip(rows.values(), measured, strict=True):
        found.update(zip(own, results, strict=True))
    return [found[row][0] for row in range(len(questions))], [found[row][1] for row in range(len(questions))]


def _measure_each(
    model: Model,
    items: Sequence[tuple[Question, Sequence[Collection[Component]]]],
    reference: Reference | None,
    at_source: bool,
) -> list[tuple[tuple[Outcome, int], ...]]:
    """Measure each question of a batch with each of its variants."""
    questions = [question for question, _ in items]
    jobs = [(row, variant) for row, (_, own) in enumerate(items) for variant in own]
    # A plain run pays for itself where several reruns begin in it.
    plain = None
    if len(jobs) >= WORTH_PLAIN * len(items) and not model.anatomy.spread:
        plain = run_plainly(model, pad([question.ids for question in questions], device=model.device))
    measured = iter(measure_variants(model, questions, jobs, reference, at_source, plain))
    return [tuple(next(measured) for _ in own) for _, own in items]


def measure_variants(
    model: Model,
    questions: Sequence[Question],
    jobs: Sequence[tuple[int, Collection[Component]]],
    reference: Reference | None,
    at_source: bool,
    plain: PlainRun | None,
) -> list[tuple[Outcome, int]]:
    """Rerun the questions of one batch, each with any number of variants, and measure each answer.

    What begins in the same layer runs together, and the layers below it are not run again.

    Args:
        model: A loaded model, whose weights are here.
        questions: The questions.
        jobs: Which question, and what to replace in it.
        reference: What to replace with; zero when ``None``.
        at_source: See :func:`ablate`.
        plain: A run of the questions without edits; reruns begin at the embedding when ``None``.

    Returns:
        For each job its outcome, and how many distinct coefficients were replaced.
    """
    last = model.anatomy.layers
    order = sorted(range(len(jobs)), key=lambda job: min((record.layer for record in jobs[job][1]), default=last))
    at_once = max(1, model.batch_tokens // max((len(question.ids) for question in questions), default=1))
    found: dict[int, tuple[Outcome, int]] = {}
    for start in range(0, len(order), at_once):
        part = order[start : start + at_once]
        rows = torch.tensor([jobs[job][0] for job in part], device=model.device)
        asked = [(questions[jobs[job][0]], jobs[job][1]) for job in part]
        begun = None if plain is None else (plain, rows)
        found.update(zip(part, measure_ablated(model, asked, reference, at_source, begun), strict=True))
    return [found[job] for job in range(len(jobs))]


def measure_ablated(
    model: Model,
    jobs: Sequence[tuple[Question, Collection[Component]]],
    reference: Reference | None,
    at_source: bool,
    plain: tuple[PlainRun, Tensor] | None = None,
) -> list[tuple[Outcome, int]]:
    """Rerun one batch with components replaced, and measure each answer.

    Args:
        model: A loaded model, whose weights are here.
        jobs: The questions, each with what to replace.
        reference: What to replace with; zero when ``None``.
        at_source: See :func:`ablate`.
        plain: See :func:`ablated_logits`.

    Returns:
        For each question its outcome, and how many distinct coefficients were replaced.
    """
    batch = pad([question.ids for question, _ in jobs], device=model.device)
    variants = [variant for _, variant in jobs]
    logits, replaced = ablated_logits(model, batch, variants, reference=reference, at_source=at_source, plain=plain)
    outcomes = measure_each(logits, [question.answer_id for question, _ in jobs])
    return list(zip(outcomes, replaced.tolist(), strict=True))
