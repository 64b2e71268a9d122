"""Prompts made ready: from any accepted form of the arguments to padded batches of tokens, that memory holds."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attribution.errors import BadInputError, ModelError
from attribution.knowledge import Prompt
from attribution.model import Model
from attribution.tokens import TokenBatch, answer_token, chunk_by_length, encode, pad
from attribution.wording import counted

__all__ = [
    "Question",
    "SmallerBatchWarning",
    "batches_of",
    "by_batch",
    "prompt_list",
    "prompts_with_answers",
    "question_of",
]

T = TypeVar("T")


class SmallerBatchWarning(UserWarning):
    """Memory ran out, and batches are smaller from here on."""


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
    for rows in chunk_by_length(lengths, max(1, model.batch_tokens // variants)):
        yield rows, pad([questions[row].ids for row in rows], device=model.device)


def by_batch(
    model: Model, lengths: Sequence[int], work: Callable[[list[int]], T], *, variants: int = 1
) -> Iterator[tuple[list[int], T]]:
    """Yield the rows of each batch with what was made of it.

    When memory runs out, the batch is halved, as are all that follow, and a :class:`SmallerBatchWarning` says so.

    Args:
        model: A loaded model.
        lengths: Tokens of each prompt.
        work: Row numbers of a batch to what is made of it.
        variants: Rows of a pass that each prompt takes.

    Raises:
        ModelError: If memory does not suffice for one prompt.
    """
    left = set(range(len(lengths)))
    while left:
        rows_left = sorted(left)
        chunks = chunk_by_length([lengths[row] for row in rows_left], max(1, model.batch_tokens // variants))
        for rows in ([rows_left[place] for place in chunk] for chunk in chunks):
            try:
                found = work(rows)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
            else:
                left.difference_update(rows)
                yield rows, found
                continue
            # Outside of the except clause, as the error holds on to all that was computed.
            _halve(model, [lengths[row] for row in rows], reason)
            break


def _out_of_memory(error: Exception) -> bool:
    # The processor's allocator has no error of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _halve(model: Model, lengths: Sequence[int], reason: str) -> None:
    """Halve the batches of a model, of which one with prompts of these lengths did not fit."""
    if len(lengths) == 1:
        raise ModelError(
            f"memory does not suffice for model {model.name!r} and one prompt of {lengths[0]} tokens ({reason}); use "
            "shorter prompts, a narrower dtype or a device with more memory."
        )
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    model.batch.tokens = max(1, len(lengths) * max(lengths) // 2)
    warnings.warn(
        f"memory ran out with {len(lengths)} prompts of up to {max(lengths)} tokens in a batch ({reason}): batches of "
        f"model {model.name!r} hold at most {model.batch_tokens} tokens from here on",
        SmallerBatchWarning,
        stacklevel=3,
    )


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
