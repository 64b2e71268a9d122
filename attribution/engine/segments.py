"""Passes over the unembedding, segment by segment, several at a time.

A thread takes a segment of tokens and does all of its work alone. Were every product shared by all threads instead,
each of its hundreds of short steps would end by waiting for the slower one; beside another busy process that is most of
the time. What the segments are does not depend on the number of threads, and neither does any result.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["chunks_of", "each_segment", "segments_of"]

Result = TypeVar("Result")

# A thread that is done takes the next: of 16 segments, what is left at the end keeps no other waiting for long.
_SEGMENTS = 16
# Smaller ones are not worth a thread's while.
_LEAST_TOKENS = 512


def segments_of(unembedding: Tensor) -> list[slice]:
    """Return the segments of the tokens."""
    tokens = len(unembedding)
    size = max(_LEAST_TOKENS, -(-tokens // _SEGMENTS))
    return chunks_of(slice(0, tokens), size)


def chunks_of(part: slice, size: int) -> list[slice]:
    """Cut a range into pieces of a size; the last may be smaller."""
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]


def each_segment(unembedding: Tensor, work: Callable[[slice], Result]) -> list[Result]:
    """Return what is made of each segment of the tokens, in their order.

    Args:
        unembedding: W_U, (vocabulary, width).
        work: Called with each segment, by several threads at a time.
    """
    segments, threads = segments_of(unembedding), torch.get_num_threads()
    if threads == 1 or unembedding.device.type != "cpu" or len(segments) == 1:
        return [work(segment) for segment in segments]

    def alone(segment: slice) -> Result:
        # Gradients are switched off thread by thread.
        torch.set_num_threads(1)
        with torch.no_grad():
            return work(segment)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, segments))
    finally:
        torch.set_num_threads(threads)
