"""Forty-odd ways to get it wrong, from the command line, from pytest and from Python: each is answered by one sentence.

What a sentence holds: the value, what was expected, and what to do. Modules of their own have tests of more kinds; this
is the list of what people meet.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import attribution as at
from attribution.__main__ import main

PROMPT, ANSWER = "The capital of France is", " Paris"
# A model that is there: without it, the complaint would be about the model.
ASK = ("explain", PROMPT, ANSWER)
REMEDY = re.compile(
    r"\b(use|give|pass|choose|add|put|shorten|write|must|go online|load|leave|mend|name|remove|make|save|know)s?\b"
)


@dataclass(frozen=True)
class Place:
    """A folder to get it wrong in, with a small model in ``model``."""

    folder: Path

    def file(self, name: str, text: str) -> Place:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return self

    def without(self, pattern: str) -> Place:
        for path in (self.folder / "model").glob(pattern):
            path.unlink()
        return self

    def cut(self) -> Place:
        path = self.folder / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        return self

    def config(self, **changes: object) -> Place:
        path = self.folder / "model" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | changes
        return self.file("model/config.json", json.dumps(config))


def _nothing(_: Place) -> None:
    """Leave the folder as it is."""


Prepare = Callable[[Place], object]
Row = tuple[tuple[str, ...], Prepare, tuple[str, ...]]

COMMANDS: dict[str, Row] = {
    "bundled model that is none": ((*ASK, "--model=bundled:gtp2"), _nothing, ("'bundled:gtp2'", "bundled:gpt2")),
    "model that is nowhere": ((*ASK, "--model=gtp2"), _nothing, ("'gtp2'", "or a hub id such as")),
    "hub id with a space": ((*ASK, "--model=org/my model"), _nothing, ("'org/my model'", "'org/name'")),
    "hub without network": ((*ASK, "--model=org/name"), _nothing, ("'org/name'", "HF_HUB_OFFLINE", "--models-dir=DIR")),
    "models folder without the model": ((*ASK, "--model=gpt2", "--models-dir=."), _nothing, ("put its files",)),
    "folder without config": ((*ASK, "--model=./model"), lambda p: p.without("config.json"), ("config.json",)),
    "folder without weights": ((*ASK, "--model=./model"), lambda p: p.without("*.safetensors"), ("model.safetensors",)),
    "weights cut off": ((*ASK, "--model=./model"), lambda p: p.cut(), ("'./model'", "model.safetensors")),
    "folder without tokenizer": ((*ASK, "--model=./model"), lambda p: p.without("tokenizer*"), ("tokenizer",)),
    "config that is no JSON": ((*ASK, "--model=./model"), lambda p: p.file("model/config.json", "{"), ("config.json",)),
    "architecture without anatomy": (
        (*ASK, "--model=./model"), lambda p: p.file("model/config.json", '{"model_type": "xglm"}'), ("'xglm'", "gpt2")
    ),
    "architecture that comes as code": (
        (*ASK, "--model=./model"),
        lambda p: p.config(model_type="mine", auto_map={"AutoConfig": "code.Mine"}),
        ("auto_map", "never run"),
    ),
    "device that is a typing error": ((*ASK, "--device=cdua"), _nothing, ("'cdua'", "cpu")),
    "device that is not there": ((*ASK, "--device=cuda:77"), _nothing, ("'cuda:77'", "use one of cpu")),
    "revision of a folder": ((*ASK, "--model=./model", "--revision=v2"), _nothing, ("'v2'", "leave the revision out")),
    "empty prompt": (("explain", "", ANSWER), _nothing, ("prompt ''", "empty")),
    "prompt that is too long": (("explain", "is " * 300, ANSWER), _nothing, ("tokens", "64", "shorten")),
    "answer of several tokens": (("explain", PROMPT, " Paris Rome"), _nothing, ("' Paris Rome'", "2 tokens")),
    "answer without its space": (("explain", PROMPT, "Paris"), _nothing, ("did you mean ' Paris'",)),
    "no neuron asked for": ((*ASK, "-k", "0"), _nothing, ("k = 0", "between 1 and 2048", "choose")),
    "page in a folder that is not there": ((*ASK, "--html=no/where.html", "-k1"), _nothing, ("'no/where.html'",)),
    "prompts that are not there": (("select", "./model", "--prompts=own.csv"), _nothing, ("own.csv", "UTF-8 file")),
    "prompts in another format": (
        ("select", "./model", "--prompts=own.xlsx"), lambda p: p.file("own.xlsx", "x"), (".csv, .jsonl or .toml",)
    ),
    "prompts without a header": (
        ("select", "./model", "--prompts=own.csv"), lambda p: p.file("own.csv", "A b,c\n"), ("own.csv:1", "prompt,ans")
    ),
    "kept prompts over the given ones": (
        ("select", "./model", "--prompts=a.jsonl", "--out=a.jsonl"), _nothing, ("'a.jsonl'", "another name")
    ),
    "questions that are not there": (("triviaqa", "no.json", "--out=a.jsonl"), _nothing, ("no.json",)),
    "questions from nowhere": (("triviaqa", "--out=a.jsonl"), _nothing, ("--hub", "exactly one")),
    "settings with a typing error": (
        ("models",), lambda p: p.file("pyproject.toml", "[tool.attribution]\nmodles = 1"), ("'modles'", "models.NAME")
    ),
    "baseline that is not there": (("baselines", "prune", "main"), _nothing, ("'main'", "nothing was removed")),
}  # fmt: skip

RUNS: dict[str, Row] = {
    "type that is none": (("--dtype=int8",), _nothing, ("int8", "float32")),
    "seed that is none": (("--seed=x",), _nothing, ("'x' is not a seed",)),
    "no prompts": (("--max-prompts=0",), _nothing, ("'0'", "1 or more")),
    "revision of two models": (("--revision=v2",), _nothing, ("--revision=v2", "name one")),
    "baseline without a name": (("--attribution-save", "."), _nothing, ("--attribution-save=NAME",)),
    "baseline with a path for a name": (("--attribution-save=a/b",), _nothing, ("'a/b'", "letters, digits")),
    "comparison with nothing": (("--attribution-compare=main",), _nothing, ("'main'", "save one")),
    "foreign baseline": (
        ("--attribution-compare=main",), lambda p: p.file(".attribution/main.json", "[1]"), ("main.json", "prune main")
    ),
    "update of nothing": (("--attribution-update",), _nothing, ("nothing to write", "--attribution-save=NAME")),
    "failing on what is unknown": (("--attribution-fail=luck",), _nothing, ("'luck'", "verdicts")),
    "allowing without comparing": (("--attribution-allow=dtype",), _nothing, ("--attribution-compare",)),
    "report into a file": (("--attribution-report=own",), lambda p: p.file("own", ""), ("own", "name a folder")),
    "setting that is none": (
        (), lambda p: p.file("pyproject.toml", "[tool.attribution]\nmodel = 'x'"), ("'model'", "models.NAME")
    ),
    "model without a source": (
        (), lambda p: p.file("pyproject.toml", "[tool.attribution.models.x]\ndtype = 'float16'"), ("source", "give")
    ),
    "prompts with a typing error": (
        ("--prompts=own.jsonl",), lambda p: p.file("own.jsonl", '{"promt": "A b", "answer": "c"}'), ("'promt'", "use")
    ),
    "model of the hub without network": (("--model=org/name",), _nothing, ("'org/name'", "go online", "1 test waits")),
    "folder that is no model": (("--model=./empty",), lambda p: p.file("empty/x", ""), ("config.json",)),
    "method under a name that is taken": (
        (),
        lambda p: p.file("conftest.py", "import attribution as at\nat.register_method('random', source='ours')(len)"),
        ("'random'", "another name"),
    ),
}  # fmt: skip

KINDS = {"python -m attribution": COMMANDS, "pytest": RUNS}


@pytest.fixture(scope="module")
def plain_environment() -> dict[str, str]:
    """The environment of somebody without network and without settings of this package."""
    own = {name: value for name, value in os.environ.items() if not re.match(r"HF_|ATTRIBUTION_|PYTEST_", name)}
    root = str(Path(at.__file__).parents[1])
    return own | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def _command(arguments: tuple[str, ...]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    return status, errors.getvalue()


def _run(arguments: tuple[str, ...], place: Place, environment: dict[str, str]) -> tuple[int, str]:
    place.file("test_own.py", "def test_it(attribution_model): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", *arguments]
    done = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, f"{done.stderr}\n{done.stdout}"


@pytest.mark.parametrize(
    ("where", "kind"), [(where, kind) for where, kinds in KINDS.items() for kind in kinds], ids=lambda text: text
)
def test_what_is_wrong_is_said_in_one_sentence(
    where: str,
    kind: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain_environment: dict[str, str],
) -> None:
    arguments, prepare, words = KINDS[where][kind]
    shutil.copytree(folders["gpt2"], tmp_path / "model")
    place = Place(tmp_path)
    prepare(place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATTRIBUTION_MODELS", raising=False)
    if where == "pytest":
        status, output = _run(arguments, place, plain_environment)
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        status, output = _command(arguments)
    assert status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED), output
    assert "Traceback" not in output
    # Of argparse the second line; of pytest what it prints of an error, or of a test that failed.
    said = [line for line in output.splitlines() if re.match(r"error: |ERROR: (?!usage)|.*: error: ", line)]
    said = said or [
        line.removeprefix("E   ").strip() for line in output.splitlines() if line.startswith(("model ", "E  "))
    ]
    assert said, output
    message = said[0]
    for word in words:
        assert word in message, message
    assert REMEDY.search(message), f"no word on what to do: {message}"


def test_there_are_forty_kinds() -> None:
    assert sum(map(len, KINDS.values())) >= 40
