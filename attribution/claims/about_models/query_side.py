"""The query side: which layers activate value neurons, and where query neurons lie (Tables 6 and 14, Figure 8)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.claims.about_methods.query_neurons import query_budget
from attribution.claims.about_models.survey import Survey, depth, survey
from attribution.claims.bench import Workbench
from attribution.claims.exhibits import Exhibit
from attribution.claims.measured import Effects
from attribution.records import SublayerKind

__all__ = [
    "how_much_deeper_ffn_neurons_read",
    "how_much_deeper_value_neurons_are",
    "query_and_value_neurons",
    "query_layers_of_attention_neurons",
    "query_layers_of_ffn_neurons",
]

_TABLES = {"ffn": "table_6", "attention": "table_14"}


def _shares(found: Survey, kind: SublayerKind) -> npt.NDArray[np.float64]:
    """Return each layer's part in activating a prompt's value neurons of a kind, (n, 2 * layers); all parts add to 1.

    The embedding and the biases have parts as well, which are not among the columns.
    """
    layers = found.bench.model.anatomy.layers
    shares = np.zeros((len(found.indices), 2 * layers))
    for row, ranking in enumerate(found.queries):
        own = ranking.layers[ranking.layers["value_unit"] == kind]
        total = own["query_score"].sum()
        named = own[own["component"].isin(["attention", "ffn"])]
        columns = 2 * named["layer"].to_numpy(dtype=int) + (named["component"] == "ffn").to_numpy(dtype=int)
        shares[row, columns] = named["query_score"].to_numpy(dtype=float) / total if total else 0
    return shares


def how_much_deeper_ffn_neurons_read(bench: Workbench) -> Effects:
    """Measure how much deeper the query layers of FFN value neurons are than those of attention ones (Tables 6, 14).

    Returns:
        Differences of mean depths, which run from 0 for the first layer to 1 for the last.
    """
    found = survey(bench)
    depths = {}
    for kind in ("attention", "ffn"):
        best = np.argsort(-_shares(found, kind), axis=1, kind="stable")[:, : found.top_layers] // 2
        depths[kind] = depth(bench, best).mean(1)
    note = f"{depths['attention'].mean():.2f} against {depths['ffn'].mean():.2f}" if len(found.indices) else ""
    return Effects(depths["ffn"] - depths["attention"], indices=found.indices, note=note)


def query_layers_of_ffn_neurons(bench: Workbench) -> Exhibit:
    """Return Table 6: the ten layers with the largest mean part in activating FFN value neurons, by category."""
    return _query_layers(bench, "ffn")


def query_layers_of_attention_neurons(bench: Workbench) -> Exhibit:
    """Return Table 14: the ten layers with the largest mean part in activating attention value neurons, by category."""
    return _query_layers(bench, "attention")


def _query_layers(bench: Workbench, kind: SublayerKind) -> Exhibit:
    found = survey(bench)
    frame = found.best(_shares(found, kind), "layer", "share")
    top = frame[frame["rank"] <= 3]["layer"].value_counts()
    often = ", ".join(f"{name} ({count})" for name, count in top.head(4).items())
    seen = f"Most often among the first three of the {len(found.named)} categories: {often}."
    return Exhibit.of_frame(_TABLES[kind], bench.model.name, frame, seen=seen, prompts=len(found.indices))


def _split(found: Survey) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]:
    """Return how many query neurons lie in each layer, (n, layers): those that are no value neurons, and the others."""
    number, layers = query_budget(found.bench), found.bench.model.anatomy.layers
    only, both = (np.zeros((len(found.indices), layers), dtype=int) for _ in range(2))
    for row, (value, woken_by) in enumerate(zip(found.ffn, found.queries, strict=True)):
        values = set(value.neurons[:number])
        for neuron in woken_by.neurons[:number]:
            (both if neuron in values else only)[row, neuron.layer] += 1
    return only, both


def how_much_deeper_value_neurons_are(bench: Workbench) -> Effects:
    """Measure how much deeper those query neurons are that are value neurons too than the others (Figure 8).

    Returns:
        Differences of mean depths, which run from 0 for the first layer to 1 for the last.
    """
    found = survey(bench)
    only, both = _split(found)
    rows = np.flatnonzero((only.sum(1) > 0) & (both.sum(1) > 0))
    scale = depth(bench, np.arange(bench.model.anatomy.layers))
    depths = [counts[rows] @ scale / counts[rows].sum(1) for counts in (only, both)]
    note = f"{depths[0].mean():.2f} against {depths[1].mean():.2f}" if len(rows) else ""
    return Effects(depths[1] - depths[0], indices=[found.indices[row] for row in rows], note=note)


def query_and_value_neurons(bench: Workbench) -> Exhibit:
    """Return Figure 8: how many query neurons lie in each layer, value neurons too or not, per prompt."""
    found = survey(bench)
    only, both = _split(found)
    frame = pd.DataFrame(
        {
            "layer": np.arange(only.shape[1]),
            "query_only": only.mean(0) if len(only) else np.zeros(only.shape[1]),
            "query_value": both.mean(0) if len(both) else np.zeros(both.shape[1]),
        }
    )
    seen = (
        f"Of a prompt's top {query_budget(bench)} query neurons {frame['query_value'].sum():.1f} are among its top "
        "value neurons too."
    )
    return Exhibit.of_frame("figure_8", bench.model.name, frame, seen=seen, prompts=len(found.indices))
