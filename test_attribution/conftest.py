"""Tiny random models that the tests of the instrument share. They know nothing, but every neuron counts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import attribution as at

# The tests are not a package, so modules beside this file can be imported only while its folder is on the path.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parent))
    import forked

# A worker of a distributed run shares the cores with others.
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that tests start compute alike: the number of threads decides the last digits.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

LAYERS, WIDTH, HEADS, KV_HEADS, FFN, CONTEXT = 3, 32, 4, 2, 48, 32
# Where a family may choose it: another size than width / heads, and than every other size here.
HEAD_DIM = 10
# Shorter than the prompts, so that a window that is forgotten shows.
WINDOW = 3
INITIALIZER_RANGE = 0.3
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

_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": INITIALIZER_RANGE,
}
_GROUPED = _SIZES | {"num_key_value_heads": KV_HEADS}
# The weights of its norms count from one, so all it writes is larger: smaller weights keep its logits apart.
_GEMMA = _GROUPED | {"head_dim": HEAD_DIM, "initializer_range": 0.15}
_FALCON = {
    "hidden_size": WIDTH,
    "ffn_hidden_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": INITIALIZER_RANGE,
}
# Every family, and every setting that changes the anatomy or the arithmetic of one. The place of a row is the seed of
# its model, and tests hold figures of the first two: add rows at the end.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        {
            "n_embd": WIDTH,
            "n_inner": FFN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": CONTEXT,
            "initializer_range": INITIALIZER_RANGE,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "llama": ("llama", _GROUPED),
    "llama-biases": ("llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": WIDTH,
            "intermediate_size": FFN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "initializer_range": INITIALIZER_RANGE,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": WINDOW,
        },
    ),
    "gptj": (
        "gptj",
        {
            "n_embd": WIDTH,
            "n_inner": FFN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": CONTEXT,
            "initializer_range": INITIALIZER_RANGE,
            "rotary_dim": 4,
        },
    ),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt_neox-sequential": ("gpt_neox", _SIZES | {"use_parallel_residual": False}),
    "opt": (
        "opt",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "init_std": INITIALIZER_RANGE,
            "dropout": 0.0,
        },
    ),
    # Its feed-forward layer is always four times as wide as the model, and nothing limits its context.
    "bloom": (
        "bloom",
        {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": INITIALIZER_RANGE},
    ),
    "mistral": ("mistral", _GROUPED | {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": HEAD_DIM}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": (
        "gemma2",
        _GEMMA
        | {
            "sliding_window": WINDOW,
            # Caps that bite, and scores large enough to be bitten.
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3": (
        "gemma3_text",
        _GEMMA
        | {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi": ("phi", _GROUPED),
    "phi-qk-norm": ("phi", _GROUPED | {"qk_layernorm": True}),
    "phi3": ("phi3", _GROUPED | {"original_max_position_embeddings": CONTEXT, "sliding_window": WINDOW}),
    # As the 7B: one key/value head, one norm for both halves of a block.
    "falcon": ("falcon", _FALCON),
    # As the 40B: a norm for each half, and each group of heads fused with its key and value.
    "falcon-grouped": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "num_ln_in_parallel_attn": 2},
    ),
    # As the 11B: fused as the 40B, with one norm.
    "falcon-grouped-one-norm": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "num_ln_in_parallel_attn": 1},
    ),
    # As the RW models: each head fused with its own key and value, one half after the other, biases.
    "falcon-sequential": (
        "falcon",
        _FALCON | {"parallel_attn": False, "multi_query": False, "alibi": False, "bias": True},
    ),
    "olmo": ("olmo", _GROUPED),
    "olmo-clipped": ("olmo", _GROUPED | {"clip_qkv": 1.0, "attention_bias": True}),
    "olmo2": ("olmo2", _GROUPED),
    "stablelm": ("stablelm", _GROUPED),
    "stablelm-biases": ("stablelm", _GROUPED | {"use_qkv_bias": True}),
    # As the 12B.
    "stablelm-parallel": ("stablelm", _GROUPED | {"use_parallel_residual": True, "qk_layernorm": True}),
    "stablelm-parallel-biases": ("stablelm", _GROUPED | {"use_parallel_residual": True, "use_qkv_bias": True}),
    # The scale of its logits must differ from one to be seen, and be large enough for a top token to stand out.
    "cohere": ("cohere", _GROUPED | {"logit_scale": 1.25}),
    "cohere-qk-norm": ("cohere", _GROUPED | {"logit_scale": 1.25, "use_qk_norm": True}),
    "granite": (
        "granite",
        _GROUPED
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.8,
        },
    ),
    "starcoder2": ("starcoder2", _GROUPED),
    # As the 4B and larger, which read images too: the language model is a part of the whole.
    "gemma3-with-images": (
        "gemma3",
        {
            "text_config": _GEMMA
            | {
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
}
# Rows that together have every setting that code outside of ``models`` has to get right: Conv1D, grouped queries,
# halves of a block side by side, a norm behind each half, soft caps, clipped values, scaled residuals and logits, and
# weights that are fused by heads, by groups of them, and by halves of an FFN.
REPRESENTATIVE = ("gpt2", "llama", "gpt_neox", "gemma2", "phi3", "falcon-grouped", "olmo-clipped", "granite")
# Families whose tokenizers put a token in front; the others are byte-level and put none.
_IN_FRONT = {"llama", "mistral", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "cohere"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let whoever adds a family run all tests of the engine on it, and tox what takes too long to wait for."""
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run what is marked so as well: every injected fault, every page, the wheel in an empty environment, ...",
    )
    parser.addoption(
        "--folders", type=int, help="how many troubled folders are tried; 60 if left out, 200 with --exhaustive"
    )
    parser.addoption(
        "--every-architecture",
        action="store_true",
        help="run on every tiny model what otherwise runs on those that together have every setting",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of the tests that tox runs and a developer need not wait for."""
    config.addinivalue_line("markers", "exhaustive: takes long, and a quicker test samples it; needs --exhaustive")
    config.addinivalue_line(
        "markers", "own_process: nested pytest runs start a new Python, because the test is about imports"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is exhaustive, so that the last line of the run counts it."""
    if not config.getoption("--exhaustive", default=False):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the rows of ``ARCHITECTURES`` that ``representative`` goes through."""
    if "representative" in metafunc.fixturenames:
        rows = ARCHITECTURES if metafunc.config.getoption("--every-architecture", default=False) else REPRESENTATIVE
        metafunc.parametrize("representative", list(rows), indirect=True, scope="session")


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


def _unsettle(network: torch.nn.Module) -> None:
    """Make random what starts as all zeros or all ones: a forgotten bias or norm weight would stay unseen there."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            # A norm of queries or keys may hold a weight for each head: a matrix.
            elif parameter.ndim == 1 or "norm" in name:
                parameter.uniform_(0.5, 1.5)


def _write(folder: Path, architecture: str) -> None:
    model_type, settings = ARCHITECTURES[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(ARCHITECTURES).index(architecture))
        tokenizer = _llama_tokenizer() if model_type in _IN_FRONT else _gpt2_tokenizer()
        end = tokenizer.eos_token_id
        begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        # The ids of padding that some families have by default are tokens of this vocabulary, or lie outside of it.
        tokens = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
        tokens["vocab_size"] = len(tokenizer)
        if "text_config" in settings:
            settings = settings | {"text_config": settings["text_config"] | tokens}
        else:
            settings = settings | tokens
        config = AutoConfig.for_model(model_type, **settings)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _unsettle(network)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The plain class name is known to every version of transformers; the one written is not.
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(written), encoding="utf-8")


