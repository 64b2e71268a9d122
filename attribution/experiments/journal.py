"""What an evaluation has measured so far, appended to a file prompt by prompt, so that it can be interrupted.

The file holds one JSON text per line: first what was asked, then one line for each prompt. Lines are on the disk before
the next batch begins; a last line that was cut off, by a kill or a full disk, is dropped and measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from attribution.errors import BadInputError
from attribution.experiments.design import Measurement

__all__ = ["Journal", "journal"]

_FORMAT = "attribution evaluation 1"


@dataclass(frozen=True)
class Journal:
    """An open file of results.

    Attributes:
        found: What it holds, by number of the prompt.
        file: Where more is appended.
    """

    found: dict[int, Measurement]
    file: BinaryIO

    def keep(self, results: Mapping[int, Measurement]) -> dict[int, Measurement]:
        """Add the results of some prompts, and return them when they are on the disk; what was there before stands."""
        new = {number: found for number, found in results.items() if number not in self.found}
        lines = [json.dumps({"prompt": number, "found": found.to_json()}) + "\n" for number, found in new.items()]
        self.file.write("".join(lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.found.update(new)
        return {number: self.found[number] for number in results}


@contextmanager
def journal(path: str | os.PathLike[str], asked: Mapping[str, Any], prompts: int) -> Iterator[Journal]:
    """Open a file of results, new or begun by an earlier run that asked the same.

    Args:
        path: The file; its folder must exist.
        asked: What the results depend on, as JSON.
        prompts: How many prompts there are.

    Raises:
        BadInputError: If the file cannot be used, was begun by a run that asked something else, or is being written.
    """
    where = Path(path)
    try:
        file = where.open("a+b")
    except OSError as error:
        raise BadInputError(
            f"resume={str(path)!r} cannot be written ({error.strerror}); name a file in a folder that exists."
        ) from None
    with file, _claim(where):
        file.seek(0)
        # What follows the last line break was being written when the run ended.
        whole, _, _ = file.read().rpartition(b"\n")
        lines = _read(whole, where)
        head = {"format": _FORMAT, "asked": json.loads(json.dumps(asked))}
        if lines:
            _require_same(lines[0], head, where)
        file.truncate(len(whole) + 1 if lines else 0)
        found: dict[int, Measurement] = {}
        for line in lines[1:]:
            number = line.get("prompt")
            if not isinstance(number, int) or not 0 <= number < prompts or "found" not in line:
                raise BadInputError(f"resume={str(where)!r} holds a line that is no result; remove it to start anew.")
            found[number] = Measurement.of_json(line["found"])
        opened = Journal(found, file)
        if not lines:
            file.write((json.dumps(head) + "\n").encode())
            opened.keep({})
        yield opened


def _claim(where: Path) -> AbstractContextManager[object]:
    """Keep other runs out; the system releases the lock when the process ends, in whatever way.

    The file that is locked, ``FILE.lock``, is left in place: if it were removed, a run that had already opened it would
    lock a file that no other run can find.
    """
    try:
        return FileLock(f"{where.resolve()}.lock").acquire(timeout=0)
    except Timeout:
        raise BadInputError(
            f"resume={str(where)!r} is being written by another run; wait for it, or name another file."
        ) from None
    except OSError as error:
        raise BadInputError(
            f"resume={str(where)!r} cannot be locked ({error.strerror}); name a file in a folder that can be written."
        ) from None


def _read(whole: bytes, where: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in whole.decode().splitlines()]
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) for line in lines):
        raise BadInputError(f"resume={str(where)!r} is no file of results; remove it to start anew, or name another.")
    return lines


def _require_same(found: Mapping[str, Any], head: Mapping[str, Any], where: Path) -> None:
    if found.get("format") != head["format"]:
        raise BadInputError(
            f"resume={str(where)!r} is no file of results of this version ({_FORMAT!r}); remove it to start anew, or "
            "name another."
        )
    before: Any = found.get("asked")
    asked: Mapping[str, Any] = head["asked"]
    differing: Sequence[str] = (
        [name for name in asked if before.get(name) != asked[name]] if isinstance(before, dict) else list(asked)
    )
    if differing or before.keys() != asked.keys():
        raise BadInputError(
            f"resume={str(where)!r} was begun by a run with other {', '.join(differing) or 'arguments'}; ask the same "
            "again, remove it to start anew, or name another."
        )
