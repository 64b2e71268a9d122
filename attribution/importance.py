"""Importance of neurons: Eq. 13 of the paper, its upper bound, and the candidates both are computed for.

The identity behind the bound. With z = bs(x), d = bs(m v), p = softmax(z) and p' = softmax(z + d), the
log-sum-exp is convex with gradient p and its Bregman divergence is a KL divergence, so

    Imp(v|x) = d_w - [LSE(z + d) - LSE(z)] = <e_w - p, d> - KL(p || p')

and the first term alone, one dot product per neuron, is never below the importance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attribution.anatomy import Anatomy, Readout
from attribution.errors import BadInputError
from attribution.projection import before_softmax, frozen_scale, largest_row_norm, pull_back
from attribution.records import AttentionNeuron, FFNNeuron, Neuron
from attribution.trace import Activations

__all__ = [
    "UNITS",
    "Candidates",
    "Unit",
    "VectorTable",
    "candidates_of",
    "first_order",
    "log_prob_increase",
    "unit_named",
]

Unit: TypeAlias = Literal["ffn", "attention"]
UNITS: tuple[Unit, ...] = ("ffn", "attention")

# Projected vectors are kept up to this many float64 numbers per unit: 128 MiB.
_KEPT_NUMBERS = 2**24


def unit_named(name: str) -> Unit:
    """Return the unit of that name.

    Raises:
        BadInputError: If there is none.
    """
    for unit in UNITS:
        if unit == name:
            return unit
    raise BadInputError(f"unit {name!r} is unknown; use one of {', '.join(UNITS)}.")


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


@dataclass(frozen=True)
class VectorTable:
    """The vectors that neurons of one unit write, and what of them does not depend on the prompt.

    Attributes:
        unit: ``"ffn"`` or ``"attention"``.
        vectors: Per layer, subvalues or attention output vectors, (rows, width), in the model's dtype.
        readout: Final norm and unembedding, in float64.
        head_dim: Dimensions per head, to tell an attention row's head and dimension.
    """

    unit: Unit
    vectors: tuple[Tensor, ...]
    readout: Readout
    head_dim: int
    _logits: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _places: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)
    _reciprocal_ranks: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, unit: Unit, anatomy: Anatomy) -> VectorTable:
        """Return the table of a unit of a model."""
        vectors = anatomy.subvalues if unit == "ffn" else anatomy.value_vectors
        return cls(unit, vectors, anatomy.readout.double(), anatomy.head_dim)

    @cached_property
    def norms(self) -> Tensor:
        """|v|, the L2 norm of each vector, (layers, rows)."""
        return torch.stack([vectors.double().norm(dim=-1) for vectors in self.vectors])

    @cached_property
    def largest_readout(self) -> float:
        """The largest |gamma * W_t| over tokens t: no bs(v)_t exceeds |v| times this over the scale."""
        return float(largest_row_norm(self.readout))

    def places(self, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return index, layer, row and position, each (n,), of a flattened (layers, rows, positions) tensor."""
        if shape not in self._places:
            index = torch.arange(math.prod(shape), device=self.readout.unembedding.device)
            self._places[shape] = (index, *torch.unravel_index(index, shape))
        return self._places[shape]

    def reciprocal_ranks(self, answer: int) -> Tensor:
        """Return 1 / rank of the answer in bs(v), (layers, rows).

        The rank counts from 1, in descending order; tokens equal to the answer do not push it down. The frozen
        scale does not change it.
        """
        if answer not in self._reciprocal_ranks:
            ranks = []
            for layer, vectors in enumerate(self.vectors):
                logits = self.unscaled_logits(layer, torch.arange(len(vectors), device=vectors.device))
                ranks.append(1 + (logits > logits[:, answer, None]).sum(-1))
            self._reciprocal_ranks[answer] = 1 / torch.stack(ranks).double()
        return self._reciprocal_ranks[answer]

    def unscaled_logits(self, layer: int, rows: Tensor) -> Tensor:
        """Return bs(v) for a frozen scale of 1, (rows, vocabulary).

        Those of a small model are projected once and kept; a large model's would not fit.
        """
        kept = self._logits.get(layer)
        if kept is not None:
            return kept[rows]
        one = torch.ones((), dtype=torch.float64, device=rows.device)
        if len(self.vectors) * len(self.vectors[layer]) * len(self.readout.unembedding) > _KEPT_NUMBERS:
            return before_softmax(self.vectors[layer][rows].double(), one, self.readout)
        self._logits[layer] = before_softmax(self.vectors[layer].double(), one, self.readout)
        return self._logits[layer][rows]


