"""What the engine reports of a few prompts is what its definitions say, counted again without its shortcuts.

The engine is fast because it projects vectors once, bounds before it scores, and sums before it divides. Here every
number is made from its definition, one neuron at a time, in float64 from the same trace. A score that is wrong in the
same way everywhere is a plausible score, and ablation alone would seldom tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attribution.claims.about_methods.common import BASELINES, METHOD, STEPS
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Exact
from attribution.engine.batching import batches_of
from attribution.engine.decomposition import rounding
from attribution.engine.importance import Candidates
from attribution.engine.methods import METHODS, Method, bound_candidates, method_named, score_candidates
from attribution.engine.queries import QueryRanking, query
from attribution.engine.questions import Question
from attribution.engine.ranking import Ranking, all_candidates, attribute
from attribution.engine.top_k import top_k
from attribution.engine.trace import Activations, read_activations
from attribution.experiments.controls import matched
from attribution.models.anatomy import Anatomy
from attribution.models.norms import Norm
from attribution.records import AttentionNeuron, Component, FFNNeuron, HeadPosition, Layer, Neuron, SublayerKind, Unit

__all__ = [
    "SCORED_UNITS",
    "SEARCHED_UNITS",
    "draws_not_as_stated",
    "neurons_out_of_place",
    "query_scores_off",
    "scores_defined_for",
    "scores_off",
]

SCORED_UNITS: tuple[Unit, ...] = ("ffn", "attention", "neuron", "head", "head_position", "layer")
"""Units whose scores are counted again."""

SEARCHED_UNITS: tuple[Unit, ...] = ("ffn", "attention")
"""Units whose rankings are searched for what they miss."""

# Prompts that are counted again: a score does not depend on knowledge, so a few show what all would.
_PROMPTS = 3
# Candidates of a prompt, evenly spread over all of them.
_SAMPLED = 50
# How many times longer the long ranking is than the short one, which must be its beginning.
_LONGER = 3
# Neurons of the experiments that must be told apart.
_ABLATED = 10
# Neurons that are drawn at random, and by which matched ones are drawn.
_DRAWN = 50
# Value neurons whose query side is counted again.
_VALUE_NEURONS = 30
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class _Traced:
    """One prompt of a traced batch.

    Attributes:
        question: The prompt.
        anatomy: The model's anatomy.
        seen: What one forward pass says, at all positions.
        row: The prompt's row of the batch.
        candidates: The engine's candidates of the prompt.
        unembedding: W_U, float64; prompts share it.
    """

    question: Question
    anatomy: Anatomy
    seen: Activations
    row: int
    candidates: Mapping[Unit, Candidates]
    unembedding: Tensor

    @property
    def last(self) -> int:
        return len(self.question.ids) - 1

    def written(self, record: Component) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, m and v of Eq. 13, float64: a stream, a coefficient and the vector that it multiplies."""
        anatomy, seen, row, layer = self.anatomy, self.seen, self.row, record.layer
        of_ffn = isinstance(record, FFNNeuron) or (isinstance(record, Layer) and record.kind == "ffn")
        stream = (seen.resid_mid if of_ffn else seen.resid_pre)[layer, row, self.last].double()
        one = stream.new_ones(())
        if isinstance(record, Layer):
            return stream, one, (seen.ffn_output if of_ffn else seen.attention_output)[layer, row, self.last].double()
        post_scale = (seen.ffn_post_scale if of_ffn else seen.attention_post_scale)[layer, row, self.last].double()
        post_weight = anatomy.sublayer(layer, "ffn" if of_ffn else "attention").post_weight
        factor = one if post_weight is None else post_weight.double()
        if isinstance(record, FFNNeuron):
            coefficient = seen.coefficients[layer, row, self.last, record.index].double()
            return (
                stream,
                coefficient * post_scale,
                anatomy.sublayer(layer, "ffn").vectors[record.index].double() * factor,
            )
        weights = seen.pattern[layer, row, record.head, self.last].double()
        values = seen.values[layer, row, :, record.head].double()
        first = record.head * anatomy.head_dim
        vectors = anatomy.sublayer(layer, "attention").vectors[first : first + anatomy.head_dim].double() * factor
        if isinstance(record, AttentionNeuron):
            taken = weights[record.position] * values[record.position, record.dim]
            return stream, taken * post_scale, vectors[record.dim]
        positions = [record.position] if isinstance(record, HeadPosition) else range(self.last + 1)
        mixed = torch.stack([weights[position] * values[position] for position in positions]).sum(0)
        return stream, one, post_scale * (mixed @ vectors)

    def logits(self, vectors: Tensor) -> Tensor:
        """Return bs: vectors through the final norm, its scale that of the final state, and the unembedding."""
        readout = self.anatomy.readout
        final = self.seen.resid_final[self.row, self.last].double()
        normed = _centred(vectors, readout.norm) / _scale(final, readout.norm)
        weighted = normed if readout.norm.weight is None else normed * readout.norm.weight.double()
        return weighted @ self.unembedding.T * readout.logit_scale


