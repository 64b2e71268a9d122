"""The query side: every share against loops written out by hand, and identities in every setting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import attribution as at
from attribution.engine.questions import question_of
from attribution.engine.subkeys import Readings, components_of, folded_subkeys, read_subkeys, shares
from attribution.engine.trace import Activations, read_activations
from attribution.errors import BadInputError
from attribution.models.anatomy import Anatomy
from attribution.models.norms import Norm, normalise
from attribution.prompts.tokens import pad
from attribution.records import Neuron

PROMPT, ANSWER = "The capital of France is", " Paris"
OTHER, OTHER_ANSWER = "The number of legs that a dog has is", " four"
EPS = torch.finfo(torch.float32).eps
STEADY = 4.0


def _with(model: at.Model, neurons: list[Neuron], scores: Tensor, prompt: str = PROMPT) -> at.Ranking:
    """A ranking of chosen neurons with chosen scores."""
    ranking = at.attribute(model, prompt, {PROMPT: ANSWER, OTHER: OTHER_ANSWER}[prompt], k=1)
    return replace(ranking, neurons=neurons, scores=scores.double())


def _length(model: at.Model, prompt: str = PROMPT) -> int:
    return len(model.tokenizer.encode(prompt))


def _every_neuron(anatomy: Anatomy, length: int) -> list[Neuron]:
    ffn = [at.FFNNeuron(layer, index) for layer in range(anatomy.layers) for index in range(anatomy.ffn_neurons)]
    attention = [
        at.AttentionNeuron(layer, head, dim, position)
        for layer in range(anatomy.layers)
        for head in range(anatomy.heads)
        for dim in range(anatomy.head_dim)
        for position in range(length)
    ]
    return [*ffn, *attention]


def _some_neurons(anatomy: Anatomy, length: int, number: int) -> list[Neuron]:
    """A fixed choice over both kinds, all layers and all positions."""
    everything = _every_neuron(anatomy, length)
    generator = torch.Generator().manual_seed(5)
    ffn = anatomy.layers * anatomy.ffn_neurons
    indices = [
        torch.randperm(ffn, generator=generator),
        ffn + torch.randperm(len(everything) - ffn, generator=generator),
    ]
    return [everything[place] for part in indices for place in part[:number].tolist()]


def _steady_neurons(model: at.Model, number: int, prompt: str = PROMPT, **options: Any) -> list[Neuron]:
    """Some neurons whose terms are together at most ``STEADY`` times their sum."""
    traced = _traced(model, prompt)
    neurons = _some_neurons(model.anatomy, traced.length, 3 * number)
    readings = read_subkeys(model.anatomy, traced.components, neurons, **options)
    steady = shares(readings.terms, readings.counts, EPS).amplification <= STEADY
    chosen = [neuron for neuron, keep in zip(neurons, steady.tolist(), strict=True) if keep]
    ffn = [neuron for neuron in chosen if isinstance(neuron, at.FFNNeuron)]
    return [*ffn[:number], *chosen[len(ffn) :][:number]]


def _slack(model: at.Model, scores: Tensor) -> float:
    """How far query scores of steady neurons may differ between two float32 forward passes.

    Each pass rounds once for each of ``width`` products, in each of 2 L sublayers, terms that are at most ``STEADY``
    times the denominator; a share of that size takes over the denominator's relative error.
    """
    return 2 * model.anatomy.layers * model.anatomy.width * EPS * STEADY * (1 + STEADY) * float(scores.abs().sum())


def _scores(number: int) -> Tensor:
    """Importances of both signs."""
    return torch.randn(number, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _total(layers: pd.DataFrame, value_unit: str) -> dict[tuple[str, int | None], float]:
    """Query score of each component for one kind of value neuron."""
    own = layers[layers["value_unit"] == value_unit]
    return {
        (component, None if pd.isna(layer) else int(layer)): score
        for component, layer, score in zip(own["component"], own["layer"], own["query_score"], strict=True)
    }


def _by_neuron(ranking: at.QueryRanking) -> dict[at.FFNNeuron, float]:
    return dict(zip(ranking.neurons, ranking.scores.tolist(), strict=True))


# --- Against loops written out by hand ------------------------------------------------------------------------------

# Where each part is in a plain module of transformers, and how its weights are stored.
PARTS = {
    "gpt2": ("transformer.h", "ln_1", "ln_2", "attn", "mlp", "mlp.c_proj"),
    "llama": ("model.layers", "input_layernorm", "post_attention_layernorm", "self_attn", "mlp", "mlp.down_proj"),
}
CHOICES = [
    ("gpt2", "first_order", True, True),
    ("gpt2", "up", False, False),
    ("gpt2", "first_order", True, False),
    ("llama", "first_order", True, True),
    ("llama", "down", False, False),
    ("llama-biases", "first_order", True, True),
    ("llama-biases", "gate", True, True),
    ("llama-biases", "up", True, True),
    ("llama-biases", "down", True, False),
]


@dataclass(frozen=True)
class Plain:
    """One forward pass of plain transformers, in float64 from here on: lists over layers of (position, ...) tensors."""

    blocks: list[Any]
    embedding: Tensor
    attention: list[Tensor]
    ffn: list[Tensor]
    coefficients: list[Tensor]
    family: str


def _run_plain(folder: Path, prompt: str, tokenizer: Any) -> Plain:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    family = network.config.model_type
    path, _, _, attention_name, ffn_name, down_name = PARTS[family]
    blocks = list(network.get_submodule(path))
    seen: dict[str, list[Tensor]] = {"in": [], "attention": [], "ffn": [], "coefficients": []}

    def keep(name: str, tensor: Any) -> None:
        seen[name].append((tensor[0] if isinstance(tensor, tuple) else tensor)[0].double())

    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: keep("in", args))
        block.get_submodule(attention_name).register_forward_hook(lambda _m, _i, out: keep("attention", out))
        block.get_submodule(down_name).register_forward_pre_hook(lambda _, args: keep("coefficients", args))
        block.get_submodule(ffn_name).register_forward_hook(lambda _m, _i, out: keep("ffn", out))
    with torch.no_grad():
        network(torch.tensor([tokenizer.encode(prompt)]))
    return Plain(blocks, seen["in"][0], seen["attention"], seen["ffn"], seen["coefficients"], family)


def _norm_by_hand(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return sigma, gamma, beta and whether the norm centres."""
    gamma = module.weight.detach().double()
    if isinstance(module, torch.nn.LayerNorm):
        return torch.sqrt(x.var(unbiased=False) + module.eps), gamma, module.bias.detach().double(), True
    return torch.sqrt(x.square().mean() + module.variance_epsilon), gamma, torch.zeros_like(gamma), False


