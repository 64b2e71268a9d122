"""A table, and how it is written: as aligned text, as Markdown, and as the cells of a page."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from attribution.wording import printable

__all__ = ["Column", "Table", "markdown_escaped", "width_of"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: Its heading.
        kind: What its cells hold. ``"number"`` is aligned to the right, everything else to the left. A page may break
            the lines of ``"words"``, and colours a ``"status"`` by the first word of the cell.
    """

    heading: str
    kind: Literal["text", "number", "words", "status"] = "text"

    @property
    def is_number(self) -> bool:
        """Whether the cells are numbers."""
        return self.kind == "number"

    def css_class(self, cell: str) -> str:
        """Return the class of a cell of this column in a page; empty if it needs none."""
        if self.kind == "status":
            return re.split(r"\W", cell)[0]
        return "" if self.kind == "text" else self.kind


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: The columns, from left to right.
        rows: The cells of each row, one for each column. In a page they are escaped, unless they are
            ``markupsafe.Markup``.
        caption: What the cells are, where the headings do not say it.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    @classmethod
    def of(cls, columns: Iterable[Column | str], rows: Iterable[Iterable[str]], caption: str = "") -> Table:
        """Return a table.

        Args:
            columns: The columns; a heading alone stands for a column of text.
            rows: The cells of each row.
            caption: What the cells are.
        """
        return cls(
            tuple(Column(each) if isinstance(each, str) else each for each in columns), tuple(map(tuple, rows)), caption
        )

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings, from left to right."""
        return tuple(column.heading for column in self.columns)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each column on a terminal."""
        columns = zip(self.headings, *self.rows, strict=True)
        return tuple(max(width_of(printable(cell)) for cell in cells) for cells in columns)

    def text(self) -> list[str]:
        """Return the table as lines for a terminal, the headings first; the caption is left to the caller."""
        lines, widths = [], self.widths
        for row in (self.headings, *self.rows):
            cells = []
            for cell, width, column in zip(map(printable, row), widths, self.columns, strict=True):
                space = " " * (width - width_of(cell))
                cells.append(space + cell if column.is_number else cell + space)
            lines.append("  ".join(cells).rstrip())
        return lines

    def markdown(self, *, tight_rule: bool = False) -> list[str]:
        """Return the table as lines of Markdown, headings and rule first; the caption is left to the caller.

        Args:
            tight_rule: Whether the rule below the headings is written without spaces, as in docs/error_rates.md.
        """
        if tight_rule:
            rule = f"|{'|'.join('--:' if column.is_number else '---' for column in self.columns)}|"
        else:
            rule = f"| {' | '.join('---:' if column.is_number else '---' for column in self.columns)} |"
        head, *rows = (f"| {' | '.join(map(markdown_escaped, cells))} |" for cells in (self.headings, *self.rows))
        return [head, rule, *rows]


def width_of(text: str) -> int:
    """Return how many columns a text takes on a terminal: wide East Asian characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def markdown_escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line, inside a table or outside."""
    text = re.sub(r"([\\|`*<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return " ".join(text.split())
