"""Progress: lines of a log say how far a measurement is and how long it will take; a bar leaves nothing behind."""

from __future__ import annotations

import io
import re

import pytest

from attribution.engine import progress
from attribution.engine.progress import Progress
from attribution.wording import duration

pytest_plugins = ["pytester"]


class _Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_every_half_minute_says_how_far_it_is_and_how_long_it_will_take(clock: _Clock) -> None:
    stream = io.StringIO()
    with Progress("tiny: ranking by x", shown=True, stream=stream, lines=True).over(100, "prompt") as update:
        for _ in range(10):
            clock.now += 12
            update(10)
    assert stream.getvalue().splitlines() == [
        "attribution: tiny: ranking by x: 30 of 100 prompts in 36 s, about 84 s left",
        "attribution: tiny: ranking by x: 60 of 100 prompts in 72 s, about 48 s left",
        "attribution: tiny: ranking by x: 90 of 100 prompts in 2 min, about 12 s left",
    ]


@pytest.mark.parametrize("shown", [True, False])
def test_what_is_soon_done_needs_no_line_and_what_is_hidden_none_at_all(clock: _Clock, shown: bool) -> None:
    stream = io.StringIO()
    with Progress("x", shown=shown, stream=stream, lines=True).over(2, "prompt") as update:
        clock.now += 20 if shown else 2000
        update(1)
        update(1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3540, "59 min"), (4800, "1 h 20 min")]
)
def test_a_time_to_wait_is_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_bar_among_what_others_write_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LATE", 0)
    stream = io.StringIO()
    with Progress("x", shown=True, stream=stream).over(3, "prompt") as update:
        update(3)
    assert "x: " in stream.getvalue()
    # What is written last is an empty line in the place of the bar.
    assert stream.getvalue().endswith("\r")


def test_a_run_of_claims_says_what_it_measures_in_one_process_and_in_two(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        from attribution.engine import progress
        progress._EVERY = 0
        def pytest_attribution_categories(): return ["month"]
    """)
    pytester.makepyfile("def test_it(attribution_bench): attribution_bench.sample.known")
    for workers in ("-n0", "-n2"):
        result = pytester.runpytest_subprocess("--model=bundled:gpt2", workers, "-p", "no:cacheprovider")
        result.assert_outcomes(passed=1)
        line = r"^attribution: bundled:gpt2: what it knows: \d+ of \d+ prompts in \d+ s, about \d+ s left$"
        assert re.search(line, result.stderr.str(), re.MULTILINE)
