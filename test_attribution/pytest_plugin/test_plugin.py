"""The pytest plugin, from outside: nested runs of pytest on a suite of a few lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attribution.models.registry import registry

pytest_plugins = ["pytester"]

# Two for each model, and one that is about none.
COLLECTED = 2 * len(registry()) + 1

SUITE = """
import pytest
from attribution.claims.judge import Claim, judge

@pytest.mark.superiority
@pytest.mark.parametrize("effect", [1.0, -1.0], ids=["good", "bad"])
def test_claim(attribution_model, effect, assert_claim):
    claim = Claim("ours", "a sentence", "ours", "an effect", "above", 0, "none")
    effects = [effect + number / 100 for number in range(20)]
    name = attribution_model.name
    assert_claim(judge(claim, model=name, effects=effects, facts=[str(n) for n in range(20)]))

def test_without_model():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A suite that runs a claim on every registered model."""
    pytester.makepyfile(test_suite=SUITE)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error")
    return pytester


def _collected(result: pytest.RunResult) -> list[str]:
    return [line.split("::")[-1] for line in result.outlines if "::" in line]


def test_plain_pytest_collects_only_what_needs_no_network(suite: pytest.Pytester) -> None:
    names = _collected(suite.runpytest_subprocess("--collect-only", "-q"))
    assert "test_claim[bundled-gpt2-good]" in names
    assert "test_claim[bundled-llama-bad]" in names
    assert "test_without_model" in names
    assert all("bundled" in name for name in names if "[" in name)


@pytest.mark.parametrize(
    ("expression", "models"),
    [
        ("bundled", {"bundled-gpt2", "bundled-llama"}),
        ("gpt2", {"gpt2"}),
        ("gpt2_medium", {"gpt2-medium"}),
        ("gpt2_large", {"gpt2-large"}),
        ("llama", {"llama-7b"}),
        ("superiority", {"bundled-gpt2", "bundled-llama"}),
        ("superiority and (bundled or gpt2)", {"bundled-gpt2", "bundled-llama", "gpt2"}),
        ("not bundled", set()),
    ],
)
def test_a_marker_selects_its_model_and_no_other(suite: pytest.Pytester, expression: str, models: set[str]) -> None:
    names = _collected(suite.runpytest_subprocess("--collect-only", "-q", "-m", expression))
    assert {re.sub(r".*\[(.*)-(good|bad)\]", r"\1", name) for name in names if "[" in name} == models


@pytest.mark.parametrize(
    ("options", "models"),
    [
        (["--model=bundled:gpt2", "-m", "bundled"], {"bundled-gpt2"}),
        (["--model=bundled:gpt2", "-m", "superiority"], {"bundled-gpt2"}),
        (["--model=bundled:gpt2", "--model=gpt2", "-m", "gpt2"], {"gpt2"}),
        (["--model=gpt2"], {"gpt2"}),
        (["--model=org/name", "-m", "not bundled"], {"name"}),
    ],
)
def test_a_marker_selects_among_named_models(suite: pytest.Pytester, options: list[str], models: set[str]) -> None:
    names = _collected(suite.runpytest_subprocess("--collect-only", "-q", *options))
    assert {re.sub(r".*\[(.*)-(good|bad)\]", r"\1", name) for name in names if "[" in name} == models


ABOUT = """
import pytest

@pytest.mark.about_models({names})
def test_claim({argument}):
    pass