def _centred(vectors: Tensor, norm: Norm) -> Tensor:
    return vectors - vectors.mean(-1, keepdim=True) if norm.centred else vectors


def _scale(state: Tensor, norm: Norm | None) -> Tensor:
    return state.new_ones(()) if norm is None else (_centred(state, norm).square().mean() + norm.eps).sqrt()


def _indices(bench: Workbench) -> list[int]:
    """Return the prompts that are counted again: from the longest to the shortest, as no batch has them."""
    falling = sorted(range(len(bench.sample.questions)), key=lambda place: -len(bench.sample.questions[place].ids))
    return [falling[round(place)] for place in np.linspace(0, len(falling) - 1, min(_PROMPTS, len(falling)))]


@measured_once
def _traced(bench: Workbench) -> list[_Traced]:
    """Return the prompts that are counted again, traced."""
    questions = [bench.sample.questions[place] for place in _indices(bench)]
    wanted: dict[Unit, Sequence[Method]] = {unit: [method_named(METHOD, unit)] for unit in SCORED_UNITS}
    unembedding = bench.model.anatomy.readout.unembedding.double()
    traced: dict[int, _Traced] = {}
    for rows, batch in batches_of(bench.model, questions):
        part = [questions[row] for row in rows]
        seen = read_activations(bench.model, batch, positions="all")
        found = all_candidates(bench.model, part, batch, wanted, seed=0, steps=STEPS)
        for place, row in enumerate(rows):
            traced[row] = _Traced(questions[row], bench.model.anatomy, seen, place, found[place], unembedding)
    return [traced[row] for row in range(len(questions))]


