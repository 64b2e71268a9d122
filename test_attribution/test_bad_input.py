"""Whatever is given wrongly is answered by one sentence: the value, what was expected, and what to do."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import attribution as at
from attribution.errors import AttributionError, BadInputError, ModelError, UnsupportedModelError
from attribution.models.anatomy import read_anatomy

PROMPT = "The capital of France is"
REMEDY = re.compile(
    r"\b(use|give|pass|choose|add|put|shorten|train|download|must|count|go online|end the prompt|load|leave)\b"
)


def _complaint(expected: type[AttributionError], act: Callable[[], object]) -> str:
    """Return the message of the error that ``act`` raises, once it has the form that every complaint has."""
    with pytest.raises(AttributionError) as caught:
        act()
    error, message = caught.value, str(caught.value)
    assert type(error) is expected
    assert "\n" not in message
    assert message.endswith("."), message
    assert REMEDY.search(message), f"no word on what to do: {message}"
    assert error.__suppress_context__ or (error.__cause__ is None and error.__context__ is None), "a chained traceback"
    assert error.__cause__ is None
    return message


def _copied(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def _as(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _with_other_architecture(folder: Path) -> None:
    _as(folder, model_type="xglm", vocab_size=9)


def _with_made_up_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "perceptron9"}), encoding="utf-8")


def _with_nan_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name and name.endswith("weight"))
    weights[name][3, 2] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _with_cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _with_garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _without_a_layers_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json", encoding="utf-8")


def _with_experts(folder: Path) -> None:
    _as(folder, model_type="mixtral", num_local_experts=8)


def _with_doubled_position_bias(folder: Path) -> None:
    _as(folder, model_type="falcon", alibi=True)


def _with_norms_on_the_residual_stream(folder: Path) -> None:
    _as(folder, model_type="opt", do_layer_norm_before=False)


DAMAGES: list[tuple[Callable[[Path], None], type[AttributionError], list[str]]] = [
    (_with_other_architecture, UnsupportedModelError, ["'xglm'"]),
    (_with_experts, UnsupportedModelError, ["mixture of experts (num_local_experts = 8)", "not supported yet"]),
    (_with_doubled_position_bias, UnsupportedModelError, ["alibi = True in its config, which is not supported"]),
    (_with_norms_on_the_residual_stream, UnsupportedModelError, ["do_layer_norm_before = False in its config"]),
    (_with_made_up_architecture, ModelError, ["perceptron9"]),
    (_with_nan_weight, ModelError, ["NaN", "mlp"]),
    (_with_cut_weights, ModelError, ["model.safetensors"]),
    (_with_garbage_weights, ModelError, ["model.safetensors"]),
    (_without_weights, ModelError, ["model.safetensors"]),
    (_without_a_layers_weights, ModelError, ["h.1.", "layers.1."]),
    (_without_tokenizer, ModelError, ["tokenizer"]),
    (_without_config, ModelError, ["config.json"]),
    (_with_broken_config, ModelError, ["config.json"]),
]


@pytest.mark.parametrize(
    ("damage", "expected", "names"), DAMAGES, ids=[damage.__name__.removeprefix("_") for damage, _, _ in DAMAGES]
)
def test_a_damaged_folder_is_named_with_what_is_wrong(
    folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    expected: type[AttributionError],
    names: list[str],
) -> None:
    damaged = _copied(folder, tmp_path / "damaged")
    damage(damaged)
    message = _complaint(expected, lambda: at.load(str(damaged)))
    assert str(damaged) in message
    assert any(name in message for name in names), message


class _Adapted(torch.nn.Linear):
    """What libraries for adapters and quantised weights put in the place of a projection."""


def test_modules_that_are_not_the_architectures_own_are_named(model: at.Model) -> None:
    twin = copy.deepcopy(model.network._module)
    block = model.anatomy.blocks(twin)[1]
    old = block.mlp.c_proj if hasattr(block.mlp, "c_proj") else block.mlp.down_proj
    setattr(block.mlp, "c_proj" if hasattr(block.mlp, "c_proj") else "down_proj", _Adapted(*old.weight.shape))
    message = _complaint(UnsupportedModelError, lambda: read_anatomy(twin, "adapted"))
    assert "_Adapted at" in message
    assert ".1.mlp." in message
    assert "merge adapters" in message


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        ({"name": "no-such-model"}, ModelError, ["'no-such-model'", "bundled:gpt2", "a folder"]),
        ({"name": "./nowhere"}, ModelError, ["'./nowhere'", "folder"]),
        ({"name": "/nowhere/at/all"}, ModelError, ["'/nowhere/at/all'", "folder"]),
        ({"name": "bundled:xyz"}, ModelError, ["'bundled:xyz'", "bundled:gpt2, bundled:llama"]),
        ({"name": "bundled:"}, ModelError, ["'bundled:'", "bundled:gpt2, bundled:llama"]),
        ({"name": ""}, BadInputError, ["''", "bundled:gpt2"]),
        ({"name": "  "}, BadInputError, ["'  '"]),
        ({"name": None}, BadInputError, ["None"]),
        ({"name": 7}, BadInputError, ["7"]),
        (
            {"name": "bundled:gpt2", "remote": True},
            BadInputError,
            ["'bundled:gpt2' is on this machine", "remote=False"],
        ),
        ({"name": "gpt2", "remote": "ndif"}, BadInputError, ["'ndif'", "use True, 'local' or an address"]),
        ({"name": "bundled:gpt2", "batch_tokens": 0}, BadInputError, ["0", "use 1 or more"]),
        ({"name": "bundled:gpt2", "dtype": "float"}, BadInputError, ["'float'", "float32, float64, bfloat16, float16"]),
        ({"name": "bundled:gpt2", "dtype": torch.int8}, BadInputError, ["torch.int8", "float32"]),
        ({"name": "bundled:gpt2", "dtype": 32}, BadInputError, ["32", "float32"]),
        ({"name": "bundled:gpt2", "device": "cdua"}, BadInputError, ["'cdua'", "use one of cpu"]),
        ({"name": "bundled:gpt2", "device": "meta"}, BadInputError, ["'meta'", "use one of cpu"]),
        ({"name": "bundled:gpt2", "device": "cuda:99"}, BadInputError, ["'cuda:99'", "use one of cpu"]),
        (
            {"name": "bundled:gpt2", "revision": "main"},
            BadInputError,
            ["'main' would be ignored", "leave the revision"],
        ),
        ({"name": "gpt2", "revision": ""}, BadInputError, ["''", "branch, tag or commit"]),
        ({"name": "gpt2", "revision": 7}, BadInputError, ["7", "branch, tag or commit"]),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_meant_is_named(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], expected: type[AttributionError], words: list[str]
) -> None:
    monkeypatch.delenv("ATTRIBUTION_MODELS", raising=False)
    message = _complaint(expected, lambda: at.load(**arguments))
    for word in words:
        assert word in message


@pytest.mark.parametrize("by_environment", [False, True], ids=["argument", "environment"])
def test_a_models_folder_without_the_model_says_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_environment: bool
) -> None:
    monkeypatch.setenv("ATTRIBUTION_MODELS", str(tmp_path) if by_environment else "")
    given = None if by_environment else tmp_path
    message = _complaint(ModelError, lambda: at.load("gpt2-large", models_dir=given))
    assert f"put its files in {tmp_path / 'gpt2-large'}" in message
    assert "--models-dir" in message


def test_a_models_folder_is_looked_in_first(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2").symlink_to(folder)
    model = at.load("gpt2", models_dir=tmp_path)
    assert (model.name, model.anatomy.layers) == ("gpt2", 3)
    monkeypatch.setenv("ATTRIBUTION_MODELS", str(tmp_path))
    assert at.load("gpt2").anatomy.layers == 3


def test_a_hub_that_cannot_be_reached_is_an_error_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTRIBUTION_MODELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = _complaint(ModelError, lambda: at.load("nobody/no-such-model"))
    assert "'nobody/no-such-model'" in message
    for way_out in ("go online", "--models-dir", "ATTRIBUTION_MODELS", "bundled"):
        assert way_out in message


def test_a_bundled_model_that_is_not_there_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An incomplete checkout: the registry is there, the checkpoint is not."""
    monkeypatch.setattr("attribution.models.registry.fixtures_folder", lambda name: tmp_path)
    missing = tmp_path / "gpt2"
    monkeypatch.setattr("attribution.models.loading.registry", _registry_of_one(missing))
    message = _complaint(ModelError, lambda: at.load("bundled:gpt2"))
    assert str(missing) in message
    assert "hub" not in message


