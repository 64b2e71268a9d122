"""Verdicts as text: the table that ends a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from attribution.claims.judge import Verdict
from attribution.wording import counted

__all__ = ["verdict_row", "verdict_table"]

_COLUMNS = {
    "model": "<",
    "method": "<",
    "claim": "<",
    "effect": ">",
    "interval": ">",
    "n": ">",
    "verdict": "<",
    "note": "<",
}
_STATUSES = ("supported", "refuted", "inconclusive")


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
        "verdict": verdict.status.value + (", as recorded" if recorded == verdict.status.value else ""),
        "note": verdict.note,
        "asserted": "yes" if binding else "",
        "waived": "yes" if verdict.claim.asserted and not binding else "",
    }


def verdict_table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows as an aligned table, in the order of models and claims in which they were judged.

    What is asserted comes first, what is only reported below it, where a verdict has no consequence. The interval is
    the one that decides: 95%, or 90% where "no effect" is claimed, widened by the number of claims in the family; an
    exact number is followed by the bound it must keep. A column that says nothing, such as that of methods where only
    one is judged, is left out.
    """
    ordered = sorted(rows, key=lambda row: row["model"])
    methods = {row["method"] for row in ordered} - {""}
    said = {name for name in _COLUMNS if any(row[name] for row in ordered)} - (
        {"method"} if len(methods) < 2 else set()
    )
    columns = {name: align for name, align in _COLUMNS.items() if name in said}
    widths = {name: max(len(name), *(len(row[name]) for row in ordered)) for name in columns}

    def line(row: dict[str, str]) -> str:
        return "  ".join(f"{row[name]:{align}{widths[name]}}" for name, align in columns.items()).rstrip()

    header = line({name: name for name in columns})
    rule = "-" * (sum(widths.values()) + 2 * len(widths) - 2 - (widths["note"] + 2 if "note" in widths else 0))
    asserted, reported = ([row for row in ordered if bool(row["asserted"]) is which] for which in (True, False))
    lines = [header, rule, *map(line, asserted), rule] if asserted else []
    if reported:
        lines += ["", "reported, not asserted", header, rule, *map(line, reported), rule]
    counts = [f"{sum(row['verdict'].startswith(status) for row in asserted)} {status}" for status in _STATUSES]
    if reported:
        counts.append(f"{len(reported)} reported")
    waived = Counter(row["model"] for row in ordered if row["waived"])
    notes = [
        f"{counted(number, 'claim was', 'claims were')} not binding on {model}; --attribution-assert makes "
        f"{'it' if number == 1 else 'them'} so"
        for model, number in waived.items()
    ]
    return "\n".join([*lines, ", ".join(counts), *notes])
