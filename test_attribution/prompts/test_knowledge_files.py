"""The knowledge files hold what they promise, and a broken file is told where it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

import attribution as at
from attribution.errors import KnowledgeError
from attribution.prompts.knowledge import CATEGORIES, find_problems, load_knowledge, read_token_ids
from attribution.resources import fixtures_folder

SUBJECTS = {"language": 60, "capital": 70, "country": 110, "color": 60, "number": 60, "month": 50}
TOKEN_IDS = "gpt2_tokens.json"


def _files() -> list[Path]:
    return sorted(fixtures_folder("knowledge").glob("*.toml"))


def test_there_is_one_file_per_category() -> None:
    assert [path.stem for path in _files()] == sorted(CATEGORIES)
    assert [path.stem for path in _files()] == list(load_knowledge().words) == sorted(CATEGORIES)


def test_the_files_have_no_problems() -> None:
    assert find_problems(_files()) == []


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_category_has_enough_subjects_in_enough_phrasings(category: str) -> None:
    facts = load_knowledge(categories=[category]).facts
    assert {fact.category for fact in facts} == {category}
    assert len({fact.subject for fact in facts}) >= SUBJECTS[category]
    assert min(len(set(fact.phrasings)) for fact in facts) >= 3


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_answer_is_a_word_of_its_type_and_has_rivals(category: str) -> None:
    knowledge = load_knowledge(categories=[category])
    answers = {fact.answer for fact in knowledge.facts}
    assert set(knowledge.words) == {category}
    assert answers <= set(knowledge.words[category])
    assert len(answers) >= 5


def test_there_are_enough_prompts_and_each_stands_once() -> None:
    prompts = load_knowledge().prompts
    assert len(prompts) >= 1200
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_prompts_end_right_before_their_answer() -> None:
    for prompt in load_knowledge().prompts:
        assert prompt.text == prompt.text.strip()
        assert "{" not in prompt.text
        assert prompt.answer.startswith(" ")
        assert prompt.answer.split() == [prompt.answer[1:]]
        assert prompt.text[0].isupper()
        assert prompt.answer[1:].lower() not in prompt.text.lower().split()


def test_every_word_is_one_gpt2_token() -> None:
    folder = fixtures_folder("knowledge")
    token_ids = read_token_ids(folder / TOKEN_IDS)
    assert token_ids["Paris"] == 6342
    assert len(set(token_ids.values())) == len(token_ids)
    for category, words in load_knowledge().words.items():
        assert set(words) <= set(token_ids), category
    assert find_problems(_files(), token_ids) == []


GOOD = """\
category = "capital"
words = ["Paris", "Rome", "Oslo"]

[relations.country_capital]
phrasings = [
    "The capital of {subject} is",
    "{Subject} has its capital in",
    "Those who govern {subject} sit in",
]

