"""The gate from outside: nested runs of pytest that save a stored run and compare with it."""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import attribution as at
import attribution.claims.about_methods.common
import attribution.claims.bench
import attribution.gate.comparison
import attribution.gate.storage

# Imported here, or each nested run would import them anew.
import attribution.identities.preflight
import attribution.prompts.knowledge
import attribution.report.verdicts
from attribution.resources import fixtures_folder

pytest_plugins = ["pytester"]

# Claims whose effects stand in a file beside the tests, so that a later run can measure something else.
SUITE = """
import json
from pathlib import Path
import pytest
from attribution.claims.judge import Claim, judge

MEASURED = json.loads((Path(__file__).parent / "measured.json").read_text())

@pytest.mark.parametrize("id", MEASURED)
def test_claim(attribution_model, assert_claim, id):
    how = {"shift": 0.0, "asserted": True, "gated": True, "n": 20} | MEASURED[id]
    if how.get("broken"):
        raise RuntimeError("no measurement")
    claim = Claim(id, "a sentence", "ours", "fall in nats", "above", 0, "none", method="paper",
                  asserted=how["asserted"], gated=how["gated"])
    effects = [how["shift"] + 1 + number / 100 for number in range(how["n"])]
    prompts = [f"city {number:02}" for number in range(how["n"])]
    assert_claim(judge(claim, model=attribution_model.name, effects=effects, facts=prompts, prompts=prompts))

def test_nothing():
    pass
"""


