"""The pytest plugin: markers, options, model fixtures and the table of verdicts. It only wires.

torch and nnsight are imported inside fixtures, so that a test run which uses none of them pays nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attribution.errors import AttributionError
from attribution.registry import Entry, entry_of, registry

if TYPE_CHECKING:
    from attribution.baselines import Baseline, ModelFacts
    from attribution.claims import Verdict
    from attribution.exhibits import Exhibit
    from attribution.knowledge import Knowledge
    from attribution.workbench import Workbench

__all__: list[str] = []

CLAIM_MARKERS = {
    "identity": "an equality that must hold up to rounding",
    "superiority": "a method does better than a baseline",
    "deletion": "ablating neurons removes the answer",
    "equivalence": "an intervention has no effect, within a stated margin",
    "specificity": "ablating neurons hurts what they are for, and not other things",
    "prediction": "scores predict the effect of ablating single neurons",
    "sufficiency": "the best neurons alone keep the answer",
    "sanity": "a scorer that is broken on purpose loses its effect",
    "planted": "neurons that were made to write an answer are found",
    "reported": "measured and shown, not asserted",
    "knowledge": "a model knows facts of a category",
}
_VERDICT = "attribution_verdict"
_MEASURED = "attribution_measured"
_EXHIBIT = "attribution_exhibit"
_RECORDED = pytest.StashKey[set[tuple[str, object]]]()
_FACTS = pytest.StashKey[dict[str, "ModelFacts"]]()
_OWN_PROMPTS: pytest.StashKey[Knowledge] = pytest.StashKey()


class PluginHooks:
    """Hooks that a suite's conftest.py may implement to choose what runs."""

    @pytest.hookspec(firstresult=True)
    def pytest_attribution_models(self, config: pytest.Config) -> Sequence[str] | None:
        """Return the names of models that tests using ``attribution_model`` run on; all registered by default."""

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


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(PluginHooks)


