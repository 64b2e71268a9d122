"""What activates the neurons that hold knowledge, and how the answer develops on the way to the final state.

Each test states its claim, measures its effects, one for each prompt, and judges the claim by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attribution.claims.about_methods.query_neurons import query_budget
from attribution.claims.about_models import curves, query_side
from attribution.claims.about_models.survey import survey
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Claim, Verdict

Show = Callable[[Workbench, Callable[[Workbench], Exhibit]], None]

pytestmark = pytest.mark.knowledge

# Fewer prompts decide nothing.
MIN_PROMPTS = 100
# The way from the embedding to the final state, and where the paper sees each curve as a line: first and last segment.
SEGMENTS = 60
STRAIGHT = {"logp": (0, 40), "prob": (40, 60)}
# Nine tenths of the variance.
FLOOR = 0.9


def test_attention_value_neurons_are_woken_by_lower_layers_than_ffn_ones(
    attribution_bench: Workbench,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, query_side.query_layers_of_ffn_neurons)
    attribution_exhibit(attribution_bench, query_side.query_layers_of_attention_neurons)
    bench = attribution_bench
    number = survey(bench).top_layers
    claim = Claim(
        id="attention value neurons are woken from below",
        sentence=f"the {number} layers with the largest part in waking attention value neurons lie below those for FFN "
        "value neurons",
        source="Tables 6 and 14",
        effect="mean depth of the query layers of FFN value neurons minus that for attention ones, 0 to 1",
        test="above",
        threshold=0.0,
        control="the query layers of the same prompts' FFN value neurons",
        min_prompts=MIN_PROMPTS,
        family="query layers",
        gated=False,
    )
    effects = query_side.how_much_deeper_ffn_neurons_read(bench)
    assert_claim(bench.verdict(claim, effects))


def test_query_neurons_that_are_no_value_neurons_lie_below_those_that_are(
    attribution_bench: Workbench,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, query_side.query_and_value_neurons)
    bench = attribution_bench
    number = query_budget(bench)
    claim = Claim(
        id="query-only neurons lie shallower",
        sentence=f"of the top {number} query neurons, those that are not among the top {number} value neurons lie "
        "below those that are",
        source="Figure 8",
        effect="mean depth of query neurons that are value neurons too, minus that of the others, 0 to 1",
        test="above",
        threshold=0.0,
        control="the query neurons of the same prompts that are value neurons too",
        min_prompts=MIN_PROMPTS,
        family="query neurons",
        gated=False,
    )
    effects = query_side.how_much_deeper_value_neurons_are(bench)
    assert_claim(bench.verdict(claim, effects))


@pytest.mark.parametrize("piece", curves.PIECES)
def test_a_piece_of_the_curve_is_nearly_a_line(
    attribution_bench: Workbench,
    piece: Any,
    assert_claim: Callable[[Verdict], None],
    attribution_exhibit: Show,
) -> None:
    attribution_exhibit(attribution_bench, curves.curve)
    bench = attribution_bench
    first, last = STRAIGHT[piece]
    names = {"logp": "log-probability", "prob": "probability"}
    other = "prob" if piece == "logp" else "logp"
    claim = Claim(
        id=f"{piece} is a line from segment {first} to {last}",
        sentence=f"on the way from the embedding to the final state the answer's {names[piece]} is nearly a line from "
        f"segment {first} to {last} of {SEGMENTS}",
        source="Figures 3 and 10",
        effect="mean R^2 of a line through each prompt's curve there",
        test="above",
        threshold=FLOOR,
        control=f"the {names[other]} over the same segments",
        min_prompts=MIN_PROMPTS,
        comparisons=len(curves.PIECES),
        effect_bounds="share",
        family="curves",
        gated=False,
    )
    effects = curves.straightness_of(bench, piece, first, last, segments=SEGMENTS)
    assert_claim(bench.verdict(claim, effects))
