"""Ablating a neuron is setting its value vector to zero in the weights, and nothing more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attribution as at
from attribution.ablation import AblationKind, ablation_masks
from attribution.errors import BadInputError

PROMPT = "The capital of France is"
LONGER = "The number of legs that a dog has is"
FFN = [at.FFNNeuron(0, 5), at.FFNNeuron(1, 0), at.FFNNeuron(2, 47)]
ATTENTION = [at.AttentionNeuron(0, 3, 7, 0), at.AttentionNeuron(1, 2, 1, 4), at.AttentionNeuron(2, 0, 0, 1)]
PATHS = {
    "gpt2": {"ffn": "transformer.h.{}.mlp.c_proj", "attention": "transformer.h.{}.attn.c_proj"},
    "llama": {"ffn": "model.layers.{}.mlp.down_proj", "attention": "model.layers.{}.self_attn.o_proj"},
}
HEAD_DIM = 8
# Two float32 routes to one number: a masked coefficient, or a zeroed row of the weights.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

PlainLogits = Callable[..., Tensor]


def _with_zeroed_rows(plain: Any, family: str, neurons: Sequence[Any]) -> Any:
    """Copy the plain model and set the neurons' value vectors to zero there."""
    edited = copy.deepcopy(plain)
    for neuron in neurons:
        unit = "ffn" if isinstance(neuron, at.FFNNeuron) else "attention"
        row = neuron.index if unit == "ffn" else neuron.head * HEAD_DIM + neuron.dim
        projection = edited.get_submodule(PATHS[family][unit].format(neuron.layer))
        with torch.no_grad():
            # nn.Linear stores (output, input), GPT-2's Conv1D (input, output).
            (projection.weight.T if isinstance(projection, nn.Linear) else projection.weight)[row] = 0
    return edited


@pytest.mark.parametrize("prompt", [PROMPT, LONGER])
def test_an_empty_edit_reproduces_the_logits_bit_for_bit(
    model: at.Model, plain_logits: PlainLogits, prompt: str
) -> None:
    assert torch.equal(at.ablate(model, prompt, []), plain_logits(prompt))


def test_a_row_without_neurons_is_untouched_by_its_neighbours_edit(model: at.Model, plain_logits: PlainLogits) -> None:
    edited, untouched = at.ablate(model, [PROMPT, PROMPT], [FFN + ATTENTION, []])
    torch.testing.assert_close(untouched, plain_logits(PROMPT), atol=1e-6, rtol=1e-6)
    assert (edited - untouched).abs().max() > 0.1


@pytest.mark.parametrize(
    "neurons", [*([n] for n in FFN), *([n] for n in ATTENTION), FFN, ATTENTION, FFN + ATTENTION], ids=str
)
def test_ablating_neurons_is_zeroing_their_rows_in_the_weights(
    model: at.Model, plain: Any, plain_logits: PlainLogits, family: str, neurons: list[Any]
) -> None:
    expected = plain_logits(PROMPT, _with_zeroed_rows(plain, family, neurons))
    torch.testing.assert_close(at.ablate(model, PROMPT, neurons), expected, **CLOSE)
    assert (expected - plain_logits(PROMPT)).abs().max() > 1e-3, "an edit without effect would prove nothing"


def test_an_attention_neuron_is_switched_off_at_every_source_position(model: at.Model) -> None:
    by_position = [at.ablate(model, PROMPT, [at.AttentionNeuron(0, 3, 7, position)]) for position in range(4)]
    for logits in by_position[1:]:
        assert torch.equal(logits, by_position[0])
    every = at.ablate(model, PROMPT, [at.AttentionNeuron(0, 3, 7, position) for position in range(4)])
    assert torch.equal(every, by_position[0])