def _registry_of_one(folder: Path) -> Callable[[], dict[str, Any]]:
    class Entry:
        source = folder.name

    entry = Entry()
    entry.folder = folder  # type: ignore[attr-defined]
    return lambda: {"bundled:gpt2": entry}


MISUSES: list[tuple[Callable[[at.Model], object], list[str]]] = [
    (lambda m: at.attribute(m, "", " Paris"), ["prompt ''", "empty"]),
    (lambda m: at.attribute(m, "  \n", " Paris"), ["prompt '  \\n'", "empty"]),
    (lambda m: at.attribute(m, "is " * 200, " Paris"), ["'is is", "tokens", "32", "shorten"]),
    (lambda m: at.attribute(m, 5, " Paris"), ["5", "int"]),
    (lambda m: at.attribute(m, None, " Paris"), ["None"]),
    (lambda m: at.attribute(m, [5], " Paris"), ["5", "int"]),
    (lambda m: at.attribute(m, b"is", " Paris"), ["b'is'"]),
    (lambda m: at.attribute(m, PROMPT, ""), ["answer ''", "empty"]),
    (lambda m: at.attribute(m, PROMPT), [repr(PROMPT), "without an answer"]),
    (lambda m: at.attribute(m, PROMPT, 5), ["5", "int"]),
    (lambda m: at.attribute(m, PROMPT, [5]), ["5", "int"]),
    (lambda m: at.attribute(m, PROMPT, " Paris Rome"), ["' Paris Rome'", "2 tokens", "Paris'", "Rome'"]),
    (lambda m: at.attribute(m, PROMPT, "Rome"), ["'Rome'", "did you mean ' Rome'"]),
    (lambda m: at.attribute(m, PROMPT, "Paris"), ["'Paris'", "did you mean ' Paris'"]),
    (lambda m: at.attribute(m, PROMPT + " ", "Paris"), ["'Paris'"]),
    (lambda m: at.attribute(m, [PROMPT], [" Paris", " Rome"]), ["1 prompt ", "2 answers"]),
    (lambda m: at.attribute(m, PROMPT, [" Paris", " Rome"]), ["1 prompt ", "2 answers"]),
    (lambda m: at.attribute(m, [PROMPT, PROMPT], [" Paris"]), ["2 prompts", "1 answer;"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", method="magic"), ["'magic'", "log_prob_increase", "register"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", unit="token"), ["'token'", "ffn, attention"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", unit="head", method="relp"), ["'relp'", "'head'"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", method="integrated_gradients", steps=0), ["steps", "0"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", method="integrated_gradients", steps="many"), ["steps", "'many'"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", k=0), ["k = 0", "between 1 and 144"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", k=-3), ["k = -3", "between 1 and 144"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", k=145), ["k = 145", "between 1 and 144"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", k=2.5), ["2.5"]),
    (lambda m: at.attribute(m, PROMPT, " Paris", k="3"), ["'3'"]),
    (lambda m: at.ablate(m, "", []), ["prompt ''"]),
    (lambda m: at.ablate(m, [], []), ["empty"]),
    (lambda m: at.ablate(m, [PROMPT], []), ["1 prompt ", "0 collections"]),
    (lambda m: at.ablate(m, [PROMPT], [[], []]), ["1 prompt ", "2 collections"]),
    (lambda m: at.ablate(m, PROMPT, [(0, 1)]), ["(0, 1)", "FFNNeuron"]),
    (lambda m: at.ablate(m, PROMPT, at.FFNNeuron(0, 1)), ["FFNNeuron(layer=0, index=1)"]),
    (lambda m: at.ablate(m, [PROMPT], [at.FFNNeuron(0, 1)]), ["FFNNeuron(layer=0, index=1)"]),
    (lambda m: at.ablate(m, PROMPT, [at.FFNNeuron(9, 1)]), ["FFNNeuron(layer=9, index=1)"]),
    (lambda m: at.ablate(m, PROMPT, [], kind="median"), ["'median'", "zero"]),
    (lambda m: at.evaluate(m, [PROMPT], progress=False), [repr(PROMPT), "without an answer"]),
    (lambda m: at.evaluate(m, [], progress=False), ["empty"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], kind="median", progress=False), ["'median'"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], method="magic", progress=False), ["'magic'"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], method=[], progress=False), ["method"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], unit="token", progress=False), ["'token'"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], k={"token": 3}, progress=False), ["'token'"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], k={}, progress=False), ["k", "{}"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], k=0, progress=False), ["k = 0"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], k=[], progress=False), ["k = []"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], k=[3, 3], progress=False), ["k = [3, 3]", "twice"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], kind=[], progress=False), ["kinds"]),
    (lambda m: at.evaluate(m, [at.Prompt(PROMPT, " Paris")], k=500, progress=False), ["k = 500", "144"]),
    (lambda m: at.measure(torch.tensor([1.0, float("nan")]), 0), ["NaN"]),
    (lambda m: at.measure(torch.zeros(4), 4), ["4", "0 and 3"]),
    (lambda m: at.measure(torch.zeros(2, 4), 1), ["(2, 4)"]),
    (lambda m: at.register_method("random", source="here")(len), ["'random'", "another name"]),
]


@pytest.mark.parametrize(("call", "words"), MISUSES, ids=[" ".join(words) for _, words in MISUSES])
def test_an_argument_that_cannot_be_used_is_named(
    model: at.Model, call: Callable[[at.Model], object], words: list[str]
) -> None:
    message = _complaint(BadInputError, lambda: call(model))
    for word in words:
        assert word in message, message


def test_every_error_can_be_caught_as_one(model: at.Model) -> None:
    with pytest.raises(at.AttributionError):
        at.attribute(model, PROMPT, "")
    with pytest.raises(at.AttributionError):
        at.load("no-such-model")
    with pytest.raises(ValueError, match="empty"):
        at.attribute(model, PROMPT, "")
