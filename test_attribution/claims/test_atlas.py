"""What claims about models measure: each number a second way, and each claim made to fail."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

import attribution as at
from attribution.claims.about_methods.query_neurons import query_budget
from attribution.claims.about_models import ablated, curves, layers, neurons, query_side, words
from attribution.claims.about_models.survey import Survey, depth, survey, survey_of
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status, Verdict
from attribution.claims.sample import Sample
from attribution.models.registry import KNOWLEDGE_FAMILIES
from attribution.prompts.knowledge import CATEGORIES, load_knowledge

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

ON_LAYERS, ON_NEURONS, ON_QUERIES = (module(f"test_{name}") for name in ("layers", "neurons", "queries"))
LAYERS_RAISE = ON_LAYERS.test_layers_raise_the_answer_over_another
LAYERS_LIE_DEEP = ON_LAYERS.test_top_layers_lie_in_the_deeper_half
RELATED_SHARE = ON_LAYERS.test_related_categories_share_more_than_unrelated_ones
RAISE_WORDS = ON_NEURONS.test_value_neurons_raise_words_of_their_category

PROMPTS = 42
# Nats: activations in float32 differ in their last digits by what else is in the batch.
ROUNDING = 1e-4


@pytest.fixture(scope="module", params=["bundled:gpt2", "bundled:llama"])
def bench(request: pytest.FixtureRequest) -> Workbench:
    return Workbench(Sample(at.load(request.param), load_knowledge(), max_prompts=PROMPTS))


@pytest.fixture(scope="module")
def found(bench: Workbench) -> Survey:
    return survey(bench)


# The survey


def test_a_smaller_survey_is_a_part_of_a_larger_one_and_takes_so_many_of_each_category(bench: Workbench) -> None:
    small, large = survey_of(bench, 4), survey_of(bench, 9)
    assert set(small.indices) < set(large.indices)
    for category in CATEGORIES:
        known = sum(prompt.category == category for prompt in bench.prompts)
        assert [len(each.of(category)) for each in (small, large)] == [min(4, known), min(9, known)]


def test_layers_add_up_to_the_whole_rise_of_the_curve(bench: Workbench, found: Survey) -> None:
    """The sum over layers of Eq. 13 telescopes to log p at the last segment minus log p at the first."""
    log_probs = curves._log_probs(bench, curves._SEGMENTS)
    np.testing.assert_allclose(found.layers.sum(1), log_probs[:, -1] - log_probs[:, 0], atol=1e-4)


def test_layers_and_heads_are_in_the_order_of_their_records(found: Survey) -> None:
    ranking = at.attribute(found.bench.model, found.bench.prompts[found.indices[3]], unit="layer", k=None)
    for record, score in zip(ranking.neurons, ranking.scores.tolist(), strict=True):
        assert found.layers[3, found.records("layer").index(record)] == pytest.approx(score, abs=ROUNDING)
    heads = at.attribute(found.bench.model, found.bench.prompts[found.indices[3]], unit="head", k=3)
    best = np.argsort(-found.heads[3], kind="stable")[:3]
    assert [found.records("head")[place] for place in best] == heads.neurons


# Layers and heads


def test_contributions_are_sums_of_the_layers_of_each_kind(bench: Workbench, found: Survey) -> None:
    frame = layers.contributions(bench).to_frame().set_index(["category", "kind"])["total"]
    for category, kind in product(CATEGORIES, ("attention", "ffn")):
        own = [place for place in found.indices if bench.prompts[place].category == category]
        rankings = at.attribute(bench.model, [bench.prompts[place] for place in own], unit="layer", k=None)
        sums = [
            sum(score for record, score in zip(each.neurons, each.scores.tolist(), strict=True) if record.kind == kind)
            for each in rankings
        ]
        assert frame[category, kind] == pytest.approx(np.mean(sums), abs=1e-6)


def test_depth_of_top_layers_is_that_of_the_ranking(bench: Workbench, found: Survey) -> None:
    verdict = verdict_of(LAYERS_LIE_DEEP, bench, attribution_category="color")
    rankings = at.attribute(
        bench.model, [bench.prompts[found.indices[row]] for row in found.of("color")], unit="layer", k=found.top_layers
    )
    last = bench.model.anatomy.layers - 1
    by_hand = [np.mean([record.layer / last for record in each.neurons]) - 0.5 for each in rankings]
    assert verdict.evidence is not None
    np.testing.assert_allclose(verdict.evidence.effects, by_hand, atol=1e-12)


@pytest.mark.parametrize("part", layers.PARTS)
def test_overlap_with_related_categories_by_sets(bench: Workbench, found: Survey, part: layers.Part) -> None:
    verdict = verdict_of(RELATED_SHARE, bench, part=part)
    scores = found.layers if part == "layers" else found.heads
    number = layers.top_number(found, part)

    def top(values: np.ndarray) -> set[int]:
        return set(np.argsort(-values, kind="stable")[:number].tolist())

    of_category = {name: top(scores[found.of(name)].mean(0)) for name in CATEGORIES}
    related = {"language", "capital", "country"}
    effects = []
    for row, category in enumerate(found.categories.tolist()):
        if category in related:
            shares = {name: len(top(scores[row]) & other) / number for name, other in of_category.items()}
            inside = np.mean([shares[name] for name in related - {category}])
            effects.append(inside - np.mean([shares[name] for name in set(CATEGORIES) - related]))
    assert verdict.evidence is not None
    np.testing.assert_allclose(verdict.evidence.effects, effects, atol=1e-12)


def test_layers_do_not_contribute_to_answers_that_were_not_asked_for(bench: Workbench) -> None:
    honest = verdict_of(LAYERS_RAISE, bench, kind="ffn")
    assert honest.status is Status.SUPPORTED or honest.n < honest.claim.min_prompts
    known = [replace(prompt, answer=_swapped(bench)[prompt.text]) for prompt in bench.sample.known]
    swapped = Workbench(Sample(bench.model, bench.sample.knowledge, max_prompts=PROMPTS, known=known))
    # What passes for the answer is another fact's; the control is then the answer of a third.
    assert verdict_of(LAYERS_RAISE, swapped, kind="ffn").effect < honest.effect / 2


def _swapped(bench: Workbench) -> dict[str, str]:
    return {prompt.text: prompt.answer for prompt in bench.sample.swapped}


# Neurons


def test_sums_of_neurons_by_scoring_all(bench: Workbench) -> None:
    measured, sums = neurons._sums(bench, "ffn")
    ranking = at.attribute(bench.model, bench.prompts[measured.indices[0]], k=None)
    scores = ranking.scores.numpy()
    assert sums["all"][0] == pytest.approx(scores.sum(), abs=ROUNDING)
    assert sums["positive"][0] == pytest.approx(scores[scores > 0].sum(), abs=ROUNDING)
    assert sums["top 100"][0] == pytest.approx(np.sort(scores)[-100:].sum(), abs=ROUNDING)


def test_shared_neurons_are_those_in_the_top_of_more_than_half(bench: Workbench, found: Survey) -> None:
    frame = neurons.shared_neurons(bench).to_frame().set_index(["category", "side"])
    for category in CATEGORIES:
        rows = found.of(category)
        for side, ranked in (("value", found.ffn), ("query", found.queries)):
            tops = [set(ranked[row].neurons[: found.shared_of]) for row in rows]
            shared = {each for top in tops for each in top if sum(each in other for other in tops) > len(tops) / 2}
            assert frame.loc[(category, side), "shared"] == len(shared)


def test_neurons_drawn_in_each_layer_share_no_more_than_expected(bench: Workbench, found: Survey) -> None:
    """The control of the claim, as data: with every prompt's neurons drawn anew within layers nothing is left."""
    rng = np.random.default_rng(0)
    members = neurons._members(found, "value")
    shuffled = rng.permuted(members, axis=-1)
    assert (shuffled.sum(-1) == members.sum(-1)).all()
    effects = []
    for category in CATEGORIES:
        own = shuffled[found.of(category)]
        half = np.arange(len(own)) % 2 == 0
        shared = own[half].mean(0) > 0.5
        expected = (own[~half].sum(-1) * shared.mean(-1)).sum(-1)
        effects += (((own[~half] & shared).sum((-2, -1)) - expected) / found.shared_of).tolist()
    assert abs(np.mean(effects)) < 0.02


