"""What claims on query neurons, specificity and sufficiency measure: each number a second way, each made to fail."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from attribution.claims.about_methods import query_neurons, specificity, sufficiency, top_neurons
from attribution.claims.about_methods.common import METHOD
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status, Verdict, decide
from attribution.claims.sample import Sample
from attribution.engine.all_scores import first_vectors_of_each
from attribution.engine.methods import METHODS, Method
from attribution.engine.metrics import Outcome
from attribution.experiments.edited_copies import zeroed_parameters
from attribution.models.registry import METHOD_FAMILIES
from attribution.prompts.knowledge import CATEGORIES, Knowledge, Prompt
from attribution.records import AttentionNeuron, Component, FFNNeuron

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

Claimed = Callable[[Workbench, str], Verdict]

ON_QUERIES, ON_FACTS, ON_KEPT = (module(f"test_{name}") for name in ("query_neurons", "specificity", "sufficiency"))
QUERIES_AND_RANDOM = ON_QUERIES.test_zeroing_query_neurons_hurts_more_than_zeroing_random_ones
QUERIES_AND_LAYERS = ON_QUERIES.test_query_neurons_beside_others_of_the_same_layers
QUERIES_CUT = ON_QUERIES.test_what_query_neurons_take_beside_the_papers
RANDOM_HAVE_NO_EFFECT = ON_QUERIES.test_zeroing_as_many_random_ffn_neurons_has_no_effect
HURT_THEIR_FACT = ON_FACTS.test_zeroing_a_facts_neurons_hurts_it_more_than_an_unrelated_fact
OTHERS_STAY = ON_FACTS.test_zeroing_a_facts_neurons_leaves_unrelated_facts_alone
HURT_THEIR_CATEGORY = ON_FACTS.test_zeroing_the_heads_of_a_category_hurts_it_more_than_zeroing_unrelated_ones
RELATED_HEADS = ON_FACTS.test_what_heads_of_related_categories_take_beside_the_papers
KEEP_MORE = ON_KEPT.test_keeping_the_top_neurons_keeps_more_than_keeping_random_ones
SHARES_KEEP = ON_KEPT.test_what_each_share_of_the_neurons_keeps

PROMPTS = [
    *(
        Prompt(f"The capital of {name} is", answer, "capital", "r", name)
        for name, answer in (("France", " Paris"), ("Italy", " Rome"), ("legs", " Paris"))
    ),
    *(Prompt(f"{name} is the capital of", " France", "country", "r", name) for name in ("Paris", "Rome")),
    *(Prompt(f"A ripe {name} is", " red", "color", "r", name) for name in ("cherry", "dog", "number")),
    *(Prompt(f"The number of legs that a {name} has is", " four", "number", "r", name) for name in ("dog", "cherry")),
]
# More than 10 FFN neurons: the top 10 are a part of them.
BUDGET = {"attention": 20, "ffn": 12}
OTHER = "output_norm"
# Logits of size up to about 30 in float32, summed in another order over some hundred terms: 30 * eps * sqrt(300) is
# 6e-5 nats.
ROUNDING = 1e-4
# Every claim of the three files, as a function of workbench and method.
CLAIMS: dict[str, Claimed] = {
    f"{name} {value}": lambda bench, method, test=test, asked=asked: verdict_of(
        test, bench, attribution_method=method, **asked
    )
    for name, test, parameter, values in (
        ("query neurons and random ones", QUERIES_AND_RANDOM, "metric", ("mrr", "prob", "logp")),
        ("query neurons and others of their layers", QUERIES_AND_LAYERS, "metric", ("mrr", "prob", "logp")),
        ("query neurons cut", QUERIES_CUT, "metric", ("mrr", "prob")),
        ("neurons hurt their fact", HURT_THEIR_FACT, "chosen", ON_FACTS.SETS),
        ("unrelated facts stay", OTHERS_STAY, "chosen", ON_FACTS.VALUE_SETS),
        ("heads hurt their category", HURT_THEIR_CATEGORY, "metric", ("mrr", "logp")),
        ("heads of related categories", RELATED_HEADS, "metric", ("mrr", "prob")),
        ("top neurons keep more than random ones", KEEP_MORE, "metric", ("mrr", "prob", "logp")),
        ("top neurons keep their share", SHARES_KEEP, "metric", ("mrr", "prob")),
    )
    for value in values
    for asked in ({parameter: value},)
}
CLAIMS["random"] = lambda bench, method: verdict_of(
    RANDOM_HAVE_NO_EFFECT, bench, attribution_method=method, metric="mrr", seed=0
)


def _bench(model: at.Model, prompts: Sequence[Prompt]) -> Workbench:
    return Workbench(Sample(model, Knowledge((), {}), known=prompts))


@pytest.fixture
def bench(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A tiny model that is taken to know ten facts of four categories, with a budget of its size."""
    from attribution.models.registry import entry_of

    monkeypatch.setattr("attribution.claims.bench.entry_of", lambda name: replace(entry_of(name), value_neurons=BUDGET))
    return _bench(model, PROMPTS)


