"""The paper's selection rule: which prompts of a model are kept, and why the rest fall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import pandas as pd

from attribution.errors import BadInputError
from attribution.knowledge import Knowledge, Prompt
from attribution.metrics import SelectionOutcome, selection_outcome
from attribution.model import Model
from attribution.questions import Question, by_batch
from attribution.tokens import answer_token, answer_tokens, encode, pad
from attribution.trace import on_site, rerun

__all__ = ["one_token_words", "report_of", "selection_outcomes", "selection_report"]


def selection_outcomes(
    model: Model, prompts: Sequence[Prompt], words: Mapping[str, Sequence[str]]
) -> list[SelectionOutcome]:
    """Return what the selection rule says of each prompt.

    Args:
        model: A loaded model.
        prompts: Prompts with answers and categories.
        words: Category to every word of the type, without leading space. A word that is several tokens for this
            model cannot be ranked against the answer and is left out.

    Returns:
        One outcome per prompt, in the order given.

    Raises:
        BadInputError: If a prompt or answer cannot be used, or a category has no word list.
    """
    found: dict[int, SelectionOutcome] = {}
    rows_asked: list[int] = []
    questions: list[Question] = []
    for row, prompt in enumerate(prompts):
        ids = encode(model.tokenizer, prompt.text, context=model.anatomy.context)
        pieces = answer_tokens(model.tokenizer, prompt.text, prompt.answer)
        if len(pieces) > 1:
            found[row] = SelectionOutcome.SEVERAL_TOKENS
        else:
            rows_asked.append(row)
            questions.append(Question(prompt.text, prompt.answer, tuple(ids), pieces[0]))
    rivals = {category: list(one_token_words(model, each).values()) for category, each in words.items()}
    for prompt in prompts:
        if prompt.category not in rivals:
            raise BadInputError(
                f"prompt {prompt.text!r} has the category {prompt.category!r}, which has no word list among "
                f"{', '.join(rivals)}; pass its words."
            )

    def judged(places: list[int]) -> list[SelectionOutcome]:
        part = [questions[place] for place in places]
        return on_site(model, _judged, part, [rivals[prompts[rows_asked[place]].category] for place in places])

    for places, outcomes in by_batch(model, [len(question.ids) for question in questions], judged):
        found.update({rows_asked[place]: outcome for place, outcome in zip(places, outcomes, strict=True)})
    return [found[row] for row in range(len(prompts))]


def _judged(model: Model, questions: Sequence[Question], rivals: Sequence[Sequence[int]]) -> list[SelectionOutcome]:
    """Run one batch and apply the rule to each question with the tokens that its answer competes with."""
    logits = rerun(model, pad([question.ids for question in questions], device=model.device))
    return [
        selection_outcome(row, question.answer_id, others)
        for row, question, others in zip(logits, questions, rivals, strict=True)
    ]


def one_token_words(model: Model, words: Iterable[str]) -> dict[str, int]:
    """Return those words that are one token each with that token, in the order given."""
    tokens = {}
    for word in words:
        # Any prompt serves: an answer is tokenised as the continuation of one.
        with suppress(BadInputError):
            tokens[word] = answer_token(model.tokenizer, "The word is", f" {word}")
    return tokens


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
