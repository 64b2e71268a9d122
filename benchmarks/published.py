"""The published way to score neurons, as a yardstick: project every one of them onto the vocabulary.

Written from the paper's equations and what its public notebooks are known to compute, on a plain GPT-2 of transformers
and its hooks. It shares no computation with the package, so that agreement means something. For one prompt, with x the
residual stream that a neuron adds its output v to at the last position, and w the answer,

    score = log(softmax(bs(x + v)))_w - log(softmax(bs(x)))_w        bs(x) = W_U [gamma * (x - mean(x)) / s]

in float32, s being the scale of the final norm. One layer is scored after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import attribution as at


@dataclass(frozen=True)
class Internals:
    """What hooks see of one prompt, at the last position.

    Attributes:
        resid_pre: Residual stream before each block, (layers, width).
        resid_mid: After its attention, (layers, width).
        resid_final: Residual stream after the last block, (width,).
        coefficients: Of FFN neurons, (layers, neurons).
        pattern: Attention weights over source positions, (layers, heads, positions).
        values: Of every source position, (layers, positions, heads, dimensions).
    """

    resid_pre: Tensor
    resid_mid: Tensor
    resid_final: Tensor
    coefficients: Tensor
    pattern: Tensor
    values: Tensor

    def double(self) -> Internals:
        """Return the same in float64."""
        return Internals(**{each.name: getattr(self, each.name).double() for each in fields(self)})

    def ffn_outputs(self, layer: int, subvalues: Tensor) -> Tensor:
        """Return what each FFN neuron of a layer writes, (neurons, width)."""
        return self.coefficients[layer, :, None] * subvalues

    def attention_outputs(self, layer: int, vectors: Tensor) -> Tensor:
        """Return what each attention neuron of a layer writes, (heads, dimensions, positions, width)."""
        coefficients = torch.einsum("phd,hp->hdp", self.values[layer], self.pattern[layer])
        outputs: Tensor = coefficients[..., None] * vectors.unflatten(0, coefficients.shape[:2])[:, :, None]
        return outputs


def internals(gpt2: Any, ids: Tensor) -> Internals:
    """Run a plain GPT-2, attention weights visible, on one prompt, (1, positions)."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, tensor: Tensor) -> None:
        seen.setdefault(name, []).append(tensor)

    handles = []
    for block in gpt2.transformer.h:
        handles += [
            block.register_forward_pre_hook(lambda _, args: keep("resid_pre", args[0][0, -1])),
            block.attn.c_attn.register_forward_hook(lambda _, __, output: keep("values", output[0].chunk(3, -1)[2])),
            block.attn.register_forward_hook(lambda _, __, output: keep("written", output[0][0, -1])),
            block.attn.register_forward_hook(lambda _, __, output: keep("pattern", output[1][0, :, -1])),
            block.mlp.c_proj.register_forward_pre_hook(lambda _, args: keep("coefficients", args[0][0, -1])),
        ]
    final_norm = gpt2.transformer.ln_f
    handles.append(final_norm.register_forward_pre_hook(lambda _, args: keep("resid_final", args[0][0, -1])))
    try:
        gpt2(ids)
    finally:
        for handle in handles:
            handle.remove()
    stacked = {name: torch.stack(tensors) for name, tensors in seen.items()}
    return Internals(
        resid_pre=stacked["resid_pre"],
        resid_mid=stacked["resid_pre"] + stacked["written"],
        resid_final=stacked["resid_final"][0],
        coefficients=stacked["coefficients"],
        pattern=stacked["pattern"],
        values=stacked["values"].unflatten(-1, (gpt2.config.n_head, -1)),
    )


def _before_softmax(gpt2: Any, seen: Internals, vectors: Tensor) -> Tensor:
    norm = gpt2.transformer.ln_f
    scale = (seen.resid_final.var(unbiased=False) + norm.eps).sqrt()
    normed = (vectors - vectors.mean(-1, keepdim=True)) / scale * norm.weight.to(vectors.dtype)
    logits: Tensor = normed @ gpt2.lm_head.weight.to(vectors.dtype).T
    return logits


