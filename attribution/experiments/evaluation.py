"""The experiment: rank the neurons of each prompt, ablate the best, rerun, measure. Batched throughout."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, fields
from typing import Any

import pandas as pd
import torch

from attribution.engine.ablation import Reference, measure_ablated, reference_of
from attribution.engine.batching import Progress, map_batches
from attribution.engine.masks import AblationKind, ablation_kind
from attribution.engine.methods import method_named
from attribution.engine.metrics import Outcome, measure_each
from attribution.engine.questions import Question, encode_all, prompts_with_answers, question_of
from attribution.engine.ranking import pick
from attribution.engine.trace import run_plainly
from attribution.errors import BadInputError
from attribution.experiments.journal import journal
from attribution.models.fingerprint import facts_of
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import pad
from attribution.records import Component, Unit, unit_named

__all__ = ["best_records", "evaluate", "evaluate_ranked"]


def best_records(
    model: Model,
    questions: Sequence[Question],
    methods: Sequence[str],
    k: Mapping[Unit, int],
    *,
    seed: int = 0,
    steps: int = 20,
) -> list[dict[str, dict[Unit, list[Component]]]]:
    """Return each prompt's best records by method and unit, best first; one batch in one trace serves all.

    Args:
        model: A loaded model.
        questions: The prompts.
        methods: Registered methods.
        k: How many of each unit; at most as many as a prompt has.
        seed: Seed for methods that draw random numbers.
        steps: Points on the path of integrated gradients.
    """
    wanted: dict[Unit, dict[str, int | None]] = {unit: dict.fromkeys(methods, number) for unit, number in k.items()}
    return [
        {name: {unit: best[unit][name].records for unit in k} for name in methods}
        for best in pick(model, questions, wanted, seed, steps)
    ]


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
    resume: str | os.PathLike[str] | None = None,
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
            :class:`attribution.engine.masks.AblationKind`. Or several of them.
        reference: Prompts that ``"mean"`` and ``"resample"`` take their values from; the evaluated prompts themselves
            when ``None``. A prompt never is its own donor.
        at_source: Ablate attention neurons only at their own source position, as read by the last position; by
            default as (layer, head, dim), at all positions.
        seed: Seed for methods that draw random numbers, and of the donors that ``"resample"`` draws, one for each
            prompt and the same for all methods.
        steps: Points on the path of integrated gradients.
        progress: Show a progress bar; when ``None``, if standard error is a terminal or in a notebook.
        resume: A file that each batch's results are appended to. A run that was interrupted, in whatever way, goes on
            from there when it is asked the same again, with the result of one that was not.

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
    names = [method] if isinstance(method, str) else list(method)
    if not names or not kinds:
        raise BadInputError("the list of methods or kinds is empty; give at least one registered method and one kind.")
    for each in budgets[0]:
        for name in names:
            method_named(name, each)
    prompts = prompts_with_answers(prompts, None)
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    encoded = [question.ids for question in questions]
    given = None if reference is None else encode_all(model, reference)
    if given is not None and set(kinds) == {AblationKind.ZERO}:
        reference_of(model, "zero", given)
    values = _references(model, kinds, encoded, given, seed)
    # All that a result depends on.
    asked = {
        "prompts": [[question.text, question.answer] for question in questions],
        "method": names,
        "k": [dict(budget) for budget in budgets],
        "kind": [each_kind.value for each_kind in kinds],
        "reference": given,
        "at_source": at_source,
        "seed": seed,
        "steps": steps,
    }
    bar = Progress(f"{model.name} {', '.join(names)}", progress)
    lengths = [len(ids) for ids in encoded]
    with nullcontext() if resume is None else journal(resume, asked | _facts(model), len(prompts)) as kept:
        results = map_batches(
            model, questions, _experiment, names, budgets, values, at_source, seed, steps,
            lengths=lengths, progress=bar, kept=kept,
        )  # fmt: skip
    return _table(prompts, names, values, budgets, results)


def evaluate_ranked(
    model: Model,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    ranked: Sequence[Mapping[str, Mapping[Unit, list[Component]]]],
    *,
    k: int | Sequence[int] | Mapping[str, int],
    kind: Sequence[str],
    reference: Sequence[Question],
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """Return the table of :func:`evaluate` for prompts whose best FFN neurons, or units of ``k``, are known already.

    Args:
        model: A loaded model.
        questions: The prompts, tokenised.
        prompts: The prompts.
        ranked: For each prompt, method to unit to records, best first, at least as many as the largest number asked.
        k: As there.
        kind: Kinds of ablation.
        reference: Prompts that ``"mean"`` and ``"resample"`` take their values from.
        seed: Seed of the donors that ``"resample"`` draws.
        progress: Show a progress bar.
    """
    budgets, names, encoded = _budgets(k, "ffn"), list(ranked[0]), [question.ids for question in questions]
    given = [question.ids for question in reference]
    values = _references(model, [ablation_kind(each) for each in kind], encoded, given, seed)
    jobs = list(zip(questions, ranked, strict=True))
    bar = Progress(f"{model.name} {', '.join(names)}", progress)
    lengths = [len(ids) for ids in encoded]
    results = map_batches(model, jobs, _ablated, names, budgets, values, False, lengths=lengths, progress=bar)
    return _table(prompts, names, values, budgets, results)


def _references(
    model: Model,
    kinds: Sequence[AblationKind],
    encoded: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]] | None,
    seed: int,
) -> dict[AblationKind, Reference | None]:
    """Return what each kind of ablation takes its values from: what is given, or the ablated prompts themselves."""
    values: dict[AblationKind, Reference | None] = {}
    for kind in kinds:
        others = None if kind is AblationKind.ZERO else encoded if given is None else given
        values[kind] = reference_of(model, kind.value, others, ablated=encoded, seed=seed)
    return values


def _arms(
    names: Sequence[str], kinds: Collection[AblationKind], budgets: Sequence[Mapping[Unit, int]]
) -> list[tuple[str, AblationKind, int]]:
    """Return all that each prompt is measured in: method, kind, and number of the budget."""
    return [(name, kind, number) for name in names for kind in kinds for number in range(len(budgets))]


def _table(
    prompts: Sequence[Prompt],
    names: Sequence[str],
    kinds: Collection[AblationKind],
    budgets: Sequence[Mapping[Unit, int]],
    results: Sequence[Sequence[Any]],
) -> pd.DataFrame:
    """Return what was measured, by row of the prompts, as the table of :func:`evaluate`."""
    return pd.DataFrame(
        [
            _table_row(prompt, name, kind, sum(budgets[number].values()), results[row][0], results[row][1][place])
            for place, (name, kind, number) in enumerate(_arms(names, kinds, budgets))
            for row, prompt in enumerate(prompts)
        ]
    )


def _facts(model: Model) -> dict[str, Any]:
    """Return what a file of results remembers of a model: its weights as well, where they are here and whole."""
    here = model.remote in (False, "local") and not model.anatomy.spread
    return {"model": model.described(), "weights": facts_of(model).weights if here else None}


def _experiment(
    model: Model,
    questions: Sequence[Question],
    names: Sequence[str],
    budgets: Sequence[Mapping[Unit, int]],
    kinds: Mapping[AblationKind, Reference | None],
    at_source: bool,
    seed: int,
    steps: int,
) -> list[list[Any]]:
    """Rank one batch of prompts once, ablate every prompt's best in every arm, and measure.

    Args:
        model: A loaded model, whose weights are here.
        questions: The prompts.
        names: Methods.
        budgets: How many of each unit.
        kinds: Kinds of ablation, and what each takes its values from.
        at_source: See :func:`evaluate`.
        seed: As there.
        steps: As there.

    Returns:
        For each prompt the fields of its :class:`Outcome` before, and a list of those after, by method, kind and
        budget, each with how many coefficients were replaced as its last entry.
    """
    largest = {unit: max(budget[unit] for budget in budgets) for unit in budgets[0]}
    ranked = best_records(model, questions, names, largest, seed=seed, steps=steps)
    return _ablated(model, list(zip(questions, ranked, strict=True)), names, budgets, kinds, at_source)


def _ablated(
    model: Model,
    jobs: Sequence[tuple[Question, Mapping[str, Mapping[Unit, list[Component]]]]],
    names: Sequence[str],
    budgets: Sequence[Mapping[Unit, int]],
    kinds: Mapping[AblationKind, Reference | None],
    at_source: bool,
) -> list[list[Any]]:
    """Ablate the best of one batch of prompts in every arm, and measure; returns what :func:`_experiment` does."""
    questions, ranked = [question for question, _ in jobs], [best for _, best in jobs]
    plain = run_plainly(model, pad([question.ids for question in questions], device=model.device))
    before = measure_each(plain.logits, [question.answer_id for question in questions])
    arms = _arms(names, kinds, budgets)
    found: list[list[Any]] = [[list(astuple(outcome)), [None] * len(arms)] for outcome in before]
    for kind, reference in kinds.items():
        reruns = [(row, place) for row in range(len(questions)) for place, arm in enumerate(arms) if arm[1] is kind]
        chosen = {(row, place): _chosen(ranked[row][arms[place][0]], budgets[arms[place][2]]) for row, place in reruns}
        # What begins in the same layer runs together, and the layers below it are not run again.
        reruns.sort(key=lambda job: min((record.layer for record in chosen[job]), default=model.anatomy.layers))
        for part in _in_passes(reruns, questions, model.batch_tokens):
            rows = torch.tensor([row for row, _ in part], device=model.device)
            after = measure_ablated(
                model,
                [(questions[job[0]], chosen[job]) for job in part],
                reference,
                at_source,
                None if model.anatomy.spread else (plain, rows),
            )
            for (row, place), (outcome, replaced) in zip(part, after, strict=True):
                found[row][1][place] = [*astuple(outcome), replaced]
    return found


def _in_passes(
    jobs: Sequence[tuple[int, int]], questions: Sequence[Question], tokens: int
) -> Iterator[Sequence[tuple[int, int]]]:
    """Yield jobs, in the order given, as many at a time as one pass of so many tokens holds."""
    longest = max(len(question.ids) for question in questions)
    at_once = max(1, tokens // longest)
    for start in range(0, len(jobs), at_once):
        yield jobs[start : start + at_once]


def _table_row(
    prompt: Prompt, method: str, kind: AblationKind, k: int, before: Sequence[float], after: Sequence[float]
) -> dict[str, object]:
    """Return one row of the table of :func:`evaluate`."""
    *measured, replaced = after
    names = [each.name for each in fields(Outcome)]
    return {
        "method": method,
        "kind": kind.value,
        "k": k,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "category": prompt.category,
        "fact": prompt.fact,
        "distinct": replaced,
        **{f"{name}_before": value for name, value in zip(names, before, strict=True)},
        **{f"{name}_after": value for name, value in zip(names, measured, strict=True)},
    }


def _chosen(ranked: Mapping[Unit, list[Component]], budget: Mapping[Unit, int]) -> list[Component]:
    return [record for unit, number in budget.items() for record in ranked[unit][:number]]
