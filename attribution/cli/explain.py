"""``explain PROMPT ANSWER``: what one prompt's answer comes from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from attribution.cli.terminal import add_loading, load_chosen, print_text
from attribution.errors import BadInputError

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "explain",
        help="explain one prompt: its layers, heads and neurons",
        description="Print the model's predictions, what layers, heads and neurons add to log p of an answer, what "
        "activates those neurons, and what zeroing them does. Scores are in nats.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="a text that ends right before its answer")
    parser.add_argument(
        "answer",
        nargs="?",
        metavar="ANSWER",
        help="one token with its leading space, such as ' Paris'; the model's own first prediction when left out",
    )
    parser.add_argument(
        "--joined", action="store_true", help="the answer continues the prompt's last word, with no space between"
    )
    parser.add_argument(
        "--model", default="bundled:gpt2", metavar="MODEL", help="a known name, a hub id or a folder (%(default)s)"
    )
    parser.add_argument(
        "-k", type=int, default=10, metavar="N", help="how many neurons of each kind to name and to zero (%(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    add_loading(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    import json
    from dataclasses import asdict

    from attribution.experiments.explanation import explain
    from attribution.prompts.knowledge import Prompt
    from attribution.report.explanation_page import render_page
    from attribution.report.explanation_text import glyphs_for, render_text

    prompt: str | Prompt = options.prompt
    if options.answer is not None:
        prompt = Prompt(options.prompt, options.answer, joined=options.joined)
    explanation = explain(load_chosen(options), prompt, k=options.k)
    if options.json:
        print(json.dumps(asdict(explanation), indent=2, allow_nan=False))
    else:
        print_text(render_text(explanation, glyphs_for(sys.stdout.encoding)))
    if options.html is not None:
        try:
            options.html.write_text(render_page(explanation), encoding="utf-8")
        except OSError as error:
            raise BadInputError(
                f"the page cannot be written to {str(options.html)!r} ({error.strerror}); give a file in a folder "
                "that exists and can be written to."
            ) from None
        # With --json, standard output holds JSON alone.
        print(f"\nwrote {options.html}", file=sys.stderr if options.json else sys.stdout)
    return 0
