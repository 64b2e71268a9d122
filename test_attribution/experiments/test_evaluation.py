"""The experiment as a table, and the forms in which prompts may be given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attribution as at
from attribution.engine.masks import AblationKind
from attribution.errors import BadInputError
from attribution.records import UNITS

PROMPTS = [
    at.Prompt("The number of legs that a dog has is", " four", "number", "legs", "dog"),
    at.Prompt("A ripe cherry is", " red", "color", "fruit", "cherry"),
    at.Prompt("The capital of France is", " Paris", "capital", "country", "France"),
    at.Prompt("The capital of Italy is", " Rome"),
    at.Prompt("A ripe cherry is", " four"),
]
METRICS = ["rank", "mrr", "prob", "logp"]
COLUMNS = [
    "method",
    "kind",
    "k",
    "prompt",
    "answer",
    "category",
    "fact",
    "distinct",
    *(f"{metric}_before" for metric in METRICS),
    *(f"{metric}_after" for metric in METRICS),
]
WORDS = ("capital", "of", "France", "Italy", "number", "legs", "that", "dog", "has", "ripe", "cherry", "Paris", "four")


def _evaluate(model: at.Model, prompts: list[at.Prompt] = PROMPTS, **options: Any) -> Any:
    return at.evaluate(model, prompts, **{"k": 5, "progress": False, **options})


def _numbers(frame: Any) -> list[float]:
    columns = [f"{metric}_{when}" for metric in ("mrr", "prob", "logp") for when in ("before", "after")]
    return [float(number) for column in columns for number in frame[column]]


def test_one_row_per_prompt_in_the_order_given(model: at.Model) -> None:
    frame = _evaluate(model)
    assert list(frame.columns) == COLUMNS
    assert list(frame["prompt"]) == [prompt.text for prompt in PROMPTS]
    assert list(frame["answer"]) == [prompt.answer for prompt in PROMPTS]
    assert list(frame["category"]) == ["number", "color", "capital", "", ""]
    assert list(frame["fact"]) == [prompt.fact for prompt in PROMPTS]
    assert frame["fact"][2] == "capital/country/France"
    assert set(frame["method"]) == {"log_prob_increase"}
    assert frame["rank_before"].dtype.kind == "i"


def test_before_is_what_the_plain_model_says(model: at.Model, plain_logits: Callable[..., Tensor]) -> None:
    frame = _evaluate(model)
    for row, prompt in enumerate(PROMPTS):
        answer = model.tokenizer.encode(prompt.text + prompt.answer)[-1]
        expected = at.measure(plain_logits(prompt.text), answer)
        assert frame["rank_before"][row] == expected.rank
        assert frame["mrr_before"][row] == 1 / expected.rank
        assert frame["prob_before"][row] == pytest.approx(expected.prob, rel=1e-4)
        assert frame["logp_before"][row] == pytest.approx(expected.logp, abs=1e-4)


def _indices(model: at.Model, records: Sequence[Any], at_source: bool = False) -> int:
    """How many coefficients records stand for, from the records alone."""
    anatomy = model.anatomy
    indices: set[tuple[object, ...]] = set()
    for record in records:
        dims = range(anatomy.head_dim)
        if isinstance(record, at.FFNNeuron):
            indices.add(("ffn", record.layer, record.index))
        elif isinstance(record, at.AttentionNeuron):
            position = record.position if at_source else None
            indices.add(("attention", record.layer, record.head, record.dim, position))
        elif isinstance(record, at.Head):
            indices.update(("attention", record.layer, record.head, dim, None) for dim in dims)
        elif isinstance(record, at.HeadPosition):
            indices.update(("attention", record.layer, record.head, dim, record.position) for dim in dims)
        elif record.kind == "ffn":
            indices.update(("ffn", record.layer, index) for index in range(anatomy.ffn_neurons))
        else:
            indices.update(
                ("attention", record.layer, head, dim, None) for head in range(anatomy.heads) for dim in dims
            )
    return len(indices)


def _assert_after(model: at.Model, frame: Any, neurons: Callable[[at.Prompt], Sequence[Any]], **options: Any) -> None:
    """The frame's outcomes are those of ablating these records with these options."""
    for row, prompt in enumerate(PROMPTS):
        records = neurons(prompt)
        answer = model.tokenizer.encode(prompt.text + prompt.answer)[-1]
        expected = at.measure(at.ablate(model, prompt.text, records, **options), answer)
        assert frame["rank_after"][row] == expected.rank
        assert frame["logp_after"][row] == pytest.approx(expected.logp, abs=1e-4)
        assert frame["distinct"][row] == _indices(model, records, options.get("at_source", False))


