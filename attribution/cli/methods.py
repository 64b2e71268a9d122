"""``methods``: the attribution methods and what they cost."""

from __future__ import annotations

import argparse
from typing import Any

from attribution.cli.terminal import print_text

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("methods", help="list the attribution methods and what they cost")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from attribution.engine.methods import METHODS
    from attribution.report.table import Table

    columns = ("name", "units", "forward", "backward", "source")
    rows = (
        (each.name, ", ".join(each.units), str(each.forward), str(each.backward), each.source)
        for each in METHODS.values()
    )
    print_text("\n".join(Table.of(columns, rows).text()))
    return 0