def _ffn_key_by_hand(mlp: Any, family: str, index: int, normed: Tensor, subkey: str) -> tuple[Tensor, float]:
    """Return the subkey of an FFN neuron and the bias that goes with it.

    The first-order subkey is the gradient of the coefficient by what the FFN reads, by automatic differentiation.
    """
    zero = torch.zeros((), dtype=torch.float64)
    if family == "gpt2":
        rows = {"up": (mlp.c_fc.weight[:, index].double(), mlp.c_fc.bias[index].double())}
        down = mlp.c_proj.weight[index].double()
    else:
        rows = {
            name: (module.weight[index].double(), zero if module.bias is None else module.bias[index].double())
            for name, module in (("up", mlp.up_proj), ("gate", mlp.gate_proj))
        }
        down = mlp.down_proj.weight[:, index].double()
    rows = {name: (row.detach(), bias.detach()) for name, (row, bias) in rows.items()}
    if subkey == "down":
        return down.detach(), 0.0
    if subkey in rows:
        return rows[subkey][0], float(rows[subkey][1])
    x = normed.clone().requires_grad_()
    biases = {name: bias.clone().requires_grad_() for name, (_, bias) in rows.items()}
    pre = {name: row @ x + biases[name] for name, (row, _) in rows.items()}
    if family == "gpt2":
        coefficient = torch.nn.functional.gelu(pre["up"], approximate="tanh")
    else:
        coefficient = pre["gate"] * torch.sigmoid(pre["gate"]) * pre["up"]
    key, *slopes = torch.autograd.grad(coefficient, [x, *biases.values()])
    return key, sum(float(slope * bias.detach()) for slope, bias in zip(slopes, biases.values(), strict=True))


def _value_key_by_hand(block: Any, family: str, neuron: at.AttentionNeuron, heads: int) -> tuple[Tensor, float]:
    if family == "gpt2":
        width = block.attn.c_proj.weight.shape[1]
        column = 2 * width + neuron.head * (width // heads) + neuron.dim
        return block.attn.c_attn.weight[:, column].detach().double(), float(block.attn.c_attn.bias[column])
    projection, dims = block.self_attn.v_proj, block.self_attn.head_dim
    group = heads // (projection.weight.shape[0] // dims)
    row = (neuron.head // group) * dims + neuron.dim
    return projection.weight[row].detach().double(), 0.0 if projection.bias is None else float(projection.bias[row])


def _vector_by_hand(mlp: Any, family: str, index: int) -> Tensor:
    if family == "gpt2":
        return mlp.c_proj.weight[index].detach().double()
    return mlp.down_proj.weight[:, index].detach().double()


def _query_by_hand(
    plain: Plain, neurons: list[Neuron], scores: list[float], heads: int, subkey: str, centring: bool, biases: bool
) -> tuple[dict[tuple[str, str, int | None], float], dict[tuple[int, int], float]]:
    """Sum S_n (z_c . k'_n) / (sum over c of z_c . k'_n), one neuron and one component at a time."""
    _, attention_norm, ffn_norm, _, ffn_name, _ = PARTS[plain.family]
    by_component: dict[tuple[str, str, int | None], float] = {}
    by_neuron: dict[tuple[int, int], float] = {}
    for neuron, score in zip(neurons, scores, strict=True):
        is_ffn = isinstance(neuron, at.FFNNeuron)
        block = plain.blocks[neuron.layer]
        position = len(plain.embedding) - 1 if is_ffn else neuron.position
        parts: list[tuple[str, int | None, Tensor]] = [("embedding", None, plain.embedding[position])]
        for layer in range(neuron.layer):
            parts.append(("attention", layer, plain.attention[layer][position]))
            parts.append(("ffn", layer, plain.ffn[layer][position]))
        if is_ffn:
            parts.append(("attention", neuron.layer, plain.attention[neuron.layer][position]))
        x = torch.stack([part for _, _, part in parts]).sum(0)
        module = block.get_submodule(ffn_norm if is_ffn else attention_norm)
        sigma, gamma, beta, centred = _norm_by_hand(module, x)
        if is_ffn:
            normed = gamma * (x - x.mean() * centred) / sigma + beta
            key, bias = _ffn_key_by_hand(block.mlp, plain.family, neuron.index, normed, subkey)
        else:
            key, bias = _value_key_by_hand(block, plain.family, neuron, heads)
        folded = gamma * key
        if centring and centred:
            folded = folded - folded.mean()
        denominator = sum(float(part @ folded) for _, _, part in parts)
        constant = float(sigma * (beta @ key + bias))
        value_unit = "ffn" if is_ffn else "attention"
        if biases:
            denominator += constant
            at_bias = (value_unit, "bias", None)
            by_component[at_bias] = by_component.get(at_bias, 0.0) + score * constant / denominator
        for component, layer, part in parts:
            place = (value_unit, component, layer)
            by_component[place] = by_component.get(place, 0.0) + score * float(part @ folded) / denominator
        if is_ffn:
            continue
        for layer in range(neuron.layer):
            mlp = plain.blocks[layer].get_submodule(ffn_name)
            for index in range(plain.coefficients[layer].shape[1]):
                written = plain.coefficients[layer][position, index] * _vector_by_hand(mlp, plain.family, index)
                part = score * float(written @ folded) / denominator
                by_neuron[layer, index] = by_neuron.get((layer, index), 0.0) + part
    return by_component, by_neuron


@pytest.mark.parametrize(("architecture_name", "subkey", "centring", "biases"), CHOICES)
def test_query_scores_equal_loops_written_out_by_hand(
    loaded: Callable[[str], at.Model],
    make_folder: Callable[[str], Path],
    architecture_name: str,
    subkey: str,
    centring: bool,
    biases: bool,
) -> None:
    model = loaded(architecture_name)
    options = {"subkey": subkey, "centring": centring, "biases": biases}
    neurons = _steady_neurons(model, 8, **options)
    assert len(neurons) == 16
    scores = _scores(len(neurons))
    plain = _run_plain(make_folder(architecture_name), PROMPT, model.tokenizer)
    components, by_neuron = _query_by_hand(plain, neurons, scores.tolist(), model.anatomy.heads, **options)
    result = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, neurons, scores), k=None, **options)
    assert not result.left_out
    slack = _slack(model, scores)
    assert slack < 0.01 * float(scores.abs().sum())
    found = {
        (unit, component, layer): score
        for unit in ("ffn", "attention")
        for (component, layer), score in _total(result.layers, unit).items()
    }
    assert set(components) <= set(found)
    for place, score in found.items():
        assert score == pytest.approx(components.get(place, 0.0), abs=slack), place
    assert {(neuron.layer, neuron.index) for neuron in result.neurons} == set(by_neuron)
    for neuron, score in _by_neuron(result).items():
        assert score == pytest.approx(by_neuron[neuron.layer, neuron.index], abs=slack), neuron


