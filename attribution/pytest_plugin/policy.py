"""What ``--attribution-fail`` and ``--attribution-allow`` ask for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import pytest

from attribution.errors import BadInputError
from attribution.gate.comparison import ALLOWABLE, ROUNDING

__all__ = ["REPEATS", "Policy", "policy_of"]

# The word of --attribution-allow for claims that were measured again after their tests failed.
REPEATS = "repeats"


@dataclass(frozen=True)
class Policy:
    """What turns a run red.

    Attributes:
        verdicts: Whether asserted claims that are not supported do.
        regressions: Whether asserted claims that are worse than in the stored run do.
        tolerance: How much worse is not worth a word, in the unit of each claim.
        allow: What the run may differ in from the stored run.
    """

    verdicts: bool
    regressions: bool
    tolerance: float = ROUNDING
    allow: tuple[str, ...] = ()

    @classmethod
    def of(cls, fail: str | None, allow: str | None = None, *, comparing: bool, saving: bool = False) -> Policy:
        """Return what the two options ask for.

        Args:
            fail: Words of ``--attribution-fail``, separated by commas; everything there is when ``None``.
            allow: Words of ``--attribution-allow``, separated by commas.
            comparing: Whether the run is compared with a stored run.
            saving: Whether it is stored.

        Raises:
            BadInputError: If they cannot be meant.
        """
        words, tolerance = _failing(fail, comparing)
        allowed = _words("--attribution-allow", allow, (*ALLOWABLE, REPEATS))
        if set(allowed) - {REPEATS} and not comparing:
            raise BadInputError(
                "--attribution-allow is about a comparison; add --attribution-compare, or leave it out."
            )
        if allowed and not (comparing or saving):
            raise BadInputError(
                f"--attribution-allow={REPEATS} is about a comparison or a stored run; add --attribution-compare or "
                "--attribution-save, or leave it out."
            )
        return cls("verdicts" in words, "regressions" in words, tolerance, allowed)


def policy_of(config: pytest.Config) -> Policy:
    """Return the policy of a run.

    Raises:
        BadInputError: If its options cannot be meant.
    """
    options = config.option
    return Policy.of(
        options.attribution_fail,
        options.attribution_allow,
        comparing=options.attribution_compare is not None,
        saving=options.attribution_save is not None,
    )


def _failing(option: str | None, comparing: bool) -> tuple[Collection[str], float]:
    """Return the words of ``--attribution-fail``, and the number of regressions."""
    if option is None:
        return ("verdicts", "regressions") if comparing else ("verdicts",), ROUNDING
    given = [word.partition(":") for word in option.split(",")]
    words = _words("--attribution-fail", ",".join(word for word, _, _ in given), ("verdicts", "regressions"))
    tolerance = ROUNDING
    for word, colon, number in given:
        if colon:
            tolerance = _tolerance(word, number)
    if "regressions" in words and not comparing:
        raise BadInputError(
            f"--attribution-fail={option} asks for regressions, and nothing is compared; add --attribution-compare."
        )
    return words, tolerance


def _tolerance(word: str, number: str) -> float:
    try:
        tolerance = float(number)
    except ValueError:
        tolerance = -1
    if word != "regressions" or not 0 <= tolerance < math.inf:
        raise BadInputError(
            f"--attribution-fail has {word}:{number}; only regressions has a number, which is 0 or more, such as "
            "regressions:0.01."
        )
    return tolerance


def _words(option: str, value: str | None, known: Collection[str]) -> tuple[str, ...]:
    """Return the words of an option, each one of those it knows."""
    words = tuple(value.split(",")) if value is not None else ()
    for word in words:
        if word not in known:
            raise BadInputError(f"{option} has {word!r}; it knows {', '.join(known)}, separated by commas.")
    return words
