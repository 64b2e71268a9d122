"""The command line: ``python -m attribution COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attribution.cli import baselines, explain, methods, models, preflight, select, triviaqa
from attribution.errors import AttributionError
from attribution.models.registry import declare

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if something is wrong with what it was asked about."""
    parser = argparse.ArgumentParser(prog="python -m attribution", description="Claims about single neurons.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (explain, models, methods, preflight, baselines, select, triviaqa):
        command.add_command(commands)
    options = parser.parse_args(arguments)
    # As pytest does in this folder.
    settings = Path("pyproject.toml")
    try:
        if settings.is_file():
            declare(settings)
        status: int = options.run(options)
    except AttributionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status
