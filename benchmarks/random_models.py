"""Models of any size with random weights in which neurons matter, and a tokenizer for them.

Weights are drawn here, so that no version of transformers has a say in them. Every matrix, embedding and bias is normal
with one standard deviation, output projections with that over sqrt(2 * layers) as in GPT-2, norm weights normal around
1. That deviation is SCALE of :mod:`benchmarks.gpt2_small` at its width, and falls with the square root of the width, so
that what a matrix makes of a normed vector has the same size in all models.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import attribution as at
from attribution.models.anatomy import read_anatomy
from attribution.models.opening import wrap
from benchmarks.cost import Shape

SEED = 0
SCALE, SCALE_WIDTH = 0.1, 768
# What a sublayer writes with.
_OUTPUTS = ("c_proj.weight", "o_proj.weight", "down_proj.weight")
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def word(token: int) -> str:
    """Return the word that is token number ``token``."""
    return f"w{token}"


def text(vocabulary: int, tokens: int, seed: int = SEED) -> str:
    """Return a prompt of random words, one token each."""
    generator = torch.Generator().manual_seed(seed)
    # The last token is the tokenizer's unknown word.
    return " ".join(word(token) for token in torch.randint(vocabulary - 1, (tokens,), generator=generator).tolist())


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of one word per token."""
    words, unknown = {word(token): token for token in range(vocabulary)}, word(vocabulary - 1)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)


def draw(module: Any, *, layers: int, width: int) -> None:
    """Draw the weights of a module anew, in place; on another device they are other numbers."""
    matrices = SCALE * (SCALE_WIDTH / width) ** 0.5
    generator = torch.Generator(module.device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = matrices / (2 * layers) ** 0.5 if name.endswith(_OUTPUTS) else matrices
            norm_weight = name.endswith("weight") and (".ln_" in name or "norm" in name)
            parameter.normal_(float(norm_weight), scale, generator=generator)


def config_of(shape: Shape) -> PretrainedConfig:
    """Return a shape's config: Llama's where the FFN is gated, else GPT-2's."""
    if shape.gated:
        return LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            bos_token_id=None,
            eos_token_id=None,
        )
    return GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_inner=shape.ffn,
        n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(shape: Shape, device: torch.device | str = "cpu") -> at.Model:
    """Return a model of a shape, made on its device."""
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(
            config_of(shape), dtype=_DTYPES[shape.bytes], attn_implementation="eager"
        )
    draw(module, layers=shape.layers, width=shape.width)
    module = module.eval().requires_grad_(requires_grad=False)
    tokenizer = tokenizer_of(shape.vocabulary)
    return at.Model(shape.name, wrap(module, tokenizer), read_anatomy(module, shape.name), tokenizer)
