"""Hooks that a suite's conftest.py may implement to choose what runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

__all__ = ["PluginHooks"]


class PluginHooks:
    """Hooks that a suite's conftest.py may implement to choose what runs."""

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_models(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the names of models that tests using ``attribution_model`` run on.

        By default those that ``[tool.attribution.models]`` of pyproject.toml declares, or all registered ones.
        """

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_methods(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the methods that tests using ``attribution_method`` judge; by default the paper's, and every
        registered one that does not come with the package.
        """

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_categories(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the knowledge categories whose prompts are used, and that tests using ``attribution_category`` run on;
        all by default. With --prompts, they are those of the file.
        """
