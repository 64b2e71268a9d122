"""What a scorer that is broken on purpose leaves of its effect: if much is left, the effect was never the scorer's.

Three controls, each with the top FFN neurons and zero ablation in the model itself:

- sign flip: the neurons with the lowest scores;
- label shuffle: the neurons ranked for another answer of the same category;
- weight randomisation: the neurons ranked on a copy of the model with shuffled weights (Adebayo et al. 2018).
"""

from __future__ import annotations

import numpy as np

from attribution.claims.about_methods import single_neurons
from attribution.claims.about_methods.common import NO_FFN, STEPS
from attribution.claims.bench import Workbench
from attribution.claims.measured import Effects, NotApplicable
from attribution.engine.ablation import outcomes
from attribution.engine.methods import METHODS
from attribution.engine.metrics import by_metric
from attribution.engine.questions import Question, question_of
from attribution.engine.ranking import Search, rank_all
from attribution.experiments.randomisation import randomised
from attribution.models.model import Model
from attribution.records import Component

__all__ = ["lead_over_broken_scorer"]


def _ranked(model: Model, questions: list[Question], method: str, k: int, seed: int) -> list[list[Component]]:
    """Return the top k for each question, as ranked on a model."""
    found = rank_all(model, questions, {method: {"ffn": k}}, Search(seed, STEPS))
    return [each[method]["ffn"].neurons for each in found]


def _chosen(bench: Workbench, method: str, control: str, k: int) -> list[list[Component]]:
    """Return the neurons that a broken scorer chooses for each prompt that it is measured on."""
    if control == "sign flip":
        return [list(sample.lowest[:k]) for sample in single_neurons.samples(bench, method)]
    if control == "weight randomisation":
        return _ranked(randomised(bench.model, bench.seed), bench.sample.questions, method, k, bench.seed)
    others = {prompt.text: prompt for prompt in bench.sample.swapped}
    questions = [question_of(bench.model, others[prompt.text]) for prompt in bench.prompts]
    return _ranked(bench.model, questions, method, k, bench.seed)


def lead_over_broken_scorer(
    bench: Workbench, method: str, control: str, *, k: int, share: float
) -> Effects | NotApplicable:
    """Measure how much more a share of a method's effect is than what a control leaves of it, in nats.

    The effect is the fall of log p(answer) without the top k FFN neurons, and the note says which share of it is left.
    The sign flip is measured on fewer prompts: to know the lowest scores, all have to be computed.

    Args:
        bench: The model with its prompts.
        method: The method.
        control: What is broken, see the top of this module.
        k: How many neurons are zeroed.
        share: The share.
    """
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    indices = bench.sample.subset(single_neurons.PROMPTS) if control == "sign flip" else list(range(len(bench.prompts)))
    frame = bench.frames((method,), k)[method]
    whole = (frame["logp_before"] - frame["logp_after"]).to_numpy(dtype=np.float64)[indices]
    after, _ = outcomes(
        bench.model, [bench.sample.questions[place] for place in indices], _chosen(bench, method, control, k)
    )
    left = bench.before["logp"][indices] - by_metric(after)["logp"]
    note = f"{left.sum() / whole.sum():.1%} of the fall is left" if whole.sum() > 0 else ""
    return Effects(share * whole - left, indices=indices, seed=bench.seed, note=note)
