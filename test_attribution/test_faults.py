"""The suite can fail: every fault injected into a copy of the engine in memory turns something red."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribution.claims import judge
from attribution.engine import importance, projection, questions, vectors
from attribution.engine.methods import METHODS
from attribution.experiments import planting
from attribution.models import norms

HERE = Path(__file__).resolve().parent / "faults"

sys.path.insert(0, str(HERE))
try:
    catalogue, changes, inject = (import_module(name) for name in ("catalogue", "changes", "inject"))
finally:
    sys.path.remove(str(HERE))

FAULTS = {fault.name: fault for fault in catalogue.FAULTS}
# Without --exhaustive, one fault for the preflight and one for each set of claims that a few prompts decide: all
# take minutes.
_BRIEF = {fault.claims for fault in catalogue.FAULTS if all(family.endswith(inject.EXACT) for family in fault.claims)}
QUICK = [next(fault.name for fault in catalogue.FAULTS if fault.claims == each) for each in sorted(_BRIEF)]
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAULTS]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are injected into forked processes")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What each fault turned red, and the page that says so; made once, all of them in some minutes."""
    file = tmp_path_factory.mktemp("faults") / "found.json"
    names = () if request.config.getoption("--exhaustive") else QUICK
    command = [sys.executable, str(HERE / "inject.py"), *names, "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def test_without_a_fault_all_that_catches_faults_is_green(found: dict[str, Any]) -> None:
    assert found["results"][inject.CONTROL].get("broken") is None
    assert found["results"][inject.CONTROL]["red"] == {}


@pytest.mark.parametrize("name", EVERY)
def test_a_fault_is_caught(found: dict[str, Any], name: str) -> None:
    result = found["results"][name]
    assert "broken" not in result, result["broken"]
    # What is known to be missed must say so until something catches it.
    assert bool(result["red"]) is not bool(FAULTS[name].missed), result["red"]


@pytest.mark.exhaustive
def test_the_page_in_docs_is_what_was_found(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + found["page"])
    assert found["page"] == inject.TABLE.read_text(encoding="utf-8"), (
        f"run python {HERE.relative_to(inject.ROOT)}/inject.py --write, and see what has changed"
    )


def test_faults_are_many_and_different() -> None:
    assert len(FAULTS) == len(catalogue.FAULTS)
    assert len({tuple(map(str, fault.changes)) for fault in FAULTS.values()}) == len(FAULTS)
    assert sum(not fault.missed for fault in FAULTS.values()) >= 40


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_changes_exists(name: str) -> None:
    """Known in seconds, where the faults themselves take minutes."""
    for change in FAULTS[name].changes:
        change.check()


@contextmanager
def applied(change: Any) -> Iterator[None]:
    """Make a change here, and undo it."""
    function = changes.locate(change.where)
    state = function.__code__, function.__defaults__, function.__kwdefaults__
    change.apply()
    try:
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = state
        del function.__signature__


def test_every_importer_of_a_patched_function_sees_the_patch() -> None:
    def halved(original: Any, norm: Any) -> Any:
        return original() / 2 if norm.centred else original()

    vectors, norm = torch.tensor([[3.0, 5.0]]), norms.Norm(None, None, 0.0, True)
    held = functools.partial(norms.frozen_scale, norm=norm)
    with applied(changes.Patch("frozen_scale", halved)):
        for each in (norms.frozen_scale, projection.frozen_scale, importance.frozen_scale):
            assert each(vectors, norm).tolist() == [0.5]
        assert held(vectors).tolist() == [0.5]
        # What calls it, too.
        assert norms.normalise(vectors, norm).tolist() == [[-2.0, 2.0]]
    assert norms.frozen_scale(vectors, norm).tolist() == [1.0]


def test_the_table_of_methods_sees_a_patch() -> None:
    def constant(original: Any, candidates: Any) -> Any:
        return f"{candidates}, patched"

    method = METHODS["coefficient"]
    with applied(changes.Patch('METHODS["coefficient"].score', constant)):
        assert METHODS["coefficient"] is method
        # Its own bound: the same function in another field.
        assert method.score("all") == method.bound("all") == "all, patched"
        assert method.built_in


def test_original_takes_other_arguments_in_the_place_of_given_ones_and_defaults() -> None:
    def other(original: Any, size: float, effect_bounds: str) -> Any:
        return size, effect_bounds, original(effect_bounds="share", size=4)[0][0].tolist()

    numbers = np.ones(3)
    with applied(changes.Patch("_extreme_facts", other)):
        assert judge._extreme_facts(numbers, numbers, size=2, effect_bounds="seen") == (2, "seen", 0.0)


def test_a_patch_is_given_the_defaults_of_arguments_that_were_left_out() -> None:
    def defaults(original: Any, effect_bounds: str, size: float) -> Any:
        return effect_bounds, size

    with applied(changes.Patch("interval", defaults)):
        assert judge.interval([], [], 0.9) == ("seen", 1)  # type: ignore[arg-type]


QUESTION = questions.Question("a", " b", (1,), 2)
CLAIM = judge.Claim("id", "sentence", "ours", "an effect", "within", 0, "none")
TABLE = vectors.VectorTable("ffn", (), (torch.zeros(3, 1),), (), None, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "use"),
    [
        ("Question.seed", lambda: QUESTION.seed(1)),
        ("Claim.confidence", lambda: CLAIM.confidence),
        ("VectorTable.sizes", lambda: TABLE.sizes),
        ("VectorTable.of", lambda: vectors.VectorTable.of("ffn", None)),  # type: ignore[arg-type]
        ("_random_weights", lambda: judge._random_weights(5, 7)),
        ("planted", lambda: planting.planted(None, ()).gen),  # type: ignore[arg-type, attr-defined]
    ],
    ids=["method", "property", "cached property", "class method", "cached function", "context manager"],
)
def test_a_patch_reaches_a_function(where: str, use: Any) -> None:
    def patched(original: Any) -> str:
        return "patched"

    with applied(changes.Patch(where, patched)):
        assert use() == "patched"


