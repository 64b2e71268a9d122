"""The decomposition check holds on sound activations and breaks when any part is missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attribution.engine.decomposition import IDENTITIES, decomposition_errors, rounding, worst
from attribution.engine.questions import ids_of
from attribution.engine.trace import Activations, read_activations
from attribution.models.anatomy import Anatomy
from attribution.models.model import Model
from attribution.prompts.tokens import TokenBatch, pad

PROMPTS = ("The capital of France is", "A ripe cherry")


def _trace(model: Model) -> tuple[Model, Activations, TokenBatch]:
    batch = pad([ids_of(model, prompt) for prompt in PROMPTS])
    return model, read_activations(model, batch, positions="all"), batch


@pytest.fixture
def traced(model: Model) -> tuple[Model, Activations, TokenBatch]:
    return _trace(model)


def _broken(activations: Activations, anatomy: Anatomy, batch: TokenBatch) -> set[str]:
    return {name for name, error in decomposition_errors(activations, anatomy, batch.mask).items() if not error <= 1}


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
    assert _broken(fault(activations), model.anatomy, batch) == broken


@pytest.mark.parametrize(
    ("kind", "broken"),
    [("attention", {"heads", "attention_neurons", "all_neurons"}), ("ffn", {"ffn_neurons", "all_neurons"})],
)
def test_a_forgotten_bias_breaks_its_identities(
    traced: tuple[Model, Activations, TokenBatch], kind: str, broken: set[str]
) -> None:
    model, activations, batch = traced
    if getattr(model.anatomy, kind)[0].bias is None:
        assert model.anatomy.family.model_type == "llama", "only Llama has no biases to forget"
        return
    without = _with(model.anatomy, kind, bias=None)
    assert _broken(activations, without, batch) == broken


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


def _with(anatomy: Anatomy, kind: str, **changes: Any) -> Anatomy:
    """Return an anatomy whose sublayers of a kind are changed in every block."""
    return replace(anatomy, **{kind: tuple(replace(own, **changes) for own in getattr(anatomy, kind))})


ATTENTION, FFN = {"heads", "attention_neurons", "all_neurons"}, {"ffn_neurons", "all_neurons"}


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "olmo2", "granite"])
def test_what_follows_a_sublayer_is_part_of_every_neuron(loaded: Callable[[str], Model], architecture: str) -> None:
    model, activations, batch = _trace(loaded(architecture))
    assert _broken(activations, model.anatomy, batch) == set()
    for kind, broken in (("attention", ATTENTION), ("ffn", FFN)):
        without = _with(model.anatomy, kind, post_weight=None)
        assert _broken(activations, without, batch) == broken
    for post_scale, broken in (("attention_post_scale", ATTENTION), ("ffn_post_scale", FFN)):
        one = torch.ones_like(getattr(activations, post_scale))
        # Only Granite has no norm there, and so a scale of one.
        expected = set() if architecture == "granite" else broken
        assert _broken(replace(activations, **{post_scale: one}), model.anatomy, batch) == expected


def test_biases_go_through_what_follows_too(loaded: Callable[[str], Model]) -> None:
    model, activations, batch = _trace(loaded("llama-biases"))
    generator = torch.Generator().manual_seed(0)
    post_weight = tuple(torch.rand(model.anatomy.width, generator=generator) + 0.5 for _ in range(model.anatomy.layers))
    post_scale = torch.rand(activations.ffn_post_scale.shape, generator=generator) + 0.5
    factor = post_scale[..., None] * torch.stack(post_weight)[:, None, None]
    scaled = replace(
        activations,
        attention_post_scale=post_scale,
        ffn_post_scale=post_scale,
        attention_output=activations.attention_output * factor,
        ffn_output=activations.ffn_output * factor,
    )
    folded = model.anatomy
    for kind in ("attention", "ffn"):
        own = zip(getattr(folded, kind), post_weight, strict=True)
        folded = replace(folded, **{kind: tuple(replace(each, post_weight=weight) for each, weight in own)})
    # The stream itself is not rebuilt here.
    assert not _broken(scaled, folded, batch) & {"heads", "attention_neurons", "ffn_neurons"}
    for kind, broken in (("attention", {"heads", "attention_neurons"}), ("ffn", {"ffn_neurons"})):
        own = zip(getattr(folded, kind), post_weight, strict=True)
        unfolded = tuple(replace(each, bias=each.bias / weight) for each, weight in own)
        found = _broken(scaled, replace(folded, **{kind: unfolded}), batch)
        assert found & {"heads", "attention_neurons", "ffn_neurons"} == broken


def test_the_final_state_must_be_what_the_last_block_wrote(traced: tuple[Model, Activations, TokenBatch]) -> None:
    model, activations, batch = traced
    other = replace(activations, resid_final=activations.resid_final * 1.001)
    assert _broken(other, model.anatomy, batch) == {"layers"}


@pytest.mark.parametrize("errors", [[math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.nan]])
def test_the_worst_of_errors_is_nan_wherever_it_stands(errors: list[float]) -> None:
    assert math.isnan(worst(errors))


def test_the_worst_of_errors_is_the_largest_and_of_none_zero() -> None:
    assert worst([0.5, 2.0, 1.0]) == 2.0
    assert worst([]) == 0.0


def test_rounding_follows_the_types_of_sums_and_of_what_is_stored() -> None:
    single, double, half = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64, torch.bfloat16))
    assert rounding(torch.float32, 100, stored=1) == pytest.approx(101 * single)
    assert rounding(torch.float64, 100, stored=1) == pytest.approx(101 * double)
    assert rounding(torch.float64, 100, stored=1, normed=True) == pytest.approx(101 * single)
    # Half precision accumulates in float32 and rounds what it stores.
    assert rounding(torch.bfloat16, 100, stored=1) == pytest.approx(100 * single + half)
