"""Prompts of one's own: one file of prompts with their answers, as CSV, JSONL or TOML.

The same prompt in each of them::

    prompt,answer,category,fact                         # CSV, the first line as it stands here

    {"prompt": "The capital of France is", "answer": "Paris", "category": "capital", "fact": "France"}

    [[prompts]]                                         # TOML
    prompt = "The capital of France is"
    answer = "Paris"
    category = "capital"
    fact = "France"

``category`` and ``fact`` may be left out. ``fact`` names what several phrasings ask; a prompt without it is a fact of
its own. An answer follows after one space; where ``joined`` is true it follows at once, as the last digit of a year
does, or a word of a language without spaces. The words of a category, which are the rivals in the selection rule, are
all its answers, unless the file lists them: in TOML as ``capital = ["Paris", "Rome"]`` under ``[words]``, in JSONL as a
line ``{"category": "capital", "words": ["Paris", "Rome"]}``.

Unlike in the bundled files, texts are taken as they are: braces stand for nothing, and a prompt may hold its answer.
Nothing here needs a model or torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attribution.errors import BadInputError, KnowledgeError
from attribution.prompts.knowledge import Fact, Knowledge, Prompt, Source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["OWN", "load_prompts", "write_prompts"]

OWN = "own"
"""The category of prompts that name none."""

_TEXTS = ("prompt", "answer", "category", "fact")
_KEYS = (*_TEXTS, "joined")
_FLAGS = {"": False, "false": False, "true": True}
_WORDS_KEYS = {"category", "words"}


@dataclass(frozen=True)
class _Row:
    """A table of keys and values as read, with the line it stands on."""

    line: int
    values: Mapping[str, Any]


@dataclass
class _Contents:
    """What a file holds, before any value is looked at, and the problems that were in the way."""

    prompts: list[_Row]
    words: list[_Row]
    problems: list[str]


def load_prompts(path: Path) -> Knowledge:
    """Load a file of one's own prompts.

    Args:
        path: A ``.csv``, ``.jsonl`` or ``.toml`` file.

    Returns:
        The prompts, those of one fact together, else in file order, and the words of each category. An answer begins
        with one space, whether or not it does in the file.

    Raises:
        KnowledgeError: If the file cannot be read or breaks a rule; one line for each problem, ``file:line`` first.
    """
    path = Path(path)
    source = Source(path, "")
    problems = []
    contents = _Contents([], [], [])
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        problems.append(source.problem(1, f"ends in {path.suffix!r}; give a .csv, .jsonl or .toml file."))
    else:
        try:
            # Spreadsheets begin a UTF-8 file with a byte order mark.
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(source.problem(1, f"cannot be read ({error}); give a UTF-8 file."))
        else:
            source = Source(path, text)
            contents = reader(source, text)
            problems = contents.problems
            if not problems and not contents.prompts:
                problems = [source.problem(1, "holds no prompt; give at least one, with its answer.")]
    if not problems:
        problems = [problem for row in contents.prompts for problem in _check_row(source, row)]
        problems += [problem for row in contents.words for problem in _check_words(source, row)]
    if not problems:
        problems = list(_check_together(source, contents))
    if problems:
        raise KnowledgeError("\n".join(problems))
    return _knowledge_of(contents)


def write_prompts(path: Path, prompts: Sequence[Prompt], words: Mapping[str, Sequence[str]]) -> None:
    """Write prompts as JSONL that :func:`load_prompts` reads.

    Args:
        path: The file, which is replaced.
        prompts: Prompts with categories.
        words: Category to every word of the type, without leading space; of categories without a prompt nothing is
            written.

    Raises:
        BadInputError: If there is no prompt, or the file cannot be written.
    """
    if not prompts:
        raise BadInputError(f"no prompt is left to write to {str(path)!r}; give other prompts, or leave the file out.")
    used = {prompt.category for prompt in prompts}
    rows: list[dict[str, object]] = [
        {"category": category, "words": list(each)} for category, each in words.items() if category in used
    ]
    for prompt in prompts:
        row: dict[str, object] = {"prompt": prompt.text, "answer": prompt.word, "category": prompt.category}
        if prompt.joined:
            row["joined"] = True
        if prompt.subject:
            row["fact"] = _named(prompt)
        rows.append(row)
    try:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise BadInputError(
            f"{str(path)!r} cannot be written ({error}); give a file in a folder that exists."
        ) from None


def _named(prompt: Prompt) -> str:
    """Return the name of a prompt's fact within its category."""
    return "/".join(part for part in (prompt.relation, prompt.subject) if part)


