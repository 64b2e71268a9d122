"""Verdicts as text: the table that ends a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from attribution.claims.judge import Verdict
from attribution.report.table import Column, Table
from attribution.wording import duration, pluralize

__all__ = [
    "STATUSES",
    "VERDICT_COLUMNS",
    "VerdictRow",
    "longest_lines",
    "shown_columns",
    "status_of",
    "table_of_rows",
    "verdict_row",
    "verdict_table",
]

VerdictRow: TypeAlias = Mapping[str, str]
"""A verdict as text, by column; see :func:`verdict_row`."""

VERDICT_COLUMNS = (
    Column("model"),
    Column("method"),
    Column("claim", "words"),
    Column("effect", "number"),
    Column("interval", "number"),
    Column("n", "number"),
    Column("verdict", "status"),
    Column("note", "words"),
)
"""What a table says about a claim."""

# Experiments that are named as those that took longest, in a run that took longer than so many seconds.
_LONGEST, _LONG = 5, 300

STATUSES = ("supported", "refuted", "inconclusive", "undecided")


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 1000 or 0 < abs(value) < 0.001 else f"{value:.3f}"


def verdict_row(verdict: Verdict, recorded: str | None = None, *, asserted: bool | None = None) -> dict[str, str]:
    """Return a verdict as one row of text, by column.

    Args:
        verdict: The verdict.
        recorded: The verdict that the registry expects.
        asserted: Whether the claim was binding in this run; what the claim itself says when ``None``.
    """
    exact = verdict.claim.test == "at_most"
    binding = verdict.claim.asserted if asserted is None else asserted
    interval = f"<= {verdict.claim.threshold:g}" if exact else f"{_number(verdict.low)} .. {_number(verdict.high)}"
    return {
        "model": verdict.model,
        "method": verdict.claim.method,
        "claim": verdict.claim.id,
        "effect": _number(verdict.effect),
        "interval": interval,
        "n": str(verdict.n),
        "verdict": verdict.in_words() + (", as recorded" if recorded == verdict.status.value else ""),
        "note": verdict.note,
        "asserted": "yes" if binding else "",
        "least": str(verdict.claim.min_prompts or ""),
        "waived": "yes" if verdict.claim.asserted and not binding else "",
    }


def verdict_table(rows: Sequence[VerdictRow]) -> str:
    """Return rows as an aligned table, in the order of models and claims in which they were judged.

    What is asserted comes first, what is only reported below it, where a verdict has no consequence. The interval is
    the one that decides: 95%, or 90% where "no effect" is claimed, widened by the number of claims in the family; an
    exact number is followed by the bound it must keep. A column that says nothing, such as that of methods where only
    one is judged, is left out.
    """
    ordered = sorted(rows, key=lambda row: row["model"])
    asserted, reported = ([row for row in ordered if bool(row["asserted"]) is which] for which in (True, False))
    columns = shown_columns(ordered, ordered)
    # One table, so that both parts have the same widths.
    table = table_of_rows([*asserted, *reported], columns)
    header, *written = table.text()
    ruled = [width for column, width in zip(columns, table.widths, strict=True) if column.heading != "note"]
    rule = "-" * (sum(ruled) + 2 * (len(ruled) - 1))
    lines = [header, rule, *written[: len(asserted)], rule] if asserted else []
    if reported:
        lines += ["", "reported, not asserted", header, rule, *written[len(asserted) :], rule]
    found = Counter(map(status_of, asserted))
    counts = [f"{found[status]} {status}" for status in STATUSES if found[status] or status != "undecided"]
    if reported:
        counts.append(f"{len(reported)} reported")
    waived = Counter(row["model"] for row in ordered if row["waived"])
    notes = [
        f"{pluralize(number, 'claim was', 'claims were')} not binding on {model}; --attribution-assert makes "
        f"{'it' if number == 1 else 'them'} so"
        for model, number in waived.items()
    ]
    return "\n".join([*lines, ", ".join(counts), *_undecided_lines(ordered), *notes])


def _undecided_lines(rows: Iterable[VerdictRow]) -> list[str]:
    """Return a sentence about each model of which some claims have fewer prompts than they need."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        sampled = [row for row in rows if row["model"] == model and row["least"]]
        undecided = [row for row in sampled if status_of(row) == "undecided"]
        if not undecided:
            continue
        least, had = (_range([int(row[name]) for row in undecided]) for name in ("least", "n"))
        why = f"need {least} prompts, each of another fact that it knows, and have {had}"
        if len(undecided) == len(sampled):
            lines.append(f"nothing can be decided about {model}: claims about its neurons {why}")
        else:
            number = pluralize(len(undecided), "claim is", "claims are")
            lines.append(f"{number} undecided about {model}: such claims {why}")
    return lines


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def status_of(row: VerdictRow) -> str:
    """Return the verdict alone, without what the registry says about it; empty if the row holds none."""
    return next((status for status in STATUSES if row["verdict"].startswith(status)), "")


def table_of_rows(rows: Iterable[VerdictRow], columns: Sequence[Column]) -> Table:
    """Return some columns of some rows."""
    return Table.of(columns, ([row[column.heading] for column in columns] for row in rows))


def shown_columns(rows: Sequence[VerdictRow], every_row: Sequence[VerdictRow]) -> tuple[Column, ...]:
    """Return the columns that say something about some rows.

    Args:
        rows: The rows of one table.
        every_row: All rows of the run: where only one method is judged, its name says nothing.
    """
    one_method = len({row["method"] for row in every_row} - {""}) < 2
    return tuple(
        column
        for column in VERDICT_COLUMNS
        if any(row[column.heading] for row in rows) and not (one_method and column.heading == "method")
    )


def longest_lines(spent: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return lines that say what took longest.

    Args:
        spent: Seconds by model and experiment.
    """
    every = sorted(
        ((seconds, f"{model}: {what}") for model, own in spent.items() for what, seconds in own.items()), reverse=True
    )
    total = sum(seconds for seconds, _ in every)
    if total < _LONG:
        return []
    lines = ["", f"What took longest of {duration(total)} of experiments:"]
    return lines + [f"  {duration(seconds):>11}  {seconds / total:4.0%}  {what}" for seconds, what in every[:_LONGEST]]
