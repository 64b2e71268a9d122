"""Where things are in a model: the one module that knows model families.

A family is one declarative record of module paths. Sizes are read from weights and config, and checked
against each other; a family without a record is an error that lists the known ones, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from attribution.errors import ModelError, UnsupportedModelError

__all__ = ["FAMILIES", "Anatomy", "Family", "Readout", "family_of", "read_anatomy", "resolve"]


@dataclass(frozen=True)
class Family:
    """Module paths of one model family with sequential residuals (attention first, then FFN).

    Attributes:
        model_type: ``config.model_type`` of the family.
        blocks: List of blocks, from the root.
        final_norm: Norm before the unembedding, from the root.
        unembedding: Output layer without bias, from the root.
        attention: Attention module, from a block; returns (output, weights) under eager attention.
        value_projection: Module that computes the values, from a block.
        value_part: Which equal part of the value projection's output holds the values, and of how many:
            (2, 3) for a fused q/k/v, (0, 1) for a projection of its own.
        attention_out: Output projection of the attention, from a block; its input is the mixed values.
        ffn_norm: Norm before the FFN, from a block; its input is the middle residual stream.
        ffn_out: Down projection, from a block; its input is the neurons' coefficients.
        centred: Whether the norms subtract the mean (LayerNorm) or not (RMSNorm).
        norm_eps: Name of the norm's epsilon attribute.
    """

    model_type: str
    blocks: str
    final_norm: str
    unembedding: str
    attention: str
    value_projection: str
    value_part: tuple[int, int]
    attention_out: str
    ffn_norm: str
    ffn_out: str
    centred: bool
    norm_eps: str


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gpt2",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            unembedding="lm_head",
            attention="attn",
            value_projection="attn.c_attn",
            value_part=(2, 3),
            attention_out="attn.c_proj",
            ffn_norm="ln_2",
            ffn_out="mlp.c_proj",
            centred=True,
            norm_eps="eps",
        ),
        Family(
            model_type="llama",
            blocks="model.layers",
            final_norm="model.norm",
            unembedding="lm_head",
            attention="self_attn",
            value_projection="self_attn.v_proj",
            value_part=(0, 1),
            attention_out="self_attn.o_proj",
            ffn_norm="post_attention_layernorm",
            ffn_out="mlp.down_proj",
            centred=False,
            norm_eps="variance_epsilon",
        ),
    )
}


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding: how a residual vector becomes logits.

    Attributes:
        unembedding: ``W_U``, (vocabulary, width).
        norm_weight: Norm weight, (width,).
        norm_bias: Norm bias, (width,), or ``None``.
        eps: The norm's epsilon.
        centred: Whether the norm subtracts the mean.
    """

    unembedding: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    eps: float
    centred: bool

    def double(self) -> Readout:
        """Return the same readout in float64."""
        bias = None if self.norm_bias is None else self.norm_bias.double()
        return Readout(self.unembedding.double(), self.norm_weight.double(), bias, self.eps, self.centred)


@dataclass(frozen=True)
class Anatomy:
    """Sizes, weights and module paths of one loaded model.

    Attributes:
        family: The family record.
        layers: Number of blocks.
        width: Width of the residual stream.
        heads: Attention heads per layer.
        kv_heads: Key/value heads per layer; fewer than ``heads`` under grouped queries.
        head_dim: Dimensions per head.
        ffn_neurons: FFN neurons per layer.
        vocabulary: Number of tokens.
        context: Longest prompt in tokens.
        subvalues: FFN value vectors per layer, each (ffn_neurons, width).
        value_vectors: Attention output vectors per layer, each (heads * head_dim, width); row
            ``head * head_dim + dim`` belongs to (head, dim).
        attention_bias: Output-projection bias per layer, (width,) or ``None``; it belongs to no neuron.
        ffn_bias: Down-projection bias per layer, (width,) or ``None``; it belongs to no neuron.
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
    context: int
    subvalues: tuple[Tensor, ...]
    value_vectors: tuple[Tensor, ...]
    attention_bias: tuple[Tensor | None, ...]
    ffn_bias: tuple[Tensor | None, ...]
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

        Under grouped queries a key/value head serves ``heads / kv_heads`` neighbouring heads.

        Args:
            projected: (batch, position, features).

        Returns:
            (batch, position, head, dim).
        """
        part, parts = self.family.value_part
        values: Tensor = projected.chunk(parts, dim=-1)[part]
        values = values.unflatten(-1, (self.kv_heads, self.head_dim))
        return values.repeat_interleave(self.heads // self.kv_heads, dim=2)


def resolve(root: Any, path: str) -> Any:
    """Follow a dotted path of attributes, on a module or on its traced envoy."""
    return reduce(getattr, path.split("."), root)


def family_of(model_type: str, name: str) -> Family:
    """Return the record of a family.

    Raises:
        UnsupportedModelError: If there is none.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model {name!r} has the architecture {model_type!r}, which is not supported; use one of "
            f"{', '.join(sorted(FAMILIES))}, or add a record to attribution/anatomy.py."
        )
    return FAMILIES[model_type]


def _written_rows(module: nn.Module) -> Tensor:
    """Return a projection's weight as (input, output): row i is what input i writes.

    ``nn.Linear`` stores (output, input); GPT-2's ``Conv1D`` stores (input, output).
    """
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, nn.Linear) else weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _first_number(config: Any, names: Sequence[str]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ModelError(f"the model's config has none of {', '.join(names)}; its config.json is incomplete.")


def read_anatomy(module: nn.Module, name: str) -> Anatomy:
    """Read the anatomy of a loaded model.

    Args:
        module: A causal language model of transformers.
        name: What to call it in errors.

    Raises:
        UnsupportedModelError: If its family has no record.
        ModelError: If sizes disagree or weights are not finite.
    """
    config: Any = module.config
    family = family_of(config.model_type, name)
    blocks = list(resolve(module, family.blocks))
    attention_outs = [resolve(block, family.attention_out) for block in blocks]
    ffn_outs = [resolve(block, family.ffn_out) for block in blocks]
    value_vectors = tuple(_written_rows(out) for out in attention_outs)
    subvalues = tuple(_written_rows(out) for out in ffn_outs)
    norm = resolve(module, family.final_norm)
    unembedding = resolve(module, family.unembedding)
    if _bias(unembedding) is not None:
        raise UnsupportedModelError(f"model {name!r} has an unembedding bias, which its family should not have.")
    heads = _first_number(config, ("num_attention_heads",))
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim, remainder = divmod(value_vectors[0].shape[0], heads)
    if remainder or heads % kv_heads:
        raise ModelError(
            f"model {name!r} has {heads} heads and {kv_heads} key/value heads over {value_vectors[0].shape[0]} "
            "attention outputs, which do not divide; its config and weights do not belong together."
        )
    for parameter_name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"model {name!r} has weights that are NaN or infinite in {parameter_name}; train or download it again."
            )
    return Anatomy(
        family=family,
        layers=len(blocks),
        width=subvalues[0].shape[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_neurons=subvalues[0].shape[0],
        vocabulary=unembedding.weight.shape[0],
        context=_first_number(config, ("max_position_embeddings", "n_positions")),
        subvalues=subvalues,
        value_vectors=value_vectors,
        attention_bias=tuple(_bias(out) for out in attention_outs),
        ffn_bias=tuple(_bias(out) for out in ffn_outs),
        readout=Readout(
            unembedding=unembedding.weight.detach(),
            norm_weight=norm.weight.detach(),
            norm_bias=_bias(norm),
            eps=float(getattr(norm, family.norm_eps)),
            centred=family.centred,
        ),
    )
