"""``triviaqa FILE``: prompts made of the TriviaQA questions whose answer has a category."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attribution.cli.prompts_output import add_output, check_output, print_report, write_kept
from attribution.errors import BadInputError

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    triviaqa = commands.add_parser(
        "triviaqa", help="make prompts of the TriviaQA questions whose answer has a category"
    )
    triviaqa.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="TriviaQA as .jsonl, .json (its release) or .parquet (the hub's)",
    )
    triviaqa.add_argument("--hub", metavar="SPLIT", help="in place of FILE: download train or validation from the hub")
    triviaqa.add_argument("--template", metavar="TEXT", help="what a question becomes; by default 'Q : {question} A :'")
    add_output(triviaqa, "write the prompts", required=True)
    triviaqa.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    if (options.file is None) == (options.hub is None):
        raise BadInputError(f"FILE is {options.file} and --hub is {options.hub}; give exactly one of them.")
    check_output(options.out, options.file)
    from attribution.prompts.knowledge import load_knowledge
    from attribution.prompts.triviaqa import TEMPLATE, build_prompts, download, read_questions

    questions = read_questions(options.file if options.hub is None else download(options.hub))
    words = load_knowledge().words
    prompts, report = build_prompts(questions, words, TEMPLATE if options.template is None else options.template)
    print_report(report, as_json=options.json)
    write_kept(options.out, prompts, words, as_json=options.json)
    return 0
