"""Layers and heads: how much each adds, how deep they lie, and which categories share them (Tables 3, 4, 10)."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.claims.about_methods.specificity import RELATED
from attribution.claims.about_models.survey import Survey, claim_about, depth, survey
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.judge import Verdict
from attribution.records import SublayerKind

__all__ = [
    "PARTS",
    "contributions",
    "layers_contribute",
    "layers_lie_deep",
    "related_categories_share",
    "top_heads",
    "top_layers",
]

Part = Literal["layers", "heads"]
PARTS: tuple[Part, ...] = ("layers", "heads")

_TOP_HEADS = 10


def layers_contribute(bench: Workbench, kind: SublayerKind) -> Verdict:
    """Judge that the attention layers, or the FFN layers, raise the answer over what was not asked for (Table 3)."""
    found = survey(bench)
    own, other = (_of_kind(each, kind).sum(1) for each in (found.layers, found.layers_for_other_answers))
    claim = claim_about(
        bench,
        "layers",
        id=f"{kind} layers contribute",
        sentence=f"the {kind} layers together raise a fact's answer more than another answer of its category",
        source="Table 3",
        effect="sum of the importance of the layers for the answer, minus that for the answer of another fact, in nats",
        control="the same prompts with the answer of another fact of the category",
        comparisons=2,
    )
    note = f"{own.mean():.2f} nats against {other.mean():.2f}" if len(own) else ""
    return bench.judge(claim, own - other, places=found.places, note=note)


def layers_lie_deep(bench: Workbench, category: str) -> Verdict:
    """Judge that the top layers of a category's prompts lie in the deeper part of the model (Tables 3 and 4)."""
    found = survey(bench)
    rows, number = found.of(category), found.top_layers
    best = np.argsort(-found.layers[rows], axis=1, kind="stable")[:, :number] // 2
    claim = claim_about(
        bench,
        "depth of layers",
        id="top layers lie deep",
        sentence=f"the {number} most important layers of {category} prompts lie in the deeper half of the model",
        source="Table 4",
        effect="mean depth of the top layers, from 0 for the first to 1 for the last, minus that of all layers",
        control="as many layers drawn at random, whose mean depth is that of all",
        category=category,
    )
    return bench.judge(claim, depth(bench, best).mean(1) - 0.5, places=_places(found, rows))


def related_categories_share(bench: Workbench, part: Part) -> Verdict:
    """Judge that language, capital and country share heads, or layers, more than other pairs (Tables 4 and 10).

    A prompt's own top parts are compared with those of whole categories, by the share that is in both. As a second
    look at chance, the same is computed for every other way to call three of the categories related.
    """
    found = survey(bench)
    number = _number(found, part)
    shared = _overlaps(found, part)
    effects, rows = _difference(found, shared, RELATED)
    claim = claim_about(
        bench,
        "shared parts",
        id=f"related categories share {part}",
        sentence=f"the {number} most important {part} of a prompt are among those of a related category more often "
        "than among those of an unrelated one",
        source="Table 4" if part == "layers" else "Table 10",
        effect=f"share of a prompt's top {part} among those of related categories, minus that for unrelated ones",
        control="the unrelated categories; and every other choice of three categories to be called related",
        comparisons=len(PARTS),
    )
    note = ""
    if len(effects):
        number_related = len(RELATED & set(found.named))
        others = [frozenset(each) for each in combinations(found.named, number_related)]
        reached = np.mean([_difference(found, shared, each)[0].mean() >= effects.mean() - 1e-12 for each in others])
        note = f"{reached:.0%} of {len(others)} ways to call {number_related} categories related give as much"
    return bench.judge(claim, effects, places=_places(found, rows), note=note)


def _difference(
    found: Survey, shared: npt.NDArray[np.float64], related: frozenset[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Return how much more prompts of related categories share with related ones than with others, and their rows."""
    inside = np.array([name in related for name in found.named], dtype=bool)
    rows = np.flatnonzero(np.isin(found.categories, [name for name in found.named if name in related]))
    if not len(rows) or inside.sum() < 2 or inside.all():
        return np.zeros(0), np.zeros(0, dtype=np.intp)
    own = found.categories[rows][:, None] == np.array(found.named)[None, :]
    with_related = np.where(inside & ~own, shared[rows], 0).sum(1) / (inside.sum() - 1)
    return with_related - shared[rows][:, ~inside].mean(1), rows


def _overlaps(found: Survey, part: Part) -> npt.NDArray[np.float64]:
    """Return which share of each prompt's top parts are top parts of each category, (prompts, categories)."""
    scores = found.layers if part == "layers" else found.heads
    number = _number(found, part)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :number]
    shared = np.zeros((len(scores), len(found.named)))
    for column, category in enumerate(found.named):
        top = np.argsort(-scores[found.of(category)].mean(0), kind="stable")[:number]
        shared[:, column] = np.isin(best, top).mean(1)
    return shared


def _number(found: Survey, part: Part) -> int:
    if part == "layers":
        return found.top_layers
    anatomy = found.bench.model.anatomy
    return max(1, min(_TOP_HEADS, anatomy.layers * anatomy.heads // 4))


def _of_kind(layers: npt.NDArray[np.float64], kind: SublayerKind) -> npt.NDArray[np.float64]:
    return layers[:, 0 if kind == "attention" else 1 :: 2]


def _places(found: Survey, rows: npt.NDArray[np.intp]) -> list[int]:
    return [found.places[row] for row in rows]


def contributions(bench: Workbench) -> Exhibit:
    """Return Table 3: what the attention layers and the FFN layers add, by category."""
    found = survey(bench)
    rows = [
        {"category": category, "kind": kind, "total": _of_kind(found.layers[found.of(category)], kind).sum(1).mean()}
        for category in found.named
        for kind in ("attention", "ffn")
    ]
    frame = pd.DataFrame(rows, columns=["category", "kind", "total"])
    means = frame.groupby("kind")["total"].mean().to_dict()
    seen = "Attention layers add {attention:.2f} nats and FFN layers {ffn:.2f}, averaged over categories.".format(
        **{"attention": float("nan"), "ffn": float("nan"), **means}
    )
    return Exhibit.of_frame("table_3", bench.model.name, frame, seen=seen, prompts=len(found.places))


def top_layers(bench: Workbench) -> Exhibit:
    """Return Table 4: the ten layers of the largest mean importance, by category."""
    return _top(bench, "layers")


def top_heads(bench: Workbench) -> Exhibit:
    """Return Table 10: the ten heads of the largest mean importance, by category."""
    return _top(bench, "heads")


def _top(bench: Workbench, part: Part) -> Exhibit:
    found = survey(bench)
    unit: Literal["layer", "head"] = "layer" if part == "layers" else "head"
    frame = found.best(found.layers if part == "layers" else found.heads, unit, "importance")
    first = frame[frame["rank"] == 1].groupby(unit)["category"].apply(lambda names: ", ".join(names)).to_dict()
    seen = f"The first {unit} is " + "; ".join(f"{name} for {names}" for name, names in first.items()) + "."
    name = "table_4" if part == "layers" else "table_10"
    return Exhibit.of_frame(name, bench.model.name, frame, seen=seen, prompts=len(found.places))
