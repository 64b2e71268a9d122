"""What a model's tokenizer makes of texts, held against what questions take for granted: part of the preflight."""

from __future__ import annotations

from attribution.models.model import Model
from attribution.models.tokenizer import tokens_of, unknown_of
from attribution.prompts.knowledge import load_knowledge

__all__ = ["broken_continuations", "confused_texts", "wrong_beginnings"]

# Of several kinds.
_TEXTS = ("A small cat sat in a garden.", "1976", "a", "The capital of France is")


def confused_texts(model: Model) -> float:
    """Count the texts that are the same tokens as one before them, or have tokens without an embedding.

    Words that the tokenizer does not know are all alike, and are spoken of where prompts have them.
    """
    seen: set[tuple[int, ...]] = set()
    confused = 0
    for text in _TEXTS:
        ids = tuple(tokens_of(model.tokenizer, text))
        known = unknown_of(model.tokenizer)[1] not in ids
        confused += (known and ids in seen) or not all(0 <= token < model.anatomy.vocabulary for token in ids)
        seen.add(ids)
    return float(confused)


def broken_continuations(model: Model) -> float:
    """Count the bundled prompts whose answers do not follow them as tokens of their own."""
    special = set(model.tokenizer.all_special_ids) - {unknown_of(model.tokenizer)[1]}
    broken = 0
    for prompt in load_knowledge().prompts:
        before, after = (tokens_of(model.tokenizer, text) for text in (prompt.text, prompt.text + prompt.answer))
        answer = after[len(before) :]
        broken += after[: len(before)] != before or not answer or bool(special.intersection(answer))
    return float(broken)


def wrong_beginnings(model: Model) -> float:
    """Count the texts that do not begin as the tokenizer's settings say; none where they say nothing."""
    first = model.tokenizer.bos_token_id
    if model.begins is None or first is None:
        return 0
    found = [tokens_of(model.tokenizer, text)[:2].count(first) for text in _TEXTS]
    return float(sum(number != int(model.begins) for number in found))
