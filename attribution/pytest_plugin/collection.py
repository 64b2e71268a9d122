"""Which tests are collected, for which models, and on which worker they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest

from attribution.models.registry import registry
from attribution.pytest_plugin.chosen_models import chosen_models, entry_by_id, fetch, id_of, left_out_models
from attribution.pytest_plugin.session import chosen_categories, is_worker

__all__ = [
    "ABOUT_MODELS",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_generate_tests",
    "pytest_xdist_make_scheduler",
    "pytest_xdist_node_collection_finished",
]


ABOUT_MODELS = "about_models"
"""Marker of tests about some registered models alone."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist=loadfile``, give all claims about one model to one worker: they share what was measured."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByModel(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            entry = entry_by_id(nodeid, config)
            return super()._split_scope(nodeid) if entry is None else entry.name

    return ByModel(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the tests are about before the first one runs; what cannot be had ends the run in one line."""
    if not is_worker(session.config) and not session.config.option.collectonly:
        fetch(Counter(name for name in map(_model_of, session.items) if name), session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Do the same where workers run the tests: once, and with one progress bar."""
    config: pytest.Config = node.config
    found = Counter[str]()
    for file, tests in groupby(ids, key=lambda nodeid: nodeid.partition("::")[0]):
        # Somebody's own test may have a parameter that is called as a model.
        path = config.rootpath / file
        if not path.is_file() or "attribution_" in path.read_text(encoding="utf-8", errors="replace"):
            found.update(entry.name for entry in (entry_by_id(nodeid, config) for nodeid in tests) if entry)
    fetch(found, config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each model, method and category that it asks for."""
    if "attribution_model" in metafunc.fixturenames:
        parameters = [
            pytest.param(
                entry.name,
                id=id_of(entry),
                marks=getattr(pytest.mark, entry.marker) if entry.marker else (),
            )
            for entry in chosen_models(metafunc.config)
        ]
        metafunc.parametrize("attribution_model", parameters, indirect=True, scope="session")
    if "attribution_method" in metafunc.fixturenames:
        from attribution.claims.about_methods.common import judged_methods

        names = metafunc.config.hook.pytest_attribution_methods(config=metafunc.config) or judged_methods()
        metafunc.parametrize("attribution_method", names, scope="session")
    if "attribution_category" in metafunc.fixturenames:
        metafunc.parametrize("attribution_category", chosen_categories(metafunc.config))


def _model_of(item: pytest.Item) -> str | None:
    """Return the name of the model that a test is about."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("attribution_model")


def _about_another_model(item: pytest.Item) -> bool:
    """Say whether a test is marked as being about other models than the one that it would run on."""
    marker = item.get_closest_marker(ABOUT_MODELS)
    if marker is None:
        return False
    runs_on = _model_of(item)
    if runs_on is None or not marker.args or not set(marker.args) <= set(registry()):
        raise pytest.UsageError(
            f"{item.nodeid} is marked {ABOUT_MODELS}{marker.args}; use attribution_model in it, and name models of: "
            f"{', '.join(registry())}."
        )
    return all(runs_on not in (name, registry()[name].source) for name in marker.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out models that need the network, unless ``-m`` or ``--model`` names them: plain pytest needs none."""
    names = left_out_models(config)
    left_out = [item for item in items if _model_of(item) in names or _about_another_model(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
