"""Folders of models with one thing or several that are unusual or wrong: right numbers, or one sentence.

Each folder is a tiny model of some family with a trouble of its tokenizer, of its config and of its files. What is
unusual and harmless must leave the numbers of the untouched folder, computed by plain transformers in float64; what is
wrong must be said in one sentence about one of the causes.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import attribution as at
from attribution.models.anatomy import resolve
from attribution.models.families import FAMILIES

PROMPT, ANSWER = "The capital of France is", " Paris"
# How far log p may be from float64's, in nats, by the type of the weights.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.25}
WEIGHTS, CONFIG, WORDS, SETTINGS = "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"
# What the preflight says of families with a sliding window in float64: transformers masks whole rows of padding there.
MASKED = "float64 may mask whole rows of padding"
# Neurons that are zeroed: the first of the first layer, and one of the last.
NEURONS = (at.FFNNeuron(0, 0), at.FFNNeuron(2, 5))

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Trouble:
    """Something about a folder.

    Attributes:
        name: What.
        change: How it is made.
        says: What one sentence has to say of it; empty for what must change no number.
        ids: The prompt's tokens with it, from those without, and the tokenizer's id of its end.
    """

    name: str
    change: Change
    says: str = ""
    ids: Callable[[list[int], int], list[int]] = lambda ids, _: ids


def _none(_: Path) -> None:
    """Leave the folder as it is."""


def _edit(file: str, **values: Any) -> Change:
    """Change settings of a JSON file, and of the language model's config inside of one that reads images too."""

    def change(folder: Path) -> None:
        path = folder / file
        written = json.loads(path.read_text(encoding="utf-8"))
        for part in (written, written.get("text_config")):
            if part is not None:
                part |= {key: value(part) if callable(value) else value for key, value in values.items()}
        path.write_text(json.dumps(written), encoding="utf-8")

    return change


def _layers(more: int) -> Change:
    """Name another number of layers than the weights have."""

    def change(folder: Path) -> None:
        path = folder / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        part = config.get("text_config", config)
        key = next(each for each in ("n_layer", "num_layers", "num_hidden_layers") if each in part)
        part[key] += more
        for lists in ("layer_types", "attention_layers"):
            if lists in part:
                part[lists] = [*part[lists], part[lists][-1]][: part[key]]
        if "attention_types" in part:
            part["attention_types"] = [[["global"], part[key]]]
        path.write_text(json.dumps(config), encoding="utf-8")

    return change


def _half(file: str) -> Change:
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: (folder / file).stat().st_size // 2]
    )


def _removed(*files: str) -> Change:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return change


