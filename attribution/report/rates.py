"""How often claims err, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from attribution.claims.error_rates import WORLDS, Rates
from attribution.report.table import Column, Table

__all__ = ["rates_table"]


def rates_table(rates: Mapping[tuple[str, str], Rates]) -> Table:
    """Return rates by model and claim, the largest rate of false positives first."""
    numbers = ("Facts", *(name.capitalize() for name in WORLDS), "Power")
    columns: list[Column | str] = ["Model", "Claim", *(Column(heading, "number") for heading in numbers)]
    rows = []
    for (model, claim), each in sorted(rates.items(), key=lambda item: (-item[1].false_positive, item[0])):
        worlds = (f"{each.false_positives[name]:.3f}" if name in each.false_positives else "" for name in WORLDS)
        rows.append([model, claim, str(each.facts), *worlds, f"{each.power:.2f}"])
    return Table.of(columns, rows)
