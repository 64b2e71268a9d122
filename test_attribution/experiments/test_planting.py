"""What is planted in a copy reads and writes as asked, touches nothing else, and is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attribution as at
from attribution.claims.about_methods.common import METHOD
from attribution.claims.about_methods.plants import KINDS, Kind, planting_of, task_of
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status, Verdict
from attribution.claims.sample import Sample
from attribution.engine.decomposition import decomposition_errors, rounding
from attribution.engine.methods import METHODS
from attribution.engine.projection import before_softmax
from attribution.engine.questions import ids_of
from attribution.engine.subkeys import folded_subkeys
from attribution.engine.trace import Activations, read_activations
from attribution.engine.vectors import vector_table
from attribution.errors import BadInputError
from attribution.experiments.planting import (
    Plant,
    answer_direction,
    displaced,
    firing_subkeys,
    planted,
    quiet_subkeys,
    vector_along,
)
from attribution.models.anatomy import Anatomy
from attribution.models.norms import Norm, normalise
from attribution.prompts.knowledge import Fact, Knowledge
from attribution.prompts.tokens import TokenBatch, pad
from attribution.records import Neuron

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

ON_PLANTED = module("test_planted")
PROMPTS = ("The capital of France is", "The number of legs that a dog has is", "A ripe cherry is")
LAYER = 1
FFN = at.FFNNeuron(LAYER, 5)
ATTENTION = at.AttentionNeuron(LAYER, 3, 7, 0)
# Some on, one off: a subkey that fires everywhere does not pass.
ASKED = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)


def _batch(model: at.Model) -> TokenBatch:
    return pad([ids_of(model, prompt) for prompt in PROMPTS])


def _read(model: at.Model) -> Activations:
    return read_activations(model, _batch(model), positions="all")


def _last(model: at.Model, tensor: Tensor) -> Tensor:
    """Take what each prompt has at its last token; batch and position are the first two axes."""
    last = _batch(model).last
    return tensor[torch.arange(len(last)), last]


def _inputs(model: at.Model, neuron: Neuron) -> Tensor:
    """What a neuron reads behind the norm, at the last tokens."""
    anatomy, seen = model.anatomy, _read(model)
    ffn = isinstance(neuron, at.FFNNeuron)
    stream = seen.resid_mid if ffn and not anatomy.parallel else seen.resid_pre
    norm = anatomy.sublayer(neuron.layer, "ffn" if ffn else "attention").input_norm
    return normalise(_last(model, stream[neuron.layer]).double(), norm)


def _plant(model: at.Model, neuron: Neuron, length: float = 1.0) -> Plant:
    (subkey,) = firing_subkeys(_inputs(model, neuron), ASKED[:, None], torch.float32)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.anatomy.width, generator=generator, dtype=torch.float64)
    return Plant(neuron, subkey, vector * length / vector.norm())


def _fired(anatomy: Anatomy, asked: Tensor) -> Tensor:
    """The coefficient of a neuron whose subkey reads ``asked``."""
    subkeys = anatomy.subkeys[LAYER]
    return subkeys.activation(asked) * (1 if subkeys.gate is None else asked)


def _weights(model: at.Model) -> dict[str, Tensor]:
    return dict(model.network._module.named_parameters())


# What is planted reads and writes as asked


def test_a_planted_ffn_neuron_fires_as_asked_in_every_setting(representative_model: at.Model) -> None:
    model, plant = representative_model, _plant(representative_model, FFN)
    with planted(model, [plant]) as copy:
        found = _last(copy, _read(copy).coefficients[LAYER])[:, FFN.index].double()
        natural = _last(model, _read(model).coefficients[LAYER])[:, FFN.index].double()
        assert torch.equal(copy.anatomy.sublayer(LAYER, "ffn").vectors[FFN.index], plant.vector.float())
    # No activation in use is steeper than 2; a product of two pre-activations errs by both.
    size = (_inputs(model, FFN).abs() @ plant.subkey.abs()).max()
    tolerance = 4 * rounding(torch.float32, 2 * model.anatomy.width, normed=True) * float(size)
    assert (found - _fired(model.anatomy, ASKED)).abs().max() <= tolerance < 0.01
    assert (natural - _fired(model.anatomy, ASKED)).abs().max() > 10 * tolerance


def test_a_planted_attention_neuron_takes_the_value_that_was_asked_in_every_setting(
    representative_model: at.Model,
) -> None:
    model, plant = representative_model, _plant(representative_model, ATTENTION)
    anatomy = model.anatomy
    with planted(model, [plant]) as copy:
        values = _last(copy, _read(copy).values[LAYER])[:, ATTENTION.head, ATTENTION.dim].double()
        vectors = copy.anatomy.sublayer(LAYER, "attention").vectors.view(anatomy.heads, anatomy.head_dim, -1)[
            :, ATTENTION.dim
        ]
        assert torch.equal(vectors[ATTENTION.head], plant.vector.float())
        group = anatomy.heads // anatomy.kv_heads
        for head in range(anatomy.heads):
            shares = head // group == ATTENTION.head // group and head != ATTENTION.head
            assert (float(vectors[head].abs().max()) == 0) == shares
    natural = _last(model, _read(model).values[LAYER])[:, ATTENTION.head, ATTENTION.dim].double()
    size = (_inputs(model, ATTENTION).abs() @ plant.subkey.abs()).max()
    tolerance = rounding(torch.float32, 2 * anatomy.width, normed=True) * float(size)
    # A clip of 1 lets all through that was asked.
    assert (values - ASKED).abs().max() <= tolerance < 0.01
    assert (natural - ASKED).abs().max() > 10 * tolerance


def test_a_planted_copy_is_the_sum_of_its_parts_in_every_setting(representative_model: at.Model) -> None:
    """Its anatomy says what the copy runs with: attribution reads the planted weights, not the original's."""
    model = representative_model
    with planted(model, [_plant(model, FFN), _plant(model, ATTENTION)]) as copy:
        errors = decomposition_errors(_read(copy), copy.anatomy, _batch(copy).mask)
        assert max(errors.values()) <= 1
        stale = decomposition_errors(_read(copy), model.anatomy, _batch(copy).mask)
        assert min(stale["ffn_neurons"], stale["attention_neurons"]) > 1