def test_ablation_reaches_earlier_positions_too(model: at.Model, plain: Any, tokenizer: Any) -> None:
    """A first-layer neuron also feeds later layers through earlier positions; the last alone is another experiment."""
    path = PATHS[model.anatomy.family.model_type]["ffn"].format(0)

    def at_last_position_only(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        masked = inputs[0].clone()
        masked[:, -1, 5] = 0
        return (masked,)

    with plain.get_submodule(path).register_forward_pre_hook(at_last_position_only), torch.no_grad():
        last_only = plain(tokenizer.encode(PROMPT, return_tensors="pt")).logits[0, -1]
    assert (at.ablate(model, PROMPT, [at.FFNNeuron(0, 5)]) - last_only).abs().max() > 1e-3


def test_a_batch_of_different_edits_equals_one_at_a_time(model: at.Model) -> None:
    variants: list[list[Any]] = [[], FFN[:1], ATTENTION, FFN + ATTENTION[1:], FFN[2:], []]
    prompts = [PROMPT, LONGER, PROMPT, LONGER, LONGER, LONGER]
    together = at.ablate(model, prompts, variants)
    assert together.shape == (6, model.anatomy.vocabulary)
    for row, (prompt, neurons) in enumerate(zip(prompts, variants, strict=True)):
        torch.testing.assert_close(together[row], at.ablate(model, prompt, neurons), **CLOSE)


def test_the_weights_are_the_same_after_an_ablation(model: at.Model, plain: Any, plain_logits: PlainLogits) -> None:
    at.ablate(model, PROMPT, FFN + ATTENTION)
    weights = dict(model.network._module.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(weights[name], parameter), name
    assert torch.equal(at.ablate(model, PROMPT, []), plain_logits(PROMPT))


def test_a_last_layer_neuron_takes_exactly_its_own_output_away(
    model: at.Model, plain: Any, tokenizer: Any, family: str
) -> None:
    """Nothing comes after it but the final norm: h becomes h - m v."""
    projection = plain.get_submodule(PATHS[family]["ffn"].format(2))
    norm = plain.get_submodule(model.anatomy.family.final_norm)
    seen: dict[str, Tensor] = {}
    hooks = [
        projection.register_forward_pre_hook(lambda _, inputs: seen.update(m=inputs[0][0, -1])),
        norm.register_forward_pre_hook(lambda _, inputs: seen.update(h=inputs[0][0, -1])),
    ]
    with torch.no_grad():
        plain(tokenizer.encode(PROMPT, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        weight = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight
        index = int(seen["m"].abs().argmax())
        expected = plain.lm_head(norm(seen["h"] - seen["m"][index] * weight[index]))
        whole = plain.lm_head(norm(seen["h"]))
    torch.testing.assert_close(at.ablate(model, PROMPT, [at.FFNNeuron(2, index)]), expected, **CLOSE)
    assert (expected - whole).abs().max() > 1e-2


@pytest.mark.parametrize(
    "neuron",
    [
        at.FFNNeuron(3, 0),
        at.FFNNeuron(-1, 0),
        at.FFNNeuron(0, 48),
        at.FFNNeuron(0, -1),
        at.AttentionNeuron(3, 0, 0, 0),
        at.AttentionNeuron(0, 4, 0, 0),
        at.AttentionNeuron(0, 0, 8, 0),
        at.AttentionNeuron(0, 0, -1, 0),
    ],
    ids=str,
)
def test_a_neuron_outside_the_model_is_an_error(model: at.Model, neuron: Any) -> None:
    with pytest.raises(BadInputError, match=r"Neuron\(.*the model.*count from 0"):
        at.ablate(model, PROMPT, [neuron])


@pytest.mark.parametrize("thing", [(0, 5), "f0-5", at.Head(0, 1), at.Layer(0, "ffn")], ids=str)
def test_what_is_no_neuron_cannot_be_ablated(model: at.Model, thing: Any) -> None:
    with pytest.raises(BadInputError, match="cannot be ablated; pass FFNNeuron or AttentionNeuron"):
        at.ablate(model, PROMPT, [thing])


@pytest.mark.parametrize("kind", ["mean", "", "ZERO"])
def test_an_unknown_kind_is_an_error(model: at.Model, kind: str) -> None:
    with pytest.raises(BadInputError, match=f"ablation kind '{kind}' is unknown; use zero"):
        at.ablate(model, PROMPT, FFN, kind=kind)


def test_a_kind_may_be_given_as_the_enums_member(model: at.Model) -> None:
    assert torch.equal(
        at.ablate(model, PROMPT, FFN, kind=AblationKind.ZERO), at.ablate(model, PROMPT, FFN, kind="zero")
    )


def test_masks_mark_each_neuron_in_its_own_variant(model: at.Model) -> None:
    ffn, attention = ablation_masks([FFN, ATTENTION, []], model.anatomy)
    assert ffn.nonzero().tolist() == [[0, 0, 5], [1, 0, 0], [2, 0, 47]]
    assert attention.nonzero().tolist() == [[0, 1, 31], [1, 1, 17], [2, 1, 0]]
