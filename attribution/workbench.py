"""What the claims of one model share: its known prompts, and each experiment run once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import pandas as pd

from attribution.decomposition import IDENTITIES, decomposition_errors, worst
from attribution.evaluation import evaluate, known_prompts, traced_batches
from attribution.knowledge import Knowledge, Prompt
from attribution.metrics import METRICS
from attribution.model import Model

__all__ = ["Workbench"]


class Workbench:
    """One model with knowledge prompts; measures on demand and remembers what it measured."""

    def __init__(self, model: Model, knowledge: Knowledge, *, progress: bool) -> None:
        self.model = model
        self.knowledge = knowledge
        self._progress = progress
        self._experiments: dict[tuple[object, ...], pd.DataFrame] = {}

    @cached_property
    def known(self) -> list[Prompt]:
        """The prompts that the model answers by the selection rule."""
        return known_prompts(self.model, self.knowledge.prompts, self.knowledge.words)

    @cached_property
    def known_with_swapped_answers(self) -> list[Prompt]:
        """The prompts that pass the selection rule with another fact's answer: the control of what is known."""
        return known_prompts(self.model, self.swapped, self.knowledge.words)

    @cached_property
    def swapped(self) -> list[Prompt]:
        """Every prompt with the next different answer of its category, in file order."""
        swapped = []
        for category in self.knowledge.words:
            answers = [fact.answer for fact in self.knowledge.facts if fact.category == category]
            distinct = list(dict.fromkeys(answers))
            following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
            for prompt in self.knowledge.prompts:
                if prompt.category == category:
                    swapped.append(replace(prompt, answer=" " + following[prompt.answer.strip()]))
        return swapped

    @property
    def known_facts(self) -> int:
        """Number of facts behind the known prompts."""
        return len({prompt.fact for prompt in self.known})

    def experiment(self, methods: tuple[str, ...], k: Mapping[str, int], *, seed: int = 0) -> dict[str, pd.DataFrame]:
        """Ablate the top k of each method on every known prompt.

        Returns:
            Method to its frame, one row per known prompt in the same order, see :func:`attribution.evaluate`.
        """
        if not self.known:
            # Nothing to measure: the judge then says that there are too few prompts.
            columns = ["fact", *(f"{metric}_{when}" for metric in METRICS for when in ("before", "after"))]
            return {name: pd.DataFrame(columns=columns, dtype=float) for name in methods}
        key = (methods, tuple(sorted(k.items())), seed)
        if key not in self._experiments:
            self._experiments[key] = evaluate(
                self.model, self.known, method=methods, k=k, seed=seed, progress=self._progress
            )
        frame = self._experiments[key]
        return {name: rows.reset_index(drop=True) for name, rows in frame.groupby("method", sort=False)}

    @cached_property
    def decomposition_errors(self) -> dict[str, float]:
        """Worst error of each identity over all known prompts, layers and positions, in rounding bounds."""
        errors = [
            decomposition_errors(activations, self.model.anatomy, batch.mask)
            for activations, batch in traced_batches(self.model, self.known, positions="all")
        ]
        return {name: worst(each[name] for each in errors) for name in IDENTITIES}
