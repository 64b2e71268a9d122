"""What measurements of models have in common: some prompts of each category, every part of the model scored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.claims.about_methods.common import METHOD
from attribution.claims.about_methods.query_neurons import query_budget
from attribution.claims.bench import Workbench, measured_once
from attribution.engine.queries import QueryRanking, query
from attribution.engine.questions import question_of
from attribution.engine.ranking import Ranking
from attribution.prompts.knowledge import Prompt
from attribution.records import Component, Head, Layer, Unit

__all__ = ["PER_CATEGORY", "Survey", "depth", "survey", "survey_of"]

PER_CATEGORY = 50
"""Prompts of each category that are surveyed; more would narrow the intervals, not change what is seen."""

# The paper's numbers of value neurons of each kind, and of those that are looked at for sharing.
_VALUE_NUMBERS: dict[Unit, int] = {"ffn": 100, "attention": 200}
_SHARED_OF = 300
_LARGEST_SHARE = 0.05
_TOP_LAYERS = 10


@dataclass(frozen=True)
class Survey:
    """Some known prompts of each category, with what attribution says of them.

    Attributes:
        bench: The model with its prompts.
        indices: Which of the bench's prompts, in order.
    """

    bench: Workbench
    indices: list[int]

    @cached_property
    def categories(self) -> npt.NDArray[np.str_]:
        """The category of each prompt, (n,)."""
        return np.array([self.bench.prompts[place].category for place in self.indices], dtype=str)

    def of(self, category: str) -> npt.NDArray[np.intp]:
        """Return the rows of a category."""
        return np.flatnonzero(self.categories == category)

    @property
    def named(self) -> list[str]:
        """The categories, in the order of the prompts."""
        return list(dict.fromkeys(self.categories.tolist()))

    @cached_property
    def layers(self) -> npt.NDArray[np.float64]:
        """Importance of each layer, in nats, (n, 2 * layers): attention and FFN of each block in turn."""
        return self._scores("layer")

    @cached_property
    def layers_for_other_answers(self) -> npt.NDArray[np.float64]:
        """The same for the answer of another fact of the category, which the prompt does not ask for."""
        swapped = {prompt.text: prompt for prompt in self.bench.sample.swapped}
        return self._scores("layer", [swapped[self.bench.prompts[place].text] for place in self.indices])

    @cached_property
    def heads(self) -> npt.NDArray[np.float64]:
        """Importance of each head, in nats, (n, layers * heads)."""
        return self._scores("head")

    def _scores(self, unit: Literal["head", "layer"], others: list[Prompt] | None = None) -> npt.NDArray[np.float64]:
        questions = [self.bench.sample.questions[place] for place in self.indices]
        if others is not None:
            questions = [question_of(self.bench.model, each) for each in others]
        return self.bench.scores(METHOD, unit, questions)

    def records(self, unit: Unit) -> list[Component]:
        """Return every layer or head, in the order of the columns above."""
        anatomy = self.bench.model.anatomy
        if unit == "layer":
            return [Layer(layer, kind) for layer in range(anatomy.layers) for kind in ("attention", "ffn")]
        return [Head(layer, head) for layer in range(anatomy.layers) for head in range(anatomy.heads)]

    def best(
        self, scores: npt.NDArray[np.float64], unit: Literal["layer", "head"], column: str, number: int = 10
    ) -> pd.DataFrame:
        """Return each category's parts of the largest mean score: columns category, rank, the unit, and ``column``.

        Args:
            scores: One for each prompt and layer or head, (n, parts).
            unit: What the columns of ``scores`` are, in the order of :meth:`records`.
            column: What the scores are.
            number: How many of each category.
        """
        rows = []
        for category in self.named:
            means = scores[self.of(category)].mean(0)
            for rank, place in enumerate(np.argsort(-means, kind="stable")[:number].tolist(), start=1):
                rows.append((category, rank, str(self.records(unit)[place]), means[place]))
        return pd.DataFrame(rows, columns=["category", "rank", unit, column])

    def rank(self, unit: Unit, k: int, *, method: str = METHOD) -> list[Ranking]:
        """Rank a unit on every prompt; without first-order terms."""
        return self.bench.rankings(method, unit, k, indices=self.indices)

    def value_neurons(self, unit: Unit) -> int:
        """How many of a unit's neurons are its value neurons: the paper's number, or all of a smaller model."""
        anatomy = self.bench.model.anatomy
        each = anatomy.ffn_neurons if unit == "ffn" else anatomy.heads * anatomy.head_dim
        return min(_VALUE_NUMBERS[unit], anatomy.layers * each)

    @property
    def shared_of(self) -> int:
        """Among how many top FFN neurons shared ones are looked for: the paper's 300, or 5% of a smaller model's."""
        anatomy = self.bench.model.anatomy
        return max(1, min(_SHARED_OF, int(_LARGEST_SHARE * anatomy.layers * anatomy.ffn_neurons)))

    @property
    def top_layers(self) -> int:
        """How many layers are the top ones: the paper's 10, or a quarter of a smaller model's."""
        return max(1, min(_TOP_LAYERS, self.bench.model.anatomy.layers // 2))

    @cached_property
    def ffn(self) -> list[Ranking]:
        """The top FFN neurons of each prompt: as many as any claim looks at."""
        return self.rank("ffn", max(self.value_neurons("ffn"), self.shared_of, query_budget(self.bench)))

    @cached_property
    def queries(self) -> list[QueryRanking]:
        """What activates each prompt's value neurons, by layer and by FFN neuron."""
        prompts = [self.bench.prompts[place] for place in self.indices]
        number = max(self.shared_of, query_budget(self.bench))
        value_neurons = [self.rank(unit, self.value_neurons(unit)) for unit in _VALUE_NUMBERS]
        rankings = list(zip(*value_neurons, strict=True))
        return query(self.bench.model, prompts, value_neurons=rankings, k=number) if prompts else []


def survey_of(bench: Workbench, per_category: int) -> Survey:
    """Return a survey of at most so many prompts of each category, drawn by hash."""
    return Survey(bench, bench.sample.of_each_category(per_category))


@measured_once
def survey(bench: Workbench) -> Survey:
    """Return the survey of a model."""
    return survey_of(bench, PER_CATEGORY)


def depth(bench: Workbench, layers: Sequence[int] | npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return how deep layers lie: 0 for the first, 1 for the last."""
    return np.asarray(layers, dtype=np.float64) / max(1, bench.model.anatomy.layers - 1)
