"""A model of GPT-2-small size with random weights, a tokenizer for it, and the prompt that is timed.

Weights are drawn from :data:`SEED` with standard deviation :data:`SCALE`, as :mod:`benchmarks.random_models` says.
GPT-2's own 0.02 leaves a model in which no neuron matters: its logits are those of the embedding of the last token. At
0.1, as in trained GPT-2, where token embeddings have 0.14,

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
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.random_models import SCALE, SEED, draw, text, tokenizer_of, word

__all__ = ["SCALE", "SEED", "prompt", "word", "write_model"]

VOCABULARY, TOKENS = 50_257, 12


def prompt() -> str:
    """Return the prompt: :data:`TOKENS` random words, one token each."""
    return text(VOCABULARY, TOKENS)


def write_model(folder: Path) -> None:
    """Write the model and its tokenizer to a folder, as ``save_pretrained`` does: half a gigabyte."""
    config = GPT2Config()  # GPT-2 small: 12 layers, 12 heads, width 768, vocabulary 50,257, context 1,024.
    with torch.device("meta"):
        module = GPT2LMHeadModel(config)
    module = module.to_empty(device="cpu")
    module.tie_weights()
    draw(module, layers=config.n_layer, width=config.n_embd)
    module.save_pretrained(folder)
    tokenizer_of(VOCABULARY).save_pretrained(folder)
