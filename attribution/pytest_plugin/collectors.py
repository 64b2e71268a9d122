"""What gathers verdicts while pytest runs: the table, the report and the gate, each written when the run ends.

Plugins of the one process that writes. Workers of a distributed run send what they measured with the reports of tests.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from attribution.errors import AttributionError
from attribution.pytest_plugin.chosen_models import models_of_the_run
from attribution.pytest_plugin.outcome import fail_run, report_as_test
from attribution.pytest_plugin.recorded import EXHIBIT, MEASURED, VERDICT, LastAttempts, recorded_on
from attribution.pytest_plugin.session import kept_by, origin_of
from attribution.wording import pluralize

if TYPE_CHECKING:
    from attribution.claims.exhibits import Exhibit
    from attribution.gate.stored_run import StoredRun

__all__ = [
    "COMPARE",
    "GATE",
    "REPORT",
    "SAVE",
    "Gate",
    "Report",
    "VerdictTable",
]

SAVE, COMPARE = "--attribution-save", "--attribution-compare"
REPORT = "--attribution-report"
GATE = "attribution-gate"


def _known(config: pytest.Config) -> list[str]:
    """Return what each model knows, in words."""
    return [facts["knows"] for _, facts in sorted(kept_by(config).items()) if facts["knows"]]


class VerdictTable:
    """Collects verdicts from the reports of tests, in the order they come in, and prints them at the end."""

    def __init__(self) -> None:
        self._recorded = LastAttempts()

    # Known only where pytest-xdist is.
    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        kept_by(node.config).update(kept_by(node))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._recorded.add(report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        rows, loaded = self._recorded.of(VERDICT), self._recorded.loaded
        if not rows:
            return
        from attribution.report.verdicts import longest_lines, verdict_table

        kept = kept_by(terminalreporter.config)
        terminalreporter.section("attribution: claims and verdicts")
        lines = [*(loaded[name] for name in sorted(loaded)), *_known(terminalreporter.config)]
        lines += [""] if lines else []
        lines.append(verdict_table(rows).lstrip("\n"))
        lines += [self._recorded.repeated] if self._recorded.repeated else []
        for line in [*lines, *longest_lines({model: facts["spent"] for model, facts in kept.items()})]:
            terminalreporter.write_line(line)


class Report:
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
        self._recorded = LastAttempts()
        self._exhibits: dict[tuple[str, str], Exhibit] = {}
        self._line = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        from attribution.claims.exhibits import Exhibit

        self._recorded.add(report)
        for name, value in recorded_on(report):
            if name == EXHIBIT:
                exhibit = Exhibit.of_json(value)
                # Each worker that came to it sent one, and so does each attempt.
                self._exhibits.setdefault((exhibit.name, exhibit.model), exhibit)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from attribution.report.run_page import run_header, write_report

        rows, exhibits = self._recorded.of(VERDICT), list(self._exhibits.values())
        try:
            header = run_header(rows, exhibits, self._recorded.loaded, _known(session.config), self._recorded.repeated)
            write_report(self._folder, rows, exhibits, header)
        except OSError as error:
            self._line = f"report: not written ({error})"
            fail_run(session)
        else:
            self._line = f"report: {self._shown / 'index.html'}"

    # Below the tables, where it is seen.
    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(self._line)


class Gate:
    """Gathers what was measured from the reports of tests; compares and saves it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        from attribution.gate.storage import FOLDER, path_of, read, stored_run_named
        from attribution.pytest_plugin.policy import policy_of

        self._folder = config.rootpath / FOLDER
        self._save: str | None = config.option.attribution_save
        self._update: bool = bool(config.option.attribution_update)
        compared: str | None = config.option.attribution_compare
        self._policy = policy_of(config)
        if self._update and self._save is None:
            raise pytest.UsageError(f"--attribution-update has nothing to write; add {SAVE}=NAME, or leave it out.")
        models = [entry.name for entry in models_of_the_run(config)]
        # Whatever can be refused now need not wait until all is measured.
        self._name: str = "" if compared is None else stored_run_named(self._folder, compared, models)
        self._stored_run: StoredRun | None = None if compared is None else read(self._folder, self._name)
        self._terms = [] if self._stored_run is None else self._described(config, path_of(self._folder, self._name))
        if self._save is not None and path_of(self._folder, self._save).exists() and not self._update:
            raise pytest.UsageError(
                f"stored run {self._save!r} exists; add --attribution-update to replace it, or choose another name."
            )
        self._recorded = LastAttempts()
        self._broken: list[str] = []
        self._lines: list[str] = []
        self._red: list[str] = []

    def _described(self, config: pytest.Config, path: Path) -> list[str]:
        """Return what is compared with, and what turns the run red, with where each was said."""
        assert self._stored_run is not None
        policy, checksum = self._policy, hashlib.sha256(path.read_bytes()).hexdigest()
        words = [word for word in ("verdicts", "regressions") if getattr(policy, word)]
        allowed = f"may differ in {', '.join(policy.allow)}{origin_of(config, 'allow')}; " if policy.allow else ""
        return [
            f"compared with {path}, sha256:{checksum[:16]}, of {self._stored_run.made}{origin_of(config, 'compare')}",
            f"{allowed}red: {' and '.join(words) or 'nothing'}{origin_of(config, 'fail')}, losses beyond "
            f"{policy.tolerance:g} in the unit of a claim",
        ]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._recorded.add(report)
        if report.failed and not any(name == VERDICT for name, _ in recorded_on(report)):
            self._broken.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from attribution.gate.stored_run import stored_run_of
        from attribution.models.fingerprint import ModelFacts
        from attribution.pytest_plugin.policy import REPEATS

        if self._save is None and self._stored_run is None:
            return
        measured = self._recorded.of(MEASURED)
        facts = {each["record"]["model"]: ModelFacts(**each["facts"]) for each in measured}
        binding = {
            (row["model"], row["method"], row["claim"]): bool(row["asserted"]) for row in self._recorded.of(VERDICT)
        }
        if self._recorded.repeated and REPEATS not in self._policy.allow:
            self._fail(
                "claims were measured again after they failed",
                f"{self._recorded.repeated} A claim that is tried until it holds says nothing; run without repeats, or "
                f"add --attribution-allow={REPEATS}.",
            )
        try:
            run = stored_run_of([each["record"] for each in measured], facts, binding)
            if self._stored_run is not None:
                self._compare(self._stored_run, run)
            if self._save is not None and self._red:
                self._lines.append(f"stored run {self._save!r} was not written: this run is red.")
                if self._stored_run is not None:
                    self._lines[-1] += (
                        f" To accept what it lost, store it in a run of its own: {SAVE}={self._save} "
                        f"--attribution-update, without {COMPARE}."
                    )
            elif self._save is not None:
                self._write(self._save, run, session)
        except AttributionError as error:
            self._fail("what was measured makes no stored run", str(error))
        reason = ", ".join(self._red)
        report_as_test(session, "attribution::gate", reason, "\n".join(self._lines))
        if self._red:
            fail_run(session, f"attribution gate: {reason}")

    def _fail(self, short: str, sentence: str) -> None:
        self._red.append(short)
        self._lines.append(sentence)

    def _compare(self, before: StoredRun, run: StoredRun) -> None:
        from attribution.gate.comparison import compare
        from attribution.report.comparison_text import comparison_lines

        comparison = compare(before, run, tolerance=self._policy.tolerance, allow=self._policy.allow)
        self._lines += self._terms
        self._lines += comparison_lines(comparison, self._name, before, run)
        if comparison.problems:
            self._red.append(f"not comparable with stored run {self._name!r}")
        worse = len(comparison.of_kind("regressed", asserted=True))
        if worse and self._policy.regressions:
            self._red.append(f"{worse} worse than in stored run {self._name!r}")

    def _write(self, name: str, run: StoredRun, session: pytest.Session) -> None:
        from attribution.gate.storage import path_of, save

        short = f"stored run {name!r} was not saved"
        if self._broken:
            self._fail(
                short,
                f"{short}: {pluralize(len(self._broken), 'test')} failed before anything was measured, such as "
                f"{self._broken[0]}; a stored run needs a whole run.",
            )
            return
        if session.shouldstop or session.shouldfail or session.exitstatus not in (0, 1, 5):
            self._fail(short, f"{short}: the run was cut short; a stored run needs a whole run.")
            return
        try:
            new = save(self._folder, name, run, update=self._update)
        except (AttributionError, OSError) as error:
            self._fail(short, str(error))
            return
        path = path_of(self._folder, name)
        self._lines.append(f"wrote {pluralize(len(run.verdicts), 'claim')} to {path}")
        if new and not self._update:
            self._fail(
                f"stored run {name!r} is new",
                f"stored run {name!r} is new, and nothing was compared with it: read {path}, commit it, and compare "
                f"the next run by {COMPARE}={name}.",
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._lines:
            terminalreporter.section("attribution: comparison")
            for line in self._lines:
                terminalreporter.write_line(line)
