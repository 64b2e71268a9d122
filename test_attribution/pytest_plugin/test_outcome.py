"""What turns a run red."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attribution.claims.judge import Claim, Status
from attribution.models.registry import Entry
from attribution.pytest_plugin.outcome import fail_run, is_binding, outcome_of_claim, stop_run
from attribution.pytest_plugin.policy import Policy

BOTH, REGRESSIONS_ONLY = Policy(True, True), Policy(False, True)
STATUSES = [status.value for status in Status]


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("recorded", [None, *STATUSES])
@pytest.mark.parametrize("policy", [BOTH, REGRESSIONS_ONLY], ids=["verdicts", "regressions"])
def test_a_claim_that_is_not_binding_is_reported(status: str, recorded: str | None, policy: Policy) -> None:
    outcome = outcome_of_claim(status, "s", binding=False, recorded=recorded, policy=policy)
    assert (outcome.kind, outcome.sentence) == (("undecided", "s") if status == "undecided" else ("reported", ""))


@pytest.mark.parametrize(
    ("status", "recorded", "policy", "kind", "sentence"),
    [
        ("supported", None, BOTH, "green", ""),
        ("supported", None, REGRESSIONS_ONLY, "green", ""),
        ("refuted", None, BOTH, "red", "s"),
        ("inconclusive", None, BOTH, "red", "s"),
        ("undecided", None, BOTH, "red", "s"),
        ("undecided", "undecided", BOTH, "expected failure", "as recorded in the registry: s"),
        ("refuted", None, REGRESSIONS_ONLY, "expected failure", "--attribution-fail leaves verdicts out: s"),
        ("refuted", "refuted", BOTH, "expected failure", "as recorded in the registry: s"),
        ("refuted", "refuted", REGRESSIONS_ONLY, "expected failure", "as recorded in the registry: s"),
        ("supported", "refuted", BOTH, "red", "the registry records 'refuted', correct it there: s"),
        ("refuted", "inconclusive", BOTH, "red", "the registry records 'inconclusive', correct it there: s"),
        (
            "supported",
            "refuted",
            REGRESSIONS_ONLY,
            "expected failure",
            "--attribution-fail leaves verdicts out: the registry records 'refuted', correct it there: s",
        ),
    ],
)
def test_what_a_binding_claim_does_to_its_test(
    status: str, recorded: str | None, policy: Policy, kind: str, sentence: str
) -> None:
    outcome = outcome_of_claim(status, "s", binding=True, recorded=recorded, policy=policy)
    assert (outcome.kind, outcome.sentence) == (kind, sentence)


@pytest.mark.parametrize("status", STATUSES)
def test_a_look_is_red_for_what_it_finds_and_not_for_what_it_cannot_decide(status: str) -> None:
    outcome = outcome_of_claim(status, "s", binding=True, recorded=None, policy=BOTH, look=True)
    assert outcome.kind == {"supported": "green", "undecided": "undecided"}.get(status, "red")


@pytest.mark.parametrize(
    ("asserted", "family", "assert_all", "bundled_prompts", "binding"),
    [
        (True, "deletion", False, True, True),
        (True, "deletion", False, False, False),
        (True, "deletion", True, False, True),
        (True, "sanity", False, True, False),
        (True, "sanity", True, True, True),
        # A claim of no family is not the registry's business.
        (True, "", False, False, True),
        (False, "deletion", True, True, False),
        (False, "", True, True, False),
    ],
)
def test_which_claims_are_binding(
    asserted: bool, family: str, assert_all: bool, bundled_prompts: bool, binding: bool
) -> None:
    claim = Claim("c", "a sentence", "ours", "an effect", "above", 0, "none", family=family, asserted=asserted)
    entry = Entry("mine", "mine", "a folder", asserted={"deletion": "a run"})
    assert is_binding(claim, entry, assert_all=assert_all, bundled_prompts=bundled_prompts) is binding


def _session(exitstatus: int, shouldfail: str | bool = False) -> Any:
    return SimpleNamespace(exitstatus=exitstatus, shouldfail=shouldfail)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (5, 1), (1, 1), (2, 2), (3, 3), (4, 4)])
def test_a_run_that_would_pass_fails_and_others_keep_their_exit_status(before: int, after: int) -> None:
    session = _session(before)
    fail_run(session, "the gate")
    assert (session.exitstatus, session.shouldfail) == (after, "the gate")


def test_the_first_reason_is_kept_and_none_is_shown_where_another_line_says_it() -> None:
    session = _session(0)
    fail_run(session)
    assert session.shouldfail is False
    stop_run(session, "the model")
    fail_run(session, "the gate")
    assert session.shouldfail == "the model"
