"""From text to right-padded batches, and from an answer to the one token it must be."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attribution.errors import BadInputError
from attribution.prompts.tokens import UnknownWordWarning, answer_tokens, chunk_by_length, encode, pad

PROMPT = "The capital of France is"
# More tokens than any tokenizer here has.
ALL = 10**6
SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def test_llama_prompts_begin_with_the_sentence_token_and_gpt2_prompts_do_not(tokenizer: Any, family: str) -> None:
    ids = encode(tokenizer, PROMPT, context=32, vocabulary=ALL)
    words = [tokenizer.convert_ids_to_tokens(token) for token in ids]
    if family == "llama":
        assert words == ["<s>", "▁The", "▁capital", "▁of", "▁France", "▁is"]
    else:
        assert words == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]


def test_a_prompt_as_long_as_the_context_is_allowed_and_one_token_more_is_not(tokenizer: Any) -> None:
    length = len(tokenizer.encode(PROMPT))
    assert len(encode(tokenizer, PROMPT, context=length, vocabulary=ALL)) == length
    with pytest.raises(BadInputError, match=rf"has {length} tokens.* {length - 1}\b.*shorten"):
        encode(tokenizer, PROMPT, context=length - 1, vocabulary=ALL)


@pytest.mark.parametrize("answer", [" Paris", " Rome", " four", " red"])
def test_an_answer_is_the_token_that_continues_the_prompt(tokenizer: Any, answer: str) -> None:
    (token,) = answer_tokens(tokenizer, PROMPT, answer, vocabulary=ALL)
    assert tokenizer.encode(PROMPT + answer) == [*tokenizer.encode(PROMPT), token]
    assert tokenizer.convert_ids_to_tokens(token)[1:] == answer[1:]


def test_an_answer_of_several_tokens_is_all_of_them(tokenizer: Any) -> None:
    assert len(answer_tokens(tokenizer, PROMPT, " Paris Rome", vocabulary=ALL)) == 2


@pytest.mark.parametrize("answer", ["Paris", "Rome"])
def test_an_answer_without_its_leading_space_gets_the_hint(tokenizer: Any, answer: str) -> None:
    """Even where it is one token: "Paris" after "is" would be the rare continuation "isParis"."""
    with pytest.raises(BadInputError, match=f"give it a leading space .did you mean ' {answer}'.*joined"):
        answer_tokens(tokenizer, PROMPT, answer, vocabulary=ALL)


def test_an_answer_that_is_said_to_join_the_prompt_is_taken_at_its_word(tokenizer: Any) -> None:
    pieces = answer_tokens(tokenizer, PROMPT, "Paris", vocabulary=ALL, joined=True)
    assert tokenizer.encode(PROMPT + "Paris") == [*tokenizer.encode(PROMPT), *pieces]


@pytest.mark.parametrize(("prompt", "answer"), [("The war lasted from 1745 to 17", "4"), ("东京是日本的首", "都")])
def test_digits_and_scripts_without_spaces_join_the_prompt(prompt: str, answer: str) -> None:
    """No space is missing there."""
    tokenizer = _wordwise(*prompt.split(), "4", *"东京是日本的首都")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_tokens([answer])
    before = tokenizer.encode(prompt)
    (token,) = answer_tokens(tokenizer, prompt, answer, vocabulary=ALL)
    assert tokenizer.encode(prompt + answer) == [*before, token]


@pytest.mark.parametrize(("prompt", "answer"), [("\ud800", " Paris"), (PROMPT, "\ud800"), (PROMPT, " a\udfff")])
def test_half_of_a_character_is_an_error(tokenizer: Any, prompt: str, answer: str) -> None:
    def ask() -> None:
        encode(tokenizer, prompt, context=None, vocabulary=ALL)
        answer_tokens(tokenizer, prompt, answer, vocabulary=ALL, joined=True)

    with pytest.raises(BadInputError, match="holds half of a character"):
        ask()


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_an_empty_answer_is_an_error(tokenizer: Any, answer: str) -> None:
    with pytest.raises(BadInputError, match="is empty; give one word"):
        answer_tokens(tokenizer, PROMPT, answer, vocabulary=ALL)


def _wordwise(*words: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows a few words and makes <unk> of all others."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("template", "first"),
    [
        ("$A </s>", []),
        ("<s> $A </s>", [1]),
        ("<s> <s> $A </s> </s>", [1, 1]),
        ("<s> $A", [1]),
        ("$A", []),
        # What is put in front may be the token of unknown words.
        ("<unk> $A </s>", [0]),
    ],
)
def test_what_a_tokenizer_puts_behind_a_text_is_left_off(template: str, first: list[int]) -> None:
    tokenizer = _wordwise(*PROMPT.split(), "Paris")
    plain = tokenizer.encode(PROMPT)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(tokenizer, PROMPT, context=None, vocabulary=ALL) == first + plain
    assert answer_tokens(tokenizer, PROMPT, " Paris", vocabulary=ALL) == tokenizer.encode(
        "Paris", add_special_tokens=False
    )
    # What a prompt itself spells out is its own.
    assert encode(tokenizer, f"{PROMPT} </s>", context=None, vocabulary=ALL) == [*first, *plain, 2]


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "only in tokenizer.json"])
def test_an_answer_that_the_tokenizer_does_not_know_is_an_error(declared: bool) -> None:
    tokenizer = _wordwise(*PROMPT.split(), "Paris")
    if not declared:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
        assert tokenizer.unk_token is None
    with pytest.raises(BadInputError, match=r"answer ' Pariss' is not in the model's vocabulary.*'<unk>'"):
        answer_tokens(tokenizer, PROMPT, " Pariss", vocabulary=ALL)


def test_words_of_a_prompt_that_the_tokenizer_does_not_know_are_warned_of_once() -> None:
    tokenizer = _wordwise("The", "capital", "of", "is")
    with pytest.warns(UnknownWordWarning, match="does not know .'France'.*'<unk>'"):
        encode(tokenizer, PROMPT, context=None, vocabulary=ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(tokenizer, "The capital of Italy is", context=None, vocabulary=ALL)
        # Who writes the token itself means it.
        encode(_wordwise("The", "capital"), "The <unk> capital", context=None, vocabulary=ALL)


def test_a_token_without_an_embedding_is_an_error_that_names_it(tokenizer: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    with pytest.raises(BadInputError, match=rf"prompt '{PROMPT}' has the token .* \({max(ids)}\).*no embedding"):
        encode(tokenizer, PROMPT, context=None, vocabulary=max(ids))
    (answer,) = answer_tokens(tokenizer, PROMPT, " Paris", vocabulary=ALL)
    with pytest.raises(BadInputError, match=rf"answer ' Paris' has the token .* \({answer}\)"):
        answer_tokens(tokenizer, PROMPT, " Paris", vocabulary=answer)


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
