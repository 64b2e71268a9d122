"""A model of two layers whose every number can be worked out on paper.

Width 2, so that LayerNorm turns every state into (1, -1) or (-1, 1); queries and keys are zero, so that attention is
uniform; the activation is relu. The prompt is tokens 0 and 1, the answer token 2. All biases that can be forgotten are
there. In the comments, states are (first, second).

Layer 0. States (2, 0) and (0, 2); normed (1, -1) and (-1, 1). Values are normed * (1, 3) + (1, 1): (2, -2) and (0, 4).
    Attention at T takes half of each through the rows (1, 0) and (0, 2), with bias (0.5, 0): (1, 2) + (0.5, 0).
    r = (1.5, 4), normed (-1, 1). Coefficients relu(1 + 1) = 2 and relu(-1) = 0 of (1, -1) and (5, 5).
    h = (3.5, 2). At position 0: r = (4.5, -4), normed (1, -1), coefficients 0 and 1, h = (9.5, 1).
Layer 1. Normed (1, -1) twice. Values (1, -1) twice, through the rows (0, 1) and (1, 0): A = (-1, 1).
    r = (2.5, 3), normed (-1, 1). Coefficients 1 and 2 of (0, 3) and (-1, 0.5).
    h = (0.5, 7), mean 3.75, so s = 3.25.

A vector (a, b) is centred to (-t, t) with t = (b - a) / 2, weighted by (1, 2), and divided by s. With the unembedding
rows (1, 0), (0, 1) and (-1, 1) its logits are -u, 2u and 3u with u = t / 3.25.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import attribution as at

# Far below what float32 can tell apart here: the norms' outputs are whole numbers.
EPS = 1e-12


def _fill(module: torch.nn.Module, weight: list[list[float]], bias: list[float]) -> None:
    module.weight.copy_(torch.tensor(weight))
    module.bias.copy_(torch.tensor(bias))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> at.Model:
    config = GPT2Config(
        vocab_size=3,
        n_positions=4,
        n_embd=2,
        n_layer=2,
        n_head=1,
        n_inner=2,
        activation_function="relu",
        layer_norm_epsilon=EPS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.transformer.wte.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        first, second = network.transformer.h
        for norm in (first.ln_1, first.ln_2, second.ln_1, second.ln_2):
            norm.weight.fill_(1.0)
        # Inputs are rows: queries, keys and values in columns 0-1, 2-3 and 4-5.
        _fill(first.attn.c_attn, [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 3]], [0, 0, 0, 0, 1, 1])
        _fill(first.attn.c_proj, [[1, 0], [0, 2]], [0.5, 0])
        _fill(first.mlp.c_fc, [[0, 1], [1, 0]], [1, 0])
        _fill(first.mlp.c_proj, [[1, -1], [5, 5]], [0, 0])
        _fill(second.attn.c_attn, [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], [0] * 6)
        _fill(second.attn.c_proj, [[0, 1], [1, 0]], [0, 0])
        _fill(second.mlp.c_fc, [[-1, 0], [0, 2]], [0, 0])
        _fill(second.mlp.c_proj, [[0, 3], [-1, 0.5]], [0, 0])
        network.transformer.ln_f.weight.copy_(torch.tensor([1.0, 2.0]))
        # Belongs to the model's logits, and to no vector's.
        network.transformer.ln_f.bias.copy_(torch.tensor([0.3, -0.7]))
        network.lm_head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    folder: Path = tmp_path_factory.mktemp("by_hand")
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"zero": 0, "one": 1, "two": 2}, unk_token="zero"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="zero").save_pretrained(folder)
    return at.load(str(folder))


def _log_p(t: float) -> float:
    """Log p(answer | (a, b)) with t = (b - a) / 2."""
    u = t / 3.25
    return 3 * u - math.log(math.exp(-u) + math.exp(2 * u) + math.exp(3 * u))


def _importance(v: float, x: float) -> float:
    return _log_p(x + v) - _log_p(x)


BY_HAND: dict[str, list[tuple[object, float]]] = {
    "ffn": [
        # x is r: t = 1.25 in layer 0, 0.25 in layer 1. The last two tie, and fall by index.
        (at.FFNNeuron(1, 0), _importance(1.5, 0.25)),
        (at.FFNNeuron(1, 1), _importance(1.5, 0.25)),
        (at.FFNNeuron(0, 1), 0.0),
        (at.FFNNeuron(0, 0), _importance(-2.0, 1.25)),
    ],
    "attention": [
        # x is h of the layer below: t = 1 in layer 0, -0.75 in layer 1.
        (at.AttentionNeuron(0, 0, 1, 1), _importance(2.0, 1.0)),
        (at.AttentionNeuron(1, 0, 0, 0), _importance(0.25, -0.75)),
        (at.AttentionNeuron(1, 0, 0, 1), _importance(0.25, -0.75)),
        (at.AttentionNeuron(1, 0, 1, 0), _importance(0.25, -0.75)),
        (at.AttentionNeuron(1, 0, 1, 1), _importance(0.25, -0.75)),
        (at.AttentionNeuron(0, 0, 0, 1), 0.0),
        (at.AttentionNeuron(0, 0, 0, 0), _importance(-0.5, 1.0)),
        (at.AttentionNeuron(0, 0, 1, 0), _importance(-1.0, 1.0)),
    ],
    "head": [
        (at.Head(1, 0), _importance(1.0, -0.75)),
        # Without the bias of the output projection, which belongs to the layer alone.
        (at.Head(0, 0), _importance(0.5, 1.0)),
    ],
    "head_position": [
        (at.HeadPosition(0, 0, 1), _importance(2.0, 1.0)),
        (at.HeadPosition(1, 0, 0), _importance(0.5, -0.75)),
        (at.HeadPosition(1, 0, 1), _importance(0.5, -0.75)),
        (at.HeadPosition(0, 0, 0), _importance(-1.5, 1.0)),
    ],
    "layer": [
        (at.Layer(1, "ffn"), _importance(3.0, 0.25)),
        (at.Layer(1, "attention"), _importance(1.0, -0.75)),
        (at.Layer(0, "attention"), _importance(0.25, 1.0)),
        (at.Layer(0, "ffn"), _importance(-2.0, 1.25)),
    ],
}
BY_HAND["neuron"] = sorted(
    BY_HAND["ffn"] + BY_HAND["attention"],
    # Ties fall by layer, attention before FFN.
    key=lambda pair: (-round(pair[1], 9), pair[0].layer, isinstance(pair[0], at.FFNNeuron)),  # type: ignore[attr-defined]
)


@pytest.mark.parametrize("unit", BY_HAND)
def test_importances_are_those_worked_out_on_paper(model: at.Model, unit: str) -> None:
    ranking = at.attribute(model, "zero one", " two", unit=unit, k=None)
    expected = sorted(BY_HAND[unit], key=lambda pair: -round(pair[1], 9))
    assert ranking.neurons == [record for record, _ in expected]
    assert ranking.scores.tolist() == pytest.approx([score for _, score in expected], abs=1e-6)


def test_the_models_own_answer_is_that_worked_out_on_paper(model: at.Model) -> None:
    """The final state is normed to (-1, 1), weighted to (-1, 2), and moved by the bias to (-0.7, 1.3)."""
    logits = at.ablate(model, "zero one", [])
    assert logits.tolist() == pytest.approx([-0.7, 1.3, 2.0], abs=1e-5)


def test_ablating_a_neuron_is_what_it_is_on_paper(model: at.Model) -> None:
    """Without neuron (1, 1) the final state is (2.5, 6), without (1, 0) it is (0.5, 4): normed alike, so no change."""
    untouched = at.ablate(model, "zero one", [])
    for neuron in (at.FFNNeuron(1, 1), at.FFNNeuron(1, 0)):
        assert at.ablate(model, "zero one", [neuron]).tolist() == pytest.approx(untouched.tolist(), abs=1e-5)
    # Without both, and the dimensions of layer 1's head, it is h of layer 0, (3.5, 2): normed the other way round.
    both = [at.FFNNeuron(1, 0), at.FFNNeuron(1, 1), at.Head(1, 0)]
    turned = [1.0 + 0.3, -2.0 - 0.7, -1.0 - 0.3 - 2.0 - 0.7]
    assert at.ablate(model, "zero one", both).tolist() == pytest.approx(turned, abs=1e-5)