def test_depth_of_methods_counts_the_layers_of_top_tens(bench: Workbench, found: Survey) -> None:
    frame = neurons.depth_of_methods(bench).to_frame()
    prompts = [bench.prompts[place] for place in found.indices]
    for name in ("log_prob_increase", "prob_increase"):
        counts = np.zeros(bench.model.anatomy.layers)
        for ranking in at.attribute(bench.model, prompts, method=name, k=10):
            for neuron in ranking.neurons:
                counts[neuron.layer] += 1
        own = frame[frame["method"] == name].sort_values("layer")["share"].to_numpy()
        np.testing.assert_allclose(own, counts / counts.sum())


# Words


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_raised_tokens_are_those_of_the_vector_with_the_sign_of_the_coefficient(bench: Workbench, kind: str) -> None:
    """By the weights themselves: W_U (gamma * (v - mean v)), turned round for a negative coefficient."""
    anatomy = bench.model.anatomy
    _, of_prompt = words._measured(bench, kind, words._TOKENS)  # type: ignore[arg-type]
    signs = set()
    for prompt in of_prompt[:12]:
        for raised in (*prompt.top, *prompt.others):
            neuron = raised.neuron
            if kind == "ffn":
                vector = anatomy.sublayer(neuron.layer, "ffn").vectors[neuron.index].double()
            else:
                vector = (
                    anatomy.sublayer(neuron.layer, "attention")
                    .vectors[neuron.head * anatomy.head_dim + neuron.dim]
                    .double()
                )
            centred = vector - vector.mean() if anatomy.readout.norm.centred else vector
            logits = anatomy.readout.unembedding.double() @ (centred * anatomy.readout.norm.weight.double())
            falling = (logits if raised.positive else -logits).topk(len(raised.tokens))
            np.testing.assert_allclose(
                falling.values, (logits if raised.positive else -logits)[list(raised.tokens)], atol=1e-9
            )
            signs.add(raised.positive)
    assert signs == {True, False}


