"""Query neurons wake the value neurons: without them the answer goes (Table 7), without as many random ones it stays.

A query neuron is an FFN neuron that writes what the attention value neurons of a prompt read. As in Table 7, a prompt's
query neurons are those that wake its top attention value neurons, weighted by the judged method's own scores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import METRIC_NAMES, MIN_PROMPTS, budget_of, not_applicable
from attribution.claims.about_methods.value_neurons import MARGIN, SEEDS
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.ablation import outcomes
from attribution.engine.metrics import by_metric
from attribution.engine.queries import query
from attribution.engine.ranking import Ranking
from attribution.records import FFNNeuron, Unit

__all__ = [
    "PAPER_CUTS",
    "left_without_query_neurons",
    "query_budget",
    "query_neurons_beat_random_ones",
    "query_neurons_beat_those_of_the_same_layers",
    "query_neurons_cut",
    "random_ffn_neurons_have_no_effect",
    "strongest",
    "waking",
]

PAPER_CUTS = {"mrr": (0.78, 0.98), "prob": (0.88, 0.99)}
"""Least and largest cell of the paper's Table 7: the share of each metric that 1,000 query neurons cut."""

# The paper's number, and the share at which the registry's rule for value neurons stops a small model from losing so
# many neurons that random ones are no control.
_MOST, _LARGEST_SHARE = 1000, 0.05


def query_budget(bench: Workbench) -> int:
    """Return how many query neurons are zeroed: the paper's 1,000, or 5% of a smaller model's FFN neurons."""
    anatomy = bench.model.anatomy
    return min(_MOST, int(_LARGEST_SHARE * anatomy.layers * anatomy.ffn_neurons))


def strongest(bench: Workbench, method: str, unit: Unit, number: int) -> list[Ranking]:
    """Return the top neurons of :data:`MIN_PROMPTS` prompts, those at ``bench.part(MIN_PROMPTS)``."""
    return bench.rankings(method, unit, number, places=bench.part(MIN_PROMPTS))


def waking(bench: Workbench, method: str) -> list[list[FFNNeuron]]:
    """Return the query neurons of the prompts at ``bench.part(MIN_PROMPTS)``, best first; found once."""

    def found() -> list[list[FFNNeuron]]:
        rankings = strongest(bench, method, "attention", budget_of(bench, method)["attention"])
        if not rankings:
            return []
        prompts = [bench.prompts[place] for place in bench.part(MIN_PROMPTS)]
        return [each.neurons for each in query(bench.model, prompts, value_neurons=rankings, k=query_budget(bench))]

    return bench.once(("waking", method), found)


def _of_the_same_layers(bench: Workbench, chosen: list[list[FFNNeuron]], seed: int) -> list[list[FFNNeuron]]:
    """Draw as many other FFN neurons from each layer; fewer where a layer has too few others."""
    drawn = []
    for place, neurons in zip(bench.part(MIN_PROMPTS), chosen, strict=True):
        rng = np.random.default_rng(bench.questions[place].seed(seed))
        own = []
        for layer in sorted({neuron.layer for neuron in neurons}):
            taken = [neuron.index for neuron in neurons if neuron.layer == layer]
            others = np.setdiff1d(np.arange(bench.model.anatomy.ffn_neurons), taken)
            picked = rng.choice(others, min(len(taken), len(others)), replace=False)
            own += [FFNNeuron(layer, index) for index in picked.tolist()]
        drawn.append(own)
    return drawn


def left_without_query_neurons(bench: Workbench, method: str) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """Return what is left of each metric on each prompt without its query neurons, and without others like them."""

    def measured() -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        questions = [bench.questions[place] for place in bench.part(MIN_PROMPTS)]
        chosen = waking(bench, method)
        arms = {"query": chosen, "same layers": _of_the_same_layers(bench, chosen, bench.seed)}
        return {name: by_metric(outcomes(bench.model, questions, neurons)[0]) for name, neurons in arms.items()}

    return bench.once(("query neurons", method), measured)


def _left_by_random(bench: Workbench, seed: int, metric: str) -> npt.NDArray[np.float64]:
    frame = bench.frames(("random",), {"ffn": query_budget(bench)}, seed=seed, number=MIN_PROMPTS)["random"]
    return np.asarray(frame[f"{metric}_after"], dtype=np.float64)


def _judged(
    bench: Workbench,
    claim: Claim,
    effects: npt.NDArray[np.float64],
    baselines: npt.NDArray[np.float64] | None = None,
    *,
    seed: int | None = None,
    note: str = "",
) -> Verdict:
    places = bench.part(MIN_PROMPTS)
    return bench.judge(claim, effects, baselines=baselines, places=places, seed=seed, note=note)


