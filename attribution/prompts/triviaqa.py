"""Prompts from TriviaQA whose answers are words of the six categories, as the paper took them.

The paper says that its sentences are questions of TriviaQA whose answer is a language, a capital, a country, a color, a
number or a month. It gives neither its word lists nor its template; one stored output of its notebooks shows the prompt
``Q : What is the capital of France? A :``. Here the words are those of the bundled knowledge files and the template is
read off that output. The selection rule, which the paper applies for each model, is a step of its own:
:mod:`attribution.experiments.selection_rule`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attribution.errors import BadInputError, KnowledgeError
from attribution.prompts.knowledge import Prompt, gives_away

__all__ = ["SPLITS", "TEMPLATE", "build_prompts", "download", "read_questions"]

TEMPLATE = "Q : {question} A :"
"""What becomes of a question, as in the one prompt that the paper's notebooks show."""

REPOSITORY = "mandarjoshi/trivia_qa"
"""The data set on the Hugging Face hub."""

REVISION = "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f"
"""Its commit, so that the same questions come each time."""

SPLITS = ("train", "validation")
"""Parts of the data set that hold answers; those of ``test`` are hidden."""

KEPT = "kept"
GIVEN_AWAY = "question gives its answer away"
REPEATED = "question was asked before"
SEVERAL = "answer is a word of several categories"
NO_WORD = "answer is no word of a category"


def download(split: str) -> Path:
    """Download one split without the texts that answers were searched in, once, from the hub: a Parquet file.

    Raises:
        BadInputError: If there is no such split, or the hub cannot be reached.
    """
    if split not in SPLITS:
        raise BadInputError(f"split {split!r} of {REPOSITORY} has no answers; use one of {', '.join(SPLITS)}.")
    import huggingface_hub

    name = f"rc.nocontext/{split}-00000-of-00001.parquet"
    try:
        return Path(
            huggingface_hub.hf_hub_download(repo_id=REPOSITORY, repo_type="dataset", filename=name, revision=REVISION)
        )
    except Exception as error:  # The hub's client raises many kinds; each gets one sentence.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BadInputError(
            f"{name} of the hub's data set {REPOSITORY!r} cannot be downloaded ({cause}); go online, or give the file "
            "itself."
        ) from None


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Read questions with their answers.

    Args:
        path: A ``.jsonl`` file with one row of the hub's data set on each line (``question`` and ``answer.value`` are
            read), a ``.json`` file of the original release (``Data``, with ``Question`` and ``Answer.Value``), or a
            ``.parquet`` file of the hub's data set, which needs pyarrow.

    Returns:
        Question and answer of each row, in file order.

    Raises:
        KnowledgeError: If the file cannot be read, or is in another format; ``file:line`` first, for JSON and Parquet
            the row in place of the line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise KnowledgeError(f"{path}:1: ends in {path.suffix!r}; give a .jsonl, .json or .parquet file of TriviaQA.")
    try:
        rows = list(reader(path))
    except KnowledgeError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        cause = str(error).strip().splitlines()[:1]
        raise KnowledgeError(
            f"{path}:1: cannot be read ({''.join(cause)}); give a {path.suffix} file in a format of TriviaQA."
        ) from None
    if not rows:
        raise KnowledgeError(f"{path}:1: holds no question; give a file of TriviaQA.")
    return [_question_of(path, line, row) for line, row in rows]


def _question_of(path: Path, line: int, row: Any) -> tuple[str, str]:
    """Return question and answer of a row in the hub's names, or in those of the original release."""
    for question, answer, value in (("question", "answer", "value"), ("Question", "Answer", "Value")):
        if isinstance(row, Mapping) and isinstance(row.get(question), str) and isinstance(row.get(answer), Mapping):
            found = row[answer].get(value)
            if isinstance(found, str) and row[question].strip():
                return row[question], found
    text = repr(row) if len(repr(row)) <= 60 else f"{repr(row)[:60]}..."
    raise KnowledgeError(
        f"{path}:{line}: row {text} is not of TriviaQA; give a string question, and an answer with a string value."
    )


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines: JSON may hold the other separators of lines inside a string.
    for line, row in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except (ValueError, RecursionError) as error:
                raise KnowledgeError(f"{path}:{line}: is not JSON: {error}; give one object on each line.") from None


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = data.get("Data") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise KnowledgeError(f"{path}:1: has no list named Data; give a .json file of TriviaQA's release.")
    yield from enumerate(rows, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        frame = pd.read_parquet(path, columns=["question", "answer"], engine="pyarrow")
    except ImportError:
        raise KnowledgeError(
            f"{path}:1: is Parquet, which pandas reads with pyarrow alone; pip install pyarrow, or give a .jsonl file."
        ) from None
    yield from enumerate(frame.to_dict("records"), start=1)


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def build_prompts(
    questions: Iterable[tuple[str, str]], words: Mapping[str, Sequence[str]], template: str = TEMPLATE
) -> tuple[list[Prompt], pd.DataFrame]:
    """Make prompts of the questions whose answer is a word of one category.

    The answer as the data set gives it must be the word, in capitals or not; it is then spelled as in the word list.
    Other names of an answer are not looked at. An answer that is a word of several categories, such as Singapore, does
    not tell which is asked for and is dropped.

    Args:
        questions: Question and answer of each row.
        words: Category to every word of the type.
        template: What a question becomes, with ``{question}`` in its place.

    Returns:
        The prompts, in the order given, and a report: one row for each category, then one for the answers of several
        and one for those of none; ``category``, ``questions``, and what became of them, which adds up to ``questions``.

    Raises:
        BadInputError: If the template cannot be used.
    """
    if template.count("{question}") != 1 or template != template.strip():
        raise BadInputError(
            f"template {template!r} must hold {{question}} once and have no space at an end; use {TEMPLATE!r}."
        )
    spelled: dict[str, dict[str, str]] = {}
    for category, each in words.items():
        for word in each:
            spelled.setdefault(word.casefold(), {})[category] = word
    prompts: list[Prompt] = []
    asked: set[str] = set()
    counts: Counter[tuple[str, str]] = Counter()
    for text, answer in questions:
        question = " ".join(text.split())
        found = spelled.get(answer.strip().casefold(), {})
        if len(found) != 1:
            counts["several" if found else "none", SEVERAL if found else NO_WORD] += 1
            continue
        ((category, word),) = found.items()
        if gives_away(question, word):
            counts[category, GIVEN_AWAY] += 1
        elif question.casefold() in asked:
            counts[category, REPEATED] += 1
        else:
            counts[category, KEPT] += 1
            prompts.append(Prompt(template.replace("{question}", question), f" {word}", category))
        asked.add(question.casefold())
    fates = (KEPT, GIVEN_AWAY, REPEATED, SEVERAL, NO_WORD)
    rows = []
    for category in (*words, "several", "none"):
        mine = {fate: counts[category, fate] for fate in fates}
        rows.append({"category": category, "questions": sum(mine.values()), **mine})
    return prompts, pd.DataFrame(rows)
