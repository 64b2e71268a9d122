"""Models known by name, read from one file that a person can edit."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from attribution.resources import fixtures_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["BUNDLED", "Entry", "entry_of", "registry"]

BUNDLED = "bundled:"


@dataclass(frozen=True)
class Entry:
    """One model known by name.

    Attributes:
        name: What users call it.
        marker: The pytest marker that selects it; empty for a model that the registry does not know.
        source: Folder beside the registry for bundled models, hub id for the others.
        value_neurons: How many value neurons of each unit the deletion claim ablates together.
        value_neurons_reason: Why that many.
        known_share: How much larger than its control the share of known prompts of each category must be, 0 to 1.
        known_share_reason: Why that much.
        knowledge: Families of claims about where the model keeps knowledge that are asserted for it; the others are
            measured and reported.
        not_supported: Claims that do not hold for this model, by id, with the verdict that was measured. Such a test
            is an expected failure, and a real one as soon as the verdict is another.
    """

    name: str
    marker: str
    source: str
    value_neurons: dict[str, int]
    value_neurons_reason: str
    known_share: float
    known_share_reason: str
    knowledge: tuple[str, ...] = ()
    not_supported: dict[str, str] = field(default_factory=dict)
    revision: str = ""
    dtype: str = "float32"

    @property
    def bundled(self) -> bool:
        """Whether the model comes with the package and needs no network."""
        return self.name.startswith(BUNDLED)

    @property
    def folder(self) -> Path:
        """Folder of a bundled model."""
        return fixtures_folder("models") / self.source


@cache
def registry() -> dict[str, Entry]:
    """Return every model known by name, in file order."""
    path = fixtures_folder("models") / "registry.toml"
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: Entry(name=name, **fields) for name, fields in entries.items()}


def entry_of(name: str) -> Entry:
    """Return the entry of a model; of one that the registry does not know, an entry with the paper's budget."""
    return registry().get(name) or Entry(
        name=name,
        marker="",
        source=name,
        value_neurons={"attention": 200, "ffn": 100},
        value_neurons_reason="the paper's Table 13",
        known_share=0.0,
        known_share_reason="nothing is known of the model: only more than with swapped answers",
    )