@pytest.mark.parametrize("neuron", [FFN, ATTENTION], ids=["ffn", "attention"])
def test_ablating_what_was_planted_is_ablating_what_was_there_in_every_setting(
    representative_model: at.Model, neuron: Neuron
) -> None:
    model = representative_model
    gone = displaced(model.anatomy, [neuron])
    natural = [at.ablate(model, prompt, gone) for prompt in PROMPTS]
    with planted(model, [_plant(model, neuron, length=10)]) as copy:
        for prompt, expected in zip(PROMPTS, natural, strict=True):
            assert torch.equal(at.ablate(copy, prompt, gone), expected)
        # The second prompt is the one on which it is silent, at the last token at least.
        assert (at.ablate(copy, PROMPTS[0], []) - natural[0]).abs().max() > 0.1


# Nothing else is touched


def _changed(model: at.Model, copy: at.Model) -> dict[str, int]:
    """How many numbers of each weight differ."""
    pairs = ((name, weight, _weights(copy)[name]) for name, weight in _weights(model).items())
    return {name: number for name, one, other in pairs if (number := int((one != other).sum()))}


def test_nothing_but_the_planted_rows_differs_and_nothing_else_is_copied_in_every_setting(
    representative_model: at.Model,
) -> None:
    model, anatomy = representative_model, representative_model.anatomy
    before = {name: weight.clone() for name, weight in _weights(model).items()}
    subkeys, group = anatomy.subkeys[LAYER], anatomy.heads // anatomy.kv_heads
    rows = {FFN: 2 + (subkeys.gate is not None), ATTENTION: 1 + group}
    single = {
        FFN: (subkeys.up_bias is not None) + (subkeys.gate_bias is not None),
        ATTENTION: int(anatomy.value_biases[LAYER] is not None),
    }
    for neuron in (FFN, ATTENTION):
        with planted(model, [_plant(model, neuron)]) as copy:
            changed = _changed(model, copy)
            assert sum(changed.values()) == rows[neuron] * anatomy.width + single[neuron]
            own = {name for name, weight in _weights(copy).items() if weight is not _weights(model)[name]}
            assert own == set(changed)
        for name, weight in _weights(model).items():
            assert torch.equal(weight, before[name]), name


