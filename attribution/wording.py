"""Numbers and names in sentences."""

from __future__ import annotations

import re

__all__ = ["duration", "pluralize", "printable"]

# Codes that move the cursor, colour or erase, and those that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def duration(seconds: float) -> str:
    """Return a time to wait in words: ``40 s``, ``3 min`` or ``1 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def pluralize(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts, such as ``1 prompt``, ``2 prompts`` and ``1 test waits``.

    Args:
        number: The number.
        one: The words that follow 1.
        many: Those that follow any other number; ``one`` with an s when empty.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def printable(text: str) -> str:
    """Return a text in which what a terminal would obey instead of showing it is written as its number."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)