@pytest.mark.parametrize("unit", UNITS)
def test_after_is_what_ablating_the_ranked_neurons_gives(model: at.Model, unit: str) -> None:
    frame = _evaluate(model, unit=unit, method="prob_increase", k=3)
    _assert_after(
        model, frame, lambda prompt: at.attribute(model, prompt, unit=unit, method="prob_increase", k=3).neurons
    )
    assert list(frame["logp_after"]) != pytest.approx(list(frame["logp_before"]), abs=1e-3)


@pytest.mark.parametrize("kind", ["mean", "resample"])
@pytest.mark.parametrize("reference", [None, ["A cherry has legs", at.Prompt("The capital", " of"), "The"]])
def test_mean_and_resample_take_their_values_from_the_reference(
    model: at.Model, kind: str, reference: list[str | at.Prompt] | None
) -> None:
    """The evaluated prompts are the reference if none is given."""
    frame = _evaluate(model, kind=kind, reference=reference, seed=4, k={"ffn": 20, "head": 2})
    others = PROMPTS if reference is None else reference

    def best(prompt: at.Prompt) -> list[Any]:
        ffn, heads = (at.attribute(model, prompt, unit=unit, k=k).neurons for unit, k in (("ffn", 20), ("head", 2)))
        return [*ffn, *heads]

    _assert_after(model, frame, best, kind=kind, reference=others, seed=4)
    zero = _evaluate(model, k={"ffn": 20, "head": 2})
    assert list(frame["logp_after"]) != pytest.approx(list(zero["logp_after"]), abs=1e-3)
    assert list(frame["logp_before"]) == pytest.approx(list(zero["logp_before"]), abs=1e-4)


def test_the_donors_follow_the_seed_and_are_the_same_for_all_methods(model: at.Model) -> None:
    frames = [_evaluate(model, kind="resample", seed=seed, k=40) for seed in (0, 0, 1)]
    assert _numbers(frames[0]) == _numbers(frames[1])
    assert list(frames[0]["logp_after"]) != pytest.approx(list(frames[2]["logp_after"]), abs=1e-3)
    # With every neuron ablated, the methods have nothing to differ by.
    both = _evaluate(model, kind="resample", k=3 * 48, method=["log_prob_increase", "random"])
    first, second = (both[both["method"] == name] for name in ("log_prob_increase", "random"))
    assert list(first["logp_after"]) == pytest.approx(list(second["logp_after"]), abs=1e-4)


def test_several_numbers_and_kinds_are_those_measured_one_by_one(model: at.Model) -> None:
    frame = _evaluate(model, k=[5, 1, 20], kind=["zero", "mean"], method=["log_prob_increase", "coefficient"])
    assert len(frame) == 2 * 2 * 3 * len(PROMPTS)
    assert list(frame["k"][: 3 * len(PROMPTS) : len(PROMPTS)]) == [5, 1, 20]
    for (method, kind, k), rows in frame.groupby(["method", "kind", "k"]):
        alone = _evaluate(model, method=method, kind=kind, k=k)
        assert _numbers(rows) == pytest.approx(_numbers(alone), abs=1e-5)
        assert list(rows["prompt"]) == [prompt.text for prompt in PROMPTS]
    mixed = _evaluate(model, k={"ffn": 5, "attention": 3})
    assert set(mixed["k"]) == {8}


def test_a_whole_number_may_be_numpys(model: at.Model) -> None:
    """As pandas hands it out: which of its versions do so differs."""
    three = np.int64(3)
    assert _numbers(_evaluate(model, k=three)) == _numbers(_evaluate(model, k=3))
    assert _numbers(_evaluate(model, k=[three, 5])) == _numbers(_evaluate(model, k=[3, 5]))
    assert at.attribute(model, PROMPTS[2], k=three).neurons == at.attribute(model, PROMPTS[2], k=3).neurons
    assert at.query(model, PROMPTS[2], k=three).neurons == at.query(model, PROMPTS[2], k=3).neurons


def test_attention_neurons_may_be_ablated_at_their_source_alone(model: at.Model) -> None:
    frame = _evaluate(model, unit="attention", k=30, at_source=True)
    _assert_after(
        model, frame, lambda prompt: at.attribute(model, prompt, unit="attention", k=30).neurons, at_source=True
    )
    assert list(frame["distinct"]) == [30] * len(PROMPTS)
    everywhere = _evaluate(model, unit="attention", k=30)
    assert list(frame["logp_after"]) != pytest.approx(list(everywhere["logp_after"]), abs=1e-3)


