"""Layers and heads: how much each adds, how deep they lie, and which categories share them (Tables 3, 4, 10)."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.claims.about_methods.specificity import RELATED
from attribution.claims.about_models.survey import Survey, depth, survey
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.measured import Effects
from attribution.records import SublayerKind

__all__ = [
    "PARTS",
    "contributions",
    "depth_of_top_layers",
    "importance_of_layers",
    "shared_with_related",
    "top_heads",
    "top_layers",
    "top_number",
]

Part = Literal["layers", "heads"]
PARTS: tuple[Part, ...] = ("layers", "heads")

_TOP_HEADS = 10


def importance_of_layers(bench: Workbench, kind: SublayerKind) -> Effects:
    """Measure how much more the layers of a kind add to a prompt's answer than to another answer, in nats (Table 3)."""
    found = survey(bench)
    own, other = (_of_kind(each, kind).sum(1) for each in (found.layers, found.layers_for_other_answers))
    note = f"{own.mean():.2f} nats against {other.mean():.2f}" if len(own) else ""
    return Effects(own - other, indices=found.indices, note=note)


def depth_of_top_layers(bench: Workbench, category: str) -> Effects:
    """Measure how much deeper the top layers of a category's prompts are than all layers on average (Table 4)."""
    found = survey(bench)
    rows = found.of(category)
    best = np.argsort(-found.layers[rows], axis=1, kind="stable")[:, : found.top_layers] // 2
    return Effects(depth(bench, best).mean(1) - 0.5, indices=_indices(found, rows))


def shared_with_related(bench: Workbench, part: Part) -> Effects:
    """Measure how much more a prompt's top parts are shared with related categories than with others (Tables 4, 10).

    A prompt's own top parts are compared with those of whole categories, by the share that is in both. As a second
    look at chance, the note says in how many of all ways to call three of the categories related as much is shared.
    """
    found = survey(bench)
    shared = _overlaps(found, part)
    effects, rows = _difference(found, shared, RELATED)
    note = ""
    if len(effects):
        number_related = len(RELATED & set(found.named))
        others = [frozenset(each) for each in combinations(found.named, number_related)]
        reached = np.mean([_difference(found, shared, each)[0].mean() >= effects.mean() - 1e-12 for each in others])
        note = f"{reached:.0%} of {len(others)} ways to call {number_related} categories related give as much"
    return Effects(effects, indices=_indices(found, rows), note=note)


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
    number = top_number(found, part)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :number]
    shared = np.zeros((len(scores), len(found.named)))
    for column, category in enumerate(found.named):
        top = np.argsort(-scores[found.of(category)].mean(0), kind="stable")[:number]
        shared[:, column] = np.isin(best, top).mean(1)
    return shared


def top_number(found: Survey, part: Part) -> int:
    """Return how many layers, or heads, are the top ones; fewer in smaller models."""
    if part == "layers":
        return found.top_layers
    anatomy = found.bench.model.anatomy
    return max(1, min(_TOP_HEADS, anatomy.layers * anatomy.heads // 4))


def _of_kind(layers: npt.NDArray[np.float64], kind: SublayerKind) -> npt.NDArray[np.float64]:
    return layers[:, 0 if kind == "attention" else 1 :: 2]


def _indices(found: Survey, rows: npt.NDArray[np.intp]) -> list[int]:
    return [found.indices[row] for row in rows]


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
    return Exhibit.of_frame("table_3", bench.model.name, frame, seen=seen, prompts=len(found.indices))


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
    return Exhibit.of_frame(name, bench.model.name, frame, seen=seen, prompts=len(found.indices))