"""


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ([], {"bundled-llama"}),
        (["-m", "gpt2"], {"gpt2"}),
        (["-m", "llama"], set()),
        (["--model=bundled:gpt2"], set()),
        (["--model=openai-community/gpt2"], {"gpt2"}),
    ],
)
def test_what_is_about_some_models_is_collected_for_those_alone(
    pytester: pytest.Pytester, options: list[str], models: set[str]
) -> None:
    pytester.makepyfile(ABOUT.format(names="'bundled:llama', 'gpt2'", argument="attribution_model"))
    names = _collected(pytester.runpytest_subprocess("--collect-only", "-q", "--strict-markers", *options))
    assert {re.sub(r".*\[(.*)\]", r"\1", name) for name in names} == models


@pytest.mark.parametrize(
    ("names", "argument"), [("'gpt3'", "attribution_model"), ("", "attribution_model"), ("'gpt2'", "")]
)
def test_what_is_about_no_registered_model_is_an_error(pytester: pytest.Pytester, names: str, argument: str) -> None:
    pytester.makepyfile(ABOUT.format(names=names, argument=argument))
    result = pytester.runpytest_subprocess("--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *test_claim* is marked about_models*name models of: bundled:gpt2, *"])


def test_unknown_markers_are_errors(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_typo="import pytest\n@pytest.mark.gtp2\ndef test_it(): pass")
    result = suite.runpytest_subprocess("-m", "bundled", "--collect-only")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*'gtp2' not found in `markers`*"])


def test_run_ends_in_a_table_and_a_refuted_claim_is_red(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess("-m", "bundled")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=2, failed=2, deselected=COLLECTED - 4)
    result.stdout.fnmatch_lines(
        [
            "model * claim *effect * interval * n * verdict",
            "bundled:gpt2 * ours * 1.095 * 1.0?? .. 1.1?? * 20 * supported",
            "bundled:gpt2 * ours * -0.905 * 20 * refuted",
            "2 supported, 2 refuted, 0 inconclusive",
        ]
    )
    # One sentence per refuted claim, and no frames of ours.
    assert "refuted: a sentence (ours) on bundled:gpt2: an effect is -0.905" in result.stdout.str()
    assert "Traceback" not in result.stdout.str()


def test_table_is_whole_under_several_reports_and_absent_without_claims(suite: pytest.Pytester) -> None:
    result = suite.runpytest_subprocess("-k", "without_model")
    result.assert_outcomes(passed=1, deselected=COLLECTED - 1)
    assert "verdict" not in result.stdout.str()


def test_model_that_cannot_be_loaded_is_one_error_with_remedies_never_a_skip(
    suite: pytest.Pytester, tmp_path: Path
) -> None:
    result = suite.runpytest_subprocess("-m", "gpt2", f"--models-dir={tmp_path}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (text,) = [line for line in result.errlines if line]
    assert f"ERROR: model 'gpt2' is not in the models folder '{tmp_path}'" in text
    assert f"put its files in {tmp_path / 'gpt2'}" in text
    assert text.endswith(" 2 tests wait for it.")
    assert "Traceback" not in result.stdout.str()


@pytest.mark.parametrize("options", [["-n0"], ["-n2", "--dist=loadfile"]], ids=["one process", "workers"])
def test_hub_that_cannot_be_reached_is_an_error_that_names_the_remedies(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("ATTRIBUTION_MODELS", raising=False)
    result = suite.runpytest_subprocess("-m", "gpt2", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (text,) = [line for line in result.errlines if line]
    assert not re.search("warning|retry", result.stdout.str(), re.IGNORECASE)
    for remedy in ("go online", "--models-dir=DIR", "ATTRIBUTION_MODELS=DIR", "choose a bundled model"):
        assert remedy in text


def test_real_model_path_loads_a_folder_in_the_layout_of_the_hub(
    suite: pytest.Pytester, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "gpt2").symlink_to(folders["gpt2"], target_is_directory=True)
    result = suite.runpytest_subprocess("-m", "gpt2 and superiority", f"--models-dir={tmp_path}", "-k", "good")
    result.assert_outcomes(passed=1, deselected=COLLECTED - 1)
    result.stdout.fnmatch_lines(["gpt2 * ours * supported"])
    # Written with a space, pytest would take DIR for a path of tests and look for its settings there.
    result.stdout.fnmatch_lines([f"rootdir: {suite.path}"])


LONG = "The capital of France is" + " the capital of France" * 20

UNASKABLE = {
    "knows none of the file": (
        ["The capital of France is", "The capital of Italy is"],
        "knows none of the 2 prompts of own.csv, so there is nothing to ask; see by `python -m attribution select "
        "{model} --prompts own.csv` why they fall, and give others or choose another model.",
    ),
    "too long a prompt in the file": (
        [LONG, "The capital of Italy is"],
        f"cannot be asked the prompts of own.csv: prompt {LONG[:40]!r}... has * tokens, but the model's context holds "
        "32; shorten it, or give others.",
    ),
    "too long a bundled prompt": (
        [],
        "cannot be asked the bundled prompts: prompt * tokens, but the model's context holds 32; shorten it, or give "
        "others by --prompts=FILE.",
    ),
}


@pytest.mark.parametrize(("prompts", "sentence"), UNASKABLE.values(), ids=list(UNASKABLE))
def test_model_that_can_be_asked_nothing_is_an_error_in_one_sentence(
    pytester: pytest.Pytester, folders: dict[str, Path], prompts: list[str], sentence: str
) -> None:
    pytester.makepyfile("def test_it(attribution_prompts): assert False, 'not reached'")
    rows = [f"{text},{answer}" for text, answer in zip(prompts, ("Paris", "Rome"), strict=False)]
    pytester.path.joinpath("own.csv").write_text("\n".join(["prompt,answer", *rows]), encoding="utf-8")
    options = ["--prompts=own.csv"] if prompts else []
    result = pytester.runpytest_subprocess(f"--model={folders['gpt2']}", *options)
    result.assert_outcomes(errors=1)
    model = str(folders["gpt2"])
    result.stdout.fnmatch_lines([f"model {model!r} {sentence.format(model=model)}"])
    assert "Traceback" not in result.stdout.str()
    assert "not reached" not in result.stdout.str()


@pytest.mark.parametrize(
    ("sign", "outcome"), [(-1, {"xfailed": 1}), (1, {"failed": 1})], ids=["as recorded", "another verdict"]
)
def test_claim_recorded_as_not_holding_is_expected_to_fail_and_only_so(
    pytester: pytest.Pytester, sign: int, outcome: dict[str, int]
) -> None:
    claim_id = next(id for id, verdict in registry()["bundled:gpt2"].not_supported.items() if verdict == "refuted")
    pytester.makepyfile(f"""
        from attribution.claims.judge import Claim, judge
        def test_claim(assert_claim):
            claim = Claim({claim_id!r}, "a sentence", "ours", "an effect", "above", 0, "none")
            effects = [{sign} + number / 100 for number in range(20)]
            assert_claim(judge(claim, model="bundled:gpt2", effects=effects, facts=[str(n) for n in range(20)]))
    """)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(**outcome)
    verdict = "refuted, as recorded" if sign < 0 else "supported"
    result.stdout.fnmatch_lines([f"bundled:gpt2 * {claim_id} * {verdict}"])
    if sign > 0:
        assert "the registry records 'refuted', correct it there" in result.stdout.str()


def test_suite_chooses_its_models_and_categories_by_hooks(suite: pytest.Pytester) -> None:
    suite.makeconftest(
        "def pytest_attribution_models(): return ['bundled:llama']\n"
        "def pytest_attribution_categories(): return ['month']\n"
    )
    suite.makepyfile(
        test_choice="def test_it(attribution_bench):\n"
        "    assert {p.category for p in attribution_bench.sample.knowledge.prompts} == {'month'}\n"
    )
    result = suite.runpytest_subprocess("test_choice.py", "-v")
    result.assert_outcomes(passed=1)
    assert "bundled-llama" in result.stdout.str()
    assert "bundled-gpt2" not in result.stdout.str()


@pytest.mark.own_process
def test_runs_without_claims_do_not_import_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\ndef test_it(): assert not {'torch', 'nnsight', 'transformers'} & set(sys.modules)")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


SHARED = """
import pytest

