"""Prompts made ready: from any accepted form of the arguments to questions, each with its tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attribution.errors import BadInputError
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import answer_token, encode
from attribution.wording import pluralize

__all__ = [
    "Question",
    "encode_all",
    "prompt_list",
    "prompts_with_answers",
    "question_of",
]


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
            f"{pluralize(len(prompts), 'prompt')} came with {pluralize(len(answers), 'answer')}; give one answer each."
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


def encode_all(model: Model, prompts: str | Prompt | Sequence[str | Prompt]) -> list[list[int]]:
    """Return the token ids of one prompt or several."""
    texts = [item.text if isinstance(item, Prompt) else item for item in prompt_list(prompts)]
    return [encode(model.tokenizer, text, context=model.anatomy.context) for text in texts]
