"""Units beyond single neurons, both parts of a score, and what a ranking shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attribution as at
from attribution.engine.methods import METHODS
from attribution.engine.projection import before_softmax, frozen_scale
from attribution.engine.questions import ids_of
from attribution.engine.ranking import scores_of
from attribution.engine.trace import Activations, read_activations
from attribution.errors import BadInputError
from attribution.prompts.tokens import pad
from attribution.records import UNITS

PROMPT, ANSWER = "The capital of France is", " Paris"


def _traced(model: at.Model) -> Activations:
    return read_activations(model, pad([ids_of(model, PROMPT)]))


def _log_probs(state: Tensor, activations: Activations, model: at.Model) -> Tensor:
    """Log-softmax of bs(state), under the prompt's frozen scale."""
    readout = model.anatomy.readout
    scale = frozen_scale(activations.resid_final[0].double(), readout.norm)
    return before_softmax(state.double(), scale, readout).log_softmax(-1)


def _states(unit: str, record: Any, activations: Activations, model: at.Model) -> tuple[Tensor, Tensor]:
    """x of Eq. 13, and x with what the record writes added to it."""
    anatomy, layer = model.anatomy, record.layer
    if (isinstance(record, at.Layer) and record.kind == "ffn") or isinstance(record, at.FFNNeuron):
        before = activations.resid_mid[layer, 0].double()
    else:
        before = activations.resid_pre[layer, 0].double()
    if isinstance(record, at.Layer):
        after = activations.resid_mid if record.kind == "attention" else activations.resid_post
        return before, after[layer, 0].double()
    kind = "ffn" if isinstance(record, at.FFNNeuron) else "attention"
    post_scale = getattr(activations, f"{kind}_post_scale")[layer, 0].double()
    post_weight = anatomy.sublayer(layer, kind).post_weight
    post_weight = torch.ones(anatomy.width) if post_weight is None else post_weight
    if isinstance(record, at.FFNNeuron):
        written = (
            activations.coefficients[layer, 0, record.index].double()
            * anatomy.sublayer(layer, "ffn").vectors[record.index]
        )
        return before, before + post_scale * post_weight * written
    written = torch.zeros(anatomy.width, dtype=torch.float64)
    positions = range(activations.pattern.shape[-1]) if isinstance(record, at.Head) else [record.position]
    dims = [record.dim] if isinstance(record, at.AttentionNeuron) else range(anatomy.head_dim)
    for position in positions:
        weight = activations.pattern[layer, 0, record.head, position].double()
        for dim in dims:
            value = activations.values[layer, 0, position, record.head, dim].double()
            written += (
                weight
                * value
                * anatomy.sublayer(layer, "attention").vectors[record.head * anatomy.head_dim + dim].double()
            )
    return before, before + post_scale * post_weight * written


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_the_change_of_log_probability_by_what_it_writes(
    representative_model: at.Model, unit: str
) -> None:
    """One record at a time, the state before and after it, in every setting."""
    model = representative_model
    activations = _traced(model)
    ranking = at.attribute(model, PROMPT, ANSWER, unit=unit, k=None)
    anatomy, length = model.anatomy, activations.pattern.shape[-1]
    attention = anatomy.layers * anatomy.heads * anatomy.head_dim * length
    ffn = anatomy.layers * anatomy.ffn_neurons
    heads = anatomy.layers * anatomy.heads
    total = {"ffn": ffn, "attention": attention, "neuron": ffn + attention, "head": heads}
    total |= {"head_position": heads * length, "layer": 2 * anatomy.layers}
    assert len(set(ranking.neurons)) == len(ranking) == total[unit]
    # A spread over the whole ranking: the best, the worst and what lies between.
    for place in range(0, len(ranking), max(1, len(ranking) // 12)):
        before, after = _states(unit, ranking.neurons[place], activations, model)
        moved = _log_probs(after, activations, model) - _log_probs(before, activations, model)
        assert float(ranking.scores[place]) == pytest.approx(float(moved[ranking.answer_id]), abs=1e-5)


def test_importances_of_layers_telescope(representative_model: at.Model) -> None:
    """Each layer starts where the one before ended, so they sum to log p(w|final) - log p(w|embedding)."""
    model, activations = representative_model, _traced(representative_model)
    ranking = at.attribute(model, PROMPT, ANSWER, unit="layer", k=None)
    ends = [
        _log_probs(state, activations, model) for state in (activations.resid_pre[0, 0], activations.resid_final[0])
    ]
    gained = float((ends[1] - ends[0])[ranking.answer_id])
    assert ranking.scores.abs().max() > 0.01
    assert float(ranking.scores.sum()) == pytest.approx(gained, abs=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_a_score_is_its_first_order_term_minus_a_kl_divergence(model: at.Model, unit: str) -> None:
    activations = _traced(model)
    ranking = at.attribute(model, PROMPT, ANSWER, unit=unit, k=6)
    assert ranking.first_order is not None
    assert ranking.kl is not None
    for place, record in enumerate(ranking.neurons):
        before, after = _states(unit, record, activations, model)
        old, new = _log_probs(before, activations, model), _log_probs(after, activations, model)
        kl = float((old.exp() * (old - new)).sum())
        assert float(ranking.kl[place]) == pytest.approx(kl, abs=1e-5)
        assert float(ranking.first_order[place]) == pytest.approx(float(ranking.scores[place]) + kl, abs=1e-5)
    assert (ranking.kl >= 0).all()
    assert float(ranking.kl.max()) > 1e-3


def test_only_importance_has_two_parts(model: at.Model) -> None:
    ranking = at.attribute(model, PROMPT, ANSWER, method="coefficient", k=3)
    assert ranking.first_order is ranking.kl is None


def test_both_kinds_of_neurons_together_are_both_rankings_merged(model: at.Model) -> None:
    apart = [at.attribute(model, PROMPT, ANSWER, unit=unit, k=None) for unit in ("ffn", "attention")]
    scored = [pair for ranking in apart for pair in zip(ranking.scores.tolist(), ranking.neurons, strict=True)]
    best = sorted(scored, key=lambda pair: -pair[0])[:25]
    together = at.attribute(model, PROMPT, ANSWER, unit="neuron", k=25)
    assert together.neurons == [neuron for _, neuron in best]
    assert {type(neuron) for neuron in together.neurons} == {at.FFNNeuron, at.AttentionNeuron}
    assert together.exact.scored < together.exact.total == len(scored)


@pytest.mark.parametrize("unit", UNITS)
def test_top_k_is_the_head_of_the_whole_ranking(representative_model: at.Model, unit: str) -> None:
    whole = at.attribute(representative_model, PROMPT, ANSWER, unit=unit, k=None)
    for k in (1, 5):
        few = at.attribute(representative_model, PROMPT, ANSWER, unit=unit, k=k)
        assert few.neurons == whole.neurons[:k]
        assert few.exact.slack > few.exact.tolerance


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_ranks_both_kinds_of_neurons(representative_model: at.Model, method: str) -> None:
    """In a batch of two lengths as alone."""
    prompts = [PROMPT, "A ripe cherry is"]
    answers = [ANSWER, " red"]
    together = at.attribute(representative_model, prompts, answers, unit="neuron", method=method, k=None, steps=3)
    for prompt, answer, ranking in zip(prompts, answers, together, strict=True):
        assert torch.isfinite(ranking.scores).all()
        assert ranking.scores.std() > 0
        alone = at.attribute(representative_model, prompt, answer, unit="neuron", method=method, k=None, steps=3)
        scores = dict(zip(alone.neurons, alone.scores.tolist(), strict=True))
        # Padding changes the order of float32 sums in the model, and nothing else.
        if "rank" not in method:
            found = [scores[neuron] for neuron in ranking.neurons]
            assert found == pytest.approx(ranking.scores.tolist(), abs=1e-4, rel=1e-3)


def test_steps_are_for_integrated_gradients(model: at.Model) -> None:
    few, many = (
        at.attribute(model, PROMPT, ANSWER, method="integrated_gradients", k=None, steps=steps) for steps in (2, 40)
    )
    assert not torch.allclose(few.scores, many.scores, atol=1e-6)
    default = at.attribute(model, PROMPT, ANSWER, method="integrated_gradients", k=5)
    assert default.neurons == at.attribute(model, PROMPT, ANSWER, method="integrated_gradients", k=5, steps=20).neurons


def test_chosen_neurons_score_as_they_rank(model: at.Model) -> None:
    ranking = at.attribute(model, PROMPT, ANSWER, unit="neuron", k=None)
    indices = [0, 7, 100, len(ranking) - 1, 7]
    chosen = [ranking.neurons[place] for place in indices]
    assert torch.equal(scores_of(model, PROMPT, ANSWER, chosen), ranking.scores[indices])
    with pytest.raises(BadInputError, match=r"FFNNeuron\(layer=99, index=0\) is not among"):
        scores_of(model, PROMPT, ANSWER, [at.FFNNeuron(99, 0)])


@pytest.mark.parametrize(
    ("unit", "columns"),
    [
        ("ffn", ["layer", "index"]),
        ("attention", ["layer", "head", "dim", "position", "token"]),
        ("neuron", ["layer", "kind", "head", "dim", "position", "index", "token"]),
        ("head", ["layer", "head"]),
        ("head_position", ["layer", "head", "position", "token"]),
        ("layer", ["layer", "kind"]),
    ],
)
def test_a_frame_has_a_row_per_record(model: at.Model, unit: str, columns: list[str]) -> None:
    ranking = at.attribute(model, PROMPT, ANSWER, unit=unit, k=6)
    frame = ranking.to_frame()
    assert sorted(frame.columns) == sorted([*columns, "log_prob_increase"])
    assert frame.index.tolist() == [1, 2, 3, 4, 5, 6]
    for row, record in zip(frame.to_dict("records"), ranking.neurons, strict=True):
        for name, value in vars(record).items():
            assert row[name] == value
    assert repr(ranking).count("\n") == 8


def test_a_long_ranking_prints_short(model: at.Model) -> None:
    assert repr(at.attribute(model, PROMPT, ANSWER, unit="neuron", k=None)).count("\n") < 30


@pytest.mark.parametrize("unit", ["head", "head_position", "layer"])
@pytest.mark.parametrize("method", ["coefficient", "vector_norm", "reciprocal_rank", "relp"])
def test_what_only_neurons_have_ranks_only_neurons(model: at.Model, unit: str, method: str) -> None:
    with pytest.raises(BadInputError, match=f"method '{method}' scores the units ffn, attention, neuron, not '{unit}'"):
        at.attribute(model, PROMPT, ANSWER, unit=unit, method=method)
