"""What is left without a few hundred value neurons (Table 13), and without the same number of random ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import OTHER_KINDS, PROMPTS, STEPS, budget_of
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Effects
from attribution.engine.ablation import outcomes
from attribution.engine.batching import batches_of
from attribution.engine.methods import method_named, score_candidates
from attribution.engine.metrics import by_metric
from attribution.engine.ranking import all_candidates
from attribution.experiments.controls import matched
from attribution.records import Component, unit_named

__all__ = [
    "fall_without_matched_neurons",
    "fall_without_random_neurons",
    "fall_without_value_neurons",
    "lead_over_matched_neurons",
]


def fall_without_value_neurons(bench: Workbench, method: str, metric: str, kind: str = "zero") -> Effects:
    """Measure how far a metric falls when attention and FFN value neurons are ablated together, at all positions."""
    # Ranking so many neurons takes far longer than any of the reruns.
    frames = bench.frames((method,), budget_of(bench, method), kind=kind, together=("zero", *OTHER_KINDS))
    before, after = frames[method][f"{metric}_before"], frames[method][f"{metric}_after"]
    return Effects(before - after, baselines=before)


def fall_without_random_neurons(bench: Workbench, method: str, metric: str, *, seed: int) -> Effects:
    """Measure the same for neurons drawn uniformly from all neurons of each unit, for every prompt separately.

    They are as many of each unit as the method's value neurons.
    """
    frame = bench.frames(("random",), budget_of(bench, method), seed=seed)["random"]
    before, after = frame[f"{metric}_before"], frame[f"{metric}_after"]
    return Effects(before - after, baselines=before, seed=seed)


def _matched(bench: Workbench, method: str, budget: dict[str, int], seed: int) -> tuple[list[list[Component]], float]:
    """Return matched controls for each prompt of a part, and their norms as a share of the value neurons'."""
    indices = bench.sample.subset(PROMPTS)
    asked = [bench.sample.questions[place] for place in indices]
    best = bench.ranked((method,), {unit_named(unit): number for unit, number in budget.items()}, indices=indices)
    controls: list[list[Component]] = [[] for _ in asked]
    norms = {"chosen": 0.0, "drawn": 0.0}
    for rows, batch in batches_of(bench.model, asked):
        questions = [asked[row] for row in rows]
        wanted = {unit_named(unit): [method_named("output_norm", unit_named(unit))] for unit in budget}
        found = all_candidates(bench.model, questions, batch, wanted, seed=seed, steps=STEPS)
        for row, by_unit in zip(rows, found, strict=True):
            for unit, candidates in by_unit.items():
                chosen = candidates.indices_of(best[row][method][unit].neurons)
                drawn = matched(candidates, chosen)
                controls[row] += candidates.records(drawn)
                size = score_candidates(wanted[unit][0], candidates)
                norms["chosen"] += float(size[chosen].sum())
                norms["drawn"] += float(size[drawn].sum())
    return controls, norms["drawn"] / norms["chosen"] if norms["chosen"] else float("nan")


@measured_once
def _left_by_matched(bench: Workbench, method: str) -> tuple[dict[str, npt.NDArray[np.float64]], float]:
    """Return what matched controls leave of each metric, and their norms as a share."""
    controls, share = _matched(bench, method, budget_of(bench, method), bench.seed)
    after, _ = outcomes(
        bench.model, [bench.sample.questions[place] for place in bench.sample.subset(PROMPTS)], controls
    )
    return by_metric(after), share


def fall_without_matched_neurons(bench: Workbench, method: str, metric: str) -> Effects:
    """Measure the same for other neurons of the same layers that write vectors of about the same norm."""
    left, share = _left_by_matched(bench, method)
    indices = bench.sample.subset(PROMPTS)
    before = bench.before[metric][indices]
    note = f"{share:.2f} of the value neurons' norms"
    return Effects(before - left[metric], baselines=before, indices=indices, seed=bench.seed, note=note)


def lead_over_matched_neurons(bench: Workbench, method: str, metric: str) -> Effects:
    """Measure how much more of a metric matched neurons leave than value neurons, as a share of its start."""
    left, _ = _left_by_matched(bench, method)
    indices = bench.sample.subset(PROMPTS)
    frame = bench.frames((method,), budget_of(bench, method))[method]
    after = frame[f"{metric}_after"].to_numpy(dtype=np.float64)[indices]
    return Effects(left[metric] - after, baselines=bench.before[metric][indices], indices=indices, seed=bench.seed)