def _woken(bench: Workbench, method: str) -> str:
    return f"those that wake its top {budget_of(bench, method).get('attention', 0)} attention value neurons by {method}"


_NO_VALUE_NEURONS = "the method does not score attention neurons, which are what query neurons wake"


def query_neurons_beat_random_ones(bench: Workbench, method: str, metric: str, seed: int = 0) -> Verdict:
    """Judge that zeroing a prompt's query neurons hurts its answer more than zeroing as many random FFN neurons.

    The random ones are drawn uniformly from all FFN neurons, anew for every prompt; query neurons may be among them.
    """
    budget, seed = query_budget(bench), bench.seed + seed
    claim = Claim(
        id=f"{budget} query neurons vs random: {metric}",
        sentence=f"zeroing a prompt's {budget} query neurons, {_woken(bench, method)}, lowers {metric} more than "
        f"zeroing {budget} random FFN neurons",
        source="Table 7",
        effect=f"{METRIC_NAMES[metric]} left by random neurons minus that left by query neurons",
        test="above",
        threshold=0,
        family="deletion",
        control=f"the same prompts with {budget} random FFN neurons",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(METRIC_NAMES),
    )
    if "attention" not in budget_of(bench, method):
        return not_applicable(bench, claim, _NO_VALUE_NEURONS)
    effects = _left_by_random(bench, seed, metric) - left_without_query_neurons(bench, method)["query"][metric]
    return _judged(bench, claim, effects, seed=seed)


def query_neurons_beat_those_of_the_same_layers(bench: Workbench, method: str, metric: str) -> Verdict:
    """Report the harder control: query neurons lie in shallow layers, where any neuron may matter more."""
    budget = query_budget(bench)
    claim = Claim(
        id=f"{budget} query neurons vs the same layers: {metric}",
        sentence=f"zeroing a prompt's {budget} query neurons, {_woken(bench, method)}, lowers {metric} more than "
        "zeroing as many other FFN neurons of each layer",
        source="ours, after Table 7",
        effect=f"{METRIC_NAMES[metric]} left by the others minus that left by query neurons",
        test="above",
        threshold=0,
        control="the same prompts with as many random neurons of the same layers",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(METRIC_NAMES),
        asserted=False,
    )
    if "attention" not in budget_of(bench, method):
        return not_applicable(bench, claim, _NO_VALUE_NEURONS)
    left = left_without_query_neurons(bench, method)
    return _judged(bench, claim, left["same layers"][metric] - left["query"][metric], seed=bench.seed)


def query_neurons_cut(bench: Workbench, method: str, metric: str) -> Verdict:
    """Report which share of a metric query neurons take, beside the paper's."""
    budget = query_budget(bench)
    least, most = PAPER_CUTS[metric]
    claim = Claim(
        id=f"{budget} query neurons cut {metric}",
        sentence=f"zeroing a prompt's {budget} query neurons, {_woken(bench, method)}, cuts {metric} by over "
        f"{least:.0%}, the least of Table 7",
        source="Table 7",
        effect=f"fall of mean {metric} as a share of its start",
        test="above",
        threshold=least,
        control=f"{budget} random FFN neurons, judged by the equivalence claims",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(PAPER_CUTS),
        extremes="fall",
        asserted=False,
    )
    if "attention" not in budget_of(bench, method):
        return not_applicable(bench, claim, _NO_VALUE_NEURONS)
    before = bench.before[metric][bench.part(MIN_PROMPTS)]
    note = f"the paper's 1,000 query neurons cut {least:.0%} to {most:.0%}"
    return _judged(bench, claim, before - left_without_query_neurons(bench, method)["query"][metric], before, note=note)


def random_ffn_neurons_have_no_effect(bench: Workbench, method: str, seed: int, metric: str) -> Verdict:
    """Judge as many FFN neurons drawn uniformly, anew for every prompt."""
    budget, seed = query_budget(bench), bench.seed + seed
    claim = Claim(
        id=f"{budget} random FFN neurons, seed {seed}: {metric}",
        sentence=f"zeroing {budget} random FFN neurons changes {metric} by less than {MARGIN:.0%}",
        source="Table 7, random neurons",
        effect=f"fall of mean {metric} as a share of its start",
        test="within",
        threshold=MARGIN,
        family="equivalence",
        control=f"{budget} query neurons, judged by the claims that they do more than random ones",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(SEEDS) * len(PAPER_CUTS),
        extremes="fall",
    )
    before = bench.before[metric][bench.part(MIN_PROMPTS)]
    return _judged(bench, claim, before - _left_by_random(bench, seed, metric), before, seed=seed)
