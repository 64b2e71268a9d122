"""The options of the pytest plugin.

Each has a name of its own, ``--attribution-NAME``, which collides with no other plugin's. Those that are typed often
have a short one as well, such as ``--model``, that gives way: where another plugin or a conftest.py defines it, it is
theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytest

from attribution.models.registry import DTYPES
from attribution.pytest_plugin.collectors import COMPARE, REPORT, SAVE

__all__ = ["add_options", "settle", "spelled_out"]

_SHORT = ("model", "models-dir", "device", "dtype", "revision", "max-prompts", "seed", "prompts")


def _prompts(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of prompts; give 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number from 0 to 999999999")
    return int(text)


def add_options(parser: pytest.Parser) -> None:
    """Add the plugin's options to pytest's."""
    group = parser.getgroup("attribution", "claims about single neurons")

    def add(name: str, help: str, **settings: object) -> None:
        short = f" (also --{name})" if name in _SHORT else ""
        # All that is given is gathered: of two, argparse would take the last in silence.
        settings = {"action": "append"} | settings
        group.addoption(f"--attribution-{name}", help=help + short, default=None, **settings)

    add(
        "model",
        "a registered name, a hub id or a folder to run the claims on, instead of the suite's models; repeatable",
        metavar="NAME",
        action="append",
    )
    add(
        "models-dir",
        "folder of model folders (DIR/gpt2 and so on), used instead of the hub; write --models-dir=DIR, with the "
        "equals sign, or pytest takes DIR for a path of tests; also ATTRIBUTION_MODELS",
        metavar="DIR",
    )
    add("device", "where the weights go, such as cuda:1, auto or tensor_parallel; cpu by default", metavar="DEVICE")
    add("dtype", "type of the weights; by default what the registry says of the model, or float32", choices=DTYPES)
    add("revision", "commit, tag or branch on the hub, of the one model that is named", metavar="REVISION")
    add(
        "max-prompts",
        "judge methods on at most N prompts of each model, always the same ones",
        metavar="N",
        type=_prompts,
    )
    add("seed", "draw all that is random by another seed; 0 by default", metavar="N", type=_seed)
    add(
        "prompts",
        "a CSV, JSONL or TOML file of prompts, with the categories it names, to run the claims on instead of the "
        "bundled ones; write --prompts=FILE, with the equals sign",
        metavar="FILE",
    )
    add(
        "assert",
        "make every claim binding that the suite can assert, also on models of which the registry says nothing",
        action="store_true",
    )
    add(
        "allow-pickle",
        "load pickled weights where a model has no safetensors: unpickling can be made to run code",
        action="store_true",
    )
    add("save", "store what this run measures as the stored run .attribution/NAME.json", metavar="NAME")
    add("update", f"let {SAVE} replace a stored run", action="store_true")
    add(
        "compare",
        "fail on what is worse than in a stored run, and if the run is not comparable with it; NAME may be left out "
        "where there is one stored run, and needs the equals sign",
        metavar="NAME",
        nargs="?",
        const="",
    )
    add(
        "fail",
        "what turns a run red, separated by commas: verdicts (asserted claims that are not supported), regressions "
        "(worse than the stored run), or regressions:X (by more than X in the unit of the claim); by default verdicts, "
        f"and regressions with {COMPARE}",
        metavar="WHAT",
    )
    add(
        "allow",
        "what a run may differ in from its stored run, separated by commas: dtype, device; and repeats, for claims "
        "that were measured again after their tests failed",
        metavar="WHAT",
    )
    add(
        "report",
        "write a page, a Markdown summary, CSV and JSON of what this run measures to a folder; write "
        f"{REPORT}=DIR, with the equals sign",
        metavar="DIR",
    )


def settle(options: argparse.Namespace) -> None:
    """Replace what was gathered for each option that takes one value by that value.

    Raises:
        pytest.UsageError: If one was given more than once.
    """
    for place, given in list(vars(options).items()):
        # Several models may be named. A worker of a distributed run is handed what was settled.
        if not place.startswith("attribution_") or place == "attribution_model" or not isinstance(given, list):
            continue
        if len(given) > 1:
            option = f"--{place.replace('_', '-')}"
            raise pytest.UsageError(
                f"{option} was given {len(given)} times ({', '.join(map(repr, given))}), and only one can be meant; "
                "give it once, on the command line, in addopts or in PYTEST_ADDOPTS."
            )
        setattr(options, place, given[0])


def spelled_out(args: Sequence[str], parser: pytest.Parser) -> list[str]:
    """Return arguments with the short names that nobody else defines replaced by the plugin's own."""
    own = {f"--{name}": f"--attribution-{name}" for name in _SHORT if not _taken(f"--{name}", parser)}
    end = args.index("--") if "--" in args else len(args)
    result = []
    for each in args[:end]:
        name, equals, value = each.partition("=")
        result.append(own.get(name, name) + equals + value)
    return [*result, *args[end:]]


def _taken(name: str, parser: pytest.Parser) -> bool:
    try:
        return not parser.parse_known_and_unknown_args([f"{name}=x"])[1]
    except pytest.UsageError:
        # Somebody's option of that name, which takes no such value.
        return True
