"""What can be attributed and ablated: typed records, never joined strings.

Layers, heads, dimensions and positions count from 0. Records sort by their fields in order, which is the
order in which ties are broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from attribution.errors import BadInputError

__all__ = [
    "NEURON_UNITS",
    "SUBLAYERS",
    "UNITS",
    "AttentionNeuron",
    "Component",
    "FFNNeuron",
    "Head",
    "HeadPosition",
    "Layer",
    "Neuron",
    "SublayerKind",
    "Unit",
    "unit_named",
]

SublayerKind: TypeAlias = Literal["attention", "ffn"]


@dataclass(frozen=True, order=True)
class FFNNeuron:
    """One hidden unit of a feed-forward network: row ``index`` of the down projection of ``layer``."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"f{self.layer}-{self.index}"


@dataclass(frozen=True, order=True)
class AttentionNeuron:
    """One dimension of one head's value at one source position, as read by the last position.

    Scores differ by ``position``; the output-projection row that carries the neuron does not, so several
    attention neurons may share one (layer, head, dim).
    """

    layer: int
    head: int
    dim: int
    position: int

    def __str__(self) -> str:
        return f"a{self.layer}.{self.head}-{self.dim}@{self.position}"


@dataclass(frozen=True, order=True)
class Head:
    """One attention head."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"a{self.layer}.{self.head}"


@dataclass(frozen=True, order=True)
class HeadPosition:
    """What the last position takes of one source position through one attention head."""

    layer: int
    head: int
    position: int

    def __str__(self) -> str:
        return f"a{self.layer}.{self.head}@{self.position}"


@dataclass(frozen=True, order=True)
class Layer:
    """One attention or FFN layer."""

    layer: int
    kind: SublayerKind

    def __str__(self) -> str:
        return f"{self.kind[0]}{self.layer}"


Neuron: TypeAlias = FFNNeuron | AttentionNeuron
Component: TypeAlias = FFNNeuron | AttentionNeuron | Head | HeadPosition | Layer
"""Anything that can be attributed and ablated."""

Unit: TypeAlias = Literal["ffn", "attention", "neuron", "head", "head_position", "layer"]
UNITS: tuple[Unit, ...] = get_args(Unit)
"""What can be scored: FFN neurons, attention neurons, both together; heads, heads at one source position, layers."""

NEURON_UNITS: tuple[Unit, ...] = ("ffn", "attention", "neuron")

SUBLAYERS: dict[Unit, tuple[SublayerKind, ...]] = {
    "ffn": ("ffn",),
    "attention": ("attention",),
    "neuron": ("attention", "ffn"),
    "head": ("attention",),
    "head_position": ("attention",),
    "layer": ("attention", "ffn"),
}
"""The sublayers of a block that hold each unit, in forward order."""


def unit_named(name: str) -> Unit:
    """Return the unit of that name.

    Raises:
        BadInputError: If there is none.
    """
    for unit in UNITS:
        if unit == name:
            return unit
    raise BadInputError(f"unit {name!r} is unknown; use one of {', '.join(UNITS)}.")
