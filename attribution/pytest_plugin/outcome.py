"""Why a run is red: what the verdict on one claim does to its test, and what turns a run red besides its tests.

Nothing else in this package changes the exit status of pytest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytest

from attribution.models.registry import Entry

if TYPE_CHECKING:
    from attribution.claims.judge import Claim
    from attribution.pytest_plugin.policy import Policy

__all__ = ["ClaimOutcome", "fail_run", "is_binding", "outcome_of_claim", "report_as_test", "stop_run"]


@dataclass(frozen=True)
class ClaimOutcome:
    """What the verdict on a claim does to its test.

    Attributes:
        kind: ``"reported"`` and ``"green"`` let the test pass, ``"undecided"`` skips it, ``"expected failure"`` makes
            it ``xfail``, ``"red"`` fails it.
        sentence: Why a test does not pass; empty if it does.
    """

    kind: Literal["reported", "green", "undecided", "expected failure", "red"]
    sentence: str = ""


def is_binding(claim: Claim, entry: Entry, *, assert_all: bool, bundled_prompts: bool) -> bool:
    """Say whether the test of a claim fails unless the claim is supported.

    Args:
        claim: The claim.
        entry: What the registry says of the model: which families of claims it asserts on the bundled prompts.
        assert_all: Whether ``--attribution-assert`` makes every asserted claim binding.
        bundled_prompts: Whether the run asks the bundled prompts.
    """
    if not claim.asserted or not claim.family or assert_all:
        return claim.asserted
    return bundled_prompts and claim.family in entry.asserted


def outcome_of_claim(
    status: str, sentence: str, *, binding: bool, recorded: str | None, policy: Policy, look: bool = False
) -> ClaimOutcome:
    """Decide what a verdict does to its test; the first rule that applies decides.

    Args:
        status: The verdict's status.
        sentence: The verdict in a sentence.
        binding: Whether the claim is binding, see :func:`is_binding`.
        recorded: The status that the registry expects; ``None`` if it records none.
        policy: What the run's options say.
        look: Whether the run asks fewer prompts than there are and asserts nothing: too few prompts are not red then.
    """
    if status == "undecided" and (look or not binding):
        return ClaimOutcome("undecided", sentence)
    if not binding:
        return ClaimOutcome("reported")
    if status == recorded:
        return ClaimOutcome("expected failure", f"as recorded in the registry: {sentence}")
    if recorded is not None:
        sentence = f"the registry records {recorded!r}, correct it there: {sentence}"
    elif status == "supported":
        return ClaimOutcome("green")
    if not policy.verdicts:
        return ClaimOutcome("expected failure", f"--attribution-fail leaves verdicts out: {sentence}")
    return ClaimOutcome("red", sentence)


def stop_run(session: pytest.Session, reason: str) -> None:
    """Let no further test run, and let the run fail."""
    session.shouldfail = reason


def fail_run(session: pytest.Session, reason: str = "") -> None:
    """Let a run fail that would pass, once its tests have run.

    Args:
        session: The session.
        reason: What the last line of the terminal says; empty if another line says it.
    """
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if reason:
        session.shouldfail = session.shouldfail or reason


class _Message(str):
    """A sentence that pytest takes for the message of an exception."""

    __slots__ = ()

    @property
    def message(self) -> str:
        return str(self)


@dataclass(frozen=True)
class _Failure:
    """Why something failed, in the shape in which pytest has it of tests.

    Attributes:
        reprcrash: In a sentence: all that the terminal shows among the failures, as the whole follows in its own place.
        whole: What files show, such as JUnit's.
    """

    reprcrash: _Message
    whole: str

    def toterminal(self, writer: Any) -> None:
        writer.line(self.reprcrash)

    def __str__(self) -> str:
        return self.whole


def report_as_test(session: pytest.Session, name: str, reason: str = "", whole: str = "") -> None:
    """Report something that no test function checks as a test, so that the JUnit file and the summary have it.

    Args:
        session: The session, once its tests have run.
        name: What to call the test.
        reason: Why it failed, in a sentence; empty if it passed.
        whole: The same at length.
    """
    manager = session.config.pluginmanager
    terminal = manager.get_plugin("terminalreporter")
    # The terminal prints a letter for each report, behind those of tests that are all done: it gets the count alone.
    tell = manager.subset_hook_caller("pytest_runtest_logreport", [terminal] if terminal else [])
    for when in ("setup", "call", "teardown"):
        failed = when == "call" and bool(reason)
        report = pytest.TestReport(
            nodeid=name,
            location=(name.partition("::")[0], None, name.rpartition("::")[2]),
            keywords={},
            outcome="failed" if failed else "passed",
            longrepr=_Failure(_Message(reason), f"{reason}\n{whole}") if failed else None,  # type: ignore[arg-type]
            when=when,
        )
        tell(report=report)
        if terminal and when == "call":
            terminal.stats.setdefault(report.outcome, []).append(report)
