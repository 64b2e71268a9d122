"""Scores against a second implementation: METHOD's sections 1 to 4 written out in float64, every neuron in turn.

Nothing of the engine is used here but ``load``, ``attribute`` and the records it returns: the forward pass, the
frozen norm and the scores are computed from the weight file alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import attribution as at
from attribution.models.registry import registry

QUESTIONS = (("The capital of France is", " Paris"), ("The number of legs that a dog has is", " four"))
METHODS = (
    "log_prob_increase",
    "log_prob",
    "prob_increase",
    "vector_norm",
    "coefficient",
    "reciprocal_rank",
    "output_norm",
    "coefficient_by_rank",
)
# The engine's forward pass is float32: about 60 operations deep on numbers of order 10, each off by 1e-7.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Written:
    """What every neuron writes at the last position, and the sentence's frozen readout.

    Attributes:
        outputs: Neuron's fields to (coefficient, bare vector), in the order of records.
        stream: Layer to x, by unit: r^l_T for FFN, h^{l-1}_T for attention neurons.
        before_softmax: bs, with the scale of this sentence.
        logits: The model's own logits, final norm and its bias included.
    """

    outputs: dict[str, dict[tuple[int, ...], tuple[float, Tensor]]]
    stream: dict[str, list[Tensor]]
    before_softmax: Callable[[Tensor], Tensor]
    logits: Tensor


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attention_pattern(queries: Tensor, keys: Tensor) -> Tensor:
    """Causal attention weights, (query, source), of one head."""
    scores = queries @ keys.T / math.sqrt(queries.shape[-1])
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gpt2(ids: list[int], weights: dict[str, Tensor], config: dict[str, Any]) -> Written:
    w = {name.removeprefix("transformer."): value for name, value in weights.items()}
    layers, heads, width, eps = config["n_layer"], config["n_head"], config["n_embd"], config["layer_norm_epsilon"]
    dims = width // heads
    outputs: dict[str, dict[tuple[int, ...], tuple[float, Tensor]]] = {"ffn": {}, "attention": {}}
    stream: dict[str, list[Tensor]] = {"ffn": [], "attention": []}
    h = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for layer in range(layers):
        block = f"h.{layer}."
        stream["attention"].append(h[-1])
        normed = _layer_norm(h, w[block + "ln_1.weight"], w[block + "ln_1.bias"], eps)
        fused = normed @ w[block + "attn.c_attn.weight"] + w[block + "attn.c_attn.bias"]
        queries, keys, values = fused[:, :width], fused[:, width : 2 * width], fused[:, 2 * width :]
        o = w[block + "attn.c_proj.weight"]
        written = w[block + "attn.c_proj.bias"].repeat(len(ids), 1)
        for head in range(heads):
            own = slice(head * dims, (head + 1) * dims)
            pattern = _attention_pattern(queries[:, own], keys[:, own])
            written = written + pattern @ values[:, own] @ o[own]
            for dim in range(dims):
                for position in range(len(ids)):
                    coefficient = pattern[-1, position] * values[position, head * dims + dim]
                    outputs["attention"][layer, head, dim, position] = (float(coefficient), o[head * dims + dim])
        h = h + written
        stream["ffn"].append(h[-1])
        normed = _layer_norm(h, w[block + "ln_2.weight"], w[block + "ln_2.bias"], eps)
        m = _gelu_new(normed @ w[block + "mlp.c_fc.weight"] + w[block + "mlp.c_fc.bias"])
        down = w[block + "mlp.c_proj.weight"]
        for index in range(len(down)):
            outputs["ffn"][layer, index] = (float(m[-1, index]), down[index])
        h = h + m @ down + w[block + "mlp.c_proj.bias"]
    final = h[-1]
    unembedding = weights.get("lm_head.weight", w["wte.weight"])
    gamma, beta = w["ln_f.weight"], w["ln_f.bias"]
    scale = torch.sqrt(final.var(unbiased=False) + eps)

    def before_softmax(x: Tensor) -> Tensor:
        return (gamma * (x - x.mean(-1, keepdim=True)) / scale) @ unembedding.T

    return Written(outputs, stream, before_softmax, unembedding @ _layer_norm(final, gamma, beta, eps))


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of one head, (position, dim), in the half-split layout."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * frequency
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def _llama(ids: list[int], weights: dict[str, Tensor], config: dict[str, Any]) -> Written:
    w = {name.removeprefix("model."): value for name, value in weights.items()}
    layers, heads, eps = config["num_hidden_layers"], config["num_attention_heads"], config["rms_norm_eps"]
    dims = config["hidden_size"] // heads
    group = heads // config["num_key_value_heads"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    outputs: dict[str, dict[tuple[int, ...], tuple[float, Tensor]]] = {"ffn": {}, "attention": {}}
    stream: dict[str, list[Tensor]] = {"ffn": [], "attention": []}
    h = w["embed_tokens.weight"][ids]
    for layer in range(layers):
        block = f"layers.{layer}."
        stream["attention"].append(h[-1])
        normed = _rms_norm(h, w[block + "input_layernorm.weight"], eps)
        queries, keys, values = (normed @ w[f"{block}self_attn.{name}_proj.weight"].T for name in "qkv")
        o = w[block + "self_attn.o_proj.weight"].T
        written = torch.zeros_like(h)
        for head in range(heads):
            own, shared = slice(head * dims, (head + 1) * dims), (head // group) * dims
            kv = slice(shared, shared + dims)
            pattern = _attention_pattern(_rotate(queries[:, own], theta), _rotate(keys[:, kv], theta))
            written = written + pattern @ values[:, kv] @ o[own]
            for dim in range(dims):
                for position in range(len(ids)):
                    coefficient = pattern[-1, position] * values[position, shared + dim]
                    outputs["attention"][layer, head, dim, position] = (float(coefficient), o[head * dims + dim])
        h = h + written
        stream["ffn"].append(h[-1])
        normed = _rms_norm(h, w[block + "post_attention_layernorm.weight"], eps)
        gate = normed @ w[block + "mlp.gate_proj.weight"].T
        m = gate * torch.sigmoid(gate) * (normed @ w[block + "mlp.up_proj.weight"].T)
        down = w[block + "mlp.down_proj.weight"].T
        for index in range(len(down)):
            outputs["ffn"][layer, index] = (float(m[-1, index]), down[index])
        h = h + m @ down
    final = h[-1]
    unembedding = weights.get("lm_head.weight", w["embed_tokens.weight"])
    gamma = w["norm.weight"]
    scale = torch.sqrt(final.square().mean() + eps)

    def before_softmax(x: Tensor) -> Tensor:
        return (gamma * x / scale) @ unembedding.T

    return Written(outputs, stream, before_softmax, unembedding @ _rms_norm(final, gamma, eps))


def _written(folder: Path, ids: list[int]) -> Written:
    """Run a model by hand from its folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    return {"gpt2": _gpt2, "llama": _llama}[config["model_type"]](ids, weights, config)


