"""The figures that the authors' notebooks printed, as data, and what is not compared with them, with reasons."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeAlias

from attribution.records import AttentionNeuron, FFNNeuron, Head
from attribution.resources import fixtures_folder

__all__ = ["NOT_COMPARED", "SECTIONS", "Figures", "attention_neuron_of", "ffn_neuron_of", "figures_of", "head_of"]

Figures: TypeAlias = dict[str, Any]
"""One model's figures, or one section of them."""

SECTIONS = (
    "prediction",
    "layers",
    "heads",
    "head_by_position",
    "attention_weights",
    "ffn_value_neurons",
    "attention_value_neurons",
    "query_layers_of_ffn_neurons",
    "query_layers_of_attention_neurons",
    "query_neurons",
    "counts_by_layer",
    "query_neurons_of_one_neuron",
    "neuron_through_head",
)
"""The parts of a notebook whose figures are compared, in the order of its cells."""

_WHERE = "says where it was printed"
_HOW = "says how it was computed or printed; it is recomputed in the same way"
_WHAT = "names what was computed; the same is recomputed"

NOT_COMPARED = {
    "source": _WHERE,
    "conventions": "explains the file",
    "notebook": _WHERE,
    "cell": _WHERE,
    "cells": _WHERE,
    "printed_by_cell": _WHERE,
    "remark": "says what is odd in the figures beside it",
    "last_order": _HOW,
    "leading_space": _HOW,
    "decimals": _HOW,
    "mean_layer_decimals": _HOW,
    "rounded_before_sorting": _HOW,
    "subkey": _HOW,
    "multiplier_rank": _HOW,
    "sentence": _WHAT,
    "head": _WHAT,
    "ffn_neuron": _WHAT,
    "attention_neuron": _WHAT,
    "value_neurons": _WHAT,
    "query_neurons": _WHAT,
    "value_neurons_of_query": _WHAT,
    "causal": "says that the weights above the diagonal are zero; only the last row, which has none, was kept",
}
"""Keys of the file that no figure stands under, with the reason. Everything else is compared."""


@cache
def _notebooks() -> dict[str, Figures]:
    text = (fixtures_folder("paper") / "notebooks.json").read_text(encoding="utf-8")
    notebooks: dict[str, Figures] = json.loads(text)
    return notebooks


def figures_of(model: str) -> Figures:
    """Return what the notebook about one of the paper's models printed, by the model's registered name."""
    return _notebooks()[model]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("_")]


def ffn_neuron_of(text: str) -> FFNNeuron:
    """Return the neuron that the notebooks write as ``layer_index``."""
    layer, index = _numbers(text)
    return FFNNeuron(layer, index)


def attention_neuron_of(text: str) -> AttentionNeuron:
    """Return the neuron that the notebooks write as ``layer_head_dimension_position``."""
    layer, head, dim, position = _numbers(text)
    return AttentionNeuron(layer, head, dim, position)


def head_of(text: str) -> Head:
    """Return the head that the notebooks write as ``layer_head``."""
    layer, head = _numbers(text)
    return Head(layer, head)
