"""A model of GPT-2-small size with random weights, a tokenizer for it, and the prompt that is timed.

Weights are drawn here, from :data:`SEED`, so that no version of transformers has a say in them. Every matrix,
embedding and bias is normal with standard deviation :data:`SCALE`, output projections with SCALE / sqrt(2 * layers) as
in GPT-2, norm weights normal around 1. GPT-2's own 0.02 leaves a model in which no neuron matters: its logits are those
of the embedding of the last token. At 0.1, as in trained GPT-2, where token embeddings have 0.14,

- a coordinate of the residual stream grows by about 2 per sublayer from the 0.14 of the embeddings, so that what comes
  out is what neurons wrote;
- logits have a standard deviation of about SCALE * sqrt(width) = 2.8 nats, which leaves an entropy of some
  log(vocabulary) - 2.8**2 / 2 = 7 nats, neither uniform (10.8) nor saturated (0);
- the best neurons score some tenths of a nat.

What came of it is measured in every run and printed beside the table.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SEED = 0
SCALE = 0.1
VOCABULARY, TOKENS = 50_257, 12


def word(token: int) -> str:
    """Return the word that is token number ``token``."""
    return f"w{token}"


def prompt() -> str:
    """Return the prompt: :data:`TOKENS` random words, one token each."""
    generator = torch.Generator().manual_seed(SEED)
    # The last token is the tokenizer's unknown word.
    return " ".join(word(token) for token in torch.randint(VOCABULARY - 1, (TOKENS,), generator=generator).tolist())


def write_model(folder: Path) -> None:
    """Write the model and its tokenizer to a folder, as ``save_pretrained`` does: half a gigabyte."""
    config = GPT2Config()  # GPT-2 small: 12 layers, 12 heads, width 768, vocabulary 50,257, context 1,024.
    with torch.device("meta"):
        module = GPT2LMHeadModel(config)
    module = module.to_empty(device="cpu")
    module.tie_weights()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = SCALE / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else SCALE
            norm_weight = ".ln_" in name and name.endswith("weight")
            parameter.normal_(float(norm_weight), scale, generator=generator)
    module.save_pretrained(folder)
    words = {word(token): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(VOCABULARY - 1)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=word(VOCABULARY - 1)).save_pretrained(folder)
