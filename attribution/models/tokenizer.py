"""What a tokenizer makes of a text: the special tokens that it puts before it stay, those behind it are left off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attribution.errors import ModelError

__all__ = ["check_tokenizer", "tokens_of", "unknown_of"]

# Any text serves to see what a tokenizer puts around it, if it makes tokens of it at all.
_PROBES = ("a", "The", "1")


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text as a prompt.

    A prompt goes on, so what a tokenizer ends a text with, such as EOS or SEP, does not belong to it: no model was
    trained to go on behind its end.

    Raises:
        ModelError: If the tokenizer puts special tokens inside a text.
    """
    whole: list[int] = tokenizer.encode(text)
    if whole == tokenizer.encode(text, add_special_tokens=False):
        return whole
    _, after = _around(tokenizer)
    end = len(whole) - len(after)
    if whole[end:] != after:
        raise ModelError(
            f"the tokenizer ends {text[:40]!r} with the tokens {whole[end:]} and other texts with {after}; use one "
            "that ends all texts alike."
        )
    return whole[:end]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before every text, and those behind it."""
    marks = {*tokenizer.all_special_ids, unknown_of(tokenizer)[1]}

    def tells(probe: str) -> bool:
        bare = tokenizer.encode(probe, add_special_tokens=False)
        return bool(bare) and marks.isdisjoint(bare)

    probe = next(each for each in _probes(tokenizer) if tells(each))
    whole: list[int] = tokenizer.encode(probe)
    bare: list[int] = tokenizer.encode(probe, add_special_tokens=False)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ModelError(
        f"the tokenizer makes {whole} of {probe!r} with its special tokens and {bare} without: they are not around the "
        "text but inside it; use a tokenizer that puts them at its ends."
    )


def unknown_of(tokenizer: Any) -> tuple[str | None, int | None]:
    """Return what a tokenizer makes of a word that it does not know, as text and as token; ``None`` if it knows all.

    Its settings need not name it: what cuts the text does.
    """
    token = tokenizer.unk_token
    if token is None:
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        token = getattr(model, "unk_token", None) or None
    return token, None if token is None else tokenizer.convert_tokens_to_ids(token)


def _probes(tokenizer: Any) -> Iterator[str]:
    """Yield texts until one of them is in the tokenizer's vocabulary: some know a few words and nothing else."""
    yield from _PROBES
    yield from (tokenizer.decode([token]) for token in tokenizer.get_vocab().values())
    # Nothing is around what no tokens are made of.
    raise ModelError("the tokenizer makes no tokens of any of its own words; use the model's own tokenizer.")


def check_tokenizer(tokenizer: Any, where: str) -> None:
    """Complain of a tokenizer that texts cannot be read with.

    Args:
        tokenizer: A tokenizer of transformers.
        where: What to call the model in errors.

    Raises:
        ModelError: If it has no words of its own, as what transformers makes of a folder without one, or puts special
            tokens inside a text.
    """
    special = set(tokenizer.all_special_ids)
    if special.issuperset(tokenizer.get_vocab().values()):
        raise ModelError(f"model {where!r} has no tokenizer; put its tokenizer.json beside the weights.")
    _around(tokenizer)
