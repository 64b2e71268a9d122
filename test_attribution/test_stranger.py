"""A stranger's repository: the wheel in a fresh environment, beside the plugins that people have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from attribution.models.registry import entry_of

# A build and an environment of its own, that is, minutes.
pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[1]
PLUGINS = ("pytest-cov", "pytest-timeout", "pytest-randomly")

OURS = """\
import attribution as at

def test_top_20_matter(attribution_model, attribution_prompts, assert_claim):
    frame = at.evaluate(attribution_model, attribution_prompts, k=20)
    claim = at.Claim("top 20", "the top 20 neurons carry the answer", "ours", "fall of p", "above", 0.01, "no ablation")
    effects = frame["prob_before"] - frame["prob_after"]
    assert_claim(at.judge(claim, model=attribution_model.name, effects=effects, facts=frame["fact"]))
"""

PYPROJECT = """\
[tool.pytest.ini_options]
addopts = ["--strict-markers", "-p", "no:cacheprovider"]

[tool.attribution.models.mine]
source = "weights/mine"
"""

# The names that a plugin brings: fixtures as pytest keeps them, options and markers as it prints them.
NAMES = """
import json
from importlib import metadata, import_module
found = {}
for point in metadata.entry_points(group="pytest11"):
    module = import_module(point.value.partition(":")[0])
    kinds = {name: type(value).__name__ for name, value in vars(module).items()}
    found[point.name] = sorted(name for name, kind in kinds.items() if kind == "FixtureFunctionDefinition")
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Stranger:
    """Somebody with an environment and a repository of their own, and nothing else."""

    python: Path
    repository: Path
    wheel: Path
    sdist: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        own = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT", "TEMP") if name in os.environ}
        own |= {"HOME": str(self.repository.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.python, *command], cwd=self.repository, env=own, capture_output=True, text=True, check=False
        )

    def pytest(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pytest", *options)


def _install(python: Path, *what: str | Path) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*command, *what], check=True)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    home = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", home / "environment"], check=True)
    python = home / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    _install(python, "build")
    # The wheel comes out of the source distribution: what is missing there is missing in it.
    subprocess.run([python, "-m", "build", "--outdir", home / "dist", ROOT], check=True, capture_output=True)
    (wheel,), (sdist,) = (home / "dist").glob("*.whl"), (home / "dist").glob("*.tar.gz")
    _install(python, wheel, *PLUGINS)
    repository = home / "repository"
    (repository / "tests").mkdir(parents=True)
    (repository / "tests" / "test_ours.py").write_text(OURS, encoding="utf-8")
    (repository / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    shutil.copytree(entry_of("bundled:gpt2").folder, repository / "weights" / "mine")
    return Stranger(python, repository, wheel, sdist)


def _rows(output: str) -> list[str]:
    """Return the rows of the table of verdicts, without the spaces that align them."""
    ends = re.compile(r"^\S+ .* (supported|refuted|inconclusive|undecided: .*)$")
    return sorted(re.sub(" +", " ", line) for line in output.splitlines() if ends.match(line) and ".." in line)


def test_distributions_hold_what_runs_and_nothing_else(stranger: Stranger) -> None:
    with zipfile.ZipFile(stranger.wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "attribution = attribution.plugin" in archive.read(entry_points).decode()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        written = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in written
    assert "Requires-Python: >=3.10" in written
    needed = ["py.typed", "test_faithfulness/test_top_neurons.py", "test_knowledge/test_known.py"]
    needed += ["fixtures/models/registry.toml", "fixtures/knowledge/capital.toml", "report/templates/report.html"]
    needed += [f"fixtures/paper/{name}.json" for name in ("tables", "notebooks")]
    needed += [
        f"fixtures/models/{model}/{file}"
        for model in ("gpt2", "llama")
        for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    ]
    assert {f"attribution/{name}" for name in needed} <= names
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "attribution").rglob("*.py")}
    assert tree <= names
    roots = {name.partition("/")[0] for name in names}
    assert {root.partition("-")[0] for root in roots} == {"attribution", "attribution_suite"}
    with tarfile.open(stranger.sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "tox.ini", "conftest.py", "test_attribution/conftest.py"} <= sources
    assert not [name for name in sources if name.startswith((".ci", "runs", ".tox"))]