def test_planted_rows_are_where_gpt2_and_llama_keep_them(loaded: Callable[[str], at.Model]) -> None:
    """Worked by hand, without the anatomy: Conv1D keeps columns; head 3 of 4 reads the second of 2 value heads."""
    gpt2, llama = loaded("gpt2"), loaded("llama")
    width, head_dim = gpt2.anatomy.width, gpt2.anatomy.head_dim
    plants = {model: (_plant(model, FFN), _plant(model, ATTENTION)) for model in (gpt2, llama)}
    with planted(gpt2, plants[gpt2]) as copy:
        ffn, attention = plants[gpt2]
        weights, block = _weights(copy), "transformer.h.1"
        row = 3 * head_dim + 7
        assert torch.equal(weights[f"{block}.mlp.c_fc.weight"][:, 5], ffn.subkey.float())
        assert torch.equal(weights[f"{block}.mlp.c_proj.weight"][5], ffn.vector.float())
        assert torch.equal(weights[f"{block}.attn.c_attn.weight"][:, 2 * width + row], attention.subkey.float())
        assert torch.equal(weights[f"{block}.attn.c_proj.weight"][row], attention.vector.float())
        assert float(weights[f"{block}.mlp.c_fc.bias"][5]) == float(
            weights[f"{block}.attn.c_attn.bias"][2 * width + row]
        )
        assert float(weights[f"{block}.mlp.c_fc.bias"][5]) == 0
    with planted(llama, plants[llama]) as copy:
        ffn, attention = plants[llama]
        weights, block = _weights(copy), "model.layers.1"
        for part in ("gate", "up"):
            assert torch.equal(weights[f"{block}.mlp.{part}_proj.weight"][5], ffn.subkey.float())
        assert torch.equal(weights[f"{block}.mlp.down_proj.weight"][:, 5], ffn.vector.float())
        assert torch.equal(weights[f"{block}.self_attn.v_proj.weight"][head_dim + 7], attention.subkey.float())
        assert torch.equal(weights[f"{block}.self_attn.o_proj.weight"][:, 3 * head_dim + 7], attention.vector.float())
        assert float(weights[f"{block}.self_attn.o_proj.weight"][:, 2 * head_dim + 7].abs().max()) == 0


@pytest.mark.parametrize("failing", [False, True])
def test_what_was_planted_does_not_outlive_its_block(model: at.Model, failing: bool) -> None:
    leaked: list[at.Model] = []

    def work() -> None:
        with planted(model, [_plant(model, FFN), _plant(model, ATTENTION)]) as copy:
            leaked.append(copy)
            # What a model computes from its weights and keeps would carry what was planted on.
            table = vector_table(copy, "ffn")
            assert table is not None
            assert len(table.norms) > 0
            if failing:
                raise KeyError("inside the block")

    if failing:
        with pytest.raises(KeyError, match="inside the block"):
            work()
    else:
        work()
    assert _changed(model, leaked[0]) == {}
    assert torch.equal(at.ablate(leaked[0], PROMPTS[0], []), at.ablate(model, PROMPTS[0], []))
    table, original = vector_table(leaked[0], "ffn"), vector_table(model, "ffn")
    assert table is not None
    assert original is not None
    assert torch.equal(table.norms, original.norms)


