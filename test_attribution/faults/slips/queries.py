"""Slips on the query side: what value neurons read, and who writes it."""

from dataclasses import replace

import torch
from fault import CHAIN, QUERY, Faults

from attribution.records import AttentionNeuron

FAULTS = Faults()


def _attention(neurons, **fields):
    """Return neurons, with some fields of attention neurons replaced."""
    return [replace(each, **fields) if isinstance(each, AttentionNeuron) else each for each in neurons]


@FAULTS.patch("value neurons read the last position", "read_subkeys", claims=QUERY + CHAIN)
def _(original, components, neurons):
    return original(neurons=_attention(neurons, position=components.shape[1] - 1))


# How far a neuron reads is decided inside. Moving the components instead would also change which one is which.
FAULTS.edit(
    "value neurons read what their own layer writes",
    "read_subkeys",
    "2 * layer + 1\n",
    "2 * layer + 2\n",
    claims=QUERY,
)


@FAULTS.patch("the query side does not centre", "folded_subkeys", claims=QUERY)
def _(original):
    return original(centring=False)


@FAULTS.patch("the query side drops the norm's weight", "folded_subkeys", claims=QUERY + CHAIN)
def _(original, norm):
    return original(norm=norm and replace(norm, weight=None))


@FAULTS.patch("query neurons wake value neurons of their own layer", "query_neuron_scores", claims=QUERY)
def _(original, layers):
    return original(layers=[layer + 1 for layer in layers])[: max(layers, default=0)]


@FAULTS.patch("query neurons are not weighted by importance", "_query_side", claims=QUERY)
def _(original, value_neurons):
    neurons, importance = value_neurons
    return replace(original(value_neurons=(neurons, torch.ones_like(importance))), totals=original().totals)


@FAULTS.patch("the subkey is the subvalue", "ffn_subkeys", claims=QUERY)
def _(original, subkeys, subvalues):
    return original(subkeys=replace(subkeys, up=subvalues, up_bias=None))


@FAULTS.patch("all heads have the first one's subkeys", "read_subkeys", claims=QUERY + CHAIN)
def _(original, neurons):
    return original(neurons=_attention(neurons, head=0))


@FAULTS.patch("biases are not scaled as the stream is", "read_subkeys", claims=QUERY)
def _(original):
    found = original()
    return replace(found, terms=torch.cat([found.terms[:-1], found.terms[-1:] / found.scale]))
