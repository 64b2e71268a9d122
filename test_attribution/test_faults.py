"""The suite can fail: every fault injected into a copy of the engine in memory turns something red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attribution.engine import importance, methods
from attribution.engine.trace import Edits

HERE = Path(__file__).resolve().parent / "faults"

sys.path.insert(0, str(HERE))
try:
    catalogue, changes, fault, inject = (import_module(name) for name in ("catalogue", "changes", "fault", "inject"))
finally:
    sys.path.remove(str(HERE))

FAULTS = {each.name: each for each in catalogue.FAULTS}

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
    assert sum(not each.missed for each in FAULTS.values()) >= 40


def _in_a_process_of_its_own(work: Callable[[], None]) -> None:
    process = os.fork()
    if process == 0:
        failed = 1
        with suppress(BaseException):
            work()
            failed = 0
        os._exit(failed)
    _, status = os.waitpid(process, 0)
    assert status == 0


def test_whoever_holds_a_function_runs_its_patch() -> None:
    """By its module, imported by name elsewhere, in the table of methods, as a property, and as a method."""

    slips = fault.Faults()

    @slips.patch("one more", "log_prob_increase")
    def _(original: Any) -> Any:
        return original() + 1

    @slips.patch("the answer", 'METHODS["coefficient"].score')
    def _(original: Any, candidates: Any) -> Any:
        return candidates.answer

    @slips.patch("the total", "Candidates.probs")
    def _(original: Any, self: Any) -> Any:
        return self.total

    @slips.patch("one layer later", "Edits.first")
    def _(original: Any, layers: Any) -> Any:
        return original(layers=layers + 1)

    def work() -> None:
        for each in slips:
            for change in each.changes:
                change.apply()
        log_probs = torch.tensor([[0.5, 0.5]]).log()
        for module in (importance, methods):
            assert module.log_prob_increase(log_probs, torch.zeros(1, 2), 0).tolist() == pytest.approx([1.0])
        assert methods.METHODS["coefficient"].score(SimpleNamespace(answer=7)) == 7
        assert importance.Candidates.probs.fget(SimpleNamespace(total=3)) == 3  # type: ignore[attr-defined]
        assert Edits().first(4) == 5

    _in_a_process_of_its_own(work)


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("no_such_function", "defined in 0 modules"),
        ("Edits.no_such", "does not exist: there is no 'no_such'"),
        ("rerun", "has no argument no_such"),
    ],
    ids=["function", "attribute", "argument"],
)
def test_a_patch_of_what_does_not_exist_cannot_be_injected(where: str, complaint: str) -> None:
    def change(original: Any, no_such: Any) -> Any:
        return original(no_such=no_such)

    with pytest.raises(changes.BrokenFaultError, match=complaint):
        changes.Patch(where, change).apply()


@pytest.mark.parametrize("old", ["a line that is gone", "logits"], ids=["nowhere", "at several places"])
def test_an_edit_whose_text_does_not_stand_once_in_its_function_cannot_be_injected(old: str) -> None:
    with pytest.raises(changes.BrokenFaultError, match=r"occurs \d+ times in rerun"):
        changes.Edit("rerun", old, "").apply()