@pytest.fixture(scope="module")
def trained() -> at.Model:
    return at.load("bundled:gpt2")


@pytest.fixture
def trained_bench(trained: at.Model) -> Workbench:
    """A bundled model with facts of every category, which it is taken to know: two are of related categories."""
    drawn = [
        prompt
        for category, number in zip(("country", "capital", "color", "number", "month"), (4, 4, 4, 4, 4), strict=True)
        for prompt in at.load_knowledge(categories=[category]).prompts[: 3 * number : 3]
    ]
    return _bench(trained, drawn)


def _status(verdict: Verdict) -> Status:
    """The verdict on as many prompts as there are, however few."""
    return decide(verdict.claim, verdict.low, verdict.high)


def _outcome_without(bench: Workbench, place: int, neurons: Sequence[Component]) -> Outcome:
    """What is left of an answer when weights are edited, as in the paper, instead of activations."""
    with zeroed_parameters(bench.model, list(neurons)) as edited:
        logits = at.ablate(edited, bench.prompts[place].text, [])
    return at.measure(logits, bench.sample.questions[place].answer_id)


def _effects(verdict: Verdict) -> list[float]:
    assert verdict.evidence is not None
    return list(verdict.evidence.effects)


# Query neurons


def _best(bench: Workbench, place: int, unit: str, k: int, method: str = METHOD) -> at.Ranking:
    return at.attribute(bench.model, bench.prompts[place], unit=unit, method=method, k=k)


def _queries(bench: Workbench, place: int, method: str = METHOD) -> list[FFNNeuron]:
    prompt = bench.prompts[place]
    values = _best(bench, place, "attention", BUDGET["attention"], method)
    return at.query(bench.model, prompt, value_neurons=values, k=7).neurons


# The judged method decides which value neurons are activated.
@pytest.mark.parametrize(("metric", "method"), [("mrr", METHOD), ("prob", METHOD), ("logp", METHOD), ("logp", OTHER)])
def test_query_neurons_are_compared_with_random_ones_by_what_edited_weights_leave(
    bench: Workbench, metric: str, method: str
) -> None:
    assert query_neurons.query_budget(bench) == 7, "5% of 3 layers of 48"
    verdict = verdict_of(QUERIES_AND_RANDOM, bench, attribution_method=method, metric=metric)
    expected = []
    for place in range(len(PROMPTS)):
        drawn = _best(bench, place, "ffn", 7, "random").neurons
        left = [_outcome_without(bench, place, neurons) for neurons in (drawn, _queries(bench, place, method))]
        expected.append(getattr(left[0], metric) - getattr(left[1], metric))
    assert _effects(verdict) == pytest.approx(expected, abs=ROUNDING)
    assert np.ptp(expected) > 100 * ROUNDING
    assert (verdict.n, verdict.status) == (len(PROMPTS), Status.UNDECIDED), "ten prompts decide nothing"


