"""From text to right-padded batches, and from an answer to the one token it must be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.errors import BadInputError
from attribution.prompts.tokens import answer_token, chunk_by_length, encode, pad

PROMPT = "The capital of France is"
SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def test_llama_prompts_begin_with_the_sentence_token_and_gpt2_prompts_do_not(tokenizer: Any, family: str) -> None:
    ids = encode(tokenizer, PROMPT, context=32)
    words = [tokenizer.convert_ids_to_tokens(token) for token in ids]
    if family == "llama":
        assert words == ["<s>", "▁The", "▁capital", "▁of", "▁France", "▁is"]
    else:
        assert words == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]


def test_a_prompt_as_long_as_the_context_is_allowed_and_one_token_more_is_not(tokenizer: Any) -> None:
    length = len(tokenizer.encode(PROMPT))
    assert len(encode(tokenizer, PROMPT, context=length)) == length
    with pytest.raises(BadInputError, match=rf"has {length} tokens.* {length - 1}\b.*shorten"):
        encode(tokenizer, PROMPT, context=length - 1)


@pytest.mark.parametrize("answer", [" Paris", " Rome", " four", " red"])
def test_an_answer_is_the_token_that_continues_the_prompt(tokenizer: Any, answer: str) -> None:
    token = answer_token(tokenizer, PROMPT, answer)
    assert tokenizer.encode(PROMPT + answer) == [*tokenizer.encode(PROMPT), token]
    assert tokenizer.convert_ids_to_tokens(token)[1:] == answer[1:]


def test_a_special_token_at_the_end_of_a_text_is_not_taken_for_the_answer() -> None:
    class Closing:
        """Puts ``</s>`` (2) behind every text, as some tokenizers do."""

        all_special_ids = (2,)

        def encode(self, text: str) -> list[int]:
            return [*(10 + len(word) for word in text.split()), 2]

    assert answer_token(Closing(), PROMPT, " Paris") == 15


def test_an_answer_of_several_tokens_is_shown_in_pieces(tokenizer: Any) -> None:
    with pytest.raises(BadInputError, match=r"answer ' Paris Rome' is 2 tokens \('.*Paris', '.*Rome'\)") as caught:
        answer_token(tokenizer, PROMPT, " Paris Rome")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("answer", ["Paris", "Rome"])
def test_an_answer_without_its_leading_space_gets_the_hint(tokenizer: Any, answer: str) -> None:
    """Even where it is one token: "Paris" after "is" would be the rare continuation "isParis"."""
    with pytest.raises(BadInputError, match=f"give it a leading space .did you mean ' {answer}'"):
        answer_token(tokenizer, PROMPT, answer)


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_an_empty_answer_is_an_error(tokenizer: Any, answer: str) -> None:
    with pytest.raises(BadInputError, match="is empty; give one word"):
        answer_token(tokenizer, PROMPT, answer)


def test_padding_is_on_the_right_and_hidden() -> None:
    batch = pad([[5, 6, 7], [8], [9, 4]])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 4, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.last.tolist() == [2, 0, 1]
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "use_cache"}


def test_rows_are_repeated_with_their_masks() -> None:
    batch = pad([[5, 6, 7], [8]]).repeat_rows(torch.tensor([1, 0, 1]))
    assert batch.ids.tolist() == [[8, 0, 0], [5, 6, 7], [8, 0, 0]]
    assert batch.mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.last.tolist() == [0, 2, 0]


@SETTINGS
@given(lengths=st.lists(st.integers(1, 40), max_size=30), max_tokens=st.integers(1, 200))
def test_chunks_hold_every_row_once_and_stay_small(lengths: list[int], max_tokens: int) -> None:
    chunks = list(chunk_by_length(lengths, max_tokens))
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[row] for row in chunk) <= max_tokens
    # And no smaller than they need be: the first row of the next chunk would not have fitted.
    for chunk, following in pairwise(chunks):
        assert (len(chunk) + 1) * lengths[following[0]] > max_tokens
