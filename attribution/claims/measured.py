"""What a measurement hands to the judge, see :meth:`attribution.claims.bench.Workbench.verdict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["Effects", "Exact", "Measured", "NotApplicable", "Numbers"]

Numbers: TypeAlias = Sequence[float] | npt.NDArray[np.float64] | pd.Series


@dataclass(frozen=True)
class Effects:
    """One number for each prompt.

    Attributes:
        values: The effect on each prompt.
        baselines: What the effects are relative to, if the claim is about a ratio of two means.
        indices: Which of the bench's prompts were measured; all when ``None``.
        seed: Seed of the measurement's random draws, if it has any.
        note: What the table says next to the verdict, such as what the measurement cost.
    """

    values: Numbers
    baselines: Numbers | None = None
    indices: Sequence[int] | None = None
    seed: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Exact:
    """One number without sampling error, such as the largest error over all prompts.

    Attributes:
        value: The number.
        prompts: How many prompts it covers.
        facts: How many facts these prompts ask for.
        seed: Seed of the measurement's random draws, if it has any.
        note: What the table says next to the verdict.
    """

    value: float
    prompts: int
    facts: int
    seed: int | None = None
    note: str = ""


@dataclass(frozen=True)
class NotApplicable:
    """The claim is about neurons that the method does not score, so nothing was measured.

    Attributes:
        reason: Why, as part of a sentence.
    """

    reason: str


Measured: TypeAlias = Effects | Exact | NotApplicable
