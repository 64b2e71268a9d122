"""Exhibits: what was measured for one table or figure of the paper, on one model, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cell", "Exhibit"]

Cell: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Exhibit:
    """The rows behind one table or figure, for one model; small and plain, so that a worker can send it.

    Attributes:
        name: What it is the counterpart of: ``"table_2"`` to ``"table_14"``, ``"figure_2"`` to ``"figure_10"``.
        model: The model's name.
        columns: Names of the columns.
        rows: One tuple per row; a number that is missing or not finite is ``None``.
        seen: A sentence that says what is seen in them.
        prompts: How many prompts they are made of.
    """

    name: str
    model: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    seen: str
    prompts: int

    @classmethod
    def of_frame(cls, name: str, model: str, frame: pd.DataFrame, *, seen: str, prompts: int) -> Exhibit:
        """Return the exhibit of a frame, without its index."""
        rows = tuple(tuple(_cell(value) for value in row) for row in frame.itertuples(index=False, name=None))
        return cls(name, model, tuple(map(str, frame.columns)), rows, seen, prompts)

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Exhibit:
        """Return the exhibit that :func:`dataclasses.asdict` made ``data`` of, perhaps by way of JSON."""
        rows: Sequence[Sequence[Cell]] = data["rows"]
        return cls(**{**data, "columns": tuple(data["columns"]), "rows": tuple(tuple(row) for row in rows)})

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a frame."""
        import pandas as pd

        return pd.DataFrame(list(self.rows), columns=list(self.columns))


def _cell(value: Any) -> Cell:
    """Return a value as plain Python; numpy's and pandas' numbers know how."""
    plain = value.item() if hasattr(value, "item") else value
    if plain is None or isinstance(plain, bool | str | int):
        return plain
    number = float(plain) if isinstance(plain, float) else math.nan
    return number if math.isfinite(number) else None