def test_planting_nothing_shares_everything(model: at.Model) -> None:
    with planted(model, []) as copy:
        for name, weight in _weights(model).items():
            assert _weights(copy)[name] is weight


def test_under_grouped_queries_planting_displaces_the_whole_group(loaded: Callable[[str], at.Model]) -> None:
    shared = at.AttentionNeuron(LAYER, 2, 7, 0)
    assert displaced(loaded("llama").anatomy, [ATTENTION, FFN, shared]) == [shared, ATTENTION, FFN]
    assert displaced(loaded("gpt2").anatomy, [ATTENTION, FFN]) == [ATTENTION, FFN]


# What is to be planted


@pytest.mark.parametrize("row", ["gpt2", "llama", "gemma2", "cohere", "granite"])
def test_no_direction_raises_an_answer_more_than_its_own(loaded: Callable[[str], at.Model], row: str) -> None:
    readout, answer = loaded(row).anatomy.readout, 7
    direction = answer_direction(readout, answer)
    stream = torch.zeros(len(direction), dtype=torch.float64, requires_grad=True)
    logits = before_softmax(stream, torch.ones((), dtype=torch.float64), readout)
    (gradient,) = torch.autograd.grad(logits[answer] - logits.mean(), stream)
    # The steepest direction is the gradient's; both are sums over the vocabulary and the width in float64.
    tolerance = 100 * torch.finfo(torch.float64).eps * sum(readout.unembedding.shape)
    assert float(direction.norm()) == pytest.approx(1, abs=tolerance)
    assert float(direction @ gradient) == pytest.approx(float(gradient.norm()), rel=tolerance)


def test_a_vector_is_written_with_length_one_along_its_direction() -> None:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(32, generator=generator, dtype=torch.float64)
    post_weight = torch.randn(32, generator=generator, dtype=torch.float64)
    post_weight[3] = 1e-9
    vector = vector_along(direction, post_weight)
    assert float((post_weight * vector).norm()) == pytest.approx(1)
    # Of vectors of one length, none writes more along the direction, and none is blown up by the small entry.
    written = float(post_weight * vector @ direction)
    assert written > 0
    for other in torch.randn(100, 32, generator=generator, dtype=torch.float64):
        assert float(post_weight * other @ direction) <= written * float(other.norm() / vector.norm())
    assert vector[3].abs() < 1e-6
    assert torch.allclose(vector_along(direction, None), direction / direction.norm(), rtol=1e-14)


def test_firing_subkeys_are_the_shortest_that_fire_as_asked() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    fires = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [0.5, 2]], dtype=torch.float64)
    subkeys = firing_subkeys(inputs, fires, torch.float32)
    assert torch.allclose(inputs @ subkeys.T, fires, atol=1e-12)
    # The shortest solution has no part outside the span of the inputs.
    span = torch.linalg.qr(inputs.T).Q
    assert torch.allclose(subkeys @ span @ span.T, subkeys, atol=1e-12)


