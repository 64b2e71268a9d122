"""The report of a run: a page, a summary in Markdown, and the numbers as CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.claims.exhibits import Exhibit
from attribution.claims.paper import ADDRESS, PAPER_MODELS, SERVED, paper_model, remarks, source
from attribution.report.exhibit_figures import pictures_of
from attribution.report.exhibit_tables import published_table, rows_of, tables_of, worked_example_table
from attribution.report.sections import MEASURED_BY, SECTIONS, Section
from attribution.report.table import Column, Table, markdown_escaped
from attribution.report.verdicts import (
    STATUSES,
    VERDICT_COLUMNS,
    VerdictRow,
    shown_columns,
    status_of,
    table_of_rows,
)

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["run_header", "write_report"]

_TITLE = "Neurons of language models: claims and exhibits"
_OF_ONE_MODEL = VERDICT_COLUMNS[1:]
# What the summary says about a claim that is not supported.
_OPEN_COLUMNS = tuple(
    Column(name, "number" if name in ("effect", "n") else "text")
    for name in ("model", "method", "claim", "effect", "interval", "n", "verdict")
)
_NUMBERS = {section.name: section.number for section in SECTIONS}
# So that a summary with many models stays one that a person reads.
_MOST_CLAIMS, _MOST_SENTENCES = 50, 80


@dataclass(frozen=True)
class _Part:
    """What a section shows of one model."""

    exhibit: Exhibit
    tables: list[Table]
    pictures: list[Markup]


@dataclass
class _Shown:
    """A section as the page takes it.

    Attributes:
        section: The section.
        missing: Whether this run has not measured it.
        seen: A sentence about what needs no model.
        own: The tables of it.
        parts: What was measured, by model.
        served_by: The section that shows it, where one exhibit is the counterpart of two.
        others: What the paper prints for models that are not in this run.
        remarks: What the paper says in words.
    """

    section: Section
    missing: bool = False
    seen: str = ""
    own: list[Table] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    served_by: Section | None = None
    others: list[Table] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def _shown(section: Section, exhibits: Sequence[Exhibit]) -> _Shown:
    shown = _Shown(section, remarks=remarks(section.name))
    if section.name == "table_1":
        table, shown.seen = worked_example_table()
        shown.own.append(table)
    if not section.measured:
        return shown
    name = SERVED.get(section.name, section.name)
    found = [exhibit for exhibit in exhibits if exhibit.name == name]
    shown.missing = not found
    if name == section.name:
        shown.parts = [_Part(exhibit, tables_of(exhibit), pictures_of(exhibit)) for exhibit in found]
    else:
        shown.served_by = next(each for each in SECTIONS if each.name == name)
    measured = {paper_model(exhibit.model) for exhibit in found}
    for model in section.models:
        printed = None if model in measured else published_table(name, model, f"{PAPER_MODELS[model]} in the paper")
        if printed is not None:
            shown.others.append(printed)
    return shown


def _by_model(rows: Iterable[VerdictRow]) -> dict[str, list[VerdictRow]]:
    found: dict[str, list[VerdictRow]] = {}
    for row in sorted(rows, key=lambda row: row["model"]):
        found.setdefault(row["model"], []).append(row)
    return found


def _counts(rows: Iterable[VerdictRow]) -> Table:
    """Return how many claims of each model have which verdict; those that are only reported are counted apart."""
    columns = Column("model"), *(Column(name, "number") for name in (*STATUSES, "only reported"))
    counted = []
    for model, found in _by_model(rows).items():
        counts = Counter(status_of(row) if row["asserted"] else "only reported" for row in found)
        counted.append([model, *(str(counts[column.heading]) for column in columns[1:])])
    return Table.of(columns, counted)


def _verdict_tables(rows: Sequence[VerdictRow]) -> list[tuple[str, Table]]:
    """Return the verdicts on each model, first what is asserted, then what is only reported, each with a title."""
    tables = []
    for model, found in _by_model(rows).items():
        for title, asserted in (("asserted", True), ("reported, not asserted", False)):
            chosen = [row for row in found if bool(row["asserted"]) is asserted]
            columns = [column for column in shown_columns(chosen, rows) if column in _OF_ONE_MODEL]
            if chosen:
                tables.append((f"{model}: {title}", table_of_rows(chosen, columns)))
    return tables


def _page(rows: Sequence[VerdictRow], exhibits: Sequence[Exhibit], header: Mapping[str, str]) -> str:
    from attribution.report.page import render

    return render(
        "report.html",
        title=_TITLE,
        address=ADDRESS,
        source=source(),
        header=header,
        counts=_counts(rows),
        verdicts=_verdict_tables(rows),
        sections=[_shown(section, exhibits) for section in SECTIONS],
        measured_by=MEASURED_BY,
    )


def _shortened(lines: list[str], most: int, file: str) -> list[str]:
    left_out = len(lines) - most
    return lines if left_out <= 0 else [*lines[:most], "", f"{left_out} more are in {file}."]


def _summary(rows: Sequence[VerdictRow], exhibits: Sequence[Exhibit], header: Mapping[str, str]) -> str:
    lines = [f"# {_TITLE}", ""]
    lines += [f"- {markdown_escaped(name)}: {markdown_escaped(text)}" for name, text in header.items()]
    lines += ["", "## Claims", ""]
    if rows:
        lines += _counts(rows).markdown()
        asserted = [row for found in _by_model(rows).values() for row in found if row["asserted"]]
        open_ones = [row for row in asserted if status_of(row) != "supported"]
        if open_ones:
            table = table_of_rows(open_ones, _OPEN_COLUMNS).markdown()
            lines += ["", "Asserted, and not supported:", "", *_shortened(table, _MOST_CLAIMS + 2, "verdicts.csv")]
        else:
            lines += ["", "Every asserted claim is supported." if asserted else "No claim is asserted in this run."]
    else:
        lines += ["No claim was judged in this run."]
    lines += ["", "## Exhibits", ""]
    seen = [
        f"- **{_NUMBERS.get(each.name, each.name)}**, {markdown_escaped(each.model)}: {markdown_escaped(each.seen)}"
        for each in exhibits
    ]
    lines += _shortened(seen, _MOST_SENTENCES, "exhibits.json") or ["No exhibit was made in this run."]
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _ordered(exhibits: Iterable[Exhibit]) -> list[Exhibit]:
    """Return exhibits in the paper's order, and by model: not as they came, which differs between workers."""
    indices = {name: place for place, name in enumerate(_NUMBERS)}
    return sorted(exhibits, key=lambda each: (indices.get(each.name, len(indices)), each.name, each.model))


