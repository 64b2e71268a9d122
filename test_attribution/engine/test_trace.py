"""What is read from a forward pass adds up to the forward pass, and does not depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attribution as at
from attribution.engine.ablation import ablated_logits
from attribution.engine.questions import ids_of, question_of
from attribution.engine.trace import Activations, read_activations, rerun, run_plainly
from attribution.prompts.tokens import pad

# Three lengths, not in order of length.
QUESTIONS = (
    ("The number of legs that a dog has is", " four"),
    ("A ripe cherry is", " red"),
    ("The capital of France is", " Paris"),
    ("The capital of Italy is", " Rome"),
)
PROMPTS = [prompt for prompt, _ in QUESTIONS]
# Threads and batches add up in other orders, which moves logits of these models by up to 1.2e-5.
CLOSE = {"atol": 5e-5, "rtol": 1e-5}


def _activations(model: at.Model, prompts: list[str], positions: Any) -> Activations:
    rows = [ids_of(model, prompt) for prompt in prompts]
    return read_activations(model, pad(rows), positions=positions)


@pytest.fixture(scope="module")
def everywhere(model: at.Model) -> Activations:
    """Every position of one prompt."""
    return _activations(model, PROMPTS[:1], "all")


def _biased(written: Tensor, bias: Tensor | None) -> Tensor:
    return written if bias is None else written + bias


def test_shapes_are_those_of_the_docstring(model: at.Model) -> None:
    lengths = [len(model.tokenizer.encode(prompt)) for prompt in PROMPTS]
    last, everything = _activations(model, PROMPTS, "last"), _activations(model, PROMPTS, "all")
    batch, longest, vocabulary = len(PROMPTS), max(lengths), model.anatomy.vocabulary
    assert last.resid_pre.shape == last.resid_mid.shape == last.resid_post.shape == (3, batch, 32)
    assert last.attention_output.shape == last.ffn_output.shape == (3, batch, 32)
    assert last.coefficients.shape == (3, batch, 48)
    assert last.pattern.shape == (3, batch, 4, longest)
    assert last.values.shape == everything.values.shape == (3, batch, longest, 4, 8)
    assert (last.resid_final.shape, last.logits.shape) == ((batch, 32), (batch, vocabulary))
    assert everything.resid_pre.shape == (3, batch, longest, 32)
    assert everything.coefficients.shape == (3, batch, longest, 48)
    assert everything.pattern.shape == (3, batch, 4, longest, longest)
    assert everything.logits.shape == (batch, longest, vocabulary)
    assert not last.logits.requires_grad


def test_the_last_real_token_is_read_not_the_padding(model: at.Model) -> None:
    last, everything = _activations(model, PROMPTS, "last"), _activations(model, PROMPTS, "all")
    for row, prompt in enumerate(PROMPTS):
        end = len(model.tokenizer.encode(prompt)) - 1
        for name in ("resid_pre", "resid_mid", "resid_post", "attention_output", "ffn_output", "coefficients"):
            assert torch.equal(getattr(last, name)[:, row], getattr(everything, name)[:, row, end]), name
        assert torch.equal(last.pattern[:, row], everything.pattern[:, row, :, end])
        assert torch.equal(last.resid_final[row], everything.resid_final[row, end])
        # Unembedded alone or among others: products of other shapes are rounded otherwise.
        torch.testing.assert_close(last.logits[row], everything.logits[row, end])


def test_logits_are_the_models_own(model: at.Model, plain_logits: Any) -> None:
    logits = _activations(model, PROMPTS, "last").logits
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits[row], plain_logits(prompt), **CLOSE)


def test_the_residual_stream_starts_at_the_embedding(
    model: at.Model, plain: Any, tokenizer: Any, family: str, everywhere: Activations
) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    embedding = plain.get_input_embeddings().weight[ids].detach()
    if family == "gpt2":
        embedding = embedding + plain.transformer.wpe.weight[: len(ids)].detach()
    assert torch.equal(everywhere.resid_pre[0, 0], embedding)


def test_each_layer_adds_its_two_outputs_to_the_stream(everywhere: Activations) -> None:
    found = everywhere
    torch.testing.assert_close(found.resid_pre + found.attention_output, found.resid_mid, **CLOSE)
    torch.testing.assert_close(found.resid_mid + found.ffn_output, found.resid_post, **CLOSE)
    assert torch.equal(found.resid_post[:-1], found.resid_pre[1:])
    assert torch.equal(found.resid_post[-1], found.resid_final)
    assert found.attention_output.abs().mean() > 0.1
    assert found.ffn_output.abs().mean() > 0.1


def test_ffn_neurons_and_the_bias_add_up_to_the_ffn_output(model: at.Model, everywhere: Activations) -> None:
    for layer in range(model.anatomy.layers):
        neurons = everywhere.coefficients[layer, 0, :, :, None] * model.anatomy.sublayer(layer, "ffn").vectors
        expected = _biased(neurons.sum(1), model.anatomy.sublayer(layer, "ffn").bias)
        torch.testing.assert_close(expected, everywhere.ffn_output[layer, 0], **CLOSE)


def test_attention_neurons_and_the_bias_add_up_to_the_attention_output(
    model: at.Model, everywhere: Activations
) -> None:
    for layer in range(model.anatomy.layers):
        vectors = model.anatomy.sublayer(layer, "attention").vectors.unflatten(0, (4, 8))
        coefficients = torch.einsum("hqp,phd->qhdp", everywhere.pattern[layer, 0], everywhere.values[layer, 0])
        written = torch.einsum("qhdp,hdw->qw", coefficients, vectors)
        expected = _biased(written, model.anatomy.sublayer(layer, "attention").bias)
        torch.testing.assert_close(expected, everywhere.attention_output[layer, 0], **CLOSE)


def test_only_gpt2_has_biases_that_belong_to_no_neuron(model: at.Model, family: str) -> None:
    for biases in ([own.bias for own in each] for each in (model.anatomy.ffn, model.anatomy.attention)):
        assert [bias is not None and bias.abs().max() > 0.1 for bias in biases] == [family == "gpt2"] * 3


def test_grouped_queries_share_their_values(model: at.Model, family: str, everywhere: Activations) -> None:
    values = everywhere.values[:, 0]
    shared = [torch.equal(values[:, :, head], values[:, :, head + 1]) for head in range(3)]
    assert shared == ([True, False, True] if family == "llama" else [False, False, False])


def test_attention_looks_at_no_later_token_and_at_no_padding(model: at.Model) -> None:
    pattern = _activations(model, PROMPTS, "all").pattern
    for row, prompt in enumerate(PROMPTS):
        length = len(model.tokenizer.encode(prompt))
        real = pattern[:, row, :, :length]
        torch.testing.assert_close(real[..., :length].sum(-1), torch.ones(3, 4, length), **CLOSE)
        assert real[..., :length].triu(1).abs().max() == 0
        assert not real[..., length:].any()


@pytest.mark.parametrize("unit", ["ffn", "attention"])
def test_scores_of_a_batch_equal_those_of_single_prompts(model: at.Model, unit: str) -> None:
    answers = [answer for _, answer in QUESTIONS]
    together = at.attribute(model, PROMPTS, answers, unit=unit, k=None)
    for (prompt, answer), ranking in zip(QUESTIONS, together, strict=True):
        alone = at.attribute(model, prompt, answer, unit=unit, k=None)
        assert (ranking.prompt, ranking.answer, ranking.tokens) == (prompt, answer, alone.tokens)
        assert len(ranking) == len(alone)
        scores = dict(zip(ranking.neurons, ranking.scores.tolist(), strict=True))
        expected = dict(zip(alone.neurons, alone.scores.tolist(), strict=True))
        assert scores == pytest.approx(expected, abs=1e-5)


def test_ablated_logits_of_a_batch_equal_those_of_single_prompts(model: at.Model) -> None:
    neurons = [[at.FFNNeuron(0, row), at.AttentionNeuron(1, 2, row, 0)] for row in range(len(PROMPTS))]
    together = at.ablate(model, PROMPTS, neurons)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[row], at.ablate(model, prompt, neurons[row]), **CLOSE)


def test_reruns_from_the_first_edited_layer_give_what_whole_ones_do(representative_model: at.Model) -> None:
    model = representative_model
    questions = [question_of(model, at.Prompt(prompt, answer)) for prompt, answer in QUESTIONS]
    plain = run_plainly(model, pad([question.ids for question in questions]))
    # Rows of another order, number and width than the plain run's.
    rows = torch.tensor([1, 0, 1])
    batch = pad([questions[row].ids for row in rows])
    torch.testing.assert_close(plain.logits[rows], rerun(model, batch), **CLOSE)
    for layer in range(model.anatomy.layers):
        variants = [[at.FFNNeuron(layer, 1)], [at.Head(layer, 0)], [at.FFNNeuron(model.anatomy.layers - 1, 0)]]
        whole, replaced = ablated_logits(model, batch, variants)
        begun, same = ablated_logits(model, batch, variants, plain=(plain, rows))
        torch.testing.assert_close(begun, whole, **CLOSE)
        assert torch.equal(replaced, same)
        assert not torch.allclose(begun[1], plain.logits[0], atol=1e-4)
    untouched, _ = ablated_logits(model, batch, [(), (), ()], plain=(plain, rows))
    torch.testing.assert_close(untouched, plain.logits[rows], **CLOSE)


def test_several_forward_passes_give_what_one_does(model: at.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [answer for _, answer in QUESTIONS]
    neurons = [[at.FFNNeuron(2, row)] for row in range(len(PROMPTS))]
    rankings, logits = at.attribute(model, PROMPTS, answers, k=5), at.ablate(model, PROMPTS, neurons)
    monkeypatch.setattr("attribution.models.model.CHUNK_TOKENS", 12)
    for one, other in zip(rankings, at.attribute(model, PROMPTS, answers, k=5), strict=True):
        assert (one.prompt, one.neurons) == (other.prompt, other.neurons)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at.ablate(model, PROMPTS, neurons), logits, **CLOSE)
