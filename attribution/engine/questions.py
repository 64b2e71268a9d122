"""Prompts made ready: from any accepted form of the arguments to questions, each with its tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from attribution.errors import BadInputError
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import answer_tokens, encode
from attribution.wording import pluralize

__all__ = [
    "Question",
    "answer_ids_of",
    "encode_all",
    "ids_of",
    "is_askable",
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

    @property
    def prompt(self) -> Prompt:
        """The prompt with its answer; whether it was meant to follow without a space has been asked."""
        return Prompt(self.text, self.answer, joined=True)

    def seed(self, seed: int) -> int:
        """Seed of the prompt's random draws: differs by prompt, not by its place in a batch."""
        return zlib.crc32(f"{seed}\n{self.text}\n{self.answer}".encode())


def ids_of(model: Model, text: str) -> list[int]:
    """Return the token ids of a text, see :func:`attribution.prompts.tokens.encode`."""
    return encode(model.tokenizer, text, context=model.anatomy.context, vocabulary=model.anatomy.vocabulary)


def answer_ids_of(model: Model, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt's answer, see :func:`attribution.prompts.tokens.answer_tokens`."""
    vocabulary = model.anatomy.vocabulary
    return answer_tokens(model.tokenizer, prompt.text, prompt.answer, vocabulary=vocabulary, joined=prompt.joined)


def question_of(model: Model, prompt: Prompt) -> Question:
    """Tokenise a prompt and its answer.

    Raises:
        BadInputError: If either cannot be used, or the answer is several tokens.
    """
    ids, pieces = ids_of(model, prompt.text), answer_ids_of(model, prompt)
    if len(pieces) > 1:
        names = ", ".join(repr(model.tokenizer.decode([piece])) for piece in pieces)
        raise BadInputError(
            f"answer {prompt.answer!r} is {len(pieces)} tokens ({names}) where exactly one is needed; choose an answer "
            "of one."
        )
    return Question(prompt.text, prompt.answer, tuple(ids), pieces[0])


def is_askable(model: Model, prompt: Prompt) -> bool:
    """Say whether a prompt can be asked: whether its answer is one token that continues it."""
    with suppress(BadInputError):
        return len(answer_ids_of(model, prompt)) == 1
    return False


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
            pairs.append(item if text is None else Prompt(item.text, text, joined=item.joined))
        elif text is None:
            raise BadInputError(f"prompt {item!r} came without an answer; pass one, such as ' Paris'.")
        else:
            pairs.append(Prompt(item, text))
    return pairs


def encode_all(model: Model, prompts: str | Prompt | Sequence[str | Prompt]) -> list[list[int]]:
    """Return the token ids of one prompt or several."""
    texts = [item.text if isinstance(item, Prompt) else item for item in prompt_list(prompts)]
    return [ids_of(model, text) for text in texts]
