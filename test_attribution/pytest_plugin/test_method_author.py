"""An author of a method writes ten lines in a conftest.py, and it joins every claim: the example of docs/methods.md."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
EXAMPLE = re.search(
    r"```python conftest.py\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.DOTALL
)


def _claims() -> list[str]:
    """What the author names to run the claims: the installed package, or the folder of a development install."""
    if importlib.util.find_spec("attribution.test_faithfulness"):
        return ["--pyargs", "attribution.test_faithfulness"]
    return [".", str(ROOT / "test_faithfulness"), "--rootdir=.", "--import-mode=importlib"]


@pytest.fixture
def author(pytester: pytest.Pytester) -> pytest.Pytester:
    assert EXAMPLE is not None
    assert len(EXAMPLE[1].strip().splitlines()) <= 10
    pytester.makeconftest(EXAMPLE[1])
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider")
    return pytester


def test_registered_method_joins_every_claim_about_methods(author: pytest.Pytester) -> None:
    result = author.runpytest_subprocess(*_claims(), "--collect-only", "-q", "--model=bundled:gpt2")
    found = [line.split("::")[-1] for line in result.outlines if "::" in line]
    papers = {name for name in found if "log_prob_increase" in name}
    authors = {name for name in found if re.search(r"\bgpt2-logit\b", name)}
    assert len(papers) > 50
    assert {name.replace("log_prob_increase", "logit") for name in papers} == authors


def test_registered_method_is_measured_and_shown_beside_the_papers(author: pytest.Pytester) -> None:
    chosen = "top_10_hurts and coefficient-logp"
    result = author.runpytest_subprocess(*_claims(), "--model=bundled:gpt2", "--max-prompts=30", "-k", chosen)
    # Thirty prompts decide nothing, and say so.
    result.assert_outcomes(skipped=2, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(
        [
            "bundled:gpt2 knows * of 2172 prompts, * of 661 facts: capital * of * (* of *), color *",
            "model * method * claim *",
            "bundled:gpt2 * log_prob_increase * top 10 vs coefficient: logp * 30 * undecided: 30 of 300 prompts",
            "bundled:gpt2 * logit * top 10 vs coefficient: logp * 30 * undecided: 30 of 300 prompts",
        ]
    )
