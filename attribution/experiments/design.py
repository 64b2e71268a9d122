"""The design of an experiment, and what it measured: what is ablated in which arms, and how each answer fared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, TypeAlias

import pandas as pd

from attribution.engine.masks import AblationKind, ablation_kind
from attribution.engine.methods import method_named
from attribution.engine.metrics import Outcome
from attribution.errors import BadInputError
from attribution.prompts.knowledge import Prompt
from attribution.records import Unit, unit_named

__all__ = ["Ablated", "Arm", "Budget", "Design", "Measurement", "budgets_of", "table_of"]

Budget: TypeAlias = Mapping[Unit, int]
"""How many of each unit are ablated."""


@dataclass(frozen=True)
class Arm:
    """One thing that every prompt is measured in.

    Attributes:
        method: The method whose best are ablated.
        kind: What they are replaced with.
        budget: How many of each unit.
    """

    method: str
    kind: AblationKind
    budget: Budget


@dataclass(frozen=True)
class Design:
    """What an experiment does to each prompt; with the model and the prompts, all that its result depends on.

    Attributes:
        methods: Registered methods; all are ranked in one trace.
        budgets: How many of each unit, the same units in each.
        kinds: Kinds of ablation.
        at_source: Ablate attention neurons only at their own source position, see :func:`attribution.ablate`.
        seed: Seed of methods that draw random numbers, and of the donors that ``"resample"`` draws.
        steps: Points on the path of integrated gradients.
    """

    methods: tuple[str, ...]
    budgets: tuple[Budget, ...]
    kinds: tuple[AblationKind, ...]
    at_source: bool = False
    seed: int = 0
    steps: int = 20

    @classmethod
    def of(
        cls,
        method: str | Sequence[str],
        budgets: Sequence[Budget],
        kind: str | Sequence[str],
        **settings: Any,
    ) -> Design:
        """Return a design, checked.

        Raises:
            BadInputError: If a method or kind is unknown, a method does not score a unit, or there is none.
        """
        methods = (method,) if isinstance(method, str) else tuple(method)
        kinds = tuple(ablation_kind(each) for each in ([kind] if isinstance(kind, str) else kind))
        if not methods or not kinds:
            raise BadInputError(
                "the list of methods or kinds is empty; give at least one registered method and one kind."
            )
        for unit in budgets[0]:
            for name in methods:
                method_named(name, unit)
        return cls(methods, tuple(budgets), kinds, **settings)

    @property
    def arms(self) -> list[Arm]:
        """Every arm, by method, kind and budget in turn."""
        return [Arm(*each) for each in self._arms()]

    def _arms(self) -> Iterator[tuple[str, AblationKind, Budget]]:
        for method in self.methods:
            for kind in self.kinds:
                for budget in self.budgets:
                    yield method, kind, budget

    @property
    def largest(self) -> dict[Unit, int]:
        """How many of each unit have to be ranked."""
        return {unit: max(budget[unit] for budget in self.budgets) for unit in self.budgets[0]}

    def to_json(self) -> dict[str, Any]:
        """Return the design as the header of a journal holds it."""
        return {
            "method": list(self.methods),
            "k": [dict(budget) for budget in self.budgets],
            "kind": [kind.value for kind in self.kinds],
            "at_source": self.at_source,
            "seed": self.seed,
            "steps": self.steps,
        }


@dataclass(frozen=True)
class Ablated:
    """How one prompt is answered in one arm.

    Attributes:
        outcome: The answer after the rerun.
        distinct: How many coefficients were replaced, each counted once.
    """

    outcome: Outcome
    distinct: int


@dataclass(frozen=True)
class Measurement:
    """How one prompt is answered.

    Attributes:
        before: By the plain model.
        after: In each arm of the design, in its order.
    """

    before: Outcome
    after: tuple[Ablated, ...]

    def to_json(self) -> list[Any]:
        """Return the measurement as a line of a journal holds it."""
        return [list(astuple(self.before)), [[*astuple(each.outcome), each.distinct] for each in self.after]]

    @classmethod
    def of_json(cls, found: Sequence[Any]) -> Measurement:
        """Return the measurement that :meth:`to_json` wrote."""
        before, after = found
        return cls(Outcome(*before), tuple(Ablated(Outcome(*outcome), distinct) for *outcome, distinct in after))


def budgets_of(k: int | Sequence[int] | Mapping[str, int], unit: str) -> list[Budget]:
    """Return every budget that ``k`` asks for.

    Args:
        k: A number or several of ``unit``, or how many of each unit.
        unit: The unit that is counted where ``k`` names none.

    Raises:
        BadInputError: If it asks for none, or for one twice.
    """
    if isinstance(k, Mapping):
        if not k:
            raise BadInputError("k = {} names no unit; give a number, or a number for each unit to ablate.")
        return [{unit_named(name): number for name, number in k.items()}]
    numbers: list[Any] = list(k) if isinstance(k, list | tuple) else [k]
    if not numbers:
        raise BadInputError(f"k = {k!r} holds no number; give at least one.")
    if len(set(numbers)) < len(numbers):
        raise BadInputError(f"k = {k!r} holds a number twice; give each once.")
    return [{unit_named(unit): number} for number in numbers]


def table_of(prompts: Sequence[Prompt], design: Design, measured: Sequence[Measurement]) -> pd.DataFrame:
    """Return measurements as the table of :func:`attribution.evaluate`: by arm, then by prompt."""
    names = [each.name for each in fields(Outcome)]
    return pd.DataFrame(
        [
            {
                "method": arm.method,
                "kind": arm.kind.value,
                "k": sum(arm.budget.values()),
                "prompt": prompt.text,
                "answer": prompt.answer,
                "category": prompt.category,
                "fact": prompt.fact,
                "distinct": found.after[place].distinct,
                **{f"{name}_before": getattr(found.before, name) for name in names},
                **{f"{name}_after": getattr(found.after[place].outcome, name) for name in names},
            }
            for place, arm in enumerate(design.arms)
            for prompt, found in zip(prompts, measured, strict=True)
        ]
    )
