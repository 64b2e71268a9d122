"""The model families that are known: one declarative record of module paths and settings each.

With :mod:`attribution.models.anatomy`, which reads a model by its record, the only module that knows model families. A
family without a record is an error that lists the known ones, never a guess.

Three layouts of a block are known. With F and A the functions of the two sublayers, n their norms and p their
norms afterwards, if any:

    sequential    r = h + p(A(n(h))),  h' = r + p(F(n'(r)))
    parallel      h' = h + A(n(h)) + F(n'(h))
    post-norm     sequential, with n, n' or both left out

In all three r is h plus what attention writes, so a parallel block reads as "attention first, then FFN" too: only
what the FFN looks at differs. What a sublayer writes is its projection's output times a constant of the family
(Granite), through the norm afterwards (Gemma 2 and 3, OLMo 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from attribution.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """Module paths and settings of one model family.

    Paths of a block's parts start at the block. Where a tuple of paths is given, the first that the block has
    counts; an empty one means that the family has no such norm.

    Attributes:
        model_type: ``config.model_type`` of the family.
        blocks: List of blocks, from the root.
        final_norm: Norm before the unembedding, from the root.
        attention: Attention module; returns (output, weights) under eager attention.
        attention_norm: Norm before the attention.
        value_projection: Module that computes the values.
        attention_out: Output projection of the attention; its input is the mixed values.
        ffn_norm: Norm before the FFN.
        ffn_up: Up projection; for a gated FFN, what the activated gate multiplies.
        ffn_out: Down projection; its input is the neurons' coefficients.
        activation: The FFN's nonlinearity.
        centred: Whether the norms subtract the mean (LayerNorm) or not (RMSNorm).
        unembedding: Output layer, from the root.
        ffn_gate: Gate projection of a gated FFN; the path of ``ffn_up`` where one matrix holds gate and up, in
            that order.
        values: Output of the value projection: values alone (``"separate"``), all queries, keys and values in
            that order (``"stacked"``), or the same for each key/value head in turn (``"interleaved"``).
        parallel: Whether FFN and attention both read the block's input; a tuple names the config settings that say
            so.
        attention_post_norm: Norm between the attention and the residual stream.
        ffn_post_norm: Norm between the FFN and the residual stream.
        weight_offset: What is added to every stored norm weight.
        fixed_eps: The norms' epsilon where the module does not hold it.
        residual_scale: Config name of the factor on what a sublayer writes.
        logit_scale: Config name of the factor on the logits.
        logit_divisor: Config name of what the logits are divided by.
        softcap: Config name of c in logits = c tanh(logits / c).
        value_clip: Config name of the largest absolute value.
        required: Config settings that change the anatomy, with the only value that is supported.
    """

    model_type: str
    blocks: str
    final_norm: str
    attention: str
    attention_norm: tuple[str, ...]
    value_projection: str
    attention_out: str
    ffn_norm: tuple[str, ...]
    ffn_up: str
    ffn_out: str
    activation: str
    centred: bool
    unembedding: str = "lm_head"
    ffn_gate: str | None = None
    values: Literal["separate", "stacked", "interleaved"] = "separate"
    parallel: bool | tuple[str, ...] = False
    attention_post_norm: str | None = None
    ffn_post_norm: str | None = None
    weight_offset: float = 0.0
    fixed_eps: float | None = None
    residual_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
    value_clip: str | None = None
    required: dict[str, object] = field(default_factory=dict)


def _llama_like(model_type: str, **changes: Any) -> Family:
    """Return the layout that most families share: separate projections, a gated FFN, RMSNorm before each sublayer."""
    layout: dict[str, Any] = {
        "blocks": "model.layers",
        "final_norm": "model.norm",
        "attention": "self_attn",
        "attention_norm": ("input_layernorm",),
        "value_projection": "self_attn.v_proj",
        "attention_out": "self_attn.o_proj",
        "ffn_norm": ("post_attention_layernorm",),
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_out": "mlp.down_proj",
        "activation": "mlp.act_fn",
        "centred": False,
    }
    return Family(model_type, **(layout | changes))


# Gemma 2 and 3 norm both before and after each sublayer.
_GEMMA_NORMS: dict[str, Any] = {
    "weight_offset": 1.0,
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": ("pre_feedforward_layernorm",),
    "ffn_post_norm": "post_feedforward_layernorm",
    "softcap": "final_logit_softcapping",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention="attn",
            attention_norm=("ln_1",),
            value_projection="attn.c_attn",
            values="stacked",
            attention_out="attn.c_proj",
            ffn_norm=("ln_2",),
            ffn_up="mlp.c_fc",
            ffn_out="mlp.c_proj",
            activation="mlp.act",
            centred=True,
        ),
        Family(
            "gpt_neo",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention="attn.attention",
            attention_norm=("ln_1",),
            value_projection="attn.attention.v_proj",
            attention_out="attn.attention.out_proj",
            ffn_norm=("ln_2",),
            ffn_up="mlp.c_fc",
            ffn_out="mlp.c_proj",
            activation="mlp.act",
            centred=True,
        ),
        Family(
            "gptj",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention="attn",
            attention_norm=("ln_1",),
            value_projection="attn.v_proj",
            attention_out="attn.out_proj",
            ffn_norm=("ln_1",),
            ffn_up="mlp.fc_in",
            ffn_out="mlp.fc_out",
            activation="mlp.act",
            centred=True,
            parallel=True,
        ),
        Family(
            "gpt_neox",
            blocks="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            attention="attention",
            attention_norm=("input_layernorm",),
            value_projection="attention.query_key_value",
            values="interleaved",
            attention_out="attention.dense",
            ffn_norm=("post_attention_layernorm",),
            ffn_up="mlp.dense_h_to_4h",
            ffn_out="mlp.dense_4h_to_h",
            activation="mlp.act",
            centred=True,
            parallel=("use_parallel_residual",),
        ),
        Family(
            "opt",
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            attention="self_attn",
            attention_norm=("self_attn_layer_norm",),
            value_projection="self_attn.v_proj",
            attention_out="self_attn.out_proj",
            ffn_norm=("final_layer_norm",),
            ffn_up="fc1",
            ffn_out="fc2",
            activation="activation_fn",
            centred=True,
            # OPT-350m normalises the residual stream itself and projects it to another width.
            required={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        ),
        Family(
            "bloom",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention="self_attention",
            attention_norm=("input_layernorm",),
            value_projection="self_attention.query_key_value",
            values="interleaved",
            attention_out="self_attention.dense",
            ffn_norm=("post_attention_layernorm",),
            ffn_up="mlp.dense_h_to_4h",
            ffn_out="mlp.dense_4h_to_h",
            activation="mlp.gelu_impl",
            centred=True,
            required={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
        ),
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("gemma", weight_offset=1.0),
        _llama_like("gemma2", **_GEMMA_NORMS),
        _llama_like("gemma3_text", **_GEMMA_NORMS),
        # The language model of the checkpoints that read images too, whose logits are not capped.
        _llama_like(
            "gemma3",
            **(_GEMMA_NORMS | {"softcap": None}),
            blocks="model.language_model.layers",
            final_norm="model.language_model.norm",
            required={"final_logit_softcapping": None},
        ),
        Family(
            "phi",
            blocks="model.layers",
            final_norm="model.final_layernorm",
            attention="self_attn",
            attention_norm=("input_layernorm",),
            value_projection="self_attn.v_proj",
            attention_out="self_attn.dense",
            ffn_norm=("input_layernorm",),
            ffn_up="mlp.fc1",
            ffn_out="mlp.fc2",
            activation="mlp.activation_fn",
            centred=True,
            parallel=True,
        ),
        _llama_like(
            "phi3",
            value_projection="self_attn.qkv_proj",
            values="stacked",
            ffn_gate="mlp.gate_up_proj",
            ffn_up="mlp.gate_up_proj",
            activation="mlp.activation_fn",
        ),
        Family(
            "falcon",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention="self_attention",
            attention_norm=("ln_attn", "input_layernorm"),
            value_projection="self_attention.query_key_value",
            values="interleaved",
            attention_out="self_attention.dense",
            ffn_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
            ffn_up="mlp.dense_h_to_4h",
            ffn_out="mlp.dense_4h_to_h",
            activation="mlp.act",
            centred=True,
            parallel=("new_decoder_architecture", "parallel_attn"),
            # Under eager attention transformers adds the ALiBi bias twice: what runs is not the model.
            required={"alibi": False},
        ),
        _llama_like("olmo", centred=True, fixed_eps=1e-5, value_clip="clip_qkv"),
        _llama_like(
            "olmo2",
            attention_norm=(),
            ffn_norm=(),
            attention_post_norm="post_attention_layernorm",
            ffn_post_norm="post_feedforward_layernorm",
        ),
        _llama_like(
            "stablelm",
            ffn_norm=("post_attention_layernorm", "input_layernorm"),
            centred=True,
            parallel=("use_parallel_residual",),
        ),
        _llama_like("cohere", ffn_norm=("input_layernorm",), centred=True, parallel=True, logit_scale="logit_scale"),
        _llama_like("granite", residual_scale="residual_multiplier", logit_divisor="logits_scaling"),
        _llama_like(
            "starcoder2",
            final_norm="model.norm",
            ffn_gate=None,
            ffn_up="mlp.c_fc",
            ffn_out="mlp.c_proj",
            activation="mlp.act",
            centred=True,
        ),
    )
}

# What a config of a mixture of experts calls the number of them.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: Any, name: str) -> Family:
    """Return the record of a model's family.

    Args:
        config: The model's config; of a model that reads images too, the settings are those of its language model.
        name: What to call the model in errors.

    Raises:
        UnsupportedModelError: If there is none, or a setting changes the anatomy in a way that is not supported.
    """
    settings = config.get_text_config()
    experts = [each for each in _EXPERTS if (getattr(settings, each, None) or 0) > 1]
    if experts:
        raise UnsupportedModelError(
            f"model {name!r} is a mixture of experts ({experts[0]} = {getattr(settings, experts[0])}), which is not "
            "supported yet; use a dense model."
        )
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model {name!r} has the architecture {config.model_type!r}, which is not supported; use one of "
            f"{', '.join(sorted(FAMILIES))}, or add a record to attribution/models/families.py."
        )
    family = FAMILIES[config.model_type]
    for setting, value in family.required.items():
        found = getattr(settings, setting, value)
        if found != value:
            raise UnsupportedModelError(
                f"model {name!r} has {setting} = {found!r} in its config, which is not supported for "
                f"{config.model_type}; use a model with {setting} = {value!r}."
            )
    return family
