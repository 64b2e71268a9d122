"""What can be attributed and ablated: typed records, never joined strings.

Layers, heads, dimensions and positions count from 0. Records sort by their fields in order, which is the
order in which ties are broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["AttentionNeuron", "FFNNeuron", "Head", "Layer", "Neuron"]


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
class Layer:
    """One attention or FFN layer."""

    layer: int
    kind: Literal["attention", "ffn"]

    def __str__(self) -> str:
        return f"{self.kind[0]}{self.layer}"


Neuron: TypeAlias = FFNNeuron | AttentionNeuron