def test_a_patched_function_keeps_its_signature() -> None:
    def unchanged(original: Any) -> Any:
        return original()

    before = inspect.signature(norms.frozen_scale)
    with applied(changes.Patch("frozen_scale", unchanged)):
        assert inspect.signature(norms.frozen_scale) == before


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no_such_function", "defined in 0 modules"),
        ("no_such_module:rerun", "defined in 0 modules"),
        ("_log_prob", "defined in 2 modules of the package, not in one: attribution"),
        ("Edits.no_such_method", "no_such_method"),
        ('METHODS["no such method"].score', "no such method"),
        ("METHODS", "not a function"),
    ],
)
def test_a_patch_whose_target_does_not_exist_is_an_error(where: str, message: str) -> None:
    def unchanged(original: Any) -> Any:
        return original()

    with pytest.raises(changes.BrokenFaultError, match=message):
        changes.Patch(where, unchanged).apply()


def test_a_patch_that_names_an_argument_that_does_not_exist_is_an_error() -> None:
    def reads(original: Any, vectors: Any, epsilon: Any) -> Any:
        return original()

    def replaces(original: Any) -> Any:
        return original(epsilon=0)

    for change in (reads, replaces):
        with pytest.raises(changes.BrokenFaultError, match=r"frozen_scale\(.*has no argument epsilon"):
            changes.Patch("frozen_scale", change).apply()


@pytest.mark.parametrize("old", ["a line that is gone", "logits"], ids=["nowhere", "at several places"])
def test_an_edit_whose_text_does_not_occur_once_in_its_function_is_an_error(old: str) -> None:
    with pytest.raises(changes.BrokenFaultError, match=r"occurs \d+ times in rerun"):
        changes.Edit("rerun", old, "").apply()


def test_a_change_is_shown_on_one_line() -> None:
    def change(original: Any, numbers: Any) -> Any:
        found = original(
            numbers=[
                1,
                2,
            ],
        )
        return found[1]

    assert str(changes.Patch("f", change)) == "f: `found = original(numbers=[1, 2]); return found[1]`"
    assert str(changes.Edit("f", "a\n    b", "")) == "f: `a b` → nothing"
