"""Knowledge prompts: facts of six categories, each a prompt that ends right before a one-token answer.

A category is one TOML file that a person can edit::

    category = "capital"
    words = ["Paris", "Rome"]               # every word of the type: the rivals of the selection rule

    [relations.country_capital]
    phrasings = ["The capital of {subject} is", "...", "..."]

    [relations.country_capital.facts]
    France = "Paris"
    Italy = "Rome"

``{subject}`` is replaced by the subject as written, ``{Subject}`` by the subject with its first letter
capitalised. The answer follows the prompt after one space. Nothing here needs a model or torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from attribution.errors import BadInputError, KnowledgeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CATEGORIES", "Fact", "Knowledge", "Prompt", "find_problems", "load_knowledge", "read_token_ids"]

CATEGORIES = ("language", "capital", "country", "color", "number", "month")
MIN_PHRASINGS = 3
_FILE_KEYS = {"category", "words", "relations"}
_RELATION_KEYS = {"phrasings", "facts"}


@dataclass(frozen=True, order=True)
class Prompt:
    """A text that ends right before its answer.

    Attributes:
        text: The prompt, without a trailing space.
        answer: The answer as it continues the text, with its leading space.
        category: One of :data:`CATEGORIES`, or any name, or none, for a prompt of the user's own.
        relation: The relation within the category, such as ``country_capital``; empty where a fact has but a name.
        subject: What the fact is about, as written in the file; empty where the prompt is the fact.
        phrasing: Position of the phrasing in its relation, from 0.
        joined: Whether the answer continues the last word of the text, with no space between them.
    """

    text: str
    answer: str
    category: str = ""
    relation: str = ""
    subject: str = ""
    phrasing: int = 0
    joined: bool = False

    def answered(self, word: str) -> Prompt:
        """Return the same text with a word as its answer, which follows as this prompt's own does."""
        return replace(self, answer=word if self.joined else f" {word}")

    @property
    def word(self) -> str:
        """The answer without its leading space."""
        return self.answer.removeprefix(" ")

    @property
    def fact(self) -> str:
        """The fact behind the prompt: prompts that share it are phrasings of one piece of knowledge."""
        if not self.subject:
            return self.text
        return "/".join(part for part in (self.category, self.relation, self.subject) if part)


@dataclass(frozen=True)
class Fact:
    """One subject with its answer and every phrasing of the question.

    Attributes:
        category: What kind of word the answer is.
        relation: The relation within the category.
        subject: What the fact is about.
        answer: The answer, without leading space.
        phrasings: The texts, in which ``{subject}`` and ``{Subject}`` stand for the subject.
        literal: Whether they are prompts as they stand, whose braces stand for nothing.
        joined: Whether the answer continues their last words, with no space between.
    """

    category: str
    relation: str
    subject: str
    answer: str
    phrasings: tuple[str, ...]
    literal: bool = False
    joined: bool = False

    def prompts(self) -> Iterator[Prompt]:
        """Yield one :class:`Prompt` per phrasing."""
        capitalised = self.subject[:1].upper() + self.subject[1:]
        for number, phrasing in enumerate(self.phrasings):
            text = phrasing
            if not self.literal:
                text = text.replace("{subject}", self.subject).replace("{Subject}", capitalised)
            own = Prompt(text, "", self.category, self.relation, self.subject, number, self.joined)
            yield own.answered(self.answer)


@dataclass(frozen=True)
class Knowledge:
    """Facts and the full word list of each category.

    Attributes:
        facts: Every fact, in file order.
        words: Category to all its words, without leading space; the rivals in the selection rule.
        bundled: Whether they come with the package: what the registry records of a model was measured on these.
    """

    facts: tuple[Fact, ...]
    words: dict[str, tuple[str, ...]]
    bundled: bool = True

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """Every phrasing of every fact, in file order."""
        return tuple(prompt for fact in self.facts for prompt in fact.prompts())