def _increases(gpt2: Any, seen: Internals, stream: Tensor, outputs: Tensor, answer: int) -> Tensor:
    before = _before_softmax(gpt2, seen, stream).softmax(-1)[answer].log()
    # As many at a time as a layer has FFN neurons. All attention neurons of a layer at once take gigabytes, and twice
    # the time to get that much memory from the system: the yardstick should not be slower than it has to be.
    parts = outputs.split(seen.coefficients.shape[1])
    return (
        torch.cat([_before_softmax(gpt2, seen, stream + part).softmax(-1)[:, answer].log() for part in parts]) - before
    )


@torch.no_grad()
def score_ffn_neurons(gpt2: Any, ids: Tensor, answer: int) -> Tensor:
    """Return the score of every FFN neuron, (layers, neurons), in nats."""
    seen = internals(gpt2, ids)
    layers = []
    for layer, block in enumerate(gpt2.transformer.h):
        outputs = seen.ffn_outputs(layer, block.mlp.c_proj.weight)
        layers.append(_increases(gpt2, seen, seen.resid_mid[layer], outputs, answer))
    return torch.stack(layers)


@torch.no_grad()
def score_attention_neurons(gpt2: Any, ids: Tensor, answer: int) -> Tensor:
    """Return the score of every attention neuron, (layers, heads, dimensions, positions), in nats."""
    seen = internals(gpt2, ids)
    layers = []
    for layer, block in enumerate(gpt2.transformer.h):
        outputs = seen.attention_outputs(layer, block.attn.c_proj.weight)
        scores = _increases(gpt2, seen, seen.resid_pre[layer], outputs.flatten(0, 2), answer)
        layers.append(scores.view(outputs.shape[:-1]))
    return torch.stack(layers)


@torch.no_grad()
def rescore(gpt2: Any, ids: Tensor, answer: int, neurons: Sequence[Any]) -> Tensor:
    """Return the scores of a few neurons by the same equation in float64, (n,), in nats."""
    seen = internals(gpt2, ids).double()
    streams, outputs = [], []
    for neuron in neurons:
        layer, block = neuron.layer, gpt2.transformer.h[neuron.layer]
        if isinstance(neuron, at.FFNNeuron):
            streams.append(seen.resid_mid[layer])
            outputs.append(seen.ffn_outputs(layer, block.mlp.c_proj.weight.double())[neuron.index])
        else:
            streams.append(seen.resid_pre[layer])
            written = seen.attention_outputs(layer, block.attn.c_proj.weight.double())
            outputs.append(written[neuron.head, neuron.dim, neuron.position])
    before, added = torch.stack(streams), torch.stack(outputs)
    probs = _before_softmax(gpt2, seen, torch.stack([before, before + added])).softmax(-1)[..., answer]
    return probs[1].log() - probs[0].log()


@torch.no_grad()
def rounding(gpt2: Any, ids: Tensor) -> float:
    """Return how far float32 may move a score, in nats.

    A sum of n terms errs by about sqrt(n) eps times the sum of their sizes (Higham & Mary 2019). In a logit of x the
    sizes sum to at most |gamma * (x - mean(x)) / s| |W_t|, and in one of x + v to no more than twice that for the
    largest x, than which no neuron here is larger. A log-probability holds two logits and a sum over the vocabulary, a
    score two log-probabilities.
    """
    seen = internals(gpt2, ids)
    norm, unembedding = gpt2.transformer.ln_f, gpt2.lm_head.weight
    streams = torch.cat([seen.resid_pre, seen.resid_mid])
    normed = (streams - streams.mean(-1, keepdim=True)) / seen.resid_final.std() * norm.weight
    sizes = 2 * float(normed.norm(dim=-1).max() * unembedding.norm(dim=-1).max())
    vocabulary, width = unembedding.shape
    return float(2 * torch.finfo(torch.float32).eps * (2 * width**0.5 * sizes + vocabulary**0.5))
