"""From text to right-padded token batches, and from an answer to its one token.

Padding is always on the right and the last real token is read: left padding shifts the positions of models
with absolute position embeddings (GPT-2) without any error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attribution.errors import BadInputError

__all__ = ["TokenBatch", "answer_token", "answer_tokens", "chunk_by_length", "encode", "pad"]


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


def encode(tokenizer: Any, text: str, *, context: int | None) -> list[int]:
    """Return the token ids of a prompt, with the special tokens that the tokenizer puts first.

    Raises:
        BadInputError: If the prompt is no string, is empty, or is longer than ``context`` tokens, if limited.
    """
    if not isinstance(text, str):
        raise BadInputError(f"prompt {text!r} is a {type(text).__name__}, not a string; pass the text itself.")
    if not text.strip():
        raise BadInputError(f"prompt {text!r} is empty; give at least one word before the answer.")
    ids: list[int] = tokenizer.encode(text)
    if context is not None and len(ids) > context:
        raise BadInputError(
            f"prompt {text[:40]!r}... has {len(ids)} tokens, but the model's context holds {context}; shorten it."
        )
    return ids


def answer_tokens(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Return the token ids of an answer as it continues the prompt, at least one.

    The answer is tokenised in place, so that byte-level and metaspace tokenizers need no cases of their own.

    Raises:
        BadInputError: If the answer is not a string, is empty, or merges with the prompt.
    """
    if not isinstance(answer, str):
        raise BadInputError(f"answer {answer!r} is a {type(answer).__name__}, not a string; pass one word.")
    if not answer.strip():
        raise BadInputError(f"answer {answer!r} is empty; give one word with its leading space, such as ' Paris'.")
    if prompt[-1:].isspace():
        raise BadInputError(
            f"prompt {prompt!r} ends in a space before answer {answer!r}; end the prompt with its last word and begin "
            "the answer with the space."
        )
    if answer[0].isalnum() and prompt[-1:].isalnum():
        raise BadInputError(
            f"answer {answer!r} would join the last word of prompt {prompt!r}; give it a leading space (did you mean "
            f"{' ' + answer!r}?)."
        )
    before: list[int] = tokenizer.encode(prompt)
    after: list[int] = tokenizer.encode(prompt + answer)
    # Some tokenizers end a text with a special token, which the continuation would come before.
    while before and before[-1] in tokenizer.all_special_ids and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    pieces = after[len(before) :]
    if after[: len(before)] != before or not pieces:
        raise BadInputError(
            f"answer {answer!r} merges with the end of prompt {prompt!r}; begin the answer with a space, or choose "
            "another."
        )
    return pieces


def answer_token(tokenizer: Any, prompt: str, answer: str) -> int:
    """Return the token id of an answer as it continues the prompt.

    Raises:
        BadInputError: If the answer is not a string, is empty, is several tokens, or merges with the prompt.
    """
    pieces = answer_tokens(tokenizer, prompt, answer)
    if len(pieces) > 1:
        names = ", ".join(repr(tokenizer.decode([piece])) for piece in pieces)
        raise BadInputError(
            f"answer {answer!r} is {len(pieces)} tokens ({names}) where exactly one is needed; choose an answer of one."
        )
    return pieces[0]


def pad(rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> TokenBatch:
    """Right-pad token lists with 0, which the mask hides."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return TokenBatch(ids.to(device), mask.to(device), (lengths - 1).to(device))


def chunk_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield row numbers in chunks of similar length, each at most ``max_tokens`` after padding."""
    chunk: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        # Rows come in rising length, so the new row sets the padded width.
        if chunk and (len(chunk) + 1) * lengths[row] > max_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
