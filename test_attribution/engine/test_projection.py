"""Before-softmax values: linear, equal to the model's own logits at the final state, and centred where norms are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attribution as at
from attribution.engine.projection import before_softmax, frozen_scale, largest_row_norm, model_logits, pull_back
from attribution.models.anatomy import Readout
from attribution.models.norms import Norm

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def readout(model: at.Model) -> Readout:
    return model.anatomy.readout


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _final_state(plain: Any, tokenizer: Any, readout_path: str) -> Tensor:
    """h^{L-1}_T as plain transformers hands it to its final norm, float64."""
    seen: list[Tensor] = []
    handle = plain.get_submodule(readout_path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with handle, torch.no_grad():
        plain(tokenizer.encode(PROMPT, return_tensors="pt"))
    return seen[0][0, -1].double()


def test_it_is_linear(readout: Readout) -> None:
    width = readout.unembedding.shape[1]
    first, second, scale = _random(5, width), _random(5, width, seed=1), torch.tensor(1.7, dtype=torch.float64)
    together = before_softmax(2.0 * first - 3.0 * second, scale, readout)
    apart = 2.0 * before_softmax(first, scale, readout) - 3.0 * before_softmax(second, scale, readout)
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=1e-12)
    assert together.shape == (5, readout.unembedding.shape[0])


def test_a_scale_per_vector_divides_its_own_vector(readout: Readout) -> None:
    vectors, scales = _random(3, readout.unembedding.shape[1]), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    for number, projected in enumerate(before_softmax(vectors, scales, readout)):
        torch.testing.assert_close(projected, before_softmax(vectors[number], scales[number], readout))


def test_pull_back_is_the_transpose(readout: Readout) -> None:
    vectors = _random(6, readout.unembedding.shape[1])
    covectors = _random(6, readout.unembedding.shape[0], seed=1)
    scales = _random(6, seed=2).abs() + 0.1
    forwards = (covectors * before_softmax(vectors, scales, readout)).sum(-1)
    backwards = (pull_back(covectors, scales, readout) * vectors).sum(-1)
    torch.testing.assert_close(forwards, backwards, atol=1e-11, rtol=1e-11)


def test_the_final_state_and_the_norms_bias_give_the_models_own_logits(
    model: at.Model, readout: Readout, plain: Any, tokenizer: Any, plain_logits: Any
) -> None:
    final = _final_state(plain, tokenizer, model.anatomy.family.final_norm)
    scale = frozen_scale(final, readout.norm)
    logits = model_logits(final, scale, readout)
    if readout.norm.bias is not None:
        assert (logits - before_softmax(final, scale, readout)).std() > 0.1
    torch.testing.assert_close(logits, plain_logits(PROMPT).double(), rtol=1e-5, atol=1e-4)


def test_only_gpt2_has_a_norm_bias_and_centres(readout: Readout, family: str) -> None:
    assert (readout.norm.bias is not None) == readout.norm.centred == (family == "gpt2")


def test_a_constant_added_to_a_vector_vanishes_where_norms_centre(readout: Readout, family: str) -> None:
    vector, scale = _random(readout.unembedding.shape[1]), torch.tensor(1.0, dtype=torch.float64)
    moved = before_softmax(vector + 5.0, scale, readout) - before_softmax(vector, scale, readout)
    if family == "gpt2":
        assert moved.abs().max() < 1e-10
    else:
        assert moved.abs().max() > 1


def test_centring_changes_what_vectors_say(readout: Readout) -> None:
    vector, scale = _random(readout.unembedding.shape[1]) + 0.5, torch.tensor(1.0, dtype=torch.float64)
    otherwise = replace(readout, norm=replace(readout.norm, centred=not readout.norm.centred))
    difference = before_softmax(vector, scale, readout) - before_softmax(vector, scale, otherwise)
    assert difference.abs().max() > 0.1


def test_the_scale_is_a_standard_deviation_or_a_root_mean_square() -> None:
    norm = Norm(torch.ones(4), None, eps=0.25, centred=True)
    state = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Variance 5/4 (biased), mean square 30/4.
    assert float(frozen_scale(state, norm)) == pytest.approx(1.5**0.5)
    assert float(frozen_scale(state, replace(norm, centred=False))) == pytest.approx(7.75**0.5)


def test_before_softmax_values_of_a_vector_by_hand() -> None:
    unembedding = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    norm = Norm(torch.tensor([3.0, 1.0], dtype=torch.float64), None, 1e-5, centred=True)
    readout = Readout(unembedding, None, norm, 1.0, None)
    vector, scale = torch.tensor([4.0, 2.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    # Centred (1, -1), weighted (3, -1), scaled (1.5, -0.5).
    assert before_softmax(vector, scale, readout).tolist() == [1.5, 0.5]
    # Not centred: weighted (12, 2), scaled (6, 1).
    assert before_softmax(vector, scale, replace(readout, logit_scale=0.5)).tolist() == [0.75, 0.25]
    assert before_softmax(vector, scale, replace(readout, norm=replace(norm, centred=False))).tolist() == [6.0, 8.0]


def test_no_before_softmax_value_exceeds_the_norm_times_the_largest_row(readout: Readout) -> None:
    vectors, scale = _random(200, readout.unembedding.shape[1]), torch.tensor(2.0, dtype=torch.float64)
    reach = vectors.norm(dim=-1) * largest_row_norm(readout) / scale
    assert (before_softmax(vectors, scale, readout).abs().amax(-1) <= reach).all()
    # And it is the largest row: the vector along it comes close.
    assert readout.norm.weight is not None
    rows = readout.unembedding.double() * readout.norm.weight.double()
    longest = rows[rows.norm(dim=-1).argmax()]
    along = before_softmax(longest, scale, replace(readout, norm=replace(readout.norm, centred=False))).max()
    assert float(along) == pytest.approx(float(longest.norm() * largest_row_norm(readout) / scale))
