"""Vocabulary space: which words the top neurons raise (Table 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attribution.claims.about_methods.common import METHOD, STEPS
from attribution.claims.about_models.survey import Survey, survey
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.exhibits import Exhibit
from attribution.claims.measured import Effects
from attribution.engine.all_scores import score_parts
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates
from attribution.engine.methods import method_named
from attribution.engine.questions import Question
from attribution.engine.ranking import all_candidates
from attribution.engine.top_k import top_k_together
from attribution.engine.vectors import vector_table
from attribution.experiments.selection_rule import one_token_words
from attribution.records import Component, FFNNeuron, SublayerKind

__all__ = ["interpretable_neurons", "words_raised"]

_NEURONS = 10
# Tokens that are looked at, of those whose logits a neuron raises most.
_TOKENS = 10
_SHOWN = 3
# Logits of neurons that are held at a time: 2**24 float64 numbers are 128 MiB.
_HELD_NUMBERS = 2**24


@dataclass(frozen=True)
class _Raised:
    """One neuron on one prompt, with the tokens whose logits it raises most by what it writes there.

    Attributes:
        neuron: The neuron.
        score: Its importance, in nats.
        positive: Whether its coefficient is. A neuron with a negative one raises what its vector lowers.
        tokens: The tokens, most first.
        hits: How many of them are words of the prompt's category; its own answer is not counted.
    """

    neuron: Component
    score: float
    positive: bool
    tokens: tuple[int, ...]
    hits: int


@dataclass(frozen=True)
class _OfPrompt:
    """The top neurons of a prompt, and as many others of the same layers."""

    top: list[_Raised]
    others: list[_Raised]


def _word_ids(bench: Workbench) -> dict[str, Tensor]:
    """Return the tokens of each category's words, of those that are one token."""
    return {
        category: torch.tensor(
            sorted(set(one_token_words(bench.model, words).values())), dtype=torch.long, device=bench.model.device
        )
        for category, words in bench.sample.knowledge.words.items()
    }


def _raised(chosen: Sequence[Candidates], words: Sequence[Tensor], tokens: int) -> list[list[_Raised]]:
    """Return what chosen neurons of several prompts raise; they go through the unembedding together.

    Args:
        chosen: The neurons of each prompt.
        words: Tokens of the words of each prompt's category.
        tokens: How many tokens are looked at.
    """
    table = chosen[0].table
    scores = score_parts([[each] for each in chosen], method_named(METHOD, table.unit))
    sublayer_index, row = (torch.cat([getattr(each, name) for each in chosen]) for name in ("sublayer_index", "row"))
    update = table.unscaled_logits(sublayer_index, row)
    update *= torch.cat([each.coefficient / each.scale for each in chosen])[:, None]
    found = []
    for each, own, (score,), top in zip(
        chosen, words, scores, update.topk(tokens).indices.split([len(each) for each in chosen]), strict=True
    ):
        hits = (torch.isin(top, own) & (top != each.answer)).sum(-1)
        columns = (each.coefficient > 0, score, top, hits)
        records = each.records(torch.arange(len(each), device=top.device))
        rows = zip(records, *(column.tolist() for column in columns), strict=True)
        found.append([_Raised(neuron, value, positive, tuple(ids), hit) for neuron, positive, value, ids, hit in rows])
    return found


def _others(candidates: Candidates, index: Tensor, question: Question, seed: int) -> Tensor:
    """Draw as many other candidates, each from the layer of one of these."""
    rng = np.random.default_rng(question.seed(seed))
    sublayer_indices, taken = candidates.sublayer_index.cpu().numpy(), set(index.tolist())
    drawn: list[int] = []
    for sublayer_index in sublayer_indices[index.cpu().numpy()].tolist():
        first, last = np.searchsorted(sublayer_indices, [sublayer_index, sublayer_index + 1])
        free: list[int] = rng.permutation(np.arange(first, last))[: len(index) + len(drawn) + 1].tolist()
        place = next((each for each in free if each not in taken), free[0])
        taken.add(place)
        drawn.append(place)
    return torch.tensor(drawn, dtype=torch.long, device=index.device)


