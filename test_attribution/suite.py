"""The suite's tests as plain functions: what each of them judges, without pytest.

Tests of claims, and of faults that claims catch, run what users run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import util
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from attribution.claims.about_methods.common import METHOD
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict

ROOT = Path(__file__).resolve().parents[1]


@cache
def module(name: str) -> ModuleType:
    """Return a file of the suite, such as ``"test_planted"``, loaded once.

    It is not the copy that pytest collects, so a constant that is changed here stays what it is there.
    """
    (path,) = (
        path for path in ROOT.glob(f"test_*/{name}.py") if path.parent.name in ("test_faithfulness", "test_knowledge")
    )
    spec = util.spec_from_file_location(f"suite.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    found = util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def verdict_of(test: Callable[..., None], bench: Workbench, **parameters: Any) -> Verdict:
    """Return the verdict that a test of the suite asserts.

    Args:
        test: The test.
        bench: The model with its prompts.
        parameters: What the test is parametrized with; the method is the paper's if it is not among them.
    """
    verdicts: list[Verdict] = []
    fixtures = {
        "attribution_bench": bench,
        "attribution_method": METHOD,
        "assert_claim": verdicts.append,
        "attribution_exhibit": lambda *_: None,
    }
    wanted = signature(test).parameters
    test(**{name: value for name, value in fixtures.items() if name in wanted} | parameters)
    (verdict,) = verdicts
    return verdict