def test_a_reference_that_cannot_be_used_is_an_error(model: at.Model) -> None:
    with pytest.raises(BadInputError, match="'zero' takes nothing from a reference"):
        _evaluate(model, reference=["The capital of"])
    with pytest.raises(BadInputError, match="'resample' found 1 reference prompts and none that differs"):
        _evaluate(model, PROMPTS[:1], kind="resample")
    # Two answers do not make a prompt another one.
    with pytest.raises(BadInputError, match="none that differs"):
        _evaluate(model, [PROMPTS[1], PROMPTS[4]], kind="resample")
    assert len(_evaluate(model, PROMPTS[:1], kind="mean")) == 1


def test_several_methods_at_once_equal_one_at_a_time(model: at.Model) -> None:
    names = ["log_prob_increase", "coefficient", "random", "reciprocal_rank"]
    together = _evaluate(model, method=names)
    assert list(together["method"]) == [name for name in names for _ in PROMPTS]
    for name in names:
        part = together[together["method"] == name].reset_index(drop=True)
        alone = _evaluate(model, method=name)
        assert list(part["prompt"]) == [prompt.text for prompt in PROMPTS]
        assert list(part["rank_after"]) == list(alone["rank_after"])
        assert _numbers(part) == pytest.approx(_numbers(alone), abs=1e-4)


@pytest.mark.parametrize("kind", AblationKind)
def test_several_forward_passes_give_the_table_of_one(
    model: at.Model, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _evaluate(model, method=["log_prob_increase", "random"], kind=kind)
    monkeypatch.setattr("attribution.models.model.CHUNK_TOKENS", 24)
    parts = _evaluate(model, method=["log_prob_increase", "random"], kind=kind)
    assert list(parts["prompt"]) == list(whole["prompt"])
    assert list(parts["method"]) == list(whole["method"])
    assert _numbers(parts) == pytest.approx(_numbers(whole), abs=1e-4)


def test_k_may_be_given_per_unit(model: at.Model) -> None:
    frame = _evaluate(model, k={"attention": 6, "ffn": 3})
    for row, prompt in enumerate(PROMPTS):
        neurons = [
            *at.attribute(model, prompt, unit="attention", k=6).neurons,
            *at.attribute(model, prompt, unit="ffn", k=3).neurons,
        ]
        answer = model.tokenizer.encode(prompt.text + prompt.answer)[-1]
        expected = at.measure(at.ablate(model, prompt.text, neurons), answer)
        assert frame["logp_after"][row] == pytest.approx(expected.logp, abs=1e-4)
    only_ffn = _evaluate(model, k={"ffn": 3}, unit="attention")
    assert _numbers(only_ffn) == pytest.approx(_numbers(_evaluate(model, k=3)), abs=1e-6)
    assert _numbers(only_ffn) != pytest.approx(_numbers(frame), abs=1e-4)


def test_distinct_counts_attention_neurons_that_share_a_row_once(model: at.Model) -> None:
    everything = 3 * 4 * 8
    tokens = len(model.tokenizer.encode(PROMPTS[1].text))
    frame = _evaluate(model, PROMPTS[1:2], k={"attention": everything * tokens, "ffn": 3})
    assert frame["distinct"][0] == everything + 3


def test_random_neurons_follow_the_seed(model: at.Model) -> None:
    first, again, other = (_evaluate(model, method="random", seed=seed, k=20) for seed in (0, 0, 1))
    assert _numbers(first) == _numbers(again)
    assert list(first["logp_after"]) != list(other["logp_after"])
    assert list(first["logp_before"]) == list(other["logp_before"])


def test_the_seed_changes_no_method_that_draws_nothing(model: at.Model) -> None:
    assert _numbers(_evaluate(model, seed=0)) == _numbers(_evaluate(model, seed=1))


@pytest.mark.parametrize(
    ("options", "terminal", "shown"),
    [({}, True, True), ({}, False, False), ({"progress": True}, False, True), ({"progress": False}, True, False)],
    ids=["on a terminal", "in a log", "forced", "unwanted"],
)
def test_a_progress_bar_is_drawn_on_a_terminal_unless_said_otherwise(
    model: at.Model,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, bool],
    terminal: bool,
    shown: bool,
) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    # The bar is cut at the end of the line, and the name of this model is a long path.
    monkeypatch.setenv("COLUMNS", "1000")
    at.evaluate(model, PROMPTS, k=5, **options)
    output, errors = capsys.readouterr()
    assert output == ""
    if shown:
        assert "5/5" in errors
        assert "log_prob_increase" in errors
    else:
        assert errors == ""


