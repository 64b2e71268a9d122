"""The best neurons matter most: ablating a method's top k hurts the answer more than any baseline's (Table 2)."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import (
    BASELINES,
    METRIC_NAMES,
    MIN_PROMPTS,
    NO_FFN,
    OTHER_KINDS,
    RIVALS,
    STEPS,
    not_applicable,
    rank_correlation,
)
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.ablation import outcomes
from attribution.engine.methods import METHODS
from attribution.engine.ranking import attribute
from attribution.records import Component

__all__ = [
    "CURVE",
    "K",
    "SUMMARIES",
    "beats_a_baseline",
    "beats_a_baseline_over_the_curve",
    "compared_with_a_rival",
    "kinds_agree",
]

K = 10
CURVE = (1, 2, 5, 10, 20, 50, 100)
SUMMARIES = {
    "area": "area under the curve of mean log-probability over log k, divided by its width, in nats",
    "comprehensiveness": "mean probability, averaged over k",
}
# Integrated gradients cost hundreds of passes for a prompt.
RIVAL_PROMPTS = 50


def _left(bench: Workbench, method: str, kind: str, metric: str, judged: str) -> npt.NDArray[np.float64]:
    """Return what the top 10 of a method leave of a metric; a judged method is measured with all its baselines.

    Returns:
        One number for each prompt; of kinds that are only reported, for those at ``bench.part(MIN_PROMPTS)``.
    """
    names = (judged, *BASELINES)
    if kind == "zero":
        frame = bench.frames(names, K)[method]
    else:
        frame = bench.frames(names, K, kind=kind, together=OTHER_KINDS, number=MIN_PROMPTS)[method]
    return np.asarray(frame[f"{metric}_after"], dtype=np.float64)


def beats_a_baseline(bench: Workbench, method: str, baseline: str, metric: str, kind: str = "zero") -> Verdict:
    """Judge one cell of Table 2: the top 10 FFN neurons of a method against those of a baseline.

    Zero ablation is the paper's and asserted; the other kinds are reported.
    """
    claim = Claim(
        id=f"top {K} vs {baseline}: {metric}" + ("" if kind == "zero" else f", {kind} ablation"),
        sentence=f"{kind} ablation of the top {K} FFN neurons by {method} lowers {metric} more than of the top {K} by "
        f"{baseline}",
        source="Table 2" if kind == "zero" else "Table 2, with another ablation",
        effect=f"{METRIC_NAMES[metric]} left by the baseline minus that left by the method",
        test="above",
        threshold=0,
        family="superiority",
        control=f"the same prompts with the top {K} by {baseline}",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(BASELINES) * len(METRIC_NAMES if kind == "zero" else OTHER_KINDS),
        asserted=kind == "zero",
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    effects = _left(bench, baseline, kind, metric, method) - _left(bench, method, kind, metric, method)
    return bench.judge(claim, effects, places=None if kind == "zero" else bench.part(MIN_PROMPTS))


def _summary(bench: Workbench, method: str, summary: str, judged: str) -> npt.NDArray[np.float64]:
    """Return one number for a whole deletion curve, smaller where more is lost, of each prompt of a part."""
    metric = "logp" if summary == "area" else "prob"
    frame = bench.frames((judged, *BASELINES), CURVE, number=MIN_PROMPTS)[method]
    points = np.stack([frame.loc[frame["k"] == k, f"{metric}_after"].to_numpy(dtype=np.float64) for k in CURVE])
    if summary == "area":
        widths = np.log(CURVE)
        return np.asarray(np.trapezoid(points, widths, axis=0) / (widths[-1] - widths[0]))
    return np.asarray(points.mean(0))


def beats_a_baseline_over_the_curve(bench: Workbench, method: str, baseline: str, summary: str) -> Verdict:
    """Judge a deletion curve as a whole, by its area or by its comprehensiveness (DeYoung et al. 2020)."""
    claim = Claim(
        id=f"deletion curve vs {baseline}: {summary}",
        sentence=f"over k = {', '.join(map(str, CURVE))}, zeroing the top k FFN neurons by {method} takes more than by "
        f"{baseline}",
        source="ours, after Table 2; comprehensiveness from DeYoung et al. 2020",
        effect=f"{SUMMARIES[summary]}, left by the baseline minus that left by the method",
        test="above",
        threshold=0,
        family="superiority",
        control=f"the same prompts with the curve of {baseline}",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(BASELINES) * len(SUMMARIES),
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    effects = _summary(bench, baseline, summary, method) - _summary(bench, method, summary, method)
    return bench.judge(claim, effects, places=bench.part(MIN_PROMPTS))


def _timed_best(bench: Workbench, method: str, places: list[int]) -> tuple[list[list[Component]], str]:
    """Return the top 10 of a method on some prompts, and what they cost for one prompt."""
    if not places:
        return [], "was not run"
    start = time.perf_counter()
    rankings = attribute(bench.model, [bench.prompts[place] for place in places], method=method, k=K, steps=STEPS)
    seconds = (time.perf_counter() - start) / len(places)
    each, layers = METHODS[method], bench.model.anatomy.layers
    passes = f"{each.forward.of(layers, STEPS):g}+{each.backward.of(layers, STEPS):g} passes"
    return [ranking.neurons for ranking in rankings], f"{passes}, {1000 * seconds:.1f} ms"


def compared_with_a_rival(bench: Workbench, method: str, rival: str) -> Verdict:
    """Report the top 10 of a method beside those of a method with backward passes, with what each costs."""
    claim = Claim(
        id=f"top {K} vs {rival}: logp",
        sentence=f"zeroing the top {K} FFN neurons by {method} lowers logp more than the top {K} by {rival}",
        source="ours",
        # Of the mean in nats, which few of so few prompts make up, no interval holds: simulated, it errs in up to 10%.
        effect=f"share of prompts in which {rival} leaves more than the method",
        test="above",
        threshold=0.5,
        control=f"the same prompts with the top {K} by {rival}",
        method=method,
        comparisons=len(RIVALS),
        extremes="share",
        asserted=False,
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    places = bench.part(RIVAL_PROMPTS)
    questions = [bench.questions[place] for place in places]
    left, costs = {}, []
    for name in (method, rival):
        best, cost = _timed_best(bench, name, places)
        left[name] = np.array([outcome.logp for outcome in outcomes(bench.model, questions, best)[0]])
        costs.append(cost)
    more = left[rival] - left[method]
    note = " against ".join(costs) + (f"; {more.mean():+.3f} nats in the mean" if places else "")
    return bench.judge(claim, (np.sign(more) + 1) / 2, places=places, note=note)


def kinds_agree(bench: Workbench, method: str, kind: str) -> Verdict:
    """Report how alike zero ablation and another kind order the method and its baselines, prompt by prompt."""
    claim = Claim(
        id=f"order of methods, zero and {kind} ablation",
        sentence=f"zero and {kind} ablation order {method} and its seven baselines alike",
        source="ours",
        effect="Spearman's rank correlation of the log-probabilities left, mean over prompts",
        test="above",
        threshold=0,
        control="0 for orders that have nothing to do with each other",
        method=method,
        comparisons=len(OTHER_KINDS),
        extremes="correlation",
        asserted=False,
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    names, places = (method, *BASELINES), bench.part(MIN_PROMPTS)
    zero = np.stack([_left(bench, name, "zero", "logp", method)[places] for name in names], -1)
    other = np.stack([_left(bench, name, kind, "logp", method) for name in names], -1)
    correlations = [rank_correlation(one, two) for one, two in zip(zero, other, strict=True)]
    return bench.judge(claim, correlations, places=places)
