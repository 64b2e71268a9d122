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
from attribution.claims.about_models.survey import Survey, claim_about, depth, survey, survey_of
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict
from attribution.records import Component, FFNNeuron, SublayerKind

__all__ = [
    "SIDES",
    "depth_of_methods",
    "few_neurons_carry_most",
    "prob_increase_picks_deeper_neurons",
    "prompts_share_neurons",
    "shared_neurons",
    "sums_of_neurons",
]

Side = Literal["value", "query"]
SIDES: tuple[Side, ...] = ("value", "query")

# Every neuron of these is scored, which costs as much as everything else.
_SUMMED_PER_CATEGORY = 5
_MIN_SUMMED = 20
_SUMS = ("all", "positive", "top 100", "top 200")
_K = 10
_DEPTHS = (METHOD, "log_prob", "prob_increase")


def _sums(bench: Workbench, kind: SublayerKind) -> tuple[Survey, dict[str, npt.NDArray[np.float64]]]:
    """Return sums over a kind's neurons on each prompt, in nats, (n,) each: all, positive, and the highest ones."""

    def measured() -> tuple[Survey, dict[str, npt.NDArray[np.float64]]]:
        found = survey_of(bench, _SUMMED_PER_CATEGORY)
        sums: dict[str, list[float]] = {name: [] for name in _SUMS}
        for ranking in found.rank(kind, None):
            scores = ranking.scores.numpy()
            values = (scores.sum(), scores[scores > 0].sum(), scores[:100].sum(), scores[:200].sum())
            for name, value in zip(_SUMS, values, strict=True):
                sums[name].append(float(value))
        return found, {name: np.array(values, dtype=np.float64) for name, values in sums.items()}

    return bench.once(("sums", kind), measured)


def few_neurons_carry_most(bench: Workbench, kind: SublayerKind) -> Verdict:
    """Judge that the paper's number of value neurons carries more than half of what all neurons of a kind add up to."""
    found, sums = _sums(bench, kind)
    number = found.value_neurons(kind)
    top = sums["top 100"] if kind == "ffn" else sums["top 200"]
    anatomy = bench.model.anatomy
    each = anatomy.ffn_neurons if kind == "ffn" else anatomy.heads * anatomy.head_dim
    claim = claim_about(
        bench,
        "sums of neurons",
        id=f"few {kind} neurons carry most",
        sentence=f"the top {number} {kind} neurons of a prompt sum to more than half of all of them together",
        source="Tables 5 and 12",
        effect="sum of the top neurons' importance minus half of the sum of all, in nats",
        control="as many random neurons, which sum to their share of all",
        comparisons=2,
        min_prompts=_MIN_SUMMED,
    )
    note = ""
    if len(top):
        share = number / (anatomy.layers * each)
        note = f"{top.mean():.2f} of {sums['all'].mean():.2f} nats, by at most {share:.1%} of the neurons"
    return bench.judge(claim, top - sums["all"] / 2, places=found.places, note=note)


def sums_of_neurons(bench: Workbench) -> Exhibit:
    """Return Tables 5 and 12: sums of the importance of all, positive and top neurons, by category."""
    rows, number = [], 0
    for kind in ("attention", "ffn"):
        found, sums = _sums(bench, kind)
        number = len(found.places)
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
    members = np.zeros((len(found.places), anatomy.layers, anatomy.ffn_neurons), dtype=bool)
    value: list[Sequence[Component]] = [each.neurons for each in found.ffn]
    woken_by: list[Sequence[Component]] = [each.neurons for each in found.queries]
    for row, ranked in enumerate(value if side == "value" else woken_by):
        for neuron in ranked[: found.shared_of]:
            assert isinstance(neuron, FFNNeuron)
            members[row, neuron.layer, neuron.index] = True
    return members


def prompts_share_neurons(bench: Workbench, category: str, side: Side) -> Verdict:
    """Judge that a category's prompts have top neurons in common, beyond what their layers explain (Table 8).

    Neurons that are shared by most prompts of one random half are looked for in the prompts of the other.
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
    claim = claim_about(
        bench,
        "shared neurons",
        id=f"prompts share {side} neurons",
        sentence=f"FFN {side} neurons among the top {number} of more than half of some {category} prompts are among "
        "those of others as well, more than neurons of the same layers",
        source="Table 8",
        effect=f"shared neurons found in a prompt minus those expected by its layers, as a share of its top {number}",
        control="as many neurons drawn in each layer as the prompt has there",
        category=category,
        comparisons=len(SIDES),
    )
    return bench.judge(claim, effects, places=[found.places[row] for row in rows], seed=bench.seed)


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
    return Exhibit.of_frame("table_8", bench.model.name, frame, seen=seen, prompts=len(found.places))


def _layers_by_method(bench: Workbench) -> tuple[Survey, dict[str, npt.NDArray[np.intp]]]:
    """Return the layers of each prompt's top ten FFN neurons by three scores, (n, 10) each."""

    def measured() -> tuple[Survey, dict[str, npt.NDArray[np.intp]]]:
        found = survey(bench)
        layers = {}
        for name in _DEPTHS:
            rankings = found.ffn if name == METHOD else found.rank("ffn", _K, method=name)
            layers[name] = np.array(
                [[neuron.layer for neuron in ranking.neurons[:_K]] for ranking in rankings], dtype=np.intp
            ).reshape(len(found.places), _K)
        return found, layers

    return bench.once(("layers by method",), measured)


def prob_increase_picks_deeper_neurons(bench: Workbench) -> Verdict:
    """Judge that the increase of probability picks deeper neurons than that of log-probability (Figures 2 and 9)."""
    found, layers = _layers_by_method(bench)
    increase, log_increase = (depth(bench, layers[name]).mean(1) for name in ("prob_increase", METHOD))
    claim = claim_about(
        bench,
        "depth of neurons",
        id="prob_increase picks deeper neurons",
        sentence=f"the top {_K} FFN neurons by prob_increase lie deeper than those by {METHOD}",
        source="Figures 2 and 9",
        effect="mean depth of the one minus that of the other, from 0 for the first layer to 1 for the last",
        control=f"the top {_K} of the same prompts by {METHOD}",
    )
    note = f"{increase.mean():.2f} against {log_increase.mean():.2f}" if len(increase) else ""
    return bench.judge(claim, increase - log_increase, places=found.places, note=note)


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
    means = {name: depth(bench, layers[name]).mean() if len(found.places) else float("nan") for name in _DEPTHS}
    seen = "Mean depth, from 0 for the first layer to 1 for the last: " + ", ".join(
        f"{value:.2f} by {name}" for name, value in means.items()
    )
    return Exhibit.of_frame("figure_2", bench.model.name, frame, seen=seen + ".", prompts=len(found.places))
