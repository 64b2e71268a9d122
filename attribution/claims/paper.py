"""The paper's published figures, in the columns of our exhibits, so that the two can stand side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from attribution.models.registry import registry
from attribution.resources import fixtures_folder

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ADDRESS", "PAPER_MODELS", "SERVED", "paper_model", "published", "remarks", "source", "worked_example"]

PAPER_MODELS = {"gpt2-large": "GPT-2 large", "llama-7b": "Llama-7B"}
"""The models of the paper: our registered names, and how it writes them."""

SERVED = {"table_12": "table_5", "figure_9": "figure_2", "figure_10": "figure_3"}
"""What the appendix shows for the other model, and the exhibit that is the counterpart of both."""

ADDRESS = "https://arxiv.org/abs/2312.12141"

# Its own letters for the methods of Table 2.
_METHODS = {
    "o": "none",
    "a": "log_prob_increase",
    "b": "log_prob",
    "c": "prob_increase",
    "d": "vector_norm",
    "e": "coefficient",
    "f": "reciprocal_rank",
    "g": "output_norm",
    "h": "coefficient_by_rank",
}
_WHICH = {"all": "all", "positive": "positive", "top100": "top 100", "top200": "top 200"}
_CUTS = ("MRR_decrease_pct", "prob_decrease_pct")
_Row: TypeAlias = tuple[Any, ...]


@cache
def _tables() -> dict[str, Any]:
    text = (fixtures_folder("paper") / "tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def source() -> str:
    """Return where the figures come from."""
    return str(_tables()["source"])


def paper_model(model: str) -> str | None:
    """Return the paper's model that one of ours is, by its registered name or by its hub id; ``None`` if it is none."""
    names = (name for name in PAPER_MODELS if model in (name, registry()[name].source))
    return next(names, None)


def published(name: str, model: str) -> pd.DataFrame | None:
    """Return what the paper prints for an exhibit, in the exhibit's own columns.

    Per cent become shares from 0 to 1, short names of categories full ones, lists ranks. What the exhibit has and the
    paper does not is missing.

    Args:
        name: Name of the exhibit.
        model: Name of one of our models.

    Returns:
        The frame; ``None`` if nothing is printed as numbers, or nothing for this model.
    """
    import pandas as pd

    of_paper = paper_model(model)
    if name not in _READERS or of_paper is None:
        return None
    columns, read = _READERS[name]
    return pd.DataFrame(list(read(name, of_paper)), columns=list(columns))


def worked_example() -> list[tuple[list[int], list[int], list[int], list[float]]]:
    """Return the rows of Table 1: bs(x), bs(v), bs(x+v) and p(x+v), as printed."""
    table = _tables()["table_1"]
    rows = table["values"].values()
    return [(table["base"]["bs_x"], row["bs_v"], row["bs_x_plus_v"], row["p_x_plus_v"]) for row in rows]


def remarks(name: str) -> list[str]:
    """Return what the paper says in words about a table or figure, and what is odd in the printed one."""
    tables = _tables()
    said, notes = tables["headline"], tables.get(name, {})
    result: list[str] = []
    if name in ("table_7", "table_13"):
        key = "random_1000_decrease_pct" if name == "table_7" else "random_same_number_decrease_pct"
        random = said["query_neurons_1000" if name == "table_7" else "value_neurons_300"][key]
        result.append(
            f"As many random neurons cost {random['MRR']:g}% of the MRR and {random['prob']:g}% of the probability; "
            "of which model is not stated."
        )
    elif name == "table_8":
        for model, share in said["shared_neurons"]["mean_shared_pct_of_300"].items():
            result.append(
                f"{PAPER_MODELS[model]}: {share['value']:g}% of 300 value neurons and {share['query']:g}% of 300 query "
                "neurons are shared, on average."
            )
    elif name == "table_11":
        for model in PAPER_MODELS:
            own, other = (
                said["heads_top1pct"][f"{which}_knowledge_mean_decrease_pct"][model] for which in ("own", "unrelated")
            )
            result.append(
                f"{PAPER_MODELS[model]}, {said['heads_top1pct']['n_heads'][model]} heads: the text gives a mean fall "
                f"of {own['MRR']:g}% (MRR) and {own['prob']:g}% (probability) for a category's own heads, "
                f"{other['MRR']:g}% and {other['prob']:g}% for those of unrelated ones."
            )
        result.append(f"Which is which: {notes['axes']}.")
    elif name == "figure_2":
        layers = said["value_neuron_layers_figure2_llama"]
        log, plain = layers["log_probability_increase_and_log_probability"], layers["probability_increase"]
        result.append(
            f"In words, for Llama-7B: by increase of log p and by log p the neurons lie in layers {log[0]} to "
            f"{log[1]}, by increase of p in layers {plain[0]} to {plain[1]}."
        )
    elif name == "figure_3":
        curve = said["curve_segments"]
        log, plain = curve["log_probability_approximately_linear"], curve["probability_approximately_linear"]
        result.append(
            f"In words, for Llama-7B: log p is about linear in segments {log[0]} to {log[1]}, p in segments {plain[0]} "
            f"to {plain[1]}."
        )
    elif name == "figure_8":
        figure = said["figure_8"]
        drop = figure["queryonly_count_starts_to_drop_at_fraction_of_layers"]
        result.append(
            f"In words, of {figure['n_query']:,} query and {figure['n_value']:,} value neurons: the number of those "
            f"that are only query neurons starts to fall at about {drop:.0%} of the layers."
        )
    if "note" in notes:
        result.append(f"As printed: {notes['note']}.")
    return result


