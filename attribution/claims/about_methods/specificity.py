"""Ablation hurts what neurons and heads are for, and leaves what they are not for alone (Table 11).

Language, capital and country are related kinds of knowledge: in Table 11 the heads of each matter for the others.
Unrelated facts are those of a category that is not related, and unrelated heads those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import METRIC_NAMES, MIN_PROMPTS, STEPS, budget_of, not_applicable
from attribution.claims.about_methods.query_neurons import query_budget, strongest, waking
from attribution.claims.about_methods.value_neurons import MARGIN
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.ablation import outcomes
from attribution.engine.batching import batches_of
from attribution.engine.methods import METHODS, method_named
from attribution.engine.metrics import by_metric
from attribution.engine.ranking import all_candidates
from attribution.engine.top_k import top_k
from attribution.records import Component, Head, unit_named

__all__ = [
    "HEAD_METRICS",
    "HeadsLeft",
    "PAPER_HEADS",
    "RELATED",
    "SETS",
    "VALUE_SETS",
    "are_related",
    "chosen_heads",
    "heads_hurt_their_category_most",
    "heads_of_related_categories_hurt_more",
    "left_without_heads",
    "neurons_hurt_their_fact_most",
    "strangers",
    "unrelated_facts_stay",
]

VALUE_SETS = ("top 10", "value neurons")
"""Which value neurons of a fact are zeroed: its top 10 FFN neurons, or as many as the deletion claims zero."""

SETS = (*VALUE_SETS, "query neurons")
"""Or the query neurons that wake them. Those of one fact need not leave others alone: the paper finds many shared."""

HEAD_METRICS = ("mrr", "logp")

PAPER_HEADS = {"mrr": ("33 to 45%", "4 to 9%"), "prob": ("48 to 53%", "9 to 10%")}
"""Means of the paper's Table 11 for its two models: the cut of a category's own metric, and of an unrelated one's."""

RELATED = frozenset({"language", "capital", "country"})
"""Categories that are called related."""

_K = 10
_HEAD_SHARE = 0.01
# Every fact is paired with an unrelated one. Where two thirds of the prompts are of related categories, as among the
# bundled facts, two thirds of MIN_PROMPTS find a partner of their own.
_MIN_PAIRED = 200


def are_related(one: str, other: str) -> bool:
    """Say whether two categories are the same or related."""
    return one == other or {one, other} <= RELATED


def strangers(categories: Sequence[str], seed: int = 0) -> dict[int, int]:
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

    places: list[int]
    own: dict[str, npt.NDArray[np.float64]]
    partners: dict[str, npt.NDArray[np.float64]]


def _budget(bench: Workbench, method: str, chosen: str) -> dict[str, int]:
    """Return how many neurons of each unit are zeroed, of the units that a method scores."""
    if chosen == "query neurons":
        return {"ffn": query_budget(bench)} if "attention" in budget_of(bench, method) else {}
    if chosen == "value neurons":
        return budget_of(bench, method)
    return {"ffn": _K} if "ffn" in METHODS[method].units else {}


def _named(bench: Workbench, method: str, chosen: str) -> str:
    budget = _budget(bench, method, chosen)
    if chosen == "value neurons":
        return " and ".join(f"{number} {unit}" for unit, number in budget.items()) + f" value neurons by {method}"
    if chosen == "query neurons":
        return f"{budget.get('ffn', 0)} query neurons, those that wake its top attention value neurons by {method}"
    return f"top {_K} FFN neurons by {method}"


def _ranked(bench: Workbench, method: str, chosen: str) -> list[list[Component]]:
    """Return the neurons of each prompt at ``bench.part(MIN_PROMPTS)``."""
    if chosen == "query neurons":
        return [list(neurons) for neurons in waking(bench, method)]
    ranked: list[list[Component]] = [[] for _ in bench.part(MIN_PROMPTS)]
    for unit, number in _budget(bench, method, chosen).items():
        # One ranking serves both numbers.
        most = max(number, budget_of(bench, method).get(unit, 0))
        for own, ranking in zip(ranked, strongest(bench, method, unit_named(unit), most), strict=True):
            own += ranking.neurons[:number]
    return ranked


def _paired(bench: Workbench, method: str, chosen: str) -> _Paired:
    def measured() -> _Paired:
        places = bench.part(MIN_PROMPTS)
        partner = strangers([bench.prompts[place].category for place in places], bench.seed)
        ranked = _ranked(bench, method, chosen)
        rows = sorted(partner)
        questions = [bench.questions[places[row]] for row in rows]
        arms = ([ranked[row] for row in rows], [ranked[partner[row]] for row in rows])
        left = [by_metric(outcomes(bench.model, questions, neurons)[0]) for neurons in arms]
        return _Paired([places[row] for row in rows], *left)

    return bench.once(("specificity", method, chosen), measured)


