"""Prompts of one's own: loaded from any format, selected by the rule with reasons, and run by the claims."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attribution as at
from attribution.__main__ import main
from attribution.claims.bench import Workbench
from attribution.claims.sample import Sample
from attribution.errors import BadInputError, KnowledgeError
from attribution.experiments.selection_rule import (
    SelectionOutcome,
    selection_outcome,
    selection_outcomes,
    selection_report,
)
from attribution.models.registry import registry
from attribution.prompts.knowledge import CATEGORIES, Fact, Knowledge, Prompt, load_knowledge
from attribution.prompts.prompt_files import OWN, load_prompts, write_prompts

pytest_plugins = ["pytester"]

ROWS = [
    {"prompt": "The capital of France is", "answer": "Paris", "category": "capital", "fact": "France"},
    {"prompt": "Say {subject}, then {Subject}:", "answer": " red", "category": "", "fact": ""},
    {"prompt": 'In "France", ministers sit in', "answer": "Paris", "category": "capital", "fact": "France"},
    {"prompt": "Italy, then, is ruled\nfrom", "answer": "Rome", "category": "capital", "fact": ""},
    {"prompt": "The sky is", "answer": "blue", "category": "", "fact": "sky"},
]
REMEDY = re.compile(r"\b(give|put|use|keep|remove|add|mend|name|leave|double)\b")


def _as_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer", "category", "fact"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _as_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows), encoding="utf-8")
    return path


def _as_toml(path: Path, rows: list[dict[str, str]]) -> Path:
    # A JSON string is a TOML string too.
    tables = ["\n".join(f"{key} = {json.dumps(value)}" for key, value in row.items() if value) for row in rows]
    path.write_text("".join(f"[[prompts]]\n{table}\n\n" for table in tables), encoding="utf-8")
    return path


WRITERS = {"csv": _as_csv, "jsonl": _as_jsonl, "toml": _as_toml}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_holds_the_same_prompts(tmp_path: Path, ending: str) -> None:
    knowledge = load_prompts(WRITERS[ending](tmp_path / f"own.{ending}", ROWS))
    # Those of one fact together; what is in braces stays.
    assert knowledge.prompts == (
        Prompt("The capital of France is", " Paris", "capital", "", "France", 0),
        Prompt('In "France", ministers sit in', " Paris", "capital", "", "France", 1),
        Prompt("Say {subject}, then {Subject}:", " red", OWN),
        Prompt("Italy, then, is ruled\nfrom", " Rome", "capital"),
        Prompt("The sky is", " blue", OWN, "", "sky", 0),
    )
    assert [prompt.fact for prompt in knowledge.prompts] == [
        *2 * ["capital/France"],
        "Say {subject}, then {Subject}:",
        "Italy, then, is ruled\nfrom",
        "own/sky",
    ]
    assert knowledge.words == {"capital": ("Paris", "Rome"), OWN: ("red", "blue")}
    assert not knowledge.bundled


def test_a_file_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "OWN.CSV"
    path.write_bytes("\ufeffanswer,prompt\r\nParis,France:\r\n\r\nRome,Italy:\r\n".encode())
    prompts = load_prompts(path).prompts
    assert prompts == (Prompt("France:", " Paris", OWN), Prompt("Italy:", " Rome", OWN))


def test_words_of_a_category_may_be_listed(tmp_path: Path) -> None:
    path = _as_jsonl(tmp_path / "own.jsonl", ROWS[:1])
    path.write_text(path.read_text() + '{"category": "capital", "words": ["Oslo", "Paris", "New York"]}\n')
    toml = _as_toml(tmp_path / "own.toml", ROWS[:1])
    toml.write_text('[words]\ncapital = ["Oslo", "Paris", "New York"]\n' + toml.read_text())
    assert load_prompts(path) == load_prompts(toml)
    assert load_prompts(path).words == {"capital": ("Oslo", "Paris", "New York")}


JOINED = [
    {"prompt": "The war lasted from 1745 to 17", "answer": "4", "category": "digit", "fact": "", "joined": "true"},
    {"prompt": "The war lasted from 1755 to 17", "answer": "6", "category": "digit", "fact": "", "joined": "TRUE"},
    {"prompt": "The sky is", "answer": "blue", "category": "", "fact": "", "joined": "false"},
    {"prompt": "The grass is", "answer": "green", "category": "", "fact": "", "joined": ""},
]


@pytest.mark.parametrize("ending", WRITERS)
def test_an_answer_may_join_the_prompt(tmp_path: Path, ending: str) -> None:
    rows = [dict(row) for row in JOINED]
    if ending == "csv":
        path = tmp_path / "own.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path = WRITERS[ending](tmp_path / f"own.{ending}", rows)
    knowledge = load_prompts(path)
    assert [prompt.text + prompt.answer for prompt in knowledge.prompts] == [
        "The war lasted from 1745 to 174",
        "The war lasted from 1755 to 176",
        "The sky is blue",
        "The grass is green",
    ]
    assert [prompt.joined for prompt in knowledge.prompts] == [True, True, False, False]
    write_prompts(tmp_path / "again.jsonl", knowledge.prompts, knowledge.words)
    assert load_prompts(tmp_path / "again.jsonl").prompts == knowledge.prompts


def test_an_answer_that_joins_is_asked_for_beside_rivals_that_join(gpt2: at.Model) -> None:
    """Behind a space, or behind another word, they would be other tokens."""
    prompts = [Prompt("The war lasted from 1745 to 17", digit, "digit", joined=True) for digit in "48"]
    words = {"digit": tuple("123456789")}
    fates = selection_outcomes(gpt2, prompts, words)
    logits = at.ablate(gpt2, prompts[0].text, [])
    rivals = [gpt2.tokenizer.encode(prompts[0].text + digit)[-1] for digit in words["digit"]]
    for prompt, fate in zip(prompts, fates, strict=True):
        answer = gpt2.tokenizer.encode(prompt.text + prompt.answer)[-1]
        assert fate is selection_outcome(logits, answer, rivals)


def test_toml_tables_may_stand_in_one_list(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('prompts = [\n  {prompt = "A", answer = "x"},\n  {prompt = "B", answer = ""},\n]\n')
    with pytest.raises(KnowledgeError, match=r"own\.toml:3: .*has no answer"):
        load_prompts(path)


PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=6)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text == text.strip()
)


@st.composite
def _knowledge(draw: st.DrawFn) -> tuple[list[Prompt], dict[str, list[str]]]:
    words = draw(st.dictionaries(PLAIN, st.lists(PLAIN, min_size=2, max_size=4, unique=True), min_size=1, max_size=3))
    prompts = []
    answers: dict[str, str] = {}
    for text in draw(st.lists(TEXTS, min_size=1, max_size=8, unique=True)):
        category = draw(st.sampled_from(list(words)))
        relation, subject = draw(st.sampled_from([("", ""), ("", "one"), ("", "two"), ("made", "one")]))
        answer = draw(st.sampled_from(words[category]))
        prompt = Prompt(text, f" {answer}", category, relation, subject)
        if subject:
            prompt = Prompt(text, answers.setdefault(prompt.fact, prompt.answer), category, relation, subject)
        prompts.append(prompt)
    return prompts, words


@given(made=_knowledge())
def test_what_is_written_is_read_back(
    made: tuple[list[Prompt], dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    prompts, words = made
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    write_prompts(path, prompts, words)
    read = load_prompts(path)
    asked = {(prompt.text, prompt.answer, prompt.category, prompt.fact) for prompt in prompts}
    assert {(prompt.text, prompt.answer, prompt.category, prompt.fact) for prompt in read.prompts} == asked
    assert len(read.prompts) == len(prompts)
    assert read.words == {category: tuple(words[category]) for category in read.words}
    assert set(read.words) == {prompt.category for prompt in prompts}
    write_prompts(path, read.prompts, read.words)
    assert load_prompts(path) == read


# What is wrong, the ending and text of the file, the line it is on, and what the message must say.
GOOD = "prompt,answer,category,fact\nA,x,,\nB,y,,\n"
JSONL = '{"prompt": "A", "answer": "x"}\n{"prompt": "B", "answer": "y"}\n'
BROKEN = {
    "another ending": ("txt", GOOD, 1, ["'.txt'", ".jsonl"]),
    "nothing": ("csv", "", 1, ["no prompt"]),
    "a header alone": ("csv", "prompt,answer\n", 1, ["no prompt"]),
    "no header": ("csv", "A,x\nB,y\n", 1, ["'A,x'", "prompt,answer"]),
    "an unknown column": ("csv", "prompt,answer,colour\nA,x,\n", 1, ["'prompt,answer,colour'"]),
    "a column twice": ("csv", "prompt,answer,answer\nA,x,y\n", 1, ["'prompt,answer,answer'"]),
    "a comma without quotes": ("csv", GOOD + "In Rome, one is,z,,\n", 4, ["5 fields", "double quotes"]),
    "a field too few": ("csv", GOOD + "C,z\n", 4, ["2 fields"]),
    "a quote that does not end": ("csv", GOOD + '"C,z,,\n', 4, ["is not CSV"]),
    "a quote inside quotes": ("csv", GOOD + '"C"d,z,,\n', 4, ["is not CSV", "double"]),
    "after a text of several lines": ("csv", 'prompt,answer\n"A\nA",x\nB,\n', 4, ["has no answer"]),
    "no prompt": ("csv", GOOD + ",z,,\n", 4, ["has no prompt"]),
    "no truth": ("csv", "prompt,answer,joined\nA,x,perhaps\n", 2, ["joined 'perhaps' is no truth; use true or false"]),
    "a space that joins": ("jsonl", '{"prompt": "A", "answer": " x", "joined": true}', 1, ["joined and begins with"]),
    "an answer of spaces": ("csv", GOOD + "C,  ,,\n", 4, ["has no answer"]),
    "a space after the prompt": ("csv", GOOD + "C ,z,,\n", 4, ["'C '", "remove"]),
    "a space after the answer": ("csv", GOOD + "C,z ,,\n", 4, ["'z '", "remove"]),
    "a space after the category": ("csv", GOOD + "C,z,own ,\n", 4, ["'own '", "remove"]),
    "an answer on two lines": ("csv", GOOD + 'C,"z\nz",,\n', 4, [r"'z\nz'", "broken into lines"]),
    "a prompt twice": ("csv", GOOD + "A,y,,\n", 4, ["'A'", "line 2", "keep one"]),
    "a fact with two answers": ("csv", "prompt,answer,fact\nA,x,f\nB,y,f\n", 3, ["'f'", "'x' on line 2", "'y'"]),
    "a category of one word": ("csv", GOOD + "C,z,lone,\n", 4, ["'lone'", "'z'", "add"]),
    "no JSON": ("jsonl", JSONL + "{prompt: A}\n", 3, ["is not JSON"]),
    "no object": ("jsonl", JSONL + "[1, 2]\n", 3, ["[1, 2]", "no object"]),
    "an unknown key": ("jsonl", JSONL + '{"prompt": "C", "answer": "z", "colour": "w"}', 3, ["'colour'"]),
    "a number for an answer": ("jsonl", JSONL + '\n{"prompt": "C", "answer": 4}', 4, ["answer 4", "double quotes"]),
    "half a character": ("jsonl", JSONL + '{"prompt": "\\ud800", "answer": "z"}', 3, ["half of a character"]),
    "answer missing from the words": ("jsonl", '{"category": "own", "words": ["x", "z"]}\n' + JSONL, 3, ["'y'", "add"]),
    "words twice": ("jsonl", JSONL + 2 * '{"category": "own", "words": ["x", "y"]}\n', 4, ["'own'", "twice"]),
    "words that no prompt has": ("jsonl", JSONL + '{"category": "c", "words": ["x", "y"]}', 3, ["'c'", "no prompt"]),
    "words of no category": ("jsonl", JSONL + '{"words": ["x", "y"]}', 3, ["category None"]),
    "words and more": ("jsonl", JSONL + '{"category": "own", "words": ["x", "y"], "n": 1}', 3, ["'n'"]),
    "no TOML": ("toml", "[[prompts]]\nprompt = A\n", 2, ["is not TOML"]),
    "another table": ("toml", '[[prompts]]\nprompt = "A"\nanswer = "x"\n[wrods]\n', 4, ["'wrods'"]),
    "one table": ("toml", '[prompts]\nprompt = "A"\nanswer = "x"\n', 1, ["[[prompts]]"]),
    "second table": ("toml", '[[prompts]]\nprompt = "A"\nanswer = "x"\n[[prompts]]\nprompt = "B"\n', 4, ["no answer"]),
    "words that are no list": (
        "toml",
        '[words]\nown = "x"\n[[prompts]]\nprompt = "A"\nanswer = "x"\n',
        2,
        ["'own'", "list"],
    ),
    "a word twice": (
        "toml",
        '[words]\nown = ["x", "x"]\n[[prompts]]\nprompt = "A"\nanswer = "x"\n',
        2,
        ["'x'", "2 times"],
    ),
    "words outside a table": ("toml", 'words = 3\n[[prompts]]\nprompt = "A"\nanswer = "x"\n', 1, ["3", "[words]"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_where_and_why(tmp_path: Path, name: str) -> None:
    ending, text, line, words = BROKEN[name]
    path = tmp_path / f"own.{ending}"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KnowledgeError) as caught:
        load_prompts(path)
    (message,) = str(caught.value).split("\n")
    assert message.startswith(f"{path}:{line}: "), message
    assert message.endswith("."), message
    assert REMEDY.search(message), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "write", [None, lambda path: path.write_bytes(b"\xe9"), Path.mkdir], ids=["none", "latin", "folder"]
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, write) -> None:
    path = tmp_path / "own.csv"
    if write is not None:
        write(path)
    with pytest.raises(KnowledgeError, match=r"own\.csv:1: cannot be read .*UTF-8"):
        load_prompts(path)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(GOOD + "C ,z ,,\nD,,,\n")
    with pytest.raises(KnowledgeError) as caught:
        load_prompts(path)
    assert [line.split(":")[1] for line in str(caught.value).split("\n")] == ["4", "4", "5"]


@pytest.fixture(scope="module")
def gpt2() -> at.Model:
    return at.load("bundled:gpt2")


@pytest.fixture(scope="module")
def mixed() -> Knowledge:
    """Bundled prompts, some with another answer and some with an answer of several tokens."""
    bundled = load_knowledge(categories=["capital", "color", "number"])
    prompts = [prompt for category in bundled.words for prompt in _first(bundled, category, 16)]
    facts = []
    for number, prompt in enumerate(prompts):
        words = bundled.words[prompt.category]
        wrong = words[(words.index(prompt.answer.strip()) + 1) % len(words)]
        # Of no category, and so no word that outranks it; the models have no reason to say it here.
        answer = {1: wrong, 2: "Paris Rome", 3: "language"}.get(number % 8, prompt.answer.strip())
        facts.append(at.Prompt(prompt.text, f" {answer}", prompt.category, subject=str(number)))
    return _as_knowledge(facts, bundled.words)


def _first(knowledge: Knowledge, category: str, number: int) -> list[Prompt]:
    return [prompt for prompt in knowledge.prompts if prompt.category == category][:number]


def _as_knowledge(prompts: list[Prompt], words: dict[str, tuple[str, ...]]) -> Knowledge:
    facts = [Fact(each.category, "", each.subject, each.answer[1:], (each.text,), literal=True) for each in prompts]
    return Knowledge(tuple(facts), words, bundled=False)


def test_the_report_counts_what_plain_ranks_say_and_its_kept_prompts_are_the_known_ones(
    gpt2: at.Model, mixed: Knowledge
) -> None:
    report = selection_report(gpt2, mixed)
    assert list(report.columns) == ["category", "prompts", *(outcome.value for outcome in SelectionOutcome)]
    assert list(report["category"]) == ["capital", "color", "number"]
    by_hand: Counter[tuple[str, str]] = Counter()
    kept = []
    logits = at.ablate(gpt2, list(mixed.prompts), [[]] * len(mixed.prompts))
    for prompt, row in zip(mixed.prompts, logits, strict=True):
        # The token of a word that follows others, as the tokenizer itself splits it.
        ids = {
            word: gpt2.tokenizer.encode(f"The {word}")[1:]
            for word in (*mixed.words[prompt.category], prompt.answer[1:])
        }
        answer = ids[prompt.answer[1:]]
        ranked = row.argsort(descending=True).tolist()
        rivals = [ranked.index(each[0]) for each in ids.values() if len(each) == 1 and each != answer]
        if len(answer) > 1:
            reason = "answer is several tokens"
        elif ranked.index(answer[0]) >= 10:
            reason = "not in the top 10"
        elif min(rivals) < ranked.index(answer[0]):
            reason = "outranked by another word of its type"
        else:
            reason = "kept"
            kept.append(prompt)
        by_hand[prompt.category, reason] += 1
    for row in report.to_dict("records"):
        category, prompts = row.pop("category"), row.pop("prompts")
        assert prompts == sum(row.values()) == 16
        assert row == {outcome.value: by_hand[category, outcome.value] for outcome in SelectionOutcome}
    assert at.known_prompts(gpt2, mixed.prompts, mixed.words) == kept
    assert (report.drop(columns="category").sum() > 0).all(), "every reason is met"


def test_an_answer_that_cannot_be_asked_for_is_an_error_not_a_reason(gpt2: at.Model) -> None:
    with pytest.raises(BadInputError, match="is empty"):
        selection_outcomes(gpt2, [Prompt("The capital of France is", " ", "capital")], {"capital": ["Paris"]})
    assert selection_outcomes(gpt2, [], {}) == []


def test_the_control_asks_for_no_answer_of_several_tokens(gpt2: at.Model, tmp_path: Path) -> None:
    rows = [
        {"prompt": "A", "answer": "Paris", "category": "capital"},
        {"prompt": "B", "answer": "Paris Rome", "category": "capital"},
        {"prompt": "C", "answer": "Rome", "category": "capital"},
        {"prompt": "D", "answer": "red", "category": "color"},
    ]
    path = _as_jsonl(tmp_path / "own.jsonl", rows)
    path.write_text(path.read_text() + '{"category": "color", "words": ["red red", "blue", "red", "green"]}\n')
    bench = Workbench(Sample(gpt2, load_prompts(path)))
    assert [prompt.answer for prompt in bench.sample.swapped] == [" Rome", " Paris", " Paris", " blue"]


def test_the_registry_records_nothing_of_prompts_of_ones_own(gpt2: at.Model, mixed: Knowledge) -> None:
    recorded = registry()["bundled:gpt2"]
    own, bundled = (
        Workbench(Sample(gpt2, knowledge)).entry for knowledge in (mixed, load_knowledge(categories=["color"]))
    )
    assert bundled == recorded
    assert recorded.known_share > 0
    assert (own.known_share, own.not_supported, own.value_neurons) == (0, {}, recorded.value_neurons)


def test_the_command_prints_the_report_and_writes_what_was_kept(
    gpt2: at.Model, mixed: Knowledge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Files name only words that are answers, or all of them: here those of the type and the odd ones.
    words = {
        category: dict.fromkeys(
            [*each, *(prompt.answer[1:] for prompt in mixed.prompts if prompt.category == category)]
        )
        for category, each in mixed.words.items()
    }
    path, out = tmp_path / "own.jsonl", tmp_path / "kept.jsonl"
    write_prompts(path, mixed.prompts, {category: list(each) for category, each in words.items()})
    knowledge = load_prompts(path)
    kept = at.known_prompts(gpt2, knowledge.prompts, knowledge.words)
    assert main(["select", "bundled:gpt2", f"--prompts={path}", f"--out={out}", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == selection_report(gpt2, knowledge).to_dict("records")
    assert printed.err == f"wrote {len(kept)} prompts to {out}\n"
    read = load_prompts(out)
    assert list(read.prompts) == kept
    assert read.words == knowledge.words
    assert main(["select", "bundled:gpt2", f"--prompts={out}"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["all", str(len(kept)), str(len(kept)), "0", "0", "0"]
    assert main(["select", "bundled:gpt2", f"--prompts={path}", f"--out={path}"]) == 1
    assert "is the file that is read; give another name" in capsys.readouterr().err
    assert main(["select", "bundled:gpt2", "--out=kept.csv"]) == 1
    assert "ends in .jsonl" in capsys.readouterr().err


def test_prompts_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no prompt is left"):
        write_prompts(tmp_path / "kept.jsonl", [], {})
    with pytest.raises(BadInputError, match="cannot be written"):
        write_prompts(tmp_path / "none" / "kept.jsonl", [Prompt("A", " x", "own")], {"own": ["x", "y"]})


CLAIM = Path(__file__).resolve().parents[2] / "test_knowledge" / "test_known.py"


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """The claim on what a model knows, and a file of prompts in a category of which no bundled file knows."""
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error")
    pytester.makepyfile(test_known=CLAIM.read_text(encoding="utf-8"))
    bundled = load_knowledge(categories=["capital", "color"])
    prompts = [
        Prompt(prompt.text, prompt.answer, category, subject=prompt.subject)
        for category, name in (("seats of power", "capital"), ("looks", "color"))
        for prompt in _first(bundled, name, 16)
    ]
    words = {"seats of power": bundled.words["capital"], "looks": bundled.words["color"]}
    write_prompts(pytester.path / "own.jsonl", prompts, words)
    return pytester


def test_claims_run_on_ones_own_prompts(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess("--prompts=own.jsonl", "--model=bundled:gpt2", "-k", "knows", "-n0", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "prompts: own.jsonl, 32 prompts of * facts in seats of power, looks",
            "*[[]bundled-gpt2-seats of power[]] PASSED*",
            "*[[]bundled-gpt2-looks[]] PASSED*",
            "bundled:gpt2 * knows seats of power * 16 * supported",
        ]
    )


def test_a_bad_file_of_prompts_stops_the_run_before_it_begins(suite: pytest.Pytester) -> None:
    (suite.path / "own.jsonl").write_text('{"prompt": "A "}\n')
    result = suite.runpytest_subprocess("--prompts=own.jsonl", "--model=bundled:gpt2", "-n0")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: own.jsonl:1: prompt 'A ' has a space at an end; remove it*", "*has no answer*"]
    )


def test_tests_of_a_category_run_on_those_that_the_suite_chooses(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_any="def test_it(attribution_category): pass")

    def run(*options: str) -> list[str]:
        result = suite.runpytest_subprocess("test_any.py", "--collect-only", "-q", "-n0", *options)
        return [line.split("::")[-1] for line in result.outlines if "::" in line]

    assert run() == [f"test_it[{name}]" for name in CATEGORIES]
    suite.makeconftest("def pytest_attribution_categories(): return ['month', 'color']")
    assert run() == ["test_it[month]", "test_it[color]"]
    assert run("--prompts=own.jsonl") == ["test_it[seats of power]", "test_it[looks]"]
