"""How far a long measurement is: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from tqdm.auto import tqdm

from attribution.wording import duration, pluralize

__all__ = ["Progress"]

# Seconds between two lines of a log.
_EVERY = 30
# Seconds after which a bar is shown among what others write.
_LATE = 2


@dataclass(frozen=True)
class Progress:
    """How far a measurement of prompts is, for somebody who waits.

    Attributes:
        label: What is measured.
        shown: Whether it is shown; when ``None``, if standard error is a terminal or in a notebook.
        stream: Where; standard error when ``None``. What somebody else writes to as well is left as it was: a bar comes
            late and goes when it is done.
        lines: Whether lines are shown instead of a bar.
    """

    label: str = ""
    shown: bool | None = False
    stream: TextIO | None = None
    lines: bool = False

    def say(self, line: str) -> None:
        """Show a line, if anything is shown."""
        if self.shown:
            print(f"attribution: {line}", file=self.stream or sys.stderr, flush=True)

    @contextmanager
    def over(self, total: int, of: str) -> Iterator[Callable[[int], object]]:
        """Give a function to call with how many are done besides, of so many of something, such as ``"prompt"``."""
        if self.shown is not False and total and self.lines:
            yield _Lines(self.label, total, of, self.stream or sys.stderr).update
            return
        # Only tqdm's own None tells a notebook from a log.
        hidden = (None if self.shown is None else not self.shown) if total else True
        own = self.stream is None
        manner = {"disable": hidden, "file": self.stream, "leave": own, "delay": 0 if own else _LATE}
        with tqdm(total=total, desc=self.label, unit=of, **manner) as bar:
            yield bar.update


class _Lines:
    """Lines of a log, none for what is soon done."""

    def __init__(self, label: str, total: int, of: str, stream: TextIO) -> None:
        self.label, self.total, self.of, self.stream = label, total, of, stream
        self.done = 0
        self.begun = self.said = time.monotonic()

    def update(self, number: int) -> None:
        """Say how far it is, if nothing was said for a while."""
        self.done += number
        now = time.monotonic()
        if now - self.said >= _EVERY and self.done < self.total:
            spent = now - self.begun
            left = spent / self.done * (self.total - self.done)
            print(
                f"attribution: {self.label}: {self.done} of {pluralize(self.total, self.of)} in {duration(spent)}, "
                f"about {duration(left)} left",
                file=self.stream,
                flush=True,
            )
            self.said = now
