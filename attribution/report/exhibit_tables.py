"""Exhibits as tables that a person reads, with the paper's figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from attribution.claims.exhibits import Cell, Exhibit
from attribution.claims.paper import published, worked_example
from attribution.prompts.knowledge import CATEGORIES
from attribution.report.table import Column, Table

__all__ = ["MISSING", "Row", "in_order", "published_table", "rows_of", "tables_of", "worked_example_table"]

MISSING = "-"
# The one column whose cells hold several words, so that a page may break their lines.
_WORDS = "tokens"

Row: TypeAlias = Mapping[str, Cell]
_Format: TypeAlias = Callable[[Any], str]


def _decimals(number: int, factor: float = 1) -> _Format:
    # A zero without the sign that rounding leaves it.
    return lambda value: f"{round(value * factor, number) + 0.0:.{number}f}"


_PERCENT, _COUNT = _decimals(1, 100), _decimals(0)
# Falls, which the paper prints without decimals.
_FALL, _WHOLE_FALL = _decimals(1, 100), _decimals(0, 100)


@dataclass(frozen=True)
class _Layout:
    """How the rows of an exhibit become a table.

    Attributes:
        key: Columns that tell the rows of the table apart, with their headings.
        values: Columns that are shown, with their headings and formats; ``None`` for text.
        across: The column whose values become columns of the table, if any.
        unit: What the cells are, where their headings do not say it.
        merge: Whether the paper's cells can stand beside ours.
    """

    key: Mapping[str, str]
    values: Mapping[str, tuple[str, _Format | None]]
    across: str = ""
    unit: str = ""
    merge: bool = True


_CATEGORY = {"category": "category"}
_NUMBER = {"number": "number"}
_CUTS = {"mrr_cut": ("fall of MRR (%)", _FALL), "prob_cut": ("fall of p (%)", _FALL)}
_RANKED_LAYERS = _Layout(_CATEGORY, {"layer": ("layer", None)}, "rank", "a: attention layer, f: FFN layer, by rank")
_LAYOUTS = {
    "table_2": _Layout(
        {"method": "method"},
        {"mrr": ("MRR", _decimals(3)), "prob": ("p (%)", _PERCENT), "logp": ("log p (nats)", _decimals(2))},
    ),
    "table_3": _Layout({"kind": "layers"}, {"total": ("", _decimals(2))}, "category", "nats"),
    "table_4": _RANKED_LAYERS,
    "table_5": _Layout({"kind": "layers", "which": "neurons"}, {"total": ("", _decimals(1))}, "category", "nats"),
    "table_6": _RANKED_LAYERS,
    "table_7": _Layout(_CATEGORY | {"neurons": "neurons"} | _NUMBER, _CUTS),
    "table_8": _Layout(
        _CATEGORY | {"side": "neurons"},
        {
            "shared": ("shared", _COUNT),
            "share": ("share (%)", _PERCENT),
            "expected": ("by chance", _decimals(1)),
            "top": ("of the top", _COUNT),
        },
    ),
    "table_9": _Layout(
        _CATEGORY | {"role": "role", "neuron": "neuron"},
        {
            "score": ("score (nats)", _decimals(3)),
            "sign": ("sign", None),
            "tokens": (_WORDS, None),
            "hits": ("hits", _COUNT),
        },
        merge=False,
    ),
    "table_10": _Layout(_CATEGORY, {"head": ("head", None)}, "rank", "layer.head, by rank"),
    "table_11": _Layout(
        {"heads_of": "heads of"}, _CUTS, "category", "fall of MRR (%) / of p (%), by category of the prompts"
    ),
    "table_13": _Layout(_CATEGORY | _NUMBER, _CUTS),
    "table_14": _RANKED_LAYERS,
}


def rows_of(exhibit: Exhibit) -> list[dict[str, Cell]]:
    """Return the rows of an exhibit by column."""
    return [dict(zip(exhibit.columns, row, strict=True)) for row in exhibit.rows]


def in_order(names: Iterable[str]) -> list[str]:
    """Return categories in their order and ranks in theirs; what is neither comes last, in the order it came."""
    order = {name: place for place, name in enumerate(CATEGORIES)}
    ranks = len(order)
    return sorted(
        dict.fromkeys(names),
        key=lambda name: order.get(name, ranks + int(name) if name.isdecimal() else math.inf),
    )


def tables_of(exhibit: Exhibit) -> list[Table]:
    """Return the tables of an exhibit, with the paper's figures if it has some of the same model.

    A figure has none: its numbers are many, and in the CSV.
    """
    layout = _LAYOUTS.get(exhibit.name)
    if layout is None or not exhibit.rows:
        return []
    ours, paper = rows_of(exhibit), _published(exhibit.name, exhibit.model)
    if not layout.merge:
        others = [_listed(layout, paper, _printed, "The same model in the paper")] if paper else []
        return [_listed(layout, ours, _written), *others]
    if layout.across:
        return [_across(layout, ours, paper)]
    return [_beside(layout, ours, paper) if paper else _listed(layout, ours, _written)]


def published_table(name: str, model: str, caption: str) -> Table | None:
    """Return what the paper prints for one of its models, by itself; ``None`` if nothing."""
    layout, rows = _LAYOUTS.get(name), _published(name, model)
    if layout is None or not rows:
        return None
    return _across(layout, (), rows, caption) if layout.across else _listed(layout, rows, _printed, caption)


def worked_example_table() -> tuple[Table, str]:
    """Return Table 1, computed anew, and what is seen in it."""
    rows, farthest = [], 0.0
    for before, vector, _, printed in worked_example():
        after = [a + b for a, b in zip(before, vector, strict=True)]
        powers = [math.exp(each - max(after)) for each in after]
        computed = [each / sum(powers) for each in powers]
        farthest = max(farthest, *(abs(a - b) for a, b in zip(computed, printed, strict=True)))
        probabilities = [
            ", ".join(f"{each:.{digits}f}" for each in row) for row, digits in ((computed, 3), (printed, 2))
        ]
        rows.append([str(vector), str(after), *probabilities])
    columns = ("bs(v)", "bs(x+v)", "p(x+v), computed here", "p(x+v), paper")
    seen = (
        f"Computed here as softmax(bs(x) + bs(v)), the printed numbers are met within {farthest:.3f}. Vectors whose "
        "entries differ in the same way, as in rows 2 and 3, do the same, however large they are."
    )
    return Table.of(columns, rows, f"bs(x) = {worked_example()[0][0]}"), seen


def _published(name: str, model: str) -> list[dict[str, Cell]]:
    frame = published(name, model)
    return [] if frame is None else rows_of(Exhibit.of_frame(name, model, frame, seen="", prompts=0))


def _written(value: Cell, form: _Format | None) -> str:
    return MISSING if value is None else str(value) if form is None else form(value)


def _printed(value: Cell, form: _Format | None) -> str:
    """Return a figure of the paper with the digits that it has there."""
    return _written(value, _WHOLE_FALL if form is _FALL else form)


_Text: TypeAlias = Callable[[Cell, _Format | None], str]


def _key(layout: _Layout, row: Row) -> tuple[str, ...]:
    return tuple("" if row[name] is None else str(row[name]) for name in layout.key)


def _listed(layout: _Layout, rows: Sequence[Row], text: _Text, caption: str = "") -> Table:
    """Return one row for each row."""
    columns = [
        *map(Column, layout.key.values()),
        *(_column(heading, form is not None) for heading, form in layout.values.values()),
    ]
    cells = (
        [*_key(layout, row), *(text(row[name], form) for name, (_, form) in layout.values.items())] for row in rows
    )
    table = Table.of(columns, cells, caption)
    # Of ours, a column in which every number is missing has to be seen.
    return _without_empty(table, columns) if text is _printed else table


def _beside(layout: _Layout, ours: Sequence[Row], paper: Sequence[Row]) -> Table:
    """Return our columns, each with the paper's to its right."""
    by_key = [{_key(layout, row): row for row in rows} for rows in (ours, paper)]
    columns = list(map(Column, layout.key.values()))
    for heading, form in layout.values.values():
        columns += [_column(heading, form is not None), _column(f"{heading}, paper", form is not None)]
    rows = []
    for key in dict.fromkeys([*by_key[0], *by_key[1]]):
        cells = list(key)
        for name, (_, form) in layout.values.items():
            for found, text in zip(by_key, (_written, _printed), strict=True):
                cells.append(text(found[key][name], form) if key in found else MISSING)
        rows.append(cells)
    return _without_empty(Table.of(columns, rows), columns[len(layout.key) + 1 :: 2])


