"""Prompts made ready: from any accepted form of the arguments to padded batches of tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from attribution.errors import BadInputError
from attribution.knowledge import Prompt
from attribution.model import Model
from attribution.tokens import TokenBatch, answer_token, chunk_by_length, encode, pad
from attribution.wording import counted

__all__ = ["CHUNK_TOKENS", "Question", "batches_of", "prompt_list", "prompts_with_answers", "question_of"]

# Tokens in one forward pass, padding included: large enough to keep two cores busy, small enough that what one layer
# of the bundled models hands to the next stays in a processor's cache (half or twice as many took a sixth longer).
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    """A prompt made ready: its tokens and the token of its answer."""

    text: str
    answer: str
    ids: tuple[int, ...]
    answer_id: int

    def seed(self, seed: int) -> int:
        """Seed of the prompt's random draws: differs by prompt, not by its place in a batch."""
        return zlib.crc32(f"{seed}\n{self.text}\n{self.answer}".encode())


def question_of(model: Model, text: str, answer: str) -> Question:
    """Tokenise a prompt and its answer.

    Raises:
        BadInputError: If either cannot be used.
    """
    ids = encode(model.tokenizer, text, context=model.anatomy.context)
    return Question(text, answer, tuple(ids), answer_token(model.tokenizer, text, answer))


def batches_of(
    model: Model, questions: Sequence[Question], *, variants: int = 1
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield question numbers with their padded batch, sized so that ``variants`` rows of each fit one pass."""
    lengths = [len(question.ids) for question in questions]
    for rows in chunk_by_length(lengths, max(1, CHUNK_TOKENS // variants)):
        yield rows, pad([questions[row].ids for row in rows], device=model.device)


def prompt_list(prompt: str | Prompt | Sequence[str | Prompt]) -> list[str | Prompt]:
    """Return one prompt or several as a list."""
    if isinstance(prompt, str | Prompt):
        return [prompt]
    if not isinstance(prompt, list | tuple):
        raise BadInputError(
            f"prompt {prompt!r} is a {type(prompt).__name__}; pass a string, a Prompt, or a list of them."
        )
    if not prompt:
        raise BadInputError("the list of prompts is empty; give at least one.")
    return list(prompt)


def prompts_with_answers(
    prompt: str | Prompt | Sequence[str | Prompt], answer: str | Sequence[str] | None
) -> list[Prompt]:
    """Return prompts with answers from any accepted form of the two arguments."""
    prompts = prompt_list(prompt)
    answers: list[Any] = list(answer) if isinstance(answer, list | tuple) else [answer] * len(prompts)
    if len(answers) != len(prompts):
        raise BadInputError(
            f"{counted(len(prompts), 'prompt')} came with {counted(len(answers), 'answer')}; give one answer each."
        )
    pairs = []
    for item, text in zip(prompts, answers, strict=True):
        if isinstance(item, Prompt):
            pairs.append(item if text is None else Prompt(item.text, text))
        elif text is None:
            raise BadInputError(f"prompt {item!r} came without an answer; pass one, such as ' Paris'.")
        else:
            pairs.append(Prompt(item, text))
    return pairs
