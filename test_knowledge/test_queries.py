"""What wakes the neurons that hold knowledge, and how the answer comes about on the way to the final state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attribution.claims.about_models import curves, waking
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict

Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

pytestmark = pytest.mark.knowledge


def test_attention_value_neurons_are_woken_by_lower_layers_than_ffn_ones(
    attribution_bench: Workbench,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, waking.query_layers_of_ffn_neurons)
    attribution_exhibit(attribution_bench, waking.query_layers_of_attention_neurons)
    assert_claim(waking.attention_value_neurons_are_woken_below_ffn_ones(attribution_bench))


def test_query_neurons_that_are_no_value_neurons_lie_below_those_that_are(
    attribution_bench: Workbench,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, waking.query_and_value_neurons)
    assert_claim(waking.query_only_neurons_lie_shallower(attribution_bench))


@pytest.mark.parametrize("piece", curves.PIECES)
def test_a_piece_of_the_curve_is_nearly_a_line(
    attribution_bench: Workbench,
    piece: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, curves.curve)
    assert_claim(curves.curve_is_straight(attribution_bench, piece))