# --- Identities, in every setting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    model: at.Model
    activations: Activations
    components: Tensor
    length: int

    @property
    def anatomy(self) -> Anatomy:
        return self.model.anatomy

    def read(self, neurons: list[Neuron], subkey: str = "first_order") -> Readings:
        return read_subkeys(self.anatomy, self.components, neurons, subkey=subkey)  # type: ignore[arg-type]

    def rounding(self, neurons: list[Neuron], readings: Readings) -> Tensor:
        """How far float32 can move each pre-activation, (n,).

        The model adds up to 2 L + 1 components in float32, subtracts a mean, divides, multiplies, and adds ``width``
        products and two biases: at most as many roundings as there are terms, plus ten, each of the size of all terms
        together.
        """
        terms = self.components.shape[0] + self.anatomy.width + 10
        bounds = []
        for number, neuron in enumerate(neurons):
            is_ffn = isinstance(neuron, at.FFNNeuron)
            reach = 2 * neuron.layer + (2 if is_ffn and not self.anatomy.parallel else 1)
            position = self.length - 1 if is_ffn else neuron.position
            sizes = self.components[:reach, position].abs().sum(0)
            key = readings.folded[number].abs()
            # A centred key has lost the mean that the model subtracts from its input instead.
            products = sizes @ key + sizes.mean() * key.sum()
            bounds.append(terms * EPS * (products + readings.terms[-1, number].abs()) / readings.scale[number])
        return torch.stack(bounds)


@cache
def _traced(model: at.Model, prompt: str = PROMPT) -> Traced:
    """The prompt is traced beside a longer or shorter one, so that padding takes part."""
    answers = {PROMPT: ANSWER, OTHER: OTHER_ANSWER}
    questions = [
        question_of(model, at.Prompt(text, answers.pop(text))) for text in (prompt, *(set(answers) - {prompt}))
    ]
    activations = read_activations(model, pad([question.ids for question in questions]), positions="all")
    length = len(questions[0].ids)
    return Traced(model, activations, components_of(activations, 0, length), length)


@pytest.fixture
def traced(representative_model: at.Model) -> Traced:
    return _traced(representative_model)


def _pre_activations(readings: Readings) -> Tensor:
    return readings.terms.sum(0) / readings.scale


def test_components_and_biases_add_up_to_the_pre_activations_of_every_ffn_neuron(traced: Traced) -> None:
    anatomy = traced.anatomy
    neurons: list[Neuron] = [n for n in _every_neuron(anatomy, traced.length) if isinstance(n, at.FFNNeuron)]
    up = traced.read(neurons, "up")
    u, u_error = _pre_activations(up), traced.rounding(neurons, up)
    activation = anatomy.subkeys[0].activation
    # The slope of each activation known here stays below 1.2, and each is a handful of roundings.
    if anatomy.subkeys[0].gate is None:
        expected, error = activation(u), 1.2 * u_error + 10 * EPS * (1 + u.abs())
    else:
        gate = traced.read(neurons, "gate")
        g, g_error = _pre_activations(gate), traced.rounding(neurons, gate)
        expected = activation(g) * u
        error = activation(g).abs() * u_error + 1.2 * g_error * (u.abs() + u_error) + 10 * EPS * (1 + expected.abs())
    seen = traced.activations.coefficients[:, 0, traced.length - 1].double().flatten()
    assert float(error.max()) < 0.05 * float(seen.abs().max())
    assert float(((seen - expected).abs() / error).max()) <= 1


