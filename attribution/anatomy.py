"""Where things are in a model, read by the record of its family.

Sizes are read from weights and checked against the config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import ModelError, UnsupportedModelError
from attribution.families import Family, family_of
from attribution.norms import Norm

__all__ = [
    "Anatomy",
    "Readout",
    "Subkeys",
    "first_tensor",
    "read_anatomy",
    "resolve",
]


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding: how the final residual state becomes logits.

    Attributes:
        unembedding: ``W_U``, (vocabulary, width), in the model's dtype.
        bias: Bias of the unembedding, (vocabulary,), or ``None``.
        norm: The final norm.
        logit_scale: Factor on the logits; 1 in most families.
        softcap: c in logits = c tanh(logits / c), or ``None``.
    """

    unembedding: Tensor
    bias: Tensor | None
    norm: Norm
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class Subkeys:
    """What the FFN neurons of one layer look for: m = act(up . x + b) or m = act(gate . x + b') (up . x + b).

    Attributes:
        up: Rows of the up projection, (ffn_neurons, width).
        up_bias: (ffn_neurons,), or ``None``.
        gate: Rows of the gate projection, (ffn_neurons, width); ``None`` in a plain FFN.
        gate_bias: (ffn_neurons,), or ``None``.
        activation: act.
    """

    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Anatomy:
    """Sizes, weights and module paths of one loaded model. Tensors are the model's own weights, not copies.

    A neuron writes ``coefficient * gain * (fold * vector)`` into the residual stream, where the gain is 1 / s of
    the norm that follows the sublayer (1 where none does) and the fold is that norm's weight times the family's
    constant.

    Attributes:
        family: The family record.
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Attention heads per layer.
        kv_heads: Key/value heads per layer; fewer than ``heads`` under grouped queries.
        head_dim: Dimensions per head.
        ffn_neurons: FFN neurons per layer.
        vocabulary: Number of tokens.
        context: Longest prompt in tokens; ``None`` if the family sets no limit.
        parallel: Whether the FFN reads the block's input instead of what attention has written to.
        subvalues: FFN value vectors per layer, each (ffn_neurons, width).
        value_vectors: Attention output vectors per layer, each (heads * head_dim, width); row
            ``head * head_dim + dim`` belongs to (head, dim).
        attention_bias: Output-projection bias per layer, (width,) or ``None``; it belongs to no neuron.
        ffn_bias: Down-projection bias per layer, (width,) or ``None``; it belongs to no neuron.
        attention_fold: Per layer, (width,) or ``None`` for ones.
        ffn_fold: The same for the FFN.
        residual_scale: The family's constant, contained in the folds.
        attention_norms: Norm before the attention per layer, or ``None``.
        ffn_norms: Norm before the FFN per layer, or ``None``.
        attention_post_norms: Norm after the attention per layer, or ``None``.
        ffn_post_norms: Norm after the FFN per layer, or ``None``.
        value_rows: Row of the value projection that computes each (head, dim), (heads * head_dim,); heads that
            share a key/value head share rows.
        value_weights: Weight of the value projection per layer, (features, width).
        value_biases: Its bias per layer, (features,) or ``None``.
        value_clip: Values are clamped to plus and minus this; ``None`` for no limit.
        subkeys: FFN subkeys per layer.
        readout: Final norm and unembedding.
    """

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_neurons: int
    vocabulary: int
    context: int | None
    parallel: bool
    subvalues: tuple[Tensor, ...]
    value_vectors: tuple[Tensor, ...]
    attention_bias: tuple[Tensor | None, ...]
    ffn_bias: tuple[Tensor | None, ...]
    attention_fold: tuple[Tensor | None, ...]
    ffn_fold: tuple[Tensor | None, ...]
    residual_scale: float
    attention_norms: tuple[Norm | None, ...]
    ffn_norms: tuple[Norm | None, ...]
    attention_post_norms: tuple[Norm | None, ...]
    ffn_post_norms: tuple[Norm | None, ...]
    value_rows: Tensor
    value_weights: tuple[Tensor, ...]
    value_biases: tuple[Tensor | None, ...]
    value_clip: float | None
    subkeys: tuple[Subkeys, ...]
    readout: Readout

    def __repr__(self) -> str:
        return (
            f"Anatomy({self.family.model_type}: {self.layers} layers, width {self.width}, {self.heads} heads "
            f"({self.kv_heads} key/value) of {self.head_dim}, {self.ffn_neurons} FFN neurons per layer, "
            f"vocabulary {self.vocabulary}, context {self.context})"
        )

    def blocks(self, root: Any) -> list[Any]:
        """Return the blocks of ``root``, which may be the plain module or its traced envoy."""
        return list(resolve(root, self.family.blocks))

    def split_values(self, projected: Tensor) -> Tensor:
        """Return each head's values from the value projection's output.

        Args:
            projected: (batch, position, features).

        Returns:
            (batch, position, head, dim), a copy.
        """
        values: Tensor = projected[..., self.value_rows].unflatten(-1, (self.heads, self.head_dim))
        return values if self.value_clip is None else values.clamp(-self.value_clip, self.value_clip)

    def value_subkeys(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Return what each (head, dim) looks for: weight (heads * head_dim, width) and bias or ``None``."""
        bias = self.value_biases[layer]
        return self.value_weights[layer][self.value_rows], None if bias is None else bias[self.value_rows]


def resolve(root: Any, path: str) -> Any:
    """Follow a dotted path of attributes, on a module or on its traced envoy."""
    return reduce(getattr, path.split("."), root)


def first_tensor(output: Any) -> Any:
    """Return what a module passes on: some families' blocks return a tuple with their weights second."""
    return output[0] if isinstance(output, tuple) else output


def _has(block: nn.Module, path: str) -> bool:
    """Whether a block has a module at a path; some families set what they lack to ``None``."""
    return getattr(block, path, None) is not None


def _rows_by_output(module: nn.Module) -> Tensor:
    """Return a projection's weight as (output, input): row i is what output i looks for.

    ``nn.Linear`` stores (output, input); GPT-2's ``Conv1D`` stores (input, output).
    """
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight if isinstance(module, nn.Linear) else weight.T


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _read_norm(module: nn.Module | None, family: Family) -> Norm | None:
    if module is None:
        return None
    weight: Tensor | None = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    eps = family.fixed_eps if eps is None else eps
    assert eps is not None, f"{type(module).__name__} holds no epsilon"
    return Norm(
        weight=None if weight is None else weight.detach() + family.weight_offset,
        bias=_bias(module),
        eps=float(eps),
        centred=family.centred,
    )


def _norm_at(block: nn.Module, paths: tuple[str, ...], family: Family) -> Norm | None:
    return _read_norm(next((getattr(block, path) for path in paths if _has(block, path)), None), family)


def _value_rows(outputs: int, heads: int, head_dim: int, family: Family, name: str) -> tuple[Tensor, int]:
    """Return the value projection's row of each (head, dim) and the number of key/value heads."""
    parts, remainder = divmod(outputs, head_dim)
    if family.values == "separate":
        kv_heads = parts
    else:
        # Queries of all heads, keys and values of the key/value heads.
        kv_heads, odd = divmod(parts - heads, 2)
        remainder += odd
    if remainder or kv_heads < 1 or heads % kv_heads:
        raise ModelError(
            f"model {name!r} has {heads} heads of {head_dim} dimensions, which do not divide the {outputs} outputs of "
            "its value projection; its config and weights do not belong together."
        )
    group = heads // kv_heads
    rows = torch.arange(outputs)
    if family.values == "interleaved":
        values = rows.view(kv_heads, group + 2, head_dim)[:, -1]
    else:
        values = rows[-kv_heads * head_dim :].view(kv_heads, head_dim)
    return values.repeat_interleave(group, dim=0).flatten(), kv_heads


def _subkeys(block: nn.Module, family: Family) -> Subkeys:
    up_module = resolve(block, family.ffn_up)
    up, up_bias = _rows_by_output(up_module), _bias(up_module)
    gate, gate_bias = None, None
    if family.ffn_gate == family.ffn_up:
        gate, up = up.chunk(2)
        if up_bias is not None:
            gate_bias, up_bias = up_bias.chunk(2)
    elif family.ffn_gate is not None:
        gate_module = resolve(block, family.ffn_gate)
        gate, gate_bias = _rows_by_output(gate_module), _bias(gate_module)
    return Subkeys(up, up_bias, gate, gate_bias, resolve(block, family.activation))


def _setting(config: Any, name: str | None, default: Any) -> Any:
    return default if name is None else getattr(config, name)


def _fold(post_norm: Norm | None, scale: float, width: int, like: Tensor) -> Tensor | None:
    weight = None if post_norm is None else post_norm.weight
    if weight is None:
        return None if scale == 1 else like.new_full((width,), scale)
    return weight * scale


def _check_finite(module: nn.Module, name: str) -> None:
    for parameter_name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"model {name!r} has weights that are NaN or infinite in {parameter_name}; train or download it again."
            )


