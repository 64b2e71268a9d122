"""Open a model under nnsight, run it, read its activations and edit them: one trace per batch.

The only module that imports nnsight; others hand :func:`run` a function that visits modules. Modules are visited in
forward order, which nnsight requires. What is computed from activations is handed to :func:`on_site`, which runs it
where the weights are.
"""

from __future__ import annotations

import copyreg
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from attribution.anatomy import Anatomy, first_tensor, resolve
from attribution.errors import BadInputError, ModelError
from attribution.norms import frozen_scale
from attribution.tokens import TokenBatch

if TYPE_CHECKING:
    from attribution.model import Model

__all__ = [
    "SPREAD",
    "Activations",
    "Edits",
    "Filler",
    "PlainRun",
    "apply_edits",
    "last_logits",
    "on_site",
    "open_elsewhere",
    "open_network",
    "read_activations",
    "rerun",
    "run",
    "run_plainly",
    "skip_blocks",
    "wrap",
]

T = TypeVar("T")

Filler: TypeAlias = Tensor | Callable[[Tensor], Tensor]
"""What a tensor's numbers are replaced with, or a function of the tensor that says so, such as other rows of it."""

Replacement: TypeAlias = tuple[Tensor, Filler]
"""A boolean mask of what is replaced, and what with; both broadcast to the tensor that is edited."""


@dataclass(frozen=True)
class Activations:
    """What one forward pass says about every neuron.

    Shapes are for L layers, B prompts, P padded positions, D width, H heads, N FFN neurons per layer and V
    tokens. With ``positions="last"`` everything but ``values`` is read at the last real token; with
    ``positions="all"`` every query position is kept, as an axis Q (= P) after the batch axis.

    What a sublayer writes is taken as it enters the residual stream, behind its output projection and bias, the
    family's constant and the norm that follows, if any.

    Attributes:
        resid_pre: h^{l-1}, the residual stream before the block, (L, B, [Q,] D).
        attention_output: A^l, what attention writes, (L, B, [Q,] D).
        resid_mid: r^l = h^{l-1} + A^l, (L, B, [Q,] D). In parallel blocks, whose FFN does not read it, as well.
        ffn_output: F^l, what the FFN writes, (L, B, [Q,] D).
        resid_post: h^l, after the block, (L, B, [Q,] D).
        coefficients: m^l, the input of the down projection, (L, B, [Q,] N).
        pattern: alpha, attention weights of the query position over source positions, (L, B, H, [Q,] P).
        values: val, each head's values at every source position, bias included, (L, B, P, H, head_dim).
        attention_gain: 1 / s of the norm after the attention, 1 where there is none, (L, B, [Q]).
        ffn_gain: The same for the FFN.
        resid_final: h^{L-1} as it enters the final norm, (B, [Q,] D).
        logits: The model's own logits, (B, [Q,] V); ``None`` where the trace stopped before them.
    """

    resid_pre: Tensor
    attention_output: Tensor
    resid_mid: Tensor
    ffn_output: Tensor
    resid_post: Tensor
    coefficients: Tensor
    pattern: Tensor
    values: Tensor
    attention_gain: Tensor
    ffn_gain: Tensor
    resid_final: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Edits:
    """What a rerun replaces, by layer; layers that are not named run untouched.

    Attributes:
        coefficients: FFN coefficients, (B, P, N).
        mixed_values: Attention values as mixed by the pattern, the input of the output projection, (B, P, H * dh).
        sources: What the last real position of each row takes of each attention neuron, alpha * val,
            (B, H, dh, P); later layers see the change, other query positions do not.
    """

    coefficients: Mapping[int, Replacement] = field(default_factory=dict)
    mixed_values: Mapping[int, Replacement] = field(default_factory=dict)
    sources: Mapping[int, Replacement] = field(default_factory=dict)

    def first(self, layers: int) -> int:
        """Return the first layer that is edited; the number of layers if none is."""
        return min([*self.coefficients, *self.mixed_values, *self.sources], default=layers)


SPREAD = ("auto", "tensor_parallel")
"""Devices that are several: all that this process has, or one of each process."""


def open_elsewhere(repo: str, *, revision: str | None) -> Any:
    """Return a model of the hub under nnsight, with its config and tokenizer but without weights."""
    from nnsight import TransformersModel

    return TransformersModel(
        repo, revision=revision, task="text-generation", attn_implementation="eager", trust_remote_code=False
    )


