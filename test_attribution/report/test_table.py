"""One table in its three forms."""

from __future__ import annotations

from html.parser import HTMLParser

from attribution.report import page
from attribution.report.table import Column, Table, markdown_escaped, width_of

TABLE = Table.of(
    ["token", Column("n", "number"), Column("tokens", "words"), Column("verdict", "status")],
    [["東京", "3", "a, b", "refuted, as recorded"], ["é", "12", "", "supported"]],
    "what it is",
)


def test_text_is_aligned_by_what_a_terminal_shows() -> None:
    assert TABLE.text() == [
        "token   n  tokens  verdict",
        # Each character of Tokyo takes two columns, and the accent none.
        "東京    3  a, b    refuted, as recorded",
        "é      12          supported",
    ]
    assert TABLE.widths == (5, 2, 6, 20)
    assert [width_of(text) for text in ("", "ab", "東京", "e\u0301")] == [0, 2, 4, 1]


def test_what_a_terminal_would_obey_is_written_as_its_number() -> None:
    hostile = Table.of(["claim", Column("n", "number")], [["one\x1b[2J\r\u202e", "3"], ["東京", "12"]])
    assert hostile.text() == [
        "claim                n",
        r"one\x1b[2J\r\u202e   3",
        "東京                12",
    ]


def test_table_without_rows_is_its_headings() -> None:
    empty = Table.of(["model", Column("n", "number")], [])
    assert empty.text() == ["model  n"]
    assert empty.markdown() == ["| model | n |", "| --- | ---: |"]


def test_markdown_shows_every_cell_as_it_is() -> None:
    hostile = Table.of(["a|b", Column("n", "number")], [["<i> `x` [y] *z* \\ _w_ log_prob", "1\n2"]])
    assert hostile.markdown() == [
        r"| a\|b | n |",
        "| --- | ---: |",
        r"| \<i\> \`x\` \[y\] \*z\* \\ \_w\_ log_prob | 1 2 |",
    ]
    assert hostile.markdown(tight_rule=True)[1] == "|---|--:|"
    assert markdown_escaped("snake_case") == "snake_case"


class _Cells(HTMLParser):
    """The class and the text of each cell of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("th", "td", "caption"):
            self.found.append((tag, dict(attrs).get("class"), ""))

    def handle_data(self, data: str) -> None:
        if self.found and data.strip():
            tag, kind, text = self.found[-1]
            self.found[-1] = tag, kind, text + data


def _on_a_page(table: Table) -> str:
    template = page._environment().from_string('{% from "macros.html" import table %}{{ table(shown) }}')
    return str(template.render(shown=table))


def test_page_escapes_cells_and_marks_numbers_words_and_verdicts() -> None:
    assert _Cells(_on_a_page(TABLE)).found == [
        ("caption", None, "what it is"),
        ("th", None, "token"),
        ("th", "number", "n"),
        ("th", None, "tokens"),
        ("th", None, "verdict"),
        ("td", None, "東京"),
        ("td", "number", "3"),
        ("td", "words", "a, b"),
        ("td", "refuted", "refuted, as recorded"),
        ("td", None, "é"),
        ("td", "number", "12"),
        ("td", "words", ""),
        ("td", "supported", "supported"),
    ]
    assert "<b>" not in _on_a_page(Table.of(["<b>"], [["<b>"]], "<b>"))