def _limits(traced: _Traced, records: Sequence[Component]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and the largest score that each built-in method may give to each record, (n,) each.

    In float64 a sum of n terms errs by at most n * eps times the sum of their sizes. The longest sums here run over
    the vocabulary and the width, the engine's as well; a factor of 2 is for the two steps of a softmax. A token no
    farther than that from the answer may stand before or behind it.
    """
    streams, coefficients, vectors = (torch.stack(each) for each in zip(*map(traced.written, records), strict=True))
    updates = coefficients[:, None] * vectors
    before, after, moved, bare = map(traced.logits, (streams, streams + updates, updates, vectors))
    answer, sizes = traced.question.answer_id, sum(traced.anatomy.readout.unembedding.shape)
    room = 4 * sizes * _EPS * (1 + max(float(each.abs().max()) for each in (before, after, moved, bare)))

    def log_prob(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[:, answer]

    def reciprocal_rank(margin: float) -> Tensor:
        others = torch.arange(bare.shape[1], device=bare.device) != answer
        return 1 / (1 + (others & (bare > bare[:, answer, None] + margin)).sum(-1)).double()

    size, length = coefficients.abs(), vectors.norm(dim=-1)
    scores = {
        "log_prob_increase": log_prob(after) - log_prob(before),
        "log_prob": log_prob(moved),
        "prob_increase": log_prob(after).exp() - log_prob(before).exp(),
        "vector_norm": length,
        "coefficient": size,
        "output_norm": size * length,
    }
    ranks = reciprocal_rank(-room), reciprocal_rank(room)
    return {name: (each - room * (1 + each.abs()), each + room * (1 + each.abs())) for name, each in scores.items()} | {
        "reciprocal_rank": ranks,
        "coefficient_by_rank": (size * ranks[0] - room * (1 + size), size * ranks[1] + room * (1 + size)),
    }


def _sampled(candidates: Candidates) -> Tensor:
    number = min(_SAMPLED, len(candidates))
    return torch.linspace(0, len(candidates) - 1, number).long().to(candidates.index.device)


def _sample(traced: _Traced, unit: Unit) -> tuple[list[Component], dict[str, tuple[Tensor, Tensor]]]:
    """Return some candidates of a unit, and the limits of their scores."""
    candidates = traced.candidates[unit]
    records = candidates.records(_sampled(candidates))
    return records, _limits(traced, records)


def _outside(scores: Tensor, limits: tuple[Tensor, Tensor]) -> int:
    # A NaN is not inside.
    return int((~((scores >= limits[0]) & (scores <= limits[1]))).sum())


def _exact(bench: Workbench, wrong: float) -> Exact:
    prompts = len(_indices(bench))
    return Exact(float(wrong), prompts=prompts, facts=prompts)


def scores_defined_for(unit: Unit) -> list[str]:
    """Return the methods of the paper's eight scores a) to h) that are defined for a unit."""
    return [name for name in (METHOD, *BASELINES) if unit in METHODS[name].units]


def scores_off(bench: Workbench, unit: Unit) -> Exact:
    """Count the scores of single candidates, and the bounds on them, that are off by more than rounding."""
    wrong = 0
    for traced in _traced(bench):
        records, limits = _sample(traced, unit)
        part = traced.candidates[unit].take(_sampled(traced.candidates[unit]))
        wrong += part.records(torch.arange(len(part))) != records
        for name in scores_defined_for(unit):
            method = METHODS[name]
            wrong += _outside(score_candidates(method, part), limits[name])
            if method.bound is not None:
                wrong += int((bound_candidates(method, part) < limits[name][0]).sum())
    return _exact(bench, wrong)


def neurons_out_of_place(bench: Workbench, unit: Unit, *, k: int) -> Exact:
    """Count what is wrong with top k rankings by the paper's eight scores: scores, order, and what they leave out.

    The short ranking is found by another search than the long one, of which it must be the beginning. Of equal
    scores, the earlier record comes first.
    """
    prompts, every_traced = [bench.prompts[place] for place in _indices(bench)], _traced(bench)
    sampled = [_sample(traced, unit) for traced in every_traced]
    wrong = 0
    for name in (METHOD, *BASELINES) if prompts else ():
        short, long = (attribute(bench.model, prompts, unit=unit, method=name, k=each) for each in (k, _LONGER * k))
        for number, (prompt, best, more) in enumerate(zip(prompts, short, long, strict=True)):
            wrong += best.neurons != more.neurons[:k]
            wrong += (best.prompt, best.answer) != (prompt.text, prompt.answer)
            wrong += _outside(more.scores, _limits(every_traced[number], more.neurons)[name])
            steps = pairwise(zip(more.scores.tolist(), more.neurons, strict=True))
            # Scores that rounding cannot tell apart fall by record too, so only what is clearly larger must come first.
            wrong += sum(
                two - one > more.exact.tolerance or (one == two and not earlier < later)  # type: ignore[operator]
                for (one, earlier), (two, later) in steps
            )
            records, limits = sampled[number]
            left_out = torch.tensor([record not in more.neurons for record in records])
            wrong += int((limits[name][0][left_out] > more.scores[-1]).sum())
    return _exact(bench, wrong)


@dataclass(frozen=True)
class _Reading:
    """What a value neuron reads, counted again.

    Attributes:
        weight: k' / (sigma times the pre-activation): a component's inner product with it is its share, (width,).
        position: Where it reads.
        shares: Share of the embedding, A^0, F^0, ... as far as it reads them, and last that of the biases.
        amplification: How many times larger the terms of the pre-activation are than their sum.
    """

    weight: Tensor
    position: int
    shares: Tensor
    amplification: float


def _reading(traced: _Traced, neuron: Neuron) -> _Reading:
    """Return what a value neuron reads.

    Its pre-activation is f(x, t) = t (<norm(x), k> + b), that of a gated neuron act(t g) t u, at t = 1. Gradients give
    what follows without algebra: in the norm's output the subkey, to first order, and in t the pre-activation.
    """
    anatomy, seen, row, layer = traced.anatomy, traced.seen, traced.row, neuron.layer
    after_attention = isinstance(neuron, FFNNeuron) and not anatomy.parallel
    position = traced.last if isinstance(neuron, FFNNeuron) else neuron.position
    norm = anatomy.sublayer(layer, "ffn" if isinstance(neuron, FFNNeuron) else "attention").input_norm
    stream = (seen.resid_mid if after_attention else seen.resid_pre)[layer, row, position].double()
    gamma = stream.new_ones(()) if norm is None or norm.weight is None else norm.weight.double()
    read = stream if norm is None else gamma * _centred(stream, norm) / _scale(stream, norm)
    if norm is not None and norm.bias is not None:
        read = read + norm.bias.double()
    t = read.new_ones(())

    def linear(weight: Tensor, bias: Tensor | None, place: int) -> Tensor:
        product = weight[place].double() @ read
        return t * (product if bias is None else product + bias[place].double())

    with torch.enable_grad():
        read, t = read.clone().requires_grad_(), t.requires_grad_()
        if isinstance(neuron, FFNNeuron):
            subkeys = anatomy.subkeys[layer]
            activation = linear(subkeys.up, subkeys.up_bias, neuron.index)
            if subkeys.gate is not None:
                activation = activation * subkeys.activation(linear(subkeys.gate, subkeys.gate_bias, neuron.index))
        else:
            activation = linear(*anatomy.value_subkeys(layer), neuron.head * anatomy.head_dim + neuron.dim)
        key, pre_activation = torch.autograd.grad(activation, [read, t])
    key = key if norm is None else _centred(gamma * key, norm)
    weight = key / (_scale(stream, norm) * pre_activation)
    before = [seen.resid_pre[0, row, position]]
    for each in range(layer + after_attention):
        before += [seen.attention_output[each, row, position], seen.ffn_output[each, row, position]]
    components = torch.stack(before[: 2 * layer + 1 + after_attention]).double()
    shares = components @ weight
    of_biases = 1 - shares.sum()
    amplification = float((components.abs() @ weight.abs()).sum() + of_biases.abs())
    return _Reading(weight, position, torch.cat([shares, of_biases[None]]), amplification)


def _misread(traced: _Traced, found: QueryRanking, given: Ranking) -> int:
    """Return how many query scores of a prompt are off by more than rounding.

    A share is a quotient, so it errs by the relative error of the sum that it is divided by: that of rounding, times
    the amplification.
    """
    anatomy, seen, row = traced.anatomy, traced.seen, traced.row
    readings = [_reading(traced, neuron) for neuron in found.value_neurons]
    importance = dict(zip(given.neurons, given.scores.tolist(), strict=True))
    scores = seen.resid_final.new_tensor([importance[neuron] for neuron in found.value_neurons], dtype=torch.float64)
    wrong = _outside(found.value_scores.to(scores.device), (scores, scores))
    components = 2 * anatomy.layers + 1
    relative = rounding(seen.resid_pre.dtype, components + anatomy.width, normed=True)
    off = scores.abs() * scores.new_tensor([reading.amplification for reading in readings]) * relative
    units: dict[SublayerKind, list[int]] = {"ffn": [], "attention": []}
    for number, neuron in enumerate(found.value_neurons):
        units["ffn" if isinstance(neuron, FFNNeuron) else "attention"].append(number)
    for unit, members in units.items():
        expected, margin = scores.new_zeros(components + 1), scores.new_zeros(components + 1)
        for number in members:
            shares = readings[number].shares
            indices = [*range(len(shares) - 1), components]
            expected[indices] += scores[number] * shares
            margin[indices] += off[number] * (1 + shares.abs())
        frame = found.layers[found.layers["value_unit"] == unit]
        reported = scores.new_tensor(frame["query_score"].to_numpy(dtype=np.float64))
        wrong += len(reported) != (components + 1 if members else 0)
        wrong += _outside(reported, (expected - margin, expected + margin)) if len(reported) == components + 1 else 0
    indices = torch.linspace(0, len(found) - 1, min(_SAMPLED, len(found))).long().tolist()
    for place in indices:
        query_neuron, expected, margin = found.neurons[place], scores.new_zeros(()), scores.new_zeros(())
        layer, index = query_neuron.layer, query_neuron.index
        post_weight = anatomy.sublayer(layer, "ffn").post_weight
        vector = anatomy.sublayer(layer, "ffn").vectors[index].double() * (
            1 if post_weight is None else post_weight.double()
        )
        for number in units["attention"]:
            reading = readings[number]
            if found.value_neurons[number].layer > layer:
                post_scale = seen.ffn_post_scale[layer, row, reading.position].double()
                share = (
                    seen.coefficients[layer, row, reading.position, index].double()
                    * post_scale
                    * (vector @ reading.weight)
                )
                expected, margin = expected + scores[number] * share, margin + off[number] * share.abs()
        wrong += _outside(found.scores[place], (expected - margin, expected + margin))
    return wrong + int((found.scores.diff() > 0).sum())


def query_scores_off(bench: Workbench) -> Exact:
    """Count the query scores of layers and of FFN neurons, for the best FFN and attention neurons, that are off."""
    prompts = [bench.prompts[place] for place in _indices(bench)]
    wrong = 0
    if prompts:
        best = attribute(bench.model, prompts, unit="neuron", k=_VALUE_NEURONS)
        found = query(bench.model, prompts, value_neurons=best, k=None)
        wrong = sum(_misread(*each) for each in zip(_traced(bench), found, best, strict=True))
    return _exact(bench, wrong)


def _drawn_otherwise(bench: Workbench) -> int:
    """Return how often random neurons are not drawn uniformly, anew for each prompt and seed, and the same again."""
    prompts = [bench.prompts[place] for place in _indices(bench)]
    wrong = 0
    for unit in SEARCHED_UNITS:
        first, second, again = (
            [
                tuple(each.neurons)
                for each in attribute(bench.model, prompts, unit=unit, method="random", k=_DRAWN, seed=seed)
            ]
            for seed in (0, 1, 0)
        )
        wrong += sum(one != other for one, other in zip(first, again, strict=True))
        drawn = [*first, *second]
        wrong += len(drawn) - len(set(map(frozenset, drawn)))
        layers = Counter(neuron.layer for each in drawn for neuron in each)
        number, share = len(drawn) * _DRAWN, 1 / bench.model.anatomy.layers
        # Five standard deviations of a binomial number: for one layer in two million.
        far = 5 * (number * share * (1 - share)) ** 0.5
        wrong += sum(abs(layers[layer] - number * share) > far for layer in range(bench.model.anatomy.layers))
    return wrong


def _matched_otherwise(traced: _Traced, unit: Unit) -> int:
    """Return how many matched neurons are chosen ones, are drawn twice or have no chosen one in their layer."""
    candidates = traced.candidates[unit]
    chosen = top_k(candidates, METHODS[METHOD], min(_DRAWN, len(candidates))).indices
    drawn = matched(candidates, chosen)

    def vectors(indices: Tensor) -> list[tuple[int, int]]:
        return list(zip(candidates.sublayer_index[indices].tolist(), candidates.row[indices].tolist(), strict=True))

    shared = len(set(vectors(drawn)) & set(vectors(chosen)))
    layers = Counter(candidates.sublayer_index[drawn].tolist()) - Counter(candidates.sublayer_index[chosen].tolist())
    return shared + len(drawn) - len(drawn.unique()) + layers.total() + (len(drawn) == 0)


def _mixed_up(bench: Workbench) -> int:
    """Return how many experiments with a few prompts are taken for others, or ablate another number of neurons."""
    prompts = [bench.prompts[place].text for place in bench.sample.subset(_PROMPTS)]
    arms = [(_ABLATED, "zero", 0), (_ABLATED, "zero", 1), (_ABLATED, "mean", 0), (_ABLATED + 1, "zero", 0)]
    frames = [bench.frames(("random",), k, kind=kind, seed=seed, number=_PROMPTS)["random"] for k, kind, seed in arms]
    wrong: int = sum(frame["prompt"].tolist() != prompts for frame in frames)
    for frame, (k, _, _) in zip(frames, arms, strict=True):
        wrong += sum(distinct != k for distinct in frame["distinct"].tolist())
    return wrong + len(frames) - len({tuple(frame["logp_after"]) for frame in frames})


def draws_not_as_stated(bench: Workbench) -> Exact:
    """Count mistakes in random neurons, matched neurons, and what the bench remembers of experiments with them."""
    wrong = 0
    if _indices(bench):
        wrong = _drawn_otherwise(bench) + _mixed_up(bench)
        wrong += sum(_matched_otherwise(traced, unit) for traced in _traced(bench) for unit in SEARCHED_UNITS)
    return _exact(bench, wrong)
