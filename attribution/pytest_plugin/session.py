"""What a run of pytest is: a worker or the one that writes, on which prompts and categories."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import pytest

from attribution.prompts.knowledge import Knowledge

__all__ = [
    "OWN_PROMPTS",
    "chosen_categories",
    "is_gated",
    "is_worker",
    "keep",
    "keep_terminal",
    "kept_by",
    "terminal",
]


OWN_PROMPTS: pytest.StashKey[Knowledge] = pytest.StashKey()
_KEPT: pytest.StashKey[dict[str, dict[str, Any]]] = pytest.StashKey()
# What a worker sends it by.
_SENT = "attribution_kept"
_TERMINAL: pytest.StashKey[TextIO] = pytest.StashKey()


def keep_terminal(config: pytest.Config) -> None:
    """Keep standard error for :func:`terminal`, at a time when pytest does not capture it."""
    try:
        descriptor = os.dup(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2)
    except OSError:
        return
    # Closed with the process or with the run, whichever ends first.
    stream = config.stash[_TERMINAL] = open(descriptor, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    config.add_cleanup(stream.close)


def terminal(config: pytest.Config) -> TextIO | None:
    """Return standard error as it was before pytest captured it, also that of a worker; ``None`` if there is none."""
    return config.stash.get(_TERMINAL, None)


def keep(config: pytest.Config, model: str, facts: Mapping[str, Any]) -> None:
    """Keep what a bench has found out about a model, by name, for :func:`kept_by`; a worker sends it on."""
    sent: dict[str, Any] | None = getattr(config, "workeroutput", None)
    kept = kept_by(config) if sent is None else sent.setdefault(_SENT, {})
    kept[model] = dict(facts)


def kept_by(process: Any) -> dict[str, dict[str, Any]]:
    """Return what was kept by the process that writes, given its config, or by a worker, given its node: by model."""
    if isinstance(process, pytest.Config):
        return process.stash.setdefault(_KEPT, {})
    found: dict[str, dict[str, Any]] = getattr(process, "workeroutput", {}).get(_SENT, {})
    return found


def origin_of(config: pytest.Config, name: str) -> str:
    """Return in brackets where an option was given: the command line, the environment, or a file of settings."""
    option = f"--attribution-{name}"

    def says(arguments: Iterable[str]) -> bool:
        return any(each == option or each.startswith(f"{option}=") for each in arguments)

    value = getattr(config.option, f"attribution_{name}")
    if value is None:
        return " (by default)"
    shown = f"{option}={value}" if value else option
    if says(map(str, config.invocation_params.args)):
        return f" ({shown} on the command line)"
    if says(shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))):
        return f" ({shown} in PYTEST_ADDOPTS)"
    return f" ({shown} in {config.inipath.name if config.inipath else 'the settings'})"


def is_worker(config: pytest.Config) -> bool:
    """Say whether this process is a worker of a distributed run."""
    return hasattr(config, "workerinput")


def is_gated(config: pytest.Config) -> bool:
    """Say whether the run is saved or compared."""
    return config.option.attribution_save is not None or config.option.attribution_compare is not None


def chosen_categories(config: pytest.Config) -> list[str]:
    """Return the categories whose prompts are used."""
    from attribution.prompts.knowledge import CATEGORIES

    own = config.stash.get(OWN_PROMPTS, None)
    if own is not None:
        return list(own.words)
    return list(config.hook.pytest_attribution_categories(config=config) or CATEGORIES)
