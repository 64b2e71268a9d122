"""The experiment: rank the neurons of each prompt, ablate the best, rerun, measure. Batched throughout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import pandas as pd

from attribution.engine.ablation import WORTH_PLAIN, Reference, measure_variants, reference_of
from attribution.engine.batching import Kept, map_batches
from attribution.engine.masks import AblationKind
from attribution.engine.metrics import Outcome, measure_each
from attribution.engine.progress import Progress
from attribution.engine.questions import Question, encode_all, prompts_with_answers, question_of
from attribution.engine.ranking import Search, rank_batch
from attribution.engine.trace import run_plainly
from attribution.experiments.design import Ablated, Design, Measurement, budgets_of, table_of
from attribution.experiments.journal import journal
from attribution.models.fingerprint import facts_of
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import pad
from attribution.records import Component, Unit

__all__ = ["Ranked", "evaluate", "measure_batch", "references_of", "run_design"]

Ranked: TypeAlias = Mapping[str, Mapping[Unit, Sequence[Component]]]
"""The best records of one prompt by method and unit, best first."""


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
    # 1. What is asked: the arms that every prompt is measured in.
    design = Design.of(method, budgets_of(k, unit), kind, at_source=at_source, seed=seed, steps=steps)
    # 2. Of what: questions, and the prompts that ablated coefficients take their values from.
    prompts = prompts_with_answers(prompts, None)
    questions = [question_of(model, prompt) for prompt in prompts]
    given = None if reference is None else encode_all(model, reference)
    references = references_of(model, design, questions, given)
    # 3. Rank, ablate, rerun and measure, batch by batch where the weights are; a journal keeps what is measured.
    header = {
        "prompts": [[question.text, question.answer] for question in questions],
        **design.to_json(),
        "reference": given,
        **_facts(model),
    }
    bar = Progress(f"{model.name} {', '.join(design.methods)}", progress)
    with nullcontext() if resume is None else journal(resume, header, len(prompts)) as kept:
        measured = run_design(model, questions, design, references, progress=bar, kept=kept)
    # 4. One row for each arm and prompt.
    return table_of(prompts, design, measured)


def run_design(
    model: Model,
    questions: Sequence[Question],
    design: Design,
    references: Mapping[AblationKind, Reference | None],
    *,
    ranked: Sequence[Ranked] | None = None,
    before: Sequence[Outcome] | None = None,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> list[Measurement]:
    """Measure every question in every arm of a design: the driver of :func:`evaluate` and of the claims.

    Args:
        model: A loaded model.
        questions: The prompts, tokenised.
        design: What is done to each.
        references: What each kind of ablation takes its values from, see :func:`references_of`.
        ranked: The best of each prompt where they are known already, at least as many as the largest budget; ranked
            here when ``None``.
        before: How the plain model answers each, where that is known; measured here when ``None``.
        progress: The bar.
        kept: Measurements of an earlier run.
    """
    unknown = [None] * len(questions)
    jobs = list(zip(questions, ranked or unknown, before or unknown, strict=True))
    lengths = [len(question.ids) for question in questions]
    return map_batches(model, jobs, measure_batch, design, references, lengths=lengths, progress=progress, kept=kept)


def references_of(
    model: Model, design: Design, questions: Sequence[Question], given: Sequence[Sequence[int]] | None = None
) -> dict[AblationKind, Reference | None]:
    """Return what each kind of a design takes its values from: what is given, or the ablated prompts themselves.

    Raises:
        BadInputError: If prompts are given that no kind takes anything from, or a prompt has no donor.
    """
    ablated = [question.ids for question in questions]
    if given is not None and set(design.kinds) == {AblationKind.ZERO}:
        reference_of(model, "zero", given)
    values: dict[AblationKind, Reference | None] = {}
    for kind in design.kinds:
        others = None if kind is AblationKind.ZERO else ablated if given is None else given
        values[kind] = reference_of(model, kind.value, others, ablated=ablated, seed=design.seed)
    return values


def _facts(model: Model) -> dict[str, Any]:
    """Return what a file of results remembers of a model: its weights as well, where they are here and whole."""
    here = model.remote in (False, "local") and not model.anatomy.spread
    return {"model": model.described(), "weights": facts_of(model).weights if here else None}


def measure_batch(
    model: Model,
    jobs: Sequence[tuple[Question, Ranked | None, Outcome | None]],
    design: Design,
    references: Mapping[AblationKind, Reference | None],
) -> list[Measurement]:
    """Rank one batch of prompts, ablate every prompt's best in every arm, and measure.

    Args:
        model: A loaded model, whose weights are here.
        jobs: The prompts, each with its best and how it is answered, where these are known.
        design: What is done to each.
        references: What each kind of ablation takes its values from.
    """
    questions, arms = [question for question, *_ in jobs], design.arms
    # 1. One batch in one trace ranks for all methods and units.
    best: Sequence[Ranked] = [ranked for _, ranked, _ in jobs if ranked is not None]
    if len(best) < len(jobs):
        wanted: dict[str, dict[Unit, int | None]] = {name: {**design.largest} for name in design.methods}
        rankings = rank_batch(model, questions, wanted, Search(design.seed, design.steps))
        best = [
            {method: {unit: each.neurons for unit, each in by_unit.items()} for method, by_unit in own.items()}
            for own in rankings
        ]
    # 2. How the plain model answers, and what its blocks return: reruns begin there, if they are worth it.
    before = [outcome for *_, outcome in jobs if outcome is not None]
    plain = None
    if len(before) < len(jobs) or len(arms) >= WORTH_PLAIN:
        plain = run_plainly(model, pad([question.ids for question in questions], device=model.device))
    if plain is not None and len(before) < len(jobs):
        before = measure_each(plain.logits, [question.answer_id for question in questions])
    # 3. What each arm ablates in each prompt.
    chosen = {
        (row, place): _chosen(best[row][arm.method], arm.budget)
        for row in range(len(questions))
        for place, arm in enumerate(arms)
    }
    # 4. Rerun and measure: what two arms ablate alike, once.
    after: dict[tuple[int, int], Ablated] = {}
    for kind, reference in references.items():
        alike: dict[tuple[int, frozenset[Component]], list[tuple[int, int]]] = {}
        for job, records in chosen.items():
            if arms[job[1]].kind is kind:
                alike.setdefault((job[0], frozenset(records)), []).append(job)
        begun = None if model.anatomy.spread else plain
        reruns = [(row, chosen[same[0]]) for (row, _), same in alike.items()]
        measured = measure_variants(model, questions, reruns, reference, design.at_source, begun)
        for same, found in zip(alike.values(), measured, strict=True):
            after.update((job, Ablated(*found)) for job in same)
    return [
        Measurement(outcome, tuple(after[row, place] for place in range(len(arms))))
        for row, outcome in enumerate(before)
    ]


def _chosen(ranked: Mapping[Unit, Sequence[Component]], budget: Mapping[Unit, int]) -> list[Component]:
    return [record for unit, number in budget.items() for record in ranked[unit][:number]]