class Suite:
    """A folder with claims, a tiny model and a way to run them."""

    def __init__(self, pytester: pytest.Pytester, models: dict[str, at.Model], environment: pytest.MonkeyPatch) -> None:
        self.pytester = pytester
        self.environment = environment
        self.models = models
        self.model = models["gpt2"]
        self.file = pytester.path / ".attribution" / "main.json"
        pytester.makepyfile(test_suite=SUITE)
        pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error")

    def measure(self, **claims: dict[str, Any]) -> None:
        (self.pytester.path / "measured.json").write_text(json.dumps(claims))

    def run(self, *options: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess("--model=tiny", *options)


@pytest.fixture(scope="module")
def models(loaded: Callable[[str], at.Model]) -> Iterator[dict[str, at.Model]]:
    """Two models of one name, loaded before ``pytester`` starts: it drops what is imported under it."""
    models = {family: replace(loaded(family), name="tiny") for family in ("gpt2", "llama")}
    # Every nested run collects garbage several times, each time through all of torch.
    gc.freeze()
    yield models
    gc.unfreeze()


@pytest.fixture
def suite(models: dict[str, at.Model], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Two claims that hold. The model is loaded once for all runs and not checked: its claims are made up."""
    made = Suite(pytester, models, monkeypatch)
    knowledge = attribution.prompts.knowledge.load_knowledge()
    monkeypatch.setattr("attribution.models.loading.locate", lambda name, **_: None)
    monkeypatch.setattr("attribution.models.loading.load", lambda name, **_: made.model)
    monkeypatch.setattr("attribution.identities.preflight.preflight", lambda model: [])
    monkeypatch.setattr("attribution.prompts.knowledge.load_knowledge", lambda categories: knowledge)
    made.measure(one={}, two={})
    return made


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that run side by side with a thread for each core wait for each other most of the time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def first_stored_run() -> list[bytes]:
    """What the first run that needed a stored run wrote; the others start from it."""
    return []


@pytest.fixture
def saved(suite: Suite, first_stored_run: list[bytes]) -> Suite:
    """The same, with a stored run."""
    if not first_stored_run:
        assert suite.run("--attribution-save=main", "--attribution-update").ret == 0
        first_stored_run.append(suite.file.read_bytes())
    suite.file.parent.mkdir(exist_ok=True)
    suite.file.write_bytes(first_stored_run[0])
    return suite


def _says(result: pytest.RunResult, *parts: str) -> None:
    text = " ".join(result.stdout.str().split())
    for part in parts:
        assert part in text, text


def test_first_run_writes_a_stored_run_and_fails_until_it_is_there(suite: Suite) -> None:
    result = suite.run("--attribution-save=main")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=3, failed=1)
    _says(
        result,
        f"wrote 2 claims to {suite.file}",
        "stored run 'main' is new, and nothing was compared with it: read",
        "attribution gate: stored run 'main' is new",
    )
    compared = suite.run("--attribution-compare=main")
    assert compared.ret == 0
    _says(compared, "2 of 2 claims of stored run 'main'", "2 unchanged, 0 changed")


def test_stored_run_is_replaced_only_by_an_explicit_update(saved: Suite) -> None:
    before = saved.file.read_bytes()
    saved.measure(one={"shift": 0.5}, two={})
    refused = saved.run("--attribution-save=main")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: stored run 'main' exists; add --attribution-update to replace it, *"])
    assert saved.file.read_bytes() == before
    assert saved.run("--attribution-save=main", "--attribution-update").ret == 0
    assert saved.file.read_bytes() != before


def test_run_that_measures_worse_is_red_and_says_what_and_where(saved: Suite) -> None:
    saved.measure(one={"shift": -0.5}, two={})
    result = saved.run("--attribution-compare")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    # Every claim still holds: the gate alone is red.
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["FAILED attribution::gate - 1 worse than in stored run 'main'"])
    _says(
        result,
        "1 unchanged, 0 changed within their intervals, 0 improved, 1 regressed",
        "regressed: 'one' (paper on tiny): fall in nats was 1.095 and is 0.595, worse by 0.5 [0.5, 0.5]; n = 20 "
        "prompts of 20 facts; hurt most: 'city ",
        "to store this run instead: --attribution-save=main --attribution-update",
        "attribution gate: 1 worse than in stored run 'main'",
    )
    assert saved.run("--attribution-compare", "--attribution-fail=verdicts").ret == 0
    assert saved.run("--attribution-compare", "--attribution-fail=regressions:0.6").ret == 0
    assert saved.run("--attribution-compare", "--attribution-fail=regressions:0.4").ret == 1


def test_verdict_that_is_left_out_is_an_expected_failure(suite: Suite) -> None:
    suite.measure(one={"shift": -2}, two={})
    # What does not hold can be a stored run too.
    result = suite.run("--attribution-save=main", "--attribution-update")
    assert result.ret == 1
    result.assert_outcomes(passed=3, failed=1)
    _says(result, "wrote 2 claims")
    assert suite.run("--attribution-compare").ret == 1
    left_out = suite.run("--attribution-compare", "--attribution-fail=regressions")
    assert left_out.ret == 0
    left_out.assert_outcomes(passed=3, xfailed=1)


def test_what_is_only_reported_is_compared_and_does_not_fail(suite: Suite) -> None:
    suite.measure(one={"asserted": False}, two={})
    suite.run("--attribution-save=main")
    suite.measure(one={"asserted": False, "shift": -0.5}, two={})
    result = suite.run("--attribution-compare")
    assert result.ret == 0
    _says(result, "0 regressed, 1 worse but only reported", "worse, only reported: 'one'")


def test_claims_about_what_a_model_knows_take_no_part(suite: Suite) -> None:
    suite.measure(one={}, two={"gated": False})
    _says(suite.run("--attribution-save=main"), "wrote 1 claim to")
    suite.measure(one={}, three={"gated": False})
    assert suite.run("--attribution-compare").ret == 0


@pytest.mark.parametrize(
    ("claims", "options", "why"),
    [
        ({"one": {}, "two": {}}, ("-k", "one"), "the claim 'two' ("),
        ({"one": {}, "two": {}}, ("-k", "nothing"), "each of 2 claims, 'one' ("),
        ({"one": {}, "two": {}}, ("-k", "no_such_test"), "each of 2 claims, 'one' ("),
        ({"one": {}}, (), "was not measured, and the stored run has it; run the whole suite"),
        ({"one": {}, "two": {"broken": True}}, (), "was not measured, and the stored run has it"),
        ({"one": {}, "two": {}, "three": {}}, (), "was measured, and the stored run does not have it"),
        ({"one": {}, "second": {}}, (), "'second' (paper on"),
        ({"one": {}, "two": {"n": 19}}, (), "lacks 1 of the 20 prompts of the stored run, such as 'city 19'"),
    ],
    ids=["selected", "none", "no test", "gone", "broken", "more", "renamed", "fewer prompts"],
)
def test_run_that_is_not_the_whole_is_red(
    saved: Suite, claims: dict[str, Any], options: tuple[str, ...], why: str
) -> None:
    saved.measure(**claims)
    result = saved.run("--attribution-compare", *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    _says(result, "not comparable:", why, "attribution gate: not comparable with stored run 'main'")


def test_other_weights_under_the_same_name_are_red(saved: Suite, models: dict[str, at.Model]) -> None:
    saved.model = models["llama"]
    result = saved.run("--attribution-compare")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    _says(result, "model 'tiny' has the weights sha256:", "load those, or store a new run")


def test_stored_run_that_cannot_be_used_ends_the_run_before_it_starts(saved: Suite) -> None:
    saved.file.write_bytes(saved.file.read_bytes()[:-100])
    result = saved.run("--attribution-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: the stored run */main.json cannot be used, it is not whole JSON*"])
    assert "test_suite.py" not in result.stdout.str()


@pytest.mark.parametrize(
    ("claims", "options", "why"),
    [
        ({"one": {}, "two": {"broken": True}}, (), "1 test failed before anything was measured, such as test_suite"),
        ({"one": {"shift": -2}, "two": {}}, ("-x",), "the run was cut short; a stored run needs a whole run"),
        ({"one": {"gated": False}}, (), "no gated claim was measured"),
        ({"one": {}}, (), "it has the claim 'two' (paper on"),
    ],
    ids=["broken", "stopped", "nothing", "loses a claim"],
)
def test_run_that_is_not_the_whole_replaces_nothing(
    saved: Suite, claims: dict[str, Any], options: tuple[str, ...], why: str
) -> None:
    before = saved.file.read_bytes()
    saved.measure(**claims)
    result = saved.run("--attribution-save=main", "--attribution-update", *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    _says(result, why)
    assert saved.file.read_bytes() == before


def test_update_takes_in_new_claims(saved: Suite) -> None:
    saved.measure(one={}, two={}, three={})
    assert saved.run("--attribution-save=main", "--attribution-update").ret == 0
    assert saved.run("--attribution-compare").ret == 0


@pytest.mark.parametrize("before", ["--attribution-compare", "-v --attribution-compare"])
def test_path_after_a_bare_option_is_a_path(saved: Suite, before: str) -> None:
    saved.pytester.makepyfile(test_other="def test_it(): raise RuntimeError")
    result = saved.run(*before.split(), "test_suite.py")
    assert result.ret == 0
    # Those of the suite, and the gate.
    result.assert_outcomes(passed=4)
    _says(result, "2 of 2 claims of stored run 'main'")


def test_option_may_stand_in_the_ini_file(saved: Suite) -> None:
    saved.pytester.makeini("[pytest]\naddopts = -p no:cacheprovider --attribution-compare")
    result = saved.run("test_suite.py")
    assert result.ret == 0
    _says(result, "2 of 2 claims of stored run 'main'")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--attribution-compare=mian",), "there is no stored run 'mian' in * (there: main); *"),
        (("--attribution-compare=../main",), "'../main' cannot be the name of a stored run; *"),
        (("--attribution-save", "new"), "--attribution-save came without a name; write --attribution-save=NAME, *"),
        (("--attribution-save=a/b",), "'a/b' cannot be the name of a stored run; *"),
        (("--attribution-update",), "--attribution-update has nothing to write; add --attribution-save=NAME, *"),
        (("--attribution-allow=dtype",), "--attribution-allow is about a comparison; add --attribution-compare, *"),
        (("--attribution-compare", "--attribution-allow=weights"), "--attribution-allow has 'weights'; it knows *"),
        (("--attribution-fail=all",), "--attribution-fail has 'all'; it knows verdicts, regressions, *"),
        (("--attribution-fail=regressions",), "* asks for regressions, and nothing is compared; *"),
        (
            ("--attribution-compare=main", "--attribution-compare=other"),
            "--attribution-compare was given 2 times ('main', 'other'), and only one can be meant; *",
        ),
        (
            ("--attribution-fail=regressions", "--attribution-fail=verdicts", "--attribution-compare=main"),
            "--attribution-fail was given 2 times *",
        ),
        (("--max-prompts=5", "--attribution-max-prompts=6"), "--attribution-max-prompts was given 2 times (5, 6), *"),
        (
            ("-p", "no:attribution-gate", "--attribution-save=new"),
            "-p no:attribution-gate blocks what *-save *",
        ),
        (("-p", "no:attribution-report", "--attribution-report=out"), "-p no:attribution-report blocks what *"),
    ],
)
def test_options_that_cannot_be_meant_end_the_run_before_it_starts(
    suite: Suite, options: tuple[str, ...], why: str
) -> None:
    suite.file.parent.mkdir()
    suite.file.touch()
    result = suite.run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {why}".replace("[", "[[]")])
    assert [path.name for path in suite.file.parent.iterdir()] == ["main.json"]


# What plugins for flaky tests do: a test that fails runs again, and only the last attempt fails or passes.
RERUNS = """
import pytest
from _pytest.runner import runtestprotocol

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for last in (False, False, True):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        again = not last and any(report.failed for report in reports)
        for report in reports:
            if again and report.failed:
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
        if not again:
            break
        item._initrequest()
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True

def pytest_report_teststatus(report):
    if report.outcome == "rerun":
        return "rerun", "R", "RERUN"
"""

# Its third attempt measures something else.
FLAKY = """
from attribution.claims.judge import Claim, judge

ATTEMPTS = []

def test_flaky(attribution_model, assert_claim):
    ATTEMPTS.append(1)
    claim = Claim("flaky", "a sentence", "ours", "fall in nats", "above", 0, "none", method="paper")
    prompts = [f"city {number:02}" for number in range(20)]
    effects = [(1 if len(ATTEMPTS) == 3 else -1) + number / 100 for number in range(20)]
    assert_claim(judge(claim, model=attribution_model.name, effects=effects, facts=prompts, prompts=prompts))
"""
AGAIN = (
    "1 claim was measured again after the test failed, such as 'flaky', 3 times in all; only the last attempt counts."
)


def test_of_a_test_that_runs_again_the_last_attempt_counts_and_the_table_says_so(suite: Suite) -> None:
    suite.pytester.makeconftest(RERUNS)
    suite.pytester.makepyfile(test_suite=FLAKY)
    result = suite.run("--attribution-report=out")
    assert result.ret == 0
    _says(result, AGAIN, "1 supported, 0 refuted, 0 inconclusive")
    assert result.stdout.str().count("tiny   flaky") == 1
    assert AGAIN in (suite.pytester.path / "out" / "summary.md").read_text()
    (row,) = csv.DictReader((suite.pytester.path / "out" / "verdicts.csv").read_text().splitlines())
    assert row["verdict"] == "supported"


def test_gate_refuses_what_was_tried_until_it_held_unless_allowed(suite: Suite) -> None:
    suite.pytester.makeconftest(RERUNS)
    suite.pytester.makepyfile(test_suite=FLAKY)
    refused = suite.run("--attribution-save=main", "--attribution-update")
    assert refused.ret == pytest.ExitCode.TESTS_FAILED
    assert not suite.file.exists()
    _says(refused, AGAIN, "run without repeats, or add --attribution-allow=repeats", "gate: claims were measured again")
    allowed = suite.run("--attribution-save=main", "--attribution-update", "--attribution-allow=repeats")
    assert allowed.ret == 0
    assert suite.run("--attribution-compare=main").ret == pytest.ExitCode.TESTS_FAILED
    assert suite.run("--attribution-compare=main", "--attribution-allow=repeats").ret == 0


def test_gate_that_something_takes_away_on_the_way_is_missed(saved: Suite) -> None:
    saved.pytester.makeconftest(
        """
        def pytest_collection_finish(session):
            manager = session.config.pluginmanager
            manager.unregister(manager.get_plugin("attribution-gate"))
        """
    )
    result = saved.run("--attribution-compare=main")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    _says(result, "attribution gate: --attribution-compare asked for it, and something unregistered it")


def test_comparison_says_with_what_and_by_which_rules(saved: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads(saved.file.read_text())["made"]
    checksum = hashlib.sha256(saved.file.read_bytes()).hexdigest()[:16]
    _says(
        saved.run("--attribution-compare=main"),
        f"compared with {saved.file}, sha256:{checksum}, of {made} (--attribution-compare=main on the command line)",
        "red: verdicts and regressions (by default), losses beyond 0.0001 in the unit of a claim",
    )
    monkeypatch.setenv("PYTEST_ADDOPTS", "--attribution-fail=regressions:0.5")
    saved.pytester.makeini("[pytest]\naddopts = -p no:cacheprovider --attribution-compare=main")
    _says(
        saved.run(),
        "(--attribution-compare=main in tox.ini)",
        "red: regressions (--attribution-fail=regressions:0.5 in PYTEST_ADDOPTS), losses beyond 0.5",
    )


def test_red_comparison_replaces_nothing(saved: Suite) -> None:
    before = saved.file.read_bytes()
    saved.measure(one={"shift": -0.5}, two={})
    result = saved.run("--attribution-compare=main", "--attribution-save=main", "--attribution-update")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    _says(result, "1 worse than in stored run 'main'", "stored run 'main' was not written: this run is red.")
    assert saved.file.read_bytes() == before
    assert saved.run("--attribution-compare=main").ret == pytest.ExitCode.TESTS_FAILED
    # Accepting a loss is a run of its own.
    assert saved.run("--attribution-save=main", "--attribution-update").ret == 0
    assert saved.run("--attribution-compare=main").ret == 0


def test_several_stored_runs_need_a_name(saved: Suite) -> None:
    saved.run("--attribution-save=other")
    result = saved.run("--attribution-compare")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*there are 2 (main, other); name one: --attribution-compare=NAME."])
    assert saved.run("--attribution-compare=other").ret == 0


def test_collecting_compares_and_writes_nothing(saved: Suite) -> None:
    result = saved.run("--collect-only", "--attribution-compare", "--attribution-save=new")
    assert result.ret == 0
    assert "attribution: comparison" not in result.stdout.str()
    assert [path.name for path in saved.file.parent.iterdir()] == ["main.json"]


def test_claim_about_a_model_that_the_plugin_did_not_load_is_red(suite: Suite) -> None:
    suite.pytester.makepyfile(
        test_suite="""
        from attribution.claims.judge import Claim, judge
        def test_claim(assert_claim):
            claim = Claim("one", "a sentence", "ours", "an effect", "above", 0, "none")
            assert_claim(judge(claim, model="mine", effects=[1.0, 2.0, 3.0], facts=["a", "b", "c"]))
        """
    )
    assert suite.run().ret == 0
    result = suite.run("--attribution-save=main")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    _says(result, "claim 'one' is about the model 'mine', which the fixture attribution_model did not load")
    assert not suite.file.exists()


def test_methods_are_judged_on_at_most_so_many_prompts(suite: Suite) -> None:
    suite.pytester.makepyfile(
        test_suite="""
        def test_it(attribution_bench):
            everything = attribution_bench.sample.knowledge.prompts
            attribution_bench.sample.known = list(everything)
            assert len(attribution_bench.prompts) == 7
        """
    )
    assert suite.run("--max-prompts=7").ret == 0
    for number in ("0", "-1", "x", "1.5"):
        result = suite.run(f"--max-prompts={number}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            [f"*--attribution-max-prompts: '{number}' is not a number of prompts; give 1 or more"]
        )


def test_distributed_run_saves_and_compares_as_one(
    folders: dict[str, Path], suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    suite.measure(**{f"claim {number}": {"shift": number} for number in range(12)})
    suite.model = replace(suite.model, name=str(folders["gpt2"]))
    assert suite.run("--attribution-save=alone", "--attribution-update").ret == 0
    # Without leave to replace what is there: a worker that wrote its share would leave none for the whole.
    result = suite.pytester.runpytest_subprocess(
        f"--model={folders['gpt2']}", "-n2", "--attribution-compare=alone", "--attribution-save=main"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=13, failed=1)
    _says(result, "created: 2/2 workers", "12 of 12 claims of stored run 'alone'", "12 unchanged", "wrote 12 claims")
    _says(result, "! attribution gate: stored run 'main' is new !")
    alone, distributed = (
        {**json.loads((suite.file.parent / f"{name}.json").read_text()), "made": "", "checksum": ""}
        for name in ("alone", "main")
    )
    assert distributed == alone


# The engine under the gate

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "test_faithfulness" / "test_top_neurons.py"
# All that the author of a method writes, as the documentation has it.
AUTHOR = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("```python conftest.py\n")[1].split("```")[0]
# One line each, in the scorer of the paper and in that of the author.
HARMFUL = {
    "engine/methods.py": (
        "log_prob_increase(candidates.log_probs[candidates.sublayer_index], candidates.update, candidates.answer)",
        "log_prob_increase(candidates.log_probs[candidates.sublayer_index], candidates.update, candidates.answer)"
        ".floor()",
    ),
    "conftest.py": ("return candidates.update[:", "return -candidates.update[:"),
}
HARMLESS = {
    "engine/importance.py": (
        "return update[..., answer] - torch.logsumexp(log_probs + update, dim=-1)",
        "return -(log_probs + update - update[..., answer, None]).exp().sum(-1).log()",
    ),
    "conftest.py": (
        "return candidates.update[:, candidates.answer]",
        "return candidates.update @ candidates.update.new_zeros(candidates.update.shape[1]).index_fill_(\n"
        "        0, candidates.sublayer_index.new_tensor([candidates.answer]), 1\n    )",
    ),
}


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} no longer holds {old!r} once"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def engine(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Run the claims of Table 2 on 60 prompts of a bundled model, on a copy of this package with lines changed."""
    source = Path(at.__file__).parent
    copy = pytester.path / "changed" / "attribution"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    (copy / "fixtures").symlink_to(fixtures_folder("models").parent)
    pytester.path.joinpath("test_claims.py").write_text(CLAIMS.read_text(encoding="utf-8"), encoding="utf-8")
    conftest = pytester.makeconftest(AUTHOR)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\ntestpaths = test_claims.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(copy.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*options: str, changes: dict[str, tuple[str, str]] | None = None) -> pytest.RunResult:
        edited = {conftest if name == "conftest.py" else copy / name: lines for name, lines in (changes or {}).items()}
        for path, (old, new) in edited.items():
            _edit(path, old, new)
        result = pytester.runpytest_subprocess(
            "--model=bundled:gpt2", "--max-prompts=60", "-k", "zeroing_the_top_10_hurts", *options
        )
        for path, (old, new) in edited.items():
            _edit(path, new, old)
        return result

    return run


def _regressed(result: pytest.RunResult) -> set[str]:
    """Methods with a claim that got worse."""
    lines = [line for line in result.outlines if line.startswith("regressed: 'top 10 vs ")]
    return {line.split("(")[1].split(" on ")[0] for line in lines}


def test_harmful_line_in_a_scorer_is_red_and_a_harmless_refactor_is_green(
    engine: Callable[..., pytest.RunResult],
) -> None:
    """A method that a conftest.py registers joins the claims and the gate beside the paper's."""
    # 60 prompts decide few claims: what counts here is whether they change.
    _says(engine("--attribution-save=main", "--attribution-update"), "wrote 42 claims to")
    compare = ("--attribution-compare", "--attribution-fail=regressions")
    harmless = engine(*compare, changes=HARMLESS)
    assert harmless.ret == 0
    _says(harmless, "42 of 42 claims of stored run 'main'", "42 unchanged")
    harmful = engine(*compare, changes=HARMFUL)
    assert harmful.ret == pytest.ExitCode.TESTS_FAILED
    assert _regressed(harmful) == {"log_prob_increase", "logit"}
    assert "not comparable" not in harmful.stdout.str()
