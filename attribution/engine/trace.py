"""Open a model under nnsight, run it, read its activations and edit them: one trace per batch.

The only module that imports nnsight; others hand :func:`run` a function that visits modules. Modules are visited in
forward order, which nnsight requires. What is computed from activations is handed to
:func:`run_where_weights_are`, which runs it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from attribution.models.anatomy import Anatomy, first_tensor, resolve
from attribution.models.norms import frozen_scale
from attribution.models.running import run
from attribution.prompts.tokens import TokenBatch

if TYPE_CHECKING:
    from attribution.models.model import Model

__all__ = [
    "Activations",
    "Edits",
    "Filler",
    "PlainRun",
    "apply_edits",
    "last_logits",
    "read_activations",
    "rerun",
    "run_plainly",
    "skip_blocks",
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
        attention_post_scale: 1 / s of the norm after the attention, 1 where there is none, (L, B, [Q]).
        ffn_post_scale: The same for the FFN.
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
    attention_post_scale: Tensor
    ffn_post_scale: Tensor
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
    moved = (_replace(taken, replacement) - taken).sum(-1).flatten(1) @ anatomy.sublayer(layer, "attention").vectors.to(
        last.device
    )
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

    return PlainRun(**run(model, batch.inputs(), visit))


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

    logits: Tensor = run(model, batch.inputs(), visit)["logits"]
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

    def post_scale(raw: Tensor, layer: int, sublayer: Literal["attention", "ffn"]) -> Tensor:
        norm = anatomy.sublayer(layer, sublayer).post_norm
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
        seen["attention_post_scale"] = post_scale(raw, layer, "attention")
        seen["attention_output"] = written(raw, block, family.attention_post_norm)
        seen["resid_mid"] = seen["resid_pre"] + seen["attention_output"]
        ffn_out = resolve(block, family.ffn_out)
        if layer in edits.coefficients:
            _edit_input(ffn_out, edits.coefficients[layer], batch)
        seen["coefficients"] = query(batched(ffn_out.input))
        raw = query(batched(ffn_out.output))
        seen["ffn_post_scale"] = post_scale(raw, layer, "ffn")
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

    saved = run(model, batch.inputs(), visit, whole=logits)
    layers: list[dict[str, Tensor]] = saved.pop("layers")
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    return Activations(**stacked, **saved)
