"""What is left without a prompt's query neurons (Table 7), and without the same number of random FFN neurons.

A query neuron is an FFN neuron that writes what the attention value neurons of a prompt read. As in Table 7, a prompt's
query neurons are those that activate its top attention value neurons, weighted by the judged method's own scores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import PROMPTS, budget_of
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Effects, NotApplicable
from attribution.engine.ablation import outcomes
from attribution.engine.metrics import by_metric
from attribution.engine.queries import query
from attribution.engine.ranking import Ranking
from attribution.records import FFNNeuron, Unit

__all__ = [
    "fall_without_query_neurons",
    "fall_without_random_ffn_neurons",
    "lead_over_random_neurons",
    "lead_over_the_same_layers",
    "left_without_query_neurons",
    "query_budget",
    "strongest",
    "query_neurons_of",
]

_NO_VALUE_NEURONS = NotApplicable("the method does not score attention neurons, which are what query neurons activate")

# The paper's number, and the share at which the registry's rule for value neurons stops a small model from losing so
# many neurons that random ones are no control.
_MOST, _LARGEST_SHARE = 1000, 0.05


def query_budget(bench: Workbench) -> int:
    """Return how many query neurons are zeroed: the paper's 1,000, or 5% of a smaller model's FFN neurons."""
    anatomy = bench.model.anatomy
    return min(_MOST, int(_LARGEST_SHARE * anatomy.layers * anatomy.ffn_neurons))


def strongest(bench: Workbench, method: str, unit: Unit, number: int) -> list[Ranking]:
    """Return the top neurons of :data:`PROMPTS` prompts, those at ``bench.sample.subset(PROMPTS)``."""
    return bench.rankings(method, unit, number, indices=bench.sample.subset(PROMPTS))


@measured_once
def query_neurons_of(bench: Workbench, method: str) -> list[list[FFNNeuron]]:
    """Return the query neurons of the prompts at ``bench.sample.subset(PROMPTS)``, best first; found once."""
    rankings = strongest(bench, method, "attention", budget_of(bench, method)["attention"])
    if not rankings:
        return []
    prompts = [bench.prompts[place] for place in bench.sample.subset(PROMPTS)]
    return [each.neurons for each in query(bench.model, prompts, value_neurons=rankings, k=query_budget(bench))]


def _of_the_same_layers(bench: Workbench, chosen: list[list[FFNNeuron]], seed: int) -> list[list[FFNNeuron]]:
    """Draw as many other FFN neurons from each layer; fewer where a layer has too few others."""
    drawn = []
    for place, neurons in zip(bench.sample.subset(PROMPTS), chosen, strict=True):
        rng = np.random.default_rng(bench.sample.questions[place].seed(seed))
        own = []
        for layer in sorted({neuron.layer for neuron in neurons}):
            taken = [neuron.index for neuron in neurons if neuron.layer == layer]
            others = np.setdiff1d(np.arange(bench.model.anatomy.ffn_neurons), taken)
            picked = rng.choice(others, min(len(taken), len(others)), replace=False)
            own += [FFNNeuron(layer, index) for index in picked.tolist()]
        drawn.append(own)
    return drawn


@measured_once
def left_without_query_neurons(bench: Workbench, method: str) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """Return what is left of each metric on each prompt without its query neurons, and without others like them."""
    questions = [bench.sample.questions[place] for place in bench.sample.subset(PROMPTS)]
    chosen = query_neurons_of(bench, method)
    arms = {"query": chosen, "same layers": _of_the_same_layers(bench, chosen, bench.seed)}
    bar = bench.bar("ablation of query neurons")
    return {
        name: by_metric(outcomes(bench.model, questions, neurons, progress=bar)[0]) for name, neurons in arms.items()
    }


def _left_by_random(bench: Workbench, seed: int, metric: str) -> npt.NDArray[np.float64]:
    """Return what is left without FFN neurons drawn uniformly from all, for every prompt separately."""
    frame = bench.frames(("random",), {"ffn": query_budget(bench)}, seed=seed, number=PROMPTS)["random"]
    return np.asarray(frame[f"{metric}_after"], dtype=np.float64)


def lead_over_random_neurons(bench: Workbench, method: str, metric: str) -> Effects | NotApplicable:
    """Measure how much more of a metric random FFN neurons leave than query neurons, which may be among them."""
    if "attention" not in budget_of(bench, method):
        return _NO_VALUE_NEURONS
    by_random, left = _left_by_random(bench, bench.seed, metric), left_without_query_neurons(bench, method)
    return Effects(by_random - left["query"][metric], indices=bench.sample.subset(PROMPTS), seed=bench.seed)


def lead_over_the_same_layers(bench: Workbench, method: str, metric: str) -> Effects | NotApplicable:
    """Measure how much more of a metric other neurons of the same layers leave than query neurons."""
    if "attention" not in budget_of(bench, method):
        return _NO_VALUE_NEURONS
    left = left_without_query_neurons(bench, method)
    return Effects(
        left["same layers"][metric] - left["query"][metric], indices=bench.sample.subset(PROMPTS), seed=bench.seed
    )


def fall_without_query_neurons(
    bench: Workbench, method: str, metric: str, *, note: str = ""
) -> Effects | NotApplicable:
    """Measure how far a metric falls without query neurons."""
    if "attention" not in budget_of(bench, method):
        return _NO_VALUE_NEURONS
    indices = bench.sample.subset(PROMPTS)
    before = bench.before[metric][indices]
    left = left_without_query_neurons(bench, method)["query"][metric]
    return Effects(before - left, baselines=before, indices=indices, note=note)


def fall_without_random_ffn_neurons(bench: Workbench, metric: str, *, seed: int) -> Effects:
    """Measure how far a metric falls without random FFN neurons, as many as there are query neurons."""
    indices = bench.sample.subset(PROMPTS)
    before = bench.before[metric][indices]
    return Effects(before - _left_by_random(bench, seed, metric), baselines=before, indices=indices, seed=seed)
