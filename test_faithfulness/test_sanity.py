"""A scorer that is broken on purpose loses its effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_methods import sanity
from attribution.claims.bench import Workbench
from attribution.claims.judge import Verdict

pytestmark = pytest.mark.sanity


@pytest.mark.parametrize("control", sanity.CONTROLS)
def test_broken_scorer_loses_its_effect(
    attribution_bench: Workbench, attribution_method: str, control: str, assert_claim: Callable[[Verdict], None]
) -> None:
    assert_claim(sanity.broken_scorer_loses_its_effect(attribution_bench, attribution_method, control))
