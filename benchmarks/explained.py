"""Measure what explains the claims that do not hold on a model: the figures of docs/real_models.md.

    python -m benchmarks.explained smollm2          # some ten minutes on two cores
    python -m benchmarks.explained gemma3_270m

Costs are falls of log p of the answer, in nats, when neurons are zeroed at every position, as means over prompts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import attribution as at
from attribution.claims.about_methods.common import METHOD, STEPS, budget_of
from attribution.claims.about_methods.plants import KINDS, Kind, planting_of, task_of
from attribution.claims.bench import Workbench
from attribution.claims.sample import Sample
from attribution.engine.ablation import outcomes
from attribution.engine.ranking import Search, rank_all
from attribution.experiments.planting import planted
from attribution.records import AttentionNeuron, Component

K = 10
RIVALS = ("log_prob", "prob_increase")
# How deep a planted neuron is looked for.
DEEP = 50


def _best(bench: Workbench, method: str) -> list[list[Component]]:
    every = range(len(bench.prompts))
    return [each[method]["ffn"].neurons for each in bench.ranked((method,), {"ffn": K}, indices=every)]


def _costs(bench: Workbench, sets: Sequence[Sequence[Component]], which: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return what zeroing costs each prompt, (n,)."""
    questions = [bench.sample.questions[place] for place in which]
    left = np.array([each.logp for each in outcomes(bench.model, questions, sets)[0]])
    return np.asarray(bench.before["logp"][list(which)] - left, dtype=np.float64)


def _shared(bench: Workbench, own: list[list[Component]], others: list[list[Component]], name: str) -> None:
    """Print what two choices share, and what each part costs."""
    every = range(len(own))
    pairs = [(set(one), set(other)) for one, other in zip(own, others, strict=True)]
    parts = {
        "all of the method's": own,
        f"all by {name}": others,
        "shared": [list(one & other) for one, other in pairs],
        "only the method's": [list(one - other) for one, other in pairs],
        f"only by {name}": [list(other - one) for one, other in pairs],
    }
    costs = {part: float(_costs(bench, sets, every).mean()) for part, sets in parts.items()}
    overlap = np.mean([len(one & other) for one, other in pairs])
    print(f"beside {name}: {overlap:.1f} of {K} shared; cost of " + ", ".join(f"{k} {v:.2f}" for k, v in costs.items()))


def top_tens(bench: Workbench) -> None:
    """Print where top tens lie, what they share and what their parts cost."""
    last = bench.model.anatomy.layers - 1
    own = _best(bench, METHOD)
    for method in (METHOD, *RIVALS):
        layers = [neuron.layer for neurons in _best(bench, method) for neuron in neurons]
        shares = ", ".join(f"{last - back}: {layers.count(last - back) / len(layers):.0%}" for back in range(3))
        print(f"{method}: share of its top {K} in block {shares}")
    for rival in RIVALS:
        _shared(bench, own, _best(bench, rival), rival)
    counts = Counter(neuron for neurons in own for neuron in neurons)
    for neuron, number in counts.most_common(6):
        which = [place for place, neurons in enumerate(own) if neuron in neurons]
        cost = _costs(bench, [[neuron]] * len(which), which)
        print(f"{neuron}: among the top {K} of {number} of {len(own)} prompts, costs {cost.mean():.3f} alone")


def other_answers(bench: Workbench) -> None:
    """Print what the neurons ranked for another answer of the category take."""
    others = {prompt.text: prompt for prompt in bench.sample.swapped}
    asked = [others[prompt.text] for prompt in bench.prompts]
    rankings = at.attribute(bench.model, asked, k=K)
    _shared(bench, _best(bench, METHOD), [each.neurons for each in rankings], "another answer")


def random_neurons(bench: Workbench) -> None:
    """Print how the loss without random neurons is spread over prompts."""
    for budget in (budget_of(bench, METHOD), {"ffn": 1000}):
        frame = bench.frames(("random",), budget)["random"]
        left = (frame["prob_after"] / frame["prob_before"]).to_numpy()
        print(
            f"{sum(budget.values())} random neurons: the median prompt loses {1 - np.median(left):.0%} of p, "
            f"{np.mean(left < 0.5):.0%} of {len(left)} lose more than half; the mean loses "
            f"{1 - frame['prob_after'].mean() / frame['prob_before'].mean():.0%}"
        )


def above_plants(bench: Workbench, kind: Kind, strength: float) -> None:
    """Print at which place planted neurons are ranked, and what is ranked above those that are not first."""
    task, planting = task_of(bench), planting_of(bench, kind)
    decoys = set(planting.values)
    unit = "ffn" if kind == "ffn" else "attention"
    places, above, layers = [], Counter[str](), []
    with planted(bench.model, planting.at(strength)) as model:
        ranked = rank_all(model, task.questions, {METHOD: {unit: DEEP}}, Search(0, STEPS))
    for row, best in enumerate(ranked):
        neurons = [
            AttentionNeuron(each.layer, each.head, each.dim, 0) if isinstance(each, AttentionNeuron) else each
            for each in best[METHOD][unit].neurons
        ]
        own = planting.values[task.column[row]]
        place = neurons.index(own) if own in neurons else DEEP
        places.append(place + 1)
        for neuron in neurons[:place]:
            above["another plant" if neuron in decoys else "a neuron of the model"] += 1
            layers.append(neuron.layer / (model.anatomy.layers - 1))
    found = np.array(places)
    print(
        f"planted {kind}, strength {strength:g}: first in {np.mean(found == 1):.0%} of {len(found)}, second or third "
        f"in {np.mean((found > 1) & (found <= 3)):.0%}, beyond {DEEP} in {np.mean(found > DEEP):.0%}; above them "
        f"{dict(above)}, at a mean depth of {np.mean(layers or [0]):.2f}"
    )
    firsts = Counter(
        str(best[METHOD][unit].neurons[0]).partition("@")[0]
        for best, place in zip(ranked, places, strict=True)
        if place > 1
    )
    print(f"    first instead: {', '.join(f'{name} {number} times' for name, number in firsts.most_common(5))}")


def main() -> None:
    """Print every figure of the models named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", help="names of the registry, hub ids or folders")
    parser.add_argument("--prompts", type=int, help="on at most this many known prompts; on all when left out")
    options = parser.parse_args()
    for name in options.models:
        bench = Workbench(Sample(at.load(name), at.load_knowledge(), max_prompts=options.prompts))
        start = bench.before["logp"].mean()
        print(f"{name}: {len(bench.prompts)} prompts, one of each known fact; mean log p {start:.2f}")
        top_tens(bench)
        other_answers(bench)
        random_neurons(bench)
        for kind in KINDS:
            for strength in (1.0, 2.0):
                above_plants(bench, kind, strength)


if __name__ == "__main__":
    main()