def _across(layout: _Layout, ours: Sequence[Row], paper: Sequence[Row], caption: str = "") -> Table:
    """Return one row for each key, with the paper's below ours, and the values of a column as columns."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for label, rows, text in (("this run", ours, _written), ("paper", paper, _printed)):
        for row in rows:
            cell = " / ".join(text(row[name], form) for name, (_, form) in layout.values.items())
            found.setdefault(_key(layout, row), {}).setdefault(label, {})[str(row[layout.across])] = cell
    firsts = in_order(key[0] for key in found)
    names = in_order(name for by_label in found.values() for cells in by_label.values() for name in cells)
    both = bool(ours and paper)
    numbers = all(form is not None for _, form in layout.values.values())
    columns: list[Column | str] = [*layout.key.values(), *(["from"] if both else [])]
    columns += [_column(name, numbers) for name in names]
    lines = (
        [*key, *([label] if both else []), *(cells.get(name, MISSING) for name in names)]
        for key, by_label in sorted(found.items(), key=lambda item: firsts.index(item[0][0]))
        for label, cells in by_label.items()
    )
    return Table.of(columns, lines, ": ".join(filter(None, (caption, layout.unit))))


def _column(heading: str, numbers: bool) -> Column:
    return Column(heading, "number" if numbers else "words" if heading == _WORDS else "text")


def _without_empty(table: Table, columns: Sequence[Column]) -> Table:
    """Leave out the columns of the paper that it does not have: no chance level, and no category of its neurons."""
    empty = [
        place
        for place, column in enumerate(table.columns)
        if column in columns and all(row[place] in ("", MISSING) for row in table.rows)
    ]
    kept = [place for place in range(len(table.columns)) if place not in empty]
    rows = ([row[place] for place in kept] for row in table.rows)
    return Table.of([table.columns[place] for place in kept], rows, table.caption)
