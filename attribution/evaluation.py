"""The experiment: rank the neurons of each prompt, ablate the best, rerun, measure. Batched throughout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from attribution import questions as chunks
from attribution.ablation import AblationKind, ablated_logits, ablation_kind, reference_of
from attribution.errors import BadInputError
from attribution.knowledge import Prompt
from attribution.methods import method_named
from attribution.metrics import measure, outranks_rivals
from attribution.model import Model
from attribution.questions import batches_of, prompt_list, prompts_with_answers, question_of
from attribution.ranking import all_candidates
from attribution.records import Component, Unit, unit_named
from attribution.selection import top_k
from attribution.tokens import TokenBatch, answer_token, chunk_by_length, encode, pad
from attribution.trace import Activations, read_activations, rerun

__all__ = ["ablate", "evaluate", "known_prompts", "traced_batches"]


def traced_batches(
    model: Model, prompts: Sequence[Prompt], *, positions: Literal["last", "all"]
) -> Iterator[tuple[Activations, TokenBatch]]:
    """Yield the activations of prompts, batch by batch, in order of length."""
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    for _, batch in batches_of(model, questions):
        yield read_activations(model, batch, positions=positions), batch


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
            :class:`attribution.ablation.AblationKind`.
        reference: Prompts that ``"mean"`` and ``"resample"`` take their values from. A prompt never is its own donor.
        seed: Seed of the donors that ``"resample"`` draws, one for each prompt.
        at_source: Replace attention neurons only at their own source position, as read by the last position.

    Returns:
        Logits at the last position: (vocabulary,), or (prompts, vocabulary) for a list of prompts.

    Raises:
        BadInputError: If an argument cannot be used.
    """
    single = isinstance(prompt, str | Prompt)
    encoded = _encoded(model, prompt)
    variants: Sequence[Any] = [neurons] if single else neurons
    for variant in variants:
        if not isinstance(variant, list | tuple | set | frozenset):
            raise BadInputError(f"{variant!r} is not a collection of neurons; pass a list of records for each prompt.")
    if len(variants) != len(encoded):
        raise BadInputError(f"{len(encoded)} prompts came with {len(variants)} collections of neurons; give one each.")
    others = None if reference is None else _encoded(model, reference)
    values = reference_of(model, kind, others, ablated=encoded, seed=seed)
    logits = torch.empty(len(encoded), model.anatomy.vocabulary, dtype=model.anatomy.readout.unembedding.dtype)
    for rows in chunk_by_length([len(ids) for ids in encoded], chunks.CHUNK_TOKENS):
        batch = pad([encoded[row] for row in rows], device=model.device)
        part = [variants[row] for row in rows]
        logits[rows] = ablated_logits(model, batch, part, reference=values, at_source=at_source)[0].cpu()
    return logits[0] if single else logits


def _encoded(model: Model, prompts: str | Prompt | Sequence[str | Prompt]) -> list[list[int]]:
    texts = [item.text if isinstance(item, Prompt) else item for item in prompt_list(prompts)]
    return [encode(model.tokenizer, text, context=model.anatomy.context) for text in texts]


def _budget(k: int | Mapping[str, int], unit: str) -> dict[Unit, int]:
    if isinstance(k, Mapping) and not k:
        raise BadInputError("k = {} names no unit; give a number, or a number for each unit to ablate.")
    return {unit_named(name): number for name, number in (k if isinstance(k, Mapping) else {unit: k}).items()}