@dataclass(frozen=True)
class Candidates:
    """The neurons of one unit that can be ranked for one prompt and answer, in order of their records.

    Neuron i adds ``coefficient[i] * table.vectors[layer[i]][row[i]]`` to the residual stream
    ``stream[layer[i]]`` at the last position. Numbers are float64: importances are small differences of large
    logits.

    Attributes:
        table: The vectors.
        index: (n,), place of each neuron among all ``total`` neurons of the unit.
        layer: (n,), layer of each neuron.
        row: (n,), its row in the layer's vectors.
        position: (n,), its source position; 0 for FFN neurons.
        coefficient: m, or alpha * val for attention neurons, (n,).
        stream: x of Eq. 13, (layers, width): ``resid_mid`` for FFN, ``resid_pre`` for attention neurons.
        scale: s, the frozen scale, a scalar.
        answer: w, the answer's token id.
        total: Number of neurons of the unit for this prompt.
        seed: Seed for methods that draw random numbers.
    """

    table: VectorTable
    index: Tensor
    layer: Tensor
    row: Tensor
    position: Tensor
    coefficient: Tensor
    stream: Tensor
    scale: Tensor
    answer: int
    total: int
    seed: int

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Candidates:
        """Return the candidates at ``index``, in that order."""
        names = ("index", "layer", "row", "position", "coefficient")
        part = replace(self, **{name: getattr(self, name)[index] for name in names})
        # The stream depends on the prompt alone; a subset need not project it again.
        part.__dict__["log_probs"] = self.log_probs
        return part

    def records(self, index: Tensor) -> list[Neuron]:
        """Return the records of the candidates at ``index``, in that order."""
        layers, rows = self.layer[index].tolist(), self.row[index].tolist()
        if self.table.unit == "ffn":
            return [FFNNeuron(layer, row) for layer, row in zip(layers, rows, strict=True)]
        positions, head_dim = self.position[index].tolist(), self.table.head_dim
        return [
            AttentionNeuron(layer, row // head_dim, row % head_dim, position)
            for layer, row, position in zip(layers, rows, positions, strict=True)
        ]

    @cached_property
    def log_probs(self) -> Tensor:
        """Log p(t|x) of every token t, the log-softmax of bs(x) in every layer, (layers, vocabulary)."""
        return before_softmax(self.stream, self.scale, self.table.readout).log_softmax(-1)

    @cached_property
    def update(self) -> Tensor:
        """bs(m v) of each candidate, (n, vocabulary)."""
        shape = (len(self), len(self.table.readout.unembedding))
        logits = torch.empty(shape, dtype=torch.float64, device=self.stream.device)
        for layer in self.layer.unique().tolist():
            chosen = self.layer == layer
            logits[chosen] = self.table.unscaled_logits(layer, self.row[chosen])
        return logits * (self.coefficient / self.scale)[:, None]

    def of_vector(self, per_vector: Tensor) -> Tensor:
        """Return each candidate's entry of a (layers, rows) table, (n,)."""
        return per_vector[self.layer, self.row]

    @cached_property
    def tolerance(self) -> float:
        """How far float64 rounding can move a bound or an exact score, in nats.

        A dot product of n terms errs by at most n * eps * |a| |b|; the longest ones here run over the width
        and the vocabulary, and no entry of an update exceeds ``reach``. The factor 4 covers base and update,
        bound and score.
        """
        if len(self) == 0:
            return 0.0
        longest = (self.coefficient.abs() * self.of_vector(self.table.norms)).max()
        reach = float(longest / self.scale) * self.table.largest_readout
        return 4 * sum(self.table.readout.unembedding.shape) * torch.finfo(torch.float64).eps * (1 + reach)


def first_order(candidates: Candidates, log_probs: Tensor) -> Tensor:
    """Return ``<e_w - p, bs(m v)>``, the upper bound on the importance over a stream with probabilities p.

    One matrix-vector product per layer.

    Args:
        candidates: The neurons.
        log_probs: log p(t|x) per layer, (layers, vocabulary).

    Returns:
        (n,), in nats; never below :func:`log_prob_increase` but for ``candidates.tolerance``.
    """
    covector = -log_probs.exp()
    covector[:, candidates.answer] += 1
    gradient = pull_back(covector, candidates.scale, candidates.table.readout)
    slopes = [vectors.double() @ g for vectors, g in zip(candidates.table.vectors, gradient, strict=True)]
    return candidates.coefficient * candidates.of_vector(torch.stack(slopes))


def candidates_of(
    table: VectorTable, activations: Activations, prompt: int, length: int, *, answer: int, seed: int = 0
) -> Candidates:
    """Return every neuron of a unit for one prompt of a traced batch.

    Args:
        table: The unit's vectors.
        activations: Read at the last position.
        prompt: Row of the batch.
        length: Number of real tokens of that row; attention neurons exist at each of them.
        answer: The answer's token id.
        seed: Seed for methods that draw random numbers.
    """
    if table.unit == "ffn":
        coefficient = activations.coefficients[:, prompt, :, None].double()
        stream = activations.resid_mid[:, prompt]
    else:
        # c = alpha * val, ordered by (layer, head, dim, position) so that ties fall in that order.
        pattern = activations.pattern[:, prompt, :, :length].double()
        values = activations.values[:, prompt, :length].double()
        coefficient = torch.einsum("lhp,lphd->lhdp", pattern, values).flatten(1, 2)
        stream = activations.resid_pre[:, prompt]
    index, layer, row, position = table.places(tuple(coefficient.shape))
    return Candidates(
        table=table,
        index=index,
        layer=layer,
        row=row,
        position=position,
        coefficient=coefficient.flatten(),
        stream=stream.double(),
        scale=frozen_scale(activations.resid_final[prompt].double(), table.readout),
        answer=answer,
        total=len(index),
        seed=seed,
    )
