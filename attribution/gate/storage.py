"""Where stored runs are kept: one file each in a folder of their own, written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from attribution.errors import BadInputError
from attribution.gate.stored_run import StoredRun, dumps, key_of, label, loads, some

__all__ = ["FOLDER", "stored_run_named", "names_in", "path_of", "prune", "read", "save"]

FOLDER = ".attribution"
"""Folder of stored runs, in pytest's root folder."""

# In that folder. Whoever holds it is the only writer; the system releases it when a process dies, in whatever way.
_LOCK = ".lock"


def path_of(folder: Path, name: str) -> Path:
    """Return the file of a stored run.

    Raises:
        BadInputError: If the name cannot be that of a file.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise BadInputError(
            f"{name!r} cannot be the name of a stored run; use letters, digits, '.', '_' and '-', such as 'main'."
        )
    return folder / f"{name}.json"


def names_in(folder: Path) -> list[str]:
    """Return the names of the stored runs in a folder, readable or not."""
    return sorted(path.stem for path in folder.glob("*.json"))


def read(folder: Path, name: str) -> StoredRun:
    """Return a stored run.

    Raises:
        BadInputError: If there is none of that name, or it cannot be trusted.
    """
    path = path_of(folder, name)
    if not path.is_file():
        there = ", ".join(names_in(folder)) or "none"
        raise BadInputError(
            f"there is no stored run {name!r} in {folder} (there: {there}); save one with --attribution-save={name}."
        )
    try:
        return loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        why = "is not a text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).rstrip(".")
        raise BadInputError(
            f"the stored run {path} cannot be used, it {why}; restore it from version control, or remove it with "
            f"'python -m attribution baselines prune {name}' and save a new one."
        ) from None


def stored_run_named(folder: Path, name: str, models: Collection[str] = ()) -> str:
    """Return the name of a stored run; when it is empty, of the only one, or of the only one of some models.

    Args:
        folder: Where stored runs are kept.
        name: Its name.
        models: The names of the models that it should be of.

    Raises:
        BadInputError: If the name is empty and not exactly one can be meant.
    """
    if name:
        return name
    there = names_in(folder)
    if len(there) > 1:
        of_models = [each for each in there if set(models) == read(folder, each).models.keys()]
        there = of_models if len(of_models) == 1 else there
    if len(there) != 1:
        raise BadInputError(
            f"--attribution-compare without a name needs exactly one stored run in {folder}, and there are "
            f"{len(there)} ({', '.join(there) or 'none'}); "
            + ("name one: --attribution-compare=NAME." if there else "save one with --attribution-save=NAME.")
        )
    return there[0]


def save(folder: Path, name: str, stored_run: StoredRun, *, update: bool) -> bool:
    """Write a stored run: all of it or, whatever happens, nothing.

    It is written to a file beside it, which then takes its place in one step. Writers wait for each other.

    Args:
        folder: Where stored runs are kept.
        name: Its name.
        stored_run: What to keep.
        update: Whether one of the same name may be replaced.

    Returns:
        Whether there was none of that name.

    Raises:
        BadInputError: If there is one that may not be replaced or that has claims which this one lacks, or if nothing
            or no number was measured.
    """
    path = path_of(folder, name)
    if not stored_run.verdicts:
        raise BadInputError(
            f"stored run {name!r} was not saved: no gated claim was measured; run claims about methods."
        )
    text = dumps(stored_run)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):
        new = not path.exists()
        if not new:
            _require_replaceable(folder, name, stored_run, update)
        unfinished = path.with_suffix(".json.tmp")
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            # Before the name points to it: after a power cut the file must hold what it is said to hold.
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync(folder)
    return new


def _require_replaceable(folder: Path, name: str, stored_run: StoredRun, update: bool) -> None:
    if not update:
        raise BadInputError(
            f"stored run {name!r} exists and was not replaced; add --attribution-update to replace it, or choose "
            "another name."
        )
    lost = sorted(
        {key_of(each) for each in read(folder, name).verdicts} - {key_of(each) for each in stored_run.verdicts}
    )
    if lost:
        raise BadInputError(
            f"stored run {name!r} was not replaced: it has {some(map(label, lost), 'claim')} that this run did not "
            "measure; run the whole suite that it was made from, or, if they are gone on purpose, remove it with "
            f"'python -m attribution baselines prune {name}' and save it anew."
        )


def _sync(folder: Path) -> None:
    """Put a new name on the disk as well, unless the system does not open folders, as Windows does not."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def prune(folder: Path, names: Sequence[str]) -> None:
    """Remove stored runs, all of them or none.

    Raises:
        BadInputError: If one does not exist.
    """
    paths = [path_of(folder, name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            there = ", ".join(names_in(folder)) or "none"
            raise BadInputError(
                f"there is no stored run {name!r} in {folder} (there: {there}); nothing was removed, name one of those."
            )
    for path in paths:
        path.unlink(missing_ok=True)
