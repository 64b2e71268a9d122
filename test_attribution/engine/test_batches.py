"""Batches are as large as memory allows, and smaller ones give the same."""

from __future__ import annotations

import mmap
import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from attribution.engine import batching, ranking
from attribution.engine.batching import SmallerBatchWarning, map_batches
from attribution.experiments import evaluation
from attribution.models.model import CHUNK_TOKENS

PROMPTS = [
    at.Prompt("The capital of France is", " Paris"),
    at.Prompt("The capital of Italy is", " Rome"),
    at.Prompt("The number of legs that a dog has is", " four"),
    at.Prompt("A ripe cherry is", " red"),
]
# What a processor and an accelerator say when memory runs out.
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError("more than there is"),
]


def _failing(work: Any, error: Exception, limit: int) -> Any:
    """Work that runs out of memory with more than so many prompts."""

    def failing(model: at.Model, questions: Any, *rest: Any, **options: Any) -> Any:
        if len(questions) > limit:
            raise error
        return work(model, questions, *rest, **options)

    return failing


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "processor", "python"])
def test_batch_that_does_not_fit_is_halved_with_a_warning_and_the_same_result(
    model: at.Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = at.evaluate(model, PROMPTS, k=3, progress=False)
    monkeypatch.setattr(evaluation, "measure_batch", _failing(evaluation.measure_batch, error, 1))
    with pytest.warns(SmallerBatchWarning, match=r"memory ran out with \d prompts of up to \d+ tokens") as said:
        halved = at.evaluate(model, PROMPTS, k=3, progress=False)
    pd.testing.assert_frame_equal(halved, whole, check_exact=False, rtol=1e-5)
    # Four prompts, two, one.
    assert 1 <= len(said) <= 3
    tokens = int(re.search(r"batch_tokens=(\d+)", str(said[-1].message))[1])  # type: ignore[index]
    assert tokens < CHUNK_TOKENS == model.batch_tokens
    at.evaluate(model.with_batch_tokens(tokens), PROMPTS, k=3, progress=False)


def test_rankings_are_made_in_halved_batches_as_well(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = at.attribute(model, PROMPTS, k=3)
    monkeypatch.setattr(ranking, "rank_batch", _failing(ranking.rank_batch, ERRORS[0], 2))
    with pytest.warns(SmallerBatchWarning):
        halved = at.attribute(model, PROMPTS, k=3)
    assert [each.neurons for each in halved] == [each.neurons for each in whole]


def test_prompt_that_does_not_fit_alone_is_an_error_of_one_sentence(
    model: at.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "rank_batch", _failing(ranking.rank_batch, ERRORS[0], 0))
    with pytest.raises(at.AttributionError, match=r"one prompt of \d+ tokens \(CUDA out of memory") as failure:
        at.attribute(model, PROMPTS[0], k=3)
    assert "\n" not in str(failure.value)


def test_another_error_is_not_taken_for_want_of_memory(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "rank_batch", _failing(ranking.rank_batch, RuntimeError("shapes do not match"), 0))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        at.attribute(model, PROMPTS, k=3)
    assert model.batch_tokens == CHUNK_TOKENS


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    tokens=st.integers(1, 200),
    fits=st.integers(40, 120),
)
def test_every_item_is_worked_on_once_in_batches_that_fit(lengths: list[int], tokens: int, fits: int) -> None:
    @dataclass(frozen=True)
    class Small:
        batch_tokens: int
        name: str = "small"
        remote: bool = False
        anatomy: Any = field(default_factory=lambda: SimpleNamespace(breaks=()))

        def with_batch_tokens(self, tokens: int) -> Any:
            return replace(self, batch_tokens=tokens)

    seen: list[int] = []

    def work(model: Any, rows: list[int], answer: int) -> list[int]:
        size = len(rows) * max(lengths[row] for row in rows)
        if size > fits:
            raise MemoryError
        assert len(rows) == 1 or size <= model.batch_tokens
        seen.extend(rows)
        return [row + answer for row in rows]

    model: Any = Small(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        found = map_batches(model, list(range(len(lengths))), work, 100, lengths=lengths)
    assert found == [row + 100 for row in range(len(lengths))]
    assert sorted(seen) == list(range(len(lengths)))


def test_batch_size_is_what_was_given(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = at.load(str(folder), batch_tokens=7)
    sizes: list[int] = []
    rank = ranking.rank_batch

    def seen(model: at.Model, questions: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(questions))
        return rank(model, questions, *rest, **options)

    monkeypatch.setattr(ranking, "rank_batch", seen)
    at.attribute(model, PROMPTS, k=1)
    assert sizes == [1, 1, 1, 1]
    assert at.load(str(folder)).batch_tokens == CHUNK_TOKENS


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "8"])
def test_batch_size_that_is_none_is_refused(folder: Any, size: Any) -> None:
    with pytest.raises(at.AttributionError, match="is no number of tokens; use 1 or more"):
        at.load(str(folder), batch_tokens=size)


def test_accelerator_is_given_a_quarter_of_its_free_memory(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the numbers of one token: the values of all layers, and on the way four FFNs and eight streams."""
    anatomy = model.anatomy
    numbers = anatomy.layers * anatomy.heads * anatomy.head_dim + 4 * anatomy.ffn_neurons + 8 * anatomy.width
    monkeypatch.setattr("attribution.models.model._processor", lambda _: False)
    for free, expected in ((16 * numbers * 50, 50), (2**60, 2**15), (0, 1)):
        monkeypatch.setattr("torch.accelerator.memory.get_memory_info", lambda _, free=free: (free, 2**60))
        assert model.batch_tokens == expected


def _resident() -> int:
    """Return how many bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is known to keep what is freed")
def test_what_long_work_has_freed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_LONG", 0.0)
    with batching.freed_memory_returned():
        pass
    before, small = _resident(), []
    with batching.freed_memory_returned():
        # Below the size at which glibc maps memory by itself, each with something small behind it that stays.
        large = []
        for _ in range(4000):
            large.append(torch.ones(2**14))
            small.append(torch.ones(64))
        grown = _resident() - before
        del large
        kept = _resident() - before
    assert grown > 2e8
    assert kept > grown / 2, "nothing had to be returned"
    assert _resident() - before < grown / 4