def test_one_prompt_gives_one_ranking_and_a_list_gives_a_list(model: at.Model) -> None:
    text, answer = PROMPTS[2].text, PROMPTS[2].answer
    one = at.attribute(model, text, answer, k=4)
    forms: list[Any] = [
        at.attribute(model, PROMPTS[2], k=4),
        at.attribute(model, [text], [answer], k=4)[0],
        at.attribute(model, [text], answer, k=4)[0],
        at.attribute(model, [PROMPTS[2]], k=4)[0],
        at.attribute(model, replace(PROMPTS[2], answer=" Rome"), answer, k=4),
        at.attribute(model, (text, PROMPTS[0]), (answer, " red"), k=4)[0],
    ]
    for other in forms:
        assert (other.prompt, other.answer, other.neurons) == (one.prompt, one.answer, one.neurons)
        assert other.scores.tolist() == pytest.approx(one.scores.tolist(), abs=1e-5)
    assert len(one) == len(one.neurons) == len(one.scores) == 4
    assert one.scores.dtype == torch.float64


def test_a_list_of_no_prompts_is_an_error(model: at.Model) -> None:
    with pytest.raises(BadInputError, match="list of prompts is empty"):
        at.attribute(model, [])


def test_the_same_prompt_with_two_answers_has_two_rankings(model: at.Model) -> None:
    red, four = at.attribute(model, [PROMPTS[1], PROMPTS[4]], k=5)
    assert (red.answer, four.answer) == (" red", " four")
    assert red.neurons != four.neurons


def test_a_ranking_says_how_many_neurons_it_scored(model: at.Model) -> None:
    ranking = at.attribute(model, PROMPTS[2], k=2)
    assert ranking.exact.scored < ranking.exact.total == 3 * 48
    assert f"{ranking.exact.scored} of 144 scored" in repr(ranking)
    tokens = len(model.tokenizer.encode(PROMPTS[2].text))
    assert at.attribute(model, PROMPTS[2], k=2, unit="attention").exact.total == 3 * 4 * 8 * tokens


def test_a_ranking_as_a_frame_has_one_row_per_neuron(model: at.Model) -> None:
    ranking = at.attribute(model, PROMPTS[2], k=3, method="output_norm")
    frame = ranking.to_frame()
    assert list(frame.columns) == ["layer", "index", "output_norm"]
    assert (list(frame.index), frame.index.name) == ([1, 2, 3], "rank")
    assert [at.FFNNeuron(*pair) for pair in zip(frame["layer"], frame["index"], strict=True)] == ranking.neurons
    assert list(frame["output_norm"]) == ranking.scores.tolist()


def test_a_frame_of_attention_neurons_names_the_token_they_read(model: at.Model) -> None:
    ranking = at.attribute(model, PROMPTS[2], k=12, unit="attention")
    frame = ranking.to_frame()
    assert list(frame.columns) == ["layer", "head", "dim", "position", "token", "log_prob_increase"]
    ids = model.tokenizer.encode(PROMPTS[2].text)
    for position, token in zip(frame["position"], frame["token"], strict=True):
        assert token == model.tokenizer.decode([ids[position]])


def test_known_prompts_are_those_that_plain_logits_pass(model: at.Model, plain_logits: Callable[..., Tensor]) -> None:
    texts = {prompt.text for prompt in PROMPTS} | {"The capital of", "A", "The number of", "The capital of Italy"}
    prompts = [at.Prompt(text, f" {word}", "capital") for text in sorted(texts) for word in WORDS]
    expected = []
    for prompt in prompts:
        logits = plain_logits(prompt.text)
        ids = {word: model.tokenizer.encode(f"{prompt.text} {word}")[-1] for word in WORDS}
        ranked = logits.argsort(descending=True).tolist()
        answer = ids[prompt.answer.strip()]
        best = max(ids.values(), key=lambda token: float(logits[token]))
        if ranked.index(answer) < 10 and answer == best:
            expected.append(prompt)
    assert at.known_prompts(model, prompts, {"capital": WORDS}) == expected
    assert 0 < len(expected) < len(texts)


def test_known_prompts_need_the_words_of_their_category(model: at.Model) -> None:
    with pytest.raises(BadInputError, match=r"'number'.*pass its words"):
        at.known_prompts(model, PROMPTS[:1], {"color": ["red"]})
