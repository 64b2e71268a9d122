"""Copies of a model whose weights are edited for the length of a block."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from attribution.engine.masks import ablation_masks
from attribution.errors import BadInputError
from attribution.models.anatomy import read_anatomy
from attribution.models.model import Model
from attribution.models.opening import wrap
from attribution.models.running import TURN
from attribution.records import Component, SublayerKind

__all__ = ["edited_copy", "zeroed_parameters"]


@contextmanager
def edited_copy(model: Model, edited: Collection[Tensor]) -> Iterator[Model]:
    """Give a copy of a model whose named weights are its own, to be edited through the views that its anatomy holds.

    The copy shares every other tensor with the original, which is not touched. On leaving the block, also by an
    exception, the copy's weights are the original's again, so that no reference to it carries an edit on.

    Args:
        model: A loaded model.
        edited: What is to be edited, as the model's anatomy has it: weights, or views of them.

    Yields:
        The copy, with its own network and anatomy.

    Raises:
        BadInputError: If the weights are not here, whole and on one device.
    """
    if model.remote or model.anatomy.spread:
        raise BadInputError(
            f"the weights of model {model.name!r} are to be edited, and they are elsewhere or spread over devices or "
            "processes; load it here on one device."
        )
    module = model.network._module
    stored = {tensor.untyped_storage().data_ptr() for tensor in edited}
    # What the memo names is not copied.
    shared = {
        id(tensor): tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.untyped_storage().data_ptr() not in stored
    }
    with TURN:
        twin = copy.deepcopy(module, shared)
    other = replace(model, network=wrap(twin, model.tokenizer), anatomy=read_anatomy(twin, model.name))
    try:
        yield other
    finally:
        for own, original in zip(twin.parameters(), module.parameters(), strict=True):
            if own is not original:
                own.detach().copy_(original)
        other.anatomy.forget()


@contextmanager
def zeroed_parameters(model: Model, neurons: Collection[Component]) -> Iterator[Model]:
    """Give a model whose value vectors are zero for some components: the paper's way of switching them off.

    The vectors are rows of the down projection and of the attention's output projection; biases stay. The model is a
    copy, see :func:`edited_copy`.

    Args:
        model: A loaded model.
        neurons: What to switch off. An attention neuron is its (layer, head, dim); what is ablated at one source
            position has no parameters of its own.

    Yields:
        The edited model, with its own network and anatomy.

    Raises:
        BadInputError: If a record cannot be ablated by parameters.
    """
    anatomy = model.anatomy
    masks = ablation_masks([neurons], anatomy)
    by_kind: dict[SublayerKind, Tensor] = {"attention": masks.attention, "ffn": masks.ffn}
    chosen: list[tuple[SublayerKind, int, Tensor]] = [
        (kind, layer, mask[layer, 0].flatten())
        for kind, mask in by_kind.items()
        for layer in range(anatomy.layers)
        if mask[layer].any()
    ]

    with edited_copy(model, [anatomy.sublayer(layer, kind).vectors for kind, layer, _ in chosen]) as other:
        for kind, layer, mask in chosen:
            other.anatomy.sublayer(layer, kind).vectors[mask.to(model.device)] = 0
        yield other