def _plain(folder: Path) -> Any:
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return network.eval()


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of a row of ``ARCHITECTURES``, made when first asked for. Read-only."""
    home = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            _write(home / architecture, architecture)
            made[architecture] = home / architecture
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def architectures() -> list[str]:
    """The rows of ``ARCHITECTURES``."""
    return list(ARCHITECTURES)


@pytest.fixture(scope="session")
def folders(make_folder: Callable[[str], Path]) -> dict[str, Path]:
    """Folders of the tiny models by family, as ``save_pretrained`` writes them. Read-only."""
    return {family: make_folder(family) for family in ("gpt2", "llama")}


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """Both model families, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path], family: str) -> Path:
    """Folder of the tiny model of ``family``. Read-only: copy it to change it."""
    return folders[family]


@pytest.fixture(scope="session")
def loaded(make_folder: Callable[[str], Path]) -> Callable[[str], at.Model]:
    """Load the tiny model of a family, or of another row of ``ARCHITECTURES``, once per session. Read-only."""
    cache: dict[str, at.Model] = {}

    def load(architecture: str) -> at.Model:
        if architecture not in cache:
            cache[architecture] = at.load(str(make_folder(architecture)))
        return cache[architecture]

    return load


@pytest.fixture(scope="session")
def model(loaded: Callable[[str], at.Model], family: str) -> at.Model:
    """The tiny model of ``family``, loaded by this package."""
    return loaded(family)


