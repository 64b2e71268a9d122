"""Each section of a notebook's figures, compared with what this engine recomputes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from attribution.claims.about_notebooks.printed import (
    SECTIONS,
    Figures,
    attention_neuron_of,
    ffn_neuron_of,
    figures_of,
    head_of,
)
from attribution.claims.about_notebooks.recount import Recount
from attribution.claims.about_notebooks.tolerance import Difference, Ranked, difference, half_a_unit, largest, same
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Exact
from attribution.claims.paper import paper_model
from attribution.engine.questions import ids_of
from attribution.errors import BadInputError
from attribution.records import Component, Layer, Neuron, SublayerKind, Unit

__all__ = ["Comparison", "cells_of", "farthest_figure", "figures_about"]

_Read: TypeAlias = Callable[[str], Neuron]

_NEURONS: tuple[Unit, Unit] = ("ffn", "attention")


class Comparison:
    """One notebook's figures beside a model.

    Args:
        recount: The model with the notebook's prompt.
        figures: What the notebook printed.
    """

    def __init__(self, recount: Recount, figures: Figures) -> None:
        self.recount = recount
        self.figures = figures

    @classmethod
    def of(cls, bench: Workbench, figures: Figures) -> Comparison:
        """Return the comparison for a model, with what was recomputed for it already."""
        prediction = figures["prediction"]
        text, leading_space = prediction["analysed"]["text"], figures["leading_space"]
        return cls(_recount(bench, prediction["sentence"], text, leading_space), figures)

    def differences(self, section: str) -> list[Difference]:
        """Return every figure of a section with its distance from what is recomputed."""
        compare: Callable[[Figures], Iterator[Difference]] = getattr(self, f"_{section}")
        return list(compare(self.figures[section]))

    # The sections, in the order of the notebooks' cells.

    def _prediction(self, printed: Figures) -> Iterator[Difference]:
        question = self.recount.question
        yield self._same_tokens("tokens", printed["tokens"], question.ids)
        yield from self._tokens("predictions", printed["top"], self.recount.tokens(self.recount.logits))
        first = int(self.recount.logits.argmax())
        yield same("token id", printed["analysed"]["id"], first)
        yield same("token id as an answer", question.answer_id, first)
        yield self._same_tokens("token", [printed["analysed"]["text"]], [first])

    def _layers(self, printed: Figures) -> Iterator[Difference]:
        found, tolerance = self.recount.layers(), self._of_nats(printed["decimals"])
        total = 0.0
        kinds: tuple[SublayerKind, SublayerKind] = ("attention", "ffn")
        for kind in kinds:
            own = [found[Layer(layer, kind)] for layer in range(self.recount.model.anatomy.layers)]
            yield same(f"number of {kind} layers", len(printed[kind]), len(own))
            for layer, (value, recomputed) in enumerate(zip(printed[kind], own, strict=False)):
                yield difference(f"{kind} layer {layer}", value, recomputed, tolerance)
            # The sums are of the rounded figures, so each of them may add its own half unit.
            yield difference(f"sum of {kind} layers", printed[f"{kind}_sum"], sum(own), tolerance * len(own))
            total += printed[f"{kind}_sum"]
        yield difference("total", printed["total"], self.recount.telescoped(), tolerance * len(found))
        yield difference("total of the sums", printed["total"], total, tolerance)

    def _heads(self, printed: Figures) -> Iterator[Difference]:
        half, early = half_a_unit(printed["decimals"]), printed["rounded_before_sorting"]
        ranked = self.recount.ranked("head", rounded=half if early else 0.0)
        scores = [(head_of(head), score) for head, score in printed["scores"]]
        yield from self._scored("head", scores, ranked, half=0.0 if early else half)

    def _head_by_position(self, printed: Figures) -> Iterator[Difference]:
        head, rows = head_of(printed["head"]), printed["positions"]
        ranked, written = self.recount.positions_of(head)
        weights = self.recount.attention_weights(self.recount.question.text, head)
        half = half_a_unit(printed["decimals"])
        yield same("positions", len(rows), len(ranked.items))
        yield from self._scored("position", [(row["position"], row["score"]) for row in rows], ranked, half=half)
        # The embedding, then attention and FFN of each layer below.
        below = self.recount.components[: 2 * head.layer + 1]
        for row in rows:
            place = row["position"]
            if place not in ranked.place:
                continue
            yield self._same_tokens(f"token {place}", [row["token"]], [self.recount.question.ids[place]])
            yield from self._weights(f"attention weight {place}", {place: row["attention_weight"]}, weights, half)
            for name, logits in (
                ("layer_input", self.recount.project(below[:, place].sum(0))),
                ("attention_outputs", self.recount.project(below[1::2, place].sum(0))),
                ("head_output", written[place]),
            ):
                yield from self._tokens(f"{name} {place}", row[name], self.recount.tokens(logits))

    def _attention_weights(self, printed: Figures) -> Iterator[Difference]:
        sentence = printed["sentence"]
        model = self.recount.model
        ids = ids_of(model, sentence)
        yield self._same_tokens("tokens", printed["tokens"], ids)
        half = half_a_unit(printed["decimals"])
        for head, row in printed["heads"].items():
            weights = self.recount.attention_weights(sentence, head_of(head))
            yield same(f"positions of {head}", len(row), len(weights.items))
            yield from self._weights(f"weight of {head}", dict(enumerate(row)), weights, half)

    def _ffn_value_neurons(self, printed: Figures) -> Iterator[Difference]:
        yield from self._value_neurons("ffn", printed, ffn_neuron_of)

    def _attention_value_neurons(self, printed: Figures) -> Iterator[Difference]:
        yield from self._value_neurons("attention", printed, attention_neuron_of)

    def _query_layers_of_ffn_neurons(self, printed: Figures) -> Iterator[Difference]:
        values = self.recount.ranking("ffn", printed["value_neurons"])
        side = self.recount.query_side(values, printed["subkey"])
        half = half_a_unit(printed["decimals"])
        yield same("components", len(printed["scores"]), len(side.components.items))
        yield from self._scored("component", printed["scores"], side.components, half=half)
        yield difference("sum", printed["sum"], sum(score for _, score in printed["scores"]), half)
        # Shares add up to one, so that the sum is that of the value neurons' importance; each figure was rounded.
        tolerance = half * len(printed["scores"]) + self.recount.rounding.nats * math.sqrt(len(values))
        yield difference("sum of the importance", printed["sum"], float(values.scores.sum()), tolerance)

    def _query_layers_of_attention_neurons(self, printed: Figures) -> Iterator[Difference]:
        number = printed["value_neurons"]
        side = self.recount.query_side(self.recount.ranking("attention", number))
        yield from self._scored("component", printed["scores"], side.components, half=half_a_unit(printed["decimals"]))
        low, high = _mean_layers(self.recount.ranked("attention", number), number)
        half = half_a_unit(printed["mean_layer_decimals"])
        outside = max(low - printed["mean_layer"], printed["mean_layer"] - high, 0.0)
        yield Difference("mean layer of the value neurons", outside / half)

    def _query_neurons(self, printed: Figures) -> Iterator[Difference]:
        side = self.recount.query_side(self.recount.ranking("attention", printed["value_neurons"]))
        ranked = self.recount.query_neurons(side, len(printed["neurons"]))
        yield from self._neurons("query neuron", printed, cast("Ranked[Neuron]", ranked), ffn_neuron_of)

    def _counts_by_layer(self, printed: Figures) -> Iterator[Difference]:
        number, queried = printed["value_neurons"], printed["query_neurons"]
        values = {unit: self.recount.ranked(unit, number).members(number) for unit in _NEURONS}
        side = self.recount.query_side(self.recount.ranking("attention", printed["value_neurons_of_query"]))
        queries = self.recount.query_neurons(side, queried).members(queried)
        surely_value, maybe_value = values["ffn"]
        surely_query, maybe_query = cast("tuple[set[Component], set[Component]]", queries)
        counted = {
            "ffn_value": values["ffn"],
            "attention_value": values["attention"],
            "query_only": (surely_query - maybe_value, maybe_query - surely_value),
            "query_and_value": (surely_query & surely_value, maybe_query & maybe_value),
        }
        for name, (surely, maybe) in counted.items():
            low, high = (Counter(record.layer for record in records) for records in (surely, maybe))
            for layer in range(self.recount.model.anatomy.layers):
                count = printed[name].get(str(layer), 0)
                # Nothing is left to round: each neuron too many or too few, of those that no tie explains, is one.
                outside = max(low[layer] - count, count - high[layer], 0)
                yield Difference(f"{name} in layer {layer}", 1.0 + outside if outside else 0.0)
        for unit in _NEURONS:
            total = sum(printed[f"{unit}_value"].values())
            yield same(f"number of {unit} value neurons", total, min(number, self.recount.size(unit)))
        both = sum(printed["query_only"].values()) + sum(printed["query_and_value"].values())
        yield same("number of query neurons", both, min(queried, len(side.ranking)))

    def _query_neurons_of_one_neuron(self, printed: Figures) -> Iterator[Difference]:
        neuron, rank = attention_neuron_of(printed["attention_neuron"]), printed["multiplier_rank"]
        side = self.recount.query_side([neuron])
        # The notebook multiplied by the score of another neuron, which its loop before had left behind.
        left_behind = float(self.recount.ranking("attention", rank).scores[-1])
        factor = left_behind / float(side.importance[0])
        ranked = self.recount.query_neurons(side, len(printed["neurons"]), factor=factor)
        yield from self._neurons("query neuron", printed, cast("Ranked[Neuron]", ranked), ffn_neuron_of)

    def _neuron_through_head(self, printed: Figures) -> Iterator[Difference]:
        logits = self.recount.through_head(ffn_neuron_of(printed["ffn_neuron"]), head_of(printed["head"]))
        yield from self._top_and_last("tokens", printed, logits)

    # What several sections have in common.

    def _of_nats(self, decimals: int) -> float:
        return half_a_unit(decimals) + self.recount.rounding.nats

    def _value_neurons(self, unit: Unit, printed: Figures, read: _Read) -> Iterator[Difference]:
        ranked = self.recount.ranked(unit, len(printed["neurons"]))
        yield from self._neurons(f"{unit} value neuron", printed, cast("Ranked[Neuron]", ranked), read)

    def _neurons(self, what: str, printed: Figures, ranked: Ranked[Neuron], read: _Read) -> Iterator[Difference]:
        rows = printed["neurons"]
        half = half_a_unit(printed["decimals"])
        yield from self._scored(what, [(read(row["id"]), row["score"]) for row in rows], ranked, half=half)
        for row in rows:
            neuron = read(row["id"])
            if neuron in ranked.place:
                yield from self._top_and_last(f"{what} {row['id']}", row, self.recount.value_vector(neuron))

    def _scored(
        self, what: str, printed: Sequence[tuple[Any, float]], ranked: Ranked[Any], *, half: float = 0.0
    ) -> Iterator[Difference]:
        """Compare a printed list: its order, and each score within half a unit and its error."""
        yield from ranked.order(what, [item for item, _ in printed])
        for item, score in printed:
            if item in ranked.place:
                place = ranked.place[item]
                tolerance = half + float(ranked.errors[place])
                yield difference(f"score of {what} {item}", score, float(ranked.scores[place]), tolerance)

    def _weights(self, what: str, printed: dict[int, float], weights: Ranked[int], half: float) -> Iterator[Difference]:
        for position, weight in printed.items():
            if position in weights.place:
                tolerance = half + float(weights.errors[position])
                yield difference(f"{what} at {position}", weight, float(weights.scores[position]), tolerance)

    def _tokens(self, what: str, printed: list[str], ranked: Ranked[int]) -> Iterator[Difference]:
        yield from ranked.order(what, self.recount.vocabulary.read(printed, ranked))

    def _top_and_last(self, what: str, printed: Figures, logits: Any) -> Iterator[Difference]:
        yield from self._tokens(f"top tokens of {what}", printed["top"], self.recount.tokens(logits))
        lowest_last = self.figures["last_order"] == "lowest last"
        last = printed["last"][::-1] if lowest_last else printed["last"]
        yield from self._tokens(f"last tokens of {what}", last, self.recount.tokens(-logits))

    def _same_tokens(self, what: str, printed: Sequence[str], ids: Sequence[int]) -> Difference:
        plain = [self.recount.vocabulary.plain(text) for text in printed]
        return same(what, plain, [self.recount.vocabulary.text(token) for token in ids])


@measured_once
def _recount(bench: Workbench, sentence: str, text: str, leading_space: str) -> Recount:
    return Recount(bench.model, sentence, text, leading_space)


def _mean_layers(ranked: Ranked[Component], number: int) -> tuple[float, float]:
    """Return the lowest and the highest mean layer of the first so many, however ties fall."""
    surely, maybe = ranked.members(number)
    number = min(number, len(ranked.items))
    fixed = [record.layer for record in surely]
    free = sorted(record.layer for record in maybe - surely)
    missing = number - len(fixed)
    low, high = free[:missing], free[len(free) - missing :]
    return sum(fixed + low) / number, sum(fixed + high) / number


def figures_about(bench: Workbench, section: str) -> Figures:
    """Return what the paper's notebook about a model printed.

    Raises:
        BadInputError: If no notebook is about the model, or the notebooks have no such section.
    """
    name = paper_model(bench.model.name)
    if name is None or section not in SECTIONS:
        raise BadInputError(
            f"no notebook printed {section!r} for the model {bench.model.name!r}; use one of the paper's models and "
            f"one of {', '.join(SECTIONS)}."
        )
    return figures_of(name)


def cells_of(figures: Figures, section: str) -> str:
    """Return where a section was printed."""
    printed = figures[section]
    cells = printed["cells"] if "cells" in printed else [printed["cell"]]
    return f"notebook cell{'s' * (len(cells) > 1)} {', '.join(map(str, cells))}"


def farthest_figure(bench: Workbench, figures: Figures, section: str) -> Exact:
    """Measure the largest difference of a section's figures from what the engine computes, in tolerances."""
    found = Comparison.of(bench, figures).differences(section)
    worst = largest(found)
    return Exact(worst.size, prompts=1, facts=1, note=f"{len(found)} comparisons, the farthest: {worst.what}")
