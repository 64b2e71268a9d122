"""Batches that memory holds: prompts of similar length, run together, fewer at a time when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch

from attribution.engine.questions import Question, question_of
from attribution.engine.trace import Activations, read_activations
from attribution.errors import ModelError
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import TokenBatch, chunk_by_length, pad

T = TypeVar("T")

__all__ = [
    "SmallerBatchWarning",
    "batches_of",
    "by_batch",
    "traced_batches",
]


class SmallerBatchWarning(UserWarning):
    """Memory ran out, and batches are smaller from here on."""


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


def traced_batches(
    model: Model, prompts: Sequence[Prompt], *, positions: Literal["last", "all"]
) -> Iterator[tuple[Activations, TokenBatch]]:
    """Yield the activations of prompts, batch by batch, in order of length."""
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    for _, batch in batches_of(model, questions):
        yield read_activations(model, batch, positions=positions), batch
