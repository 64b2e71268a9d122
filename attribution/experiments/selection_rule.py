"""The paper's selection rule: which prompts of a model are kept, and why the rest fall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TypeAlias

import pandas as pd
from torch import Tensor

from attribution.engine.batching import map_batches
from attribution.engine.metrics import measure
from attribution.engine.progress import Progress
from attribution.engine.questions import Question, answer_ids_of, ids_of, is_askable
from attribution.engine.trace import rerun
from attribution.errors import BadInputError
from attribution.models.model import Model
from attribution.prompts.knowledge import Knowledge, Prompt
from attribution.prompts.tokens import pad

__all__ = [
    "SelectionOutcome",
    "known_prompts",
    "one_token_words",
    "outranks_rivals",
    "report_of",
    "selection_outcome",
    "selection_outcomes",
    "selection_report",
]


_Asked: TypeAlias = tuple[int, Sequence[int]]
"""An answer's token, and those that it competes with."""

# A word behind a space is the same token after any prompt.
_ANY_PROMPT = Prompt("The word is", "")


def selection_outcomes(
    model: Model,
    prompts: Sequence[Prompt],
    words: Mapping[str, Sequence[str]],
    *,
    progress: Progress | None = None,
) -> list[SelectionOutcome]:
    """Return what the selection rule says of each prompt.

    Args:
        model: A loaded model.
        prompts: Prompts with answers and categories.
        words: Category to every word of the type, without leading space. A word that is several tokens for this
            model cannot be ranked against the answer and is left out.
        progress: How it is shown how far it is.

    Returns:
        One outcome per prompt, in the order given.

    Raises:
        BadInputError: If a prompt or answer cannot be used, or a category has no word list.
    """
    found: dict[int, SelectionOutcome] = {}
    rows_asked: list[int] = []
    questions: list[Question] = []
    for row, prompt in enumerate(prompts):
        ids = ids_of(model, prompt.text)
        pieces = answer_ids_of(model, prompt)
        if len(pieces) > 1:
            found[row] = SelectionOutcome.SEVERAL_TOKENS
        else:
            rows_asked.append(row)
            questions.append(Question(prompt.text, prompt.answer, tuple(ids), pieces[0]))
    for prompt in prompts:
        if prompt.category not in words:
            raise BadInputError(
                f"prompt {prompt.text!r} has the category {prompt.category!r}, which has no word list among "
                f"{', '.join(words)}; pass its words."
            )
    rivals = {category: list(one_token_words(model, each).values()) for category, each in words.items()}

    # One text may be asked for several answers, and is run once.
    by_text: dict[tuple[int, ...], list[tuple[int, _Asked]]] = {}
    for row, question in zip(rows_asked, questions, strict=True):
        prompt = prompts[row]
        own = rivals[prompt.category]
        if prompt.joined:
            own = list(one_token_words(model, words[prompt.category], prompt).values())
        asked = question.answer_id, own
        by_text.setdefault(question.ids, []).append((row, asked))
    jobs = [(ids, [asked for _, asked in of_text]) for ids, of_text in by_text.items()]
    judged = map_batches(model, jobs, _judged, lengths=[len(ids) for ids, _ in jobs], progress=progress)
    for of_text, outcomes in zip(by_text.values(), judged, strict=True):
        found.update(zip((row for row, _ in of_text), outcomes, strict=True))
    return [found[row] for row in range(len(prompts))]


def _judged(
    model: Model, jobs: Sequence[tuple[tuple[int, ...], Sequence[_Asked]]]
) -> list[tuple[SelectionOutcome, ...]]:
    """Run one batch and apply the rule to each answer of each text."""
    logits = rerun(model, pad([ids for ids, _ in jobs], device=model.device))
    return [
        tuple(selection_outcome(row, answer, rivals) for answer, rivals in asked)
        for row, (_, asked) in zip(logits, jobs, strict=True)
    ]


