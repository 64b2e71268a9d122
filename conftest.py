"""This suite's choice of models and categories; the plugin in ``attribution/plugin.py`` does the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from attribution.models.registry import registry
from attribution.prompts.knowledge import CATEGORIES


def pytest_attribution_models() -> list[str]:
    """Every model the registry knows; those that need the network run only when ``-m`` names their marker."""
    return list(registry())


def pytest_attribution_categories() -> tuple[str, ...]:
    """All six kinds of knowledge."""
    return CATEGORIES


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests of the engine alone where ``-m`` is a model's marker: none is about it, and to collect them takes
    longer than all claims about a small one need to begin.
    """
    if config.rootpath / "test_attribution" not in collection_path.parents:
        return None
    return True if config.option.markexpr in {entry.marker for entry in registry().values()} else None