@measured_once
def _measured(bench: Workbench, kind: SublayerKind, tokens: int) -> tuple[Survey, list[_OfPrompt]]:
    """Return the top neurons of every prompt of the survey, and others, with what they raise."""
    found, words, method = survey(bench), _word_ids(bench), method_named(METHOD, kind)
    questions = [bench.sample.questions[place] for place in found.indices]
    of_prompt: dict[int, _OfPrompt] = {}
    for rows, batch in batches_of(bench.model, questions):
        part = [questions[row] for row in rows]
        each = all_candidates(bench.model, part, batch, {kind: [method]}, seed=bench.seed, steps=STEPS)
        of_kind = [by_unit[kind] for by_unit in each]
        number = min(_NEURONS, *map(len, of_kind))
        best = [top.indices for top in top_k_together(of_kind, method, number)]
        others = [
            _others(candidates, index, question, bench.seed)
            for candidates, index, question in zip(of_kind, best, part, strict=True)
        ]
        chosen = [candidates.take(torch.cat(each)) for candidates, *each in zip(of_kind, best, others, strict=True)]
        size = max(1, _HELD_NUMBERS // (2 * number * len(bench.model.anatomy.readout.unembedding)))
        for start in range(0, len(rows), size):
            here = slice(start, start + size)
            own = [words[found.categories[row]] for row in rows[here]]
            for row, raised in zip(rows[here], _raised(chosen[here], own, tokens), strict=True):
                of_prompt[row] = _OfPrompt(raised[:number], raised[number:])
    return found, [of_prompt[row] for row in range(len(questions))]


def words_raised(bench: Workbench, category: str, kind: SublayerKind, *, tokens: int) -> Effects:
    """Measure how many more words of their category top neurons raise than random neurons of the same layers (Table 9).

    Args:
        bench: The model with its prompts.
        category: The category.
        kind: The kind of neurons.
        tokens: How many tokens are looked at, of those whose logits a neuron raises most.

    Returns:
        Differences of shares of these tokens. A prompt's answer does not count.
    """
    found, of_prompt = _measured(bench, kind, tokens)
    rows = found.of(category)
    shares = {
        name: np.array(
            [np.mean([each.hits / tokens for each in getattr(of_prompt[row], name)]) for row in rows], dtype=np.float64
        )
        for name in ("top", "others")
    }
    note = f"{shares['top'].mean():.1%} against {shares['others'].mean():.1%}" if len(rows) else ""
    return Effects(shares["top"] - shares["others"], indices=[found.indices[row] for row in rows], note=note)


def interpretable_neurons(bench: Workbench) -> Exhibit:
    """Return Table 9: what the neurons that matter to most prompts of a category raise, beside random ones."""
    words, tokenizer = _word_ids(bench), bench.model.tokenizer
    rows: list[dict[str, object]] = []

    def add(category: str, role: str, neuron: str, score: float | None, sign: str, tokens: Sequence[int]) -> None:
        rows.append(
            {
                "category": category,
                "role": role,
                "neuron": neuron,
                "score": score,
                "sign": sign,
                "tokens": " · ".join(tokenizer.decode([token]).strip() for token in tokens),
                "hits": int(torch.isin(torch.tensor(tokens), words[category].cpu()).sum()),
            }
        )

    found = survey(bench)
    kinds: tuple[SublayerKind, ...] = ("ffn", "attention")
    for category in found.named:
        for kind in kinds:
            _, of_prompt = _measured(bench, kind, _TOKENS)
            own = [of_prompt[row] for row in found.of(category)]
            for role, name in (("value", "top"), ("random", "others")):
                every = [each for prompt in own for each in getattr(prompt, name)]
                for neuron, raised in _most_frequent(every)[: _SHOWN if role == "value" else 1]:
                    score = float(np.mean([each.score for each in raised]))
                    positive = np.mean([each.positive for each in raised]) >= 0.5
                    shown = next(each for each in raised if each.positive == positive)
                    add(category, role, neuron, score, "+" if positive else "-", shown.tokens)
        for query_neuron, tokens in _query_neurons(found, category):
            add(category, "query", str(query_neuron), None, "+", tokens)
    frame = pd.DataFrame(rows, columns=["category", "role", "neuron", "score", "sign", "tokens", "hits"])
    hits = frame.groupby("role")["hits"].mean().to_dict()
    seen = "Words of the category among the ten tokens that are raised most: " + ", ".join(
        f"{hits[role]:.1f} for {role} neurons" for role in ("value", "query", "random") if role in hits
    )
    return Exhibit.of_frame("table_9", bench.model.name, frame, seen=seen + ".", prompts=len(found.indices))


def _most_frequent(raised: Sequence[_Raised]) -> list[tuple[str, list[_Raised]]]:
    """Return neurons, whatever their source position, by the number of prompts that have them, most first."""
    by_name: dict[str, list[_Raised]] = {}
    for each in raised:
        by_name.setdefault(str(each.neuron).partition("@")[0], []).append(each)
    return sorted(by_name.items(), key=lambda item: (-len(item[1]), item[0]))


def _query_neurons(found: Survey, category: str) -> list[tuple[FFNNeuron, list[int]]]:
    """Return the FFN neurons that most often are a prompt's top query neurons, with what a positive one raises."""
    counts: dict[FFNNeuron, int] = {}
    for row in found.of(category):
        for neuron in found.queries[row].neurons[:_NEURONS]:
            counts[neuron] = counts.get(neuron, 0) + 1
    best = sorted(counts, key=lambda neuron: (-counts[neuron], neuron))[:_SHOWN]
    table = vector_table(found.bench.model, "ffn")
    assert table is not None, "FFN neurons have vectors of their own"
    sublayer_indices, rows = (
        torch.tensor([getattr(each, name) for each in best], dtype=torch.long) for name in ("layer", "index")
    )
    device = found.bench.model.device
    tokens = (
        table.unscaled_logits(sublayer_indices.to(device), rows.to(device)).topk(_TOKENS).indices
        if best
        else torch.empty(0)
    )
    return list(zip(best, tokens.tolist(), strict=True))
