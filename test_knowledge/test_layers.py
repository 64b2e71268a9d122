"""Where knowledge lives, by layer and by head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attribution.claims.about_models import layers
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict

Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

pytestmark = pytest.mark.knowledge


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_layers_raise_the_answer_over_another(
    attribution_bench: Workbench,
    kind: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, layers.contributions)
    assert_claim(layers.layers_contribute(attribution_bench, kind))


def test_top_layers_lie_in_the_deeper_half(
    attribution_bench: Workbench,
    attribution_category: str,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, layers.top_layers)
    assert_claim(layers.layers_lie_deep(attribution_bench, attribution_category))


@pytest.mark.parametrize("part", layers.PARTS)
def test_related_categories_share_more_than_unrelated_ones(
    attribution_bench: Workbench,
    part: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, layers.top_layers if part == "layers" else layers.top_heads)
    assert_claim(layers.related_categories_share(attribution_bench, part))