def test_prompts_that_differ_by_rounding_alone_do_not_make_subkeys_long() -> None:
    """One token at one place of the first layer is read alike in every prompt, but for the last bits."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    noise = torch.randn(12, generator=generator, dtype=torch.float64) * torch.finfo(torch.float32).eps
    inputs[1] = inputs[0] + noise
    fires = torch.tensor([[1.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    (subkey,) = firing_subkeys(inputs, fires, torch.float32)
    assert subkey.norm() < 10
    assert torch.allclose(inputs @ subkey, torch.tensor([0.5, 0.5, 0, 1], dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "rms", "layer norm"])
def test_quiet_subkeys_hear_what_is_written_for_them_best(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    width = 16
    weight = torch.rand(width, generator=generator, dtype=torch.float64) + 0.1
    norm = None if kind == "none" else Norm(weight, None, 1e-5, centred=kind == "layer norm")
    tokens = torch.randn(200, width, generator=generator, dtype=torch.float64) * torch.linspace(0.05, 2, width)
    moment = tokens.T @ tokens / len(tokens)

    def heard(subkeys: Tensor) -> Tensor:
        return folded_subkeys(subkeys, norm).square().sum(-1) / (subkeys @ moment * subkeys).sum(-1)

    subkeys = quiet_subkeys(moment, norm, 3)
    assert torch.allclose(subkeys.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    others = torch.randn(1000, width, generator=generator, dtype=torch.float64)
    assert heard(subkeys).min() > heard(others).max()
    assert heard(subkeys)[0] >= heard(subkeys).max() * (1 - 1e-9)
    # What is written for one, along its k', is not read by another.
    folded = folded_subkeys(subkeys, norm)
    crossed = (folded @ folded.T) / folded.norm(dim=-1).square()
    assert torch.allclose(crossed, torch.eye(3, dtype=torch.float64), atol=1e-9)


# Arguments


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([at.FFNNeuron(9, 0)], r"layer 9, but the model has 3; count from 0"),
        ([at.FFNNeuron(0, 48)], r"index 48, but the model has 48"),
        ([at.AttentionNeuron(0, 4, 0, 0)], r"head 4, but the model has 4"),
        ([at.Head(0, 0)], r"Head\(.*cannot be planted; pass FFNNeuron or AttentionNeuron"),
        ([FFN, FFN], r"FFNNeuron\(layer=1, index=5\) shares its subkey.*plant each row of a projection once"),
        ([ATTENTION, replace(ATTENTION, position=3)], r"shares its subkey"),
    ],
    ids=["layer", "index", "head", "record", "twice", "position"],
)
def test_what_cannot_be_planted_is_an_error(model: at.Model, neurons: list[Neuron], message: str) -> None:
    zeros = torch.zeros(model.anatomy.width)
    with pytest.raises(BadInputError, match=message), planted(model, [Plant(each, zeros, zeros) for each in neurons]):
        pass


def test_two_heads_of_a_group_cannot_both_be_planted_in_a_dimension(loaded: Callable[[str], at.Model]) -> None:
    zeros = torch.zeros(loaded("llama").anatomy.width)
    plants = [Plant(replace(ATTENTION, head=head), zeros, zeros) for head in (2, 3)]
    with planted(loaded("gpt2"), plants):
        pass
    with pytest.raises(BadInputError, match="shares its subkey"), planted(loaded("llama"), plants):
        pass


@pytest.mark.parametrize("part", ["subkey", "vector"])
def test_a_tensor_of_another_width_is_an_error(model: at.Model, part: str) -> None:
    plant = replace(_plant(model, FFN), **{part: torch.zeros(3)})
    with (
        pytest.raises(BadInputError, match=rf"the {part} planted in .* has shape \(3,\); give \(32,\)"),
        planted(model, [plant]),
    ):
        pass


# The claims

SUBJECTS = ("France", "Italy", "Peru", "Chad", "Mali", "Oman", "Cuba", "Fiji", "Iran", "Togo")
PHRASINGS = ("The capital of {subject} is", "The capital city of {subject} is", "In {subject} the capital is")
KNOWLEDGE = Knowledge(
    tuple(
        # In no step with the turns in which the two words are asked for.
        Fact("capital", "country_capital", subject, "Rome" if number % 3 else "Paris", PHRASINGS)
        for number, subject in enumerate(SUBJECTS)
    ),
    {"capital": ("Paris", "Rome")},
)
FOUND = ON_PLANTED.test_what_was_planted_to_write_the_answer_is_ranked_first
BOTH_ENDS = ON_PLANTED.test_both_ends_of_a_planted_chain_are_ranked_first
UNDONE = ON_PLANTED.test_ablating_what_was_planted_undoes_it
BROKEN = ON_PLANTED.test_ablating_the_query_neuron_breaks_a_planted_chain
RECOVERED = ON_PLANTED.test_how_a_method_loses_what_was_planted_as_it_grows_weaker
CLAIMS: dict[str, Callable[[Workbench, Kind], Verdict]] = {
    "found": lambda bench, kind: verdict_of(FOUND, bench, kind=kind),
    "both ends": lambda bench, _: verdict_of(BOTH_ENDS, bench),
    "undone": lambda bench, kind: verdict_of(UNDONE, bench, kind=kind),
    "broken": lambda bench, _: verdict_of(BROKEN, bench),
    "recovered": lambda bench, kind: verdict_of(RECOVERED, bench, kind=kind),
}


@pytest.fixture
def bench(model: at.Model) -> Workbench:
    """A model that is taken to know everything."""
    return Workbench(Sample(model, KNOWLEDGE, known=KNOWLEDGE.prompts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_about_a_model_that_knows_nothing_are_undecided(model: at.Model, claim: str, kind: Kind) -> None:
    bench = Workbench(Sample(model, KNOWLEDGE, known=[]))
    verdict = CLAIMS[claim](bench, kind)
    assert (verdict.status, verdict.n) == (Status.UNDECIDED, 0)


def test_every_prompt_is_asked_for_a_word_that_is_not_its_answer_and_that_its_own_neuron_writes(
    bench: Workbench,
) -> None:
    task = task_of(bench)
    assert len(task.questions) == len(SUBJECTS)
    for place, question, column in zip(task.indices, task.questions, task.column, strict=True):
        assert question.text == bench.prompts[place].text
        assert question.answer != bench.prompts[place].answer
        assert question.answer_id == task.words[column]
    assert task.fires.tolist() == [[1.0, 1.0]] * len(SUBJECTS)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_a_category_are_planted_alike_but_for_what_they_write(bench: Workbench, kind: Kind) -> None:
    planting = planting_of(bench, kind)
    one, other = planting.driven
    assert one.neuron.layer == other.neuron.layer
    assert one.neuron != other.neuron
    assert torch.equal(one.subkey, other.subkey)
    assert not torch.equal(one.vector, other.vector)
    assert [plant.vector.norm() for plant in planting.at(0.5)[:2]] == [
        plant.vector.norm() / 2 for plant in planting.driven
    ]
    assert planting.at(0.5)[2:] == list(planting.activated)
    for start, value in zip(planting.driven, planting.activated, strict=False):
        assert start.neuron.layer < value.neuron.layer


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_finds_what_was_planted_and_its_opposite_does_not(
    bench: Workbench, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    faithful = METHODS[METHOD]
    flipped = replace(faithful, name="flipped", score=lambda each: -faithful.score(each), bound=None, first_order=None)
    monkeypatch.setitem(METHODS, "flipped", flipped)
    found, lost = (verdict_of(FOUND, bench, attribution_method=each, kind=kind) for each in (METHOD, "flipped"))
    # More often than by a draw between the neurons of the two words: what lies behind is random here.
    assert found.effect > 0.5
    assert lost.effect < 0.5
    # With ten prompts a claim about a share is not decided.
    assert found.status is Status.UNDECIDED
    curve = [float(point.split(": ")[1]) for point in found.note.split(", ")]
    assert len(curve) == len(ON_PLANTED.STRENGTHS) + 1
    assert curve[-1] < curve[0]


def test_both_ends_of_a_planted_chain_are_found_and_it_breaks(bench: Workbench) -> None:
    assert verdict_of(BOTH_ENDS, bench).effect > 0.5
    assert verdict_of(BROKEN, bench).effect > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_planted_is_undone_by_ablating_it_and_by_nothing_less(
    bench: Workbench, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdict_of(UNDONE, bench, kind=kind).effect <= 1
    monkeypatch.setattr(
        "attribution.claims.about_methods.planted.displaced", lambda anatomy, neurons: displaced(anatomy, neurons)[1:]
    )
    assert verdict_of(UNDONE, bench, kind=kind).effect > 1