@pytest.mark.parametrize("metric", ["mrr", "prob"])
def test_what_query_neurons_cut_is_a_share_of_the_plain_models_mean(bench: Workbench, metric: str) -> None:
    verdict = verdict_of(QUERIES_CUT, bench, metric=metric)
    before = [getattr(_outcome_without(bench, place, []), metric) for place in range(len(PROMPTS))]
    after = [getattr(_outcome_without(bench, place, _queries(bench, place)), metric) for place in range(len(PROMPTS))]
    assert verdict.effect == pytest.approx(1 - sum(after) / sum(before), abs=ROUNDING)
    assert verdict.claim.threshold == {"mrr": 0.78, "prob": 0.88}[metric]


def test_random_ffn_neurons_are_those_that_query_neurons_are_compared_with(bench: Workbench) -> None:
    verdict = verdict_of(RANDOM_HAVE_NO_EFFECT, bench, metric="prob", seed=0)
    before, after = [], []
    for place in range(len(PROMPTS)):
        before.append(_outcome_without(bench, place, []).prob)
        after.append(_outcome_without(bench, place, _best(bench, place, "ffn", 7, "random").neurons).prob)
    assert verdict.effect == pytest.approx(1 - sum(after) / sum(before), abs=ROUNDING)
    other = verdict_of(RANDOM_HAVE_NO_EFFECT, bench, metric="prob", seed=1)
    assert _effects(other) != pytest.approx(_effects(verdict), abs=ROUNDING)


def test_controls_of_the_same_layers_are_others_and_as_many_of_each(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[Component]]] = []
    outcomes = query_neurons.outcomes
    monkeypatch.setattr(
        query_neurons,
        "outcomes",
        lambda model, asked, neurons, **_: seen.append(neurons) or outcomes(model, asked, neurons),
    )
    verdict_of(QUERIES_AND_LAYERS, bench, metric="logp")
    chosen, controls = seen
    assert chosen == [_queries(bench, place) for place in range(len(PROMPTS))]
    for own, others in zip(chosen, controls, strict=True):
        assert not set(own) & set(others)
        assert len(set(others)) == len(others) == 7
        assert Counter(neuron.layer for neuron in own) == Counter(neuron.layer for neuron in others)


def test_large_models_lose_the_papers_thousand_query_neurons() -> None:
    large = SimpleNamespace(model=SimpleNamespace(anatomy=SimpleNamespace(layers=36, ffn_neurons=5120)))
    assert query_neurons.query_budget(large) == 1000  # type: ignore[arg-type]