def _score(method: str, written: Written, x: Tensor, coefficient: float, vector: Tensor, answer: int) -> float:
    """One method's score of one neuron, as METHOD's list a) to h) has it."""

    def log_prob(state: Tensor) -> Tensor:
        return written.before_softmax(state).log_softmax(-1)[answer]

    def rank() -> int:
        bare = written.before_softmax(vector)
        return 1 + int((bare > bare[answer]).sum())

    scores: dict[str, Callable[[], Tensor | float]] = {
        "log_prob_increase": lambda: log_prob(x + coefficient * vector) - log_prob(x),
        "log_prob": lambda: log_prob(coefficient * vector),
        "prob_increase": lambda: log_prob(x + coefficient * vector).exp() - log_prob(x).exp(),
        "vector_norm": vector.norm,
        "coefficient": lambda: abs(coefficient),
        "reciprocal_rank": lambda: 1 / rank(),
        "output_norm": lambda: abs(coefficient) * vector.norm(),
        "coefficient_by_rank": lambda: abs(coefficient) / rank(),
    }
    return float(scores[method]())


def _fields(neuron: at.FFNNeuron | at.AttentionNeuron) -> tuple[int, ...]:
    if isinstance(neuron, at.FFNNeuron):
        return (neuron.layer, neuron.index)
    return (neuron.layer, neuron.head, neuron.dim, neuron.position)


def _brute_force(method: str, written: Written, unit: str, answer: int) -> dict[tuple[int, ...], float]:
    """Score every neuron of a unit, one at a time."""
    return {
        fields: _score(method, written, written.stream[unit][fields[0]], coefficient, vector, answer)
        for fields, (coefficient, vector) in written.outputs[unit].items()
    }