def run_header(
    rows: Iterable[VerdictRow],
    exhibits: Iterable[Exhibit],
    loaded: Mapping[str, str] | None = None,
    known: Sequence[str] = (),
    repeated: str = "",
) -> dict[str, str]:
    """Return what a reader has to know of a run: when, on which models, with which versions.

    Args:
        rows: Verdicts.
        exhibits: Tables and figures.
        loaded: What was loaded, in words, by the model's name.
        known: What each model knows, in words.
        repeated: A sentence on claims that were measured more than once, if any were.
    """
    models = sorted({row["model"] for row in rows} | {exhibit.model for exhibit in exhibits})
    libraries = ("attribution-suite", "nnsight", "numpy", "torch", "transformers")
    return {
        "Made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Models": "; ".join((loaded or {}).get(model, model) for model in models) or "none",
        **({"Known prompts": "; ".join(known)} if known else {}),
        **({"Repeated": repeated} if repeated else {}),
        "Versions": ", ".join(f"{name} {metadata.version(name)}" for name in libraries),
    }


def write_report(
    folder: Path, rows: Sequence[VerdictRow], exhibits: Sequence[Exhibit], header: Mapping[str, str]
) -> None:
    """Write ``index.html``, ``summary.md``, ``verdicts.csv``, ``exhibits.json`` and one CSV for each exhibit's name.

    CSVs of exhibits that an earlier report left in the folder, and that this run has not made, are removed.

    Args:
        folder: Where to, an existing folder.
        rows: Verdicts, as :func:`attribution.report.verdicts.verdict_row` gives them.
        exhibits: One of each name and model.
        header: What is said of the run, by heading; see :func:`run_header`.
    """
    exhibits = _ordered(exhibits)
    (folder / "index.html").write_text(_page(rows, exhibits, header), encoding="utf-8")
    (folder / "summary.md").write_text(_summary(rows, exhibits, header), encoding="utf-8")
    verdicts = [row for found in _by_model(rows).values() for row in found]
    columns = (*(column.heading for column in VERDICT_COLUMNS), "asserted")
    _write_csv(folder / "verdicts.csv", columns, verdicts)
    content = [asdict(exhibit) for exhibit in exhibits]
    (folder / "exhibits.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    names = {exhibit.name for exhibit in exhibits}
    for name in _NUMBERS.keys() - names:
        (folder / f"{name}.csv").unlink(missing_ok=True)
    for name in names:
        of_name = [exhibit for exhibit in exhibits if exhibit.name == name]
        own = dict.fromkeys(column for exhibit in of_name for column in exhibit.columns)
        lines = [{"model": exhibit.model, **row} for exhibit in of_name for row in rows_of(exhibit)]
        _write_csv(folder / f"{name}.csv", ("model", *own), lines)
