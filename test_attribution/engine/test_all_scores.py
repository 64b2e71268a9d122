"""All scores by brackets: they hold, and what is asked of them is what float64 alone says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from attribution.engine import all_scores, vectors
from attribution.engine.all_scores import (
    AllScores,
    at_each,
    descending,
    first_vectors_of_each,
    score_all,
    summed_within,
)
from attribution.engine.importance import Candidates, Streams
from attribution.engine.in_float64 import increases
from attribution.engine.methods import METHODS, method_named
from attribution.engine.moments import cumulant, moments_of, summed_cumulants
from attribution.engine.top_k import searched_together, top_k_together
from attribution.engine.vectors import VectorTable
from attribution.models.anatomy import Readout
from attribution.models.norms import Norm
from attribution.records import SUBLAYERS, SublayerKind, Unit

BRACKETED = sorted(name for name, method in METHODS.items() if method.rising is not None)
ROWS, WIDTH, TOKENS = 12, 8, 40


@pytest.fixture(autouse=True)
def _bracket_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_scores, "_WORTH_BRACKETS", 0)
    monkeypatch.setattr(vectors, "_KEPT_NUMBERS", 0)


def _prompts(seed: int, unit: Unit, *, size: float, peaked: float, dtype: torch.dtype, number: int) -> list[Candidates]:
    """Return random candidates of several prompts; two vectors are equal, one is zero, and some coefficients are."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kinds: tuple[SublayerKind, ...] = SUBLAYERS[unit]
    sublayers = tuple(at.Layer(layer, kind) for layer in range(2) for kind in kinds)
    readout = Readout(
        numbers(TOKENS, WIDTH).to(dtype), None, Norm(numbers(WIDTH).to(dtype), None, 1e-5, True), 0.5, None
    )

    def table() -> VectorTable:
        written = [numbers(ROWS, WIDTH) for _ in sublayers]
        written[0][1] = written[0][0]
        written[0][2] = 0
        post_weights = (None, *(numbers(WIDTH).to(dtype) for _ in sublayers[1:]))
        return VectorTable(unit, sublayers, tuple(each.to(dtype) for each in written), post_weights, readout, 1)

    shared = table()
    found = []
    for prompt in range(number):
        own = table() if unit in ("head", "layer") else shared
        index, sublayer_index, row, position = own.indices(1 + prompt if "attention" in kinds else 1)
        coefficient = numbers(len(index)) * size
        coefficient[::7] = 0
        streams = Streams(numbers(len(sublayers), WIDTH) * peaked, torch.tensor(1.3, dtype=torch.float64), readout)
        answer = int(torch.randint(TOKENS, (), generator=generator))
        found.append(
            Candidates(own, index, sublayer_index, row, position, coefficient, streams, answer, len(index), seed=0)
        )
    return found


def _in_float64(candidates: Candidates, name: str) -> torch.Tensor:
    return METHODS[name].score(candidates.afresh())


PROMPTS: Any = {
    "seed": st.integers(0, 10_000),
    "unit": st.sampled_from(["ffn", "attention", "neuron", "head"]),
    "size": st.sampled_from([1e-6, 1e-2, 1.0, 1e2, 1e5]),
    "peaked": st.sampled_from([0.0, 1.0, 30.0]),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    "name": st.sampled_from(BRACKETED),
}


def _scored(seed: int, unit: Unit, size: float, peaked: float, dtype: torch.dtype, name: str) -> list[AllScores]:
    prompts = _prompts(seed, unit, size=size, peaked=peaked, dtype=dtype, number=3)
    return score_all(prompts, method_named(name, unit), with_first_order=True)


@given(**PROMPTS)
def test_no_score_is_outside_its_bracket(name: str, **drawn: Any) -> None:
    for each in _scored(name=name, **drawn):
        truth = _in_float64(each.candidates, name)
        assert ((each.values - truth).abs() <= each.errors + each.tolerance).all()
        if each.first_order is not None:
            terms = METHODS[name].first_order
            assert terms is not None
            assert (each.first_order - terms(each.candidates)).abs().max() <= each.tolerance


