"""The pytest plugin: markers, options, model fixtures and the table of verdicts. It only wires.

torch and nnsight are imported inside fixtures, so that a test run which uses none of them pays nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from attribution.errors import AttributionError
from attribution.registry import Entry, registry

if TYPE_CHECKING:
    from attribution.claims import Verdict
    from attribution.workbench import Workbench

__all__: list[str] = []

CLAIM_MARKERS = {
    "identity": "an equality that must hold up to rounding",
    "superiority": "a method does better than a baseline",
    "deletion": "ablating value neurons removes the answer",
    "equivalence": "an intervention has no effect, within a stated margin",
    "knowledge": "a model knows facts of a category",
}
_VERDICT = "attribution_verdict"


class PluginHooks:
    """Hooks that a suite's conftest.py may implement to choose what runs."""

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_models(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the names of models that tests using ``attribution_model`` run on; all registered by default."""

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_categories(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the knowledge categories whose prompts are used; all by default."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(PluginHooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attribution", "claims about single neurons")
    group.addoption(
        "--models-dir",
        metavar="DIR",
        default=None,
        help="folder of model folders (DIR/gpt2 and so on), used instead of the hub; write --models-dir=DIR, with the "
        "equals sign, or pytest takes DIR for a path of tests; also ATTRIBUTION_MODELS",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in dict.fromkeys(entry.marker for entry in registry().values()):
        names = ", ".join(name for name, entry in registry().items() if entry.marker == marker)
        config.addinivalue_line("markers", f"{marker}: claims about {names}")
    for marker, meaning in CLAIM_MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")
    config.pluginmanager.register(_VerdictTable(), "attribution-verdict-table")


def _chosen_models(config: pytest.Config) -> list[Entry]:
    names = config.hook.pytest_attribution_models(config=config) or list(registry())
    return [registry()[name] for name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attribution_model" in metafunc.fixturenames:
        parameters = [
            pytest.param(entry.name, id=entry.name.replace(":", "-"), marks=getattr(pytest.mark, entry.marker))
            for entry in _chosen_models(metafunc.config)
        ]
        metafunc.parametrize("attribution_model", parameters, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out models that need the network, unless ``-m`` names them: plain pytest needs none."""
    asked = set(re.findall(r"\w+", config.option.markexpr or ""))
    elsewhere = {entry.marker for entry in registry().values() if not entry.bundled} - asked
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in elsewhere)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def attribution_model(request: pytest.FixtureRequest) -> Workbench:
    """One model of the suite with its knowledge prompts; one that cannot be loaded or trusted is an error."""
    from attribution.checks import preflight
    from attribution.knowledge import CATEGORIES, load_knowledge
    from attribution.model import load
    from attribution.workbench import Workbench

    config = request.config
    categories = config.hook.pytest_attribution_categories(config=config) or CATEGORIES
    problem = ""
    try:
        model = load(request.param, models_dir=config.getoption("--models-dir"))
        preflight(model)
    except AttributionError as error:
        problem = str(error)
    if problem:
        # A run that was asked for this model can say nothing without it: one error, not one per test.
        request.session.shouldfail = problem
        pytest.fail(problem, pytrace=False)
    # One progress bar at a time is readable; under xdist there would be one per worker.
    progress = sys.stderr.isatty() and not hasattr(config, "workerinput")
    return Workbench(model, load_knowledge(categories=categories), progress=progress)


@pytest.fixture
def assert_claim(record_property: Callable[[str, object], None]) -> Callable[[Verdict], None]:
    """Return a function that records a verdict for the final table and fails unless it is ``supported``.

    A claim that the registry records as not holding for the model is an expected failure while its verdict is the
    recorded one.
    """
    from attribution.report import verdict_row

    def check(verdict: Verdict) -> None:
        __tracebackhide__ = True
        entry = registry().get(verdict.model)
        recorded = entry.not_supported.get(verdict.claim.id) if entry else None
        record_property(_VERDICT, verdict_row(verdict, recorded))
        if recorded == verdict.status.value:
            pytest.xfail(f"as recorded in the registry: {verdict.sentence()}")
        if recorded is not None:
            pytest.fail(f"the registry records {recorded!r}, correct it there: {verdict.sentence()}", pytrace=False)
        if verdict.status.value != "supported":
            pytest.fail(verdict.sentence(), pytrace=False)

    return check


class _VerdictTable:
    """Collects verdicts from the reports of tests, in the order they come in, and prints them at the end."""

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._rows += [value for name, value in report.user_properties if name == _VERDICT]  # type: ignore[misc]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._rows:
            return
        from attribution.report import verdict_table

        terminalreporter.section("attribution: claims and verdicts")
        terminalreporter.write_line(verdict_table(self._rows))
