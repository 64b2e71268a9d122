"""What a notebook computed for its prompt, by this engine's own functions, with the notebooks' conventions.

Where a convention is a quirk of the published code it is asked for by name: no centring and no biases in query scores,
the subvalue as subkey for Llama (``subkey="down"``), tokens of bare vectors, whatever the sign of their coefficient.

Errors of query scores. Neuron n has the importance S_n, which errs by r log V, and shares t_cn / D_n of terms whose
sizes add up to a_n |D_n| (its amplification). A sublayer is a sum of many neurons, which may cancel: its term errs by r
of all sizes, and so does D_n. The term of one neuron errs by r of itself. With s_cn the share, and errors of different
value neurons as independent,

    of a sublayer:  root of sum_n (r S_n a_n (1 + |s_cn|))^2 + (r log V s_cn)^2
    of a neuron:    root of sum_n (r S_n s_in (1 + a_n))^2   + (r log V s_in)^2

If a neuron's input nearly cancels, a_n is large: so is its share, and little of it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from attribution.claims.about_notebooks.tolerance import Ranked, Rounding
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates
from attribution.engine.methods import method_named, score_candidates
from attribution.engine.projection import before_softmax, model_logits
from attribution.engine.queries import QueryRanking, query
from attribution.engine.questions import Question, ids_of, question_of
from attribution.engine.ranking import Ranking, all_candidates, attribute
from attribution.engine.subkeys import SubkeyKind, components_of, query_neuron_scores, read_subkeys, shares
from attribution.engine.trace import Activations, read_activations
from attribution.errors import BadInputError
from attribution.models.model import Model
from attribution.models.norms import frozen_scale, normalise
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import pad
from attribution.records import AttentionNeuron, Component, FFNNeuron, Head, HeadPosition, Layer, Neuron, Unit

__all__ = ["Recount", "Vocabulary", "QuerySide"]

# How many times more are ranked than were printed, so that whatever may stand at the last place is among them.
_BEYOND = 2
# transformers 4 took the space before these away when it decoded; version 5 leaves it.
_CLEANED = (".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re")


class Vocabulary:
    """A model's tokens as the notebooks print them.

    Args:
        model: A loaded model.
        leading_space: ``"kept"`` or ``"dropped"``.
    """

    def __init__(self, model: Model, leading_space: str) -> None:
        self._tokenizer = model.tokenizer
        self._drop = leading_space == "dropped"
        self._size = model.anatomy.vocabulary

    def plain(self, text: str) -> str:
        """Return a text without what decoders of different versions make differently."""
        for mark in _CLEANED:
            text = text.replace(f" {mark}", mark)
        return text.lstrip(" ") if self._drop else text

    def text(self, token: int) -> str:
        """Return one token, decoded alone; a byte of a metaspace tokenizer by its name."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and len(piece) == 6 and piece.startswith("<0x"):
            return piece
        return self.plain(self._tokenizer.decode([token]))

    @cached_property
    def ids(self) -> dict[str, list[int]]:
        """The tokens of each text: several may look alike."""
        found: dict[str, list[int]] = {}
        for token in range(self._size):
            found.setdefault(self.text(token), []).append(token)
        return found

    def read(self, printed: list[str], ranked: Ranked[int]) -> list[int]:
        """Return the tokens that a printed list may mean.

        Of those that look alike and are not taken, the one whose logit fits the place best; -1 where there is none.
        """
        falling = ranked.scores.sort(descending=True).values
        taken: set[int] = set()
        tokens = []
        for number, text in enumerate(printed):
            free = [token for token in self.ids.get(self.plain(text), ()) if token not in taken]
            best = min(free, key=lambda token: abs(float(ranked.scores[token] - falling[number])), default=-1)
            taken.add(best)
            tokens.append(best)
        return tokens


@dataclass(frozen=True)
class QuerySide:
    """The query side of some value neurons of the notebook's prompt.

    Attributes:
        ranking: What :func:`attribution.query` says.
        components: Query score of the embedding and each sublayer, in forward order, with errors.
        share: s_cn, (components, n).
        amplification: a_n, (n,).
        importance: S_n, (n,).
    """

    ranking: QueryRanking
    components: Ranked[float]
    share: Tensor
    amplification: Tensor
    importance: Tensor