def _placement(device: str | torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that spread the weights; none for a single device.

    Raises:
        ModelError: If no other process is there.
    """
    if device == "auto":
        return {"device_map": "auto"}
    if device == "tensor_parallel":
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise ModelError(
                "device 'tensor_parallel' needs the processes that torchrun starts, and this one is alone; run it "
                "under 'torchrun --nproc-per-node=N', or use another device."
            )
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan="auto")}
    return {}


def open_network(folder: Path, *, dtype: torch.dtype, device: str | torch.device, pickled: bool = False) -> Any:
    """Load a causal language model under nnsight, with attention weights visible and gradients off.

    No code from the model's repository is run.

    Args:
        folder: The model's files.
        dtype: Type of the weights.
        device: Where they go: a device, or one of :data:`SPREAD`.
        pickled: Read pickled weights; otherwise only safetensors.

    Raises:
        ModelError: If weights are missing, which transformers would fill with random numbers, or do not fit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.encode("a"):
        # transformers makes an empty GPT-2 tokenizer of a folder that has none.
        raise ModelError(f"model {str(folder)!r} has no tokenizer; put its tokenizer.json beside the weights.")
    # Reading a folder is short: its bar would only stand in the way of the answer.
    silence = logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            # Fused attention kernels do not return attention weights; "eager" does.
            attn_implementation="eager",
            use_safetensors=not pickled,
            output_loading_info=True,
            trust_remote_code=False,
            **_placement(device),
        )
    finally:
        if silence:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"model {str(folder)!r} lacks {len(names)} weights, such as {names[0]}; download it again or train it "
            "whole."
        )
    on_disk = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if on_disk:
        raise ModelError(
            f"model {str(folder)!r} does not fit: {len(on_disk)} weights, such as {on_disk[0]}, would stay on disk, "
            "where they cannot be read; use a narrower dtype, or machines with more memory."
        )
    module.requires_grad_(requires_grad=False)
    return wrap(module if device in SPREAD else module.to(device), tokenizer)


def wrap(module: Any, tokenizer: Any) -> Any:
    """Return a module of transformers under nnsight."""
    from nnsight import TransformersModel

    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def on_site(model: Model, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
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
    here = model.on_site
    try:
        with model.network.session(remote=model.remote):
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
    model: Model, batch: TokenBatch, visit: Callable[[Any, dict[str, Any]], None], *, whole: bool = True
) -> dict[str, Any]:
    """Run a batch once, visiting its modules.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
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
    with network.trace(batch.inputs()) as tracer:
        saved = nnsight.save({})
        visit(network, saved)
        if not whole:
            tracer.stop()
    return saved


def _replace(tensor: Tensor, replacement: Replacement) -> Tensor:
    mask, filler = replacement
    value = filler if isinstance(filler, Tensor) else filler(tensor)
    return torch.where(mask.to(tensor.device), value.to(tensor), tensor)


def _edit_input(projection: Any, replacement: Replacement, batch: TokenBatch) -> None:
    entered = projection.input
    # Some families flatten batch and position before the FFN.
    shaped = entered.reshape(*batch.ids.shape, -1)
    projection.input = _replace(shaped, replacement).reshape(entered.shape)


def _all_heads(pattern: Tensor, anatomy: Anatomy) -> Tensor:
    """Return the attention weights of all heads, (B, heads, Q, P): tensor parallelism leaves each process its own."""
    if pattern.shape[1] == anatomy.heads:
        return pattern
    import torch.distributed as dist

    parts = [torch.empty_like(pattern, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, pattern.contiguous())
    return torch.cat(parts, dim=1)


def _edit_sources(
    attention: Any, layer: int, values: Tensor, replacement: Replacement, anatomy: Anatomy, batch: TokenBatch
) -> Tensor:
    """Replace what the last position takes of attention neurons; return the change of the projection's output."""
    output = attention.output
    last = batch.last.to(output[0].device)
    rows = torch.arange(len(last), device=last.device)
    pattern = _all_heads(output[1], anatomy)
    taken = torch.einsum("bhp,bphd->bhdp", pattern[rows, :, last], values)
    moved = (_replace(taken, replacement) - taken).sum(-1).flatten(1) @ anatomy.value_vectors[layer].to(last.device)
    change = torch.zeros_like(output[0])
    change[rows, last] = moved
    attention.output = (output[0] + change, *output[1:])
    return change


