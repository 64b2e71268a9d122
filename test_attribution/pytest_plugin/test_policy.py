"""What --attribution-fail and --attribution-allow ask for."""

from __future__ import annotations

import pytest

from attribution.errors import BadInputError
from attribution.pytest_plugin.policy import Policy


@pytest.mark.parametrize(
    ("option", "comparing", "policy"),
    [
        (None, False, Policy(True, False)),
        (None, True, Policy(True, True)),
        ("verdicts", True, Policy(True, False)),
        ("regressions", True, Policy(False, True)),
        ("regressions:0.01,verdicts", True, Policy(True, True, 0.01)),
        ("regressions:0", True, Policy(False, True, 0.0)),
    ],
)
def test_policy_is_what_the_option_says(option: str | None, comparing: bool, policy: Policy) -> None:
    assert Policy.of(option, comparing=comparing) == policy


@pytest.mark.parametrize(
    ("option", "comparing", "why"),
    [
        ("", True, "--attribution-fail has ''; it knows verdicts, regressions"),
        ("verdict", True, "--attribution-fail has 'verdict'; it knows verdicts, regressions"),
        ("regressions:x", True, "has regressions:x; only regressions has a number, which is 0 or more"),
        ("regressions:-1", True, "has regressions:-1"),
        ("regressions:nan", True, "has regressions:nan"),
        ("verdicts:1", True, "has verdicts:1"),
        ("regressions", False, "asks for regressions, and nothing is compared; add --attribution-compare"),
    ],
)
def test_policy_that_cannot_be_meant_is_refused(option: str, comparing: bool, why: str) -> None:
    with pytest.raises(BadInputError, match=why):
        Policy.of(option, comparing=comparing)


def test_run_may_differ_in_what_is_allowed() -> None:
    assert Policy.of(None, "dtype,device", comparing=True) == Policy(True, True, allow=("dtype", "device"))


@pytest.mark.parametrize(
    ("allow", "comparing", "why"),
    [
        ("weights", True, "--attribution-allow has 'weights'; it knows dtype, device, repeats, separated by commas"),
        ("dtype", False, "--attribution-allow is about a comparison; add --attribution-compare"),
    ],
)
def test_permission_that_cannot_be_meant_is_refused(allow: str, comparing: bool, why: str) -> None:
    with pytest.raises(BadInputError, match=why):
        Policy.of(None, allow, comparing=comparing)
