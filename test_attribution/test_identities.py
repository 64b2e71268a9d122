"""The decomposition check holds on sound activations and breaks when any part is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attribution.decomposition import IDENTITIES, decomposition_errors
from attribution.model import Model
from attribution.tokens import TokenBatch, encode, pad
from attribution.trace import Activations, read_activations

PROMPTS = ("The capital of France is", "A ripe cherry")


@pytest.fixture
def traced(model: Model) -> tuple[Model, Activations, TokenBatch]:
    batch = pad([encode(model.tokenizer, prompt, context=model.anatomy.context) for prompt in PROMPTS])
    return model, read_activations(model, batch, positions="all"), batch


def test_every_identity_holds_within_rounding(traced: tuple[Model, Activations, TokenBatch]) -> None:
    model, activations, batch = traced
    errors = decomposition_errors(activations, model.anatomy, batch.mask)
    assert errors.keys() == IDENTITIES.keys()
    assert all(0 < error <= 1 for error in errors.values()), errors


def _without_one_ffn_neuron(activations: Activations) -> Activations:
    coefficients = activations.coefficients.clone()
    coefficients[1, :, :, 7] = 0
    return replace(activations, coefficients=coefficients)


def _with_values_of_two_heads_swapped(activations: Activations) -> Activations:
    return replace(activations, values=activations.values[:, :, :, [0, 2, 1, 3]])


def _one_position_late(activations: Activations) -> Activations:
    return replace(activations, pattern=activations.pattern.roll(1, dims=-1))


def _next_layers_attention(activations: Activations) -> Activations:
    return replace(activations, attention_output=activations.attention_output.roll(1, dims=0))


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (_without_one_ffn_neuron, {"ffn_neurons", "all_neurons"}),
        (_with_values_of_two_heads_swapped, {"heads", "attention_neurons", "all_neurons"}),
        (_one_position_late, {"heads", "attention_neurons", "all_neurons"}),
        (_next_layers_attention, {"layers", "heads", "attention_neurons"}),
    ],
)
def test_a_missing_or_misplaced_part_breaks_its_identities(
    traced: tuple[Model, Activations, TokenBatch], fault: Callable[[Activations], Activations], broken: set[str]
) -> None:
    model, activations, batch = traced
    errors = decomposition_errors(fault(activations), model.anatomy, batch.mask)
    assert {name for name, error in errors.items() if error > 1} == broken


@pytest.mark.parametrize(
    ("bias", "broken"),
    [("attention_bias", {"heads", "attention_neurons", "all_neurons"}), ("ffn_bias", {"ffn_neurons", "all_neurons"})],
)
def test_a_forgotten_bias_breaks_its_identities(
    traced: tuple[Model, Activations, TokenBatch], bias: str, broken: set[str]
) -> None:
    model, activations, batch = traced
    if getattr(model.anatomy, bias)[0] is None:
        assert model.anatomy.family.model_type == "llama", "only Llama has no biases to forget"
        return
    without = replace(model.anatomy, **{bias: (None,) * model.anatomy.layers})
    errors = decomposition_errors(activations, without, batch.mask)
    assert {name for name, error in errors.items() if error > 1} == broken


def test_a_nan_is_never_hidden_by_a_maximum(traced: tuple[Model, Activations, TokenBatch]) -> None:
    model, activations, batch = traced
    coefficients = activations.coefficients.clone()
    coefficients[0, 0, 0, 0] = torch.nan
    errors = decomposition_errors(replace(activations, coefficients=coefficients), model.anatomy, batch.mask)
    assert errors["ffn_neurons"] != errors["ffn_neurons"]
    assert errors["all_neurons"] != errors["all_neurons"]


def test_padding_is_not_judged(traced: tuple[Model, Activations, TokenBatch]) -> None:
    model, activations, batch = traced
    spoiled = activations.ffn_output.clone()
    spoiled[:, 1, int(batch.last[1]) + 1 :] = 1e6
    errors = decomposition_errors(replace(activations, ffn_output=spoiled), model.anatomy, batch.mask)
    assert all(error <= 1 for error in errors.values()), errors
