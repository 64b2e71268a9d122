"""The prompts that the claims about one model are judged on."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property

from attribution.engine.progress import Progress
from attribution.engine.questions import Question, answer_ids_of, is_askable, question_of
from attribution.experiments.selection_rule import known_prompts, one_token_words
from attribution.models.model import Model
from attribution.prompts.knowledge import Knowledge, Prompt
from attribution.records import Unit

__all__ = ["SCORED_IN_FULL", "SCORED_OF_CATEGORY", "Sample"]

SCORED_IN_FULL: dict[Unit, int] = {"ffn": 100, "attention": 50}
"""Prompts on which all neurons of a unit are scored where a claim is about all prompts."""

SCORED_OF_CATEGORY = 5
"""Prompts of each category on which all neurons are scored where a claim is about categories."""


class Sample:
    """The knowledge prompts of one model: those that it knows, those that claims are judged on, and subsets of them.

    Args:
        model: A loaded model.
        knowledge: Facts and words.
        max_prompts: Judge claims on at most this many prompts; on all of them when ``None``.
        known: Prompts that count as known without asking the model; when ``None``, those that pass the selection rule.
        progress: How it is shown how far that is; its label is the measurement's.
    """

    def __init__(
        self,
        model: Model,
        knowledge: Knowledge,
        *,
        max_prompts: int | None = None,
        known: Sequence[Prompt] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.knowledge = knowledge
        self.max_prompts = max_prompts
        self.progress = progress or Progress()
        if known is not None:
            self.known = list(known)

    @cached_property
    def known(self) -> list[Prompt]:
        """The prompts that the model answers correctly by the selection rule."""
        found = [prompt for prompt in self.knowledge.prompts if prompt in self._kept]
        self.progress.say(self.in_words(found))
        return found

    def in_words(self, known: Sequence[Prompt] | None = None) -> str:
        """Return how many prompts and facts the model knows, in all and by category."""
        known = self.known if known is None else known

        def shares(categories: Collection[str]) -> tuple[str, str]:
            """Return which share of the prompts is known, and which share of the facts."""
            own, every = (
                [prompt for prompt in prompts if prompt.category in categories]
                for prompts in (known, self.knowledge.prompts)
            )
            facts = len({prompt.fact for prompt in own}), len({prompt.fact for prompt in every})
            return f"{len(own)} of {len(every)}", "{} of {}".format(*facts)

        prompts, facts = shares(self.knowledge.words)
        by_category = ["{} {} ({})".format(category, *shares([category])) for category in self.knowledge.words]
        return f"{self.model.name} knows {prompts} prompts, {facts} facts: {', '.join(by_category)}"

    @cached_property
    def known_with_swapped_answers(self) -> list[Prompt]:
        """The prompts that pass the selection rule with another fact's answer: the control for :attr:`known`."""
        return [prompt for prompt in self.swapped if prompt in self._kept]

    @cached_property
    def _kept(self) -> frozenset[Prompt]:
        """What passes the selection rule of all prompts with their own answers and with swapped ones."""
        bar = replace(self.progress, label=f"{self.model.name}: what it knows")
        asked = [*self.knowledge.prompts, *self.swapped]
        return frozenset(known_prompts(self.model, asked, self.knowledge.words, progress=bar))

    @cached_property
    def swapped(self) -> list[Prompt]:
        """Every prompt with the next different answer of its category, in file order.

        Answers of several tokens are passed over, because the selection rule could not ask for them. If only one
        answer is left in a category, it alternates with another word of the category.
        """
        swapped = []
        for category, words in self.knowledge.words.items():
            answers = [fact.answer for fact in self.knowledge.facts if fact.category == category]
            distinct = list(one_token_words(self.model, answers))
            if len(distinct) < 2:
                distinct = list(one_token_words(self.model, [*distinct, *words]))[:2]
            for prompt in self.knowledge.prompts:
                if prompt.category == category:
                    others = (prompt.answered(word) for word in _following(distinct, prompt.word))
                    # Where answers join the prompt, which of them are one token depends on it.
                    fitting = (each for each in others if not prompt.joined or is_askable(self.model, each))
                    swapped.append(next(fitting, prompt))
        return swapped

    @cached_property
    def prompts(self) -> list[Prompt]:
        """One known prompt of each fact, drawn by the hash of its text, in file order: what methods are judged on.

        Other phrasings of a fact would add little, because intervals resample facts. With ``max_prompts`` the facts
        are drawn by hash as well, so that a smaller run is part of a larger one.
        """
        drawn: dict[str, Prompt] = {}
        for prompt in self.known:
            if prompt.fact not in drawn or _draw(prompt.text) < _draw(drawn[prompt.fact].text):
                drawn[prompt.fact] = prompt
        facts = sorted(drawn, key=_draw)[: self.max_prompts]
        return [prompt for fact, prompt in drawn.items() if fact in set(facts)]

    @cached_property
    def questions(self) -> list[Question]:
        """The same prompts, tokenised."""
        return [question_of(self.model, prompt) for prompt in self.prompts]

    @cached_property
    def draw_order(self) -> list[int]:
        """Indices of :attr:`prompts` in an order drawn by the hash of their text."""
        return sorted(range(len(self.prompts)), key=lambda index: _draw(self.prompts[index].text))

    def subset(self, size: int) -> list[int]:
        """Return the indices of at most ``size`` of :attr:`prompts`, drawn by hash, ascending: for costly claims."""
        return sorted(self.draw_order[:size])

    def of_each_category(self, number: int) -> list[int]:
        """Return the indices of up to ``number`` of :attr:`prompts` in each category, drawn by hash."""
        order = {place: rank for rank, place in enumerate(self.draw_order)}
        indices: list[int] = []
        for category in dict.fromkeys(prompt.category for prompt in self.prompts):
            own = [place for place, prompt in enumerate(self.prompts) if prompt.category == category]
            indices += sorted(sorted(own, key=lambda place: order[place])[:number])
        return indices

    def scored_in_full(self, unit: Unit) -> list[int]:
        """Return the indices of the prompts on which any claim wants the scores of all neurons of a unit."""
        return sorted({*self.subset(SCORED_IN_FULL[unit]), *self.of_each_category(SCORED_OF_CATEGORY)})

    def regardless_of_knowledge(self) -> Sample:
        """Return the sample of all prompts with an answer of one token, whether or not the model knows them."""
        askable = [prompt for prompt in self.knowledge.prompts if len(answer_ids_of(self.model, prompt)) == 1]
        return Sample(self.model, self.knowledge, max_prompts=self.max_prompts, known=askable)


def _following(words: Sequence[str], word: str) -> list[str]:
    """Return the words behind one of them, then those before it, then itself; all of them for one that is none."""
    place = list(words).index(word) + 1 if word in words else 0
    return [*words[place:], *words[:place]]


def _draw(text: str) -> tuple[int, str]:
    return zlib.crc32(text.encode()), text
