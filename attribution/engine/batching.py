"""Batches that memory holds: items of similar length run together where the weights are, fewer when memory runs out."""

from __future__ import annotations

import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from attribution.engine.progress import Progress
from attribution.engine.questions import Question
from attribution.errors import ModelError
from attribution.models.model import Model
from attribution.models.running import run_where_weights_are
from attribution.prompts.tokens import TokenBatch, chunk_by_length, pad

__all__ = ["Kept", "SmallerBatchWarning", "batches_of", "each_batch", "freed_memory_returned", "map_batches"]

# Seconds of work after which it is worth the fraction of a second that returning memory takes.
_LONG = 1.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class SmallerBatchWarning(UserWarning):
    """Memory ran out, and the rest of this call runs in smaller batches."""


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return to the system what long work inside has freed.

    glibc keeps freed memory for later, and tensors of a few megabytes leave holes that it seldom fills: of the 3.7 GB
    that a process held after scoring the heads of 40 prompts of SmolLM2-135M, 2.6 were free.
    """
    start = time.monotonic()
    try:
        yield
    finally:
        if time.monotonic() - start > _LONG and sys.platform == "linux":
            # Other C libraries have no such function.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


class Kept(Protocol):
    """Results that outlive the process, such as an evaluation's journal."""

    @property
    def found(self) -> Mapping[int, Any]:
        """Results that are stored, by the number of the item."""

    def keep(self, results: Mapping[int, Any]) -> Mapping[int, Any]:
        """Store results by number, and return them as they are stored."""


def batches_of(
    model: Model, questions: Sequence[Question], *, variants: int = 1
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield question numbers with their padded batch, sized so that ``variants`` rows of each fit one pass."""
    lengths = [len(question.ids) for question in questions]
    for rows in chunk_by_length(lengths, max(1, model.batch_tokens // variants), breaks=model.anatomy.breaks):
        yield rows, pad([questions[row].ids for row in rows], device=model.device)


def map_batches(
    model: Model,
    items: Sequence[Item],
    work: Callable[..., Sequence[Result]],
    *shared: Any,
    lengths: Sequence[int],
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> list[Result]:
    """Return what a function makes of each item, batch by batch, where the model's weights are.

    Args:
        model: A loaded model.
        items: What there is to do, such as questions.
        work: Called as ``work(model, batch, *shared)`` with the model as it is where the weights are and a list of
            items; returns one result per item, in their order.
            :func:`attribution.models.running.run_where_weights_are` says what it may return.
        shared: What every batch is given as well.
        lengths: How many tokens of a forward pass each item takes.
        progress: The bar; none when ``None``.
        kept: Results that are stored, and need not be computed again.

    Returns:
        One result per item, in their order.

    Raises:
        ModelError: If memory does not suffice for one item.
    """
    results: dict[int, Result] = {}
    with (progress or Progress()).over(len(items), "prompt") as update:
        for rows, found in each_batch(model, items, work, *shared, lengths=lengths, kept=kept):
            new = dict(zip(rows, found, strict=True))
            results.update(new if kept is None else kept.keep(new))
            update(len(rows))
    return [results[row] for row in range(len(items))]


def each_batch(
    model: Model,
    items: Sequence[Item],
    work: Callable[..., Result],
    *shared: Any,
    lengths: Sequence[int],
    kept: Kept | None = None,
) -> Iterator[tuple[list[int], Result]]:
    """Yield the numbers of each batch's items with what was made of the batch as a whole.

    When memory runs out, the batch is halved, as are all that follow, and a :class:`SmallerBatchWarning` says so. See
    :func:`map_batches` for the arguments.
    """
    left = set(range(len(items)))
    while left:
        numbers = sorted(left)
        own = [lengths[number] for number in numbers]
        for chunk in chunk_by_length(own, model.batch_tokens, breaks=model.anatomy.breaks):
            rows = [numbers[place] for place in chunk]
            # An interrupted batch is computed again as a whole: beside other prompts, last digits could differ.
            if kept is not None and all(row in kept.found for row in rows):
                found: Any = [kept.found[row] for row in rows]
            else:
                with freed_memory_returned():
                    found, reason = _attempt(model, work, [items[row] for row in rows], shared)
                if reason is not None:
                    model = _with_smaller_batches(model, [lengths[row] for row in rows], reason)
                    break
            left.difference_update(rows)
            yield rows, found


def _attempt(
    model: Model, work: Callable[..., Result], items: Sequence[Item], shared: Sequence[Any]
) -> tuple[Result | None, str | None]:
    """Return what was made of a batch; or, if memory ran out, ``None`` and what the allocator says of it."""
    try:
        return run_where_weights_are(model, work, items, *shared), None
    except Exception as error:
        if not _out_of_memory(error):
            raise
        # The error itself would hold on to all that was computed.
        return None, str(error).strip().partition("\n")[0]


def _out_of_memory(error: Exception) -> bool:
    # The processor's allocator has no error of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _with_smaller_batches(model: Model, lengths: Sequence[int], reason: str) -> Model:
    """Return a model with batches of half the size of one that did not fit, of items of these lengths."""
    if len(lengths) == 1:
        raise ModelError(
            f"memory does not suffice for model {model.name!r} and one prompt of {lengths[0]} tokens ({reason}); use "
            "shorter prompts, a narrower dtype or a device with more memory."
        )
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
    tokens = max(1, len(lengths) * max(lengths) // 2)
    warnings.warn(
        f"memory ran out with {len(lengths)} prompts of up to {max(lengths)} tokens in a batch ({reason}): the rest of "
        f"this call runs in batches of at most {tokens} tokens; load model {model.name!r} with batch_tokens={tokens} "
        "to begin with them",
        SmallerBatchWarning,
        stacklevel=3,
    )
    return model.with_batch_tokens(tokens)
