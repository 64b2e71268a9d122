"""Verdicts as text: the table that ends a run."""

from __future__ import annotations

from collections.abc import Sequence

from attribution.claims import Verdict

__all__ = ["verdict_row", "verdict_table"]

_COLUMNS = {"model": "<", "claim": "<", "effect": ">", "interval": ">", "n": ">", "verdict": "<"}


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 1000 or 0 < abs(value) < 0.001 else f"{value:.3f}"


def verdict_row(verdict: Verdict, recorded: str | None = None) -> dict[str, str]:
    """Return a verdict as one row of text, by column; ``recorded`` is the verdict that the registry expects."""
    exact = verdict.claim.test == "at_most"
    interval = f"<= {verdict.claim.threshold:g}" if exact else f"{_number(verdict.low)} .. {_number(verdict.high)}"
    return {
        "model": verdict.model,
        "claim": verdict.claim.id,
        "effect": _number(verdict.effect),
        "interval": interval,
        "n": str(verdict.n),
        "verdict": verdict.status.value + (", as recorded" if recorded == verdict.status.value else ""),
    }


def verdict_table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows as an aligned table, in the order of models and claims in which they were judged.

    The interval is the one that decides: 95%, or 90% where "no effect" is claimed; an exact number is followed by
    the bound it must keep.
    """
    ordered = sorted(rows, key=lambda row: row["model"])
    widths = {name: max(len(name), *(len(row[name]) for row in ordered)) for name in _COLUMNS}

    def line(row: dict[str, str]) -> str:
        return "  ".join(f"{row[name]:{align}{widths[name]}}" for name, align in _COLUMNS.items()).rstrip()

    header = line({name: name for name in _COLUMNS})
    counts = ", ".join(
        f"{sum(row['verdict'].startswith(status) for row in ordered)} {status}"
        for status in ("supported", "refuted", "inconclusive")
    )
    return "\n".join([header, "-" * len(header), *map(line, ordered), "-" * len(header), counts])
