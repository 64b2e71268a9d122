"""GGUF files: read once by transformers, and kept in the cache as the folder that :mod:`loading` opens like any other.

A quantised weight is a number like any other once it is read: the model is what its float32 weights are. What the file
says of its tokenizer is followed where transformers does not: whether a text begins with BOS, and how digits are split.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import huggingface_hub

from attribution.errors import ModelError, UnsupportedModelError
from attribution.models.hub import cause_of
from attribution.wording import pluralize

__all__ = ["SUFFIX", "cache_folder", "described", "fingerprint_of", "folder_of", "quantisation_of"]

SUFFIX = ".gguf"
"""How the name of a GGUF file ends."""

_MAGIC = b"GGUF"
_RECORD = "gguf.json"
# Raised whenever a file is read differently, so that what an older version kept is not used.
_FORMAT = 2
_FLOATS = {"F32", "F16", "BF16", "F64"}
# What `tokenizer.ggml.pre` says of how text is cut before merges, in llama.cpp (src/llama-vocab.cpp): as GPT-2 does; so
# with every digit apart; and what transformers knows.
_AS_GPT2 = {"", "default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe", "gigachat"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# Vocabularies whose texts begin with BOS where the file is silent: SentencePiece's, and of byte-level ones these.
_BOS_UNLESS_DENIED = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken", "chameleon"}


@dataclass(frozen=True)
class _Header:
    """What a GGUF file says of itself.

    Attributes:
        architecture: As llama.cpp calls it, such as ``"llama"``.
        values: Its metadata that are numbers, texts and truth values, by key.
        numbers: How many numbers its tensors hold together.
        types: How many tensors there are of each type, such as ``{"Q4_1": 210, "F32": 61}``.
    """

    architecture: str
    values: dict[str, Any]
    numbers: int
    types: dict[str, int]


def cache_folder(kind: str) -> Path:
    """Return the folder of the hub's cache for what this package makes of files: ``HF_ASSETS_CACHE`` and so on."""
    return Path(huggingface_hub.cached_assets_path("attribution", namespace=kind, subfolder="files"))


def fingerprint_of(parts: Sequence[Path]) -> str:
    """Return the SHA-256 of files one behind the other, in hexadecimal digits; unchanged files are read once."""
    states = [(part, part.stat()) for part in parts]
    return _fingerprint(tuple((part, state.st_size, state.st_mtime_ns) for part, state in states))


@cache
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash files, each given with its size and the time of its last change."""
    digest = hashlib.sha256()
    for part, _, _ in files:
        with part.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _kept(file: Path, sha256: str) -> Path:
    """Return where what this version of transformers reads of a file is kept, or will be."""
    return cache_folder("gguf") / f"{sha256 or fingerprint_of([file])}-{_FORMAT}-{metadata.version('transformers')}"


def described(file: Path, *, sha256: str = "") -> str:
    """Return how a file's weights are quantised, without torch and transformers; vaguely before it is first read."""
    kept = _kept(file, sha256)
    return quantisation_of(kept) if kept.is_dir() else "GGUF"


def quantisation_of(folder: Path) -> str:
    """Return how the weights of a folder were quantised, such as ``"Q4_1 (210 of 272 tensors)"``; empty if not."""
    record = folder / _RECORD
    if not record.is_file():
        return ""
    types: dict[str, int] = json.loads(record.read_text(encoding="utf-8"))["types"]
    total = sum(types.values())
    quantised = sorted((each for each in types if each not in _FLOATS), key=lambda each: (-types[each], each))
    return ", ".join(quantised) + f" ({sum(types[each] for each in quantised)} of {total} tensors)" if quantised else ""


def folder_of(file: Path, name: str, *, sha256: str = "") -> Path:
    """Return the folder of safetensors, in float32, that holds what a GGUF file does; made the first time.

    Args:
        file: The file.
        name: What to call the model in errors.
        sha256: Its SHA-256 where that is known already.

    Raises:
        ModelError: If the file is damaged, no GGUF file, lacks a tokenizer or weights, or the reader is not installed.
        UnsupportedModelError: If it holds what transformers cannot read.
    """
    kept = _kept(file, sha256)
    # Apart from others, as whoever reads a damaged file again need not wait for a lock.
    if not kept.is_dir():
        header = _header(file, name)
        with filelock.FileLock(f"{kept}.lock"):
            if not kept.is_dir():
                with tempfile.TemporaryDirectory(dir=kept.parent) as work:
                    made = Path(work) / "model"
                    _convert(file, header, made, name)
                    os.replace(made, kept)
    return kept


def _damaged(file: Path, name: str, why: str) -> ModelError:
    return ModelError(f"model {name!r} cannot be read from {str(file)!r}: {why}.")


