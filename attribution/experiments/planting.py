"""Planted truth: neurons of a copy that are made to read what one asks for and to write towards an answer.

What a model's own neurons do is what attribution is asked; no one knows it beforehand. What was planted is known. The
functions below say what to plant, from what a model reads naturally; :func:`planted` plants it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.engine.decomposition import rounding
from attribution.engine.masks import ablation_masks
from attribution.engine.projection import pull_back
from attribution.engine.subkeys import folded_subkeys
from attribution.errors import BadInputError
from attribution.experiments.edited_copies import edited_copy
from attribution.models.anatomy import Anatomy, Readout
from attribution.models.model import Model
from attribution.models.norms import Norm
from attribution.records import AttentionNeuron, FFNNeuron, Neuron

__all__ = [
    "Plant",
    "answer_direction",
    "displaced",
    "firing_subkeys",
    "planted",
    "quiet_subkeys",
    "vector_along",
]

# Directions that a model does not use at all have no energy to be divided by: this share of the mean is added.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Plant:
    """One neuron with what it is to read and to write.

    Attributes:
        neuron: Which one; an attention neuron is its (layer, head, dim), whatever its position.
        subkey: What it reads behind the norm, (width,): its row of the up projection, of a gated FFN that of the gate
            as well, or its row of the value projection.
        vector: Its value vector, (width,).
    """

    neuron: Neuron
    subkey: Tensor
    vector: Tensor


def _value_row(anatomy: Anatomy, neuron: AttentionNeuron) -> int:
    return int(anatomy.value_rows[neuron.head * anatomy.head_dim + neuron.dim])


def displaced(anatomy: Anatomy, neurons: Iterable[Neuron]) -> list[Neuron]:
    """Return the neurons that planting takes the place of, each once.

    Those are the planted ones and, under grouped queries, the same dimension of the other heads that share a row of
    the value projection: they would read what was planted too, so that what they write is set to zero.
    """
    found: dict[Neuron, None] = {}
    for neuron in neurons:
        if isinstance(neuron, FFNNeuron):
            found[neuron] = None
            continue
        same = (anatomy.value_rows == _value_row(anatomy, neuron)).nonzero().flatten()
        for head, dim in (divmod(place, anatomy.head_dim) for place in same.tolist()):
            found[AttentionNeuron(neuron.layer, head, dim, neuron.position)] = None
    return list(found)


def _check(anatomy: Anatomy, plants: Sequence[Plant]) -> None:
    """Raise unless every plant lies inside the model, has the model's width and has its place for itself."""
    neurons = [plant.neuron for plant in plants]
    for neuron in neurons:
        if not isinstance(neuron, FFNNeuron | AttentionNeuron):
            raise BadInputError(f"{neuron!r} cannot be planted; pass FFNNeuron or AttentionNeuron records.")
    ablation_masks([neurons], anatomy)
    indices: set[tuple[int, str, int]] = set()
    for plant in plants:
        neuron = plant.neuron
        for name, tensor in (("subkey", plant.subkey), ("vector", plant.vector)):
            if tensor.shape != (anatomy.width,):
                raise BadInputError(
                    f"the {name} planted in {neuron!r} has shape {tuple(tensor.shape)}; give ({anatomy.width},), the "
                    "model's width."
                )
        row = neuron.index if isinstance(neuron, FFNNeuron) else _value_row(anatomy, neuron)
        place = (neuron.layer, type(neuron).__name__, row)
        if place in indices:
            raise BadInputError(
                f"{neuron!r} shares its subkey with another planted neuron; plant each row of a projection once."
            )
        indices.add(place)


@contextmanager
def planted(model: Model, plants: Sequence[Plant]) -> Iterator[Model]:
    """Give a model in which some neurons read and write what was planted in them, and nothing else is changed.

    A planted neuron's biases are set to zero, so that it fires by its subkey alone: ``m = act(k . x)``, of a gated FFN
    ``m = act(k . x) (k . x)``, of attention ``val = k . x``, with x behind the norm. The model is a copy that shares
    every other tensor with the original, see :func:`attribution.experiments.edited_copies.edited_copy`.

    Args:
        model: A loaded model.
        plants: What to plant.

    Yields:
        The edited model, with its own network and anatomy.

    Raises:
        BadInputError: If a neuron lies outside the model, a tensor has a wrong shape, or two plants share a row.
    """
    _check(model.anatomy, plants)
    edited: list[Tensor | None] = []
    for layer, ffn in {(plant.neuron.layer, isinstance(plant.neuron, FFNNeuron)) for plant in plants}:
        edited += _ffn_weights(model.anatomy, layer) if ffn else _attention_weights(model.anatomy, layer)
    with edited_copy(model, [weight for weight in edited if weight is not None]) as copy:
        for plant in plants:
            if isinstance(plant.neuron, FFNNeuron):
                _plant_ffn(copy.anatomy, plant.neuron, plant)
            else:
                _plant_attention(copy.anatomy, plant.neuron, plant)
        yield copy


def _ffn_weights(anatomy: Anatomy, layer: int) -> list[Tensor | None]:
    subkeys = anatomy.subkeys[layer]
    return [subkeys.up, subkeys.up_bias, subkeys.gate, subkeys.gate_bias, anatomy.sublayer(layer, "ffn").vectors]