def test_components_and_biases_add_up_to_every_value_of_every_head(traced: Traced) -> None:
    anatomy = traced.anatomy
    neurons: list[Neuron] = [n for n in _every_neuron(anatomy, traced.length) if isinstance(n, at.AttentionNeuron)]
    readings = traced.read(neurons)
    expected, error = _pre_activations(readings), traced.rounding(neurons, readings)
    if anatomy.value_clip is not None:
        assert (expected.abs() > anatomy.value_clip).any(), "nothing is clipped"
        expected = expected.clamp(-anatomy.value_clip, anatomy.value_clip)
    seen = traced.activations.values[:, 0, : traced.length].double().permute(0, 2, 3, 1).flatten()
    assert float(error.max()) < 0.05 * float(seen.abs().max())
    assert float(((seen - expected).abs() / error).max()) <= 1


def test_the_first_order_denominator_weighs_both_rows_of_a_gated_ffn(traced: Traced) -> None:
    neurons: list[Neuron] = [n for n in _every_neuron(traced.anatomy, traced.length) if isinstance(n, at.FFNNeuron)]
    if traced.anatomy.subkeys[0].gate is None:
        assert torch.equal(traced.read(neurons).terms, traced.read(neurons, "up").terms)
        return
    u, g = (_pre_activations(traced.read(neurons, kind)) for kind in ("up", "gate"))
    activation = traced.anatomy.subkeys[0].activation
    step = 1e-5
    slope = (activation(g + step) - activation(g - step)) / (2 * step)
    first_order = _pre_activations(traced.read(neurons))
    # The central difference errs by step^2 / 6 times a third derivative of order one, and by rounding over the step.
    torch.testing.assert_close(first_order, activation(g) * u + u * slope * g, atol=1e-8, rtol=1e-8)


def test_every_term_of_a_pre_activation_is_counted_and_no_other(traced: Traced) -> None:
    neurons = _some_neurons(traced.anatomy, traced.length, 40)
    own_attention = 0 if traced.anatomy.parallel else 1
    reach = [2 * n.layer + 1 + (own_attention if isinstance(n, at.FFNNeuron) else 0) for n in neurons]
    for biases in (True, False):
        readings = read_subkeys(traced.anatomy, traced.components, neurons, biases=biases)
        assert readings.counts.tolist() == [number + biases for number in reach]
        for number, column in zip(reach, readings.terms.T, strict=True):
            assert column[:number].ne(0).all()
            assert column[number:-1].eq(0).all()
            assert biases or column[-1] == 0


def test_query_scores_of_all_components_add_up_to_the_importances(traced: Traced) -> None:
    model = traced.model
    neurons = _some_neurons(model.anatomy, traced.length, 60)
    scores = _scores(len(neurons))
    result = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, neurons, scores))
    assert len(result.value_neurons) + len(result.left_out) == len(neurons)
    for unit, kind in (("ffn", at.FFNNeuron), ("attention", at.AttentionNeuron)):
        kept = [
            float(score)
            for neuron, score in zip(result.value_neurons, result.value_scores, strict=True)
            if isinstance(neuron, kind)
        ]
        total = sum(_total(result.layers, unit).values())
        # Float64 throughout: one rounding for each of a column's terms and each neuron, of shares that large.
        slack = 200 * torch.finfo(torch.float64).eps * result.amplification * sum(abs(score) for score in kept)
        assert total == pytest.approx(sum(kept), abs=slack)


def test_query_neurons_and_the_bias_add_up_to_their_layer(traced: Traced) -> None:
    model, anatomy, activations = traced.model, traced.anatomy, traced.activations
    neurons: list[Neuron] = [
        neuron for neuron in _some_neurons(anatomy, traced.length, 60) if isinstance(neuron, at.AttentionNeuron)
    ]
    scores = _scores(len(neurons))
    result = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, neurons, scores), k=None)
    assert not result.left_out
    assert len(result) == result.candidates == anatomy.ffn_neurons * max(neuron.layer for neuron in neurons)
    readings = traced.read(neurons)
    weights = scores / readings.terms.sum(0)
    found, layers = _by_neuron(result), _total(result.layers, "attention")
    for layer in range(max(neuron.layer for neuron in neurons)):
        post_weight = (
            torch.ones(anatomy.width)
            if anatomy.sublayer(layer, "ffn").post_weight is None
            else anatomy.sublayer(layer, "ffn").post_weight
        )
        bias = anatomy.sublayer(layer, "ffn").bias
        expected = slack = 0.0
        for number, neuron in enumerate(neurons):
            if neuron.layer <= layer:
                continue
            post_scale = activations.ffn_post_scale[layer, 0, neuron.position].double()
            key, weight = readings.folded[number] * post_weight.double() * post_scale, weights[number]
            expected += 0.0 if bias is None else float(weight * (bias.double() @ key))
            m = activations.coefficients[layer, 0, neuron.position].double()
            # The layer's output is a float32 dot product over its neurons; the rest is float64.
            size = m.abs() @ anatomy.sublayer(layer, "ffn").vectors.double().abs() + (
                0 if bias is None else bias.double().abs()
            )
            slack += (anatomy.ffn_neurons + 10) * EPS * float(weight.abs() * (size @ key.abs()))
        expected += sum(score for neuron, score in found.items() if neuron.layer == layer)
        assert slack < 0.1 * abs(layers["ffn", layer]) + 0.1
        assert expected == pytest.approx(layers["ffn", layer], abs=slack)


