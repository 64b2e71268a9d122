"""What the authors' notebooks printed for the paper's models is what this engine computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_notebooks import sections
from attribution.claims.about_notebooks.printed import SECTIONS
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.claims.paper import PAPER_MODELS

pytestmark = [pytest.mark.knowledge, pytest.mark.identity, pytest.mark.about_models(*PAPER_MODELS)]


@pytest.mark.parametrize("section", SECTIONS)
def test_engine_computes_what_the_notebook_printed(
    attribution_bench: Workbench, section: str, assert_claim: Callable[[Verdict], None]
) -> None:
    bench, figures = attribution_bench, sections.figures_about(attribution_bench, section)
    # 1. What is claimed.
    claim = Claim(
        id=f"notebook: {section.replace('_', ' ')}",
        sentence=f"{section.replace('_', ' ')} of the notebook's prompt are what the notebook printed",
        source=sections.cells_of(figures, section),
        effect="largest difference of a figure, in tolerances of print and float32",
        test="at_most",
        threshold=1,
        control="each kind of figure, changed by three printed units, exceeds it (claims/test_published.py)",
        # The printed figures are the baseline.
        gated=False,
    )
    # 2. What is measured: the figure that is farthest from the printed one.
    difference = sections.farthest_figure(bench, figures, section)
    # 3. The claim is judged by it.
    assert_claim(bench.verdict(claim, difference))
