"""The experiment: rank the neurons of each prompt, ablate the best, rerun, measure. Batched throughout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from attribution import questions as chunks
from attribution.ablation import AblationKind, Reference, ablated_logits, ablation_kind, reference_of
from attribution.errors import BadInputError
from attribution.knowledge import Prompt
from attribution.methods import method_named
from attribution.metrics import Outcome, SelectionOutcome, measure_each
from attribution.model import Model
from attribution.questions import Question, batches_of, prompt_list, prompts_with_answers, question_of
from attribution.ranking import all_candidates
from attribution.records import Component, Unit, unit_named
from attribution.selection import top_k
from attribution.selection_rule import selection_outcomes
from attribution.tokens import TokenBatch, chunk_by_length, encode, pad
from attribution.trace import Activations, read_activations
from attribution.wording import counted

__all__ = ["ablate", "best_records", "evaluate", "known_prompts", "outcomes", "traced_batches"]


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
        raise BadInputError(
            f"{counted(len(encoded), 'prompt')} came with {counted(len(variants), 'collection')} of neurons; give one "
            "each."
        )
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


def outcomes(
    model: Model,
    questions: Sequence[Question],
    variants: Sequence[Collection[Component]],
    *,
    reference: Reference | None = None,
    at_source: bool = False,
) -> tuple[list[Outcome], list[int]]:
    """Rerun the model once per question with components replaced, and measure each answer.

    Args:
        model: A loaded model.
        questions: What is asked; the same question may come with several variants.
        variants: What to replace, one collection per question; an empty one is the plain model.
        reference: What to replace with, see :func:`attribution.ablation.reference_of`; zero when ``None``.
        at_source: See :func:`ablate`.

    Returns:
        One outcome per question, and how many distinct coefficients were replaced in it.
    """
    found: list[Outcome | None] = [None] * len(questions)
    distinct = [0] * len(questions)
    for rows in chunk_by_length([len(question.ids) for question in questions], chunks.CHUNK_TOKENS):
        batch = pad([questions[row].ids for row in rows], device=model.device)
        part = [variants[row] for row in rows]
        logits, replaced = ablated_logits(model, batch, part, reference=reference, at_source=at_source)
        measured = measure_each(logits, [questions[row].answer_id for row in rows])
        for row, outcome, number in zip(rows, measured, replaced.tolist(), strict=True):
            found[row], distinct[row] = outcome, number
    return [each for each in found if each is not None], distinct


def best_records(
    model: Model,
    questions: Sequence[Question],
    batch: TokenBatch,
    methods: Sequence[str],
    k: Mapping[Unit, int],
    *,
    seed: int = 0,
    steps: int = 20,
) -> list[dict[str, dict[Unit, list[Component]]]]:
    """Return, for each prompt of a batch, the best records by method and unit, best first; one trace serves all.

    Args:
        model: A loaded model.
        questions: One per row of the batch.
        batch: Their tokens.
        methods: Registered methods.
        k: How many of each unit; at most as many as a prompt has.
        seed: Seed for methods that draw random numbers.
        steps: Points on the path of integrated gradients.
    """
    by_unit = {unit: {name: method_named(name, unit) for name in methods} for unit in k}
    wanted = {unit: list(named.values()) for unit, named in by_unit.items()}
    found = []
    for candidates in all_candidates(model, questions, batch, wanted, seed=seed, steps=steps):
        ranked: dict[str, dict[Unit, list[Component]]] = {name: {} for name in methods}
        for unit, number in k.items():
            for name, method in by_unit[unit].items():
                ranked[name][unit] = candidates[unit].records(top_k(candidates[unit], method, number).best)
        found.append(ranked)
    return found


def _budgets(k: int | Sequence[int] | Mapping[str, int], unit: str) -> list[dict[Unit, int]]:
    """Return every budget asked for, each as how many of each unit."""
    if isinstance(k, Mapping):
        if not k:
            raise BadInputError("k = {} names no unit; give a number, or a number for each unit to ablate.")
        return [{unit_named(name): number for name, number in k.items()}]
    numbers: list[Any] = list(k) if isinstance(k, list | tuple) else [k]
    if not numbers:
        raise BadInputError(f"k = {k!r} holds no number; give at least one.")
    if len(set(numbers)) < len(numbers):
        raise BadInputError(f"k = {k!r} holds a number twice; give each once.")
    return [{unit_named(unit): number} for number in numbers]


def evaluate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: str | Sequence[str] = "log_prob_increase",
    unit: str = "ffn",
    k: int | Sequence[int] | Mapping[str, int] = 10,
    kind: str | Sequence[str] = "zero",
    reference: str | Prompt | Sequence[str | Prompt] | None = None,
    at_source: bool = False,
    seed: int = 0,
    steps: int = 20,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Ablate each prompt's best neurons, heads or layers and measure its answer before and after.

    Args:
        model: A loaded model.
        prompts: A prompt with its answer, or a list of them.
        method: A registered method, or several, which then share one trace per chunk.
        unit: What to rank and ablate, see :func:`attribution.attribute`; ignored when ``k`` names units.
        k: How many to ablate; several numbers, for a deletion curve from one ranking; or how many of each unit:
            ``{"attention": 200, "ffn": 100}``.
        kind: ``"zero"``, as in the paper; ``"mean"``; or ``"resample"``: see
            :class:`attribution.ablation.AblationKind`. Or several of them.
        reference: Prompts that ``"mean"`` and ``"resample"`` take their values from; the evaluated prompts themselves
            when ``None``. A prompt never is its own donor.
        at_source: Ablate attention neurons only at their own source position, as read by the last position; by
            default as (layer, head, dim), at all positions.
        seed: Seed for methods that draw random numbers, and of the donors that ``"resample"`` draws, one for each
            prompt and the same for all methods.
        steps: Points on the path of integrated gradients.
        progress: Show a progress bar; when ``None``, if standard error is a terminal or in a notebook.

    Returns:
        One row per method, kind, number and prompt, in the order given: method, kind, k, prompt, answer, category,
        fact, ``distinct``, and rank, mrr, prob, logp with ``_before`` and ``_after``. ``k`` is the number asked for,
        of all units together. ``distinct`` counts the coefficients that were replaced: FFN neurons, dimensions of
        heads, and dimensions of heads at one source position, each once. A head has ``head_dim`` of them, and
        attention neurons of several positions may share one.

    Raises:
        BadInputError: If an argument cannot be used.
    """
    kinds = [ablation_kind(each) for each in ([kind] if isinstance(kind, str) else kind)]
    budgets = _budgets(k, unit)
    largest = {each: max(budget[each] for budget in budgets) for each in budgets[0]}
    names = [method] if isinstance(method, str) else list(method)
    if not names or not kinds:
        raise BadInputError("the list of methods or kinds is empty; give at least one registered method and one kind.")
    for each in budgets[0]:
        for name in names:
            method_named(name, each)
    prompts = prompts_with_answers(prompts, None)
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    encoded = [question.ids for question in questions]
    given = None if reference is None else _encoded(model, reference)
    if given is not None and set(kinds) == {AblationKind.ZERO}:
        reference_of(model, "zero", given)
    values: dict[AblationKind, Reference | None] = {}
    for each_kind in kinds:
        others = None if each_kind is AblationKind.ZERO else encoded if given is None else given
        values[each_kind] = reference_of(model, each_kind.value, others, ablated=encoded, seed=seed)
    arms = [(name, each_kind, number) for name in names for each_kind in kinds for number in range(len(budgets))]
    results: dict[tuple[tuple[str, AblationKind, int], int], dict[str, object]] = {}
    # Only tqdm's own None tells a notebook from a log.
    hidden = None if progress is None else not progress
    with tqdm(total=len(prompts), desc=f"{model.name} {', '.join(names)}", unit="prompt", disable=hidden) as bar:
        for rows, batch in batches_of(model, questions):
            part = [questions[row] for row in rows]
            ranked = best_records(model, part, batch, names, largest, seed=seed, steps=steps)
            before, _ = outcomes(model, part, [()] * len(rows))
            for each_kind in kinds:
                jobs = [(place, arm) for place in range(len(rows)) for arm in arms if arm[1] is each_kind]
                chosen = [_chosen(ranked[place][name], budgets[number]) for place, (name, _, number) in jobs]
                asked = [part[place] for place, _ in jobs]
                after, distinct = outcomes(model, asked, chosen, reference=values[each_kind], at_source=at_source)
                for (place, arm), outcome, replaced in zip(jobs, after, distinct, strict=True):
                    prompt = prompts[rows[place]]
                    results[arm, rows[place]] = {
                        "method": arm[0],
                        "kind": each_kind.value,
                        "k": sum(budgets[arm[2]].values()),
                        "prompt": prompt.text,
                        "answer": prompt.answer,
                        "category": prompt.category,
                        "fact": prompt.fact,
                        "distinct": replaced,
                        **{f"{key}_before": value for key, value in asdict(before[place]).items()},
                        **{f"{key}_after": value for key, value in asdict(outcome).items()},
                    }
            bar.update(len(rows))
    return pd.DataFrame([results[arm, row] for arm in arms for row in range(len(prompts))])


def _chosen(ranked: Mapping[Unit, list[Component]], budget: Mapping[Unit, int]) -> list[Component]:
    return [record for unit, number in budget.items() for record in ranked[unit][:number]]


def known_prompts(model: Model, prompts: Sequence[Prompt], words: Mapping[str, Sequence[str]]) -> list[Prompt]:
    """Return the prompts that a model answers by the paper's selection rule.

    The correct token must be in the model's top 10 and above every other word of its type; an answer of several tokens
    has no rank and does not pass. :func:`attribution.selection_rule.selection_report` counts why prompts fall.

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
    fates = selection_outcomes(model, prompts, words)
    return [prompt for prompt, fate in zip(prompts, fates, strict=True) if fate is SelectionOutcome.KEPT]
