"""A scorer that is broken on purpose loses its effect: otherwise it was never the scorer's.

Three controls, each with the top 10 FFN neurons and zero ablation in the model itself:

- sign flip: the neurons with the lowest scores;
- label shuffle: the neurons ranked for another answer of the same category;
- weight randomisation: the neurons ranked on a copy of the model with shuffled weights (Adebayo et al. 2018).
"""

from __future__ import annotations

import numpy as np

from attribution.claims.about_methods import single_neurons
from attribution.claims.about_methods.common import MIN_PROMPTS, NO_FFN, STEPS, not_applicable
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.ablation import outcomes
from attribution.engine.methods import METHODS
from attribution.engine.metrics import by_metric
from attribution.engine.questions import Question, question_of
from attribution.engine.ranking import Search, rank_all
from attribution.experiments.randomisation import randomised
from attribution.models.model import Model
from attribution.records import Component

__all__ = ["CONTROLS", "K", "broken_scorer_loses_its_effect"]

CONTROLS = {
    "sign flip": "with the lowest scores",
    "label shuffle": "ranked for another answer of the same category",
    "weight randomisation": "ranked on a copy of the model with shuffled weights",
}
"""What is broken, and which neurons that gives."""

K = single_neurons.TOP
# Of the effect, at least half has to be gone.
_SHARE = 0.5


def _ranked(model: Model, questions: list[Question], method: str, seed: int) -> list[list[Component]]:
    """Return the top 10 for each question, as ranked on a model."""
    found = rank_all(model, questions, {method: {"ffn": K}}, Search(seed, STEPS))
    return [each[method]["ffn"].neurons for each in found]


def _chosen(bench: Workbench, method: str, control: str) -> list[list[Component]]:
    """Return the neurons that a broken scorer chooses for each prompt that it is measured on."""
    if control == "sign flip":
        return [list(sample.lowest) for sample in single_neurons.samples(bench, method)]
    if control == "weight randomisation":
        return _ranked(randomised(bench.model, bench.seed), bench.questions, method, bench.seed)
    others = {prompt.text: prompt.answer for prompt in bench.swapped}
    questions = [question_of(bench.model, prompt.text, others[prompt.text]) for prompt in bench.prompts]
    return _ranked(bench.model, questions, method, bench.seed)


def broken_scorer_loses_its_effect(bench: Workbench, method: str, control: str) -> Verdict:
    """Judge that a control of :data:`CONTROLS` destroys at least half of what the top 10 neurons take.

    The sign flip is measured on fewer prompts: to know the lowest scores, all have to be computed.
    """
    flipped = control == "sign flip"
    places = bench.part(single_neurons.PROMPTS) if flipped else list(range(len(bench.prompts)))
    claim = Claim(
        id=f"{control} destroys the effect",
        sentence=f"zeroing the {K} FFN neurons {CONTROLS[control]} takes less than half of what the top {K} by "
        f"{method} take",
        source="ours, after Adebayo et al. 2018",
        effect=f"half of the fall of log p(answer) without the top {K} minus the fall without those of the control, in "
        "nats",
        test="above",
        threshold=0,
        family="sanity",
        control=f"the same prompts with the top {K}",
        min_prompts=single_neurons.MIN_PROMPTS if flipped else MIN_PROMPTS,
        method=method,
        comparisons=len(CONTROLS),
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    frame = bench.frames((method,), K)[method]
    whole = (frame["logp_before"] - frame["logp_after"]).to_numpy(dtype=np.float64)[places]
    after, _ = outcomes(bench.model, [bench.questions[place] for place in places], _chosen(bench, method, control))
    left = bench.before["logp"][places] - by_metric(after)["logp"]
    note = f"{left.sum() / whole.sum():.1%} of the fall is left" if whole.sum() > 0 else ""
    return bench.judge(claim, _SHARE * whole - left, places=places, seed=bench.seed, note=note)