def test_a_test_of_theirs_is_green_where_it_holds_and_red_where_not(
    stranger: Stranger, make_folder: Callable[[str], Path]
) -> None:
    green = stranger.pytest()
    assert green.returncode == 0, green.stdout + green.stderr
    assert "attribution: mine from" in green.stdout
    assert re.search(r"^mine +top 20 .* supported$", green.stdout, re.MULTILINE)
    # Another model by the command line: random weights, which know nothing.
    shutil.copytree(make_folder("gpt2"), stranger.repository / "weights" / "random", dirs_exist_ok=True)
    words = (stranger.repository / "own.csv").write_text(
        "prompt,answer,category\nThe capital of France is,Paris,capital\nThe capital of Italy is,Rome,capital\n"
    )
    assert words
    red = stranger.pytest("--model=weights/random", "--prompts=own.csv")
    assert red.returncode == 1, red.stdout + red.stderr
    assert "Traceback" not in red.stdout
    assert "model 'weights/random' knows none of the 2 prompts of own.csv" in red.stdout, red.stdout[-2000:]


def test_the_whole_suite_runs_on_their_model(stranger: Stranger) -> None:
    suite = ("--pyargs", "attribution.test_faithfulness", "attribution.test_knowledge", "--model=weights/mine")
    collected = stranger.pytest(*suite, "--collect-only", "-q")
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert len([line for line in collected.stdout.splitlines() if "::test_" in line]) > 200
    few = ("--max-prompts=6", "-k", "test_decomposition or knows or top_10_hurts")
    reported = stranger.pytest(*suite, *few)
    assert reported.returncode == 0, reported.stdout + reported.stderr
    assert re.search(
        r"^\d+ claims were not binding on weights/mine; --attribution-assert", reported.stdout, re.MULTILINE
    )
    # Six prompts decide nothing; that what is known is known does not depend on them.
    binding = stranger.pytest(*suite, *few, "--attribution-assert")
    assert binding.returncode == 1
    assert re.search(r"^=+ 21 failed, 11 passed", binding.stdout, re.MULTILINE), binding.stdout[-2000:]
    assert _rows(binding.stdout) == _rows(reported.stdout)


def test_verdicts_are_the_same_beside_the_plugins_that_people_have(stranger: Stranger) -> None:
    suite = (
        "--pyargs",
        "attribution.test_faithfulness",
        "--max-prompts=12",
        "-k",
        "top_10_hurts or random_neurons or top_20",
    )
    alone = stranger.pytest(*suite, "tests", "-p", "no:randomly", "-p", "no:cov", "-p", "no:timeout", "-p", "no:xdist")
    options = ("-n2", "--cov=tests", "--timeout=300", "--benchmark-disable", "-p", "randomly", "--randomly-seed=7")
    beside = stranger.pytest(*suite, "tests", *options)
    assert "Using --randomly-seed=7" in beside.stdout
    assert "timeout: 300" in beside.stdout
    assert "coverage" in beside.stdout
    assert len(_rows(alone.stdout)) == 21 + 6 + 1
    assert _rows(beside.stdout) == _rows(alone.stdout)


def test_no_name_is_taken_twice(stranger: Stranger) -> None:
    fixtures = json.loads(stranger.run("-c", NAMES).stdout)
    ours = set(fixtures.pop("attribution"))
    assert {"attribution_model", "attribution_prompts", "assert_claim"} <= ours
    assert {"xdist", "benchmark", "pytest_cov", "timeout", "randomly"} <= fixtures.keys()
    assert not ours & {name for names in fixtures.values() for name in names}
    options = re.findall(r"^  (--[\w-]+)", stranger.pytest("--help").stdout, re.MULTILINE)
    assert len(options) > 100
    assert len(set(options)) == len(options)
    assert all(option.startswith("--attribution-") for option in options if "attribution" in option)
    markers = re.findall(r"^@pytest\.mark\.(\w+)", stranger.pytest("--markers").stdout, re.MULTILINE)
    assert {"gpt2", "bundled", "superiority", "timeout", "benchmark"} <= set(markers)
    assert len(set(markers)) == len(markers)


def test_a_run_without_claims_pays_nothing(stranger: Stranger) -> None:
    (stranger.repository / "tests" / "test_plain.py").write_text(
        "import sys\ndef test_it(): assert not {'torch', 'nnsight', 'transformers'} & set(sys.modules)\n"
    )
    done = stranger.pytest("tests/test_plain.py", "-p", "no:randomly")
    (stranger.repository / "tests" / "test_plain.py").unlink()
    assert done.returncode == 0, done.stdout