def read_anatomy(module: nn.Module, name: str) -> Anatomy:
    """Read the anatomy of a loaded model.

    Args:
        module: A causal language model of transformers.
        name: What to call it in errors.

    Raises:
        UnsupportedModelError: If its family has no record.
        ModelError: If sizes disagree or weights are not finite.
    """
    whole: Any = module.config
    family, config = family_of(whole, name), whole.get_text_config()
    blocks = list(resolve(module, family.blocks))
    attention_outs = [resolve(block, family.attention_out) for block in blocks]
    ffn_outs = [resolve(block, family.ffn_out) for block in blocks]
    value_projections = [resolve(block, family.value_projection) for block in blocks]
    value_vectors = tuple(_rows_by_output(out).T for out in attention_outs)
    subvalues = tuple(_rows_by_output(out).T for out in ffn_outs)
    value_weights = tuple(_rows_by_output(projection) for projection in value_projections)
    unembedding = resolve(module, family.unembedding)
    heads = config.num_attention_heads
    head_dim, remainder = divmod(value_vectors[0].shape[0], heads)
    if remainder:
        raise ModelError(
            f"model {name!r} has {heads} heads over {value_vectors[0].shape[0]} attention outputs, which do not "
            "divide; its config and weights do not belong together."
        )
    value_rows, kv_heads = _value_rows(value_weights[0].shape[0], heads, head_dim, family, name)
    _check_finite(module, name)
    width = subvalues[0].shape[1]
    if unembedding.weight.shape[1] != width:
        raise UnsupportedModelError(
            f"model {name!r} projects its final state from width {width} to {unembedding.weight.shape[1]} before the "
            "unembedding, which is not supported; use a model without that projection."
        )
    scale = float(_setting(config, family.residual_scale, 1.0))
    attention_post_norms, ffn_post_norms = (
        tuple(_norm_at(block, () if path is None else (path,), family) for block in blocks)
        for path in (family.attention_post_norm, family.ffn_post_norm)
    )
    final_norm = _read_norm(resolve(module, family.final_norm), family)
    assert final_norm is not None
    softcap = _setting(config, family.softcap, None)
    clip = _setting(config, family.value_clip, None)
    flags = family.parallel
    return Anatomy(
        family=family,
        layers=len(blocks),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_neurons=subvalues[0].shape[0],
        vocabulary=unembedding.weight.shape[0],
        context=next(
            (value for key in ("max_position_embeddings", "n_positions") if (value := getattr(config, key, None))),
            None,
        ),
        parallel=flags if isinstance(flags, bool) else any(getattr(config, flag) for flag in flags),
        subvalues=subvalues,
        value_vectors=value_vectors,
        attention_bias=tuple(_bias(out) for out in attention_outs),
        ffn_bias=tuple(_bias(out) for out in ffn_outs),
        attention_fold=tuple(_fold(norm, scale, width, unembedding.weight) for norm in attention_post_norms),
        ffn_fold=tuple(_fold(norm, scale, width, unembedding.weight) for norm in ffn_post_norms),
        residual_scale=scale,
        attention_norms=tuple(_norm_at(block, family.attention_norm, family) for block in blocks),
        ffn_norms=tuple(_norm_at(block, family.ffn_norm, family) for block in blocks),
        attention_post_norms=attention_post_norms,
        ffn_post_norms=ffn_post_norms,
        value_rows=value_rows.to(unembedding.weight.device),
        value_weights=value_weights,
        value_biases=tuple(_bias(projection) for projection in value_projections),
        value_clip=None if clip is None else float(clip),
        subkeys=tuple(_subkeys(block, family) for block in blocks),
        readout=Readout(
            unembedding=unembedding.weight.detach(),
            bias=_bias(unembedding),
            norm=final_norm,
            logit_scale=float(_setting(config, family.logit_scale, 1.0))
            / float(_setting(config, family.logit_divisor, 1.0)),
            softcap=None if softcap is None else float(softcap),
        ),
    )
