"""``models``: the models known by name."""

from __future__ import annotations

import argparse
from typing import Any

from attribution.cli.terminal import print_text
from attribution.models.registry import registry

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("models", help="list the models known by name")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from attribution.report.table import Table

    columns = ("name", "marker", "source", "revision", "dtype", "bundled")
    rows = (
        (each.name, each.marker, each.source, each.revision[:12], each.dtype, "yes" if each.bundled else "no")
        for each in registry().values()
    )
    print_text("\n".join(Table.of(columns, rows).text()))
    return 0