def one_token_words(model: Model, words: Iterable[str], prompt: Prompt = _ANY_PROMPT) -> dict[str, int]:
    """Return those words that are one token each with that token, in the order given.

    Args:
        model: A loaded model.
        words: Words without leading space.
        prompt: What they continue; any prompt serves, unless words join its last one.
    """
    asked = {word: prompt.answered(word) for word in words}
    return {word: answer_ids_of(model, each)[0] for word, each in asked.items() if is_askable(model, each)}


def selection_report(model: Model, knowledge: Knowledge) -> pd.DataFrame:
    """Count, by category, which prompts a model keeps and why the rest fall.

    Args:
        model: A loaded model.
        knowledge: Prompts and word lists.

    Returns:
        One row per category, in the order of the word lists: ``category``, ``prompts``, and one column for each
        :class:`SelectionOutcome`, named by its value, which add up to ``prompts``.

    Raises:
        BadInputError: If a prompt or answer cannot be used.
    """
    return report_of(knowledge, selection_outcomes(model, knowledge.prompts, knowledge.words))


def report_of(knowledge: Knowledge, outcomes: Sequence[SelectionOutcome]) -> pd.DataFrame:
    """Return the report of outcomes that are known already, one per prompt of ``knowledge``."""
    rows = []
    for category in knowledge.words:
        mine = [
            outcome for prompt, outcome in zip(knowledge.prompts, outcomes, strict=True) if prompt.category == category
        ]
        counts = {outcome.value: mine.count(outcome) for outcome in SelectionOutcome}
        rows.append({"category": category, "prompts": len(mine), **counts})
    return pd.DataFrame(rows)


class SelectionOutcome(Enum):
    """What the paper's selection rule says of a prompt: kept, or the first of these reasons that holds."""

    KEPT = "kept"
    SEVERAL_TOKENS = "answer is several tokens"
    """The rule compares the ranks of single tokens, so such an answer has none."""
    NOT_IN_TOP = "not in the top 10"
    OUTRANKED = "outranked by another word of its type"


def selection_outcome(logits: Tensor, answer_id: int, rival_ids: Sequence[int]) -> SelectionOutcome:
    """Apply the paper's selection rule to an answer of one token.

    The answer must be among the ten most likely tokens and above every other word of its type.

    Args:
        logits: The model's logits at the last position, (vocabulary,).
        answer_id: The answer's token id.
        rival_ids: Token ids of every word of the answer's type; the answer's own is ignored.
    """
    if measure(logits, answer_id).rank > 10:
        return SelectionOutcome.NOT_IN_TOP
    rivals = [rival for rival in rival_ids if rival != answer_id]
    if not rivals or bool(logits[answer_id] > logits[rivals].max()):
        return SelectionOutcome.KEPT
    return SelectionOutcome.OUTRANKED


def outranks_rivals(logits: Tensor, answer_id: int, rival_ids: Sequence[int]) -> bool:
    """Say whether a prompt passes the paper's selection rule, see :func:`selection_outcome`."""
    return selection_outcome(logits, answer_id, rival_ids) is SelectionOutcome.KEPT


def known_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    words: Mapping[str, Sequence[str]],
    *,
    progress: Progress | None = None,
) -> list[Prompt]:
    """Return the prompts that a model answers by the paper's selection rule.

    The correct token must be in the model's top 10 and above every other word of its type; an answer of several tokens
    has no rank and does not pass. :func:`attribution.experiments.selection_rule.selection_report` counts why prompts
    fall.

    Args:
        model: A loaded model.
        prompts: Prompts with answers and categories.
        words: Category to every word of the type, without leading space. A word that is several tokens for this
            model cannot be ranked against the answer and is left out.
        progress: How it is shown how far it is.

    Returns:
        The prompts that pass, in the order given.

    Raises:
        BadInputError: If a prompt or answer cannot be used, or a category has no word list.
    """
    fates = selection_outcomes(model, prompts, words, progress=progress)
    return [prompt for prompt, fate in zip(prompts, fates, strict=True) if fate is SelectionOutcome.KEPT]
