"""Slips in how a model's weights are read."""

from dataclasses import replace

from fault import Faults
from transformers.pytorch_utils import Conv1D

FAULTS = Faults()


def _transposed(weights):
    return [each.T for each in weights]


def _with_transposed_vectors(sublayers):
    return tuple(replace(own, read_vectors=lambda own=own: own.vectors.T) for own in sublayers)


@FAULTS.patch("attention's output projection is transposed", "read_anatomy")
def _(original):
    anatomy = original()
    return replace(anatomy, attention=_with_transposed_vectors(anatomy.attention))


@FAULTS.patch("Conv1D is read as Linear", "read_anatomy")
def _(original, module):
    anatomy = original()
    if not any(isinstance(each, Conv1D) for each in module.modules()):
        return anatomy
    return replace(
        anatomy,
        subkeys=[replace(each, up=each.up.T) for each in anatomy.subkeys],
        ffn=_with_transposed_vectors(anatomy.ffn),
        value_weights=_transposed(anatomy.value_weights),
        attention=_with_transposed_vectors(anatomy.attention),
    )


@FAULTS.patch("heads share keys and values in turn", "read_anatomy")
def _(original):
    anatomy = original()
    rows = anatomy.value_rows.view(anatomy.kv_heads, -1, anatomy.head_dim)
    return replace(anatomy, value_rows=rows.transpose(0, 1).flatten())


@FAULTS.patch("queries are read as values", "read_anatomy")
def _(original):
    anatomy = original()
    return replace(anatomy, value_rows=anatomy.value_rows - anatomy.value_rows.min())


@FAULTS.patch("heads are split by dimensions first", "Anatomy.split_values")
def _(original, self):
    return original().flatten(-2).unflatten(-1, (self.head_dim, self.heads)).transpose(-1, -2)


@FAULTS.patch("the FFN's bias is forgotten", "read_anatomy")
def _(original):
    anatomy = original()
    return replace(anatomy, ffn=tuple(replace(own, bias=None) for own in anatomy.ffn))


@FAULTS.patch("the value bias is forgotten", "read_anatomy")
def _(original):
    anatomy = original()
    return replace(anatomy, value_biases=(None,) * anatomy.layers)


@FAULTS.patch("norms never centre", "family_of")
def _(original):
    return replace(original(), centred=False)


@FAULTS.patch("norms always centre", "family_of")
def _(original):
    return replace(original(), centred=True)


@FAULTS.patch("every norm has the same epsilon", "frozen_scale")
def _(original, norm):
    return original(norm=replace(norm, eps=1e-6))


@FAULTS.patch("gate and up projection are swapped", "read_anatomy")
def _(original):
    anatomy = original()
    swapped = [each if each.gate is None else replace(each, up=each.gate, gate=each.up) for each in anatomy.subkeys]
    return replace(anatomy, subkeys=swapped)


@FAULTS.patch("blocks are taken to be parallel", "read_anatomy")
def _(original):
    return replace(original(), parallel=True)