SAVE, COMPARE = "--attribution-save", "--attribution-compare"
REPORT = "--attribution-report"


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of prompts; give 1 or more")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attribution", "claims about single neurons")
    group.addoption(
        "--models-dir",
        metavar="DIR",
        default=None,
        help="folder of model folders (DIR/gpt2 and so on), used instead of the hub; write --models-dir=DIR, with the "
        "equals sign, or pytest takes DIR for a path of tests; also ATTRIBUTION_MODELS",
    )

    group.addoption(
        "--model",
        metavar="NAME",
        action="append",
        default=None,
        help="a registered name, a hub id or a folder to run the claims on, instead of the suite's models; repeatable",
    )
    group.addoption(
        "--max-prompts",
        metavar="N",
        type=_number,
        default=None,
        help="judge methods on at most N prompts of each model, always the same ones; all by default",
    )
    group.addoption(
        "--prompts",
        metavar="FILE",
        default=None,
        help="a CSV, JSONL or TOML file of prompts, with the categories it names, to run the claims on instead of the "
        "bundled ones; write --prompts=FILE, with the equals sign",
    )
    group.addoption(
        SAVE, metavar="NAME", default=None, help="store what this run measures as the baseline .attribution/NAME.json"
    )
    group.addoption("--attribution-update", action="store_true", help="let --attribution-save replace a baseline")
    group.addoption(
        COMPARE,
        metavar="NAME",
        nargs="?",
        const="",
        default=None,
        help="fail on what is worse than in a baseline, and if the run is not comparable with it; NAME may be left out "
        "where there is one baseline, and needs the equals sign",
    )
    group.addoption(
        "--attribution-fail",
        metavar="WHAT",
        default=None,
        help="what turns a run red, separated by commas: verdicts (asserted claims that are not supported), "
        "regressions (worse than the baseline), or regressions:X (by more than X in the unit of the claim); by default "
        "verdicts, and regressions with --attribution-compare",
    )
    group.addoption(
        "--attribution-allow",
        metavar="WHAT",
        default=None,
        help="what a run may differ in from its baseline, separated by commas: dtype, device",
    )
    group.addoption(
        REPORT,
        metavar="DIR",
        default=None,
        help="write a page, a Markdown summary, CSV and JSON of what this run measures to a folder; write "
        "--attribution-report=DIR, with the equals sign",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Keep argparse from taking the path that follows an option without "=" for the name of a baseline."""
    if SAVE in args:
        raise pytest.UsageError(f"{SAVE} came without a name; write {SAVE}=NAME, with the equals sign.")
    if COMPARE in args:
        args[:] = [f"{COMPARE}=" if each == COMPARE else each for each in args]
        # Read already, to find the conftest.py files of the paths.
        early_config.known_args_namespace.file_or_dir = parser.parse_known_args(args).file_or_dir


def pytest_configure(config: pytest.Config) -> None:
    for marker in dict.fromkeys(entry.marker for entry in registry().values()):
        names = ", ".join(name for name, entry in registry().items() if entry.marker == marker)
        config.addinivalue_line("markers", f"{marker}: claims about {names}")
    for marker, meaning in CLAIM_MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")
    config.pluginmanager.register(_VerdictTable(), "attribution-verdict-table")
    # As with the gate below: workers report to the one process that writes.
    if config.getoption(REPORT) is not None and not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(_Report(config.getoption(REPORT)), "attribution-report")
    file: str | None = config.getoption("--prompts")
    if file is not None:
        from attribution.prompt_files import load_prompts

        try:
            config.stash[_OWN_PROMPTS] = load_prompts(Path(file))
        except AttributionError as error:
            raise pytest.UsageError(str(error)) from None
    given = [config.getoption(name) for name in (SAVE, COMPARE, "--attribution-fail", "--attribution-allow")]
    asked = config.getoption("--attribution-update") or any(each is not None for each in given)
    # Workers of a distributed run report to the one process that compares and writes.
    if asked and not hasattr(config, "workerinput") and not config.option.collectonly:
        try:
            config.pluginmanager.register(_Gate(config), "attribution-gate")
        except AttributionError as error:
            raise pytest.UsageError(str(error)) from None


def _gated(config: pytest.Config) -> bool:
    """Say whether the run is saved or compared."""
    return config.getoption(SAVE) is not None or config.getoption(COMPARE) is not None


def pytest_report_header(config: pytest.Config) -> list[str]:
    own = config.stash.get(_OWN_PROMPTS, None)
    if own is None:
        return []
    facts = len({prompt.fact for prompt in own.prompts})
    what = f"{len(own.prompts)} prompts of {facts} facts in {', '.join(own.words)}"
    return [f"prompts: {config.getoption('--prompts')}, {what}"]


def _chosen_categories(config: pytest.Config) -> list[str]:
    from attribution.knowledge import CATEGORIES

    own = config.stash.get(_OWN_PROMPTS, None)
    if own is not None:
        return list(own.words)
    return list(config.hook.pytest_attribution_categories(config=config) or CATEGORIES)


def _chosen_models(config: pytest.Config) -> list[Entry]:
    named = config.getoption("--model")
    if named:
        # Asked for by name: no marker has to select them.
        return [replace(entry_of(name), marker="") for name in named]
    names = config.hook.pytest_attribution_models(config=config) or list(registry())
    return [entry_of(name) for name in names]


def _id_of(entry: Entry) -> str:
    return Path(entry.name).name.replace(":", "-")


def _elsewhere(config: pytest.Config) -> set[str]:
    """Return the markers of models that need the network and are not named by ``-m``."""
    asked = set(re.findall(r"\w+", config.option.markexpr or ""))
    return {entry.marker for entry in registry().values() if not entry.bundled} - asked


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist=loadfile``, give all claims about one model to one worker: they share what was measured."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    left_out = _elsewhere(config)
    ids = sorted((_id_of(entry) for entry in _chosen_models(config) if entry.marker not in left_out), key=len)

    class ByModel(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            parameters = nodeid.partition("[")[2]
            found = [each for each in ids if parameters.startswith((f"{each}-", f"{each}]"))]
            return found[-1] if found else super()._split_scope(nodeid)

    return ByModel(config, log)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attribution_model" in metafunc.fixturenames:
        parameters = [
            pytest.param(
                entry.name,
                id=_id_of(entry),
                marks=getattr(pytest.mark, entry.marker) if entry.marker else (),
            )
            for entry in _chosen_models(metafunc.config)
        ]
        metafunc.parametrize("attribution_model", parameters, indirect=True, scope="session")
    if "attribution_method" in metafunc.fixturenames:
        from attribution.suite.common import judged_methods

        names = metafunc.config.hook.pytest_attribution_methods(config=metafunc.config) or judged_methods()
        metafunc.parametrize("attribution_method", names, scope="session")
    if "attribution_category" in metafunc.fixturenames:
        metafunc.parametrize("attribution_category", _chosen_categories(metafunc.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out models that need the network, unless ``-m`` names them: plain pytest needs none."""
    elsewhere = _elsewhere(config)
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in elsewhere)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def _attribution_threads(request: pytest.FixtureRequest) -> None:
    """Share the cores among workers: threads that wait for each other on the same ones cost far more than they save."""
    worker: dict[str, Any] | None = getattr(request.config, "workerinput", None)
    if worker is not None:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // worker["workercount"]))