@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("model", ["bundled-gpt2", "bundled-llama"])
def test_claim(model, number):
    pass

def test_without_model():
    pass
"""


def test_claims_of_several_files_about_one_model_are_judged_by_one_worker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_one=SHARED, test_two=SHARED)
    result = pytester.runpytest_subprocess("-v", "-n2", "--dist=loadfile", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=18)
    passed = r"\[(gw\d)\].* PASSED test_(?:one|two)\.py::test_claim\[(bundled-\w+)-\d\]"
    judged = re.findall(passed, result.stdout.str())
    assert len(judged) == 16
    by_model = {model: {worker for worker, other in judged if other == model} for _, model in judged}
    assert {len(workers) for workers in by_model.values()} == {1}
    assert by_model["bundled-gpt2"] != by_model["bundled-llama"]


@pytest.mark.own_process
@pytest.mark.parametrize(("models", "threads"), [(["gpt2"], 2), (["gpt2", "llama"], 1)], ids=["one model", "two"])
def test_workers_without_a_model_leave_their_cores_to_the_others(
    pytester: pytest.Pytester,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    models: list[str],
    threads: int,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    pytester.makepyfile(f"""
        import torch
        def test_it(attribution_model):
            assert torch.get_num_threads() == {threads}
    """)
    options = [f"--model={folders[each]}" for each in models]
    pytester.runpytest_subprocess(*options, "-n2", "-p", "no:cacheprovider").assert_outcomes(passed=len(models))
