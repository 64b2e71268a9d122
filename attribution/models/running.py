"""Run a model under nnsight: one pass over its modules, or a function where its weights are."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attribution.errors import BadInputError, ModelError
from attribution.models.model import Model

T = TypeVar("T")

__all__ = ["TURN", "hooked", "run", "run_where_weights_are"]

TURN = RLock()
"""Held while a model runs, or while its modules are changed: threads take turns.

nnsight keeps part of what a trace knows for the whole process, and a hook acts on whatever runs through its module.
"""


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[[Any, tuple[Any, ...]], Any]]]) -> Iterator[None]:
    """Have functions change what enters modules, until the block ends.

    Args:
        hooks: Modules, each with a forward pre-hook.
    """
    with TURN, ExitStack() as ends:
        for module, hook in hooks:
            ends.callback(module.register_forward_pre_hook(hook).remove)
        yield


def run_where_weights_are(model: Model, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Run a function where the model's weights are, and return its result.

    Elsewhere, it runs as one nnsight session, with all traces that it opens. Its code and that of everything it calls
    goes there with its arguments; activations and weights stay there, and its result comes back. So that this is
    small, a function should rank, measure and add up all it can.

    Args:
        model: A loaded model.
        work: A function of the model as it is there and of the arguments. What it returns is made of numbers, strings,
            tensors, this package's dataclasses, and lists, tuples and dictionaries of these.
        arguments: Handed to ``work``.
        options: Handed to ``work`` by name.

    Raises:
        ModelError: If the machine that holds the weights fails.
        torch.OutOfMemoryError: If it fails for want of memory.
    """
    if not model.remote:
        return work(model, *arguments, **options)
    import nnsight
    from nnsight.intervention.backends.remote import RemoteError

    _make_portable()
    here = model.where_weights_are
    try:
        with TURN, model.network.session(remote=model.remote):
            packed = nnsight.save(_packed(work(here, *arguments, **options)))
    except RemoteError as error:
        reason = " ".join(str(error).split())
        if "out of memory" in reason:
            raise torch.OutOfMemoryError(reason) from None
        raise ModelError(
            f"model {model.name!r} could not be asked where its weights are ({reason}); see that this machine serves "
            "it, or load the model here with remote=False."
        ) from None
    found: T = _unpacked(packed)
    return found


def _make_portable() -> None:
    """Have nnsight send this package's own code along, since the other side has not installed it."""
    import nnsight

    nnsight.register(__name__.partition(".")[0])
    # Before Python 3.12 it holds a lock, which cannot be sent.
    # Each side has a lock of its own.
    copyreg.pickle(type(TURN), lambda _: (RLock, ()))
    copyreg.pickle(cached_property, lambda each: (_cached_property, (each.func, each.attrname)))


def _cached_property(function: Callable[[Any], Any], name: str) -> cached_property[Any]:
    found = cached_property(function)
    found.__set_name__(object, name)
    return found


def _packed(value: Any) -> Any:
    """Return a result as plain containers: the other side has no classes of ours that it could name."""
    if is_dataclass(value):
        kind = type(value)
        return {
            "class": (kind.__module__, kind.__qualname__),
            "fields": {each.name: _packed(getattr(value, each.name)) for each in fields(value)},
        }
    if isinstance(value, Enum):
        return {"class": (type(value).__module__, type(value).__qualname__), "fields": {"value": value.value}}
    if isinstance(value, dict):
        return {"items": [(_packed(key), _packed(each)) for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [isinstance(value, tuple), *(_packed(each) for each in value)]
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _unpacked(value: Any) -> Any:
    """Return what :func:`_packed` was given."""
    if isinstance(value, list):
        as_tuple, *rest = value
        found = [_unpacked(each) for each in rest]
        return tuple(found) if as_tuple else found
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {_unpacked(key): _unpacked(each) for key, each in value["items"]}
    module, name = value["class"]
    own = module.startswith(__name__.partition(".")[0] + ".")
    kind = getattr(sys.modules.get(module), name, None) if own else None
    if not (isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, Enum))):
        raise ModelError(
            f"the machine that holds the weights answered with {module}.{name}, which is no record of this package; "
            "name only servers that you trust."
        )
    return kind(**{key: _unpacked(each) for key, each in value["fields"].items()})


def run(
    model: Model, inputs: Mapping[str, Any], visit: Callable[[Any, dict[str, Any]], None], *, whole: bool = True
) -> dict[str, Any]:
    """Run a batch once, visiting its modules.

    Args:
        model: A loaded model.
        inputs: Keyword arguments of the model, such as right-padded tokens and their mask.
        visit: Given the traced network and a dictionary; what it puts there outlives the trace. It must visit
            modules in forward order.
        whole: Run to the end; otherwise the model stops behind the last module visited.

    Returns:
        The dictionary.
    """
    import nnsight

    if model.remote:
        raise BadInputError(
            f"model {model.name!r} has its weights elsewhere (remote={model.remote!r}), and this needs them here; "
            "attribute, query, ablate or evaluate work there, or load the model with remote=False."
        )
    network = model.network
    saved: dict[str, Any] = {}
    with TURN, network.trace(dict(inputs)) as tracer:
        saved = nnsight.save({})
        visit(network, saved)
        if not whole:
            tracer.stop()
    return saved
