"""What the authors' notebooks printed for the paper's models is what this engine computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_notebooks import sections
from attribution.claims.about_notebooks.printed import SECTIONS
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict
from attribution.claims.paper import PAPER_MODELS

pytestmark = [pytest.mark.knowledge, pytest.mark.identity, pytest.mark.about_models(*PAPER_MODELS)]


@pytest.mark.parametrize("section", SECTIONS)
def test_engine_computes_what_the_notebook_printed(
    attribution_bench: Workbench, section: str, assert_claim: Callable[[Verdict], None]
) -> None:
    assert_claim(sections.agrees_with_the_notebook(attribution_bench, section))
