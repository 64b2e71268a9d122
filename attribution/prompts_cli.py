"""Commands about prompts: ``select`` applies the selection rule, ``triviaqa`` makes prompts from TriviaQA."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from attribution.errors import BadInputError
from attribution.wording import counted

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of the command line."""
    select = commands.add_parser(
        "select", help="which prompts a model keeps by the selection rule, and why the rest fall"
    )
    select.add_argument("model", metavar="MODEL", help="a registered name, a hub id or a folder")
    select.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a CSV, JSONL or TOML file of prompts; the bundled ones by default"
    )
    select.add_argument("--models-dir", metavar="DIR", help="folder of model folders, looked in before the hub")
    _add_output(select, "write the kept prompts", required=False)
    select.set_defaults(run=_select)

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
    _add_output(triviaqa, "write the prompts", required=True)
    triviaqa.set_defaults(run=_triviaqa)


def _add_output(parser: argparse.ArgumentParser, what: str, *, required: bool) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", required=required, help=f"{what} here, as --prompts reads them"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _select(options: argparse.Namespace) -> int:
    _check_output(options.out, options.prompts)
    from attribution.knowledge import load_knowledge
    from attribution.metrics import SelectionOutcome
    from attribution.model import load
    from attribution.prompt_files import load_prompts
    from attribution.selection_rule import report_of, selection_outcomes

    knowledge = load_knowledge() if options.prompts is None else load_prompts(options.prompts)
    model = load(options.model, models_dir=options.models_dir)
    outcomes = selection_outcomes(model, knowledge.prompts, knowledge.words)
    _print(report_of(knowledge, outcomes), as_json=options.json)
    kept = [
        prompt for prompt, outcome in zip(knowledge.prompts, outcomes, strict=True) if outcome is SelectionOutcome.KEPT
    ]
    _write(options.out, kept, knowledge.words, as_json=options.json)
    return 0


def _triviaqa(options: argparse.Namespace) -> int:
    if (options.file is None) == (options.hub is None):
        raise BadInputError(f"FILE is {options.file} and --hub is {options.hub}; give exactly one of them.")
    _check_output(options.out, options.file)
    from attribution.knowledge import load_knowledge
    from attribution.triviaqa import TEMPLATE, build_prompts, download, read_questions

    questions = read_questions(options.file if options.hub is None else download(options.hub))
    words = load_knowledge().words
    prompts, report = build_prompts(questions, words, TEMPLATE if options.template is None else options.template)
    _print(report, as_json=options.json)
    _write(options.out, prompts, words, as_json=options.json)
    return 0


def _check_output(out: Path | None, source: Path | None) -> None:
    """Refuse what cannot be written before anything long is computed."""
    if out is None:
        return
    if out.suffix != ".jsonl":
        raise BadInputError(f"--out {str(out)!r} is written as JSONL; give it a name that ends in .jsonl.")
    if source is not None and out.resolve() == source.resolve():
        raise BadInputError(f"--out {str(out)!r} is the file that is read; give another name.")


def _print(report: Any, *, as_json: bool) -> None:
    """Print a report of counts; the table ends in their sums."""
    if as_json:
        print(json.dumps(report.to_dict("records"), indent=1))
        return
    total = report.drop(columns="category").sum()
    report.loc[len(report)] = ["all", *total]
    # On a terminal whose encoding lacks a character of a category, that is written as an escape.
    encoding = sys.stdout.encoding or "ascii"
    print(report.to_string(index=False).encode(encoding, "backslashreplace").decode(encoding))


def _write(out: Path | None, prompts: Any, words: Any, *, as_json: bool) -> None:
    from attribution.prompt_files import write_prompts

    if out is not None:
        write_prompts(out, prompts, words)
        # With --json, standard output holds JSON alone.
        print(f"wrote {counted(len(prompts), 'prompt')} to {out}", file=sys.stderr if as_json else sys.stdout)