def evaluate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: str | Sequence[str] = "log_prob_increase",
    unit: str = "ffn",
    k: int | Mapping[str, int] = 10,
    kind: str = "zero",
    reference: str | Prompt | Sequence[str | Prompt] | None = None,
    at_source: bool = False,
    seed: int = 0,
    steps: int = 20,
    progress: bool = True,
) -> pd.DataFrame:
    """Ablate each prompt's best neurons, heads or layers and measure its answer before and after.

    Args:
        model: A loaded model.
        prompts: A prompt with its answer, or a list of them.
        method: A registered method, or several, which then share one trace per chunk.
        unit: What to rank and ablate, see :func:`attribution.attribute`; ignored when ``k`` names units.
        k: How many to ablate, or how many of each unit: ``{"attention": 200, "ffn": 100}``.
        kind: ``"zero"``, as in the paper; ``"mean"``; or ``"resample"``: see
            :class:`attribution.ablation.AblationKind`.
        reference: Prompts that ``"mean"`` and ``"resample"`` take their values from; the evaluated prompts themselves
            when ``None``. A prompt never is its own donor.
        at_source: Ablate attention neurons only at their own source position, as read by the last position; by
            default as (layer, head, dim), at all positions.
        seed: Seed for methods that draw random numbers, and of the donors that ``"resample"`` draws, one for each
            prompt and the same for all methods.
        steps: Points on the path of integrated gradients.
        progress: Show a progress bar.

    Returns:
        One row per method and prompt, in the order given: method, prompt, answer, category, fact, ``distinct``, and
        rank, mrr, prob, logp with ``_before`` and ``_after``. ``distinct`` counts the coefficients that were replaced:
        FFN neurons, dimensions of heads, and dimensions of heads at one source position, each once. A head has
        ``head_dim`` of them, and attention neurons of several positions may share one.

    Raises:
        BadInputError: If an argument cannot be used.
    """
    chosen_kind = ablation_kind(kind)
    budget = _budget(k, unit)
    names = [method] if isinstance(method, str) else list(method)
    if not names:
        raise BadInputError("the list of methods is empty; give at least one registered method.")
    methods = {name: {each: method_named(name, each) for each in budget} for name in names}
    prompts = prompts_with_answers(prompts, None)
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    encoded = [question.ids for question in questions]
    others: Sequence[Sequence[int]] | None = None if chosen_kind is AblationKind.ZERO else encoded
    if reference is not None:
        others = _encoded(model, reference)
    values = reference_of(model, kind, others, ablated=encoded, seed=seed)
    # Each prompt runs as it is, once for each method, and its donor may run beside it.
    runs = 1 + len(names) + (chosen_kind is AblationKind.RESAMPLE)
    results: dict[tuple[str, int], dict[str, object]] = {}
    with tqdm(total=len(prompts), desc=f"{model.name} {', '.join(names)}", unit="prompt", disable=not progress) as bar:
        for rows, batch in batches_of(model, questions, variants=runs):
            part = [questions[row] for row in rows]
            wanted = {each: [methods[name][each] for name in names] for each in budget}
            by_prompt = all_candidates(model, part, batch, wanted, seed=seed, steps=steps)
            variants: list[list[Component]] = [[] for _ in rows]
            for name in names:
                for candidates in by_prompt:
                    chosen: list[Component] = []
                    for each, number in budget.items():
                        best = top_k(candidates[each], methods[name][each], number).best
                        chosen += candidates[each].records(best)
                    variants.append(chosen)
            repeats = torch.arange(len(rows), device=model.device).repeat(1 + len(names))
            after_all, distinct = ablated_logits(
                model, batch.repeat_rows(repeats), variants, reference=values, at_source=at_source
            )
            logits = after_all.unflatten(0, (1 + len(names), len(rows)))
            for place, row in enumerate(rows):
                before = asdict(measure(logits[0, place], questions[row].answer_id))
                for number, name in enumerate(names, start=1):
                    after = asdict(measure(logits[number, place], questions[row].answer_id))
                    results[name, row] = {
                        "method": name,
                        "prompt": prompts[row].text,
                        "answer": prompts[row].answer,
                        "category": prompts[row].category,
                        "fact": prompts[row].fact,
                        "distinct": int(distinct[number * len(rows) + place]),
                        **{f"{key}_before": value for key, value in before.items()},
                        **{f"{key}_after": value for key, value in after.items()},
                    }
            bar.update(len(rows))
    return pd.DataFrame([results[name, row] for name in names for row in range(len(prompts))])


def known_prompts(model: Model, prompts: Sequence[Prompt], words: Mapping[str, Sequence[str]]) -> list[Prompt]:
    """Return the prompts that a model answers by the paper's selection rule.

    The correct token must be in the model's top 10 and above every other word of its type.

    Args:
        model: A loaded model.
        prompts: Prompts with answers and categories.
        words: Category to every word of the type, without leading space. A word that is several tokens for this
            model cannot be ranked against the answer and is left out.

    Returns:
        The prompts that pass, in the order given.

    Raises:
        BadInputError: If a prompt or answer cannot be used, or a category has no word list.
    """
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    rivals = {category: _rival_tokens(model, each) for category, each in words.items()}
    for prompt in prompts:
        if prompt.category not in rivals:
            raise BadInputError(
                f"prompt {prompt.text!r} has the category {prompt.category!r}, which has no word list among "
                f"{', '.join(rivals)}; pass its words."
            )
    known: set[int] = set()
    for rows, batch in batches_of(model, questions):
        for row, logits in zip(rows, rerun(model, batch), strict=True):
            if outranks_rivals(logits, questions[row].answer_id, rivals[prompts[row].category]):
                known.add(row)
    return [prompt for row, prompt in enumerate(prompts) if row in known]


def _rival_tokens(model: Model, words: Sequence[str]) -> list[int]:
    tokens = []
    for word in words:
        # Any prompt serves: an answer is tokenised as the continuation of one.
        with suppress(BadInputError):
            tokens.append(answer_token(model.tokenizer, "The word is", f" {word}"))
    return tokens
