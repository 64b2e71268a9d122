"""Prompts of any mix of lengths give what each gives alone, with every way to read positions that a family has."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import attribution as at
from attribution.engine.ablation import outcomes, reference_of
from attribution.engine.questions import Question
from attribution.engine.ranking import Search, rank_all
from attribution.errors import BadInputError
from attribution.models.model import Model
from attribution.prompts.tokens import chunk_by_length

# Where a model changes how it reads positions, and the lengths around that and around the window of some families.
BEYOND, CONTEXT = 16, 32
LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 18, 31, 32)

_SCALED = {"factor": 2.0, "original_max_position_embeddings": BEYOND}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", **_SCALED},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED},
    "longrope": {"rope_type": "longrope", **_SCALED},
}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": 4},
    {"sliding_window": 16},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4},
    {"window_size": 16},
    {"use_cache": True, "cache_implementation": "static"},
)


def _with(folder: Path, home: Path, settings: dict[str, Any]) -> Model | None:
    """Return a model with the weights of a folder and other settings; ``None`` if transformers does not have these."""
    config = AutoConfig.from_pretrained(folder)
    own = config.get_text_config()
    if not all(hasattr(own, name) for name in settings):
        return None
    try:
        for name, value in settings.items():
            setattr(own, name, value)
        network = AutoModelForCausalLM.from_pretrained(folder, config=config)
        shutil.rmtree(home, ignore_errors=True)
        network.save_pretrained(home)
        AutoModelForCausalLM.from_pretrained(home)(torch.tensor([[5, 6]]))
    except (StrictDataclassClassValidationError, TypeError, ValueError, ZeroDivisionError):
        return None
    AutoTokenizer.from_pretrained(folder).save_pretrained(home)
    return at.load(str(home))


def _rope(folder: Path, rope: str) -> dict[str, Any] | None:
    """Return a family's settings for a way to read positions; ``None`` for families that embed or bias them."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return None
    share = parameters.get("partial_rotary_factor", 1.0)
    angles = int(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) * share) // 2
    chosen = dict(ROPES[rope])
    if rope == "longrope":
        chosen |= {"short_factor": [1.0] * angles, "long_factor": [3.0] * angles}
    if all(isinstance(each, dict) for each in parameters.values()):
        return {"rope_parameters": {name: each | chosen for name, each in parameters.items()}}
    return {"rope_parameters": parameters | chosen}


def _questions(model: Model) -> list[Question]:
    draw = random.Random(0)
    tokens = range(5, model.anatomy.vocabulary)
    lengths = [each for each in LENGTHS if each <= (model.anatomy.context or CONTEXT)]
    return [Question(str(length), " x", tuple(draw.choices(tokens, k=length)), 7) for length in lengths]


def _check(model: Model) -> None:
    """Batches of any lengths give the outcomes and the rankings of prompts that run alone."""
    questions = _questions(model)
    alone = {each: outcomes(model, [each], [()])[0][0].logp for each in reversed(questions)}
    draw = random.Random(1)
    for tokens in (model.batch_tokens, 40, 40):
        mixed = draw.sample(questions, draw.randint(2, len(questions))) if tokens == 40 else questions
        together, _ = outcomes(model.with_batch_tokens(tokens), mixed, [()] * len(mixed))
        assert [each.logp for each in together] == pytest.approx([alone[each] for each in mixed], abs=1e-4)
    wanted = {"log_prob_increase": {"neuron": 3}}
    for question, found in zip(questions, rank_all(model, questions, wanted, Search()), strict=True):
        (own,) = rank_all(model, [question], wanted, Search())
        one, other = (each["log_prob_increase"]["neuron"] for each in (found, own))
        assert one.scores.tolist() == pytest.approx(other.scores.tolist(), abs=1e-4), question.text


def test_batched_is_single_however_positions_are_read(
    architecture: str, make_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = make_folder(architecture)
    checked = []
    for rope in ROPES:
        settings = _rope(folder, rope)
        model = None if settings is None else _with(folder, tmp_path / "model", settings)
        if model is not None:
            assert bool(model.anatomy.breaks) == (rope == "longrope")
            _check(model)
            checked.append(rope)
    parameters = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "rope_parameters", None)
    assert checked[:1] == (["default"] if parameters else [])


def test_batched_is_single_with_windows_and_caches(
    architecture: str, make_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for settings in SETTINGS:
        model = _with(make_folder(architecture), tmp_path / "model", settings)
        if model is not None:
            _check(model)


def test_rows_on_both_sides_of_a_length_do_not_run_together() -> None:
    lengths = [3, 20, 16, 17, 1]
    assert list(chunk_by_length(lengths, 1000)) == [[4, 0, 2, 3, 1]]
    assert list(chunk_by_length(lengths, 1000, breaks=[16])) == [[4, 0, 2], [3, 1]]


@pytest.fixture
def long_rope(make_folder: Callable[[str], Path], tmp_path: Path) -> Model:
    """A model that reads positions otherwise in texts of more than :data:`BEYOND` tokens."""
    settings = _rope(make_folder("llama"), "longrope")
    assert settings is not None
    model = _with(make_folder("llama"), tmp_path / "model", settings)
    assert model is not None
    return model


def test_a_longer_row_would_change_how_shorter_ones_are_read(long_rope: Model) -> None:
    """What breaks are for: without them the same prompts get other numbers beside a long one."""
    model = long_rope
    careless = replace(model, anatomy=replace(model.anatomy, breaks=()))
    questions = _questions(model)
    careful, mixed = (outcomes(each, questions, [()] * len(questions))[0] for each in (model, careless))
    moved = [abs(one.logp - other.logp) > 1e-3 for one, other in zip(careful, mixed, strict=True)]
    short = [1 < len(question.ids) <= BEYOND for question in questions]
    assert moved == short


def test_no_prompt_takes_its_values_from_one_that_is_read_otherwise(long_rope: Model) -> None:
    model = long_rope
    short, *_, long = _questions(model)
    values = reference_of(model, "resample", [short.ids, long.ids], ablated=[short.ids])
    with pytest.raises(BadInputError, match=r"of 1 tokens .* one of 32.* more than 16 tokens"):
        outcomes(model, [short], [[at.FFNNeuron(0, 1)]], reference=values)
