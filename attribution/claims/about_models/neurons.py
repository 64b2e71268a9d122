"""Neurons: how much few of them carry, how deep they lie, and which a category's prompts share.

Tables 5, 8 and 12, Figures 2 and 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from attribution.claims.about_methods.common import METHOD
from attribution.claims.about_models.survey import Survey, depth, survey, survey_of
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.exhibits import Exhibit
from attribution.claims.measured import Effects
from attribution.claims.sample import SCORED_OF_CATEGORY
from attribution.engine.all_scores import summed_within
from attribution.records import Component, FFNNeuron, SublayerKind

__all__ = [
    "SIDES",
    "depth_of_methods",
    "found_in_other_prompts",
    "how_much_deeper",
    "shared_neurons",
    "sum_beyond_half",
    "sums_of_neurons",
]

Side = Literal["value", "query"]
SIDES: tuple[Side, ...] = ("value", "query")

# How far rounding may move a sum, in nats; tables show a hundredth.
_LARGEST_ERROR = 1e-3
_SUMS = ("all", "positive", "top 100", "top 200")
_K = 10
_DEPTHS = (METHOD, "log_prob", "prob_increase")


@measured_once
def _sums(bench: Workbench, kind: SublayerKind) -> tuple[Survey, dict[str, npt.NDArray[np.float64]]]:
    """Return sums over a kind's neurons on each prompt, in nats, (n,) each: all, positive, and the highest ones."""
    found = survey_of(bench, SCORED_OF_CATEGORY)
    sums: dict[str, list[float]] = {name: [] for name in _SUMS}
    for each in summed_within(bench.all_scores(METHOD, kind, found.indices), _LARGEST_ERROR):
        scores = -np.sort(-each.numpy(force=True))
        values = (scores.sum(), scores[scores > 0].sum(), scores[:100].sum(), scores[:200].sum())
        for name, value in zip(_SUMS, values, strict=True):
            sums[name].append(float(value))
    return found, {name: np.array(values, dtype=np.float64) for name, values in sums.items()}


def sum_beyond_half(bench: Workbench, kind: SublayerKind) -> Effects:
    """Measure by how much the top neurons of a kind sum to more than half of all, in nats (Tables 5 and 12).

    The top neurons are the paper's number of value neurons, or all neurons of a smaller model.
    """
    found, sums = _sums(bench, kind)
    top = sums["top 100"] if kind == "ffn" else sums["top 200"]
    note = ""
    if len(top):
        anatomy = bench.model.anatomy
        each = anatomy.ffn_neurons if kind == "ffn" else anatomy.heads * anatomy.head_dim
        share = found.value_neurons(kind) / (anatomy.layers * each)
        note = f"{top.mean():.2f} of {sums['all'].mean():.2f} nats, by at most {share:.1%} of the neurons"
    return Effects(top - sums["all"] / 2, indices=found.indices, note=note)


def sums_of_neurons(bench: Workbench) -> Exhibit:
    """Return Tables 5 and 12: sums of the importance of all, positive and top neurons, by category."""
    rows, number = [], 0
    for kind in ("attention", "ffn"):
        found, sums = _sums(bench, kind)
        number = len(found.indices)
        for category in found.named:
            rows += [
                {"category": category, "kind": kind, "which": name, "total": sums[name][found.of(category)].mean()}
                for name in _SUMS
            ]
    frame = pd.DataFrame(rows, columns=["category", "kind", "which", "total"])
    means = frame.groupby(["kind", "which"])["total"].mean()
    seen = " ".join(
        f"{kind.upper() if kind == 'ffn' else 'Attention'} neurons: all together {means[kind, 'all']:.1f} nats, the "
        f"positive ones {means[kind, 'positive']:.1f}, the top 200 {means[kind, 'top 200']:.1f}."
        for kind in ("attention", "ffn")
        if len(frame)
    )
    return Exhibit.of_frame("table_5", bench.model.name, frame, seen=seen, prompts=number)


def _members(found: Survey, side: Side) -> npt.NDArray[np.bool_]:
    """Return which FFN neurons are among a prompt's top ones, (n, layers, neurons)."""
    anatomy = found.bench.model.anatomy
    members = np.zeros((len(found.indices), anatomy.layers, anatomy.ffn_neurons), dtype=bool)
    value: list[Sequence[Component]] = [each.neurons for each in found.ffn]
    woken_by: list[Sequence[Component]] = [each.neurons for each in found.queries]
    for row, ranked in enumerate(value if side == "value" else woken_by):
        for neuron in ranked[: found.shared_of]:
            assert isinstance(neuron, FFNNeuron)
            members[row, neuron.layer, neuron.index] = True
    return members


