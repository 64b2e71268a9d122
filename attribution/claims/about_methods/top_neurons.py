"""What ablating a method's top k FFN neurons takes, compared with the top k of other methods (Table 2)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import BASELINES, NO_FFN, OTHER_KINDS, PROMPTS, STEPS, rank_correlation
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Effects, NotApplicable
from attribution.engine.ablation import outcomes
from attribution.engine.methods import METHODS
from attribution.engine.ranking import attribute
from attribution.records import Component

__all__ = ["agreement_of_kinds", "lead_over_baseline", "lead_over_rival", "lead_over_the_curve", "prompts_of_rival"]

# A rival is measured on 50 prompts, or on as many as 8,000 passes pay for. Integrated gradients take so many for 50
# prompts of the bundled models; a deeper model takes more passes per prompt, and gets fewer prompts.
_RIVAL_PROMPTS, _RIVAL_PASSES = 50, 8000


def _left(bench: Workbench, method: str, kind: str, metric: str, *, k: int, judged: str) -> npt.NDArray[np.float64]:
    """Return what is left of a metric without a method's top k; the judged method is measured with all its baselines.

    Returns:
        One number for each prompt; for kinds that are only reported, for each prompt of
        ``bench.sample.subset(PROMPTS)``.
    """
    names = (judged, *BASELINES)
    if kind == "zero":
        frame = bench.frames(names, k)[method]
    else:
        frame = bench.frames(names, k, kind=kind, together=OTHER_KINDS, number=PROMPTS)[method]
    return np.asarray(frame[f"{metric}_after"], dtype=np.float64)


def lead_over_baseline(
    bench: Workbench, method: str, baseline: str, metric: str, *, k: int, kind: str = "zero"
) -> Effects | NotApplicable:
    """Measure how much more of a metric a baseline's top k FFN neurons leave than a method's, prompt by prompt."""
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    by_baseline, by_method = (_left(bench, name, kind, metric, k=k, judged=method) for name in (baseline, method))
    return Effects(by_baseline - by_method, indices=None if kind == "zero" else bench.sample.subset(PROMPTS))


def _summary(bench: Workbench, method: str, summary: str, *, ks: Sequence[int], judged: str) -> npt.NDArray[np.float64]:
    """Return one number for a whole deletion curve, smaller where more is lost, for the prompts of a part."""
    metric = "logp" if summary == "area" else "prob"
    frame = bench.frames((judged, *BASELINES), ks, number=PROMPTS)[method]
    points = np.stack([frame.loc[frame["k"] == k, f"{metric}_after"].to_numpy(dtype=np.float64) for k in ks])
    if summary == "area":
        widths = np.log(ks)
        return np.asarray(np.trapezoid(points, widths, axis=0) / (widths[-1] - widths[0]))
    return np.asarray(points.mean(0))


def lead_over_the_curve(
    bench: Workbench, method: str, baseline: str, summary: str, *, ks: Sequence[int]
) -> Effects | NotApplicable:
    """Measure the same over a whole deletion curve.

    Args:
        bench: The model with its prompts.
        method: The judged method.
        baseline: What it is compared with.
        summary: ``"area"``: the area under the curve of log p over log k, divided by its width. ``"comprehensiveness"``
            (DeYoung et al. 2020): the probability, averaged over k.
        ks: The numbers of neurons, rising.
    """
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    by_baseline, by_method = (_summary(bench, name, summary, ks=ks, judged=method) for name in (baseline, method))
    return Effects(by_baseline - by_method, indices=bench.sample.subset(PROMPTS))


def _timed_best(bench: Workbench, method: str, indices: list[int], k: int) -> tuple[list[list[Component]], str]:
    """Return the top k of a method on some prompts, and what they cost for one prompt."""
    if not indices:
        return [], "was not run"
    start = time.perf_counter()
    rankings = attribute(bench.model, [bench.prompts[place] for place in indices], method=method, k=k, steps=STEPS)
    seconds = (time.perf_counter() - start) / len(indices)
    each, layers = METHODS[method], bench.model.anatomy.layers
    passes = f"{each.forward.of(layers, STEPS):g}+{each.backward.of(layers, STEPS):g} passes"
    return [ranking.neurons for ranking in rankings], f"{passes}, {1000 * seconds:.1f} ms"


def prompts_of_rival(bench: Workbench, rival: str) -> int:
    """Return on how many prompts a rival is measured: on as many as its budget of passes pays for."""
    method, layers = METHODS[rival], bench.model.anatomy.layers
    passes = method.forward.of(layers, STEPS) + method.backward.of(layers, STEPS)
    return max(1, min(_RIVAL_PROMPTS, int(_RIVAL_PASSES / passes)))


@measured_once
def _left_beside_rival(
    bench: Workbench, method: str, rival: str, k: int
) -> tuple[list[int], dict[str, npt.NDArray[np.float64]], list[str]]:
    """Return the prompts, log p on each without each method's top k, by name, and what each method costs."""
    indices = bench.sample.subset(prompts_of_rival(bench, rival))
    questions = [bench.sample.questions[place] for place in indices]
    left, costs = {}, []
    for name in (method, rival):
        best, cost = _timed_best(bench, name, indices, k)
        left[name] = np.array([outcome.logp for outcome in outcomes(bench.model, questions, best)[0]])
        costs.append(cost)
    return indices, left, costs


def lead_over_rival(bench: Workbench, method: str, rival: str, *, k: int) -> Effects | NotApplicable:
    """Measure on which prompts a rival's top k leave more log p than a method's: 1 there, else 0; 0.5 for equal ones.

    The note says what each method costs, and how much more is left in the mean.
    """
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    indices, left, costs = _left_beside_rival(bench, method, rival, k)
    more = left[rival] - left[method]
    note = " against ".join(costs) + (f"; {more.mean():+.3f} nats in the mean" if indices else "")
    return Effects((np.sign(more) + 1) / 2, indices=indices, note=note)


def agreement_of_kinds(bench: Workbench, method: str, kind: str, *, k: int) -> Effects | NotApplicable:
    """Measure how alike zero ablation and another kind order a method and its baselines on each prompt.

    Returns:
        Spearman's rank correlations of the log-probabilities left, -1 to 1.
    """
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    names, indices = (method, *BASELINES), bench.sample.subset(PROMPTS)
    zero = np.stack([_left(bench, name, "zero", "logp", k=k, judged=method)[indices] for name in names], -1)
    other = np.stack([_left(bench, name, kind, "logp", k=k, judged=method) for name in names], -1)
    return Effects([rank_correlation(one, two) for one, two in zip(zero, other, strict=True)], indices=indices)
