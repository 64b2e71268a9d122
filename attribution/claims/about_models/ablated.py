"""What ablation takes, by category: Tables 2, 7, 11 and 13, from the reruns that the claims about methods judge."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.claims.about_methods.common import BASELINES, METHOD, METRIC_NAMES, PROMPTS, budget_of
from attribution.claims.about_methods.query_neurons import left_without_query_neurons, query_budget
from attribution.claims.about_methods.specificity import left_without_heads
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit

__all__ = ["by_heads", "by_method", "by_query_neurons", "by_value_neurons"]

# How many FFN neurons Table 2 ablates.
_K = 10


def by_method(bench: Workbench) -> Exhibit:
    """Return Table 2: the means that are left without the top ten FFN neurons of each method."""
    names = (METHOD, *BASELINES)
    frames = bench.frames(names, _K)
    rows: list[dict[str, object]] = [{"method": "none", **{name: bench.before[name].mean() for name in METRIC_NAMES}}]
    rows += [
        {"method": name, **{metric: frames[name][f"{metric}_after"].mean() for metric in METRIC_NAMES}}
        for name in names
    ]
    frame = pd.DataFrame(rows, columns=["method", *METRIC_NAMES])
    lowest = frame.iloc[1:].sort_values("logp")["method"].iloc[0]
    seen = (
        f"Without the top {_K} FFN neurons by {METHOD} the mean log-probability falls from {frame['logp'].iloc[0]:.3f} "
        f"to {frame['logp'].iloc[1]:.3f} nats; it falls lowest by {lowest}."
    )
    return Exhibit.of_frame("table_2", bench.model.name, frame, seen=seen, prompts=len(bench.prompts))


def _cuts(
    categories: npt.NDArray[np.str_],
    before: dict[str, npt.NDArray[np.float64]],
    after: dict[str, npt.NDArray[np.float64]],
) -> list[dict[str, object]]:
    """Return by how much the means of each category fall, as a share of their start."""
    rows: list[dict[str, object]] = []
    for category in dict.fromkeys(categories.tolist()):
        own = categories == category
        falls = {f"{name}_cut": 1 - after[name][own].mean() / before[name][own].mean() for name in ("mrr", "prob")}
        rows.append({"category": category, **falls})
    return rows


def by_value_neurons(bench: Workbench) -> Exhibit:
    """Return Table 13: what a prompt's value neurons take from each category."""
    budget = budget_of(bench, METHOD)
    frame = bench.frames((METHOD,), budget)[METHOD]
    after = {name: frame[f"{name}_after"].to_numpy(dtype=np.float64) for name in METRIC_NAMES}
    categories = np.array([prompt.category for prompt in bench.prompts], dtype=str)
    table = pd.DataFrame(_cuts(categories, bench.before, after), columns=["category", "mrr_cut", "prob_cut"])
    table.insert(1, "number", sum(budget.values()))
    seen = (
        f"{sum(budget.values())} value neurons cut MRR by {table['mrr_cut'].min():.0%} to {table['mrr_cut'].max():.0%} "
        f"and probability by {table['prob_cut'].min():.0%} to {table['prob_cut'].max():.0%}."
    )
    return Exhibit.of_frame("table_13", bench.model.name, table, seen=seen, prompts=len(bench.prompts))


def by_query_neurons(bench: Workbench) -> Exhibit:
    """Return Table 7: what a prompt's query neurons take from each category, and as many random ones."""
    indices, number = bench.sample.subset(PROMPTS), query_budget(bench)
    categories = np.array([bench.prompts[place].category for place in indices], dtype=str)
    before = {name: bench.before[name][indices] for name in METRIC_NAMES}
    random = bench.frames(("random",), {"ffn": number}, number=PROMPTS)["random"]
    arms = {
        "query": left_without_query_neurons(bench, METHOD)["query"],
        "random": {name: random[f"{name}_after"].to_numpy(dtype=np.float64) for name in METRIC_NAMES},
    }
    rows = [
        {"neurons": name, "number": number, **row}
        for name, after in arms.items()
        for row in _cuts(categories, before, after)
    ]
    table = pd.DataFrame(rows, columns=["category", "neurons", "number", "mrr_cut", "prob_cut"])
    means = table.groupby("neurons")["mrr_cut"].mean()
    seen = (
        f"{number} query neurons cut MRR by {means['query']:.0%} on average over categories, as many random FFN "
        f"neurons by {means['random']:.0%}."
    )
    return Exhibit.of_frame("table_7", bench.model.name, table, seen=seen, prompts=len(indices))


def by_heads(bench: Workbench) -> Exhibit:
    """Return Table 11: what the top 1% heads of each category take from every category."""
    found = left_without_heads(bench, METHOD)
    categories = np.array([bench.prompts[place].category for place in found.indices], dtype=str)
    before = {name: bench.before[name][found.indices] for name in METRIC_NAMES}
    rows = [
        {"heads_of": name, **row}
        for name, after in found.by_category.items()
        for row in _cuts(categories, before, after)
    ]
    table = pd.DataFrame(rows, columns=["heads_of", "category", "mrr_cut", "prob_cut"])
    own = table["heads_of"] == table["category"]
    seen = (
        f"The heads of a category cut its own probability by {table['prob_cut'][own].mean():.0%} and that of the "
        f"others by {table['prob_cut'][~own].mean():.0%}, on average over categories."
    )
    return Exhibit.of_frame("table_11", bench.model.name, table, seen=seen, prompts=len(found.indices))
