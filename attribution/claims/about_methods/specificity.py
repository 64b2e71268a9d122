"""What ablation takes from what neurons and heads are for, and from what they are not for (Table 11).

Language, capital and country are related kinds of knowledge: in Table 11 the heads of each matter for the others.
Unrelated facts are those of a category that is not related, and unrelated heads those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import PROMPTS, budget_of
from attribution.claims.about_methods.query_neurons import query_budget, query_neurons_of, strongest
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Effects, NotApplicable
from attribution.engine.ablation import outcomes
from attribution.engine.methods import METHODS
from attribution.engine.metrics import by_metric
from attribution.records import Component, Head, unit_named

__all__ = [
    "HeadsLeft",
    "RELATED",
    "are_related",
    "budget_of_set",
    "chosen_heads",
    "fall_of_unrelated_facts",
    "lead_of_related_heads",
    "lead_over_unrelated_facts",
    "lead_over_unrelated_heads",
    "left_without_heads",
    "unrelated",
]

RELATED = frozenset({"language", "capital", "country"})
"""Categories that are called related."""

_K = 10
_HEAD_SHARE = 0.01
_NO_NEURONS = NotApplicable("the method does not score the neurons that are zeroed")
_NO_HEADS = NotApplicable("the method does not score heads")


def are_related(one: str, other: str) -> bool:
    """Say whether two categories are the same or related."""
    return one == other or {one, other} <= RELATED


def unrelated(categories: Sequence[str], seed: int = 0) -> dict[int, int]:
    """Pair each fact with an unrelated one, a different one each.

    Where related categories together hold more than half of the facts, some of these find no partner and are left out
    at random.

    Args:
        categories: The category of each fact.
        seed: Seed of the draw.

    Returns:
        Place of each paired fact to the place of its partner; partners are the paired facts in another order.
    """
    groups: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        groups.setdefault("related" if category in RELATED else category, []).append(place)
    rng = np.random.default_rng(seed)
    drawn: list[list[int]] = sorted((rng.permutation(group).tolist() for group in groups.values()), key=len)
    if len(drawn) < 2:
        return {}
    step = min(len(drawn[-1]), sum(len(group) for group in drawn[:-1]))
    drawn[-1] = drawn[-1][:step]
    row = [place for group in drawn for place in group]
    # No group is longer than the step, and none than the rest: so many places on, or back at the front, is another.
    return {place: row[(number + step) % len(row)] for number, place in enumerate(row)}


@dataclass(frozen=True)
class _Paired:
    """What is left of each metric on paired prompts, (n,), without their own neurons and without their partners'."""

    indices: list[int]
    own: dict[str, npt.NDArray[np.float64]]
    partners: dict[str, npt.NDArray[np.float64]]


def budget_of_set(bench: Workbench, method: str, chosen: str) -> dict[str, int]:
    """Return how many neurons of each unit are zeroed, of the units that a method scores.

    Args:
        bench: The model with its prompts.
        method: The method.
        chosen: Which neurons of a fact are zeroed. ``"top 10"``: its top 10 FFN neurons; ``"value neurons"``: the same
            number as the deletion claims zero; ``"query neurons"``: those that activate its attention value neurons.
    """
    if chosen == "query neurons":
        return {"ffn": query_budget(bench)} if "attention" in budget_of(bench, method) else {}
    if chosen == "value neurons":
        return budget_of(bench, method)
    return {"ffn": _K} if "ffn" in METHODS[method].units else {}


def _ranked(bench: Workbench, method: str, chosen: str) -> list[list[Component]]:
    """Return the neurons of each prompt at ``bench.sample.subset(PROMPTS)``."""
    if chosen == "query neurons":
        return [list(neurons) for neurons in query_neurons_of(bench, method)]
    ranked: list[list[Component]] = [[] for _ in bench.sample.subset(PROMPTS)]
    for unit, number in budget_of_set(bench, method, chosen).items():
        # One ranking serves both numbers.
        most = max(number, budget_of(bench, method).get(unit, 0))
        for own, ranking in zip(ranked, strongest(bench, method, unit_named(unit), most), strict=True):
            own += ranking.neurons[:number]
    return ranked