[relations.country_capital.facts]
France = "Paris"
"the Italian Republic" = "Rome"
"""


def _replaced(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# What is wrong, the text of the file, the line it is on, and what the message must say.
BROKEN = {
    "not TOML": (_replaced('France = "Paris"', "France = Paris"), 12, ["is not TOML"]),
    "subject without quotes": (
        _replaced('"the Italian Republic"', "the Italian Republic"),
        13,
        ["is not TOML", "quotes"],
    ),
    "duplicate subject": (GOOD + 'France = "Oslo"\n', 14, ["is not TOML", "once"]),
    "unknown key": (_replaced("words =", 'colour = "red"\nwords ='), 2, ["'colour'", "category, relations, words"]),
    "unknown key in a relation": (
        _replaced("phrasings = [", 'hints = "none"\nphrasings = ['),
        5,
        ["'hints'", "country_capital", "facts, phrasings"],
    ),
    "unknown category": (_replaced('"capital"', '"river"'), 1, ["'river'", "language, capital"]),
    "no category": (_replaced('category = "capital"\n', ""), 1, ["category", "None"]),
    "no words": (_replaced('words = ["Paris", "Rome", "Oslo"]\n', ""), 1, ["words must be a list"]),
    "words of another kind": (_replaced('"Oslo"]', "3]"), 2, ["words must be a list"]),
    "word twice": (_replaced('"Oslo"]', '"Oslo", "Rome"]'), 2, ["'Rome'", "2 times", "keep one"]),
    "no relations": (GOOD.split("[relations")[0], 1, ["[relations.NAME]"]),
    "a relation that is no table": (
        GOOD.split("[relations")[0] + '\n[relations]\ncountry_capital = "none"\n',
        6,
        ["country_capital"],
    ),
    "no phrasings": (
        GOOD.split("phrasings")[0] + '\n[relations.country_capital.facts]\nFrance = "Paris"\n',
        4,
        ["country_capital", "phrasings"],
    ),
    "too few phrasings": (
        _replaced('    "Those who govern {subject} sit in",\n', ""),
        4,
        ["country_capital", "2 phrasings", "at least 3"],
    ),
    "phrasing without its subject": (_replaced("{Subject} has", "France has"), 7, ["exactly once"]),
    "phrasing with two subjects": (_replaced("{Subject} has", "{Subject} or {subject} has"), 7, ["exactly once"]),
    "doubled spaces": (_replaced("govern {subject}", "govern  {subject}"), 8, ["spaces", "remove"]),
    "space at the end": (_replaced('{subject} is"', '{subject} is "'), 6, ["spaces", "remove"]),
    "no facts": (GOOD.split("[relations.country_capital.facts]")[0], 4, ["country_capital", "table of facts"]),
    "answer not among the words": (_replaced('= "Rome"', '= "Madrid"'), 13, ["'Madrid'", "words", "add it"]),
    "answer of two words": (_replaced('= "Rome"', '= "New York"'), 13, ["'New York'", "one word"]),
    "answer that is no string": (_replaced('= "Rome"', "= 5"), 13, ["5", "one word"]),
    "answer inside its prompt": (
        _replaced('"the Italian Republic"', '"the republic of Rome"'),
        13,
        ["'Rome'", "gives its answer", "reword"],
    ),
    "answer begins a word of its prompt": (
        _replaced("France =", "Parisian-France ="),
        12,
        ["'Paris'", "gives its answer"],
    ),
    "a phrasing twice": (
        _replaced("Those who govern {subject} sit in", "The capital of {subject} is"),
        12,
        ["'The capital of France is'", "also made"],
    ),
}


def _written(folder: Path, text: str, name: str = "capital.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_good_example_is_good(tmp_path: Path) -> None:
    path = _written(tmp_path, GOOD)
    assert find_problems([path], {"Paris": 1, "Rome": 2, "Oslo": 3}) == []
    prompts = load_knowledge(tmp_path).prompts
    assert len(prompts) == 6
    assert prompts[4] == at.Prompt(
        "The Italian Republic has its capital in", " Rome", "capital", "country_capital", "the Italian Republic", 1
    )
    assert prompts[3].text == "The capital of the Italian Republic is"
    assert prompts[3].fact == prompts[4].fact == "capital/country_capital/the Italian Republic"


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_file_is_told_where_and_why(tmp_path: Path, name: str) -> None:
    text, line, words = BROKEN[name]
    path = _written(tmp_path, text)
    problems = find_problems([path])
    assert problems, "nothing was noticed"
    message = problems[0]
    assert message.startswith(f"{path}:{line}: "), message
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "a phrasing twice"])
def test_a_broken_file_is_not_loaded(tmp_path: Path, name: str) -> None:
    text, line, _ = BROKEN[name]
    path = _written(tmp_path, text)
    with pytest.raises(KnowledgeError) as caught:
        load_knowledge(tmp_path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace('= "Rome"', '= "Madrid"').replace("{Subject} has", "France has")
    problems = find_problems([_written(tmp_path, text)])
    assert [problem.split(":")[1] for problem in problems] == ["7", "13"]


def test_a_prompt_made_in_two_files_is_told_with_both_places(tmp_path: Path) -> None:
    first = _written(tmp_path, GOOD)
    other = GOOD.replace('"capital"', '"country"').replace('France = "Paris"', '# a line more\nFrance = "Oslo"')
    second = _written(tmp_path, other.replace('"the Italian Republic" = "Rome"\n', ""), "country.toml")
    problems = find_problems([second, first])
    assert len(problems) == 3
    assert problems[0].startswith(f"{second}:13: ")
    assert "'The capital of France is'" in problems[0]
    assert f"{first}:12" in problems[0]


def test_a_word_that_is_not_one_gpt2_token_is_told(tmp_path: Path) -> None:
    path = _written(tmp_path, GOOD)
    problems = find_problems([path], {"Paris": 6342, "Rome": 10598})
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:2: ")
    assert "'Oslo' is not one GPT-2 token" in problems[0]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert find_problems([missing])[0].startswith(f"{missing}:1: cannot be read")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'category = "\xe9"')
    assert find_problems([latin])[0].startswith(f"{latin}:1: cannot be read")


def test_a_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"holds no \.toml file; give"):
        load_knowledge(tmp_path)


def test_a_category_that_does_not_exist_cannot_be_asked_for() -> None:
    with pytest.raises(at.AttributionError, match=r"'rivers'.*language, capital"):
        load_knowledge(categories=["rivers"])


def test_categories_can_be_chosen() -> None:
    knowledge = load_knowledge(categories=["month", "color"])
    assert set(knowledge.words) == {"color", "month"}
    assert {fact.category for fact in knowledge.facts} == {"color", "month"}