def test_claims_on_query_neurons_fail_with_neurons_that_wake_nothing(
    trained_bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = trained_bench
    judged = {
        "random": lambda each: verdict_of(QUERIES_AND_RANDOM, each, metric="logp"),
        "same layers": lambda each: verdict_of(QUERIES_AND_LAYERS, each, metric="logp"),
        "cut": lambda each: verdict_of(QUERIES_CUT, each, metric="mrr"),
    }
    assert [_status(judge(bench)) for judge in judged.values()][:2] == [Status.SUPPORTED] * 2
    rng = np.random.default_rng(0)

    def blind(model: at.Model, prompts: list[Prompt], value_neurons: object, k: int) -> list[Any]:
        draws = [rng.permutation(8 * 256)[:k].tolist() for _ in prompts]
        return [SimpleNamespace(neurons=[FFNNeuron(*divmod(neuron, 256)) for neuron in draw]) for draw in draws]

    monkeypatch.setattr(query_neurons, "query", blind)
    broken = {name: _status(judge(_bench(bench.model, bench.sample.known))) for name, judge in judged.items()}
    assert broken["random"] is not Status.SUPPORTED
    assert broken["same layers"] is not Status.SUPPORTED
    assert broken["cut"] is Status.REFUTED


def test_random_neurons_that_are_not_random_are_found_to_have_an_effect(
    trained_bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few prompts show the absence of large effects only.
    monkeypatch.setattr(ON_QUERIES, "MARGIN", 0.4)

    def judged(bench: Workbench) -> Verdict:
        return verdict_of(RANDOM_HAVE_NO_EFFECT, bench, metric="prob", seed=0)

    assert _status(judged(trained_bench)) is Status.SUPPORTED
    monkeypatch.setitem(METHODS, "random", replace(METHODS[METHOD], name="random"))
    fresh = _bench(trained_bench.model, trained_bench.sample.known)
    assert _status(judged(fresh)) is not Status.SUPPORTED


# Facts


@given(st.lists(st.sampled_from(CATEGORIES), max_size=40), st.integers(0, 3))
def test_every_fact_is_paired_with_an_unrelated_one_of_its_own(categories: list[str], seed: int) -> None:
    pairs = specificity.unrelated(categories, seed)
    assert set(pairs) == set(pairs.values())
    assert not any(specificity.are_related(categories[one], categories[other]) for one, other in pairs.items())
    groups = Counter("related" if each in ("language", "capital", "country") else each for each in categories)
    largest = max(groups.values(), default=0)
    assert len(pairs) == min(len(categories), 2 * (len(categories) - largest))
    assert specificity.unrelated(categories, seed) == pairs


def test_related_categories_are_those_of_the_papers_table() -> None:
    pairs = itertools.combinations(sorted(CATEGORIES), 2)
    related = {pair for pair in pairs if specificity.are_related(*pair)}
    assert related == {("capital", "country"), ("capital", "language"), ("country", "language")}
    assert all(specificity.are_related(one, one) for one in CATEGORIES)


@pytest.mark.parametrize("method", [METHOD, OTHER])
@pytest.mark.parametrize(("chosen", "numbers"), [("top 10", {"ffn": 10}), ("value neurons", BUDGET)], ids=str)
def test_a_prompt_is_compared_with_itself_without_the_neurons_of_its_partner(
    bench: Workbench, chosen: str, numbers: dict[str, int], method: str
) -> None:
    pairs = specificity.unrelated([prompt.category for prompt in bench.prompts])
    assert len(pairs) == len(PROMPTS)

    def left(place: int, giver: int) -> Outcome:
        neurons = [neuron for unit, k in numbers.items() for neuron in _best(bench, giver, unit, k, method).neurons]
        return _outcome_without(bench, place, neurons)

    own = [left(place, place) for place in range(len(PROMPTS))]
    partners = [left(place, pairs[place]) for place in range(len(PROMPTS))]
    hurt = verdict_of(HURT_THEIR_FACT, bench, attribution_method=method, chosen=chosen)
    assert _effects(hurt) == pytest.approx(
        [two.logp - one.logp for one, two in zip(own, partners, strict=True)], abs=ROUNDING
    )
    before = [_outcome_without(bench, place, []).mrr for place in range(len(PROMPTS))]
    stay = verdict_of(OTHERS_STAY, bench, attribution_method=method, chosen=chosen)
    assert stay.effect == pytest.approx(1 - sum(each.mrr for each in partners) / sum(before), abs=ROUNDING)
    fall = 1 - sum(each.mrr for each in own) / sum(before)
    assert stay.note == f"their own fact's falls by {fall:.0%}"


@pytest.mark.parametrize("chosen", ON_FACTS.SETS)
def test_claims_on_facts_fail_with_neurons_that_are_not_specific(
    trained_bench: Workbench, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    intact = verdict_of(HURT_THEIR_FACT, trained_bench, chosen=chosen)
    assert _status(intact) is Status.SUPPORTED
    # What is said to be a stranger's is a prompt's own: the same neurons on either side.
    monkeypatch.setattr(specificity, "unrelated", lambda of, *_: {place: place for place in range(len(of))})
    fresh = _bench(trained_bench.model, trained_bench.sample.known)
    assert _status(verdict_of(HURT_THEIR_FACT, fresh, chosen=chosen)) is Status.REFUTED
    if chosen == "value neurons":
        assert _status(verdict_of(OTHERS_STAY, fresh, chosen=chosen)) is Status.REFUTED


# Heads


def _scores_of_heads(seed: int, prompts: int, heads: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=(prompts, heads))


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=12), st.integers(0, 5))
def test_a_prompt_has_no_say_in_the_heads_that_it_is_judged_by(categories: list[str], seed: int) -> None:
    scores = _scores_of_heads(seed, len(categories), 6)
    chosen = specificity.chosen_heads(scores, categories, 2, seed)
    for place in range(len(categories)):
        moved = scores.copy()
        moved[place] = -scores[place] * 100
        assert specificity.chosen_heads(moved, categories, 2, seed)[place] == chosen[place]
    # Halves of equal size, up to one: a category of two prompts is on either side of every prompt's choice.
    several = {category for category, number in Counter(categories).items() if number > 1}
    assert all(several <= set(own) for own in chosen)


def test_heads_are_those_of_the_largest_mean_score_in_the_other_half() -> None:
    categories = ["a"] * 4 + ["b"] * 4
    scores = _scores_of_heads(0, 8, 5)
    for place, own in enumerate(specificity.chosen_heads(scores, categories, 2)):
        for category, rows in (("a", range(4)), ("b", range(4, 8))):
            # The other half of a category is any two of its four prompts, without the prompt itself.
            halves = [(one, two) for one in rows for two in rows if one < two and place not in (one, two)]
            expected = [np.argsort(-(scores[one] + scores[two]))[:2].tolist() for one, two in halves]
            assert own[category] in expected
    tied = specificity.chosen_heads(np.ones((8, 5)), categories, 2)
    assert all(own == {"a": [0, 1], "b": [0, 1]} for own in tied)


def test_scores_of_heads_are_those_of_their_ranking(bench: Workbench) -> None:
    scores = bench.scores(METHOD, "head", [bench.sample.questions[place] for place in (0, 3)])
    for row, place in enumerate((0, 3)):
        ranking = _best(bench, place, "head", 12)
        for head, score in zip(ranking.neurons, ranking.scores.tolist(), strict=True):
            assert scores[row, head.layer * 4 + head.head] == pytest.approx(score, abs=ROUNDING)


def _known_heads(monkeypatch: pytest.MonkeyPatch, bench: Workbench, left: dict[str, float], shift: int = 0) -> None:
    """Make head c that of category c, and what is left without a head known by whose it is."""
    names = list(dict.fromkeys(prompt.category for prompt in bench.prompts))
    category_of = {prompt.text: prompt.category for prompt in bench.prompts}
    heads = bench.model.anatomy.heads

    def scores(bench: Workbench, method: str, unit: str, questions: list[Any]) -> Any:
        best = [(names.index(category_of[question.text]) + shift) % len(names) for question in questions]
        return np.eye(12)[best]

    def outcomes(model: at.Model, questions: list[Any], variants: list[list[Any]], progress: Any) -> Any:
        found = []
        for question, (head,) in zip(questions, variants, strict=True):
            own, other = category_of[question.text], names[head.layer * heads + head.head]
            kind = "own" if own == other else "related" if {own, other} == {"capital", "country"} else "unrelated"
            found.append(Outcome(1, left[kind], left[kind], left[kind]))
        return found, []

    monkeypatch.setattr(Workbench, "scores", scores)
    monkeypatch.setattr(specificity, "outcomes", outcomes)
    bench.before = {metric: np.ones(len(bench.prompts)) for metric in ("mrr", "prob", "logp")}


def test_heads_of_a_category_are_compared_with_those_of_unrelated_ones_only(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _known_heads(monkeypatch, bench, {"own": 0.125, "related": 0.25, "unrelated": 0.75})
    for metric in ("mrr", "logp"):
        verdict = verdict_of(HURT_THEIR_CATEGORY, bench, metric=metric)
        assert _effects(verdict) == pytest.approx([0.625] * len(PROMPTS))
        assert _status(verdict) is Status.SUPPORTED
    verdict = verdict_of(RELATED_HEADS, bench, metric="prob")
    assert verdict.effect == 0.5
    assert verdict.n == 5, "three capitals and two countries"
    assert verdict.note.startswith("cuts own 88%, related 75%, unrelated 25%;")
    assert verdict.note.endswith("4 different sets of heads")


def test_claims_on_heads_fail_with_the_heads_of_another_category(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two on: capital has the heads of color, country those of number, and the other way round.
    _known_heads(monkeypatch, bench, {"own": 0.125, "related": 0.125, "unrelated": 0.75}, shift=2)
    assert _status(verdict_of(HURT_THEIR_CATEGORY, bench, metric="mrr")) is Status.REFUTED
    assert _status(verdict_of(RELATED_HEADS, bench, metric="mrr")) is Status.REFUTED


def test_zeroed_heads_leave_what_edited_weights_leave(bench: Workbench) -> None:
    verdict = verdict_of(HURT_THEIR_CATEGORY, bench, metric="logp")
    scores = np.stack(
        [
            [
                dict(zip(ranking.neurons, ranking.scores.tolist(), strict=True))[at.Head(*divmod(head, 4))]
                for head in range(12)
            ]
            for ranking in (_best(bench, place, "head", 12) for place in range(len(PROMPTS)))
        ]
    )
    categories = [prompt.category for prompt in bench.prompts]
    expected = []
    for place, chosen in enumerate(specificity.chosen_heads(scores, categories, 1)):
        left = {
            name: _outcome_without(bench, place, [at.Head(*divmod(heads[0], 4))]).logp for name, heads in chosen.items()
        }
        unrelated = [logp for name, logp in left.items() if not specificity.are_related(name, categories[place])]
        expected.append(sum(unrelated) / len(unrelated) - left[categories[place]])
    assert _effects(verdict) == pytest.approx(expected, abs=ROUNDING)
    assert np.ptp(expected) > 100 * ROUNDING


# What experiments took


def test_an_experiment_is_charged_for_its_own_time_alone(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 11.0, 100.0])
    monkeypatch.setattr("attribution.claims.bench.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr(bench, "spent", {})
    with bench._timed("outer"), bench._timed("inner"):
        pass
    assert bench.spent == {"inner": 10.0, "outer": 90.0}


# Sufficiency


@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_first_vectors_are_those_of_the_whole_ranking_each_once(bench: Workbench, unit: Any) -> None:
    every = bench.all_scores(METHOD, unit, [0, 1])
    vectors = int(every[0].candidates.vector.max()) + 1
    numbers = [1, 7, 40, vectors - 1, vectors]
    for row, (scores, firsts) in enumerate(zip(every, first_vectors_of_each(every, numbers), strict=True)):
        whole = _best(bench, row, unit, len(scores.values)).neurons
        if unit == "ffn":
            order = [neuron.layer * 48 + neuron.index for neuron in whole]
        else:
            size = bench.model.anatomy.head_dim
            order = [(neuron.layer * 4 + neuron.head) * size + neuron.dim for neuron in whole]
        distinct = list(dict.fromkeys(order))
        assert len(distinct) == vectors
        for number, found in zip(numbers, firsts, strict=True):
            assert set(found.tolist()) == set(distinct[:number])


def _recorded(
    monkeypatch: pytest.MonkeyPatch, bench: Workbench, units: tuple[Any, ...], method: str = METHOD
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what is left on six prompts, and which vectors their variants kept, by text: (2, shares, vectors)."""
    # Fewer than the prompts that means are taken over.
    monkeypatch.setattr(sufficiency, "PROMPTS", 6)
    kept_of: dict[str, dict[str, Any]] = {}
    kept = sufficiency._kept

    def remembered(bench: Any, questions: Any, *arguments: Any) -> Any:
        masks = kept(bench, questions, *arguments)
        for unit, mask in masks.items():
            for question, own in zip(questions, mask, strict=True):
                kept_of.setdefault(question.text, {})[unit] = own
        return masks

    monkeypatch.setattr(sufficiency, "_kept", remembered)
    return sufficiency._left(bench, method, units, ON_KEPT.SHARES), kept_of


def _records(model: at.Model, unit: str, mask: Any) -> list[Component]:
    """Return records of the vectors that a mask marks; any source position stands for a dimension."""
    size = model.anatomy.head_dim
    records: list[Component] = []
    for vector in mask.nonzero().flatten().tolist():
        layer, row = divmod(vector, 48 if unit == "ffn" else 4 * size)
        records.append(FFNNeuron(layer, row) if unit == "ffn" else AttentionNeuron(layer, *divmod(row, size), 0))
    return records


@pytest.mark.parametrize("units", [("attention", "ffn"), ("ffn",), ("attention",)], ids=" ".join)
def test_what_is_kept_leaves_what_ablating_all_others_leaves(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, units: tuple[str, ...]
) -> None:
    left, kept = _recorded(monkeypatch, bench, units)
    for row in (0, 3, 5):
        place = bench.sample.subset(6)[row]
        masks = kept[bench.prompts[place].text]
        assert set(masks) == set(units)
        for variant in itertools.product(range(2), range(len(ON_KEPT.SHARES))):
            lost = [record for unit in units for record in _records(bench.model, unit, ~masks[unit][variant])]
            logits = at.ablate(bench.model, bench.prompts[place], lost, kind="mean", reference=bench.prompts)
            expected = at.measure(logits, bench.sample.questions[place].answer_id)
            for metric in ("mrr", "prob", "logp"):
                assert left[metric][(row, *variant)] == pytest.approx(getattr(expected, metric), abs=ROUNDING)


@pytest.mark.parametrize("method", [METHOD, OTHER])
def test_method_and_chance_keep_as_many_and_larger_shares_hold_smaller_ones(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    _, kept = _recorded(monkeypatch, bench, ("attention", "ffn"), method)
    for place in bench.sample.subset(6):
        for unit, mask in kept[bench.prompts[place].text].items():
            numbers = [round(share * mask.shape[-1]) for share in ON_KEPT.SHARES]
            assert mask.sum(-1).tolist() == [numbers, numbers]
            assert (mask[:, :-1] <= mask[:, 1:]).all()
            size = bench.model.anatomy.head_dim
            # The method's neurons in their order, until the first share is full.
            for best in _best(bench, place, unit, numbers[0], method).neurons:
                row = best.layer * 48 + best.index if unit == "ffn" else (best.layer * 4 + best.head) * size + best.dim
                assert mask[0, 0, row]
    drawn = {tuple(own["ffn"][1, 0].nonzero().flatten().tolist()) for own in kept.values()}
    assert len(drawn) == 6, "drawn anew for every prompt"


def test_sufficiency_is_the_mean_over_shares_of_what_the_method_keeps_and_chance_does_not(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shares of a prompt's start: the method keeps 0.1, 0.2, 0.4, 0.9 of it, chance 0, 0, 0.1, 0.3.
    before = np.linspace(0.5, 1, len(PROMPTS))
    curve = np.array([[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 0.1, 0.3]])
    left = dict.fromkeys(("mrr", "prob", "logp"), before[:, None, None] * curve)
    monkeypatch.setattr(sufficiency, "_left", lambda *arguments: left)
    bench.before = dict.fromkeys(left, before)
    verdict = verdict_of(KEEP_MORE, bench, metric="prob")
    assert _effects(verdict) == pytest.approx((0.4 - 0.1) * before)
    assert _status(verdict) is Status.SUPPORTED
    reported = verdict_of(SHARES_KEEP, bench, metric="prob")
    assert reported.effect == pytest.approx(0.4)
    assert reported.claim.threshold == pytest.approx(0.2125)
    assert reported.note.startswith("kept, at random: 5% of neurons 0.10, 0.00; 10% of neurons 0.20, 0.00;")
    curve[:] = curve[::-1].copy()
    left.update(dict.fromkeys(left, before[:, None, None] * curve))
    fresh = _bench(bench.model, PROMPTS)
    fresh.before = dict.fromkeys(left, before)
    assert _status(verdict_of(KEEP_MORE, fresh, metric="prob")) is Status.REFUTED
    # So few prompts cannot refute what another one might keep whole.
    share = verdict_of(SHARES_KEEP, fresh, metric="prob")
    assert _status(share) is not Status.SUPPORTED
    assert share.effect < share.claim.threshold


def test_claim_of_sufficiency_fails_for_neurons_drawn_at_random(
    trained_bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sufficiency, "PROMPTS", 8)
    assert _status(verdict_of(KEEP_MORE, trained_bench, metric="logp")) is Status.SUPPORTED
    drawn = verdict_of(KEEP_MORE, trained_bench, attribution_method="random", metric="logp")
    assert _status(drawn) is not Status.SUPPORTED


# All of them


@pytest.mark.parametrize("claimed", CLAIMS.values(), ids=CLAIMS)
def test_model_that_knows_nothing_leaves_every_claim_undecided(model: at.Model, claimed: Claimed) -> None:
    verdict = claimed(_bench(model, []), METHOD)
    assert (verdict.status, verdict.n) == (Status.UNDECIDED, 0)


def test_claims_are_named_apart_and_asserted_only_where_they_should_be(model: at.Model) -> None:
    claims = [claimed(_bench(model, []), METHOD).claim for claimed in CLAIMS.values()]
    assert len({claim.id for claim in claims}) == len(claims)
    reported = ("vs the same layers", "query neurons cut", "related categories", "kept share")
    for claim in claims:
        assert claim.asserted is not any(part in claim.id for part in reported)
        assert not claim.asserted or claim.family in METHOD_FAMILIES


def test_claims_on_what_a_method_does_not_score_are_reported_as_such(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit, name in (("ffn", "only ffn"), ("attention", "only attention"), ("layer", "only layers")):
        monkeypatch.setitem(METHODS, name, Method(name, METHODS["coefficient"].score, (unit,), "a test"))
    silent = {name: set(CLAIMS) for name in ("only ffn", "only attention", "only layers")}
    for method, left_out in silent.items():
        for name, claimed in CLAIMS.items():
            verdict = claimed(bench, method)
            if verdict.n:
                left_out.discard(name)
                continue
            assert verdict.note.startswith("not applicable: the method does not score")
            assert not verdict.claim.asserted
            assert not verdict.claim.gated
    query = {name for name in CLAIMS if "query" in name}
    heads = {name for name in CLAIMS if name.startswith("heads")}
    top = {name for name in CLAIMS if name.endswith("top 10")}
    assert silent == {
        "only ffn": query | heads,
        "only attention": heads | top,
        "only layers": set(CLAIMS) - {"random"},
    }


@pytest.mark.parametrize(
    ("layers", "rival", "prompts"),
    [
        (8, "integrated_gradients", 50),
        (30, "integrated_gradients", 13),
        (1000, "integrated_gradients", 1),
        (1000, "gradient_x_activation", 50),
    ],
)
def test_a_rival_gets_as_many_prompts_as_a_number_of_passes_pays_for(layers: int, rival: str, prompts: int) -> None:
    deep: Any = SimpleNamespace(model=SimpleNamespace(anatomy=SimpleNamespace(layers=layers)))
    assert top_neurons.prompts_of_rival(deep, rival) == prompts