def neurons_hurt_their_fact_most(bench: Workbench, method: str, chosen: str) -> Verdict:
    """Judge that zeroing a fact's neurons lowers its own answer more than those of an unrelated fact do.

    Each prompt is compared with itself, without its own neurons and without its partner's. Every prompt's neurons are
    zeroed once in its own and once in an unrelated prompt, so the mean is also that of what a fact's neurons do to its
    own answer minus what they do to another's.
    """
    named = _named(bench, method, chosen)
    claim = Claim(
        id=f"specific to a fact, {chosen}: logp",
        sentence=f"zeroing a fact's {named} lowers the log-probability of its own answer more than that of an "
        "unrelated fact",
        source="ours",
        effect=f"{METRIC_NAMES['logp']} left by the neurons of an unrelated fact minus that left by a prompt's own",
        test="above",
        threshold=0,
        family="specificity",
        control="the same prompts without the neurons of an unrelated fact",
        min_prompts=_MIN_PAIRED,
        method=method,
        comparisons=len(SETS),
    )
    if not _budget(bench, method, chosen):
        return not_applicable(bench, claim, _NO_NEURONS)
    pairs = _paired(bench, method, chosen)
    return bench.judge(claim, pairs.partners["logp"] - pairs.own["logp"], places=pairs.places, seed=bench.seed)


def unrelated_facts_stay(bench: Workbench, method: str, chosen: str) -> Verdict:
    """Judge that an unrelated fact keeps its rank when a fact's top neurons are zeroed.

    The margin is that of random neurons: what is specific does to others no more than neurons drawn blindly.
    """
    named = _named(bench, method, chosen)
    claim = Claim(
        id=f"unrelated facts stay, {chosen}: mrr",
        sentence=f"zeroing a fact's {named} changes mrr of an unrelated fact by less than {MARGIN:.0%}",
        source="ours",
        effect="fall of mean mrr as a share of its start",
        test="within",
        threshold=MARGIN,
        family="specificity",
        control="the same neurons lower the answer of their own fact, judged by the claims of specificity",
        min_prompts=_MIN_PAIRED,
        method=method,
        comparisons=len(VALUE_SETS),
        extremes="fall",
    )
    if not _budget(bench, method, chosen):
        return not_applicable(bench, claim, _NO_NEURONS)
    pairs = _paired(bench, method, chosen)
    before = bench.before["mrr"][pairs.places]
    note = f"their own fact's falls by {1 - pairs.own['mrr'].sum() / before.sum():.0%}" if before.size else ""
    return bench.judge(
        claim, before - pairs.partners["mrr"], baselines=before, places=pairs.places, seed=bench.seed, note=note
    )


_NO_NEURONS = "the method does not score the neurons that are zeroed"


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
        Category to places of heads, without the categories that have no prompt in the other half.
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
        places: The prompts.
        left: ``"own"``, ``"related"`` and ``"unrelated"``, each metric to its mean over such categories, (prompts,).
        has_related: Which prompts have a related category, (prompts,); 0 is left of the others.
        by_category: Each category to what is left of each metric without its heads, (prompts,); NaN where a prompt's
            half chose none.
        distinct: How many different sets of heads were chosen, by both halves of all categories.
    """

    places: npt.NDArray[np.intp]
    left: dict[str, dict[str, npt.NDArray[np.float64]]]
    has_related: npt.NDArray[np.bool_]
    by_category: dict[str, dict[str, npt.NDArray[np.float64]]]
    distinct: int


def _head_scores(bench: Workbench, method: str, places: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the score of each head on each prompt, (prompts, layers * heads)."""
    anatomy, scorer = bench.model.anatomy, method_named(method, "head")
    scores = np.zeros((len(places), anatomy.layers * anatomy.heads))
    questions = [bench.questions[place] for place in places]
    for rows, batch in batches_of(bench.model, questions):
        part = [questions[row] for row in rows]
        found = all_candidates(bench.model, part, batch, {"head": [scorer]}, seed=bench.seed, steps=STEPS)
        for row, candidates in zip(rows, found, strict=True):
            every = top_k(candidates["head"], scorer, None)
            scores[row, every.indices.cpu()] = every.scores.cpu()
    return scores


def left_without_heads(bench: Workbench, method: str) -> HeadsLeft:
    """Return what is left when the heads of every category are zeroed in every prompt; measured once."""
    return bench.once(("heads", method), lambda: _measure_heads(bench, method))