@pytest.fixture(scope="session")
def attribution_model(request: pytest.FixtureRequest, _attribution_threads: None) -> Workbench:
    """One model of the suite with its knowledge prompts; one that cannot be loaded or trusted is an error."""
    from attribution.checks import preflight
    from attribution.knowledge import load_knowledge
    from attribution.model import load
    from attribution.workbench import Workbench

    config = request.config
    problem = ""
    try:
        model = load(request.param, models_dir=config.getoption("--models-dir"))
        preflight(model)
    except AttributionError as error:
        problem = str(error)
    if problem:
        # A run that was asked for this model can say nothing without it: one error, not one per test.
        request.session.shouldfail = f"model {request.param!r} cannot be used"
        pytest.fail(problem, pytrace=False)
    # One progress bar at a time is readable; under xdist there would be one per worker.
    progress = sys.stderr.isatty() and not hasattr(config, "workerinput")
    if _gated(config):
        from attribution.baselines import facts_of

        config.stash.setdefault(_FACTS, {})[model.name] = facts_of(model)
    knowledge = config.stash.get(_OWN_PROMPTS, None) or load_knowledge(categories=_chosen_categories(config))
    return Workbench(model, knowledge, max_prompts=config.getoption("--max-prompts"), progress=progress)


@pytest.fixture
def assert_claim(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[Verdict], None]:
    """Return a function that records a verdict for the table and the gate, and fails unless it is ``supported``.

    A claim that the registry records as not holding for the model is an expected failure while its verdict is the
    recorded one. So is every other, if --attribution-fail leaves verdicts out.
    """
    from attribution.gate import Policy
    from attribution.report import verdict_row
    from attribution.suite.common import METHOD

    config = request.config
    policy = Policy.of(config.getoption("--attribution-fail"), comparing=config.getoption(COMPARE) is not None)

    def check(verdict: Verdict) -> None:
        __tracebackhide__ = True
        claim = verdict.claim
        # The registry records what was measured on the bundled prompts.
        known = claim.method in ("", METHOD) and _OWN_PROMPTS not in config.stash
        recorded = entry_of(verdict.model).not_supported.get(claim.id) if known else None
        if claim.gated and _gated(config):
            _record_for_the_gate(config, verdict, record_property)
        record_property(_VERDICT, verdict_row(verdict, recorded))
        if not claim.asserted:
            return
        status, sentence = verdict.status.value, verdict.sentence()
        if recorded == status:
            pytest.xfail(f"as recorded in the registry: {sentence}")
        if recorded is not None:
            sentence = f"the registry records {recorded!r}, correct it there: {sentence}"
        elif status == "supported":
            return
        if not policy.verdicts:
            pytest.xfail(f"--attribution-fail leaves verdicts out: {sentence}")
        pytest.fail(sentence, pytrace=False)

    return check


def _record_for_the_gate(
    config: pytest.Config, verdict: Verdict, record_property: Callable[[str, object], None]
) -> None:
    from attribution.baselines import record_of

    __tracebackhide__ = True
    facts = config.stash.get(_FACTS, {}).get(verdict.model)
    if facts is None:
        pytest.fail(
            f"claim {verdict.claim.id!r} is about the model {verdict.model!r}, which the fixture attribution_model did "
            "not load, so no baseline can tell its weights; load it by --model=NAME, or set gated=False.",
            pytrace=False,
        )
    record_property(_MEASURED, {"record": record_of(verdict), "facts": asdict(facts)})


@pytest.fixture
def attribution_exhibit(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[Workbench, Callable[[Workbench], Exhibit]], None]:
    """Return a function that measures an exhibit and records it for the report, once for each model.

    Without a report it does nothing.
    """
    config = request.config
    recorded = config.stash.setdefault(_RECORDED, set())

    def record(bench: Workbench, measure: Callable[[Workbench], Exhibit]) -> None:
        which = bench.model.name, measure
        if config.getoption(REPORT) is not None and which not in recorded:
            recorded.add(which)
            record_property(_EXHIBIT, asdict(measure(bench)))

    return record


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


class _Report:
    """Gathers verdicts and exhibits from the reports of tests; writes them as a page at the end."""

    def __init__(self, folder: str) -> None:
        self._shown = Path(folder)
        # A test may change the working directory.
        self._folder = self._shown.absolute()
        try:
            if not folder:
                raise FileNotFoundError("no folder is named")
            self._folder.mkdir(parents=True, exist_ok=True)
            # One that exists may still take no files.
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise pytest.UsageError(f"{REPORT}={folder} cannot be written ({error}); name a folder that can.") from None
        self._rows: list[dict[str, str]] = []
        self._exhibits: dict[tuple[str, str], Exhibit] = {}
        self._line = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        from attribution.exhibits import Exhibit

        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == _VERDICT:
                self._rows.append(value)  # type: ignore[arg-type]
            elif name == _EXHIBIT:
                exhibit = Exhibit.of_json(value)  # type: ignore[arg-type]
                # Each worker that came to it sent one.
                self._exhibits.setdefault((exhibit.name, exhibit.model), exhibit)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from attribution.report_page import run_header, write_report

        exhibits = list(self._exhibits.values())
        try:
            write_report(self._folder, self._rows, exhibits, run_header(self._rows, exhibits))
        except OSError as error:
            self._line = f"report: not written ({error})"
            if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        else:
            self._line = f"report: {self._shown / 'index.html'}"

    # Below the tables, where it is seen.
    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(self._line)


