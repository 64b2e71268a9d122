"""The command line: ``python -m attribution COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.errors import AttributionError, BadInputError
from attribution.prompts_cli import add_commands
from attribution.registry import DTYPES, declare, registry
from attribution.wording import counted

if TYPE_CHECKING:
    from attribution.model import Model

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if something is wrong with what it was asked about."""
    parser = argparse.ArgumentParser(prog="python -m attribution", description="Claims about single neurons.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_explain(commands)
    _add_models(commands)
    _add_methods(commands)
    _add_preflight(commands)
    _add_baselines(commands)
    add_commands(commands)
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


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="explain one prompt: its layers, heads and neurons",
        description="Print the model's predictions, what layers, heads and neurons add to log p of an answer, what "
        "wakes those neurons, and what zeroing them does. Scores are in nats.",
    )
    parser.add_argument("prompt", metavar="PROMPT", help="a text that ends right before its answer")
    parser.add_argument(
        "answer",
        nargs="?",
        metavar="ANSWER",
        help="one token with its leading space, such as ' Paris'; the model's own first prediction when left out",
    )
    parser.add_argument(
        "--model", default="bundled:gpt2", metavar="MODEL", help="a known name, a hub id or a folder (%(default)s)"
    )
    parser.add_argument(
        "-k", type=int, default=10, metavar="N", help="how many neurons of each kind to name and to zero (%(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with figures as well")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    _add_loading(parser)
    parser.set_defaults(run=_explain)


def _add_models(commands: Any) -> None:
    parser = commands.add_parser("models", help="list the models known by name")
    parser.set_defaults(run=_list_models)


def _add_methods(commands: Any) -> None:
    parser = commands.add_parser("methods", help="list the attribution methods and what they cost")
    parser.set_defaults(run=_list_methods)


def _add_preflight(commands: Any) -> None:
    parser = commands.add_parser("preflight", help="check the identities that attribution rests on, on one model")
    parser.add_argument("model", metavar="MODEL", help="a known name, a hub id or a folder")
    _add_loading(parser)
    parser.set_defaults(run=_preflight)


def _add_loading(parser: Any) -> None:
    parser.add_argument("--models-dir", type=Path, metavar="DIR", help="folder of model folders, used before the hub")
    parser.add_argument(
        "--device", metavar="DEVICE", help="where the weights go, such as cuda, auto or tensor_parallel (cpu)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (the registered one, or float32)")
    parser.add_argument(
        "--revision", metavar="REVISION", help="branch, tag or commit on the hub (the registered one, or its default)"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled weights where a model has no safetensors"
    )


def _load(options: argparse.Namespace) -> Model:
    from attribution.model import load

    return load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        models_dir=options.models_dir,
        allow_pickle=options.allow_pickle,
    )


def _print(text: str) -> None:
    """Print a text on any terminal: what its encoding lacks is written as an escape."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _explain(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from attribution.explanation import explain
    from attribution.explanation_page import render_page
    from attribution.explanation_text import glyphs_for, render_text

    explanation = explain(_load(options), options.prompt, options.answer, k=options.k)
    if options.json:
        print(json.dumps(asdict(explanation), indent=2, allow_nan=False))
    else:
        _print(render_text(explanation, glyphs_for(sys.stdout.encoding)))
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


def _list_models(_: argparse.Namespace) -> int:
    from attribution.explanation_text import aligned

    rows = [
        (each.name, each.marker, each.source, each.revision[:12], each.dtype, "yes" if each.bundled else "no")
        for each in registry().values()
    ]
    columns = [(name, False) for name in ("name", "marker", "source", "revision", "dtype", "bundled")]
    _print("\n".join(aligned(columns, rows)))
    return 0


def _list_methods(_: argparse.Namespace) -> int:
    from attribution.explanation_text import aligned
    from attribution.methods import METHODS

    columns = [("name", False), ("units", False), ("forward", False), ("backward", False), ("source", False)]
    rows = [
        (each.name, ", ".join(each.units), str(each.forward), str(each.backward), each.source)
        for each in METHODS.values()
    ]
    _print("\n".join(aligned(columns, rows)))
    return 0


def _preflight(options: argparse.Namespace) -> int:
    from attribution.checks import preflight

    model = _load(options)
    checks = preflight(model)
    for check in checks:
        _print(str(check))
    _print(f"all {len(checks)} identities hold on {model.name}")
    return 0


def _add_baselines(commands: Any) -> None:
    parser = commands.add_parser("baselines", help="list the stored baselines, or remove some")
    parser.add_argument(
        "--folder", type=Path, default=Path(".attribution"), metavar="DIR", help="where they are (%(default)s)"
    )
    parser.set_defaults(run=_list_baselines)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    rates = actions.add_parser("rates", help="simulate how often each claim errs, as a Markdown table")
    rates.add_argument("name", metavar="NAME")
    rates.add_argument("--samples", type=int, default=400, metavar="N", help="from each false world (%(default)s)")
    rates.set_defaults(run=_simulate_rates)
    prune = actions.add_parser("prune", help="remove baselines by name")
    prune.add_argument("names", nargs="+", metavar="NAME")
    prune.set_defaults(run=_prune_baselines)


def _list_baselines(options: argparse.Namespace) -> int:
    from attribution.storage import names_in, path_of, read

    names = names_in(options.folder)
    if not names:
        print(f"no baselines in {options.folder}; save one with pytest --attribution-save=NAME")
    broken = 0
    for name in names:
        try:
            baseline = read(options.folder, name)
        except AttributionError as error:
            broken += 1
            print(f"{name}: {error}")
            continue
        models = ", ".join(
            f"{model} ({facts.dtype}, {facts.device}, {facts.weights[:19]})" for model, facts in baseline.models.items()
        )
        kilobytes = path_of(options.folder, name).stat().st_size / 1000
        claims = counted(len(baseline.verdicts), "claim")
        print(f"{name}: {claims} on {models}; made {baseline.made}; {kilobytes:,.0f} kB")
    return 1 if broken else 0


def _simulate_rates(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from attribution.power import LIMIT, rates_of, table
    from attribution.storage import read

    verdicts = [each for each in read(options.folder, options.name).verdicts if each.evidence is not None]
    rates = {}
    for each in tqdm(verdicts, unit="claim", disable=not sys.stderr.isatty()):
        if each.facts > 1:
            rates[each.model, each.claim.id] = rates_of(each, samples=options.samples)
    print(table(rates))
    return 1 if any(each.false_positive > LIMIT for each in rates.values()) else 0


def _prune_baselines(options: argparse.Namespace) -> int:
    from attribution.storage import prune

    prune(options.folder, options.names)
    print(f"removed {', '.join(options.names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
