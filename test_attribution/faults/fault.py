"""What a fault is, and the families of claims that faults concern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from changes import Change, Edit, Patch

SCORES = ("scores by definition",)
TOP = ("top 10 by definition",)
QUERY = ("query scores by definition",)
BACKWARD = ("scores by hand",)
ABLATION = ("ablation by hand",)
CONTROLS = ("controls by definition",)
METRICS = ("known outcomes",)
JUDGE = ("known verdicts",)
VALUE = ("value neurons cut",)
RANDOM = ("random neurons have no effect",)
BASELINES = ("top 10 beat baselines",)
KNOWN = ("known facts",)
QUERY_NEURONS = ("query neurons beat random ones",)
BROKEN = ("broken scorers lose their effect",)
PLANTED = ("planted neurons are found",)
CHAIN = ("both ends of a chain are found",)
UNDONE = ("planted neurons are undone",)
SPECIFIC = ("neurons are specific to a fact",)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong.
        changes: How it is made.
        claims: The families of claims that it concerns, which are judged if the preflight finds nothing.
        missed: Why nothing catches it; empty for what is caught.
    """

    name: str
    changes: tuple[Change, ...]
    claims: tuple[str, ...] = ()
    missed: str = ""


class Faults(list[Fault]):
    """The faults of one subject, in the order in which they are defined."""

    def patch(
        self, name: str, *where: str, claims: tuple[str, ...] = (), missed: str = ""
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that adds a fault: a patch of one function, or the same patch of several.

        See :class:`Fault` for ``name``, ``claims`` and ``missed``, and :class:`changes.Patch` for ``where`` and the
        decorated function.
        """

        def add(change: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Fault(name, tuple(Patch(each, change) for each in where), claims, missed))
            return change

        return add

    def edit(self, name: str, where: str, old: str, new: str, *, claims: tuple[str, ...] = ()) -> None:
        """Add a fault: an edit inside of one function, see :class:`changes.Edit`."""
        self.append(Fault(name, (Edit(where, old, new),), claims))
