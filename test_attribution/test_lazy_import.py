"""Importing the package costs nothing: the pytest plugin is loaded in every run, also by people who use none of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attribution

HEAVY = ("torch", "transformers", "nnsight", "pandas", "numpy")


def _run(code: str) -> str:
    """Run code in a fresh interpreter that finds the same package."""
    path = os.pathsep.join([str(Path(attribution.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "modules",
    [
        "attribution",
        "attribution.errors, attribution.prompts.knowledge, attribution.models.registry, attribution.resources",
        "attribution.records",
        "attribution.plugin",
    ],
)
def test_nothing_heavy_is_imported(modules: str) -> None:
    code = f"import sys, {modules}; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert _run(code) == "[]"


def test_records_prompts_and_the_judge_are_reached_without_torch() -> None:
    code = (
        "import sys, attribution as at; at.FFNNeuron(0, 1); at.Prompt('a', ' b'); at.AttributionError; "
        "at.load_knowledge; at.Claim; at.Verdict; at.judge; print('torch' in sys.modules)"
    )
    assert _run(code) == "False"


def test_a_heavy_name_is_imported_on_first_use() -> None:
    code = "import sys, attribution as at; at.measure; print('torch' in sys.modules)"
    assert _run(code) == "True"


def test_dir_lists_the_public_names() -> None:
    assert set(attribution.__all__) <= set(dir(attribution))
    assert "__version__" in dir(attribution)


@pytest.mark.parametrize("name", attribution.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(attribution, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error_with_those_that_do() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'atribute'.*attribute"):
        attribution.atribute  # noqa: B018
    assert not hasattr(attribution, "atribute")
