"""What the commands about prompts share: the report of counts, and the file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from attribution.errors import BadInputError
from attribution.wording import pluralize

__all__ = ["add_output", "check_output", "print_report", "write_kept"]


def add_output(parser: argparse.ArgumentParser, what: str, *, required: bool) -> None:
    """Add the options that say where prompts are written and how their report is printed."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", required=required, help=f"{what} here, as --prompts reads them"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def check_output(out: Path | None, source: Path | None) -> None:
    """Refuse what cannot be written before anything long is computed."""
    if out is None:
        return
    if out.suffix != ".jsonl":
        raise BadInputError(f"--out {str(out)!r} is written as JSONL; give it a name that ends in .jsonl.")
    if source is not None and out.resolve() == source.resolve():
        raise BadInputError(f"--out {str(out)!r} is the file that is read; give another name.")


def print_report(report: Any, *, as_json: bool) -> None:
    """Print a report of counts; the table ends in their sums."""
    if as_json:
        print(json.dumps(report.to_dict("records"), indent=1))
        return
    total = report.drop(columns="category").sum()
    report.loc[len(report)] = ["all", *total]
    # On a terminal whose encoding lacks a character of a category, that is written as an escape.
    encoding = sys.stdout.encoding or "ascii"
    print(report.to_string(index=False).encode(encoding, "backslashreplace").decode(encoding))


def write_kept(out: Path | None, prompts: Any, words: Any, *, as_json: bool) -> None:
    """Write the prompts that were kept, if a file is named."""
    from attribution.prompts.prompt_files import write_prompts

    if out is not None:
        write_prompts(out, prompts, words)
        # With --json, standard output holds JSON alone.
        print(f"wrote {pluralize(len(prompts), 'prompt')} to {out}", file=sys.stderr if as_json else sys.stdout)
