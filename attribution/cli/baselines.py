"""``baselines``: the stored runs. List them, remove some, simulate how often their claims err."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from attribution.errors import AttributionError
from attribution.wording import pluralize

__all__ = ["add_command"]


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("baselines", help="list the stored runs, or remove some")
    parser.add_argument(
        "--folder", type=Path, default=Path(".attribution"), metavar="DIR", help="where they are (%(default)s)"
    )
    parser.set_defaults(run=_list_baselines)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    rates = actions.add_parser("rates", help="simulate how often each claim errs, as a Markdown table")
    rates.add_argument("name", metavar="NAME")
    rates.add_argument("--samples", type=int, default=400, metavar="N", help="from each false world (%(default)s)")
    rates.set_defaults(run=_simulate_rates)
    prune = actions.add_parser("prune", help="remove stored runs by name")
    prune.add_argument("names", nargs="+", metavar="NAME")
    prune.set_defaults(run=_prune_baselines)


def _list_baselines(options: argparse.Namespace) -> int:
    from attribution.gate.storage import names_in, path_of, read

    names = names_in(options.folder)
    if not names:
        print(f"no stored runs in {options.folder}; store one with pytest --attribution-save=NAME")
    broken = 0
    for name in names:
        try:
            stored_run = read(options.folder, name)
        except AttributionError as error:
            broken += 1
            print(f"{name}: {error}")
            continue
        models = ", ".join(
            f"{model} ({facts.dtype}, {facts.device}, {facts.weights[:19]})"
            for model, facts in stored_run.models.items()
        )
        kilobytes = path_of(options.folder, name).stat().st_size / 1000
        claims = pluralize(len(stored_run.verdicts), "claim")
        print(f"{name}: {claims} on {models}; made {stored_run.made}; {kilobytes:,.0f} kB")
    return 1 if broken else 0


def _simulate_rates(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from attribution.claims.error_rates import LIMIT, rates_of
    from attribution.gate.storage import read
    from attribution.report.rates import rates_table

    verdicts = [each for each in read(options.folder, options.name).verdicts if each.evidence is not None]
    rates = {}
    for each in tqdm(verdicts, unit="claim", disable=not sys.stderr.isatty()):
        if each.facts > 1:
            rates[each.model, each.claim.id] = rates_of(each, samples=options.samples)
    print("\n".join(rates_table(rates).markdown(tight_rule=True)))
    return 1 if any(each.false_positive > LIMIT for each in rates.values()) else 0


def _prune_baselines(options: argparse.Namespace) -> int:
    from attribution.gate.storage import prune

    prune(options.folder, options.names)
    print(f"removed {', '.join(options.names)}")
    return 0