def _read_csv(source: Source, text: str) -> _Contents:
    rows: list[_Row] = []
    problems: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            # A field in quotes may run over several lines; the row is where it begins.
            start, line = line, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                if not {"prompt", "answer"} <= set(header) <= set(_KEYS) or len(set(header)) < len(header):
                    found = ",".join(header)
                    problem = f"header {found!r} must be prompt,answer, with category,fact,joined if needed; mend it."
                    return _Contents([], [], [source.problem(start, problem)])
            elif len(fields) != len(header):
                problem = f"row {','.join(fields)!r} has {len(fields)} fields and the header {len(header)}; put a text "
                problems.append(source.problem(start, f"{problem}with commas between double quotes."))
            else:
                rows.append(_Row(start, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        problems.append(source.problem(line, f"is not CSV: {error}; double a quote inside a text between quotes."))
    return _Contents(rows, [], problems)


def _read_jsonl(source: Source, text: str) -> _Contents:
    contents = _Contents([], [], [])
    # Not splitlines: JSON may hold the other separators of lines inside a string.
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            values = json.loads(row)
        except (ValueError, RecursionError) as error:
            contents.problems.append(source.problem(line, f"is not JSON: {error}; give one object on each line."))
            continue
        if not isinstance(values, dict):
            contents.problems.append(
                source.problem(line, f'{_short(values)} is no object; give {{"prompt": ..., "answer": ...}}.')
            )
        elif "words" in values and "prompt" not in values:
            contents.words.append(_Row(line, values))
        else:
            contents.prompts.append(_Row(line, values))
    return contents


def _read_toml(source: Source, text: str) -> _Contents:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = re.search(r"line (\d+)", str(error))
        line = int(found.group(1)) if found else max(1, len(source.lines))
        return _Contents([], [], [source.problem(line, f"is not TOML: {error}; put texts between double quotes.")])
    contents = _Contents([], [], [])
    for key in sorted(data.keys() - {"prompts", "words"}):
        contents.problems.append(source.problem(source.line_of(key), f"unknown key {key!r}; use prompts and words."))
    prompts, words = data.get("prompts", []), data.get("words", {})
    if not isinstance(prompts, list) or not all(isinstance(each, dict) for each in prompts):
        contents.problems.append(
            source.problem(
                source.line_of("prompts"), f"prompts is {_short(prompts)}; use one [[prompts]] table for each."
            )
        )
    else:
        headers = [
            number for number, each in enumerate(source.lines, start=1) if re.match(r"\s*\[\[ *prompts *\]\]", each)
        ]
        for number, values in enumerate(prompts):
            # Tables may also stand in one list, whose rows are found by their text.
            text_of = values.get("prompt")
            line = headers[number] if len(headers) == len(prompts) else source.line_of(str(text_of))
            contents.prompts.append(_Row(line, values))
    if not isinstance(words, dict):
        contents.problems.append(
            source.problem(source.line_of_key("words", after=1), f"words is {_short(words)}; use a [words] table.")
        )
    else:
        header = source.line_of("[words]")
        for category, each in words.items():
            line = source.line_of_key(category, after=header)
            contents.words.append(_Row(line, {"category": category, "words": each}))
    return contents


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".toml": _read_toml}


def _check_row(source: Source, row: _Row) -> Iterator[str]:
    for key in sorted(row.values.keys() - set(_KEYS)):
        yield source.problem(row.line, f"unknown key {key!r}; use {', '.join(_KEYS)}.")
    values = {key: row.values.get(key) for key in _TEXTS}
    if _joined(row) is None:
        yield source.problem(row.line, f"joined {_short(row.values['joined'])} is no truth; use true or false.")
    elif _joined(row) and str(values["answer"]).startswith(" "):
        yield source.problem(
            row.line, f"answer {values['answer']!r} is joined and begins with a space; leave out one of the two."
        )
    for key in ("category", "fact"):
        # As in CSV, where every row has every field.
        values[key] = "" if values[key] is None else values[key]
    for key, value in values.items():
        if key in ("prompt", "answer") and (value is None or value == "" or (key == "answer" and str(value).isspace())):
            yield source.problem(row.line, f"row {_short(dict(row.values))} has no {key}; give prompt and answer.")
        elif not isinstance(value, str):
            yield source.problem(row.line, f"{key} {_short(value)} is no string; put it between double quotes.")
        elif re.search("[\ud800-\udfff]", value):
            yield source.problem(
                row.line, f"{key} {value!r} holds half of a character; give both halves, or leave it out."
            )
        elif key == "prompt":
            if value != value.strip():
                yield source.problem(
                    row.line, f"prompt {value!r} has a space at an end; remove it, the answer brings its own."
                )
        elif not _is_plain(value.lstrip(" ") if key == "answer" else value):
            yield source.problem(
                row.line, f"{key} {value!r} has spaces at its end, doubled, or is broken into lines; remove them."
            )


def _check_words(source: Source, row: _Row) -> Iterator[str]:
    category, words = row.values.get("category"), row.values.get("words")
    for key in sorted(row.values.keys() - _WORDS_KEYS):
        yield source.problem(row.line, f"unknown key {key!r} beside words; use category and words.")
    if not isinstance(category, str):
        yield source.problem(row.line, f"category {_short(category)} of words is no string; name it.")
    if not isinstance(words, list) or not all(isinstance(word, str) and word and _is_plain(word) for word in words):
        yield source.problem(
            row.line, f"words of {category!r} are {_short(words)}; give a list of strings without spaces at their ends."
        )
        return
    for word in dict.fromkeys(word for word in words if words.count(word) > 1):
        yield source.problem(row.line, f"word {word!r} of {category!r} stands {words.count(word)} times; keep one.")


def _check_together(source: Source, contents: _Contents) -> Iterator[str]:
    """Check what takes more than one row to see."""
    words: dict[str, Sequence[str]] = {}
    for row in contents.words:
        category = row.values["category"] or OWN
        if category in words:
            yield source.problem(row.line, f"category {category!r} has its words twice; keep one list.")
        words.setdefault(category, row.values["words"])
    first: dict[str, int] = {}
    answers: dict[tuple[str, str], tuple[str, int]] = {}
    found: dict[str, dict[str, int]] = {}
    for row in contents.prompts:
        text, answer, category, fact = _values(row)
        found.setdefault(category, {}).setdefault(answer, row.line)
        if text in first:
            yield source.problem(row.line, f"prompt {text!r} also stands on line {first[text]}; keep one.")
        first.setdefault(text, row.line)
        other, line = answers.setdefault((category, fact), (answer, row.line))
        if fact and other != answer:
            yield source.problem(
                row.line,
                f"fact {fact!r} has the answer {answer!r} here and {other!r} on line {line}; a fact has one, name them "
                "apart.",
            )
        if category in words and answer not in words[category]:
            yield source.problem(row.line, f"answer {answer!r} is not among the words of {category!r}; add it there.")
    for category, lines in found.items():
        if len(words.get(category, lines)) < 2:
            (answer, line), *_ = lines.items()
            yield source.problem(
                line, f"category {category!r} has no word but {answer!r}; add prompts with other answers, or its words."
            )
    for row in contents.words:
        category = row.values["category"] or OWN
        if category not in found:
            yield source.problem(row.line, f"category {category!r} has words and no prompt; add one or leave it out.")


def _joined(row: _Row) -> bool | None:
    """Return whether a row's answer goes on with the prompt's last word; ``None`` if it says neither."""
    given = row.values.get("joined")
    if isinstance(given, bool):
        return given
    return _FLAGS.get(str(given or "").strip().lower())


def _values(row: _Row) -> tuple[str, str, str, str]:
    """Return prompt, answer without leading space, category, and the fact's name or nothing, of a checked row."""
    text, answer, category, fact = (row.values.get(key) or "" for key in _TEXTS)
    return text, answer.lstrip(" "), category or OWN, fact


def _knowledge_of(contents: _Contents) -> Knowledge:
    given = {row.values["category"] or OWN: tuple(row.values["words"]) for row in contents.words}
    answers: dict[str, dict[str, None]] = {}
    texts: dict[tuple[str, str, str, str, bool], list[str]] = {}
    for row in contents.prompts:
        text, answer, category, fact = _values(row)
        answers.setdefault(category, {})[answer] = None
        key = category, answer, fact, "" if fact else text, bool(_joined(row))
        texts.setdefault(key, []).append(text)
    facts = tuple(
        Fact(category, "", fact, answer, tuple(phrasings), literal=True, joined=joined)
        for (category, answer, fact, _, joined), phrasings in texts.items()
    )
    words = {category: given.get(category, tuple(each)) for category, each in answers.items()}
    return Knowledge(facts, words, bundled=False)


def _is_plain(value: str) -> bool:
    return value == " ".join(value.split())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