class _Gate:
    """Gathers what was measured from the reports of tests; compares and saves it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        from attribution.gate import ALLOWABLE, Policy, words_of
        from attribution.storage import FOLDER, baseline_named, path_of, read

        self._folder = config.rootpath / FOLDER
        self._save: str | None = config.getoption(SAVE)
        self._update: bool = config.getoption("--attribution-update")
        compared: str | None = config.getoption(COMPARE)
        self._policy = Policy.of(config.getoption("--attribution-fail"), comparing=compared is not None)
        self._allow = words_of("--attribution-allow", config.getoption("--attribution-allow"), ALLOWABLE)
        if self._allow and compared is None:
            raise pytest.UsageError(f"--attribution-allow is about a comparison; add {COMPARE}, or leave it out.")
        if self._update and self._save is None:
            raise pytest.UsageError(f"--attribution-update has nothing to write; add {SAVE}=NAME, or leave it out.")
        # Whatever can be refused now need not wait until all is measured.
        self._name: str = "" if compared is None else baseline_named(self._folder, compared)
        self._baseline: Baseline | None = None if compared is None else read(self._folder, self._name)
        if self._save is not None and path_of(self._folder, self._save).exists() and not self._update:
            raise pytest.UsageError(
                f"baseline {self._save!r} exists; add --attribution-update to replace it, or choose another name."
            )
        self._records: list[dict[str, Any]] = []
        self._facts: dict[str, dict[str, Any]] = {}
        self._broken: list[str] = []
        self._lines: list[str] = []
        self._red: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        recorded = False
        for name, value in report.user_properties:
            recorded |= name == _VERDICT
            if name == _MEASURED and report.when == "call":
                self._records.append(value["record"])  # type: ignore[index]
                self._facts[value["record"]["model"]] = value["facts"]  # type: ignore[index]
        if report.failed and not recorded:
            self._broken.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from attribution.baselines import ModelFacts, baseline_of

        if self._save is None and self._baseline is None:
            return
        try:
            run = baseline_of(self._records, {name: ModelFacts(**facts) for name, facts in self._facts.items()})
            if self._baseline is not None:
                self._compare(self._baseline, run)
            if self._save is not None:
                self._write(self._save, run, session)
        except AttributionError as error:
            self._fail("what was measured makes no baseline", str(error))
        if self._red:
            if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            session.shouldfail = session.shouldfail or f"attribution gate: {', '.join(self._red)}"

    def _fail(self, short: str, sentence: str) -> None:
        self._red.append(short)
        self._lines.append(sentence)

    def _compare(self, before: Baseline, run: Baseline) -> None:
        from attribution.gate import compare

        comparison = compare(before, run, tolerance=self._policy.tolerance, allow=self._allow)
        self._lines += comparison.lines(self._name, before, run)
        if comparison.problems:
            self._red.append(f"not comparable with baseline {self._name!r}")
        worse = len(comparison.of_kind("regressed", asserted=True))
        if worse and self._policy.regressions:
            self._red.append(f"{worse} worse than in baseline {self._name!r}")

    def _write(self, name: str, run: Baseline, session: pytest.Session) -> None:
        from attribution.storage import path_of, save

        short = f"baseline {name!r} was not saved"
        if self._broken:
            self._fail(
                short,
                f"{short}: {len(self._broken)} tests failed before they measured anything, such as {self._broken[0]}; "
                "a baseline needs a whole run.",
            )
            return
        if session.shouldstop or session.shouldfail or session.exitstatus not in (0, 1, 5):
            self._fail(short, f"{short}: the run was cut short; a baseline needs a whole run.")
            return
        try:
            new = save(self._folder, name, run, update=self._update)
        except (AttributionError, OSError) as error:
            self._fail(short, str(error))
            return
        path = path_of(self._folder, name)
        self._lines.append(f"wrote {len(run.verdicts)} claims to {path}")
        if new and not self._update:
            self._fail(
                f"baseline {name!r} is new",
                f"baseline {name!r} is new, and nothing was compared with it: read {path}, commit it, and compare the "
                f"next run by {COMPARE}={name}.",
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._lines:
            terminalreporter.section("attribution: baselines")
            for line in self._lines:
                terminalreporter.write_line(line)
