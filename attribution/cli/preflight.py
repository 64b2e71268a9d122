"""``preflight MODEL``: the identities that attribution rests on, checked on one model."""

from __future__ import annotations

import argparse
from typing import Any

from attribution.cli.terminal import add_loading, load_chosen, print_text

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("preflight", help="check the identities that attribution rests on, on one model")
    parser.add_argument("model", metavar="MODEL", help="a known name, a hub id or a folder")
    add_loading(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    from attribution.identities.preflight import preflight

    model = load_chosen(options)
    checks = preflight(model)
    for check in checks:
        print_text(str(check))
    print_text(f"all {len(checks)} identities hold on {model.name}")
    return 0