@given(**PROMPTS, error=st.sampled_from([0.0, 1e-9, 1e-4]))
def test_brackets_close_as_far_as_asked(error: float, name: str, **drawn: Any) -> None:
    for each, other in zip(_scored(name=name, **drawn), _scored(name=name, **drawn), strict=True):
        truth = _in_float64(each.candidates, name)
        assert (each.within(error) - truth).abs().max() <= error + each.tolerance
        assert float(other.errors.sum()) == pytest.approx(0) or other.closed < len(truth)
        total = summed_within([other], error)[0].sum()
        assert abs(float(total - truth.sum())) <= error + len(truth) * each.tolerance


@given(**PROMPTS)
def test_orders_and_ranks_are_those_of_float64(name: str, **drawn: Any) -> None:
    others = _scored(name=name, **drawn)
    last = len(others[0].values) - 1
    # Other ranks of every prompt.
    ranks = [[number, number + 1, 5, last // 2, last] for number in range(len(others))]
    together = at_each(others, ranks)
    for each, own, found in zip(_scored(name=name, **drawn), ranks, together, strict=True):
        right = descending(_in_float64(each.candidates, name), each.tolerance)
        assert torch.equal(each.order(), right)
        assert torch.equal(found, right[own])


@given(**PROMPTS)
def test_the_first_vectors_are_those_that_come_up_first(name: str, **drawn: Any) -> None:
    numbers = [1, 3, ROWS, 2 * ROWS + 5]
    every = _scored(name=name, **drawn)
    for each, firsts in zip(every, first_vectors_of_each(every, numbers), strict=True):
        scores = _in_float64(each.candidates, name)
        best: dict[int, float] = {}
        for vector, score in zip(each.candidates.vector.tolist(), scores.tolist(), strict=True):
            best[vector] = max(score, best.get(vector, -float("inf")))
        order = descending(torch.tensor([best[vector] for vector in sorted(best)], dtype=torch.float64), each.tolerance)
        for number, found in zip(numbers, firsts, strict=True):
            assert set(found.tolist()) == set(order[:number].tolist())


def test_a_method_that_is_no_rising_function_of_importance_is_scored_as_it_is() -> None:
    (candidates,) = _prompts(0, "ffn", size=1.0, peaked=1.0, dtype=torch.float32, number=1)
    (found,) = score_all([candidates], METHODS["output_norm"])
    assert torch.equal(found.values, METHODS["output_norm"].score(candidates))
    assert not found.errors.any()


@pytest.mark.parametrize("bracketed", [True, False])
@pytest.mark.parametrize("unit", ["ffn", "layer"])
def test_scores_of_many_prompts_keep_no_distributions(
    unit: Unit, bracketed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax for each sublayer and prompt would fill memory: 24 MB a prompt of SmolLM2."""
    if not bracketed:
        monkeypatch.setattr(all_scores, "_WORTH_BRACKETS", 2**40)
    found = _prompts(3, unit, size=1.0, peaked=1.0, dtype=torch.float32, number=3)
    for scores, own in zip(score_all(found, METHODS["log_prob_increase"]), found, strict=True):
        scores.order()
        assert scores.candidates is own
        assert not {"log_probs", "probs", "update"} & {*vars(own), *vars(own.streams)}


@given(**PROMPTS)
def test_importances_in_one_pass_are_those_of_eq_13(name: str, **drawn: Any) -> None:
    """Heads and neurons of several prompts, for their own answers and another one."""
    rising = METHODS[name].rising
    assert rising is not None
    drawn = {key: value for key, value in drawn.items() if key != "name"}
    prompts = _prompts(**drawn, number=3)
    asked = [[each, replace(each, answer=(each.answer + 1) % TOKENS)] for each in prompts]
    asked[1] = [asked[1][1].take(torch.tensor([3, 1, 1]))]
    for own, found in zip(asked, increases(asked, uniform=rising.uniform), strict=True):
        for each, (increase, log_prob) in zip(own, found, strict=True):
            truth = _in_float64(each, name)
            assert ((rising.score(increase, log_prob) - truth).abs() <= each.tolerance).all()


def test_small_updates_need_no_float64() -> None:
    prompts = _prompts(3, "ffn", size=1e-3, peaked=1.0, dtype=torch.float32, number=4)
    for each in score_all(prompts, METHODS["log_prob_increase"]):
        assert float(each.errors.max()) < 1e-7
        each.at([0])
        assert each.closed < len(each.values)


@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-4, 1e-2, 0.3]))
def test_both_ways_to_a_cumulant_agree(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors_, unembedding = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (5, 50))
    probs = torch.randn(2, 50, generator=generator, dtype=torch.float64).softmax(1)
    rows, coefficient = torch.arange(5), torch.full((5,), size, dtype=torch.float64)
    slip = torch.zeros(5, dtype=torch.float64)
    moments = moments_of(vectors_, unembedding, probs)
    logits = vectors_ @ unembedding.T
    for column, own in enumerate(probs):
        most = own.max()
        means = logits @ own
        truth = (own.log() + size * (logits - means[:, None])).logsumexp(-1)
        value, remainder, rounding = cumulant(moments, rows, column, coefficient, slip, most)
        assert ((value - truth).abs() <= remainder + rounding + 1e-13).all()
        value, error = summed_cumulants(
            vectors_,
            unembedding,
            probs,
            vector=rows,
            state=torch.full_like(rows, column),
            mean=means,
            coefficient=coefficient,
            slip=slip,
            most=most.expand(5),
        )
        assert ((value - truth).abs() <= error + 1e-13).all()


@pytest.mark.parametrize("unit", ["ffn", "attention", "neuron", "head", "head_position", "layer"])
@pytest.mark.parametrize("name", BRACKETED)
def test_a_model_is_ranked_as_by_float64_alone(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, unit: Any, name: str
) -> None:
    prompts, answers = ["The capital of France is", "The capital of Italy is"], [" Paris", " Rome"]
    model = at.load(loaded("llama").source)
    by_brackets = at.attribute(model, prompts, answers, unit=unit, method=name, k=None)
    monkeypatch.setattr(all_scores, "_WORTH_BRACKETS", 2**62)
    model = at.load(loaded("llama").source)
    for one, other in zip(
        by_brackets, at.attribute(model, prompts, answers, unit=unit, method=name, k=None), strict=True
    ):
        assert one.neurons == other.neurons
        assert (one.scores - other.scores).abs().max() <= one.exact.error + one.exact.tolerance
        if other.first_order is not None and one.first_order is not None:
            assert (one.first_order - other.first_order).abs().max() <= one.exact.tolerance


@given(**PROMPTS, k=st.sampled_from([1, 3, 10, 2 * ROWS - 1]))
def test_searches_that_share_a_product_find_what_float64_finds(k: int, name: str, **drawn: Any) -> None:
    seed, unit, size, peaked, dtype = (drawn[each] for each in ("seed", "unit", "size", "peaked", "dtype"))
    prompts = _prompts(seed, unit, size=size, peaked=peaked, dtype=dtype, number=3)
    method = method_named(name, unit)
    assert searched_together(prompts, method, k) == (unit != "head")
    for found, own in zip(top_k_together(prompts, method, k, with_first_order=True), prompts, strict=True):
        scores = _in_float64(own, name)
        right = descending(scores, own.tolerance)[:k]
        assert torch.equal(found.indices, right)
        assert ((found.scores - scores[right]).abs() <= found.certificate.error + own.tolerance).all()
        assert found.certificate.slack > own.tolerance
        if found.first_order is not None:
            terms = METHODS[name].first_order
            assert terms is not None
            assert (found.first_order - terms(own)[right]).abs().max() <= own.tolerance
    for exact, own in zip(top_k_together(prompts, method, k, exact_scores=True), prompts, strict=True):
        scores = _in_float64(own, name)[exact.indices]
        assert (exact.scores - scores).abs().max() <= own.tolerance
        assert exact.certificate.error == 0


def test_a_search_looks_at_few() -> None:
    prompts = _prompts(1, "ffn", size=0.1, peaked=1.0, dtype=torch.float32, number=4)
    for found in top_k_together(prompts, METHODS["log_prob_increase"], 1):
        assert found.certificate.scored < found.certificate.total
        assert found.certificate.error < 1e-5
