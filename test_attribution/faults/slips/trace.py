"""Slips in what a trace reads, and in the edits that it makes."""

from dataclasses import replace

import torch
from fault import ABLATION, SCORES, UNDONE, VALUE, Faults
from torch.nn.functional import linear

from attribution.models.norms import normalise

FAULTS = Faults()

EDITING = ("rerun", "read_activations")


def _read_by_ffn(anatomy, seen):
    """Return what each layer's FFN reads, behind its norm."""
    streams = seen.resid_pre if anatomy.parallel else seen.resid_mid
    return [normalise(stream, own.input_norm) for stream, own in zip(streams, anatomy.ffn, strict=True)]


def _with(edits, change, kinds=("coefficients", "mixed_values", "sources")):
    """Return edits whose masks and fillers a function changes."""
    if edits is None:
        return None
    changed = {kind: {layer: change(*each) for layer, each in getattr(edits, kind).items()} for kind in kinds}
    return replace(edits, **changed)


def _filled(filler, tensor):
    """Return what a filler replaces a tensor with."""
    return (filler if isinstance(filler, torch.Tensor) else filler(tensor)).to(tensor)


@FAULTS.patch("coefficients are taken before the nonlinearity", "read_activations")
def _(original, model):
    seen, subkeys = original(), model.anatomy.subkeys
    read = _read_by_ffn(model.anatomy, seen)
    before = [linear(x, each.up, each.up_bias) for x, each in zip(read, subkeys, strict=True)]
    return replace(seen, coefficients=torch.stack(before))


@FAULTS.patch("coefficients are taken before the up product", "read_activations")
def _(original, model):
    seen, subkeys = original(), model.anatomy.subkeys
    if subkeys[0].gate is None:
        return seen
    read = _read_by_ffn(model.anatomy, seen)
    before = [each.activation(linear(x, each.gate, each.gate_bias)) for x, each in zip(read, subkeys, strict=True)]
    return replace(seen, coefficients=torch.stack(before))


@FAULTS.patch("the value bias is left out of the values", "read_activations")
def _(original, model):
    seen, anatomy = original(), model.anatomy
    biases = [anatomy.value_subkeys(layer)[1] for layer in range(anatomy.layers)]
    if biases[0] is None:
        return seen
    shape = (anatomy.layers, 1, 1, anatomy.heads, anatomy.head_dim)
    return replace(seen, values=seen.values - torch.stack(biases).view(shape))


@FAULTS.patch("the middle of a block is its beginning", "read_activations")
def _(original):
    seen = original()
    return replace(seen, resid_mid=seen.resid_pre)


@FAULTS.patch("the position before the last is read", "read_activations", claims=SCORES)
def _(original, batch, positions, logits):
    at_last = positions == "last" and not logits
    return original(batch=replace(batch, last=batch.last - 1)) if at_last else original()


@FAULTS.patch("a rerun reads the padding", "last_logits")
def _(original, batch):
    return original(batch=replace(batch, last=torch.full_like(batch.last, batch.ids.shape[1] - 1)))


@FAULTS.patch("edits never fire", *EDITING)
def _(original):
    return original(edits=None)


@FAULTS.patch("edits fire at the last position only", *EDITING)
def _(original, edits, batch):
    at_last = (torch.arange(batch.ids.shape[1]) == batch.last[:, None])[..., None]
    kinds = ("coefficients", "mixed_values")
    return original(edits=_with(edits, lambda mask, filler: (mask & at_last, filler), kinds))


@FAULTS.patch("edits fire in every row", *EDITING)
def _(original, edits):
    return original(edits=_with(edits, lambda mask, filler: (mask.any(0, keepdim=True), filler)))


@FAULTS.patch("edits add where they should replace", *EDITING)
def _(original, edits):
    return original(edits=_with(edits, lambda mask, filler: (mask, lambda x: x + _filled(filler, x))))


@FAULTS.patch("coefficients are edited one layer late", "rerun", claims=ABLATION + UNDONE)
def _(original, model, edits):
    if edits is None:
        return original()
    late = {layer + 1: each for layer, each in edits.coefficients.items() if layer + 1 < model.anatomy.layers}
    return original(edits=replace(edits, coefficients=late))


@FAULTS.patch("reruns leave attention alone", "rerun", claims=ABLATION + VALUE + UNDONE)
def _(original, edits):
    return original(edits=edits and replace(edits, mixed_values={}))


@FAULTS.patch("edits of one source position have the wrong sign", *EDITING)
def _(original, edits):
    kinds = ("sources",)
    return original(edits=_with(edits, lambda mask, filler: (mask, lambda x: 2 * x - _filled(filler, x)), kinds))


# The pattern is read inside the trace: no argument and no result holds it.
FAULTS.edit(
    "edits of one source position read another query's pattern", "_edit_sources", "[rows, :, last]", "[rows, :, 0]"
)
