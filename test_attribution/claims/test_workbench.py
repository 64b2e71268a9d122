"""What the claims of one model share."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import attribution as at
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.judge import Claim, Status
from attribution.claims.sample import Sample
from attribution.engine.progress import Progress
from attribution.engine.ranking import rank_all
from attribution.experiments.evaluation import run_design
from attribution.models.model import Model
from attribution.prompts.knowledge import Fact, Knowledge

PHRASINGS = ("The capital of {subject} is", "The capital city of {subject} is", "In {subject} the capital is")
KNOWLEDGE = Knowledge(
    tuple(
        Fact("capital", "country_capital", subject, answer, PHRASINGS)
        for subject, answer in (("France", "Paris"), ("Italy", "Rome"))
    ),
    {"capital": ("Paris", "Rome")},
)
CLAIM = Claim("c", "a sentence", "ours", "an effect", "above", 0, "none", min_prompts=300)


@pytest.fixture
def bench(model: Model) -> Workbench:
    """A model that is taken to know everything."""
    return Workbench(Sample(model, KNOWLEDGE, known=KNOWLEDGE.prompts))


def test_model_that_knows_nothing_is_short_of_prompts_not_an_error(model: Model) -> None:
    bench = Workbench(Sample(model, KNOWLEDGE, known=[]))
    frames = bench.frames(("log_prob_increase", "random"), {"ffn": 3})
    effects = frames["random"]["mrr_after"] - frames["log_prob_increase"]["mrr_after"]
    verdict = bench.judge(CLAIM, effects)
    assert (verdict.status, verdict.n, verdict.needed) == (Status.UNDECIDED, 0, 300)
    assert bench.before["mrr"].shape == (0,)


def test_methods_are_judged_on_one_known_prompt_of_each_fact_drawn_by_its_text(bench: Workbench) -> None:
    assert [prompt.subject for prompt in bench.prompts] == ["France", "Italy"]
    for prompt in bench.prompts:
        others = [each.text for each in KNOWLEDGE.prompts if each.subject == prompt.subject]
        assert prompt.text == min(others, key=lambda text: zlib.crc32(text.encode()))
    fewer = Sample(bench.model, KNOWLEDGE, known=KNOWLEDGE.prompts[1:])
    assert [prompt.subject for prompt in fewer.prompts] == ["France", "Italy"]


def test_what_a_model_knows_is_said_by_category(model: Model) -> None:
    facts = at.load_knowledge(categories=["color", "month"]).facts
    chosen = Knowledge(tuple(facts), {"color": ("red",), "month": ("May",)})
    prompts = {name: [each for each in chosen.prompts if each.category == name] for name in chosen.words}
    number = {name: (len(own), len({each.fact for each in own})) for name, own in prompts.items()}
    (colors, of_color), (months, of_month) = number["color"], number["month"]
    sample = Sample(model, chosen, known=[*prompts["month"][:3], prompts["month"][-1]])
    assert sample.in_words() == (
        f"{model.name} knows 4 of {colors + months} prompts, 2 of {of_color + of_month} facts: "
        f"color 0 of {colors} (0 of {of_color}), month 4 of {months} (2 of {of_month})"
    )


def test_what_a_model_knows_is_said_once_it_was_asked(model: Model) -> None:
    said = io.StringIO()
    sample = Sample(model, KNOWLEDGE, progress=Progress(shown=True, stream=said, lines=True))
    assert sample.known == sample.known
    assert said.getvalue() == f"attribution: {sample.in_words()}\n"


def test_a_smaller_run_is_part_of_a_larger_one(model: Model) -> None:
    knowledge = at.load_knowledge(categories=["month"])
    found = {}
    for number in (None, 10, 5):
        sample = Sample(model, knowledge, max_prompts=number, known=knowledge.prompts)
        found[number] = sample.prompts
    assert (len(found[10]), len(found[5])) == (10, 5)
    assert set(found[5]) < set(found[10]) < set(found[None])
    indices = sample.subset(3)
    assert indices == sorted(indices)
    assert len(indices) == 3
    assert sample.subset(99) == list(range(5))


def test_frames_have_one_row_per_prompt_and_number_in_their_order(bench: Workbench) -> None:
    frames = bench.frames(("log_prob_increase", "random"), (1, 3))
    for frame in frames.values():
        assert frame["prompt"].tolist() == 2 * [prompt.text for prompt in bench.prompts]
        assert frame["k"].tolist() == [1, 1, 3, 3]
    assert frames["random"]["mrr_before"].to_numpy()[:2] == pytest.approx(bench.before["mrr"])


def test_what_was_measured_is_not_measured_again(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.frames(("log_prob_increase",), 3)["log_prob_increase"]
    asked = []
    monkeypatch.setattr(
        "attribution.claims.bench.run_design",
        lambda *arguments, **options: (
            asked.append(([*arguments[2].methods], [each["ffn"] for each in arguments[2].budgets], len(arguments[1])))
            or run_design(*arguments, **options)
        ),
    )
    every = len(bench.prompts)
    frames = bench.frames(("random", "log_prob_increase"), 3)
    assert asked.pop() == (["random"], [3], every)
    assert frames["log_prob_increase"].equals(first)
    bench.frames(("random",), 3, kind="mean")
    bench.frames(("random",), 3, seed=1)
    bench.frames(("random",), 4)
    assert asked == [(["random"], [3], every), (["random"], [3], every), (["random"], [4], every)]
    # Of a curve over fewer prompts, what is known from more; of more prompts, what is not known from fewer.
    curve = bench.frames(("log_prob_increase",), (2, 3), number=1)["log_prob_increase"]
    assert asked.pop() == (["log_prob_increase"], [2], 1)
    place = bench.sample.subset(1)
    assert curve[curve["k"] == 3].reset_index(drop=True).equals(first.iloc[place].reset_index(drop=True))
    bench.frames(("log_prob_increase",), 2)
    assert asked.pop() == (["log_prob_increase"], [2], every - 1)


def test_a_measurement_runs_once_for_each_bench_and_arguments(bench: Workbench) -> None:
    ran = []

    @measured_once
    def measure(bench: Workbench, number: int, *, name: str = "") -> int:
        ran.append((number, name))
        return number

    assert [measure(bench, 1), measure(bench, 1), measure(bench, 2), measure(bench, 1, name="other")] == [1, 1, 2, 1]
    assert measure(Workbench(bench.sample), 1) == 1
    assert ran == [(1, ""), (2, ""), (1, "other"), (1, "")]
    with pytest.raises(TypeError, match="unhashable"):
        measure(bench, [1])


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_frames_are_what_evaluate_returns(bench: Workbench, kind: str) -> None:
    methods, budget = ("log_prob_increase", "random"), {"attention": 5, "ffn": 3}
    frames = bench.frames(methods, budget, kind=kind, together=("zero",), seed=4)
    expected = at.evaluate(
        bench.model,
        bench.prompts,
        method=methods,
        k=budget,
        kind=kind,
        reference=None if kind == "zero" else bench.prompts,
        seed=4,
    )
    pd.testing.assert_frame_equal(pd.concat(frames.values(), ignore_index=True), expected)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """For each search how many prompts it was about, and what was wanted."""
    found: list[tuple[int, Any]] = []

    def search(model: Model, questions: Any, wanted: Any, *options: Any, **more: Any) -> Any:
        found.append((len(questions), wanted))
        return rank_all(model, questions, wanted, *options, **more)

    monkeypatch.setattr("attribution.claims.bench.rank_all", search)
    return found


def test_search_for_ffn_neurons_serves_the_deletion_curve(bench: Workbench, searched: list[tuple[int, Any]]) -> None:
    method = "log_prob_increase"
    ten = bench.ranked((method,), {"ffn": 10, "attention": 10}, indices=[0])
    (hundred,) = bench.rankings(method, "ffn", 100, indices=[0])
    assert hundred.neurons[:10] == ten[0][method]["ffn"].neurons
    assert [wanted for number, wanted in searched if number] == [{method: {"ffn": 100, "attention": 10}}]


def test_search_for_fewer_is_not_run_again(
    bench: Workbench, searched: list[tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attribution.claims.bench._DEEP", 1)
    indices, method = [0, 1], "log_prob_increase"
    bench.ranked((method,), {"ffn": 5}, indices=[1])
    assert searched == [(1, {method: {"ffn": 5}})]
    found = bench.ranked((method, "output_norm"), {"ffn": 9, "attention": 4}, indices=indices)
    assert searched[1:] == [
        (2, {method: {"ffn": 9, "attention": 4}, "output_norm": {"ffn": 9, "attention": 4}}),
    ]
    fewer = bench.ranked(("output_norm", method), {"ffn": 3}, indices=indices)
    for k, unit in ((3, "ffn"), (2, "attention"), (9, "ffn")):
        for place, ranking in zip(indices, bench.rankings(method, unit, k, indices=indices), strict=True):
            prompt = bench.prompts[place]
            alone = at.attribute(bench.model, prompt, unit=unit, method=method, k=k)
            assert (ranking.neurons, ranking.tokens) == (alone.neurons, alone.tokens)
            # Two float32 forward passes of batches of other sizes.
            torch.testing.assert_close(ranking.scores, alone.scores, rtol=0, atol=1e-5)
    for own, more in zip(fewer, found, strict=True):
        assert own["output_norm"]["ffn"].neurons == more["output_norm"]["ffn"].neurons[:3]
    assert [number for number, _ in searched if number] == [1, 2]
    bench.ranked((method,), {"ffn": 3}, indices=indices, seed=1)
    assert [number for number, _ in searched if number] == [1, 2, 2]


def test_verdict_carries_what_was_measured_by_prompt(bench: Workbench) -> None:
    verdict = bench.judge(CLAIM, np.array([1.0, 2.0]), baselines=[4.0, 4.0], seed=3, note="cheap")
    assert verdict.evidence is not None
    assert verdict.evidence.prompts == tuple(prompt.text + prompt.answer for prompt in bench.prompts)
    assert verdict.evidence.facts == tuple(prompt.fact for prompt in bench.prompts)
    assert (verdict.evidence.effects, verdict.evidence.baselines) == ((1.0, 2.0), (4.0, 4.0))
    assert (verdict.seed, verdict.note, verdict.effect) == (3, "cheap", 0.375)
    part = bench.judge(CLAIM, [1.0], indices=[1])
    assert part.evidence is not None
    assert part.evidence.facts == ("capital/country_capital/Italy",)


def test_control_asks_every_prompt_with_another_facts_answer(model: Model) -> None:
    swapped = Sample(model, KNOWLEDGE).swapped
    assert [prompt.answer for prompt in swapped] == [" Rome"] * 3 + [" Paris"] * 3
