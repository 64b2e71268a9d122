"""Which models a run of pytest is about, what is said of them before they are loaded, and their fetching.

They are chosen by ``--model``, by ``-m``, by a hook of a conftest.py and by a pyproject.toml.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from attribution.errors import AttributionError
from attribution.models.registry import Entry, entry_of, registry
from attribution.wording import pluralize

__all__ = [
    "DECLARED",
    "asked_words",
    "chosen_models",
    "described",
    "entry_by_id",
    "fetch",
    "id_of",
    "left_out_models",
    "models_of_the_run",
]

DECLARED = pytest.StashKey[list[str]]()
"""Names of the models that a pyproject.toml declares."""
_FETCHED = pytest.StashKey[set[str]]()


def chosen_models(config: pytest.Config) -> list[Entry]:
    """Return the models that tests using ``attribution_model`` are made for."""
    named = config.option.attribution_model
    if named:
        return [entry_of(name) for name in named]
    hooked = config.hook.pytest_attribution_models(config=config)
    return [entry_of(name) for name in hooked or config.stash[DECLARED] or registry()]


def models_of_the_run(config: pytest.Config) -> list[Entry]:
    """Return those of the chosen models of which ``-m`` leaves any claim, of whatever kind."""
    return [entry for entry in chosen_models(config) if _may_run(config.option.markexpr, entry, config)]


def id_of(entry: Entry) -> str:
    """Return what stands for a model in the ids of tests."""
    return Path(entry.name).name.replace(":", "-")


def asked_words(config: pytest.Config) -> set[str]:
    """Return the words of ``-m``."""
    return set(re.findall(r"\w+", config.option.markexpr or ""))


def left_out_models(config: pytest.Config) -> set[str]:
    """Return the names of models that need the network and that nobody named: plain pytest needs none."""
    if config.option.attribution_model:
        return set()
    asked = asked_words(config) | {""}
    return {entry.name for entry in chosen_models(config) if not entry.local and entry.marker not in asked}


def _may_run(expression: str, entry: Entry, config: pytest.Config) -> bool:
    """Say whether ``-m`` leaves any claim about a model, of whatever kind."""
    if entry.name in left_out_models(config):
        return False
    if not expression or not entry.marker:
        return True
    markers = {each.marker for each in registry().values()}

    def value(node: ast.AST) -> bool | None:
        """Return what a part of the expression says; ``None`` where that depends on the kind of claim."""
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Name) and node.id in markers:
            return node.id == entry.marker
        if isinstance(node, ast.UnaryOp):
            inner = value(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.BoolOp):
            decisive = isinstance(node.op, ast.Or)
            values = [value(each) for each in node.values]
            return decisive if decisive in values else None if None in values else not decisive
        return None

    try:
        return value(ast.parse(expression.strip(), mode="eval")) is not False
    except SyntaxError:
        # Names of markers need not be Python's.
        return True


def entry_by_id(nodeid: str, config: pytest.Config) -> Entry | None:
    """Return the model that a test seems to be about by its id, which is all that workers say of it."""
    parameters, unnamed = nodeid.partition("[")[2], left_out_models(config)
    found = [
        entry
        for entry in chosen_models(config)
        if entry.name not in unnamed and parameters.startswith((f"{id_of(entry)}-", f"{id_of(entry)}]"))
    ]
    return max(found, key=lambda entry: len(id_of(entry)), default=None)


def described(entry: Entry, options: Any) -> str:
    """Return a model in words, before it is loaded: from where, which commit, in what type, on what device.

    Args:
        entry: The model.
        options: Those of the run.
    """
    revision = options.attribution_revision or entry.revision
    folder = Path(options.attribution_models_dir or os.environ.get("ATTRIBUTION_MODELS") or "", entry.name)
    words = [entry.name]
    if not entry.bundled and folder.is_dir():
        words += [] if str(folder) == entry.source else [f"from {folder}"]
    elif (entry.local and not entry.bundled and entry.source != entry.name) or entry.parts:
        words.append(f"from {entry.source}")
    elif not entry.local:
        words += [] if entry.source == entry.name else [f"from {entry.source}"]
        words.append(f"at {revision or 'its newest commit'}")
    words += _quantised(entry)
    words.append(f"in {options.attribution_dtype or entry.dtype} on {options.attribution_device or 'cpu'}")
    return " ".join(words)


def _quantised(entry: Entry) -> list[str]:
    """Return how a model's weights are quantised, in brackets, if it is a GGUF file."""
    file = Path(entry.source)
    if not entry.parts and not (file.suffix == ".gguf" and file.is_file()):
        return []
    from attribution.models.gguf import described as quantisation

    return [f"({quantisation(file, sha256=entry.sha256) or 'not quantised'})"]


def fetch(models: Mapping[str, int], config: pytest.Config) -> None:
    """Fetch models, each with the number of tests that are about it; what was fetched already is passed over.

    Raises:
        pytest.UsageError: If one cannot be had.
    """
    options, fetched = config.option, config.stash.setdefault(_FETCHED, set())
    for name, tests in models.items():
        if entry_of(name).bundled or name in fetched:
            continue
        from attribution.models.loading import locate

        fetched.add(name)
        # pytest would keep the hub's progress bar to itself.
        capture = config.pluginmanager.getplugin("capturemanager")
        try:
            with nullcontext() if capture is None else capture.global_and_fixture_disabled():
                locate(
                    name,
                    revision=options.attribution_revision,
                    models_dir=options.attribution_models_dir,
                    allow_pickle=bool(options.attribution_allow_pickle),
                )
        except AttributionError as error:
            raise pytest.UsageError(f"{error} {pluralize(tests, 'test waits', 'tests wait')} for it.") from None