# --- Choices --------------------------------------------------------------------------------------------------------


def _explained(model: at.Model, neurons: list[Neuron], **options: Any) -> at.QueryRanking:
    return at.query(model, PROMPT, ANSWER, value_neurons=_with(model, neurons, _scores(len(neurons))), **options)


@pytest.mark.parametrize(("name", "shared"), [("gpt2", False), ("llama", True), ("falcon-grouped", True)])
def test_heads_share_their_query_side_exactly_where_they_share_a_key_value_head(
    loaded: Callable[[str], at.Model], name: str, shared: bool
) -> None:
    model = loaded(name)
    first, same, other = (
        at.query(model, PROMPT, ANSWER, value_neurons=_with(model, [at.AttentionNeuron(2, head, 3, 1)], torch.ones(1)))
        for head in (0, 1, 2)
    )
    assert first.layers.equals(same.layers) == shared
    assert (first.neurons == same.neurons) == shared
    assert not first.layers.equals(other.layers)


def test_centring_matters_for_layer_norm_alone(loaded: Callable[[str], at.Model]) -> None:
    for name, matters in (("gpt2", True), ("llama", False), ("olmo2", False)):
        model = loaded(name)
        neurons = _some_neurons(model.anatomy, _length(model), 4)
        with_it, without = (_explained(model, neurons, centring=centring).layers for centring in (True, False))
        assert with_it.equals(without) != matters, name


def test_biases_are_a_component_that_can_be_left_out(loaded: Callable[[str], at.Model]) -> None:
    for name, matters in (("gpt2", True), ("llama", False), ("llama-biases", True)):
        model = loaded(name)
        neurons = _some_neurons(model.anatomy, _length(model), 4)
        with_them, without = (_explained(model, neurons, biases=biases).layers for biases in (True, False))
        assert "bias" not in set(without["component"])
        rest = with_them[with_them["component"] != "bias"].reset_index(drop=True)
        assert rest.equals(without) != matters, name


def test_the_subkey_of_a_plain_ffn_is_its_row_and_that_of_a_gated_one_is_a_choice(
    loaded: Callable[[str], at.Model],
) -> None:
    plain, gated = loaded("gpt2"), loaded("llama")
    neurons: list[Neuron] = [at.FFNNeuron(2, 5), at.FFNNeuron(1, 7)]
    assert _explained(plain, neurons).layers.equals(_explained(plain, neurons, subkey="up").layers)
    kinds = ("first_order", "gate", "up", "down")
    frames = [_explained(gated, neurons, subkey=kind).layers for kind in kinds]
    assert all(not a.equals(b) for number, a in enumerate(frames) for b in frames[:number])
    attention: list[Neuron] = [at.AttentionNeuron(2, 1, 3, 2)]
    first, *others = (_explained(gated, attention, subkey=kind).layers for kind in kinds)
    assert all(first.equals(other) for other in others)


# --- Denominators near zero -----------------------------------------------------------------------------------------


FAINT = {"ffn": at.FFNNeuron(1, 4), "attention": at.AttentionNeuron(1, 2, 5, 1)}


@pytest.fixture
def faint(make_folder: Callable[[str], Path], loaded: Callable[[str], at.Model], tmp_path: Path) -> Any:
    """Load a GPT-2 in which the bias of one neuron of ``FAINT`` cancels all but a part of its pre-activation."""

    def make(kind: str, remains: float) -> at.Model:
        sound = _traced(loaded("gpt2"))
        anatomy, neuron = sound.anatomy, FAINT[kind]
        if isinstance(neuron, at.FFNNeuron):
            stream, norm, part, column = (
                sound.components[:4, -1].sum(0),
                anatomy.sublayer(1, "ffn").input_norm,
                "mlp.c_fc",
                neuron.index,
            )
        else:
            stream, norm, part = (
                sound.components[:3, neuron.position].sum(0),
                anatomy.sublayer(1, "attention").input_norm,
                "attn.c_attn",
            )
            column = 2 * anatomy.width + neuron.head * anatomy.head_dim + neuron.dim
        folder = tmp_path / f"{kind}-{remains}"
        shutil.copytree(make_folder("gpt2"), folder)
        weights = load_file(folder / "model.safetensors")
        read = normalise(stream, norm) @ weights[f"transformer.h.1.{part}.weight"][:, column].double()
        weights[f"transformer.h.1.{part}.bias"][column] = -read * (1 - remains)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return at.load(str(folder))

    return make


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_a_value_neuron_whose_components_cancel_is_left_out_and_named(faint: Any, kind: str) -> None:
    model, sound = faint(kind, 0.0), [at.FFNNeuron(2, 3), at.AttentionNeuron(2, 0, 1, 2)]
    scores = torch.tensor([3.0, 1.0, 2.0])
    result = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, [FAINT[kind], *sound], scores), k=None)
    assert result.left_out == [FAINT[kind]]
    assert "1 left out" in repr(result)
    assert result.value_neurons == sound
    assert result.value_scores.tolist() == [1.0, 2.0]
    alone = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, sound, scores[1:]), k=None)
    assert result.layers.equals(alone.layers)
    assert _by_neuron(result) == _by_neuron(alone)
    assert result.amplification == alone.amplification


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_a_value_neuron_with_a_small_pre_activation_counts_and_the_amplification_tells(faint: Any, kind: str) -> None:
    model = faint(kind, 1e-3)
    result = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, [FAINT[kind]], torch.ones(1)))
    assert result.left_out == []
    # A thousandth is left of the bias, which is one of several terms of that order.
    assert 100 < result.amplification < 1e5
    totals = _total(result.layers, kind)
    assert max(abs(score) for score in totals.values()) > 100
    assert sum(abs(score) for score in totals.values()) == pytest.approx(result.amplification)
    assert sum(totals.values()) == pytest.approx(1.0, abs=1e-9)
    # Without the bias nothing cancels.
    without = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, [FAINT[kind]], torch.ones(1)), biases=False)
    assert without.amplification < 100