class Recount:
    """One notebook's prompt, traced and attributed by this engine; what is expensive is done once.

    Args:
        model: A loaded model.
        sentence: The prompt.
        text: The analysed token, as printed.
        leading_space: What printed tokens do with a leading space, see :class:`Vocabulary`.
    """

    def __init__(self, model: Model, sentence: str, text: str, leading_space: str) -> None:
        self.model = model
        self.vocabulary = Vocabulary(model, leading_space)
        self.rounding = Rounding.of(model.anatomy)
        answer = text if text[:1].isspace() else f" {text}"
        self.question: Question = question_of(model, Prompt(sentence, answer))
        self._rankings: dict[tuple[Unit, int], Ranking] = {}
        self._query_sides: dict[tuple[tuple[Neuron, ...], SubkeyKind], QuerySide] = {}
        self._squares: dict[tuple[Neuron, ...], Tensor] = {}
        self._patterns: dict[str, Tensor] = {}

    @cached_property
    def seen(self) -> Activations:
        """One forward pass, read at all positions; the batch is this prompt alone."""
        ((_, batch),) = batches_of(self.model, [self.question])
        return read_activations(self.model, batch, positions="all", logits=False)

    @cached_property
    def scale(self) -> Tensor:
        """s, frozen at the final state of the last position."""
        return frozen_scale(self.seen.resid_final[0, -1].double(), self.model.anatomy.readout.norm)

    @cached_property
    def logits(self) -> Tensor:
        """The model's own logits at the last position, (vocabulary,), float64 from its final state."""
        return model_logits(self.seen.resid_final[0, -1].double(), self.scale, self.model.anatomy.readout)

    @cached_property
    def components(self) -> Tensor:
        """Embedding, A^0, F^0, ... at every position, (2 * layers + 1, length, width), float64."""
        return components_of(self.seen, 0, len(self.question.ids))

    def tokens(self, logits: Tensor) -> Ranked[int]:
        """Return every token with its logit."""
        return Ranked(range(len(logits)), logits, self.rounding.relative * logits.abs().max().expand_as(logits))

    def project(self, vector: Tensor) -> Tensor:
        """Return bs(v), the logits of a vector under the frozen scale."""
        return before_softmax(vector.double(), self.scale, self.model.anatomy.readout)

    def size(self, unit: Unit) -> int:
        """Return how many there are of a unit."""
        anatomy = self.model.anatomy
        heads = anatomy.layers * anatomy.heads
        sizes = {
            "layer": 2 * anatomy.layers,
            "head": heads,
            "ffn": anatomy.layers * anatomy.ffn_neurons,
            "attention": heads * anatomy.head_dim * len(self.question.ids),
        }
        return sizes[unit]

    def ranking(self, unit: Unit, number: int) -> Ranking:
        """Return the best of a unit by ``log_prob_increase``: so many, or all that there are."""
        k = min(number, self.size(unit))
        if (unit, k) not in self._rankings:
            question = self.question
            self._rankings[unit, k] = attribute(self.model, question.text, question.answer, unit=unit, k=k)
        return self._rankings[unit, k]

    def ranked(self, unit: Unit, number: int | None = None, *, rounded: float = 0.0) -> Ranked[Component]:
        """Return layers, heads or neurons with their importance.

        Args:
            unit: What is ranked.
            number: How many were printed; all are ranked when ``None``.
            rounded: Half a unit of what the notebook rounded to before it sorted.
        """
        found = self.ranking(unit, self.size(unit) if number is None else _BEYOND * number)
        return Ranked(found.neurons, found.scores, torch.full_like(found.scores, self.rounding.nats + rounded))

    @cached_property
    def _head_positions(self) -> Candidates:
        ((_, batch),) = batches_of(self.model, [self.question])
        method = method_named("log_prob_increase", "head_position")
        return all_candidates(self.model, [self.question], batch, {"head_position": [method]}, seed=0, steps=1)[0][
            "head_position"
        ]

    def positions_of(self, head: Head) -> tuple[Ranked[int], Tensor]:
        """Return a head's source positions with their importance, and the logits of what it writes of each.

        The logits are (positions, vocabulary).
        """
        records = [HeadPosition(head.layer, head.head, position) for position in range(len(self.question.ids))]
        candidates = self._head_positions.take(self._head_positions.indices_of(records))
        scores = score_candidates(method_named("log_prob_increase", "head_position"), candidates)
        return Ranked(range(len(records)), scores, torch.full_like(scores, self.rounding.nats)), candidates.update

    def attention_weights(self, sentence: str, head: Head) -> Ranked[int]:
        """Return the weights with which the last position of a prompt looks at each position through a head."""
        if sentence not in self._patterns:
            ids = ids_of(self.model, sentence)
            batch = pad([ids], device=self.model.device)
            self._patterns[sentence] = read_activations(self.model, batch, logits=False).pattern[:, 0].double()
        weights = self._patterns[sentence][head.layer, head.head]
        # A weight that underflowed is zero in any float32 run.
        sizes = weights.clamp_min(torch.finfo(torch.float32).tiny).log().abs()
        errors = weights * self.rounding.relative * sizes.max()
        return Ranked(range(len(weights)), weights, errors)

    def query_side(self, neurons: Ranking | list[Neuron], subkey: SubkeyKind = "up") -> QuerySide:
        """Return the query side of value neurons, as the published code has it."""
        records = cast("list[Neuron]", neurons.neurons if isinstance(neurons, Ranking) else neurons)
        key = tuple(records), subkey
        if key not in self._query_sides:
            self._query_sides[key] = self._measured_query_side(neurons, subkey)
        return self._query_sides[key]

    def _measured_query_side(self, neurons: Ranking | list[Neuron], subkey: SubkeyKind) -> QuerySide:
        question, anatomy = self.question, self.model.anatomy
        ranking = query(
            self.model,
            question.text,
            question.answer,
            value_neurons=neurons,
            k=None,
            subkey=subkey,
            centring=False,
            biases=False,
        )
        if ranking.left_out:
            raise BadInputError(
                f"the input of value neuron {ranking.left_out[0]!r} cannot be told from zero, so it has no shares that "
                "could be compared; load the model in float32."
            )
        readings = read_subkeys(
            anatomy, self.components, ranking.value_neurons, subkey=subkey, centring=False, biases=False
        )
        divided = shares(readings.terms, readings.counts, torch.finfo(self.seen.resid_pre.dtype).eps)
        share, importance = divided.share[:-1], ranking.value_scores.to(divided.share.device)
        errors = (
            (
                (self.rounding.relative * importance * divided.amplification * (1 + share.abs())) ** 2
                # A component that comes too late for a neuron is no term of it.
                * (readings.terms[:-1] != 0)
                + (self.rounding.nats * share) ** 2
            )
            .sum(1)
            .sqrt()
        )
        scores = torch.tensor(ranking.layers["query_score"].tolist(), dtype=torch.float64)
        indices = [number / 2 - 0.5 for number in range(2 * anatomy.layers + 1)]
        return QuerySide(ranking, Ranked(indices, scores, errors.cpu()), share, divided.amplification, importance)

    def query_neurons(self, side: QuerySide, number: int, *, factor: float = 1.0) -> Ranked[FFNNeuron]:
        """Return query neurons with their scores.

        Args:
            side: The query side of attention value neurons.
            number: How many were printed.
            factor: What the scores are multiplied by.
        """
        ranking = side.ranking
        neurons = ranking.neurons[: _BEYOND * number]
        squares = self._squared_errors(side)
        layers = torch.tensor([each.layer for each in neurons], device=squares.device)
        indices = torch.tensor([each.index for each in neurons], device=squares.device)
        errors = squares[layers, indices].sqrt().cpu()
        return Ranked(neurons, ranking.scores[: len(neurons)] * factor, errors * abs(factor))

    def _squared_errors(self, side: QuerySide) -> Tensor:
        """Return the squared error of every query neuron's score, (layers, ffn_neurons)."""
        readers = cast("list[AttentionNeuron]", side.ranking.value_neurons)
        key: tuple[Neuron, ...] = tuple(readers)
        if key in self._squares:
            return self._squares[key]
        anatomy = self.model.anatomy
        readings = read_subkeys(anatomy, self.components, readers, centring=False, biases=False)
        denominators = readings.terms.sum(0)
        squares = denominators.new_zeros(max(each.layer for each in readers), anatomy.ffn_neurons)
        for place, neuron in enumerate(readers):
            # Of this value neuron alone, for an importance of 1: the shares s_in.
            share = query_neuron_scores(
                anatomy,
                self.seen.coefficients[:, 0],
                self.seen.ffn_post_scale[:, 0],
                folded=readings.folded[place][None],
                weights=1 / denominators[place][None],
                layers=[neuron.layer],
                positions=[neuron.position],
            )
            own = self.rounding.relative * side.importance[place] * (1 + side.amplification[place])
            squares[: len(share)] += share.square() * (own**2 + self.rounding.nats**2)
        self._squares[key] = squares
        return squares

    def through_head(self, neuron: FFNNeuron, head: Head) -> Tensor:
        """Return the logits of what a head would write if it read an FFN neuron's bare subvalue alone.

        The subvalue, whatever the sign of its coefficient, goes through the norm before the attention, with a mean and
        a scale of its own, then through the head's values with their biases and its part of the output projection.
        """
        anatomy, first = self.model.anatomy, head.head * self.model.anatomy.head_dim
        own = slice(first, first + anatomy.head_dim)
        weight, bias = anatomy.value_subkeys(head.layer)
        read = normalise(
            anatomy.sublayer(neuron.layer, "ffn").vectors[neuron.index].double(),
            anatomy.sublayer(head.layer, "attention").input_norm,
        )
        values = weight[own].double() @ read
        if bias is not None:
            values = values + bias[own].double()
        return self.project(values @ anatomy.sublayer(head.layer, "attention").vectors[own].double())

    def telescoped(self) -> float:
        """Return log p(w | final state) - log p(w | embedding), which all layers add up to."""
        ends = torch.stack([self.components[0, -1], self.seen.resid_final[0, -1].double()])
        found = self.project(ends).log_softmax(-1)[:, self.question.answer_id]
        return float(found[1] - found[0])

    def value_vector(self, neuron: Neuron) -> Tensor:
        """Return the logits of a neuron's bare vector."""
        if isinstance(neuron, FFNNeuron):
            return self.project(self.model.anatomy.sublayer(neuron.layer, "ffn").vectors[neuron.index])
        row = neuron.head * self.model.anatomy.head_dim + neuron.dim
        return self.project(self.model.anatomy.sublayer(neuron.layer, "attention").vectors[row])

    def layers(self) -> dict[Layer, float]:
        """Return the importance of each layer."""
        ranking = self.ranking("layer", self.size("layer"))
        return dict(zip(cast("list[Layer]", ranking.neurons), ranking.scores.tolist(), strict=True))
