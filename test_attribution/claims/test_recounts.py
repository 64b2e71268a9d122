"""What is counted again agrees with the engine in every setting; test_faults.py shows that it can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attribution.claims.about_the_engine import by_hand, recounts
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status, Verdict
from attribution.claims.sample import Sample
from attribution.models.model import Model
from attribution.prompts.knowledge import Fact, Knowledge

# Tests are not a package, so this folder is on the path only while its module is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    from suite import module, verdict_of

DEFINITIONS = module("test_definitions")
# Of different lengths, so that one of them is padded.
KNOWLEDGE = Knowledge(
    (
        Fact("capital", "capital", "France", "Paris", ("The capital of {subject} is",)),
        Fact("color", "color", "ripe cherry", "red", ("A {subject} is",)),
        Fact("number", "number", "dog", "four", ("The number of legs that a {subject} has is",)),
    ),
    {},
)


def _claim(test: Callable[..., None], **parameters: Any) -> Callable[[Workbench], Verdict]:
    return lambda bench: verdict_of(test, bench, **parameters)


CLAIMS: dict[str, Callable[[Workbench], Verdict]] = {
    "judge": _claim(DEFINITIONS.test_numbers_with_a_known_truth_get_the_verdicts_that_they_should),
    "metrics": _claim(DEFINITIONS.test_logits_with_a_known_answer_are_measured_right),
    "query": _claim(DEFINITIONS.test_query_scores_are_what_they_are_defined_to_be),
    "controls": _claim(DEFINITIONS.test_controls_are_drawn_as_stated),
    **{
        f"{name} {value}": _claim(test, **{parameter: value})
        for name, test, parameter, values in (
            ("scores of", DEFINITIONS.test_scores_are_what_they_are_defined_to_be, "unit", recounts.SCORED_UNITS),
            ("top", DEFINITIONS.test_rankings_leave_nothing_better_out, "unit", recounts.SEARCHED_UNITS),
            ("ablation", DEFINITIONS.test_ablation_is_what_hooks_on_the_plain_model_do, "kind", by_hand.ABLATIONS),
            (
                "scores by",
                DEFINITIONS.test_backward_passes_say_what_gradients_of_the_plain_model_say,
                "method",
                by_hand.BACKWARD,
            ),
        )
        for value in values
    },
}


def _bench(model: Model, *, known: bool) -> Workbench:
    # Random models know nothing; what is counted here does not depend on knowledge.
    bench = Workbench(Sample(model, KNOWLEDGE, known=KNOWLEDGE.prompts if known else []))
    # Otherwise a bench that knows too little is replaced by one that asks all prompts.
    bench.of_the_engine = bench
    return bench


def test_the_engine_agrees_with_its_definitions_in_every_setting(representative_model: Model) -> None:
    bench = _bench(representative_model, known=True)
    verdicts = [claim(bench) for claim in CLAIMS.values()]
    assert not [verdict.sentence() for verdict in verdicts if verdict.status is not Status.SUPPORTED]


@pytest.mark.parametrize("claim", CLAIMS)
def test_without_a_known_prompt_nothing_of_a_model_is_supported(model: Model, claim: str) -> None:
    verdict = CLAIMS[claim](_bench(model, known=False))
    # The judge and the metrics are not asked about the model.
    assert verdict.status is (Status.SUPPORTED if claim in ("judge", "metrics") else Status.UNDECIDED)
    assert (verdict.n == 0) is (verdict.status is Status.UNDECIDED)
