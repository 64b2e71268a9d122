"""Attacks on the gate and harmless changes, as tables: what is done, the exit status, and what the run says of it.

Those on the engine are in ``faults/``, those on the file's form in ``gate/test_gate.py``. What no gate can stop is in
docs/security.md.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attribution.gate import stored_run
from attribution.gate.stored_run import dumps, loads

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parent))
    from test_gate_runs import RERUNS, Suite, first_stored_run, models, one_thread, saved, suite

__all__ = ["first_stored_run", "models", "one_thread", "saved", "suite"]

pytest_plugins = ["pytester"]

COMPARE = "--attribution-compare=main"


class Step(NamedTuple):
    """What is done between the run that was stored and the one that is compared with it."""

    change: Callable[[Suite], None]
    options: tuple[str, ...] = (COMPARE,)
    status: int = 1
    says: str = ""


def _nothing(_: Suite) -> None:
    """Leave all as it was."""


def _measure(**one: Any) -> Callable[[Suite], None]:
    """Let the first of the two claims be measured otherwise."""
    return lambda suite: suite.measure(one=one, two={})


def _claims(*ids: str) -> Callable[[Suite], None]:
    return lambda suite: suite.measure(**{id: {} for id in ids})


def _file(edit: Callable[[bytes], bytes]) -> Callable[[Suite], None]:
    """Change the file's bytes."""

    def change(suite: Suite) -> None:
        suite.file.write_bytes(edit(suite.file.read_bytes()))

    return change


def _forge(edit: Callable[[Any], object]) -> Callable[[Suite], None]:
    """Change the file's content, and let its checksum fit."""

    def change(suite: Suite) -> None:
        content = json.loads(suite.file.read_text())
        del content["checksum"]
        edit(content)
        content["checksum"] = stored_run.checksum_of(content)
        suite.file.write_text(json.dumps(content))

    return change


def _instead(make: Callable[[Path], object]) -> Callable[[Suite], None]:
    """Put something else in the file's place."""

    def change(suite: Suite) -> None:
        suite.file.unlink()
        make(suite.file)

    return change


def _elsewhere(suite: Suite) -> None:
    """Keep the stored run in another folder, behind a link."""
    other = suite.pytester.path / "other.json"
    suite.file.rename(other)
    suite.file.symlink_to(other)


def _folder_elsewhere(suite: Suite) -> None:
    other = suite.pytester.path / "runs"
    suite.file.parent.rename(other)
    suite.file.parent.symlink_to(other)


def _folder_is_a_file(suite: Suite) -> None:
    suite.file.unlink()
    suite.file.parent.rmdir()
    suite.file.parent.touch()


def _conftest(code: str) -> Callable[[Suite], None]:
    return lambda suite: suite.pytester.makeconftest(code) and None


def _ini(options: str) -> Callable[[Suite], None]:
    return lambda suite: suite.pytester.makeini(f"[pytest]\naddopts = -p no:cacheprovider {options}") and None


def _environment(**variables: str) -> Callable[[Suite], None]:
    return lambda suite: [suite.environment.setenv(*each) for each in variables.items()] and None


def _test(code: str) -> Callable[[Suite], None]:
    """Add a test of another file, which runs before the claims."""
    return lambda suite: suite.pytester.makepyfile(test_a=code) and None


def _edited(old: str, new: str) -> Callable[[Suite], None]:
    """Edit the code that measures."""

    def change(suite: Suite) -> None:
        path = suite.pytester.path / "test_suite.py"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    return change


def _both(*changes: Callable[[Suite], None]) -> Callable[[Suite], None]:
    return lambda suite: [change(suite) for change in changes] and None


def _other_model(**fields: Any) -> Callable[[Suite], None]:
    return lambda suite: setattr(suite, "model", replace(suite.model, **fields))