def _header(file: Path, name: str) -> _Header:
    with file.open("rb") as stream:
        begins = stream.read(len(_MAGIC))
    if begins != _MAGIC:
        raise _damaged(file, name, f"it begins with {begins!r}, and a GGUF file with {_MAGIC!r}; name the right file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise _damaged(
            file, name, "the package gguf is not installed; install it by pip install 'attribution-suite[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
        values = {
            key: field.contents()
            for key, field in reader.fields.items()
            # Lists are vocabularies: long, and read by transformers.
            if field.types and field.types[0].name != "ARRAY"
        }
        tensors = [(tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors]
        keys = set(reader.fields)
    except Exception as error:  # A damaged file breaks the reader anywhere.
        why = f"it is damaged or cut short ({type(error).__name__}: {cause_of(error)}); download it again"
        raise _damaged(file, name, why) from None
    if values.get("split.count", 1) > 1:
        raise _damaged(
            file, name, f"it is one of {values['split.count']} parts; merge them by llama-gguf-split --merge"
        )
    if "general.architecture" not in values or not tensors:
        raise _damaged(file, name, "it holds no model (it names no architecture, or has no weights); name another file")
    if "tokenizer.ggml.tokens" not in keys:
        raise _damaged(file, name, "it has no tokenizer; use a file that was converted with one")
    types = Counter(kind for kind, _ in tensors)
    return _Header(values["general.architecture"], values, sum(number for _, number in tensors), dict(types))


def _convert(file: Path, header: _Header, folder: Path, name: str) -> None:
    """Write what a GGUF file holds to a new folder, in the layout of ``save_pretrained``."""
    import transformers

    try:
        module, lacking = _module_of(file)
        tokenizer, begins = _tokenizer_of(file, header, name)
    except (ModelError, UnsupportedModelError):
        raise
    except Exception as error:  # transformers raises many kinds; each gets one sentence.
        if header.architecture in str(error) and "not supported" in str(error):
            raise UnsupportedModelError(
                f"model {name!r} has the architecture {header.architecture!r} in {str(file)!r}, which transformers "
                f"{transformers.__version__} does not read from GGUF; use its safetensors."
            ) from None
        raise _damaged(
            file, name, f"transformers cannot read it ({type(error).__name__}: {cause_of(error)}); use its safetensors"
        ) from None
    _check_whole(file, header, module, lacking, name)
    folder.mkdir()
    module.config.save_pretrained(folder)
    huggingface_hub.save_torch_state_dict(module.state_dict(), folder, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    # Newer versions of transformers do not write it; :attr:`Model.begins` reads it.
    settings = folder / "tokenizer_config.json"
    written = json.loads(settings.read_text(encoding="utf-8")) | {"add_bos_token": begins}
    settings.write_text(json.dumps(written, indent=2), encoding="utf-8")
    (folder / _RECORD).write_text(
        json.dumps({"file": file.name, "architecture": header.architecture, "types": header.types}), encoding="utf-8"
    )


def _check_whole(file: Path, header: _Header, module: Any, lacking: Sequence[str], name: str) -> None:
    """Complain of weights that the file lacks, has in another shape than it says, or has besides."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        meant = dict(AutoModelForCausalLM.from_config(module.config).named_parameters())
    shapes = {each: tuple(parameter.shape) for each, parameter in module.named_parameters()}
    wrong = [each for each, shape in shapes.items() if each in meant and tuple(meant[each].shape) != shape]
    # With tied embeddings counted once, as in the file.
    numbers = sum(parameter.numel() for parameter in meant.values())
    if lacking:
        why = f"it lacks {pluralize(len(lacking), 'weight')}, such as {lacking[0]}"
    elif wrong:
        why = f"{wrong[0]} has the shape {shapes[wrong[0]]}, and by its metadata {tuple(meant[wrong[0]].shape)}"
    elif numbers != header.numbers:
        why = f"it holds {header.numbers:,} numbers, and a model of its metadata {numbers:,}"
    else:
        return
    raise _damaged(file, name, f"{why}; it is mislabelled, or holds what transformers leaves out")


def _module_of(file: Path) -> tuple[Any, list[str]]:
    """Return the model with plain float32 weights, and the names of those that the file lacks."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions would keep the blocks and multiply by them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    silence, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Its bar of tensors is no bar of transformers' to switch off, and no log wants it.
    shown: AbstractContextManager[Any] = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with shown:
            module, report = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **options
            )
    finally:
        logging.set_verbosity(verbosity)
        if silence:
            logging.enable_progress_bar()
    # They are plain numbers now, and whoever reads the folder should not take them for quantised ones.
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return module, sorted(report["missing_keys"])


def _cut_by_transformers() -> set[str]:
    """Return the ways of cutting text that this version of transformers builds."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _tokenizer_of(file: Path, header: _Header, name: str) -> tuple[Any, bool]:
    """Return the file's tokenizer, which cuts and begins a text as the file says, and whether it begins with BOS."""
    from tokenizers import pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    values = header.values
    made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = made.backend_tokenizer
    kind, cut = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "")
    if kind == "gpt2" and cut in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind == "gpt2" and cut not in _AS_GPT2 | _cut_by_transformers():
        raise UnsupportedModelError(
            f"model {name!r} splits text in the way {cut!r} (tokenizer.ggml.pre of {str(file)!r}), which is not known "
            "here; use its safetensors."
        )
    begins = bool(values.get("tokenizer.ggml.add_bos_token", kind == "llama" or cut in _BOS_UNLESS_DENIED))
    special = {
        each: made.convert_ids_to_tokens(values[key])
        for each, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        )
        if key in values
    }
    if begins and "bos_token" not in special:
        raise _damaged(file, name, "its texts should begin with BOS, and it does not say which token that is")
    if begins:
        first = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, backend.token_to_id(first))]
        )
    else:
        # What a text ends with is left off as well: the answer comes next.
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special), begins