def _written(file: str, content: bytes = b"{}") -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def _stored_as(dtype: torch.dtype) -> Change:
    return _weights(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


def _with_a_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    return tensors


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _sharded(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _without_a_shard(folder: Path) -> None:
    _sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _words(change: Callable[[Any], None]) -> Change:
    """Change the tokenizer itself."""

    def changed(folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        change(tokenizer)
        tokenizer.backend_tokenizer.save(str(folder / WORDS))

    return changed


def _around(first: bool) -> Callable[[Any], None]:
    """End every text with EOS, and begin it with BOS, or with EOS where there is no other."""

    def change(tokenizer: Any) -> None:
        end, begin = tokenizer.eos_token, tokenizer.bos_token or tokenizer.eos_token
        begins = first or tokenizer.bos_token is not None
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}" if begins else f"$A {end}",
            special_tokens=[(each, tokenizer.convert_tokens_to_ids(each)) for each in {begin, end}],
        )

    return change


def _begun(ids: list[int], end: int) -> list[int]:
    """The llama-like tokenizers begin with BOS anyway, whose id is 1."""
    return ids if ids[0] == 1 else [end, *ids]


def _without_the_answer(folder: Path) -> None:
    words = {word: number for number, word in enumerate(["<unk>", *PROMPT.split(), "Rome"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _replaced(folder, tokenizer)


def _beyond_the_embedding(folder: Path) -> None:
    words = {word: 10_000 + number for number, word in enumerate(["<unk>", *PROMPT.split(), "Paris"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _replaced(folder, tokenizer)


def _without_words(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    _replaced(folder, tokenizer)


def _replaced(folder: Path, tokenizer: Tokenizer) -> None:
    for file in (WORDS, SETTINGS, "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


SOUND = Trouble("sound", _none)
# Some families' classes of tokenizers cut texts in their own way, and find no word of another's.
NO_WORDS = "no tokens of any of its own words"
NO_TOKENIZER, DAMAGED, LACKS, LEFT = "tokenizer", "cannot be loaded from the folder", "lacks", "has no use for"
TOKENIZERS = (
    SOUND,
    Trouble("texts end with EOS", _words(_around(first=False))),
    Trouble("special tokens at both ends", _words(_around(first=True)), ids=_begun),
    Trouble("padding on the left", _edit(SETTINGS, padding_side="left", truncation_side="left")),
    Trouble("a short maximum", _edit(SETTINGS, model_max_length=4)),
    Trouble("a chat template", _edit(SETTINGS, chat_template="{{ messages }}")),
    Trouble(
        "tokens beyond the embedding that no prompt has", _words(lambda tokenizer: tokenizer.add_tokens(["<name>"]))
    ),
    Trouble("no tokenizer", _removed(WORDS, SETTINGS, "special_tokens_map.json"), NO_TOKENIZER),
    Trouble("a tokenizer without words", _without_words, NO_TOKENIZER),
    Trouble("half of a tokenizer", _half(WORDS), DAMAGED),
    Trouble("the answer is unknown", _without_the_answer, f"not in the model's vocabulary|{NO_WORDS}"),
    Trouble("all tokens are beyond the embedding", _beyond_the_embedding, f"no embedding|{NO_WORDS}"),
)
CONFIGS = (
    SOUND,
    Trouble("return_dict", _edit(CONFIG, return_dict=False)),
    Trouble("use_cache", _edit(CONFIG, use_cache=True)),
    Trouble("output_attentions", _edit(CONFIG, output_attentions=True)),
    Trouble("output_hidden_states", _edit(CONFIG, output_hidden_states=True)),
    Trouble("another attention", _edit(CONFIG, _attn_implementation="sdpa", attn_implementation="sdpa")),
    Trouble("an attention that is not here", _edit(CONFIG, _attn_implementation="flash_attention_2")),
    Trouble("another type of weights", _edit(CONFIG, dtype="float16", torch_dtype="float16")),
    Trouble("another class", _edit(CONFIG, architectures=["BertForMaskedLM"])),
    Trouble("code of its own that is not needed", _edit(CONFIG, auto_map={"AutoModelForCausalLM": "own.Model"})),
    Trouble("a padding token", _edit(CONFIG, pad_token_id=0)),
    Trouble("an old version", _edit(CONFIG, transformers_version="4.1.0")),
    Trouble(
        "dropout",
        _edit(CONFIG, **dict.fromkeys(("attention_dropout", "resid_pdrop", "attn_pdrop", "dropout"), 0.5)),
    ),
    Trouble("settings of other tasks", _edit(CONFIG, torchscript=True, chunk_size_feed_forward=2, id2label={"0": "a"})),
    Trouble("one layer fewer", _layers(-1), LEFT),
    Trouble("one layer more", _layers(1), LACKS),
    Trouble("quantised by a library", _edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), "."),
    Trouble("an unknown architecture", _edit(CONFIG, model_type="mystery"), "mystery"),
    Trouble("a larger vocabulary", _edit(CONFIG, vocab_size=lambda part: part.get("vocab_size", 400) + 8), "."),
    Trouble("half of a config", _half(CONFIG), "."),
    Trouble("no config", _removed(CONFIG), "."),
)
FILES = (
    SOUND,
    Trouble("two shards", _sharded),
    Trouble("bfloat16", _stored_as(torch.bfloat16)),
    Trouble("float16", _stored_as(torch.float16)),
    Trouble("float64", _stored_as(torch.float64)),
    Trouble("pickles of a trainer", _written("training_args.bin", b"\x80")),
    Trouble(
        "settings of generation",
        _written("generation_config.json", b'{"num_beams": 4, "return_dict_in_generate": true}'),
    ),
    Trouble("a GGUF file beside the weights", _written("other.gguf", b"GGUF")),
    Trouble("masks of old versions", _weights(lambda tensors: tensors | {"x.0.attn.masked_bias": torch.zeros(1)})),
    Trouble("an adapter", _written("adapter_config.json"), "adapter"),
    Trouble("weights of an adapter", _written("adapter_model.safetensors"), "adapter"),
    Trouble("only pickled weights", _pickled, "only pickled ones"),
    Trouble("no weights", _removed(WEIGHTS), "no weights"),
    Trouble("half of the weights", _half(WEIGHTS), DAMAGED),
    Trouble("a shard is missing", _without_a_shard, DAMAGED),
    Trouble("a tensor too many", _weights(lambda tensors: tensors | {"v_head.weight": torch.zeros(3)}), LEFT),
    Trouble("a tensor like a mask", _weights(lambda own: own | {"x.0.attn.bias.lora_A.weight": torch.zeros(3)}), LEFT),
    Trouble("a tensor too few", _weights(lambda tensors: dict(sorted(tensors.items())[:-1])), LACKS),
    Trouble("a weight that is no number", _weights(_with_a_nan), "NaN"),
)


@cache
def _untouched(folder: Path, weights: str) -> Any:
    """Return plain transformers' model of a folder in float64, its weights stored in some type before."""
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    if weights in ("bfloat16", "float16"):
        network.load_state_dict(
            {name: tensor.to(getattr(torch, weights)).double() for name, tensor in network.state_dict().items()}
        )
    return network.eval()


def _expected(folder: Path, weights: str, ids: list[int], answer: int, neurons: tuple[at.FFNNeuron, ...]) -> float:
    """Return log p of the answer with neurons zeroed, by hooks on plain transformers in float64."""
    network = _untouched(folder, weights)
    family = FAMILIES[network.config.model_type]

    def zero(_: Any, inputs: tuple[torch.Tensor, ...], index: int) -> tuple[torch.Tensor, ...]:
        changed = inputs[0].clone()
        changed[..., index] = 0
        return (changed, *inputs[1:])

    handles = [
        resolve(resolve(network, family.blocks)[each.layer], family.ffn_out).register_forward_pre_hook(
            lambda module, inputs, index=each.index: zero(module, inputs, index)
        )
        for each in neurons
    ]
    try:
        with torch.no_grad():
            logits = network(torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return float(logits.log_softmax(-1)[answer])


def _drawn(number: int, architectures: list[str]) -> Iterator[tuple[str, tuple[Trouble, Trouble, Trouble], str]]:
    """Yield architectures, troubles and types of weights: each trouble alone first, then any that come together."""
    draw = random.Random(0)
    types = list(TOLERANCE)
    alone = [
        *((each, SOUND, SOUND) for each in TOKENIZERS),
        *((SOUND, each, SOUND) for each in CONFIGS),
        *((SOUND, SOUND, each) for each in FILES),
    ]
    for count in range(number):
        troubles = (
            alone[count] if count < len(alone) else tuple(draw.choice(each) for each in (TOKENIZERS, CONFIGS, FILES))
        )
        yield draw.choice(architectures), troubles, draw.choice(types)


def _problem(sound: Path, folder: Path, troubles: tuple[Trouble, ...], dtype: str) -> str:
    """Return what is wrong with how a folder is taken when it has troubles; nothing if it is taken as it should."""
    shutil.copytree(sound, folder)
    for each in troubles:
        each.change(folder)
    expected = [each.says for each in troubles if each.says]
    try:
        model = at.load(str(folder), dtype=dtype)
        before = at.evaluate(model, [at.Prompt(PROMPT, ANSWER)], method="random", k=1)["logp_before"].item()
        best = at.attribute(model, PROMPT, ANSWER, k=2)
        neurons = (*NEURONS, *best.neurons)
        after = at.measure(at.ablate(model, PROMPT, list(neurons)), best.answer_id).logp
        checks = len(at.preflight(model))
    except at.AttributionError as error:
        said = str(error)
        if "\n" in said or not said.endswith(".") or len(said) > 700:
            return f"not one sentence: {said}"
        if dtype == "float64" and MASKED in said:
            return ""
        if not expected:
            return f"refused: {said}"
        return "" if any(re.search(each, said) for each in expected) else f"another cause than {expected}: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    if expected:
        return f"taken although {expected}: {checks} identities hold"
    plain = AutoTokenizer.from_pretrained(sound)
    ids, weights = plain.encode(PROMPT), troubles[-1].name
    answer = plain.encode(PROMPT + ANSWER)[-1]
    for each in troubles:
        ids = each.ids(ids, plain.eos_token_id)
    wanted = [_expected(sound, weights, ids, answer, each) for each in ((), neurons)]
    errors = [abs(found - own) for found, own in zip((before, after), wanted, strict=True)]
    return "" if max(errors) <= TOLERANCE[dtype] else f"log p {before}, {after} instead of {wanted}"


def test_every_folder_gives_right_numbers_or_one_sentence(
    request: pytest.FixtureRequest, architectures: list[str], make_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    number = request.config.getoption("--folders") or (200 if request.config.getoption("--exhaustive") else 60)
    problems = []
    for architecture, troubles, dtype in _drawn(number, architectures):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = _problem(make_folder(architecture), tmp_path / "model", troubles, dtype)
        if problem:
            problems.append(f"{architecture}, {', '.join(each.name for each in troubles)}, {dtype}: {problem}")
    assert not problems, f"{len(problems)} folders\n" + "\n".join(problems)
