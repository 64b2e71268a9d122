"""The plugin's options, from outside: what each does to a run, and whose they are where names collide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attribution.models.registry import registry

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
PROMPTS = "prompts: bundled, 2172 prompts of 661 facts in capital, color, country, language, month, number"

CLAIM = """
from attribution.claims.judge import Claim, judge

def test_own(attribution_model, assert_claim):
    claim = Claim("own", "a sentence", "ours", "an effect", "above", 0, "none")
    assert_claim(judge(claim, model=attribution_model.name, effects=[-1 + n / 100 for n in range(20)],
                       facts=[str(n) for n in range(20)]))

def test_of_a_family(attribution_model, assert_claim):
    claim = Claim("shipped", "a sentence", "ours", "an effect", "above", 0, "none", family="deletion")
    assert_claim(judge(claim, model=attribution_model.name, effects=[-1 + n / 100 for n in range(20)],
                       facts=[str(n) for n in range(20)]))
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nfilterwarnings = error")
    return pytester


def _header(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith(("attribution:", "prompts:"))]


def test_claims_of_a_family_are_reported_on_a_model_that_the_registry_says_nothing_of(
    suite: pytest.Pytester, folders: dict[str, Path]
) -> None:
    suite.makepyfile(CLAIM)
    result = suite.runpytest_subprocess(f"--model={folders['gpt2']}")
    assert _header(result) == [f"attribution: {folders['gpt2']} in float32 on cpu", PROMPTS]
    # Somebody's own claim is binding everywhere.
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*gpt2: float32 on cpu*",
            "model * claim *",
            "* own * refuted",
            "reported, not asserted",
            "* shipped * refuted",
            "0 supported, 1 refuted, 0 inconclusive, 1 reported",
            f"1 claim was not binding on {folders['gpt2']}; --attribution-assert makes it so",
        ]
    )
    result = suite.runpytest_subprocess(f"--model={folders['gpt2']}", "--attribution-assert")
    result.assert_outcomes(failed=2)
    assert "not binding" not in result.stdout.str()


def test_claims_of_a_family_are_binding_where_the_registry_asserts_them(suite: pytest.Pytester) -> None:
    suite.makepyfile(CLAIM)
    suite.runpytest_subprocess("--model=bundled:gpt2").assert_outcomes(failed=2)


def test_models_of_pyproject_are_the_ones_that_run_and_assert_what_it_says(
    pytester: pytest.Pytester, folders: dict[str, Path]
) -> None:
    pytester.makepyfile(CLAIM)
    pytester.makepyprojecttoml(f"""
        [tool.pytest.ini_options]
        addopts = ["--strict-markers", "-p", "no:cacheprovider"]
        [tool.attribution.models.mine]
        source = "{folders["gpt2"]}"
        dtype = "float64"
        asserted = {{ deletion = "seen in May" }}
        [tool.attribution.models.theirs]
        source = "{folders["llama"]}"
        [tool.attribution.models.remote]
        source = "org/remote"
    """)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(failed=3, passed=1, deselected=2)
    assert _header(result) == [
        f"attribution: mine from {folders['gpt2']} in float64 on cpu",
        f"attribution: theirs from {folders['llama']} in float32 on cpu",
        PROMPTS,
    ]
    # By marker, as those of the registry.
    pytester.runpytest_subprocess("-m", "theirs").assert_outcomes(failed=1, passed=1, deselected=4)
    pytester.makepyprojecttoml("[tool.attribution.models.mine]\nsuorce = 'x'")
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"ERROR: .*pyproject.toml: .*'suorce'", result.stderr.str())


