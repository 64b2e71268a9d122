"""Importance: Eq. 13 of the paper, its upper bound, and the candidates both are computed for.

The identity behind the bound. With z = bs(x), d = bs(v), p = softmax(z) and p' = softmax(z + d), the log-sum-exp is
convex with gradient p and its Bregman divergence is a KL divergence, so

    Imp(v|x) = d_w - [LSE(z + d) - LSE(z)] = <e_w - p, d> - KL(p || p')

and the first term alone, one dot product per neuron, is never below the importance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attribution.engine.projection import before_softmax, pull_back
from attribution.engine.trace import Activations
from attribution.engine.vectors import VectorTable, largest_readout_of, sublayers_of
from attribution.errors import BadInputError
from attribution.models.anatomy import Anatomy, Readout
from attribution.models.norms import frozen_scale
from attribution.records import SUBLAYERS, Component, SublayerKind, Unit

__all__ = [
    "Candidates",
    "Streams",
    "TracedPrompt",
    "candidates_of",
    "first_order",
    "first_order_bound",
    "log_prob_increase",
    "seen_together",
]


def log_prob_increase(log_probs: Tensor, update: Tensor, answer: int) -> Tensor:
    """Return ``Imp(v|x) = log p(w|x+v) - log p(w|x) = bs(v)_w - log sum_t p(t|x) exp(bs(v)_t)`` (Eq. 13).

    Args:
        log_probs: log p(t|x), the log-softmax of bs(x), (..., vocabulary).
        update: bs(v), (..., vocabulary).
        answer: w, the answer's token id.

    Returns:
        (...,), in nats.
    """
    return update[..., answer] - torch.logsumexp(log_probs + update, dim=-1)


def first_order(probs: Tensor, update: Tensor, answer: int) -> Tensor:
    """Return ``<e_w - p, bs(v)>``, the first-order term of the importance; it exceeds Eq. 13 by KL(p || p').

    Args:
        probs: p(t|x), (..., vocabulary).
        update: bs(v), (..., vocabulary).
        answer: w, the answer's token id.

    Returns:
        (...,), in nats.
    """
    expected: Tensor = torch.linalg.vecdot(probs, update)
    return update[..., answer] - expected


@dataclass(frozen=True)
class Streams:
    """What the candidates of one prompt add to, and the distributions over tokens that follow from it.

    Attributes:
        states: x of Eq. 13 per sublayer, (sublayers, width), float64: ``resid_mid`` for the FFN, ``resid_pre`` for
            attention.
        scale: s, the frozen scale, a scalar.
        readout: The final norm and unembedding.
        logits: bs(x) in every sublayer, (sublayers, vocabulary), where it was projected together with other prompts'.
        needed: The sublayers that are asked for; all when ``None``. What follows of the others is NaN.
    """

    states: Tensor
    scale: Tensor
    readout: Readout
    logits: Tensor | None = None
    needed: Tensor | None = None

    @cached_property
    def log_probs(self) -> Tensor:
        """Log p(t|x) of every token t, the log-softmax of bs(x) in every sublayer, (sublayers, vocabulary)."""
        if self.needed is None:
            logits = before_softmax(self.states, self.scale, self.readout) if self.logits is None else self.logits
            return logits.log_softmax(-1)
        some = before_softmax(self.states[self.needed], self.scale, self.readout).log_softmax(-1)
        return some.new_full((len(self.states), some.shape[1]), float("nan")).index_copy_(0, self.needed, some)

    @cached_property
    def probs(self) -> Tensor:
        """p(t|x) of every token t, in every sublayer, (sublayers, vocabulary)."""
        return self.log_probs.exp()


@dataclass(frozen=True)
class TracedPrompt:
    """One prompt of a traced batch.

    Attributes:
        anatomy: The model's anatomy.
        activations: Of the batch, read at the last position.
        row: The prompt's row.
        length: How many of its tokens are real; attention neurons exist at each of them.
    """

    anatomy: Anatomy
    activations: Activations
    row: int
    length: int


@dataclass(frozen=True)
class Candidates:
    """Everything of one unit that can be ranked for one prompt and answer, in order of the records.

    Candidate i adds ``coefficient[i]`` times its vector to the residual stream ``streams.states[sublayer_index[i]]`` at
    the last position. Numbers are float64: importances are small differences of large logits.

    Attributes:
        table: The vectors.
        index: (n,), place of each candidate among all ``total`` of the unit.
        sublayer_index: (n,), which of the table's sublayers holds it.
        row: (n,), its row in the vectors of its sublayer.
        position: (n,), its source position; 0 for what has none.
        coefficient: m, or alpha * val for attention neurons, times the scale of a norm that follows, (n,); 1 for
            heads and layers, whose vectors are what they write.
        streams: What they add to.
        answer: w, the answer's token id.
        total: Number of candidates of the unit for this prompt.
        seed: Seed for methods that draw random numbers.
        effects: What backward passes say of each candidate, (n,), by the name of the pass; filled for methods that
            need it.
    """

    table: VectorTable
    index: Tensor
    sublayer_index: Tensor
    row: Tensor
    position: Tensor
    coefficient: Tensor
    streams: Streams
    answer: int
    total: int
    seed: int
    effects: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Candidates:
        """Return the candidates at ``index``, in that order."""
        names = ("index", "sublayer_index", "row", "position", "coefficient")
        return replace(
            self,
            **{name: getattr(self, name)[index] for name in names},
            effects={name: effect[index] for name, effect in self.effects.items()},
        )

    def afresh(self, needed: Tensor | None = None) -> Candidates:
        """Return the same candidates without what was derived from their states: that of many prompts fills memory.

        Args:
            needed: The sublayers whose states are asked for; all when ``None``.
        """
        return replace(self, streams=replace(self.streams, needed=needed))

    @property
    def scale(self) -> Tensor:
        """s, the frozen scale of the prompt, a scalar."""
        return self.streams.scale

    @property
    def log_probs(self) -> Tensor:
        """Log p(t|x) of every token t, in every sublayer, (sublayers, vocabulary)."""
        return self.streams.log_probs

    @property
    def probs(self) -> Tensor:
        """p(t|x) of every token t, in every sublayer, (sublayers, vocabulary)."""
        return self.streams.probs

    def indices_of(self, records: Sequence[Component]) -> Tensor:
        """Return the index of each record among all candidates of the unit, (n,); all must be there.

        Raises:
            BadInputError: If a record is not of the unit, or lies outside the model or the prompt.
        """
        depth = int(self.position.max()) + 1 if len(self) else 1
        indices = []
        for record in records:
            place = self.table.place_of(record, depth)
            if place is None:
                raise BadInputError(
                    f"{record!r} is not among the {len(self)} candidates of unit {self.table.unit!r} for this prompt; "
                    "pass records of the model's neurons, with positions inside the prompt."
                )
            indices.append(place)
        return torch.tensor(indices, dtype=torch.long, device=self.index.device)

    def records(self, index: Tensor) -> list[Component]:
        """Return the records of the candidates at ``index``, in that order."""
        columns = (each[index].tolist() for each in (self.sublayer_index, self.row, self.position))
        return [self.table.record(*place) for place in zip(*columns, strict=True)]

    @cached_property
    def update(self) -> Tensor:
        """bs(v) of what each candidate writes, (n, vocabulary)."""
        logits = self.table.unscaled_logits(self.sublayer_index, self.row)
        return logits.mul_((self.coefficient / self.scale)[:, None])

    @cached_property
    def vector(self) -> Tensor:
        """Place of each candidate's vector among the rows of all sublayers, (n,)."""
        return self.table.offsets[self.sublayer_index] + self.row

    def of_vector(self, per_vector: Tensor) -> Tensor:
        """Return each candidate's entry of a table over the rows of all sublayers, (n,)."""
        return per_vector[self.vector]

    @cached_property
    def reach(self) -> Tensor:
        """The most that any logit can move by what each candidate writes, (n,)."""
        norms = self.of_vector(self.table.norms)
        return self.coefficient.abs() * norms * (self.table.largest_readout / self.scale)

    @cached_property
    def increase_bound(self) -> Tensor:
        """:func:`first_order_bound` over the distribution of each sublayer, (n,): several methods rest on it."""
        return first_order_bound(self, self.log_probs)

    @cached_property
    def tolerance(self) -> float:
        """How far float64 rounding can move an exact score, in nats; scores closer than this count as tied.

        A dot product of n terms errs by at most n * eps * |a| |b|; the longest ones here run over the width
        and the vocabulary, and no entry of an update exceeds ``reach``. The factor 4 covers base and update.
        """
        if len(self) == 0:
            return 0.0
        sizes = sum(self.table.readout.unembedding.shape)
        return 4 * sizes * torch.finfo(torch.float64).eps * (1 + float(self.reach.max()))


def first_order_bound(candidates: Candidates, log_probs: Tensor) -> Tensor:
    """Return an upper bound on the importance: :func:`first_order` of every candidate, and a margin for rounding.

    ``<e_w - p, bs(v)> = <g, v>`` with g the pull-back of e_w - p: one matrix-vector product per sublayer instead of one
    over the vocabulary per candidate. It is computed in float32. The margin takes rounding errors as independent,
    so that a sum of n terms errs by about sqrt(n) eps times the sum of their sizes (Higham & Mary 2019); the sums
    run over the vocabulary, where the sizes sum to |e_w - p|_1 times the reach, and over the width. The factor 4 is
    for safety.

    Args:
        candidates: What is bounded.
        log_probs: log p(t|x) per sublayer, (sublayers, vocabulary), or the same for all, (1, vocabulary).

    Returns:
        (n,), in nats; never below :func:`log_prob_increase`.
    """
    table, dtype = candidates.table, candidates.table.scan_dtype
    covector = -log_probs.exp()
    # 1 - p without its cancellation: of a token that is all but certain, what is left to gain.
    covector[:, candidates.answer] = -torch.expm1(log_probs[:, candidates.answer])
    mass = covector.abs().sum(-1)
    gradient = pull_back(covector.to(dtype), candidates.scale.to(dtype), table.readout)
    slopes = []
    for vectors, weight, slope in zip(
        table.vectors, table.post_weights, gradient.expand(len(table.vectors), -1), strict=True
    ):
        slopes.append(vectors.to(dtype) @ (slope if weight is None else slope * weight.to(dtype)))
    value: Tensor = candidates.coefficient * candidates.of_vector(torch.cat(slopes).double())
    terms = sum(size**0.5 for size in table.readout.unembedding.shape)
    margin: Tensor = 4 * terms * torch.finfo(dtype).eps * mass.expand(len(table.vectors))[candidates.sublayer_index]
    return value + margin * candidates.reach


def seen_together(candidates: Sequence[Candidates]) -> list[Candidates]:
    """Return candidates of several prompts whose states are projected in one product: it reads the unembedding once."""
    states = torch.stack([each.streams.states for each in candidates])
    scales = torch.stack([each.scale for each in candidates])
    logits = before_softmax(states, scales[:, None], candidates[0].streams.readout)
    return [
        replace(each, streams=replace(each.streams, logits=own)) for each, own in zip(candidates, logits, strict=True)
    ]


def candidates_of(
    unit: Unit,
    prompt: TracedPrompt,
    table: VectorTable | None = None,
    *,
    answer: int,
    seed: int = 0,
    effects: Mapping[str, Sequence[Tensor]] | None = None,
) -> Candidates:
    """Return every candidate of a unit for one prompt of a traced batch.

    Args:
        unit: What is scored.
        prompt: The prompt.
        table: The vectors of a neuron unit; ``None`` for heads and layers, whose vectors depend on the prompt.
        answer: The answer's token id.
        seed: Seed for methods that draw random numbers.
        effects: By the name of a backward pass, what it says per sublayer, (rows, positions) or (rows, 1) each.
    """
    seen, row = prompt.activations, prompt.row
    # 1. What each candidate multiplies its vector by, with the scale of a norm that follows.
    coefficients = _coefficients(unit, prompt)
    # 2. The vectors, and which of them each candidate writes.
    if table is None:
        table = _vectors_of_prompt(unit, prompt, coefficients)
        coefficient = torch.ones(sum(table.sizes), dtype=torch.float64, device=seen.resid_pre.device)
        index, sublayer_index, vector_row, position = table.indices(1)
    else:
        coefficient = torch.cat([coefficients[each.kind][each.layer].flatten() for each in table.sublayers])
        index, sublayer_index, vector_row, position = table.indices(prompt.length)
    # 3. What they add to, under the final norm's frozen scale.
    states = {"attention": seen.resid_pre, "ffn": seen.resid_mid}
    readout = prompt.anatomy.readout
    streams = Streams(
        states=torch.stack([states[each.kind][each.layer, row] for each in table.sublayers]).double(),
        scale=frozen_scale(seen.resid_final[row].double(), readout.norm),
        readout=readout,
    )
    return Candidates(
        table=table,
        index=index,
        sublayer_index=sublayer_index,
        row=vector_row,
        position=position,
        coefficient=coefficient,
        streams=streams,
        answer=answer,
        total=len(index),
        seed=seed,
        effects={
            name: torch.cat([effect.flatten() for effect in by_sublayer]).double()
            for name, by_sublayer in (effects or {}).items()
        },
    )


def _coefficients(unit: Unit, prompt: TracedPrompt) -> dict[SublayerKind, Tensor]:
    """Return m, (layers, neurons), and alpha * val, (layers, heads, head_dim, positions), of the unit's sublayers."""
    seen, row = prompt.activations, prompt.row
    found: dict[SublayerKind, Tensor] = {}
    if "ffn" in SUBLAYERS[unit]:
        found["ffn"] = seen.coefficients[:, row].double() * seen.ffn_post_scale[:, row, None].double()
    if "attention" in SUBLAYERS[unit]:
        # c = alpha * val, ordered by (layer, head, dim, position) so that ties fall in that order.
        pattern = seen.pattern[:, row, :, : prompt.length].double()
        values = seen.values[:, row, : prompt.length].double()
        taken = torch.einsum("lhp,lphd->lhdp", pattern, values)
        found["attention"] = taken * seen.attention_post_scale[:, row, None, None, None].double()
    return found


def _vectors_of_prompt(unit: Unit, prompt: TracedPrompt, coefficients: Mapping[SublayerKind, Tensor]) -> VectorTable:
    """Return what the heads or layers of one prompt write, as a table of its own.

    Args:
        unit: ``"head"``, ``"head_position"`` or ``"layer"``.
        prompt: The prompt.
        coefficients: Of its neurons, see :func:`_coefficients`.
    """
    anatomy, sublayers = prompt.anatomy, sublayers_of(unit, prompt.anatomy)
    largest = anatomy.once(largest_readout_of)
    if unit == "layer":
        # The bias of an output projection belongs to the layer, though to no neuron and no head of it.
        outputs = {"attention": prompt.activations.attention_output, "ffn": prompt.activations.ffn_output}
        vectors = tuple(outputs[each.kind][each.layer, prompt.row][None] for each in sublayers)
        return VectorTable(unit, sublayers, vectors, (None,) * len(sublayers), anatomy.readout, 1, largest)
    parts = coefficients["attention"]
    if unit == "head":
        parts = parts.sum(-1, keepdim=True)
    written = []
    for own, part in zip(anatomy.attention, parts, strict=True):
        per_head = own.vectors.double().unflatten(0, (anatomy.heads, anatomy.head_dim))
        written.append(torch.einsum("hdp,hdw->hpw", part, per_head).flatten(0, 1))
    post_weights = tuple(own.post_weight for own in anatomy.attention)
    return VectorTable(unit, sublayers, tuple(written), post_weights, anatomy.readout, parts.shape[-1], largest)