class Source:
    """A file's text, able to say on which line a key or a string stands.

    A TOML parser forgets where a value came from; a person who must mend one needs the line.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()

    def line_of(self, needle: str, *, after: int = 1) -> int:
        """Return the first line, from ``after`` on, that holds ``needle``; ``after`` if none does."""
        for number, line in enumerate(self.lines[after - 1 :], start=after):
            if needle in line:
                return number
        return after

    def line_of_key(self, key: str, *, after: int) -> int:
        """Return the line on which ``key`` is assigned, searching from line ``after``."""
        pattern = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
        for number, line in enumerate(self.lines[after - 1 :], start=after):
            if pattern.match(line):
                return number
        return after

    def problem(self, line: int, sentence: str) -> str:
        return f"{self.path}:{line}: {sentence}"


def gives_away(text: str, answer: str) -> bool:
    """Say whether a word of ``text`` begins with ``answer``: "Germany" gives "German" away."""
    return re.search(rf"\b{re.escape(answer)}", text, flags=re.IGNORECASE) is not None


def _check_phrasings(source: Source, relation: str, phrasings: Any, header: int) -> Iterator[str]:
    if not isinstance(phrasings, list) or not all(isinstance(item, str) for item in phrasings):
        yield source.problem(header, f"relation {relation!r} needs a list of strings named phrasings.")
        return
    if len(phrasings) < MIN_PHRASINGS:
        yield source.problem(
            header, f"relation {relation!r} has {len(phrasings)} phrasings; write at least {MIN_PHRASINGS}."
        )
    for phrasing in phrasings:
        line = source.line_of(phrasing, after=header)
        if len(re.findall(r"\{[Ss]ubject\}", phrasing)) != 1:
            yield source.problem(line, f"phrasing {phrasing!r} must hold {{subject}} or {{Subject}} exactly once.")
        if phrasing != " ".join(phrasing.split()):
            yield source.problem(line, f"phrasing {phrasing!r} has spaces at an end or doubled; remove them.")


def _check_facts(source: Source, relation: str, facts: Any, words: set[str], header: int) -> Iterator[str]:
    if not isinstance(facts, dict) or not facts:
        yield source.problem(header, f"relation {relation!r} needs a table of facts, subject = answer.")
        return
    for subject, answer in facts.items():
        line = source.line_of_key(subject, after=header)
        if not isinstance(answer, str) or not re.fullmatch(r"\S+", answer):
            yield source.problem(line, f"answer {answer!r} of {subject!r} must be one word, as a string.")
        elif answer not in words:
            yield source.problem(line, f"answer {answer!r} of {subject!r} is not in this file's words; add it there.")


def _check_structure(source: Source, data: dict[str, Any]) -> Iterator[str]:
    for key in data.keys() - _FILE_KEYS:
        yield source.problem(source.line_of(key), f"unknown key {key!r}; known are {', '.join(sorted(_FILE_KEYS))}.")
    if data.get("category") not in CATEGORIES:
        yield source.problem(
            source.line_of("category"), f"category {data.get('category')!r} must be one of {', '.join(CATEGORIES)}."
        )
    words = data.get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        yield source.problem(source.line_of("words"), "words must be a list of strings: every word of this type.")
        words = []
    for word in {word for word in words if words.count(word) > 1}:
        yield source.problem(source.line_of(f'"{word}"'), f"word {word!r} stands {words.count(word)} times; keep one.")
    relations = data.get("relations")
    if not isinstance(relations, dict) or not relations:
        yield source.problem(1, "no [relations.NAME] table; a category needs at least one relation.")
        return
    for name, relation in relations.items():
        header = source.line_of(f"[relations.{name}]")
        if not isinstance(relation, dict):
            yield source.problem(
                source.line_of_key(name, after=1), f"relation {name!r} must be a [relations.{name}] table."
            )
            continue
        for key in relation.keys() - _RELATION_KEYS:
            yield source.problem(
                source.line_of(key, after=header), f"unknown key {key!r} in relation {name!r}; known: facts, phrasings."
            )
        yield from _check_phrasings(source, name, relation.get("phrasings"), header)
        facts_header = source.line_of(f"[relations.{name}.facts]", after=header)
        yield from _check_facts(source, name, relation.get("facts"), set(words), facts_header)


@dataclass(frozen=True)
class _CategoryFile:
    """One file as read: its lines, its facts and words, and every problem that can be seen in it alone."""

    source: Source
    category: str
    words: tuple[str, ...]
    facts: tuple[Fact, ...]
    problems: tuple[str, ...]

    def line_of(self, fact: Fact) -> int:
        facts = self.source.line_of(f"[relations.{fact.relation}.facts]")
        return self.source.line_of_key(fact.subject, after=facts)


def _read(path: Path) -> _CategoryFile:
    source, problems, data = Source(path, ""), [], {}
    try:
        source = Source(path, path.read_text(encoding="utf-8"))
        data = tomllib.loads("\n".join(source.lines))
        problems = list(_check_structure(source, data))
    except (OSError, UnicodeDecodeError) as error:
        problems = [source.problem(1, f"cannot be read ({error}); give a UTF-8 TOML file.")]
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = int(found.group(1)) if found else len(source.lines)
        problems = [source.problem(line, f"is not TOML: {error}; subjects with spaces need quotes, names stand once.")]
    if problems:
        return _CategoryFile(source, "", (), (), tuple(problems))
    facts = tuple(
        Fact(data["category"], name, subject, answer, tuple(relation["phrasings"]))
        for name, relation in data["relations"].items()
        for subject, answer in relation["facts"].items()
    )
    file = _CategoryFile(source, data["category"], tuple(data["words"]), facts, ())
    given_away = [
        source.problem(file.line_of(fact), f"prompt {prompt.text!r} gives its answer {fact.answer!r} away; reword it.")
        for fact in facts
        for prompt in fact.prompts()
        if gives_away(prompt.text, fact.answer)
    ]
    return replace(file, problems=tuple(given_away))


def find_problems(paths: Iterable[Path], token_ids: dict[str, int] | None = None) -> list[str]:
    """Validate knowledge files together.

    Args:
        paths: The files.
        token_ids: GPT-2 token id of each word with its leading space; a word that is absent is not one
            token there. ``None`` leaves this check out.

    Returns:
        One sentence per problem, each beginning with ``file:line``; empty if all is well.
    """
    problems: list[str] = []
    made_at: dict[str, str] = {}
    for file in map(_read, sorted(paths)):
        problems += file.problems
        if file.problems:
            continue
        for fact in file.facts:
            line = file.line_of(fact)
            for prompt in fact.prompts():
                if prompt.text in made_at:
                    place = made_at[prompt.text]
                    problems.append(
                        file.source.problem(line, f"prompt {prompt.text!r} is also made at {place}; keep one.")
                    )
                made_at.setdefault(prompt.text, f"{file.source.path}:{line}")
        for word in file.words:
            if token_ids is not None and word not in token_ids:
                line = file.source.line_of(f'"{word}"')
                problems.append(file.source.problem(line, f"word {word!r} is not one GPT-2 token; leave it out."))
    return problems


def read_token_ids(path: Path) -> dict[str, int]:
    """Read the stored table of words and their GPT-2 token ids (with a leading space)."""
    return {str(word): int(token) for word, token in json.loads(path.read_text(encoding="utf-8")).items()}


def load_knowledge(directory: Path | None = None, categories: Sequence[str] | None = None) -> Knowledge:
    """Load knowledge files.

    Args:
        directory: Folder of TOML files; the project's own when ``None``.
        categories: Which categories to keep; all when ``None``.

    Returns:
        The facts and word lists.

    Raises:
        BadInputError: If a category is unknown.
        KnowledgeError: If there are no files, or a file breaks a rule.
    """
    for category in categories or ():
        if category not in CATEGORIES:
            raise BadInputError(f"category {category!r} is unknown; use one of {', '.join(CATEGORIES)}.")
    bundled = directory is None
    if directory is None:
        from attribution.resources import fixtures_folder

        directory = fixtures_folder("knowledge")
    paths = sorted(directory.glob("*.toml"))
    if not paths:
        raise KnowledgeError(f"{directory}:1: holds no .toml file; give a folder of knowledge files.")
    files = [_read(path) for path in paths]
    problems = [problem for file in files for problem in file.problems]
    if problems:
        raise KnowledgeError("\n".join(problems))
    chosen = [file for file in files if categories is None or file.category in categories]
    facts = tuple(fact for file in chosen for fact in file.facts)
    return Knowledge(facts, {file.category: file.words for file in chosen}, bundled)
