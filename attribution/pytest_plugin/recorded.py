"""What tests record about claims, on the way from the process that runs them to the one that compares and writes.

It travels on the report of the test's call. Of it, the JUnit file shows one property of a few hundred bytes a claim.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from attribution.wording import pluralize

if TYPE_CHECKING:
    from attribution.claims.judge import Verdict

__all__ = [
    "ATTEMPT",
    "EXHIBIT",
    "LOADED",
    "MEASURED",
    "VERDICT",
    "LastAttempts",
    "begin_attempt",
    "pytest_runtest_makereport",
    "record",
    "recorded_on",
    "show_in_junit",
]

# What is recorded, by what it holds.
VERDICT = "verdict"
MEASURED = "measured"
EXHIBIT = "exhibit"
LOADED = "loaded"
ATTEMPT = "attempt"

# The name of the property in the JUnit file.
PROPERTY = "attribution"
# The attribute of a test's report.
_ON_REPORT = "attribution_recorded"

_RECORDED = pytest.StashKey[list[tuple[str, Any]]]()
# How often a test was begun.
_ATTEMPTS = pytest.StashKey[int]()


def record(item: pytest.Item, name: str, value: object) -> None:
    """Record something for the process that compares and writes.

    Args:
        item: The test.
        name: One of the names of this module.
        value: Dicts, lists, texts, numbers, booleans and ``None``: it may travel between processes.
    """
    item.stash.setdefault(_RECORDED, []).append((name, value))


def show_in_junit(item: pytest.Item, verdict: Verdict, *, binding: bool) -> None:
    """Let the JUnit file show a verdict as JSON.

    Not by pytest's fixture ``record_property``, which warns that one schema of JUnit does not know such properties:
    where warnings are errors, all tests would fail.
    """
    numbers = {name: getattr(verdict, name) for name in ("effect", "low", "high")}
    shown = {
        "model": verdict.model,
        "method": verdict.claim.method,
        "claim": verdict.claim.id,
        "verdict": verdict.status.value,
        "binding": binding,
        **{name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in numbers.items()},
        "n": verdict.n,
        "facts": verdict.facts,
    }
    item.user_properties.append((PROPERTY, json.dumps(shown, ensure_ascii=False)))


def begin_attempt(item: pytest.Item) -> int:
    """Return which attempt at a test begins, from 1; what earlier ones recorded of claims is dropped.

    Plugins that run failed tests again keep the item, with what it recorded.
    """
    item.stash[_RECORDED] = [each for each in item.stash.get(_RECORDED, []) if each[0] == EXHIBIT]
    item.user_properties[:] = [each for each in item.user_properties if each[0] != PROPERTY]
    item.stash[_ATTEMPTS] = item.stash.get(_ATTEMPTS, 0) + 1
    return item.stash[_ATTEMPTS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put what a test recorded on the report of its call."""
    report = yield
    if call.when == "call":
        setattr(report, _ON_REPORT, item.stash.get(_RECORDED, []))
    return report


def recorded_on(report: pytest.TestReport) -> list[tuple[str, Any]]:
    """Return names and values of what a test recorded; nothing on the reports of its setup and teardown."""
    # Between processes pairs become lists.
    return [(name, value) for name, value in getattr(report, _ON_REPORT, [])]


class LastAttempts:
    """What tests recorded, by test: of one that ran again after it failed, what its last attempt recorded."""

    def __init__(self) -> None:
        self._by_test: dict[str, list[tuple[str, Any]]] = {}

    def add(self, report: pytest.TestReport) -> None:
        """Take the report of a test's call."""
        if report.when == "call":
            self._by_test[report.nodeid] = recorded_on(report)

    def of(self, name: str) -> list[Any]:
        """Return what was recorded under a name, in the order in which tests first reported."""
        return [value for recorded in self._by_test.values() for what, value in recorded if what == name]

    @property
    def loaded(self) -> dict[str, str]:
        """What was loaded, in words, by the model's name."""
        return {name: text for each in self.of(LOADED) for name, text in each.items()}

    @property
    def repeated(self) -> str:
        """A sentence on what was measured more than once; empty if nothing was."""
        again = self.of(ATTEMPT)
        if not again:
            return ""
        worst = max(again, key=lambda each: int(each["attempt"]))
        return (
            f"{pluralize(len(again), 'claim was', 'claims were')} measured again after the test failed, such as "
            f"{worst['claim']!r}, {worst['attempt']} times in all; only the last attempt counts."
        )