def test_hits_are_other_words_of_the_category(bench: Workbench, found: Survey) -> None:
    _, of_prompt = words._measured(bench, "ffn", words._TOKENS)
    decode = bench.model.tokenizer.decode
    for row, prompt in enumerate(of_prompt):
        own, answer = (
            bench.sample.knowledge.words[found.categories[row]],
            bench.prompts[found.indices[row]].answer.strip(),
        )
        for raised in (*prompt.top, *prompt.others):
            said = [decode([token]).strip() for token in raised.tokens]
            assert raised.hits <= sum(word in own and word != answer for word in said)


def test_others_are_of_the_same_layers_and_not_the_top_ones(bench: Workbench) -> None:
    for kind in ("ffn", "attention"):
        _, of_prompt = words._measured(bench, kind, words._TOKENS)  # type: ignore[arg-type]
        for prompt in of_prompt:
            assert [each.neuron.layer for each in prompt.top] == [each.neuron.layer for each in prompt.others]
            named = [each.neuron for each in (*prompt.top, *prompt.others)]
            assert len(set(named)) == len(named)


def test_neurons_do_not_raise_the_words_of_another_category(bench: Workbench) -> None:
    """With the words of months and colors exchanged the claim fails."""
    exchanged = dict(bench.sample.knowledge.words)
    exchanged["month"], exchanged["color"] = exchanged["color"], exchanged["month"]
    knowledge = replace(bench.sample.knowledge, words=exchanged)
    wrong = Workbench(Sample(bench.model, knowledge, max_prompts=PROMPTS, known=bench.sample.known))
    honest, fooled = (
        verdict_of(RAISE_WORDS, each, attribution_category="month", kind="ffn") for each in (bench, wrong)
    )
    assert honest.effect > 0.05 > fooled.effect
    assert fooled.status is not Status.SUPPORTED


# The query side


def test_parts_in_waking_add_up_with_the_embedding_and_the_biases(found: Survey) -> None:
    shares = query_side._shares(found, "attention")
    for row in (0, len(found.indices) - 1):
        frame = found.queries[row].layers
        own = frame[frame["value_unit"] == "attention"].set_index(["component", "layer"])["query_score"]
        rest = own[[each for each in own.index if each[0] in ("embedding", "bias")]].sum() / own.sum()
        assert shares[row].sum() + rest == pytest.approx(1)
        assert shares[row, 0] == pytest.approx(own["attention", 0] / own.sum())
        assert shares[row, 3] == pytest.approx(own["ffn", 1] / own.sum())


def test_query_neurons_are_split_by_whether_they_are_value_neurons(bench: Workbench, found: Survey) -> None:
    only, both = query_side._split(found)
    number = query_budget(bench)
    assert (only.sum(1) + both.sum(1) == number).all()
    for row in (0, 5):
        values, queries = (set(each[row].neurons[:number]) for each in (found.ffn, found.queries))
        assert both[row].sum() == len(values & queries)


# Curves


def test_the_curve_by_walking_from_the_embedding(bench: Workbench, found: Survey) -> None:
    """Each state on the way projected by itself, under the scale of the final state."""
    from attribution.engine.projection import before_softmax, frozen_scale
    from attribution.engine.trace import read_activations
    from attribution.prompts.tokens import pad

    question = bench.sample.questions[found.indices[0]]
    activations = read_activations(bench.model, pad([question.ids]))
    start, end = activations.resid_pre[0, 0].double(), activations.resid_final[0].double()
    readout = bench.model.anatomy.readout
    scale = frozen_scale(end, readout.norm)
    for segment in (0, 17, 60):
        state = start + (end - start) * segment / 60
        expected = before_softmax(state, scale, readout).log_softmax(-1)[question.answer_id]
        assert curves._log_probs(bench, curves._SEGMENTS)[0, segment] == pytest.approx(float(expected), abs=1e-4)


