"""``select MODEL``: which prompts a model keeps by the selection rule, and why the rest fall."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attribution.cli.prompts_output import add_output, check_output, print_report, write_kept

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    select = commands.add_parser(
        "select", help="which prompts a model keeps by the selection rule, and why the rest fall"
    )
    select.add_argument("model", metavar="MODEL", help="a registered name, a hub id or a folder")
    select.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a CSV, JSONL or TOML file of prompts; the bundled ones by default"
    )
    select.add_argument("--models-dir", metavar="DIR", help="folder of model folders, looked in before the hub")
    add_output(select, "write the kept prompts", required=False)
    select.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    check_output(options.out, options.prompts)
    from attribution.experiments.selection_rule import SelectionOutcome, report_of, selection_outcomes
    from attribution.models.loading import load
    from attribution.prompts.knowledge import load_knowledge
    from attribution.prompts.prompt_files import load_prompts

    knowledge = load_knowledge() if options.prompts is None else load_prompts(options.prompts)
    model = load(options.model, models_dir=options.models_dir)
    outcomes = selection_outcomes(model, knowledge.prompts, knowledge.words)
    print_report(report_of(knowledge, outcomes), as_json=options.json)
    kept = [
        prompt for prompt, outcome in zip(knowledge.prompts, outcomes, strict=True) if outcome is SelectionOutcome.KEPT
    ]
    write_kept(options.out, kept, knowledge.words, as_json=options.json)
    return 0