def apply_edits(block: Any, layer: int, edits: Edits, anatomy: Anatomy, batch: TokenBatch) -> None:
    """Edit one block of a traced network, inside a trace."""
    family = anatomy.family
    values = None
    if layer in edits.sources:
        values = anatomy.split_values(resolve(block, family.value_projection).output)
    if layer in edits.mixed_values:
        _edit_input(resolve(block, family.attention_out), edits.mixed_values[layer], batch)
    if values is not None:
        _edit_sources(resolve(block, family.attention), layer, values, edits.sources[layer], anatomy, batch)
    if layer in edits.coefficients:
        _edit_input(resolve(block, family.ffn_out), edits.coefficients[layer], batch)


@dataclass(frozen=True)
class PlainRun:
    """What the blocks of a model return for some prompts when nothing is edited: where a rerun may begin.

    Attributes:
        outputs: By layer: a tensor, (prompts, P, D), or a tuple that starts with one, by family.
        logits: At each prompt's last real token, (prompts, vocabulary).
    """

    outputs: list[Any]
    logits: Tensor


def run_plainly(model: Model, batch: TokenBatch) -> PlainRun:
    """Run a batch without edits, and keep what its blocks return."""

    def visit(network: Any, saved: dict[str, Any]) -> None:
        saved["outputs"] = [_detached(block.output) for block in model.anatomy.blocks(network)]
        saved["logits"] = last_logits(network, model.anatomy, batch).detach()

    return PlainRun(**run(model, batch, visit))


def _detached(output: Any) -> Any:
    # Always a copy: some families go on to change it in place.
    if isinstance(output, Tensor):
        return output.detach().clone()
    return (output[0].detach().clone(), *output[1:])


def skip_blocks(network: Any, anatomy: Anatomy, outputs: Sequence[Any], rows: Tensor, width: int) -> None:
    """Give the first blocks the outputs of an earlier run instead of running them, inside a trace.

    Args:
        network: The traced network.
        anatomy: The model's anatomy.
        outputs: From :func:`run_plainly`, one for each block that is skipped.
        rows: For each row of this batch, its row of the earlier one, (batch,).
        width: Positions of this batch, no more than those of the earlier one.
    """
    for block, output in zip(anatomy.blocks(network), outputs, strict=False):
        whole = isinstance(output, Tensor)
        kept = (output if whole else output[0])[rows, :width]
        block.skip(kept if whole else (kept, *output[1:]))


def last_logits(network: Any, anatomy: Anatomy, batch: TokenBatch) -> Tensor:
    """Return the logits after each row's last real token, (batch, vocabulary), inside a trace.

    The unembedding runs at these positions alone: up to half of the time of a short prompt would go to the others.
    """
    unembedding = resolve(network, anatomy.family.unembedding)
    rows = torch.arange(len(batch.last), device=batch.last.device)
    if isinstance(unembedding.input, DTensor):
        # Under tensor parallelism it cannot be cut to some positions: the logits are.
        whole: Tensor = network.output.logits[rows, batch.last]
        return whole
    unembedding.input = unembedding.input[rows, batch.last][:, None]
    logits: Tensor = network.output.logits[:, 0]
    return logits


def rerun(
    model: Model, batch: TokenBatch, edits: Edits | None = None, *, plain: tuple[PlainRun, Tensor] | None = None
) -> Tensor:
    """Run a batch with edits and return the logits after it.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
        edits: What to replace; nothing when ``None``.
        plain: A run of the same prompts without edits, and the row in it of each of this batch, (batch,): blocks below
            the first that is edited are not run again.

    Returns:
        (batch, vocabulary), at each row's last real token.
    """
    anatomy = model.anatomy

    first = 0 if plain is None or edits is None else edits.first(anatomy.layers)

    def visit(network: Any, saved: dict[str, Any]) -> None:
        if plain is not None:
            skip_blocks(network, anatomy, plain[0].outputs[:first], plain[1], batch.ids.shape[1])
        if edits is not None:
            for layer, block in enumerate(anatomy.blocks(network)[first:], start=first):
                apply_edits(block, layer, edits, anatomy, batch)
        saved["logits"] = last_logits(network, anatomy, batch).detach()

    logits: Tensor = run(model, batch, visit)["logits"]
    return logits


