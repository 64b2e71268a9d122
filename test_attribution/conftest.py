"""Tiny random models that the tests of the instrument share. They know nothing, but every neuron counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import attribution as at

LAYERS, WIDTH, HEADS, KV_HEADS, FFN, CONTEXT = 3, 32, 4, 2, 48, 32
SENTENCES = (
    "The capital of France is Paris",
    "The capital of Italy is Rome",
    "The number of legs that a dog has is four",
    "A ripe cherry is red",
    # The answer without a space before it is a token too, as in real vocabularies.
    "Paris",
)
# Often enough that byte pair encoding merges each of these words before its vocabulary is full.
REPEATS = 50


def _gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, without a token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * REPEATS, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, unk_token=end)


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """Spaces become ``▁`` and ``<s>`` is put in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * REPEATS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def _gpt2_model(vocabulary: int) -> GPT2LMHeadModel:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FFN,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        **drop,
    )
    return GPT2LMHeadModel(config)


def _llama_model(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _unsettle(network: torch.nn.Module) -> None:
    """Make random what starts as all zeros or all ones: a forgotten bias or norm weight would stay unseen there."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by family, as ``save_pretrained`` writes them. Read-only."""
    home = tmp_path_factory.mktemp("tiny")
    made = {"gpt2": (_gpt2_tokenizer, _gpt2_model), "llama": (_llama_tokenizer, _llama_model)}
    with torch.random.fork_rng(devices=[]):
        for number, (family, (make_tokenizer, make_model)) in enumerate(made.items()):
            torch.manual_seed(number)
            tokenizer = make_tokenizer()
            network = make_model(len(tokenizer))
            _unsettle(network)
            network.save_pretrained(home / family)
            tokenizer.save_pretrained(home / family)
            # The plain class name is known to every version of transformers; the one written is not.
            path = home / family / "tokenizer_config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            path.write_text(json.dumps(settings), encoding="utf-8")
    return {family: home / family for family in made}


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """Both model families, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path], family: str) -> Path:
    """Folder of the tiny model of ``family``. Read-only: copy it to change it."""
    return folders[family]


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> Callable[[str], at.Model]:
    """Load a tiny model by family, once per session. Read-only."""
    cache: dict[str, at.Model] = {}

    def load(family: str) -> at.Model:
        if family not in cache:
            cache[family] = at.load(str(folders[family]))
        return cache[family]

    return load


@pytest.fixture(scope="session")
def model(loaded: Callable[[str], at.Model], family: str) -> at.Model:
    """The tiny model of ``family``, loaded by this package."""
    return loaded(family)


@pytest.fixture(scope="session")
def plain(folder: Path) -> Any:
    """The same weights in plain transformers, without this package. Read-only: copy it to edit it."""
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return network.eval()


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    """The tokenizer of ``family``, in plain transformers."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def plain_logits(plain: Any, tokenizer: Any) -> Callable[..., torch.Tensor]:
    """Logits at the last position by plain transformers, (vocabulary,), of ``plain`` or of an edited copy."""

    def logits(prompt: str, network: Any = None) -> torch.Tensor:
        with torch.no_grad():
            output = (network or plain)(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
        return output.logits[0, -1]

    return logits
