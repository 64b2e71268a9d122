"""The prompts that the claims about one model are judged on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from attribution.engine.progress import Progress
from attribution.engine.questions import Question, question_of
from attribution.experiments.selection_rule import known_prompts, one_token_words
from attribution.models.model import Model
from attribution.prompts.knowledge import Knowledge, Prompt
from attribution.prompts.tokens import answer_tokens

__all__ = ["Sample"]


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
        return [prompt for prompt in self.knowledge.prompts if prompt in self._kept]

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
            following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
            for prompt in self.knowledge.prompts:
                if prompt.category == category:
                    own = prompt.answer[1:]
                    swapped.append(replace(prompt, answer=" " + following.get(own, next(iter(distinct), own))))
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
        return [question_of(self.model, prompt.text, prompt.answer) for prompt in self.prompts]

    @cached_property
    def draw_order(self) -> list[int]:
        """Indices of :attr:`prompts` in an order drawn by the hash of their text."""
        return sorted(range(len(self.prompts)), key=lambda index: _draw(self.prompts[index].text))

    def subset(self, size: int) -> list[int]:
        """Return the indices of at most ``size`` of :attr:`prompts`, drawn by hash, ascending: for costly claims."""
        return sorted(self.draw_order[:size])

    def regardless_of_knowledge(self) -> Sample:
        """Return the sample of all prompts with an answer of one token, whether or not the model knows them."""
        askable = [
            prompt
            for prompt in self.knowledge.prompts
            if len(answer_tokens(self.model.tokenizer, prompt.text, prompt.answer)) == 1
        ]
        return Sample(self.model, self.knowledge, max_prompts=self.max_prompts, known=askable)


def _draw(text: str) -> tuple[int, str]:
    return zlib.crc32(text.encode()), text