def found_in_other_prompts(bench: Workbench, category: str, side: Side) -> Effects:
    """Measure how many top neurons that some prompts of a category share are found in others as well (Table 8).

    Neurons that are shared by most prompts of one random half are looked for in the prompts of the other.

    Returns:
        Shared neurons found in a prompt minus those expected by its layers, as a share of its top neurons.
    """
    found = survey(bench)
    rows, number = found.of(category), found.shared_of
    members = _members(found, side)[rows]
    first = np.zeros(len(rows), dtype=bool)
    first[np.random.default_rng(bench.seed).permutation(len(rows))[::2]] = True
    effects = np.zeros(len(rows))
    for half in (first, ~first):
        if half.any():
            shared = members[half].mean(0) > 0.5
            others = members[~half]
            expected = (others.sum(-1) * shared.mean(-1)).sum(-1)
            effects[~half] = ((others & shared).sum((-2, -1)) - expected) / number
    return Effects(effects, indices=[found.indices[row] for row in rows], seed=bench.seed)


def shared_neurons(bench: Workbench) -> Exhibit:
    """Return Table 8: neurons in the top of more than half of a category's prompts, with what chance would give.

    By chance a neuron is in a prompt's top as often as its layer is: the number expected is the sum over neurons of
    the probability that this happens in more than half of the prompts.
    """
    found = survey(bench)
    rows = []
    for side in SIDES:
        members = _members(found, side)
        for category in found.named:
            own = members[found.of(category)]
            chance = own.mean(-1)
            # Of unequal probabilities the mean is taken: the tail beyond one half is then no smaller (Hoeffding 1956).
            tail = stats.binom.sf(len(own) // 2, len(own), chance.mean(0))
            count = int((own.mean(0) > 0.5).sum())
            rows.append(
                {
                    "category": category,
                    "side": side,
                    "shared": count,
                    "share": count / found.shared_of,
                    "expected": float(tail.sum() * own.shape[-1]),
                    "top": found.shared_of,
                }
            )
    frame = pd.DataFrame(rows, columns=["category", "side", "shared", "share", "expected", "top"])
    means = frame.groupby("side")["share"].mean().to_dict()
    seen = " and ".join(f"{share:.0%} of the top {side} neurons" for side, share in means.items())
    seen = f"On average over categories {seen} are shared by more than half of the prompts; by chance " + (
        f"at most {frame['expected'].max():.1f} neurons would be." if len(frame) else "none would be."
    )
    return Exhibit.of_frame("table_8", bench.model.name, frame, seen=seen, prompts=len(found.indices))


@measured_once
def _layers_by_method(bench: Workbench) -> tuple[Survey, dict[str, npt.NDArray[np.intp]]]:
    """Return the layers of each prompt's top ten FFN neurons by three scores, (n, 10) each."""
    found = survey(bench)
    layers = {}
    for name in _DEPTHS:
        rankings = found.ffn if name == METHOD else found.rank("ffn", _K, method=name)
        layers[name] = np.array(
            [[neuron.layer for neuron in ranking.neurons[:_K]] for ranking in rankings], dtype=np.intp
        ).reshape(len(found.indices), _K)
    return found, layers


def how_much_deeper(bench: Workbench, one: str, other: str, *, k: int) -> Effects:
    """Measure how much deeper the top k FFN neurons by one score are than those by another (Figures 2 and 9).

    Args:
        bench: The model with its prompts.
        one: The one method, of those of the figures.
        other: The other one.
        k: How many neurons, at most ten.

    Returns:
        Differences of mean depths, which run from 0 for the first layer to 1 for the last.
    """
    found, layers = _layers_by_method(bench)
    first, second = (depth(bench, layers[name][:, :k]).mean(1) for name in (one, other))
    note = f"{first.mean():.2f} against {second.mean():.2f}" if len(first) else ""
    return Effects(first - second, indices=found.indices, note=note)


def depth_of_methods(bench: Workbench) -> Exhibit:
    """Return Figures 2 and 9: in which layers the top ten FFN neurons by three scores lie."""
    found, layers = _layers_by_method(bench)
    rows = []
    for name in _DEPTHS:
        counts = np.bincount(layers[name].ravel(), minlength=bench.model.anatomy.layers)
        rows += [
            {"method": name, "layer": layer, "share": count / max(1, counts.sum())}
            for layer, count in enumerate(counts.tolist())
        ]
    frame = pd.DataFrame(rows, columns=["method", "layer", "share"])
    means = {name: depth(bench, layers[name]).mean() if len(found.indices) else float("nan") for name in _DEPTHS}
    seen = "Mean depth, from 0 for the first layer to 1 for the last: " + ", ".join(
        f"{value:.2f} by {name}" for name, value in means.items()
    )
    return Exhibit.of_frame("figure_2", bench.model.name, frame, seen=seen + ".", prompts=len(found.indices))
