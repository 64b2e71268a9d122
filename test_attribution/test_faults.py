"""The suite can fail: every fault injected into a copy of the engine in memory turns something red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent / "faults"

sys.path.insert(0, str(HERE))
try:
    catalogue, inject = import_module("catalogue"), import_module("inject")
finally:
    sys.path.remove(str(HERE))

FAULTS = {fault.name: fault for fault in catalogue.FAULTS}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are injected into forked processes")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each fault turned red, and the page that says so; made once, in some minutes."""
    file = tmp_path_factory.mktemp("faults") / "found.json"
    command = [sys.executable, str(HERE / "inject.py"), "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def test_without_a_fault_all_that_catches_faults_is_green(found: dict[str, Any]) -> None:
    assert found["results"][inject.CONTROL].get("broken") is None
    assert found["results"][inject.CONTROL]["red"] == {}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(found: dict[str, Any], name: str) -> None:
    result = found["results"][name]
    assert "broken" not in result, result["broken"]
    # What is known to be missed must say so until something catches it.
    assert bool(result["red"]) is not bool(FAULTS[name].missed), result["red"]


def test_the_page_in_docs_is_what_was_found(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + found["page"])
    assert found["page"] == inject.TABLE.read_text(encoding="utf-8"), (
        f"run python {HERE.relative_to(inject.ROOT)}/inject.py --write, and see what has changed"
    )


def test_faults_are_many_and_different() -> None:
    assert len(FAULTS) == len(catalogue.FAULTS)
    assert len({fault.edits for fault in FAULTS.values()}) == len(FAULTS)
    assert sum(not fault.missed for fault in FAULTS.values()) >= 40


@pytest.mark.parametrize("old", ["a line that is gone", "logits"], ids=["nowhere", "at several places"])
def test_a_fault_whose_text_does_not_stand_once_in_its_function_cannot_be_injected(old: str) -> None:
    with pytest.raises(inject.BrokenFaultError, match=r"stands \d+ times in trace:rerun"):
        inject.apply([catalogue.Edit("trace:rerun", old, "")])
