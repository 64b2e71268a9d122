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
from attribution.engine.vectors import VectorTable, slots_of
from attribution.errors import BadInputError
from attribution.models.anatomy import Anatomy
from attribution.models.norms import frozen_scale
from attribution.records import SUBLAYERS, AttentionNeuron, Component, FFNNeuron, Head, HeadPosition, SublayerKind, Unit

__all__ = [
    "Candidates",
    "candidates_of",
    "first_order",
    "first_order_bound",
    "log_prob_increase",
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
class Candidates:
    """Everything of one unit that can be ranked for one prompt and answer, in order of the records.

    Candidate i adds ``coefficient[i]`` times its vector to the residual stream ``stream[slot[i]]`` at the last
    position. Numbers are float64: importances are small differences of large logits.

    Attributes:
        table: The vectors.
        index: (n,), place of each candidate among all ``total`` of the unit.
        slot: (n,), its slot in the table.
        row: (n,), its row in the slot's vectors.
        position: (n,), its source position; 0 for what has none.
        coefficient: m, or alpha * val for attention neurons, times the gain of a norm that follows, (n,); 1 for
            heads and layers, whose vectors are what they write.
        stream: x of Eq. 13 per slot, (slots, width): ``resid_mid`` for the FFN, ``resid_pre`` for attention.
        scale: s, the frozen scale, a scalar.
        answer: w, the answer's token id.
        total: Number of candidates of the unit for this prompt.
        seed: Seed for methods that draw random numbers.
        effects: What backward passes say of each candidate, (n,), by the name of the pass; filled for methods that
            need it.
    """

    table: VectorTable
    index: Tensor
    slot: Tensor
    row: Tensor
    position: Tensor
    coefficient: Tensor
    stream: Tensor
    scale: Tensor
    answer: int
    total: int
    seed: int
    effects: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Candidates:
        """Return the candidates at ``index``, in that order."""
        names = ("index", "slot", "row", "position", "coefficient")
        part = replace(
            self,
            **{name: getattr(self, name)[index] for name in names},
            effects={name: effect[index] for name, effect in self.effects.items()},
        )
        # The stream depends on the prompt alone; a subset need not project it again.
        part.__dict__["_whole"] = self
        return part

    def places_of(self, records: Sequence[Component]) -> Tensor:
        """Return the index of each record among the candidates of a neuron unit, (n,); all must be there.

        Raises:
            BadInputError: If a record is not a neuron of the unit, or lies outside the model or the prompt.
        """
        depth = int(self.position.max()) + 1 if len(self) else 1
        places = []
        for record in records:
            place = self.table.place_of(record, depth)
            if place is None:
                raise BadInputError(
                    f"{record!r} is not among the {len(self)} candidates of unit {self.table.unit!r} for this prompt; "
                    "pass records of the model's neurons, with positions inside the prompt."
                )
            places.append(place)
        return torch.tensor(places, dtype=torch.long, device=self.index.device)

    def records(self, index: Tensor) -> list[Component]:
        """Return the records of the candidates at ``index``, in that order."""
        columns = (each[index].tolist() for each in (self.slot, self.row, self.position))
        # Prompts rank the same neurons again and again: looking one up takes a fifth of making it anew.
        known, found = self.table.known_records, []
        for place in zip(*columns, strict=True):
            if place not in known:
                known[place] = self._record(*place)
            found.append(known[place])
        return found

    def _record(self, slot: int, row: int, position: int) -> Component:
        sublayer, (head, dim) = self.table.sublayers[slot], divmod(row, self.table.per_head)
        if self.table.unit == "layer":
            return sublayer
        if self.table.unit == "head":
            return Head(sublayer.layer, row)
        if self.table.unit == "head_position":
            return HeadPosition(sublayer.layer, head, dim)
        if sublayer.kind == "ffn":
            return FFNNeuron(sublayer.layer, row)
        return AttentionNeuron(sublayer.layer, head, dim, position)

    @cached_property
    def log_probs(self) -> Tensor:
        """Log p(t|x) of every token t, the log-softmax of bs(x) in every slot, (slots, vocabulary)."""
        whole = self.__dict__.get("_whole")
        if whole is not None:
            return whole.log_probs  # type: ignore[no-any-return]
        return before_softmax(self.stream, self.scale, self.table.readout).log_softmax(-1)

    @cached_property
    def probs(self) -> Tensor:
        """p(t|x) of every token t, in every slot, (slots, vocabulary)."""
        whole = self.__dict__.get("_whole")
        return self.log_probs.exp() if whole is None else whole.probs

    @cached_property
    def update(self) -> Tensor:
        """bs(v) of what each candidate writes, (n, vocabulary)."""
        return self.table.unscaled_logits(self.slot, self.row).mul_((self.coefficient / self.scale)[:, None])

    @cached_property
    def _vector(self) -> Tensor:
        """Place of each candidate's vector among the rows of all slots, (n,)."""
        return self.table.offsets[self.slot] + self.row

    def of_vector(self, per_vector: Tensor) -> Tensor:
        """Return each candidate's entry of a table over the rows of all slots, (n,)."""
        return per_vector[self._vector]

    @cached_property
    def reach(self) -> Tensor:
        """The most that any logit can move by what each candidate writes, (n,)."""
        norms = self.of_vector(self.table.norms)
        return self.coefficient.abs() * norms * (self.table.largest_readout / self.scale)

    @cached_property
    def increase_bound(self) -> Tensor:
        """:func:`first_order_bound` over the distribution of each slot, (n,): several methods rest on it."""
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

    ``<e_w - p, bs(v)> = <g, v>`` with g the pull-back of e_w - p: one matrix-vector product per slot instead of one
    over the vocabulary per candidate. It is computed in float32. The margin takes rounding errors as independent,
    so that a sum of n terms errs by about sqrt(n) eps times the sum of their sizes (Higham & Mary 2019); the sums
    run over the vocabulary, where the sizes sum to |e_w - p|_1 times the reach, and over the width. The factor 4 is
    for safety.

    Args:
        candidates: What is bounded.
        log_probs: log p(t|x) per slot, (slots, vocabulary), or the same for all, (1, vocabulary).

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
    for vectors, fold, slope in zip(table.vectors, table.folds, gradient.expand(len(table.vectors), -1), strict=True):
        slopes.append(vectors.to(dtype) @ (slope if fold is None else slope * fold.to(dtype)))
    value: Tensor = candidates.coefficient * candidates.of_vector(torch.cat(slopes).double())
    terms = sum(size**0.5 for size in table.readout.unembedding.shape)
    margin: Tensor = 4 * terms * torch.finfo(dtype).eps * mass.expand(len(table.vectors))[candidates.slot]
    return value + margin * candidates.reach


def _of_prompt(
    unit: Unit, anatomy: Anatomy, activations: Activations, prompt: int, coefficients: Tensor
) -> VectorTable:
    """Return what the heads or layers of one prompt write, as a table of its own.

    Args:
        unit: ``"head"``, ``"head_position"`` or ``"layer"``.
        anatomy: The model's anatomy.
        activations: Read at the last position.
        prompt: Row of the batch.
        coefficients: alpha * val times the gain, (L, H, dh, P).
    """
    if unit == "layer":
        # The bias of an output projection belongs to the layer, though to no neuron and no head of it.
        outputs = {"attention": activations.attention_output, "ffn": activations.ffn_output}
        sublayers = slots_of(unit, anatomy)
        vectors = tuple(outputs[each.kind][each.layer, prompt][None] for each in sublayers)
        return VectorTable(unit, sublayers, vectors, (None,) * len(sublayers), anatomy.readout, 1)
    depth = coefficients.shape[-1] if unit == "head_position" else 1
    parts = coefficients if unit == "head_position" else coefficients.sum(-1, keepdim=True)
    written = []
    for layer in range(anatomy.layers):
        per_head = anatomy.sublayer(layer, "attention").vectors.double().unflatten(0, (anatomy.heads, anatomy.head_dim))
        written.append(torch.einsum("hdp,hdw->hpw", parts[layer], per_head).flatten(0, 1))
    return VectorTable(
        unit,
        slots_of(unit, anatomy),
        tuple(written),
        tuple(each.post_weight for each in anatomy.attention),
        anatomy.readout,
        depth,
    )


def candidates_of(
    unit: Unit,
    table: VectorTable | None,
    anatomy: Anatomy,
    activations: Activations,
    prompt: int,
    length: int,
    *,
    answer: int,
    seed: int = 0,
    effects: Mapping[str, Sequence[Tensor]] | None = None,
) -> Candidates:
    """Return every candidate of a unit for one prompt of a traced batch.

    Args:
        unit: What is scored.
        table: The vectors of a neuron unit; ``None`` for heads and layers, whose vectors depend on the prompt.
        anatomy: The model's anatomy.
        activations: Read at the last position.
        prompt: Row of the batch.
        length: Number of real tokens of that row; attention neurons exist at each of them.
        answer: The answer's token id.
        seed: Seed for methods that draw random numbers.
        effects: By the name of a backward pass, what it says per slot, (rows, positions) or (rows, 1) each.
    """
    coefficients: dict[SublayerKind, Tensor] = {}
    if "ffn" in SUBLAYERS[unit]:
        ffn = activations.coefficients[:, prompt].double() * activations.ffn_gain[:, prompt, None].double()
        coefficients["ffn"] = ffn
    if "attention" in SUBLAYERS[unit]:
        # c = alpha * val, ordered by (layer, head, dim, position) so that ties fall in that order.
        pattern = activations.pattern[:, prompt, :, :length].double()
        values = activations.values[:, prompt, :length].double()
        taken = torch.einsum("lhp,lphd->lhdp", pattern, values)
        coefficients["attention"] = taken * activations.attention_gain[:, prompt, None, None, None].double()
    if table is None:
        table = _of_prompt(unit, anatomy, activations, prompt, coefficients["attention"])
        rows = sum(table.sizes)
        coefficient = torch.ones(rows, dtype=torch.float64, device=activations.resid_pre.device)
        places = table.places(1)
    else:
        coefficient = torch.cat([coefficients[each.kind][each.layer].flatten() for each in table.sublayers])
        places = table.places(length)
    streams = {"attention": activations.resid_pre, "ffn": activations.resid_mid}
    index, slot, row, position = places
    return Candidates(
        table=table,
        index=index,
        slot=slot,
        row=row,
        position=position,
        coefficient=coefficient,
        stream=torch.stack([streams[each.kind][each.layer, prompt] for each in table.sublayers]).double(),
        scale=frozen_scale(activations.resid_final[prompt].double(), anatomy.readout.norm),
        answer=answer,
        total=len(index),
        seed=seed,
        effects={
            name: torch.cat([effect.flatten() for effect in by_slot]).double()
            for name, by_slot in (effects or {}).items()
        },
    )
