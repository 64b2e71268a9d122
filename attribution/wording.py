"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["pluralize"]


def pluralize(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts, such as ``1 prompt``, ``2 prompts`` and ``1 test waits``.

    Args:
        number: The number.
        one: The words that follow 1.
        many: Those that follow any other number; ``one`` with an s when empty.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