def test_the_amplification_is_that_of_the_neuron_that_cancels_most(model: at.Model) -> None:
    neurons = _some_neurons(model.anatomy, _length(model), 3)
    together = _explained(model, neurons)
    alone = [_explained(model, [neuron]).amplification for neuron in neurons]
    assert together.amplification == pytest.approx(max(alone), rel=1e-12)
    assert max(alone) > 1.1 * min(alone) > 1


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_it_is_an_error_when_every_value_neuron_is_left_out(faint: Any, kind: str) -> None:
    model = faint(kind, 0.0)
    with pytest.raises(BadInputError, match=r"none of the 1 value neurons .* zero in float32; give other") as caught:
        at.query(model, PROMPT, ANSWER, value_neurons=_with(model, [FAINT[kind]], torch.ones(1)))
    assert repr(PROMPT) in str(caught.value)


def test_a_sum_at_its_rounding_bound_is_left_out_and_one_above_it_is_kept() -> None:
    eps, counts = 2.0**-10, torch.tensor([2.0, 2.0, 3.0, 1.0, 1.0])
    # The bound of a pair is 2 eps (|a| + |b|); 1 - b exceeds it where b < (1 - 2 eps) / (1 + 2 eps).
    edge = (1 - 2 * eps) / (1 + 2 * eps)
    terms = torch.tensor(
        [[1.0, 1.0, 1.0, 0.0, 1e-30], [-edge - 1e-9, -edge + 1e-9, -edge + 1e-9, 0.0, 0.0]], dtype=torch.float64
    )
    divided = shares(terms, counts, eps)
    assert divided.kept.tolist() == [False, True, False, False, True]
    assert divided.share[:, ~divided.kept].eq(0).all()
    assert divided.amplification[~divided.kept].isinf().all()
    assert divided.amplification[1] == pytest.approx(1 / (2 * eps), rel=1e-6)
    assert divided.share[:, 4].tolist() == [1.0, 0.0]


COLUMNS = st.lists(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=3, max_size=3), min_size=1, max_size=12
)


@given(COLUMNS, st.sampled_from([2.0**-52, 2.0**-23, 2.0**-7]))
def test_shares_add_up_to_one_and_say_how_far_terms_cancel(rows: list[list[float]], eps: float) -> None:
    terms = torch.tensor(rows, dtype=torch.float64)
    divided = shares(terms, torch.full((3,), float(len(rows))), eps)
    for column in range(3):
        own = divided.share[:, column]
        if divided.kept[column]:
            amplification = float(divided.amplification[column])
            # One rounding for each share and each addition, of terms that large; no more than a quarter here.
            slack = 2 * len(rows) * torch.finfo(torch.float64).eps * amplification
            assert float(own.sum()) == pytest.approx(1.0, abs=slack)
            assert float(own.abs().sum()) == pytest.approx(amplification, rel=1e-12)
            assert 1 - 1e-12 <= amplification <= 1 / (len(rows) * eps) * (1 + 1e-12)
        else:
            assert own.eq(0).all()


@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.booleans())
def test_a_folded_subkey_reads_the_raw_stream_as_the_subkey_reads_the_normed_one(
    seed: int, centred: bool, weighted: bool, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Means far from zero, so that centring shows.
    stream, keys, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) + 2 for size in [(16,), (4, 16), (16,), (16,)]
    )
    norm = Norm(weight if weighted else None, bias if biased else None, 1e-5, centred)
    scale = torch.sqrt((stream.var(unbiased=False) if centred else stream.square().mean()) + norm.eps)
    offset = bias if biased else torch.zeros(16, dtype=torch.float64)
    expected = (normalise(stream, norm) - offset) @ keys.T
    # Sixteen products of numbers up to ten, in float64.
    torch.testing.assert_close(folded_subkeys(keys, norm) @ stream / scale, expected, atol=1e-10, rtol=1e-10)
    uncentred = folded_subkeys(keys, norm, centring=False)
    assert torch.equal(uncentred, keys * weight if weighted else keys)
    assert torch.equal(folded_subkeys(keys, None), keys)


# --- Value neurons, sizes and order ---------------------------------------------------------------------------------


def test_the_papers_numbers_of_value_neurons_are_taken_unless_others_are_given(model: at.Model) -> None:
    anatomy = model.anatomy
    prompts = [at.Prompt(PROMPT, ANSWER), at.Prompt("Paris", ANSWER)]
    for prompt, result in zip(prompts, at.query(model, prompts), strict=True):
        possible = anatomy.layers * anatomy.heads * anatomy.head_dim * _length(model, prompt.text)
        rankings = [
            at.attribute(model, prompt, unit="ffn", k=100),
            at.attribute(model, prompt, unit="attention", k=min(200, possible)),
        ]
        assert not result.left_out
        assert result.value_neurons == [neuron for ranking in rankings for neuron in ranking.neurons]
        # Two float32 forward passes, one of them padded, about 60 operations deep on numbers of order 10.
        scores = torch.cat([ranking.scores for ranking in rankings])
        torch.testing.assert_close(result.value_scores, scores, atol=1e-4, rtol=0)
    assert possible < 200, "the last prompt is not short enough to have fewer than the paper's number"


