"""Models known by name: what the registry says of them, and what a pyproject.toml may add."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attribution.__main__ import main
from attribution.errors import BadInputError
from attribution.gate.storage import read
from attribution.models.families import FAMILIES as KNOWN_TYPES
from attribution.models.registry import FAMILIES, KNOWLEDGE_FAMILIES, declare, entry_of, registry

# The model type of each hub id, as its config.json says.
MODEL_TYPES = {
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2",
    "openai-community/gpt2-large": "gpt2",
    "openai-community/gpt2-xl": "gpt2",
    "huggyllama/llama-7b": "llama",
    "meta-llama/Llama-2-7b-hf": "llama",
    "meta-llama/Llama-3.2-1B": "llama",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "Qwen/Qwen2.5-0.5B": "qwen2",
    "Qwen/Qwen3-0.6B": "qwen3",
    "EleutherAI/pythia-410m": "gpt_neox",
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "google/gemma-2-2b": "gemma2",
    "allenai/OLMo-2-0425-1B": "olmo2",
}


@pytest.fixture(autouse=True)
def _forget_what_was_declared(tmp_path: Path) -> Iterator[None]:
    yield
    empty = tmp_path / "empty.toml"
    empty.write_text("", encoding="utf-8")
    declare(empty)


def _declared(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "pyproject.toml"
    file.write_text(text, encoding="utf-8")
    return declare(file)


def test_every_real_model_is_pinned_and_of_a_known_type() -> None:
    real = {entry.source: entry for entry in registry().values() if not entry.bundled and not entry.parts}
    assert real.keys() == MODEL_TYPES.keys()
    assert set(MODEL_TYPES.values()) <= KNOWN_TYPES.keys()
    for entry in real.values():
        assert re.fullmatch(r"[0-9a-f]{40}", entry.revision), entry.name
        assert entry.value_neurons == {"attention": 200, "ffn": 100}
    assert len({entry.revision for entry in real.values()}) == len(real)
    markers = [entry.marker for entry in real.values()]
    assert len(set(markers)) == len(markers)


def test_what_is_asserted_has_a_source_and_what_was_measured_is_stored() -> None:
    measured = {
        verdict.model
        for path in (Path(__file__).parents[2] / ".attribution").glob("*.json")
        for verdict in read(path.parent, path.stem).verdicts
    }
    for entry in registry().values():
        assert set(entry.asserted) <= set(FAMILIES), entry.name
        assert all(entry.asserted.values()), entry.name
        if entry.name in measured:
            assert entry.asserted == dict.fromkeys(FAMILIES, "measured")
        else:
            # Nothing was measured on them here.
            assert "measured" not in entry.asserted.values()
            assert not entry.not_supported
    assert measured == {"bundled:gpt2", "bundled:llama", "smollm2", "gemma3_270m"}
    assert {entry.name for entry in registry().values() if entry.asserted} - measured == {"gpt2-large", "llama-7b"}


def test_model_that_nobody_named_has_the_papers_budget_and_asserts_nothing() -> None:
    entry = entry_of("org/name")
    assert (entry.marker, entry.source, entry.revision, entry.dtype) == ("", "org/name", "", "float32")
    assert entry.value_neurons == {"attention": 200, "ffn": 100}
    assert entry.asserted == {}


def test_pyproject_declares_models_by_folder_and_by_hub_id(tmp_path: Path) -> None:
    (tmp_path / "weights" / "mine").mkdir(parents=True)
    names = _declared(
        tmp_path,
        """
        [tool.other]
        x = 1
        [tool.attribution.models.mine]
        source = "weights/mine"
        value_neurons = { attention = 20, ffn = 10 }
        value_neurons_reason = "it is small"
        asserted = { deletion = "measured in May" }
        not_supported = { "30 value neurons cut mrr" = "refuted" }
        [tool.attribution.models."big-1.5"]
        source = "org/big"
        revision = "v2"
        dtype = "bfloat16"
        marker = "huge"
        """,
    )
    assert names == ["mine", "big-1.5"]
    mine, big = entry_of("mine"), entry_of("big-1.5")
    assert mine.source == str(tmp_path / "weights" / "mine")
    assert mine.local
    assert mine.marker == "mine"
    assert mine.value_neurons == {"attention": 20, "ffn": 10}
    assert mine.asserted == {"deletion": "measured in May"}
    assert not big.local
    assert big == replace(entry_of("big-1.5"), source="org/big", revision="v2", dtype="bfloat16", marker="huge")
    # Those of another project take their place.
    assert _declared(tmp_path, "[tool.attribution.models.other]\nsource = 'org/other'") == ["other"]
    assert "mine" not in registry()
    assert _declared(tmp_path, "[project]\nname = 'x'") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.attribution]\nmodel = 'x'", ["'model'", "[tool.attribution.models.NAME]"]),
        ("[tool]\nattribution = 3", ["3", "[tool.attribution.models.NAME]"]),
        ("[tool.attribution]\nmodels = ['x']", ["['x']", "[tool.attribution.models.NAME]"]),
        ("[tool.attribution.models]\nx = 'org/x'", ["'x'", "source"]),
        ("[tool.attribution.models.x]\nmarker = 'x'", ["no source", "hub id, a folder or a GGUF file"]),
        ("[tool.attribution.models.x]\nsource = ''", ["no source"]),
        ("[tool.attribution.models.x]\nsource = 7", ["no source"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nsuorce = 'y'", ["'suorce'", "revision"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nmarker = 'not a name'", ["'not a name'", "underscores"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nrevision = 3", ["revision is 3", "text"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\ndtype = 'int8'", ["dtype is 'int8'", "float32, float64"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nknown_share = 1.5", ["1.5", "below 1"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nknown_share = true", ["True", "number"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nasserted = { luck = 'y' }", ["'luck'", "superiority"]),
        (
            "[tool.attribution.models.x]\nsource = 'o/x'\nnot_supported = { y = 'supported' }",
            ["'supported'", "refuted"],
        ),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nvalue_neurons = { ffn = 0 }", ["ffn = 0", "1 or more"]),
        ("[tool.attribution.models.x]\nsource = 'o/x'\nvalue_neurons = { mlp = 9 }", ["mlp = 9", "attention and ffn"]),
        ("[tool.attribution.models.gpt2]\nsource = 'o/x'", ["'gpt2'", "choose another"]),
        ("[tool.attribution.models.'bundled:x']\nsource = 'o/x'", ["'bundled:x'", "choose another"]),
        ("[tool.attribution.models", ["must be TOML"]),
    ],
)
def test_declaration_that_cannot_be_meant_is_named_with_its_file(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(BadInputError) as caught:
        _declared(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "pyproject.toml"))
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message
    assert len(set(FAMILIES)) == len(FAMILIES)
    assert set(KNOWLEDGE_FAMILIES) < set(FAMILIES)


def test_commands_know_the_models_of_the_folder_they_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.attribution.models.mine]\nsource = 'org/mine'", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0
    assert re.search(r"^mine +mine +org/mine +float32 +no$", capsys.readouterr().out, re.MULTILINE)