def _check(ranking: at.Ranking, expected: dict[tuple[int, ...], float]) -> None:
    """Compare a full ranking with brute force: the same neurons, their scores, and their order."""
    found = [_fields(neuron) for neuron in ranking.neurons]
    assert sorted(found) == sorted(expected)
    wanted = [expected[fields] for fields in found]
    assert ranking.scores.tolist() == pytest.approx(wanted, abs=TOLERANCE, rel=1e-5)
    # Neighbours in the ranking may stand in either order only if brute force cannot tell them apart either.
    slack = 2 * TOLERANCE * max(1.0, max(abs(value) for value in wanted))
    assert all(after <= before + slack for before, after in pairwise(wanted))
    # Scores that float64 rounding cannot tell apart are a run, and a run falls in the order of records.
    falling = sorted(zip(ranking.scores.tolist(), found, strict=True), key=lambda pair: -pair[0])
    runs = [[falling[0][1]]]
    for (score, _), (next_score, after) in pairwise(falling):
        if score - next_score > ranking.exact.tolerance:
            runs.append([])
        runs[-1].append(after)
    assert found == [fields for run in runs for fields in sorted(run)]


@pytest.mark.parametrize("question", QUESTIONS, ids=["capital", "number"])
def test_the_forward_pass_by_hand_is_the_models_own(
    folder: Path, tokenizer: Any, plain_logits: Callable[..., Tensor], question: tuple[str, str]
) -> None:
    written = _written(folder, tokenizer.encode(question[0]))
    torch.testing.assert_close(written.logits, plain_logits(question[0]).double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("question", QUESTIONS, ids=["capital", "number"])
@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_scores_equal_brute_force(
    model: at.Model, folder: Path, tokenizer: Any, unit: str, question: tuple[str, str]
) -> None:
    ids = tokenizer.encode(question[0] + question[1])
    expected = _brute_force("log_prob_increase", _written(folder, ids[:-1]), unit, ids[-1])
    _check(at.attribute(model, *question, unit=unit, k=None), expected)


@pytest.mark.parametrize("unit", ["ffn", "attention"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_paper_equals_brute_force(
    model: at.Model, folder: Path, tokenizer: Any, method: str, unit: str
) -> None:
    prompt, answer = QUESTIONS[0]
    ids = tokenizer.encode(prompt + answer)
    expected = _brute_force(method, _written(folder, ids[:-1]), unit, ids[-1])
    _check(at.attribute(model, prompt, answer, method=method, unit=unit, k=None), expected)


@pytest.mark.parametrize("method", ["vector_norm", "reciprocal_rank"])
def test_methods_that_read_weights_alone_order_neurons_exactly_as_brute_force(
    model: at.Model, folder: Path, tokenizer: Any, method: str
) -> None:
    prompt, answer = QUESTIONS[0]
    ids = tokenizer.encode(prompt + answer)
    expected = _brute_force(method, _written(folder, ids[:-1]), "ffn", ids[-1])
    wanted = sorted(expected, key=lambda fields: (-expected[fields], fields))
    ranking = at.attribute(model, prompt, answer, method=method, k=None)
    assert [_fields(neuron) for neuron in ranking.neurons] == wanted


@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_top_ten_is_the_head_of_brute_force(model: at.Model, folder: Path, tokenizer: Any, unit: str) -> None:
    prompt, answer = QUESTIONS[1]
    ids = tokenizer.encode(prompt + answer)
    expected = _brute_force("log_prob_increase", _written(folder, ids[:-1]), unit, ids[-1])
    ranking = at.attribute(model, prompt, answer, unit=unit, k=10)
    assert len(ranking) == 10
    assert ranking.scores.tolist() == pytest.approx(sorted(expected.values(), reverse=True)[:10], abs=TOLERANCE)
    assert ranking.scores.tolist() == pytest.approx([expected[_fields(n)] for n in ranking.neurons], abs=TOLERANCE)


@pytest.mark.parametrize("unit", ["ffn", "attention"])
@pytest.mark.parametrize("name", ["bundled:gpt2", "bundled:llama"])
def test_bundled_scores_equal_brute_force(name: str, unit: str) -> None:
    model, folder = at.load(name), registry()[name].folder
    for prompt, answer in (("The capital of France is", " Paris"), ("The capital of Italy is", " Rome")):
        ids = model.tokenizer.encode(prompt + answer)
        written = _written(folder, ids[:-1])
        _check(
            at.attribute(model, prompt, answer, unit=unit, k=None),
            _brute_force("log_prob_increase", written, unit, ids[-1]),
        )