MARK = """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        if "two" in item.name:
            item.add_marker({})
"""
JUDGE = "assert_claim(judge(claim, model='tiny', effects={}, facts=range(20), prompts=[str(n) for n in range(20)]))"
TWICE = f"    {JUDGE.format('[1.0] * 20')}\n    assert_claim("
# The first attempt fails, and the second measures something else.
TRIED = f"""\
    import os
    if "TRIED" not in os.environ:
        os.environ["TRIED"] = "1"
        {JUDGE.format("[-1.0] * 20")}
    del os.environ["TRIED"]
    effects ="""
UNREADABLE = "cannot be used, it"
NOT_MEASURED = "the claim 'two' (paper on tiny) was not measured, and the stored run has it"
NONE_THERE = "there is no stored run"
WORSE = "attribution gate: 1 worse than in stored run 'main'"

ATTACKS: dict[str, Step] = {
    # The file.
    "file is empty": Step(_file(lambda _: b""), status=4, says=UNREADABLE),
    "file lacks its last byte but one": Step(_file(lambda text: text[:-2]), status=4, says=UNREADABLE),
    "file is cut in half": Step(_file(lambda text: text[: len(text) // 2]), status=4, says=UNREADABLE),
    "file twice in a row": Step(_file(lambda text: text * 2), status=4, says=UNREADABLE),
    "file in UTF-16": Step(_file(lambda text: text.decode().encode("utf-16")), status=4, says=UNREADABLE),
    "file with a zero byte": Step(_file(lambda text: b"\0" + text), status=4, says=UNREADABLE),
    "a digit of an effect": Step(_file(lambda text: text.replace(b"1.19", b"1.18", 1)), status=4, says=UNREADABLE),
    "an effect is NaN": Step(_file(lambda text: text.replace(b"1.19", b"NaN", 1)), status=4, says="holds NaN"),
    "an effect is 1e999": Step(_file(lambda text: text.replace(b"1.19", b"1e999", 1)), status=4, says="holds 1e999"),
    "no checksum": Step(_file(lambda text: text.replace(b"checksum", b"checksums")), status=4, says=UNREADABLE),
    "a merge left its marks": Step(_file(lambda text: b"<<<<<<< HEAD\n" + text), status=4, says=UNREADABLE),
    "a key twice": Step(
        _file(lambda text: text.replace(b'"made"', b'"made": "", "made"')), status=4, says="holds 'made' twice"
    ),
    "file is gone": Step(_instead(lambda path: None), status=4, says=NONE_THERE),
    "a folder in its place": Step(_instead(Path.mkdir), status=4, says=NONE_THERE),
    "a link to nothing": Step(_instead(lambda path: path.symlink_to("gone.json")), status=4, says=NONE_THERE),
    "a link to itself": Step(_instead(lambda path: path.symlink_to(path.name)), status=4, says=NONE_THERE),
    "a pipe in its place": Step(_instead(os.mkfifo), status=4, says=NONE_THERE),
    "a device in its place": Step(_instead(lambda path: path.symlink_to("/dev/null")), status=4, says=NONE_THERE),
    "a file in the folder's place": Step(_folder_is_a_file, status=4, says=NONE_THERE),
    # The file, by somebody who lets its checksum fit.
    "forged: a claim is gone": Step(
        _forge(lambda c: c["claims"].pop()), says="was measured, and the stored run does not have it"
    ),
    "forged: all claims are gone": Step(_forge(lambda c: c["claims"].clear()), status=4, says="holds no claims"),
    "forged: another threshold": Step(
        _forge(lambda c: c["claims"][0]["claim"].update(threshold=-9.0)), says="has another threshold"
    ),
    "forged: not asserted": Step(
        _forge(lambda c: c["claims"][0]["claim"].update(asserted=False)), says="has another asserted"
    ),
    "forged: effects of 1e308": Step(
        _forge(lambda c: c["claims"][0].update(effects=[1e308] * 20)), says="no measurement of its kind can have"
    ),
    "forged: other weights": Step(
        _forge(lambda c: c["models"]["tiny"].update(weights="sha256:0")), says="model 'tiny' has the weights"
    ),
    "forged: binding is a text": Step(_forge(lambda c: c.update(binding="all")), status=4, says="which claims were"),
    "forged: a field more": Step(_forge(lambda c: c.update(trusted=True)), status=4, says="does not have the fields"),
    # Options.
    "a name that is a path": Step(_nothing, ("--attribution-compare=../main",), 4, "cannot be the name"),
    "another case": Step(_nothing, ("--attribution-compare=MAIN",), 4, NONE_THERE),
    "two stored runs": Step(_nothing, (COMPARE, "--attribution-compare=b"), 4, "was given 2 times ('main', 'b')"),
    "two policies": Step(
        _nothing, (COMPARE, "--attribution-fail=regressions", "--attribution-fail=verdicts"), 4, "was given 2 times"
    ),
    "a second policy in the environment": Step(
        _environment(PYTEST_ADDOPTS="--attribution-fail=verdicts"),
        (COMPARE, "--attribution-fail=regressions"), 4, "was given 2 times",
    ),
    "a second policy in the ini file": Step(
        _ini("--attribution-fail=verdicts"), (COMPARE, "--attribution-fail=regressions"), 4, "was given 2 times"
    ),
    "nothing is red": Step(_nothing, (COMPARE, "--attribution-fail="), 4, "--attribution-fail has ''"),
    "a tolerance that is NaN": Step(_nothing, (COMPARE, "--attribution-fail=regressions:nan"), 4, "0 or more"),
    "a tolerance without bound": Step(_nothing, (COMPARE, "--attribution-fail=regressions:inf"), 4, "0 or more"),
    "a tolerance below 0": Step(_nothing, (COMPARE, "--attribution-fail=regressions:-1"), 4, "0 or more"),
    "weights may differ": Step(_nothing, (COMPARE, "--attribution-allow=weights"), 4, "it knows dtype, device"),
    "gate blocked": Step(_nothing, (COMPARE, "-p", "no:attribution-gate"), 4, "-p no:attribution-gate blocks what"),
    "gate blocked in the ini file": Step(_ini("-p no:attribution-gate"), (COMPARE,), 4, "blocks what"),
    "gate blocked in the environment": Step(
        _environment(PYTEST_ADDOPTS="-p no:attribution-gate"), (COMPARE,), 4, "blocks what"
    ),
    "plugin blocked": Step(_nothing, (COMPARE, "-p", "no:attribution"), 4, "unrecognized arguments"),
    "another root": Step(_nothing, (COMPARE, "--rootdir=.."), 4, NONE_THERE),
    "save over what is there": Step(_nothing, ("--attribution-save=main",), 4, "add --attribution-update to replace"),
    "replace and compare at once": Step(
        _measure(shift=-0.5), (COMPARE, "--attribution-save=main", "--attribution-update"), 1,
        "stored run 'main' was not written: this run is red",
    ),
    "a claim deselected by -k": Step(_nothing, (COMPARE, "-k", "not two"), 1, NOT_MEASURED),
    "a claim deselected by name": Step(
        _nothing, (COMPARE, "--deselect=test_suite.py::test_claim[tiny-two]"), 1, NOT_MEASURED
    ),
    "file of claims ignored": Step(_nothing, (COMPARE, "--ignore=test_suite.py"), 1, "was not measured"),
    "stopped at the first failure": Step(
        _measure(broken=True), (COMPARE, "-x"), 1, "was not measured"
    ),
    # What is measured.
    "half a nat worse": Step(_measure(shift=-0.5), says=WORSE),
    "worse by twice the tolerance": Step(_measure(shift=-0.0002), says=WORSE),
    "no longer supported": Step(_measure(shift=-2), says=WORSE),
    "measured on fewer prompts": Step(_measure(n=19), says="lacks 1 of the 20 prompts"),
    "measured on more prompts": Step(_measure(n=21), says="has 1 prompt that the stored run has not"),
    "measured on one prompt": Step(_measure(n=1), says="lacks 19 of the 20 prompts"),
    "measured on nothing": Step(_measure(n=0), says="lacks 20 of the 20 prompts"),
    "effects of 1e200": Step(_measure(shift=1e200), says="no measurement of its kind can have"),
    # The mean is infinite, and that is a warning, which this suite makes an error.
    "effects of 1e308": Step(_measure(shift=1e308), says="was not measured, and the stored run has it"),
    "only reported": Step(_measure(asserted=False), says="has another asserted"),
    "taken out of the gate": Step(_measure(gated=False), says="was not measured, and the stored run has it"),
    "a claim is gone": Step(_claims("one"), says=NOT_MEASURED),
    "a claim is renamed": Step(_claims("one", "Two"), says=NOT_MEASURED),
    "a claim more": Step(_claims("one", "two", "three"), says="and the stored run does not have it"),
    "raises before it measures": Step(_measure(broken=True), says="was not measured"),
    "another threshold": Step(_edited('"above", 0,', '"above", -5,'), says="has another threshold"),
    "another test": Step(_edited('"above", 0,', '"within", 5,'), says="has another test"),
    "another control": Step(_edited('"none",', '"another",'), says="has another control"),
    "another measure": Step(_edited('"fall in nats"', '"fall"'), says="has another effect"),
    "another method": Step(_edited('method="paper"', 'method="mine"'), says="was not measured"),
    "all prompts are one fact": Step(_edited("facts=prompts", 'facts=["city 00"] * len(prompts)'), says="to the fact"),
    "measured twice": Step(_edited("    assert_claim(", TWICE), says="was measured twice"),
    "other weights": Step(
        lambda suite: setattr(suite, "model", suite.models["llama"]), says="model 'tiny' has the weights sha256:"
    ),
    "another name of the model": Step(_other_model(name="small"), says="was not measured"),
    # Code that runs beside it.
    "a claim is skipped": Step(_conftest(MARK.format("pytest.mark.skip")), says=NOT_MEASURED),
    "a claim is not run": Step(_conftest(MARK.format("pytest.mark.xfail(run=False)")), says=NOT_MEASURED),
    "a claim is expected to fail": Step(
        _both(lambda suite: suite.measure(one={}, two={"shift": -2}), _conftest(MARK.format("pytest.mark.xfail"))),
        says=WORSE,
    ),
    "a claim is taken out on the way": Step(
        _conftest("def pytest_collection_modifyitems(items): items[:] = [i for i in items if 'two' not in i.name]"),
        says=NOT_MEASURED,
    ),
    "a claim is made to pass": Step(
        _both(
            _measure(shift=-2),
            _conftest(
                "import pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_makereport():\n"
                "    report = yield\n    report.outcome = 'passed'\n    return report"
            ),
        ),
        says=WORSE,
    ),
    "what was measured is dropped": Step(
        _conftest(
            "import pytest\n@pytest.hookimpl(tryfirst=True)\ndef pytest_runtest_logreport(report):\n"
            "    report.attribution_recorded = []"
        ),
        says="was not measured",
    ),
    "a test ends the run, with exit status 0": Step(
        _test("import pytest\ndef test_it(): pytest.exit('enough', returncode=0)"), says="was not measured"
    ),
    "a test exits, with exit status 0": Step(_test("def test_it(): raise SystemExit(0)"), says="1 failed"),
    "tried until it holds": Step(
        _both(_conftest(RERUNS), _edited("    effects =", TRIED)), says="claims were measured again"
    ),
    "gate unregistered on the way": Step(
        _conftest("def pytest_collection_finish(session):\n    manager = session.config.pluginmanager\n"
                  "    manager.unregister(manager.get_plugin('attribution-gate'))"),
        status=4, says="asked for it, and something unregistered it",
    ),
    "the folder is removed during the run": Step(
        _both(_measure(shift=-0.5), _test("import shutil\ndef test_it(): shutil.rmtree('.attribution')")), says=WORSE
    ),
    "another stored run is put there during the run": Step(
        _both(
            _measure(shift=-0.5), _test("def test_it(): open('.attribution/main.json', 'w').write('{}')")
        ),
        says=WORSE,
    ),
}  # fmt: skip

SKIPPED = MARK.replace('"two" in item.name', '"nothing" in item.name').format("pytest.mark.skip")
HARMLESS: dict[str, Step] = {
    "nothing": Step(_nothing),
    "claims in another order": Step(_claims("two", "one")),
    "verbose": Step(_nothing, (COMPARE, "-v")),
    "quiet": Step(_nothing, (COMPARE, "-q")),
    "no tracebacks": Step(_nothing, (COMPARE, "--tb=no")),
    "all outcomes in the summary": Step(_nothing, (COMPARE, "-rA")),
    "a JUnit file while warnings are errors": Step(_nothing, (COMPARE, "--junitxml=out.xml")),
    "expected failures are run": Step(_nothing, (COMPARE, "--runxfail")),
    "nothing captured": Step(_nothing, (COMPARE, "-s")),
    "in colour": Step(_nothing, (COMPARE, "--color=yes")),
    "stop at the first failure": Step(_nothing, (COMPARE, "-x")),
    "by path": Step(_nothing, (COMPARE, "test_suite.py")),
    "noise of 1e-7": Step(_measure(shift=1e-7)),
    "noise just within the tolerance": Step(_measure(shift=-0.00009)),
    "effects change places, and the mean stays": Step(
        _edited('range(how["n"])]\n    prompts', 'reversed(range(how["n"]))]\n    prompts')
    ),
    "a claim is better": Step(_measure(shift=0.5)),
    "a claim that takes no part": Step(lambda suite: suite.measure(one={}, two={}, three={"gated": False})),
    "a test more": Step(_test("def test_it(): pass")),
    "a skipped test more": Step(_test("import pytest\ndef test_it(): pytest.skip('not here')")),
    "a test that measures nothing is skipped": Step(_conftest(SKIPPED)),
    "options in the ini file": Step(_ini(COMPARE), ()),
    "options in the environment": Step(_environment(PYTEST_ADDOPTS=COMPARE), ()),
    "a narrow terminal": Step(_environment(COLUMNS="40")),
    "another language": Step(_environment(LANG="C", LC_ALL="C")),
    "the file laid out otherwise": Step(_file(lambda text: json.dumps(json.loads(text), indent=8).encode())),
    "line ends of Windows": Step(_file(lambda text: text.replace(b"\n", b"\r\n"))),
    "file is read-only": Step(lambda suite: suite.file.chmod(0o444)),
    "the file behind a link": Step(_elsewhere),
    "the folder behind a link": Step(_folder_elsewhere),
    "other files beside it": Step(lambda suite: (suite.file.parent / "notes.txt").write_text("mine") and None),
    "another stored run beside it": Step(lambda suite: (suite.file.parent / "b.json").write_text("{}") and None),
    "stored by an earlier version": Step(
        lambda suite: suite.file.write_text(dumps(replace(loads(suite.file.read_text()), binding={}))) and None
    ),
    "an empty name, where there is one stored run": Step(_nothing, ("--attribution-compare=",)),
    "the bare option": Step(_nothing, ("--attribution-compare",)),
    "a test changes the folder": Step(_test("import os\ndef test_it(): os.chdir('/')")),
}


def _output(result: pytest.RunResult) -> str:
    return " ".join((result.stdout.str() + " " + result.stderr.str()).split())


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_seen(name: str, saved: Suite) -> None:
    step = ATTACKS[name]
    step.change(saved)
    result = saved.run(*step.options)
    assert step.says in _output(result)
    assert result.ret == step.status


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_change_is_green(name: str, saved: Suite) -> None:
    step = HARMLESS[name]
    step.change(saved)
    result = saved.run(*step.options)
    assert "2 of 2 claims of stored run 'main'" in _output(result)
    assert result.ret == 0, _output(result)


# The file that continuous integration shows


def _cases(suite: Suite) -> tuple[dict[str, str], dict[str, ElementTree.Element]]:
    root = ElementTree.parse(suite.pytester.path / "out.xml").getroot()[0]
    return root.attrib, {case.attrib["name"]: case for case in root.iter("testcase")}


def test_junit_file_shows_each_verdict_in_a_few_hundred_bytes_and_the_gate_as_a_test(saved: Suite) -> None:
    assert saved.run(COMPARE, "--junitxml=out.xml").ret == 0
    totals, cases = _cases(saved)
    assert (totals["tests"], totals["errors"], totals["failures"]) == ("4", "0", "0")
    assert len(cases["gate"]) == 0
    (shown,) = [each.attrib["value"] for each in cases["test_claim[tiny-one]"].iter("property")]
    assert len(shown) < 400
    assert json.loads(shown) == {
        "model": "tiny", "method": "paper", "claim": "one", "verdict": "supported", "binding": True,
        "effect": 1.095, "low": json.loads(shown)["low"], "high": json.loads(shown)["high"], "n": 20, "facts": 20,
    }  # fmt: skip
    assert json.loads(shown)["low"] < 1.095 < json.loads(shown)["high"]


def test_a_red_gate_is_a_failure_in_the_junit_file_and_says_why(saved: Suite) -> None:
    saved.measure(one={"shift": -0.5}, two={})
    assert saved.run(COMPARE, "--junitxml=out.xml").ret == 1
    totals, cases = _cases(saved)
    assert (totals["errors"], totals["failures"]) == ("0", "1")
    (failure,) = cases["gate"].iter("failure")
    assert failure.attrib["message"] == "1 worse than in stored run 'main'"
    assert "regressed: 'one' (paper on tiny): fall in nats was 1.095 and is 0.595" in (failure.text or "")


def test_control_characters_of_a_claim_do_not_reach_the_terminal(suite: Suite) -> None:
    suite.measure(**{"one\x1b[2J\r": {"shift": 0.5}, "two": {}})
    result = suite.run("--attribution-save=main", "--attribution-update", "--color=no")
    suite.measure(**{"one\x1b[2J\r": {}, "two": {}})
    compared = suite.run(COMPARE, "--color=no", "--junitxml=out.xml")
    assert compared.ret == 1
    for each in (result, compared):
        assert "\x1b" not in each.stdout.str()
        assert "\r" not in each.stdout.str().replace("\r\n", "\n")


# In processes of their own, by a model that each of them loads


@pytest.fixture
def apart(suite: Suite, folders: dict[str, Path]) -> Callable[..., pytest.RunResult]:
    """Run pytest in a process of its own on a stored run."""
    suite.model = replace(suite.model, name=str(folders["gpt2"]))
    assert suite.run("--attribution-save=main", "--attribution-update").ret == 0
    return lambda *options: suite.pytester.runpytest_subprocess(f"--model={folders['gpt2']}", *options)


@pytest.mark.exhaustive
def test_attacks_that_need_a_process_are_seen(
    apart: Callable[..., pytest.RunResult], suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert apart(COMPARE).ret == 0
    crash = suite.pytester.makepyfile(test_z="import os\ndef test_it(): os._exit(0)")
    crashed = apart(COMPARE, "-n2")
    assert crashed.ret == 1
    assert "crashed while running" in _output(crashed)
    crash.unlink()
    suite.measure(one={"shift": -0.5}, two={})
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    optimized = apart(COMPARE)
    assert optimized.ret == 1
    assert "1 worse than in stored run 'main'" in _output(optimized)
    monkeypatch.delenv("PYTHONOPTIMIZE")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    alone = apart(COMPARE)
    assert alone.ret == 4
    assert "unrecognized arguments" in _output(alone)


@pytest.mark.exhaustive
def test_what_no_gate_can_stop_leaves_no_test_case_of_the_gate(
    apart: Callable[..., pytest.RunResult], suite: Suite
) -> None:
    """As docs/security.md says: whoever trusts the exit status alone is fooled, who looks for the test case is not."""
    suite.measure(one={"shift": -0.5}, two={})
    suite.pytester.makepyfile(test_a="import os\ndef test_it(): os._exit(0)")
    assert apart(COMPARE, "--junitxml=out.xml").ret == 0
    assert not (suite.pytester.path / "out.xml").exists()