def _attention_weights(anatomy: Anatomy, layer: int) -> list[Tensor | None]:
    return [anatomy.value_weights[layer], anatomy.value_biases[layer], anatomy.sublayer(layer, "attention").vectors]


def _plant_ffn(anatomy: Anatomy, neuron: FFNNeuron, plant: Plant) -> None:
    subkeys = anatomy.subkeys[neuron.layer]
    for rows, bias in ((subkeys.up, subkeys.up_bias), (subkeys.gate, subkeys.gate_bias)):
        if rows is not None:
            rows[neuron.index] = plant.subkey.to(rows)
        if bias is not None:
            bias[neuron.index] = 0
    vectors = anatomy.sublayer(neuron.layer, "ffn").vectors
    vectors[neuron.index] = plant.vector.to(vectors)


def _plant_attention(anatomy: Anatomy, neuron: AttentionNeuron, plant: Plant) -> None:
    row, rows, bias = _value_row(anatomy, neuron), anatomy.value_weights[neuron.layer], anatomy.value_biases
    rows[row] = plant.subkey.to(rows)
    own = bias[neuron.layer]
    if own is not None:
        own[row] = 0
    vectors = anatomy.sublayer(neuron.layer, "attention").vectors
    vectors[anatomy.value_rows == row] = 0
    vectors[neuron.head * anatomy.head_dim + neuron.dim] = plant.vector.to(vectors)


def answer_direction(readout: Readout, token: int) -> Tensor:
    """Return the direction of the residual stream that raises one token's logit most against the mean of all.

    Args:
        readout: The final norm and unembedding.
        token: The token's id.

    Returns:
        The pull-back of ``e_w - 1/V`` through unembedding and frozen norm, of length 1, (width,), float64.
    """
    vocabulary, device = len(readout.unembedding), readout.unembedding.device
    covector = torch.full((vocabulary,), -1 / vocabulary, dtype=torch.float64, device=device)
    covector[token] += 1
    pulled: Tensor = pull_back(covector, torch.ones((), dtype=torch.float64, device=device), readout)
    direction: Tensor = pulled / pulled.norm()
    return direction


def vector_along(direction: Tensor, post_weight: Tensor | None) -> Tensor:
    """Return the value vector whose output ``post_weight * vector`` has length 1 and goes along a direction.

    Of all vectors of a length, ``post_weight * direction`` writes most along the direction. Dividing by the weight
    instead would hit it exactly, but blow up where an entry of the weight is small.

    Args:
        direction: (width,).
        post_weight: What a vector is multiplied by on its way to the residual stream, (width,), or ``None`` for ones.
    """
    along = torch.ones_like(direction) if post_weight is None else post_weight.to(direction)
    vector: Tensor = along * direction / (along.square() * direction).norm()
    return vector


def firing_subkeys(inputs: Tensor, fires: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the shortest subkeys with which neurons fire where they should.

    Prompts that read the same but for rounding, such as one token at one place of the first layer, count as reading the
    same: subkeys that told them apart would be as long as rounding is small. Rounding changes no singular value of the
    inputs by more than its relative size times their Frobenius norm, which is at most sqrt(rank) of the largest one.

    Args:
        inputs: What is read behind the norm, at one place of each prompt, (n, width), float64.
        fires: The inner product that each neuron's subkey should have with each input, such as 0 and 1, (n, neurons).
        dtype: What the model computes in.

    Returns:
        (neurons, width). Where prompts outnumber what can be told apart, the least squares.
    """
    tolerance = rounding(dtype, 0) * min(inputs.shape) ** 0.5
    subkeys: Tensor = (torch.linalg.pinv(inputs, rtol=tolerance) @ fires.to(inputs)).T
    return subkeys


def quiet_subkeys(second_moment: Tensor, norm: Norm | None, number: int) -> Tensor:
    """Return subkeys that hear what is written for them, and little else.

    A subkey k reads the stream through k', see :func:`attribution.engine.subkeys.folded_subkeys`; writing along k'
    raises what it reads by |k'| for each unit of length. The subkeys returned have the largest ``|k'|^2`` for the
    energy ``k C k`` that they read anyway, C the second moment of what is there. What is written for one of them is not
    read by another: their k' are orthogonal.

    Args:
        second_moment: C, mean of x x^T over tokens, x behind the norm, (width, width), float64.
        norm: The norm before the projection, or ``None``.
        number: How many.

    Returns:
        (number, width), each of length 1.
    """
    width = len(second_moment)
    one = torch.eye(width, dtype=second_moment.dtype, device=second_moment.device)
    folded = folded_subkeys(one, norm)
    root = torch.linalg.cholesky(second_moment + _RIDGE * second_moment.trace() / width * one)
    white = torch.linalg.solve_triangular(root, folded, upper=False)
    _, axes = torch.linalg.eigh(white @ white.T)
    subkeys: Tensor = torch.linalg.solve_triangular(root.T, axes.flip(-1)[:, :number], upper=True).T
    return torch.nn.functional.normalize(subkeys, dim=-1)
