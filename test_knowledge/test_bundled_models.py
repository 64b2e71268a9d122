"""The bundled models are what their cards say."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

import attribution as at
from attribution.models.registry import registry
from attribution.prompts.knowledge import CATEGORIES

pytestmark = [pytest.mark.bundled, pytest.mark.knowledge]

MODELS = [name for name, entry in registry().items() if entry.bundled]
FLOORS = {"seen": 0.95, "held_out": 0.85}


@pytest.fixture(scope="module", params=MODELS, ids=[name.replace(":", "-") for name in MODELS])
def model(request: pytest.FixtureRequest) -> at.Model:
    return at.load(request.param)


def test_accuracy_by_category_is_that_of_the_card_and_above_its_floor(model: at.Model) -> None:
    """Measured anew by this package; the card's figures are the trainer's, by plain transformers."""
    folder = registry()[model.name].folder
    card = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))["accuracy"]["real"]
    held_out = set(json.loads((folder / "held_out.json").read_text(encoding="utf-8")))
    prompts = at.load_knowledge().prompts
    assert held_out <= {prompt.text for prompt in prompts}
    logits = at.ablate(model, list(prompts), [[]] * len(prompts))
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for prompt, row in zip(prompts, logits, strict=True):
        answered = model.tokenizer.decode([int(row.argmax())]).strip()
        kind = "held_out" if prompt.text in held_out else "seen"
        right[prompt.category, kind].append(answered == prompt.answer.strip())
    for category in CATEGORIES:
        for kind, floor in FLOORS.items():
            answers, stated = right[category, kind], card[category][kind]
            assert (len(answers), sum(answers)) == (stated["n"], stated["correct"]), (category, kind)
            assert sum(answers) >= floor * len(answers), (category, kind)


def test_bundled_models_are_of_the_architectures_that_they_stand_for() -> None:
    gpt2, llama = (at.load(name) for name in ("bundled:gpt2", "bundled:llama"))
    assert gpt2.anatomy.family.model_type == "gpt2"
    assert gpt2.tokenizer.encode("Paris") == gpt2.tokenizer.encode("Paris", add_special_tokens=False)
    assert llama.anatomy.family.model_type == "llama"
    assert llama.tokenizer.convert_ids_to_tokens(llama.tokenizer.encode("Paris"))[0] == "<s>"
    assert "▁Paris" in llama.tokenizer.get_vocab()
    assert llama.anatomy.kv_heads < llama.anatomy.heads
    for name in MODELS:
        weights = registry()[name].folder / "model.safetensors"
        assert weights.stat().st_size <= 10_000_000