def _category(short: str) -> str:
    return str(_tables()["conventions"]["knowledge"][short])


def _methods(name: str, model: str) -> Iterator[_Row]:
    for letter, row in _tables()[name]["values"][model].items():
        yield _METHODS[letter], row["MRR"], _share(row["prob"]), row["logp"]


def _kinds(name: str, model: str) -> Iterator[_Row]:
    for kind, totals in _tables()[name]["values"][model].items():
        for short, total in totals.items():
            yield _category(short), kind, total


def _sums(name: str, model: str) -> Iterator[_Row]:
    """Of Llama-7B in Table 5, of GPT-2 large in Table 12."""
    table = next(table for table in (name, "table_12") if model in _tables()[table]["values"])
    for kind, sums in _tables()[table]["values"][model].items():
        for which, totals in sums.items():
            for short, total in totals.items():
                yield _category(short), kind, _WHICH[which], total


def _ranks(name: str, model: str) -> Iterator[_Row]:
    for short, listed in _tables()[name]["values"][model].items():
        for rank, each in enumerate(listed, start=1):
            yield _category(short), rank, f"a{each['layer']}.{each['head']}" if isinstance(each, dict) else each, None


def _query_cuts(name: str, model: str) -> Iterator[_Row]:
    number = _tables()["headline"]["query_neurons_1000"]["n"]
    for short, row in _tables()[name]["values"][model].items():
        yield _category(short), "query", number, *_cuts(row)


def _value_cuts(name: str, model: str) -> Iterator[_Row]:
    number = _tables()["headline"]["value_neurons_300"]["n_total"]
    for short, row in _tables()[name]["values"][model].items():
        yield _category(short), number, *_cuts(row)


def _shared(name: str, model: str) -> Iterator[_Row]:
    top = _tables()["headline"]["shared_neurons"]["top_n"]
    for side, counts in _tables()[name]["values"][model].items():
        for short, shared in counts.items():
            yield _category(short), side, shared, shared / top, None, top


def _neurons(name: str, model: str) -> Iterator[_Row]:
    for row in _tables()[name]["values"]:
        if row["model"] == model:
            place = f"f{row['layer']}" if row["type"] == "ffn" else f"a{row['layer']}.{row['head']}"
            yield None, row["role"], f"{place}-{row['index']}", None, None, " · ".join(row["top_tokens"]), None


def _matrix(name: str, model: str) -> Iterator[_Row]:
    for heads_of, row in _tables()[name]["values"][model].items():
        for short, cuts in row.items():
            yield _category(heads_of), _category(short), *_cuts(cuts)


def _cuts(row: dict[str, float]) -> _Row:
    return tuple(_share(row[cut]) for cut in _CUTS)


def _share(percent: float) -> float:
    # As many digits as were printed: 7.1 / 100 is not 0.071.
    return round(percent / 100, 6)


_RANKED_LAYERS = ("category", "rank", "layer", "share")
_READERS: dict[str, tuple[tuple[str, ...], Callable[[str, str], Iterator[_Row]]]] = {
    "table_2": (("method", "mrr", "prob", "logp"), _methods),
    "table_3": (("category", "kind", "total"), _kinds),
    "table_4": (("category", "rank", "layer", "importance"), _ranks),
    "table_5": (("category", "kind", "which", "total"), _sums),
    "table_6": (_RANKED_LAYERS, _ranks),
    "table_7": (("category", "neurons", "number", "mrr_cut", "prob_cut"), _query_cuts),
    "table_8": (("category", "side", "shared", "share", "expected", "top"), _shared),
    "table_9": (("category", "role", "neuron", "score", "sign", "tokens", "hits"), _neurons),
    "table_10": (("category", "rank", "head", "importance"), _ranks),
    "table_11": (("heads_of", "category", "mrr_cut", "prob_cut"), _matrix),
    "table_13": (("category", "number", "mrr_cut", "prob_cut"), _value_cuts),
    "table_14": (_RANKED_LAYERS, _ranks),
}