def read_activations(
    model: Model,
    batch: TokenBatch,
    *,
    positions: Literal["last", "all"] = "last",
    edits: Edits | None = None,
    logits: bool = True,
) -> Activations:
    """Run a batch once and keep what attribution needs.

    Args:
        model: A loaded model.
        batch: Right-padded tokens.
        positions: Read only each row's last real token, or every position.
        edits: What to replace on the way; what is read is behind the edits.
        logits: Go on to the unembedding, which takes up to half of the time of a short prompt.

    Returns:
        Detached tensors on the model's device.
    """
    anatomy, family = model.anatomy, model.anatomy.family
    edits = edits or Edits()
    rows = torch.arange(len(batch.last), device=batch.last.device)

    def query(tensor: Tensor, axis: int = 1) -> Tensor:
        """Keep the last real token along ``axis``, the query positions, if only that is wanted; always a copy.

        Some families go on to change a module's output in place.
        """
        if positions == "all":
            return tensor.detach().clone().to(rows.device)
        place = tensor.device
        return tensor.movedim(axis, 1)[rows.to(place), batch.last.to(place)].detach().to(rows.device)

    def batched(tensor: Tensor) -> Tensor:
        return tensor.reshape(*batch.ids.shape, -1)

    def written(raw: Tensor, block: Any, post_norm: str | None) -> Tensor:
        """What enters the residual stream: behind the norm that follows, or times the family's constant."""
        if post_norm is not None:
            return query(batched(resolve(block, post_norm).output))
        return raw if anatomy.residual_scale == 1 else raw * anatomy.residual_scale

    def gain(raw: Tensor, layer: int, sublayer: Literal["attention", "ffn"]) -> Tensor:
        norms = anatomy.attention_post_norms if sublayer == "attention" else anatomy.ffn_post_norms
        norm = norms[layer]
        return raw.new_ones(raw.shape[:-1]) if norm is None else 1 / frozen_scale(raw.float(), norm).to(raw.dtype)

    def visit_block(block: Any, layer: int) -> dict[str, Tensor]:
        seen = {"resid_pre": query(block.input)}
        values = anatomy.split_values(resolve(block, family.value_projection).output).detach()
        seen["values"] = values.to(rows.device)
        projection = resolve(block, family.attention_out)
        if layer in edits.mixed_values:
            _edit_input(projection, edits.mixed_values[layer], batch)
        projected = projection.output
        attention = resolve(block, family.attention)
        seen["pattern"] = query(_all_heads(attention.output[1], anatomy), 2)
        if layer in edits.sources:
            projected = projected + _edit_sources(attention, layer, values, edits.sources[layer], anatomy, batch)
        raw = query(projected)
        seen["attention_gain"] = gain(raw, layer, "attention")
        seen["attention_output"] = written(raw, block, family.attention_post_norm)
        seen["resid_mid"] = seen["resid_pre"] + seen["attention_output"]
        ffn_out = resolve(block, family.ffn_out)
        if layer in edits.coefficients:
            _edit_input(ffn_out, edits.coefficients[layer], batch)
        seen["coefficients"] = query(batched(ffn_out.input))
        raw = query(batched(ffn_out.output))
        seen["ffn_gain"] = gain(raw, layer, "ffn")
        seen["ffn_output"] = written(raw, block, family.ffn_post_norm)
        seen["resid_post"] = query(first_tensor(block.output))
        return seen

    def visit(network: Any, saved: dict[str, Any]) -> None:
        saved["layers"] = [visit_block(block, layer) for layer, block in enumerate(anatomy.blocks(network))]
        saved["resid_final"] = query(resolve(network, family.final_norm).input)
        saved["logits"] = None
        if logits:
            every = positions == "all"
            found = network.output.logits.clone() if every else last_logits(network, anatomy, batch)
            saved["logits"] = found.detach()

    saved = run(model, batch, visit, whole=logits)
    layers: list[dict[str, Tensor]] = saved.pop("layers")
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    return Activations(**stacked, **saved)
