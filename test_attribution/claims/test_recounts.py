"""What is counted again agrees with the engine in every architecture; test_faults.py shows that it can disagree."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attribution.claims.about_the_engine import by_hand, known_truths, recounts
from attribution.claims.bench import Workbench
from attribution.claims.judge import Status, Verdict
from attribution.models.model import Model
from attribution.prompts.knowledge import Fact, Knowledge
from attribution.records import Unit

# Of different lengths, so that one of them is padded.
KNOWLEDGE = Knowledge(
    (
        Fact("capital", "capital", "France", "Paris", ("The capital of {subject} is",)),
        Fact("color", "color", "ripe cherry", "red", ("A {subject} is",)),
        Fact("number", "number", "dog", "four", ("The number of legs that a {subject} has is",)),
    ),
    {},
)
CLAIMS: dict[str, Callable[[Workbench], Verdict]] = {
    "judge": known_truths.judge_gives_known_verdicts,
    "metrics": known_truths.metrics_give_known_outcomes,
    "query": recounts.query_scores_follow_their_definition,
    "controls": recounts.controls_are_drawn_as_stated,
}


def _scores(unit: Unit) -> Callable[[Workbench], Verdict]:
    return lambda bench: recounts.scores_follow_their_definition(bench, unit)


def _top(unit: Unit) -> Callable[[Workbench], Verdict]:
    return lambda bench: recounts.top_neurons_are_the_top(bench, unit)


def _ablation(kind: str) -> Callable[[Workbench], Verdict]:
    return lambda bench: by_hand.ablation_is_what_hooks_do(bench, kind)


def _backward(method: str) -> Callable[[Workbench], Verdict]:
    return lambda bench: by_hand.backward_passes_are_what_hooks_find(bench, method)


CLAIMS |= {f"scores of {unit}": _scores(unit) for unit in recounts.SCORED_UNITS}
CLAIMS |= {f"top {unit}": _top(unit) for unit in recounts.SEARCHED_UNITS}
CLAIMS |= {f"ablation {kind}": _ablation(kind) for kind in by_hand.ABLATIONS}
CLAIMS |= {f"scores by {method}": _backward(method) for method in by_hand.BACKWARD}


def _bench(model: Model, *, known: bool) -> Workbench:
    bench = Workbench(model, KNOWLEDGE)
    # Random models know nothing; what is counted here does not depend on knowledge.
    bench.__dict__["known"] = list(KNOWLEDGE.prompts) if known else []
    return bench


def test_the_engine_agrees_with_its_definitions_in_every_architecture(architecture_model: Model) -> None:
    bench = _bench(architecture_model, known=True)
    verdicts = [claim(bench) for claim in CLAIMS.values()]
    assert not [verdict.sentence() for verdict in verdicts if verdict.status is not Status.SUPPORTED]


@pytest.mark.parametrize("claim", CLAIMS)
def test_without_a_known_prompt_nothing_of_a_model_is_supported(model: Model, claim: str) -> None:
    verdict = CLAIMS[claim](_bench(model, known=False))
    # The judge and the metrics are not asked about the model.
    assert verdict.status is (Status.SUPPORTED if claim in ("judge", "metrics") else Status.INCONCLUSIVE)
    assert (verdict.n == 0) is (verdict.status is Status.INCONCLUSIVE)
