"""From text to right-padded token batches, and from an answer to its one token.

Padding is always on the right and the last real token is read: left padding shifts the positions of models
with absolute position embeddings (GPT-2) without any error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from attribution.errors import BadInputError
from attribution.models.tokenizer import tokens_of, unknown_of

__all__ = [
    "TokenBatch",
    "UnknownWordWarning",
    "answer_tokens",
    "chunk_by_length",
    "encode",
    "pad",
]


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids.

    Attributes:
        ids: (batch, position), long.
        mask: (batch, position), 1 at real tokens, 0 at padding.
        last: (batch,), the position of each row's last real token.
    """

    ids: Tensor
    mask: Tensor
    last: Tensor

    def inputs(self) -> dict[str, Tensor | bool]:
        """Return the keyword arguments of a transformers model; no pass is gone on from, so none keeps a cache."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}

    def repeat_rows(self, rows: Tensor) -> TokenBatch:
        """Return the batch whose row i is row ``rows[i]`` of this one."""
        return TokenBatch(self.ids[rows], self.mask[rows], self.last[rows])


def encode(tokenizer: Any, text: str, *, context: int | None, vocabulary: int) -> list[int]:
    """Return the token ids of a prompt, with the special tokens that the tokenizer puts first.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The prompt.
        context: Tokens that the model's context holds; ``None`` if it is not limited.
        vocabulary: How many tokens the model has an embedding for.

    Raises:
        BadInputError: If the prompt is not a string, is empty, is longer than the context, or has a token that the
            model has no embedding for.
    """
    if not isinstance(text, str):
        raise BadInputError(f"prompt {text!r} is a {type(text).__name__}, not a string; pass the text itself.")
    if not text.strip():
        raise BadInputError(f"prompt {text!r} is empty; give at least one word before the answer.")
    _check_characters(text, "prompt")
    ids = tokens_of(tokenizer, text)
    if context is not None and len(ids) > context:
        raise BadInputError(
            f"prompt {text[:40]!r}... has {len(ids)} tokens, but the model's context holds {context}; shorten it."
        )
    _check_embedded(tokenizer, ids, vocabulary, f"prompt {text[:40]!r}")
    unknown = _unknown(tokenizer, ids, text)
    if unknown and tokenizer not in _warned_of:
        _warned_of.add(tokenizer)
        warnings.warn(
            f"prompt {text[:40]!r} has words that the tokenizer does not know ({', '.join(map(repr, unknown))}): the "
            f"model reads {unknown_of(tokenizer)[0]!r} instead; other prompts with unknown words get no warning",
            UnknownWordWarning,
            stacklevel=2,
        )
    return ids


def _check_characters(text: str, what: str) -> None:
    if re.search("[\ud800-\udfff]", text):
        raise BadInputError(f"{what} {text!r} holds half of a character; give both halves, or leave it out.")


class UnknownWordWarning(UserWarning):
    """A prompt has words that the model's tokenizer does not know."""


# Tokenizers whose unknown words a warning has named: thousands of prompts may have some.
_warned_of: WeakSet[Any] = WeakSet()


def _check_embedded(tokenizer: Any, ids: Sequence[int], vocabulary: int, what: str) -> None:
    beyond = next((token for token in ids if not 0 <= token < vocabulary), None)
    if beyond is not None:
        raise BadInputError(
            f"{what} has the token {tokenizer.decode([beyond])!r} ({beyond}), for which the model has no embedding (it "
            f"has {vocabulary:,}); leave it out, or use the tokenizer that the model was trained with."
        )


def _unknown(tokenizer: Any, ids: Sequence[int], text: str) -> list[str]:
    """Return the words of a text that the tokenizer has no tokens for; none where it spells its unknown token out."""
    name, unknown = unknown_of(tokenizer)
    if name is None or unknown not in ids or name in text:
        return []
    # Not what the tokenizer itself puts in front, which may be the same token.
    if unknown not in tokenizer.encode(text, add_special_tokens=False):
        return []
    words = [word for word in text.split() if unknown in tokenizer.encode(word, add_special_tokens=False)]
    return words or [text]


def answer_tokens(tokenizer: Any, prompt: str, answer: str, *, vocabulary: int, joined: bool = False) -> list[int]:
    """Return the token ids of an answer as it continues the prompt, at least one.

    The answer is tokenised in place, so that byte-level and metaspace tokenizers need no cases of their own.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: The prompt.
        answer: The answer.
        vocabulary: How many tokens the model has an embedding for.
        joined: Whether an answer without a leading space is meant to continue the prompt's last word.

    Raises:
        BadInputError: If the answer is not a string, is empty, merges with the prompt, or seems to have lost its
            leading space; or has a token that the tokenizer does not know or the model has no embedding of.
    """
    if not isinstance(answer, str):
        raise BadInputError(f"answer {answer!r} is a {type(answer).__name__}, not a string; pass one word.")
    if not answer.strip():
        raise BadInputError(f"answer {answer!r} is empty; give one word with its leading space, such as ' Paris'.")
    _check_characters(answer, "answer")
    if prompt[-1:].isspace():
        raise BadInputError(
            f"prompt {prompt!r} ends in a space before answer {answer!r}; end the prompt with its last word and begin "
            "the answer with the space."
        )
    before = tokens_of(tokenizer, prompt)

    def continued(by: str) -> list[int]:
        after = tokens_of(tokenizer, prompt + by)
        return after[len(before) :] if after[: len(before)] == before else []

    if not joined and _has_case(prompt[-1:]) and _has_case(answer[0]) and len(continued(f" {answer}")) == 1:
        raise BadInputError(
            f"answer {answer!r} would join the last word of prompt {prompt!r}; give it a leading space (did you mean "
            f"{' ' + answer!r}?), or, if it is to go on with that word, say that it is joined."
        )
    pieces = continued(answer)
    if not pieces:
        raise BadInputError(
            f"answer {answer!r} merges with the end of prompt {prompt!r}; begin the answer with a space, or choose "
            "another."
        )
    _check_embedded(tokenizer, pieces, vocabulary, f"answer {answer!r}")
    if _unknown(tokenizer, pieces, answer):
        raise BadInputError(
            f"answer {answer!r} is not in the model's vocabulary: its tokenizer makes {unknown_of(tokenizer)[0]!r} of "
            "it, as of any word that it does not know; choose another."
        )
    return pieces


def _has_case(character: str) -> bool:
    """Whether a character is a letter of a script that puts spaces between words, as those with capitals do."""
    return character.lower() != character.upper()


def pad(rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> TokenBatch:
    """Right-pad token lists with 0, which the mask hides."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return TokenBatch(ids.to(device), mask.to(device), (lengths - 1).to(device))


def chunk_by_length(lengths: Sequence[int], max_tokens: int, *, breaks: Collection[int] = ()) -> Iterator[list[int]]:
    """Yield row numbers in chunks of similar length, each at most ``max_tokens`` after padding.

    Args:
        lengths: Tokens of each row.
        max_tokens: Tokens in one chunk.
        breaks: Lengths up to which rows must not be in one chunk with longer ones.
    """
    chunk: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        # Rows come in rising length, so the new row sets the padded width.
        apart = chunk and any(lengths[chunk[-1]] <= each < lengths[row] for each in breaks)
        if chunk and (apart or (len(chunk) + 1) * lengths[row] > max_tokens):
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