def test_records_are_weighted_by_their_log_probability_increase(model: at.Model) -> None:
    ranking = at.attribute(model, PROMPT, ANSWER, unit="attention", k=12)
    mixed = [*ranking.neurons, *at.attribute(model, PROMPT, ANSWER, unit="ffn", k=5).neurons]
    by_ranking = at.query(model, PROMPT, ANSWER, value_neurons=ranking)
    by_records = at.query(model, PROMPT, ANSWER, value_neurons=mixed)
    assert _total(by_records.layers, "attention") == pytest.approx(_total(by_ranking.layers, "attention"), abs=1e-9)
    assert _by_neuron(by_records) == pytest.approx(_by_neuron(by_ranking), abs=1e-9)
    assert set(by_ranking.layers["value_unit"]) == {"attention"}
    assert set(by_records.layers["value_unit"]) == {"ffn", "attention"}


def test_several_rankings_are_taken_together(model: at.Model) -> None:
    rankings = [at.attribute(model, PROMPT, ANSWER, unit=unit, k=k) for unit, k in (("ffn", 100), ("attention", 200))]
    together, papers = at.query(model, PROMPT, ANSWER, value_neurons=rankings), at.query(model, PROMPT, ANSWER)
    assert together.value_neurons == papers.value_neurons
    assert together.neurons == papers.neurons
    torch.testing.assert_close(together.scores, papers.scores)
    pd.testing.assert_frame_equal(together.layers, papers.layers)
    with pytest.raises(BadInputError, match="more than once"):
        at.query(model, PROMPT, ANSWER, value_neurons=rankings[:1] * 2)


def test_query_neurons_stand_in_order_of_score_and_ties_in_order_of_records(loaded: Callable[[str], at.Model]) -> None:
    # Half of OPT's coefficients are exactly zero, and so are the scores of those neurons.
    model = loaded("opt")
    ranking = _with(model, [at.AttentionNeuron(2, 1, 3, 0)], torch.ones(1))
    every = at.query(model, PROMPT, ANSWER, value_neurons=ranking, k=None)
    scored = list(zip(every.neurons, every.scores.tolist(), strict=True))
    assert sum(score == 0 for _, score in scored) > 10
    for (neuron, score), (following, lower) in pairwise(scored):
        assert score > lower or (score == lower and neuron < following)
    for k in (1, 7):
        best = at.query(model, PROMPT, ANSWER, value_neurons=ranking, k=k)
        assert best.neurons == every.neurons[:k]
        assert torch.equal(best.scores, every.scores[:k])
        assert best.candidates == every.candidates == len(every)


def test_k_is_at_most_the_number_of_query_neurons(model: at.Model) -> None:
    ranking = _with(model, [at.AttentionNeuron(1, 1, 3, 0), at.FFNNeuron(2, 1)], torch.ones(2))
    result = at.query(model, PROMPT, ANSWER, value_neurons=ranking, k=10**6)
    assert len(result) == result.candidates == model.anatomy.ffn_neurons
    assert {neuron.layer for neuron in result.neurons} == {0}


@pytest.mark.parametrize("neuron", [at.FFNNeuron(2, 1), at.AttentionNeuron(0, 1, 2, 3)], ids=str)
def test_there_are_no_query_neurons_without_attention_value_neurons_above_a_layer(
    model: at.Model, neuron: Neuron
) -> None:
    result = at.query(model, PROMPT, ANSWER, value_neurons=_with(model, [neuron], torch.ones(1)))
    assert (len(result), result.candidates, result.scores.shape) == (0, 0, (0,))
    assert list(result.to_frame().columns) == ["layer", "index", "query_score"]
    assert "0 of 0 query FFN neurons" in repr(result)
    assert float(result.layers["query_score"].sum()) == pytest.approx(1.0, abs=1e-9)


def test_frames_list_every_component_once_and_every_neuron_by_rank(model: at.Model) -> None:
    neurons: list[Neuron] = [at.FFNNeuron(1, 1), at.AttentionNeuron(2, 1, 2, 3)]
    result = _explained(model, neurons, k=5)
    layers = model.anatomy.layers
    components = [("embedding", None)]
    components += [(kind, layer) for layer in range(layers) for kind in ("attention", "ffn")]
    for unit, reach in (("ffn", 4), ("attention", 5)):
        totals = _total(result.layers, unit)
        assert list(totals) == [*components, ("bias", None)]
        later = [totals[place] for place in components[reach:]]
        assert later == [0.0] * len(later)
        assert all(totals[place] != 0 for place in components[:reach])
    frame = result.to_frame()
    assert frame.index.tolist() == [1, 2, 3, 4, 5]
    assert [at.FFNNeuron(*row) for row in frame[["layer", "index"]].itertuples(index=False)] == result.neurons
    assert frame["query_score"].tolist() == result.scores.tolist()


