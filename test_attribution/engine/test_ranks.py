"""Ranks: brackets hold for those of float64, counted ones are those, and the methods that use them stay as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attribution as at
from attribution.engine import vectors
from attribution.engine.projection import before_softmax, direction_of
from attribution.engine.ranks import Levels, bracketed, counted, kept_ranks, levels_of, ranks_of
from attribution.engine.vectors import VectorTable
from attribution.models.anatomy import Readout
from attribution.models.norms import Norm

PROMPT, ANSWER = "The capital of France is", " Paris"
ONE = torch.ones((), dtype=torch.float64)


def _readout(tokens: int, width: int, seed: int, *, centred: bool, scale: float) -> Readout:
    generator = torch.Generator().manual_seed(seed)
    unembedding = torch.randn(tokens, width, generator=generator)
    # Tokens that nobody trained are often all alike; others differ in the last digit.
    unembedding[tokens // 2 :: 3] = unembedding[tokens // 2].clone()
    unembedding[1] = unembedding[0] * (1 + 1e-7)
    weight = torch.rand(width, generator=generator) + 0.5
    return Readout(unembedding, None, Norm(weight, None, 1e-5, centred), scale, None)


def _truth(written: Tensor, answer: int, readout: Readout) -> Tensor:
    """Ranks in float64, of equal tokens as equal."""
    logits = before_softmax(written.double(), ONE, readout)
    rows = readout.unembedding
    alike = (rows == rows[answer]).all(-1)
    logits[:, alike] = logits[:, answer, None]
    return 1 + (logits > logits[:, answer, None]).sum(-1)


def _reach(written: Tensor, readout: Readout) -> Tensor:
    longest = (readout.unembedding.double() * readout.norm.weight.double()).norm(dim=-1).max() * abs(
        readout.logit_scale
    )
    return 8 * written.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * longest * written.double().norm(dim=-1)


@given(
    tokens=st.integers(4, 300),
    width=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    centred=st.booleans(),
    scale=st.sampled_from([1.0, 0.0625, -2.0]),
    size=st.sampled_from([1e-20, 1.0, 1e8]),
    data=st.data(),
)
def test_brackets_hold_and_counts_are_the_ranks_of_float64(
    tokens: int, width: int, seed: int, centred: bool, scale: float, size: float, data: st.DataObject
) -> None:
    readout = _readout(tokens, width, seed, centred=centred, scale=scale)
    answer = data.draw(st.integers(0, tokens - 1))
    written = torch.randn(7, width, generator=torch.Generator().manual_seed(seed + 1)) * size
    written[0] = 0
    truth, reach = _truth(written, answer, readout), _reach(written, readout)
    own = written @ direction_of(readout, answer).float()
    least, largest = bracketed(Levels(ranks_of(readout), levels_of(written, readout)), own, reach)
    assert (least <= truth).all()
    assert (truth <= largest).all()
    assert torch.equal(counted(written.double(), answer, readout, torch.float32, reach), truth)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 1000, 49152, 262144])
def test_kept_ranks_rise_from_the_first_to_the_last_by_one_or_about_a_fifth_of_themselves(vocabulary: int) -> None:
    ranks = kept_ranks(vocabulary)
    assert (ranks[0], ranks[-1]) == (1, vocabulary)
    for low, high in itertools.pairwise(ranks):
        assert low < high <= max(low + 1, 1.25 * low)


def test_brackets_are_narrow_where_logits_are_apart() -> None:
    readout = _readout(300, 24, 0, centred=False, scale=1.0)
    readout = replace(readout, unembedding=torch.randn(300, 24, generator=torch.Generator().manual_seed(5)))
    written = torch.randn(50, 24, generator=torch.Generator().manual_seed(6))
    least, largest = bracketed(
        Levels(ranks_of(readout), levels_of(written, readout)),
        written @ direction_of(readout, 9).float(),
        _reach(written, readout),
    )
    # Of one bracket, or of two where rounding leaves it open.
    assert (largest <= torch.maximum(least + 2, least * 1.5)).all()
    # The first ranks are all kept, so an answer among them is told exactly.
    truth = _truth(written, 9, readout)
    assert torch.equal(least[truth < 8], truth[truth < 8])
    assert torch.equal(largest[truth < 8], truth[truth < 8])
    assert (truth < 8).any()


@pytest.mark.parametrize("unit", ["ffn", "attention", "neuron"])
@pytest.mark.parametrize("method", ["reciprocal_rank", "coefficient_by_rank"])
def test_a_large_model_ranks_as_one_whose_logits_are_kept(
    loaded: Callable[[str], at.Model], monkeypatch: pytest.MonkeyPatch, unit: Any, method: str
) -> None:
    kept = at.load(loaded("llama").source)
    whole = at.attribute(kept, PROMPT, ANSWER, unit=unit, method=method, k=None)
    monkeypatch.setattr(vectors, "_KEPT_NUMBERS", 0)
    large = at.load(loaded("llama").source)
    assert not VectorTable.of(unit, large.anatomy).keeps_logits
    every = at.attribute(large, PROMPT, ANSWER, unit=unit, method=method, k=None)
    assert every.neurons == whole.neurons
    assert torch.equal(every.scores, whole.scores)
    few = at.attribute(large, PROMPT, ANSWER, unit=unit, method=method, k=7)
    assert few.neurons == whole.neurons[:7]
    assert torch.equal(few.scores, whole.scores[:7])
    assert few.exact.scored < few.exact.total