def test_header_says_what_a_run_is_about_and_nothing_where_it_is_about_no_model(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_it(): pass")
    assert _header(suite.runpytest_subprocess()) == []
    options = ("--dtype=bfloat16", "--max-prompts=5", "--seed=3", "--revision=v2", "--device=cuda:1")
    assert _header(suite.runpytest_subprocess("-m", "gpt2 and not identity", *options)) == [
        "attribution: gpt2 from openai-community/gpt2 at v2 in bfloat16 on cuda:1",
        f"{PROMPTS}; at most 5 for each model; seed 3",
    ]
    revision = registry()["mistral-7b"].revision
    assert _header(suite.runpytest_subprocess("-m", "mistral_7b or bundled"))[:-1] == [
        "attribution: bundled:gpt2 in float32 on cpu",
        "attribution: bundled:llama in float32 on cpu",
        f"attribution: mistral-7b from mistralai/Mistral-7B-v0.1 at {revision} in bfloat16 on cpu",
    ]


def test_models_are_loaded_as_the_options_say(suite: pytest.Pytester) -> None:
    suite.makepyfile("""
        def test_it(attribution_model, attribution_bench, attribution_prompts):
            assert str(attribution_model.anatomy.readout.unembedding.dtype) == "torch.bfloat16"
            assert attribution_bench.model is attribution_model
            assert attribution_bench.seed == 3
            assert attribution_bench.sample.max_prompts == 5
            assert attribution_prompts is attribution_bench.prompts
    """)
    # What a model knows is asked of all prompts first, and takes long in bfloat16.
    suite.makeconftest("def pytest_attribution_categories(): return ['month']")
    result = suite.runpytest_subprocess(
        "--model=bundled:gpt2", "--dtype=bfloat16", "--max-prompts=5", "--seed=3", "--device", "cpu"
    )
    result.assert_outcomes(passed=1)


OTHERS = """
def pytest_addoption(parser):
    parser.addoption("--device", choices=["left", "right"], default="left")
    parser.addoption("--seed", action="store_true")
    parser.addoption("--model", type=int)
"""


def test_short_options_give_way_to_those_of_a_conftest(suite: pytest.Pytester, folders: dict[str, Path]) -> None:
    suite.makeconftest(OTHERS)
    suite.makepyfile("""
        def test_it(request, attribution_model, attribution_bench):
            assert request.config.getoption("--device") == "right"
            assert request.config.getoption("--seed") is True
            assert request.config.getoption("--model") == 7
            assert str(attribution_model.device) == "cpu"
            assert attribution_bench.seed == 5
            assert attribution_bench.sample.max_prompts == 4
    """)
    result = suite.runpytest_subprocess(
        *("--device=right", "--seed", "--model=7"),
        *("--attribution-device=cpu", "--attribution-seed=5", f"--attribution-model={folders['gpt2']}"),
        *("--max-prompts", "4"),
    )
    result.assert_outcomes(passed=1)


def test_markers_of_ones_own_are_left_alone(suite: pytest.Pytester) -> None:
    """A suite of somebody's may mark its tests by the name of a model that this one knows."""
    suite.makepyfile("""
        import pytest
        @pytest.mark.gpt2
        @pytest.mark.parametrize("name", ["gpt2"])
        def test_theirs(name): pass
    """)
    suite.runpytest_subprocess().assert_outcomes(passed=1)
    suite.runpytest_subprocess("-m", "gpt2", "-n2").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype=int8"], ["--attribution-dtype", "int8", "float32"]),
        (["--seed=x"], ["'x' is not a seed", "whole number"]),
        (["--seed=-1"], ["'-1' is not a seed"]),
        (["--max-prompts=0"], ["'0' is not a number of prompts"]),
        (["--revision=v2", "-m", "gpt2 or llama"], ["--revision=v2", "2", "name one"]),
        (["--prompts=nowhere.csv"], ["nowhere.csv"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_option_that_cannot_be_meant_is_an_error_in_one_line(
    suite: pytest.Pytester, options: list[str], words: list[str]
) -> None:
    suite.makepyfile("def test_it(attribution_model): pass")
    result = suite.runpytest_subprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in result.stderr.str()
    (line,) = [line for line in result.errlines if re.search(r": error: |^ERROR: (?!usage)", line)]
    for word in words:
        assert word in line


def test_another_seed_draws_other_controls_and_is_part_of_the_record(suite: pytest.Pytester) -> None:
    claims = (ROOT / "test_faithfulness" / "test_value_neurons.py").read_text(encoding="utf-8")
    suite.makepyfile(test_claims=claims)
    suite.makeconftest("def pytest_attribution_categories(): return ['month']")
    chosen = "mrr and (seed1 or matched_layer_and_norm)"
    effects = {}
    for name, seed in (("zero", 0), ("five", 5), ("again", 5)):
        # Eight prompts decide nothing, and are measured all the same.
        result = suite.runpytest_subprocess(
            "--model=bundled:gpt2", "--max-prompts=8", f"--seed={seed}", f"--attribution-save={name}", "-k", chosen
        )
        assert f"random neurons, seed {seed + 1}: mrr" in result.stdout.str()
        records = json.loads((suite.path / ".attribution" / f"{name}.json").read_text(encoding="utf-8"))["claims"]
        effects[name] = {record["claim"]["id"].split(",")[0]: (record["seed"], record["effect"]) for record in records}
    assert effects["five"] == effects["again"]
    assert {seed for seed, _ in effects["zero"].values()} == {0, 1}
    assert effects["five"].keys() == effects["zero"].keys()
    for claim, (seed, _) in effects["zero"].items():
        assert effects["five"][claim][0] == seed + 5
    assert [effect for _, effect in effects["five"].values()] != [effect for _, effect in effects["zero"].values()]