@measured_once
def _paired(bench: Workbench, method: str, chosen: str) -> _Paired:
    indices = bench.sample.subset(PROMPTS)
    partner = unrelated([bench.prompts[place].category for place in indices], bench.seed)
    ranked = _ranked(bench, method, chosen)
    rows = sorted(partner)
    questions = [bench.sample.questions[indices[row]] for row in rows]
    arms = ([ranked[row] for row in rows], [ranked[partner[row]] for row in rows])
    bar = bench.bar(f"ablation of {chosen}, one's own and another's")
    left = [by_metric(outcomes(bench.model, questions, neurons, progress=bar)[0]) for neurons in arms]
    return _Paired([indices[row] for row in rows], *left)


def lead_over_unrelated_facts(bench: Workbench, method: str, chosen: str) -> Effects | NotApplicable:
    """Measure how much more log p the neurons of an unrelated fact leave than a prompt's own.

    Each prompt is compared with itself, without its own neurons and without its partner's. Every prompt's neurons are
    zeroed once in its own and once in an unrelated prompt, so the mean is also that of what a fact's neurons do to its
    own answer minus what they do to another's.
    """
    if not budget_of_set(bench, method, chosen):
        return _NO_NEURONS
    pairs = _paired(bench, method, chosen)
    return Effects(pairs.partners["logp"] - pairs.own["logp"], indices=pairs.indices, seed=bench.seed)


def fall_of_unrelated_facts(bench: Workbench, method: str, chosen: str, metric: str) -> Effects | NotApplicable:
    """Measure how far a metric of an unrelated fact falls when a fact's neurons are zeroed."""
    if not budget_of_set(bench, method, chosen):
        return _NO_NEURONS
    pairs = _paired(bench, method, chosen)
    before = bench.before[metric][pairs.indices]
    note = f"their own fact's falls by {1 - pairs.own[metric].sum() / before.sum():.0%}" if before.size else ""
    return Effects(before - pairs.partners[metric], baselines=before, indices=pairs.indices, seed=bench.seed, note=note)