def test_a_batch_gives_what_each_prompt_gives_alone(representative_model: at.Model) -> None:
    model = representative_model
    prompts = [at.Prompt(OTHER, OTHER_ANSWER), at.Prompt(PROMPT, ANSWER)]
    rankings = []
    for prompt in prompts:
        neurons = _steady_neurons(model, 20, prompt.text)
        rankings.append(_with(model, neurons, _scores(len(neurons)), prompt.text))
    together = at.query(model, prompts, value_neurons=rankings, k=None)
    for prompt, ranking, batched in zip(prompts, rankings, together, strict=True):
        alone = at.query(model, prompt, value_neurons=ranking, k=None)
        assert (batched.prompt, batched.answer, batched.left_out) == (prompt.text, prompt.answer, [])
        assert alone.left_out == []
        # Padding changes the order of float32 sums.
        slack = _slack(model, ranking.scores)
        assert slack < 0.05 * float(alone.layers["query_score"].abs().sum())
        assert _by_neuron(batched) == pytest.approx(_by_neuron(alone), abs=slack)
        for unit in ("ffn", "attention"):
            assert _total(batched.layers, unit) == pytest.approx(_total(alone.layers, unit), abs=slack)


# --- Misuse ---------------------------------------------------------------------------------------------------------

FFN, ATTENTION = at.FFNNeuron(1, 2), at.AttentionNeuron(1, 2, 3, 0)
REMEDY = re.compile(r"\b(use|give|pass|count)\b")


def _renamed(model: at.Model, **changes: Any) -> at.Ranking:
    return replace(at.attribute(model, PROMPT, ANSWER, k=2), **changes)


MISUSES: list[tuple[Callable[[at.Model], object], list[str]]] = [
    (lambda m: at.query(m, PROMPT), [repr(PROMPT), "without an answer"]),
    (lambda m: at.query(m, PROMPT, ANSWER, k=0), ["k = 0", "above 0"]),
    (lambda m: at.query(m, PROMPT, ANSWER, k=True), ["k = True"]),
    (lambda m: at.query(m, PROMPT, ANSWER, k=2.5), ["k = 2.5"]),
    (lambda m: at.query(m, PROMPT, ANSWER, subkey="sideways"), ["'sideways'", "first_order, gate, up, down"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[]), [repr(PROMPT), "empty"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=FFN), [repr(FFN), "a Ranking, several of them, or a list"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[(1, 2)]), ["(1, 2)", "FFNNeuron or AttentionNeuron"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[at.Head(1, 2)]), ["Head(layer=1, head=2)", "FFNNeuron"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[at.Layer(1, "ffn")]), ["Layer(", "FFNNeuron"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[FFN, FFN]), [repr(FFN), "more than once"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[at.FFNNeuron(3, 2)]), ["layer 3", "the model has 3"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[at.FFNNeuron(0, 48)]), ["index 48", "the model has 48"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[at.FFNNeuron(0, -1)]), ["index -1", "from 0"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[at.FFNNeuron("0", 1)]), ["layer '0'"]),  # type: ignore
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[replace(ATTENTION, head=4)]), ["head 4", "model has 4"]),
    (lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[replace(ATTENTION, dim=8)]), ["dim 8", "model has 8"]),
    (
        lambda m: at.query(m, PROMPT, ANSWER, value_neurons=[replace(ATTENTION, position=_length(m))]),
        ["position", "the prompt has"],
    ),
    (
        lambda m: at.query(m, PROMPT, ANSWER, value_neurons=_renamed(m, scores=torch.tensor([1.0, torch.nan]))),
        ["FFNNeuron(", "score nan", "finite"],
    ),
    (
        lambda m: at.query(m, PROMPT, ANSWER, value_neurons=_renamed(m, scores=torch.tensor([1.0, torch.inf]))),
        ["score inf", "finite"],
    ),
    (
        lambda m: at.query(m, PROMPT, ANSWER, value_neurons=_renamed(m, scores=torch.ones(3))),
        ["2 value neurons", "shape (3,)"],
    ),
    (
        lambda m: at.query(m, OTHER, OTHER_ANSWER, value_neurons=at.attribute(m, PROMPT, ANSWER, k=2)),
        [repr(PROMPT), repr(OTHER), "same prompt and answer"],
    ),
    (
        lambda m: at.query(m, PROMPT, OTHER_ANSWER, value_neurons=at.attribute(m, PROMPT, ANSWER, k=2)),
        [repr(ANSWER), repr(OTHER_ANSWER), "same prompt and answer"],
    ),
    (lambda m: at.query(m, [PROMPT], ANSWER, value_neurons=[[FFN], [FFN]]), ["1 prompt ", "2 sets"]),
    (lambda m: at.query(m, [PROMPT], ANSWER, value_neurons=[FFN]), [repr(FFN), "for each prompt"]),
    (
        lambda m: at.query(m, [PROMPT], ANSWER, value_neurons=at.attribute(m, PROMPT, ANSWER)),  # type: ignore
        ["list of 1 prompt ", "a Ranking as value_neurons"],
    ),
]


@pytest.mark.parametrize(("call", "words"), MISUSES, ids=[" ".join(words) for _, words in MISUSES])
def test_an_argument_that_cannot_be_used_is_named(
    model: at.Model, call: Callable[[at.Model], object], words: list[str]
) -> None:
    with pytest.raises(BadInputError) as caught:
        call(model)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert REMEDY.search(message), f"no word on what to do: {message}"
    for word in words:
        assert word in message, message


def test_a_plain_ffn_has_no_gate_row_to_ask_for(loaded: Callable[[str], at.Model]) -> None:
    with pytest.raises(BadInputError, match=r"'gate' needs a gated FFN, which gpt2 does not have; use 'first_order'"):
        at.query(loaded("gpt2"), PROMPT, ANSWER, subkey="gate")


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    modules = {path.stem for path in Path(at.__file__).parent.iterdir()}
    assert not modules & set(at.__all__)