def _measure_heads(bench: Workbench, method: str) -> HeadsLeft:
    places, anatomy = bench.part(MIN_PROMPTS), bench.model.anatomy
    categories = [bench.prompts[place].category for place in places]
    number = max(1, round(_HEAD_SHARE * anatomy.layers * anatomy.heads))
    chosen = chosen_heads(_head_scores(bench, method, places), categories, number, bench.seed)
    jobs = [(row, name) for row, by_category in enumerate(chosen) for name in by_category]
    heads = [[Head(*divmod(head, anatomy.heads)) for head in chosen[row][name]] for row, name in jobs]
    after = by_metric(outcomes(bench.model, [bench.questions[places[row]] for row, _ in jobs], heads)[0])
    rows = np.array([row for row, _ in jobs], dtype=np.intp)
    kinds = np.array([_kind(categories[row], name) for row, name in jobs], dtype=str)
    counts, left = {}, {}
    for kind in ("own", "related", "unrelated"):
        of_kind = kinds == kind
        counts[kind] = np.bincount(rows[of_kind], minlength=len(places))
        left[kind] = {
            metric: np.bincount(rows[of_kind], values[of_kind], len(places)) / np.maximum(counts[kind], 1)
            for metric, values in after.items()
        }
    by_category: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    names = np.array([name for _, name in jobs], dtype=str)
    for name in dict.fromkeys(names.tolist()):
        by_category[name] = {metric: np.full(len(places), np.nan) for metric in after}
        for metric, values in after.items():
            by_category[name][metric][rows[names == name]] = values[names == name]
    # A category of one fact has no heads, and where all categories are related none is unrelated.
    kept = (counts["own"] > 0) & (counts["unrelated"] > 0)
    return HeadsLeft(
        np.array(places, dtype=np.intp)[kept],
        {kind: {metric: values[kept] for metric, values in metrics.items()} for kind, metrics in left.items()},
        counts["related"][kept] > 0,
        {name: {metric: each[kept] for metric, each in metrics.items()} for name, metrics in by_category.items()},
        len({frozenset(each) for each in heads}),
    )


def _kind(category: str, name: str) -> str:
    if category == name:
        return "own"
    return "related" if are_related(category, name) else "unrelated"


def heads_hurt_their_category_most(bench: Workbench, method: str, metric: str) -> Verdict:
    """Judge that zeroing the top 1% heads of a prompt's category hurts more than those of unrelated categories."""
    claim = Claim(
        id=f"specific to a category, top 1% heads: {metric}",
        sentence=f"zeroing the top 1% heads of a prompt's category by {method} lowers {metric} more than zeroing those "
        "of unrelated categories",
        source="Table 11",
        effect=f"{METRIC_NAMES[metric]} left by heads of unrelated categories minus that left by those of its own",
        test="above",
        threshold=0,
        family="specificity",
        control="the same prompts without as many heads of each unrelated category",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=len(HEAD_METRICS),
    )
    if "head" not in METHODS[method].units:
        return not_applicable(bench, claim, "the method does not score heads")
    found = left_without_heads(bench, method)
    effects = found.left["unrelated"][metric] - found.left["own"][metric]
    return bench.judge(claim, effects, places=found.places.tolist(), seed=bench.seed)


def heads_of_related_categories_hurt_more(bench: Workbench, method: str, metric: str) -> Verdict:
    """Report what the heads of related categories take, beside a category's own, the unrelated ones', and the paper's.

    Only prompts on language, capital and country have related categories.
    """
    claim = Claim(
        id=f"related categories share heads: {metric}",
        sentence=f"zeroing the top 1% heads of the categories related to a prompt's own by {method} lowers {metric} "
        "more than zeroing those of unrelated categories",
        source="Table 11",
        effect=f"mean {metric} left by heads of unrelated categories minus that left by related ones', as a share of "
        "its start",
        test="above",
        threshold=0,
        control="the same prompts without as many heads of each unrelated category",
        method=method,
        comparisons=len(PAPER_HEADS),
        asserted=False,
    )
    if "head" not in METHODS[method].units:
        return not_applicable(bench, claim, "the method does not score heads")
    found = left_without_heads(bench, method)
    having = found.has_related
    effects = (found.left["unrelated"][metric] - found.left["related"][metric])[having]
    before = bench.before[metric][found.places]
    measured = {kind: having if kind == "related" else np.ones_like(having) for kind in found.left}
    cuts = [
        f"{kind} {1 - found.left[kind][metric][rows].sum() / before[rows].sum():.0%}"
        for kind, rows in measured.items()
        if rows.any()
    ]
    own, unrelated = PAPER_HEADS[metric]
    paper = f"the paper's own {own}, unrelated {unrelated}"
    note = f"cuts {', '.join(cuts)}; {paper}; {found.distinct} different sets of heads"
    return bench.judge(
        claim, effects, baselines=before[having], places=found.places[having].tolist(), seed=bench.seed, note=note
    )
