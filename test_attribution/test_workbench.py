"""What the claims of one model share."""

from __future__ import annotations

from attribution.claims import Claim, Status, judge
from attribution.knowledge import Fact, Knowledge
from attribution.model import Model
from attribution.workbench import Workbench

PHRASINGS = ("The capital of {subject} is", "The capital city of {subject} is", "In {subject} the capital is")
KNOWLEDGE = Knowledge(
    tuple(
        Fact("capital", "country_capital", subject, answer, PHRASINGS)
        for subject, answer in (("France", "Paris"), ("Italy", "Rome"))
    ),
    {"capital": ("Paris", "Rome")},
)


def test_model_that_knows_nothing_is_short_of_prompts_not_an_error(model: Model) -> None:
    bench = Workbench(model, KNOWLEDGE, progress=False)
    bench.__dict__["known"] = []
    frames = bench.experiment(("log_prob_increase", "random"), {"ffn": 3})
    effects = frames["random"]["mrr_after"] - frames["log_prob_increase"]["mrr_after"]
    claim = Claim("c", "a sentence", "ours", "an effect", "above", 0, "none", min_prompts=300)
    verdict = judge(claim, model="m", effects=effects.tolist(), facts=frames["random"]["fact"].tolist())
    assert (verdict.status, verdict.n, verdict.needed) == (Status.INCONCLUSIVE, 0, 300)


def test_experiment_gives_one_row_per_known_prompt_in_their_order(model: Model) -> None:
    bench = Workbench(model, KNOWLEDGE, progress=False)
    bench.__dict__["known"] = list(KNOWLEDGE.prompts)
    frames = bench.experiment(("log_prob_increase", "random"), {"ffn": 3})
    for frame in frames.values():
        assert frame["prompt"].tolist() == [prompt.text for prompt in KNOWLEDGE.prompts]
    assert bench.experiment(("log_prob_increase", "random"), {"ffn": 3})["random"].equals(frames["random"])


def test_control_asks_every_prompt_with_another_facts_answer(model: Model) -> None:
    swapped = Workbench(model, KNOWLEDGE, progress=False).swapped
    assert [prompt.answer for prompt in swapped] == [" Rome"] * 3 + [" Paris"] * 3