@given(
    arrays.arrays(
        np.float64, st.tuples(st.integers(1, 4), st.just(21)), elements=st.floats(-30, 0).map(lambda x: round(x, 3))
    )
)
def test_straightness_is_the_squared_correlation_with_the_segment(values: np.ndarray) -> None:
    found = curves.straightness(values, 3, 15)
    for row, each in zip(values[:, 3:16], found, strict=True):
        if np.ptp(row) == 0:
            assert each == 1
        else:
            assert each == pytest.approx(stats.linregress(np.arange(13), row).rvalue ** 2, abs=1e-6)


def test_a_line_is_straight_and_a_step_is_not() -> None:
    way = np.arange(61.0)
    line, step = curves.straightness(np.stack([3 - 2 * way, (way > 20).astype(float)]), 0, 40)
    assert line == pytest.approx(1)
    assert step < 0.8


# Every exhibit and every claim


def test_exhibits_are_plain_and_cover_every_category(bench: Workbench) -> None:
    import json
    from dataclasses import asdict

    from attribution.claims.exhibits import Exhibit

    made = [
        layers.contributions(bench),
        layers.top_layers(bench),
        layers.top_heads(bench),
        neurons.shared_neurons(bench),
        neurons.depth_of_methods(bench),
        words.interpretable_neurons(bench),
        query_side.query_layers_of_ffn_neurons(bench),
        query_side.query_layers_of_attention_neurons(bench),
        query_side.query_and_value_neurons(bench),
        curves.curve(bench),
        ablated.by_heads(bench),
        ablated.by_query_neurons(bench),
    ]
    assert len({each.name for each in made}) == len(made)
    for each in made:
        assert each.rows
        assert each.seen.endswith(".")
        assert "nan" not in each.seen
        assert Exhibit.of_json(json.loads(json.dumps(asdict(each), allow_nan=False))) == each
        if "category" in each.columns:
            assert set(each.to_frame()["category"]) == set(CATEGORIES)


def _verdicts(bench: Workbench) -> list[Verdict]:
    """One of each claim about models, but for the known facts."""
    return [
        verdict_of(LAYERS_RAISE, bench, kind="ffn"),
        verdict_of(LAYERS_LIE_DEEP, bench, attribution_category="color"),
        verdict_of(RELATED_SHARE, bench, part="heads"),
        verdict_of(ON_NEURONS.test_few_neurons_carry_most_of_the_total, bench, kind="ffn"),
        verdict_of(
            ON_NEURONS.test_prompts_of_a_category_share_neurons, bench, attribution_category="color", side="value"
        ),
        verdict_of(ON_NEURONS.test_increase_of_probability_picks_deeper_neurons_than_that_of_log_probability, bench),
        verdict_of(RAISE_WORDS, bench, attribution_category="color", kind="ffn"),
        verdict_of(ON_QUERIES.test_attention_value_neurons_are_woken_by_lower_layers_than_ffn_ones, bench),
        verdict_of(ON_QUERIES.test_query_neurons_that_are_no_value_neurons_lie_below_those_that_are, bench),
        verdict_of(ON_QUERIES.test_a_piece_of_the_curve_is_nearly_a_line, bench, piece="logp"),
    ]


@pytest.fixture
def of_nothing(bench: Workbench) -> list[Verdict]:
    """Verdicts on a model that knows no prompt."""
    empty = Workbench(Sample(bench.model, bench.sample.knowledge, known=[]))
    return _verdicts(empty)


def test_without_known_prompts_every_claim_is_undecided(of_nothing: list[Verdict]) -> None:
    assert {each.status for each in of_nothing} == {Status.UNDECIDED}
    assert all(each.n == 0 for each in of_nothing)


def test_claims_belong_to_the_families_that_the_registry_names(of_nothing: list[Verdict]) -> None:
    assert {each.claim.family for each in of_nothing} == set(KNOWLEDGE_FAMILIES) - {"known facts"}
    # Stored runs compare methods.
    assert not any(each.claim.gated for each in of_nothing)


def test_map_of_the_paper_names_what_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "paper.md").read_text(encoding="utf-8")
    makers = set(re.findall(r"`(attribution\.claims\.about_models\.\w+)\.(\w+)`", text))
    assert len(makers) == 15
    for module, function in makers:
        assert callable(getattr(import_module(module), function))
    files = set(re.findall(r"`(test_\w+/test_\w+\.py)`", text))
    assert len(files) == 7
    for each in files:
        assert (root / each).is_file()
    for number in range(1, 15):
        assert re.search(rf"\bTables? (\d+, )?{number}\b", text), number
    for number in range(1, 11):
        assert re.search(rf"\bFigures? ((\d+, )?{number}\b|4 to 7)", text), number


def test_depth_runs_from_the_first_layer_to_the_last(bench: Workbench) -> None:
    last = bench.model.anatomy.layers - 1
    assert depth(bench, [0, last]).tolist() == [0, 1]
