"""This suite's choice of models and categories; the plugin in ``attribution/plugin.py`` does the rest."""

from __future__ import annotations

from attribution.knowledge import CATEGORIES
from attribution.registry import registry


def pytest_attribution_models() -> list[str]:
    """Every model the registry knows; those that need the network run only when ``-m`` names their marker."""
    return list(registry())


def pytest_attribution_categories() -> tuple[str, ...]:
    """All six kinds of knowledge."""
    return CATEGORIES