@pytest.fixture(scope="session")
def plain(folder: Path) -> Any:
    """The same weights in plain transformers, without this package. Read-only: copy it to edit it."""
    return _plain(folder)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    """The tokenizer of ``family``, in plain transformers."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def plain_logits(plain: Any, tokenizer: Any) -> Callable[..., torch.Tensor]:
    """Logits at the last position by plain transformers, (vocabulary,), of ``plain`` or of an edited copy.

    Only that position is unembedded, as in a rerun: a product of another shape is rounded otherwise.
    """

    def logits(prompt: str, network: Any = None) -> torch.Tensor:
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = (network or plain)(**tokens, logits_to_keep=1)
        return output.logits[0, -1]

    return logits


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every row of ``ARCHITECTURES``, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def architecture_folder(make_folder: Callable[[str], Path], architecture: str) -> Path:
    """Folder of the tiny model of ``architecture``. Read-only: copy it to change it."""
    return make_folder(architecture)


@pytest.fixture(scope="session")
def architecture_model(loaded: Callable[[str], at.Model], architecture: str) -> at.Model:
    """The tiny model of ``architecture``, loaded by this package."""
    return loaded(architecture)


@pytest.fixture(scope="session")
def architecture_plain(architecture_folder: Path) -> Any:
    """The same weights in plain transformers, without this package. Read-only: copy it to edit it."""
    return _plain(architecture_folder)


@pytest.fixture(scope="session")
def representative(request: pytest.FixtureRequest) -> str:
    """Every row of ``REPRESENTATIVE``, one after the other; all of ``ARCHITECTURES`` if the command line says so."""
    return str(request.param)


@pytest.fixture(scope="session")
def representative_model(loaded: Callable[[str], at.Model], representative: str) -> at.Model:
    """The tiny model of ``representative``, loaded by this package."""
    return loaded(representative)


@pytest.fixture(scope="session")
def representative_plain(make_folder: Callable[[str], Path], representative: str) -> Any:
    """The same weights in plain transformers, without this package. Read-only: copy it to edit it."""
    return _plain(make_folder(representative))


@dataclass(frozen=True)
class _Ended:
    """What pytester waits for."""

    status: int
    stdin: None = None

    def wait(self) -> int:
        return self.status


@pytest.fixture
def pytester(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> pytest.Pytester:
    """Run pytest in forked processes, which have torch already; in new ones where a test is marked ``own_process``."""

    def fork(words: list[str], stdout: Any, stderr: Any, **_: Any) -> _Ended:
        python, module, *options = words
        assert (python, module) == (sys.executable, "-mpytest")
        streams = Path(stdout.name), Path(stderr.name)
        return _Ended(forked.run(["-m", "pytest", *options], Path.cwd(), os.environ, *streams))

    if forked.available() and request.node.get_closest_marker("own_process") is None:
        pytester.popen = fork  # type: ignore[method-assign, assignment]
    return pytester
