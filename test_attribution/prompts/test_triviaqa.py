"""Prompts from TriviaQA, on a small file in its formats whose questions were made up for this test."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.__main__ import main
from attribution.errors import BadInputError, KnowledgeError
from attribution.prompts import triviaqa
from attribution.prompts.knowledge import Prompt, load_knowledge
from attribution.prompts.prompt_files import load_prompts, write_prompts
from attribution.prompts.triviaqa import TEMPLATE, build_prompts, download, read_questions

# Question, answer, and what becomes of it: a category, or the reason why not.
QUESTIONS = [
    ("In which city does the  Eiffel Tower stand?", "PARIS", "capital"),
    ("Where was the old stadium of Wembley built?", " London ", "capital"),
    ("Which tongue is heard most in Lisbon?", "portuguese", "language"),
    ("Which kingdom has fjords and a parliament in Oslo?", "Norway", "country"),
    ("Which color has an emerald?", "Green", "color"),
    ("How many strings has a violin?", "Four", "number"),
    ("In which month do schools in {Denmark} reopen?", "AUGUST", "month"),
    ("In which city does the Eiffel tower stand?", "Paris", "question was asked before"),
    ("What do Germans speak?", "German", "question gives its answer away"),
    ("Which harbor city has a statue of a merlion?", "Singapore", "answer is a word of several categories"),
    ("Who wrote the play about the prince of Denmark?", "William Shakespeare", "answer is no word of a category"),
    ("Which capital lies on the Moskva?", "Moscow, Russia", "answer is no word of a category"),
]


def _as_hub(number: int) -> dict[str, Any]:
    question, answer, _ = QUESTIONS[number]
    return {
        "question": question,
        "question_id": f"made_up_{number}",
        "question_source": "",
        "entity_pages": {"title": []},
        "answer": {"aliases": [answer, "Rome"], "normalized_value": answer.lower(), "type": "Test", "value": answer},
    }


def _as_release(number: int) -> dict[str, Any]:
    row = _as_hub(number)
    answer = {"Aliases": row["answer"]["aliases"], "Type": "Test", "Value": row["answer"]["value"]}
    return {"Answer": answer, "Question": row["question"], "QuestionId": row["question_id"], "QuestionSource": ""}


def _as_jsonl(folder: Path) -> Path:
    path = folder / "made_up.jsonl"
    path.write_text("".join(json.dumps(_as_hub(number)) + "\n" for number in range(len(QUESTIONS))), encoding="utf-8")
    return path


def _as_json(folder: Path) -> Path:
    path = folder / "made_up.json"
    data = {"Data": [_as_release(number) for number in range(len(QUESTIONS))], "Split": "dev", "Version": 1.0}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _as_parquet(folder: Path) -> Path:
    pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow, which is not a dependency")
    path = folder / "made_up.parquet"
    pd.DataFrame([_as_hub(number) for number in range(len(QUESTIONS))]).to_parquet(path)
    return path


@pytest.mark.parametrize("write", [_as_jsonl, _as_json, _as_parquet])
def test_every_format_holds_the_same_questions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert read_questions(write(tmp_path)) == [(question, answer) for question, answer, _ in QUESTIONS]


def test_prompts_are_the_questions_whose_answer_is_a_word_of_one_category() -> None:
    words = load_knowledge().words
    prompts, report = build_prompts([row[:2] for row in QUESTIONS], words)
    assert [prompt.category for prompt in prompts] == [what for *_, what in QUESTIONS if what in words]
    assert prompts[0] == Prompt("Q : In which city does the Eiffel Tower stand? A :", " Paris", "capital")
    assert [prompt.answer for prompt in prompts[1:]] == [
        " London",
        " Portuguese",
        " Norway",
        " green",
        " four",
        " August",
    ]
    assert prompts[-1].text == "Q : In which month do schools in {Denmark} reopen? A :"
    table = report.set_index("category")
    assert list(table.index) == [*words, "several", "none"]
    fates = table.drop(columns="questions")
    assert (fates.sum(axis=1) == table["questions"]).all()
    assert table["questions"].sum() == len(QUESTIONS)
    for fate in fates:
        asked = [what for *_, what in QUESTIONS if (what in words if fate == "kept" else what == fate)]
        assert fates[fate].sum() == len(asked), fate
    assert fates.loc["capital"].to_dict() == {
        "kept": 2,
        "question gives its answer away": 0,
        "question was asked before": 1,
        "answer is a word of several categories": 0,
        "answer is no word of a category": 0,
    }


def test_a_template_is_filled_once_and_left_alone_otherwise() -> None:
    (prompt,), _ = build_prompts([("Who {question}?", "Paris")], {"capital": ["Paris"]}, "{} {question} {answer}:")
    assert prompt.text == "{} Who {question}? {answer}:"
    assert TEMPLATE == "Q : {question} A :"


@pytest.mark.parametrize("template", ["Q :", "{question} {question}", "{question} ", ""])
def test_a_template_that_cannot_be_used_is_named(template: str) -> None:
    with pytest.raises(BadInputError) as caught:
        build_prompts([], {}, template)
    assert repr(template) in str(caught.value)
    assert f"use {TEMPLATE!r}." in str(caught.value)


WORDS = {"capital": ("Paris", "Rome", "Monaco"), "country": ("Italy", "Monaco"), "color": ("red", "blue")}
ANSWERS = st.sampled_from(["Paris", "ROME", "monaco", "Italy", "red", "Blue", "nothing"])
WORDED = st.text(st.sampled_from("ab {}\n\u2028\"'\\,Red"), min_size=1, max_size=12).filter(lambda text: text.strip())


@given(questions=st.lists(st.tuples(WORDED, ANSWERS), min_size=1, max_size=12))
def test_what_is_built_is_read_back(questions: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    prompts, report = build_prompts(questions, WORDS)
    counts = report.drop(columns=["category", "questions"])
    assert (counts.sum(axis=1) == report["questions"]).all()
    assert (report["questions"].sum(), report["kept"].sum()) == (len(questions), len(prompts))
    if prompts:
        path = tmp_path_factory.getbasetemp() / "built.jsonl"
        write_prompts(path, prompts, WORDS)
        read = load_prompts(path)
        assert list(read.prompts) == prompts
        assert read.words == {
            category: WORDS[category] for category in dict.fromkeys(each.category for each in prompts)
        }


BROKEN = {
    "another ending": ("made_up.tsv", "", 1, ["'.tsv'"]),
    "nothing": ("made_up.jsonl", "\n", 1, ["no question"]),
    "no JSON": ("made_up.jsonl", '\n{"question"', 2, ["is not JSON"]),
    "no object": ("made_up.jsonl", "[1]", 1, ["[1]", "string question"]),
    "no question": ("made_up.jsonl", '{"answer": {"value": "Paris"}}', 1, ["'Paris'", "string question"]),
    "an empty question": ("made_up.jsonl", '{"question": " ", "answer": {"value": "Paris"}}', 1, ["string question"]),
    "an answer without a value": ("made_up.jsonl", '{"question": "Who?", "answer": "Paris"}', 1, ["string value"]),
    "no release": ("made_up.json", '[{"Question": "Who?"}]', 1, ["no list named Data"]),
    "broken release": ("made_up.json", '{"Data": [', 1, ["cannot be read"]),
    "a row of the release": (
        "made_up.json",
        '{"Data": [{"Question": "Who?", "Answer": {"Value": "I"}}, {"Question": 3, "Answer": {"Value": "I"}}]}',
        2,
        ["string question"],
    ),
    "no Parquet": ("made_up.parquet", "PAR", 1, ["Parquet" if find_spec("pyarrow") is None else "cannot be read"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_in_another_format_is_told_where_and_why(tmp_path: Path, name: str) -> None:
    file, text, line, words = BROKEN[name]
    path = tmp_path / file
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KnowledgeError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: "), message
    assert message.endswith(".")
    assert "\n" not in message
    assert "give" in message
    for word in words:
        assert word in message, message


def test_parquet_without_pyarrow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise ImportError("pyarrow")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(KnowledgeError, match=r"pip install pyarrow, or give a \.jsonl file\.$"):
        read_questions(tmp_path / "made_up.parquet")


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"none\.jsonl:1: cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_the_hub_is_asked_for_one_file_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def local(**arguments: str) -> str:
        asked.append(arguments)
        return str(_as_jsonl(tmp_path))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", local)
    out = tmp_path / "prompts.jsonl"
    assert main(["triviaqa", "--hub=validation", f"--out={out}"]) == 0
    assert asked == [
        {
            "repo_id": "mandarjoshi/trivia_qa",
            "repo_type": "dataset",
            "filename": "rc.nocontext/validation-00000-of-00001.parquet",
            "revision": triviaqa.REVISION,
        }
    ]
    assert len(load_prompts(out).prompts) == 7


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**arguments: str) -> str:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", away)
    with pytest.raises(
        BadInputError, match=r"cannot be downloaded \(no route\); go online, or give the file itself\.$"
    ):
        download("train")
    with pytest.raises(BadInputError, match=r"'test' .*has no answers; use one of train, validation\.$"):
        download("test")


def test_the_command_prints_the_report_and_writes_the_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = _as_json(tmp_path), tmp_path / "prompts.jsonl"
    assert main(["triviaqa", str(path), f"--out={out}", "--template=Question: {question}\nAnswer:"]) == 0
    printed = capsys.readouterr()
    *_, total, wrote = printed.out.splitlines()
    assert total.split() == ["all", "12", "7", "1", "1", "1", "2"]
    assert wrote == f"wrote 7 prompts to {out}"
    knowledge = load_prompts(out)
    assert knowledge.prompts[0].text == "Question: In which city does the Eiffel Tower stand?\nAnswer:"
    assert knowledge.words["month"] == load_knowledge().words["month"]
    assert main(["triviaqa", str(path), f"--out={out}", "--json"]) == 0
    assert sum(row["questions"] for row in json.loads(capsys.readouterr().out)) == 12


@pytest.mark.parametrize("arguments", [[], ["made_up.json", "--hub=train"]], ids=["neither", "both"])
def test_a_file_or_the_hub_must_be_given(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["triviaqa", *arguments, "--out=prompts.jsonl"]) == 1
    assert "give exactly one of them." in capsys.readouterr().err