def chosen_heads(
    scores: npt.NDArray[np.float64], categories: Sequence[str], number: int, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Return, for each prompt, the heads of every category: those of the largest mean score, best first.

    The prompts of each category are halved at random, and heads are chosen by one half for the prompts of the other:
    chosen on the prompts that they are judged by, they would owe part of their effect to the choice.

    Args:
        scores: Score of each head on each prompt, (prompts, heads).
        categories: The category of each prompt.
        number: How many heads of each category. Ties fall by place.
        seed: Seed of the halves.

    Returns:
        Category to indices of heads, without the categories that have no prompt in the other half.
    """
    of, half = np.asarray(categories, dtype=str), np.zeros(len(categories), dtype=bool)
    rng = np.random.default_rng(seed)
    for category in dict.fromkeys(categories):
        half[rng.permutation(np.flatnonzero(of == category))[::2]] = True
    by_half: list[dict[str, list[int]]] = []
    for other in (half, ~half):
        means = {name: scores[other & (of == name)].mean(0) for name in dict.fromkeys(of[other].tolist())}
        by_half.append({name: np.argsort(-mean, kind="stable")[:number].tolist() for name, mean in means.items()})
    return [by_half[side] for side in half.astype(int)]


@dataclass(frozen=True)
class HeadsLeft:
    """What is left on each prompt without heads of its own category, of a related, or of an unrelated one.

    Attributes:
        indices: The prompts.
        left: ``"own"``, ``"related"`` and ``"unrelated"``, each metric to its mean over such categories, (prompts,).
        has_related: Which prompts have a related category, (prompts,); 0 is left of the others.
        by_category: Each category to what is left of each metric without its heads, (prompts,); NaN where a prompt's
            half chose none.
        distinct: How many different sets of heads were chosen, by both halves of all categories.
    """

    indices: npt.NDArray[np.intp]
    left: dict[str, dict[str, npt.NDArray[np.float64]]]
    has_related: npt.NDArray[np.bool_]
    by_category: dict[str, dict[str, npt.NDArray[np.float64]]]
    distinct: int


@measured_once
def left_without_heads(bench: Workbench, method: str) -> HeadsLeft:
    """Return what is left when the heads of every category are zeroed in every prompt."""
    indices, anatomy = bench.sample.subset(PROMPTS), bench.model.anatomy
    categories = [bench.prompts[place].category for place in indices]
    number = max(1, round(_HEAD_SHARE * anatomy.layers * anatomy.heads))
    scores = bench.scores(method, "head", [bench.sample.questions[place] for place in indices])
    chosen = chosen_heads(scores, categories, number, bench.seed)
    jobs = [(row, name) for row, by_category in enumerate(chosen) for name in by_category]
    heads = [[Head(*divmod(head, anatomy.heads)) for head in chosen[row][name]] for row, name in jobs]
    asked, bar = [bench.sample.questions[indices[row]] for row, _ in jobs], bench.bar("ablation of heads")
    after = by_metric(outcomes(bench.model, asked, heads, progress=bar)[0])
    rows = np.array([row for row, _ in jobs], dtype=np.intp)
    kinds = np.array([_kind(categories[row], name) for row, name in jobs], dtype=str)
    counts, left = {}, {}
    for kind in ("own", "related", "unrelated"):
        of_kind = kinds == kind
        counts[kind] = np.bincount(rows[of_kind], minlength=len(indices))
        left[kind] = {
            metric: np.bincount(rows[of_kind], values[of_kind], len(indices)) / np.maximum(counts[kind], 1)
            for metric, values in after.items()
        }
    by_category: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    names = np.array([name for _, name in jobs], dtype=str)
    for name in dict.fromkeys(names.tolist()):
        by_category[name] = {metric: np.full(len(indices), np.nan) for metric in after}
        for metric, values in after.items():
            by_category[name][metric][rows[names == name]] = values[names == name]
    # A category of one fact has no heads, and where all categories are related none is unrelated.
    kept = (counts["own"] > 0) & (counts["unrelated"] > 0)
    return HeadsLeft(
        np.array(indices, dtype=np.intp)[kept],
        {kind: {metric: values[kept] for metric, values in metrics.items()} for kind, metrics in left.items()},
        counts["related"][kept] > 0,
        {name: {metric: each[kept] for metric, each in metrics.items()} for name, metrics in by_category.items()},
        len({frozenset(each) for each in heads}),
    )


def _kind(category: str, name: str) -> str:
    if category == name:
        return "own"
    return "related" if are_related(category, name) else "unrelated"


def lead_over_unrelated_heads(bench: Workbench, method: str, metric: str) -> Effects | NotApplicable:
    """Measure how much more of a metric the heads of unrelated categories leave than those of a prompt's own."""
    if "head" not in METHODS[method].units:
        return _NO_HEADS
    found = left_without_heads(bench, method)
    effects = found.left["unrelated"][metric] - found.left["own"][metric]
    return Effects(effects, indices=found.indices.tolist(), seed=bench.seed)


def lead_of_related_heads(bench: Workbench, method: str, metric: str, *, paper: str) -> Effects | NotApplicable:
    """Measure how much more the heads of unrelated categories leave than those of related ones.

    Only prompts on language, capital and country have related categories. The note says what the heads of all three
    kinds of categories cut.

    Args:
        bench: The model with its prompts.
        method: The method that ranks heads.
        metric: The metric.
        paper: What the paper reports, for the note.
    """
    if "head" not in METHODS[method].units:
        return _NO_HEADS
    found = left_without_heads(bench, method)
    having = found.has_related
    effects = (found.left["unrelated"][metric] - found.left["related"][metric])[having]
    before = bench.before[metric][found.indices]
    measured = {kind: having if kind == "related" else np.ones_like(having) for kind in found.left}
    cuts = [
        f"{kind} {1 - found.left[kind][metric][rows].sum() / before[rows].sum():.0%}"
        for kind, rows in measured.items()
        if rows.any()
    ]
    note = f"cuts {', '.join(cuts)}; {paper}; {found.distinct} different sets of heads"
    indices = found.indices[having].tolist()
    return Effects(effects, baselines=before[having], indices=indices, seed=bench.seed, note=note)
