"""The experiment: rank the neurons of each prompt, ablate the best, rerun, measure. Batched throughout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from attribution.ablation import ablation_kind, last_logits
from attribution.errors import BadInputError
from attribution.importance import Candidates, Unit, candidates_of, unit_named
from attribution.knowledge import Prompt
from attribution.methods import method_named
from attribution.metrics import measure, outranks_rivals
from attribution.model import Model
from attribution.records import AttentionNeuron, FFNNeuron, Neuron
from attribution.selection import Certificate, top_k
from attribution.tokens import TokenBatch, answer_token, chunk_by_length, encode, pad
from attribution.trace import Activations, read_activations

__all__ = ["Ranking", "ablate", "attribute", "evaluate", "known_prompts", "traced_batches"]

# Tokens in one forward pass, padding included: large enough to keep two cores busy, small enough that the
# activations of a pass stay in tens of megabytes on the bundled models.
_CHUNK_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Ranking:
    """Neurons of one prompt, best first.

    Attributes:
        prompt: The prompt.
        answer: The answer, with its leading space.
        answer_id: Its token id, for :func:`attribution.measure`.
        unit: ``"ffn"`` or ``"attention"``.
        method: Name of the method.
        neurons: Records, best first; ties fall in the order of records.
        scores: Their scores, float64, aligned with ``neurons``; nats for ``log_prob_increase``.
        exact: Why this top k is that of scoring every neuron.
        tokens: The prompt's tokens as text, to name the source position of an attention neuron.
    """

    prompt: str
    answer: str
    answer_id: int
    unit: Unit
    method: str
    neurons: list[Neuron]
    scores: Tensor
    exact: Certificate
    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.neurons)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per neuron, best first, indexed by rank from 1."""
        frame = pd.DataFrame([asdict(neuron) for neuron in self.neurons])
        if self.unit == "attention":
            frame["token"] = [self.tokens[position] for position in frame["position"]]
        frame[self.method] = self.scores.tolist()
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="rank")
        return frame

    def __repr__(self) -> str:
        return (
            f"Ranking of {len(self)} {self.unit} neurons by {self.method} for {self.prompt!r} -> {self.answer!r}, "
            f"{self.exact.scored:,} of {self.exact.total:,} scored\n{self.to_frame()}"
        )


@dataclass(frozen=True)
class _Question:
    """A prompt made ready: its tokens and the token of its answer."""

    text: str
    answer: str
    ids: tuple[int, ...]
    answer_id: int

    def seed(self, seed: int) -> int:
        """Seed of the prompt's random draws: differs by prompt, not by its place in a batch."""
        return zlib.crc32(f"{seed}\n{self.text}\n{self.answer}".encode())


def _question(model: Model, text: str, answer: str) -> _Question:
    ids = encode(model.tokenizer, text, context=model.anatomy.context)
    return _Question(text, answer, tuple(ids), answer_token(model.tokenizer, text, answer))


def _chunks(
    model: Model, questions: Sequence[_Question], *, variants: int = 1
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield question numbers with their padded batch, sized so that ``variants`` rows of each fit one pass."""
    lengths = [len(question.ids) for question in questions]
    for rows in chunk_by_length(lengths, max(1, _CHUNK_TOKENS // variants)):
        yield rows, pad([questions[row].ids for row in rows], device=model.device)


def traced_batches(
    model: Model, prompts: Sequence[Prompt], *, positions: Literal["last", "all"]
) -> Iterator[tuple[Activations, TokenBatch]]:
    """Yield the activations of prompts, batch by batch, in order of length."""
    questions = [_question(model, prompt.text, prompt.answer) for prompt in prompts]
    for _, batch in _chunks(model, questions):
        yield read_activations(model, batch, positions=positions), batch


def _all_candidates(
    model: Model, questions: Sequence[_Question], batch: TokenBatch, units: Sequence[Unit], seed: int
) -> list[dict[Unit, Candidates]]:
    """Trace a batch once and return each prompt's candidates by unit."""
    activations = read_activations(model, batch)
    return [
        {
            unit: candidates_of(
                model.table(unit),
                activations,
                row,
                len(question.ids),
                answer=question.answer_id,
                seed=question.seed(seed),
            )
            for unit in units
        }
        for row, question in enumerate(questions)
    ]


def _prompt_list(prompt: str | Prompt | Sequence[str | Prompt]) -> list[str | Prompt]:
    """Return one prompt or several as a list."""
    if isinstance(prompt, str | Prompt):
        return [prompt]
    if not isinstance(prompt, list | tuple):
        raise BadInputError(
            f"prompt {prompt!r} is a {type(prompt).__name__}; pass a string, a Prompt, or a list of them."
        )
    if not prompt:
        raise BadInputError("the list of prompts is empty; give at least one.")
    return list(prompt)


def _as_list(prompt: str | Prompt | Sequence[str | Prompt], answer: str | Sequence[str] | None) -> list[Prompt]:
    """Return prompts with answers from any accepted form of the two arguments."""
    prompts = _prompt_list(prompt)
    answers: list[Any] = list(answer) if isinstance(answer, list | tuple) else [answer] * len(prompts)
    if len(answers) != len(prompts):
        raise BadInputError(f"{len(prompts)} prompts came with {len(answers)} answers; give one answer each.")
    pairs = []
    for item, text in zip(prompts, answers, strict=True):
        if isinstance(item, Prompt):
            pairs.append(item if text is None else Prompt(item.text, text))
        elif text is None:
            raise BadInputError(f"prompt {item!r} came without an answer; pass one, such as ' Paris'.")
        else:
            pairs.append(Prompt(item, text))
    return pairs


@overload
def attribute(
    model: Model,
    prompt: str | Prompt,
    answer: str | None = None,
    *,
    unit: str = "ffn",
    method: str = "log_prob_increase",
    k: int | None = 10,
    seed: int = 0,
) -> Ranking: ...


@overload
def attribute(
    model: Model,
    prompt: list[str] | list[Prompt] | list[str | Prompt],
    answer: str | Sequence[str] | None = None,
    *,
    unit: str = "ffn",
    method: str = "log_prob_increase",
    k: int | None = 10,
    seed: int = 0,
) -> list[Ranking]: ...


def attribute(
    model: Model,
    prompt: str | Prompt | list[str] | list[Prompt] | list[str | Prompt],
    answer: str | Sequence[str] | None = None,
    *,
    unit: str = "ffn",
    method: str = "log_prob_increase",
    k: int | None = 10,
    seed: int = 0,
) -> Ranking | list[Ranking]:
    """Rank a unit's neurons by how much they do for the answer, at the last position of the prompt.

    Args:
        model: A loaded model.
        prompt: A text that ends right before its answer, a :class:`Prompt`, or a list of either.
        answer: One token with its leading space, or one per prompt; may be left out for :class:`Prompt`.
        unit: ``"ffn"`` or ``"attention"``.
        method: A registered method.
        k: How many neurons to return; every one when ``None``.
        seed: Seed for methods that draw random numbers.

    Returns:
        One :class:`Ranking`, or a list of them for a list of prompts.

    Raises:
        BadInputError: If an argument cannot be used; the message says which and why.
    """
    chosen = unit_named(unit)
    scorer = method_named(method, chosen)
    prompts = _as_list(prompt, answer)
    questions = [_question(model, item.text, item.answer) for item in prompts]
    rankings: dict[int, Ranking] = {}
    for rows, batch in _chunks(model, questions):
        part = [questions[row] for row in rows]
        for row, by_unit in zip(rows, _all_candidates(model, part, batch, (chosen,), seed), strict=True):
            candidates, question = by_unit[chosen], questions[row]
            best, scores, certificate = top_k(candidates, scorer, k)
            rankings[row] = Ranking(
                prompt=question.text,
                answer=question.answer,
                answer_id=question.answer_id,
                unit=chosen,
                method=method,
                neurons=candidates.records(best),
                scores=scores.cpu(),
                exact=certificate,
                tokens=tuple(model.tokenizer.decode([token]) for token in question.ids),
            )
    if isinstance(prompt, str | Prompt):
        return rankings[0]
    return [rankings[row] for row in range(len(questions))]


def ablate(
    model: Model,
    prompt: str | Prompt | Sequence[str | Prompt],
    neurons: Sequence[Neuron] | Sequence[Sequence[Neuron]],
    *,
    kind: str = "zero",
) -> Tensor:
    """Rerun the model with neurons switched off at every position.

    Args:
        model: A loaded model.
        prompt: A text, a :class:`Prompt`, or a list of either.
        neurons: The neurons to switch off; for a list of prompts, one collection per prompt. Attention neurons
            are switched off as (layer, head, dim), at all positions.
        kind: ``"zero"``, as in the paper.

    Returns:
        Logits at the last position: (vocabulary,), or (prompts, vocabulary) for a list of prompts.

    Raises:
        BadInputError: If an argument cannot be used.
    """
    ablation_kind(kind)
    single = isinstance(prompt, str | Prompt)
    texts = [item.text if isinstance(item, Prompt) else item for item in _prompt_list(prompt)]
    variants: Sequence[Any] = [neurons] if single else neurons
    for variant in variants:
        if not isinstance(variant, list | tuple | set | frozenset):
            raise BadInputError(f"{variant!r} is not a collection of neurons; pass a list of records for each prompt.")
    if len(variants) != len(texts):
        raise BadInputError(f"{len(texts)} prompts came with {len(variants)} collections of neurons; give one each.")
    encoded = [encode(model.tokenizer, text, context=model.anatomy.context) for text in texts]
    logits = torch.empty(len(texts), model.anatomy.vocabulary, dtype=model.anatomy.readout.unembedding.dtype)
    for rows in chunk_by_length([len(ids) for ids in encoded], _CHUNK_TOKENS):
        batch = pad([encoded[row] for row in rows], device=model.device)
        logits[rows] = last_logits(model, batch, [variants[row] for row in rows]).cpu()
    return logits[0] if single else logits


def _budget(k: int | Mapping[str, int], unit: str) -> dict[Unit, int]:
    if isinstance(k, Mapping) and not k:
        raise BadInputError("k = {} names no unit; give a number, or a number for each unit to ablate.")
    return {unit_named(name): number for name, number in (k if isinstance(k, Mapping) else {unit: k}).items()}


def _distinct(neurons: Sequence[Neuron]) -> int:
    """Return how many parameters' worth of neurons a set is: attention neurons share rows across positions."""
    return len({n if isinstance(n, FFNNeuron) else AttentionNeuron(n.layer, n.head, n.dim, 0) for n in neurons})


def evaluate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: str | Sequence[str] = "log_prob_increase",
    unit: str = "ffn",
    k: int | Mapping[str, int] = 10,
    kind: str = "zero",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Ablate each prompt's best neurons and measure its answer before and after.

    Args:
        model: A loaded model.
        prompts: A prompt with its answer, or a list of them.
        method: A registered method, or several, which then share one trace per chunk.
        unit: ``"ffn"`` or ``"attention"``; ignored when ``k`` names units.
        k: How many neurons to ablate, or how many of each unit: ``{"attention": 200, "ffn": 100}``.
        kind: ``"zero"``, as in the paper.
        seed: Seed for methods that draw random numbers.
        progress: Show a progress bar.

    Returns:
        One row per method and prompt, in the order given: method, prompt, answer, category, fact, ``distinct``
        (neurons whose parameters differ), and rank, mrr, prob, logp with ``_before`` and ``_after``.

    Raises:
        BadInputError: If an argument cannot be used.
    """
    ablation_kind(kind)
    budget = _budget(k, unit)
    names = [method] if isinstance(method, str) else list(method)
    if not names:
        raise BadInputError("the list of methods is empty; give at least one registered method.")
    methods = {name: {each: method_named(name, each) for each in budget} for name in names}
    prompts = _as_list(prompts, None)
    questions = [_question(model, prompt.text, prompt.answer) for prompt in prompts]
    results: dict[tuple[str, int], dict[str, object]] = {}
    with tqdm(total=len(prompts), desc=f"{model.name} {', '.join(names)}", unit="prompt", disable=not progress) as bar:
        for rows, batch in _chunks(model, questions, variants=1 + len(names)):
            part = [questions[row] for row in rows]
            by_prompt = _all_candidates(model, part, batch, tuple(budget), seed)
            variants: list[list[Neuron]] = [[] for _ in rows]
            for name in names:
                for candidates in by_prompt:
                    chosen: list[Neuron] = []
                    for each, number in budget.items():
                        best, _, _ = top_k(candidates[each], methods[name][each], number)
                        chosen += candidates[each].records(best)
                    variants.append(chosen)
            repeats = torch.arange(len(rows), device=model.device).repeat(1 + len(names))
            logits = last_logits(model, batch.repeat_rows(repeats), variants).unflatten(0, (1 + len(names), len(rows)))
            for place, row in enumerate(rows):
                before = asdict(measure(logits[0, place], questions[row].answer_id))
                for number, name in enumerate(names, start=1):
                    after = asdict(measure(logits[number, place], questions[row].answer_id))
                    results[name, row] = {
                        "method": name,
                        "prompt": prompts[row].text,
                        "answer": prompts[row].answer,
                        "category": prompts[row].category,
                        "fact": prompts[row].fact,
                        "distinct": _distinct(variants[number * len(rows) + place]),
                        **{f"{key}_before": value for key, value in before.items()},
                        **{f"{key}_after": value for key, value in after.items()},
                    }
            bar.update(len(rows))
    return pd.DataFrame([results[name, row] for name in names for row in range(len(prompts))])


def known_prompts(model: Model, prompts: Sequence[Prompt], words: Mapping[str, Sequence[str]]) -> list[Prompt]:
    """Return the prompts that a model answers by the paper's selection rule.

    The correct token must be in the model's top 10 and above every other word of its type.

    Args:
        model: A loaded model.
        prompts: Prompts with answers and categories.
        words: Category to every word of the type, without leading space. A word that is several tokens for this
            model cannot be ranked against the answer and is left out.

    Returns:
        The prompts that pass, in the order given.

    Raises:
        BadInputError: If a prompt or answer cannot be used, or a category has no word list.
    """
    questions = [_question(model, prompt.text, prompt.answer) for prompt in prompts]
    rivals = {category: _rival_tokens(model, each) for category, each in words.items()}
    for prompt in prompts:
        if prompt.category not in rivals:
            raise BadInputError(
                f"prompt {prompt.text!r} has the category {prompt.category!r}, which has no word list among "
                f"{', '.join(rivals)}; pass its words."
            )
    known: set[int] = set()
    for rows, batch in _chunks(model, questions):
        for row, logits in zip(rows, last_logits(model, batch), strict=True):
            if outranks_rivals(logits, questions[row].answer_id, rivals[prompts[row].category]):
                known.add(row)
    return [prompt for row, prompt in enumerate(prompts) if row in known]


def _rival_tokens(model: Model, words: Sequence[str]) -> list[int]:
    tokens = []
    for word in words:
        # Any prompt serves: an answer is tokenised as the continuation of one.
        with suppress(BadInputError):
            tokens.append(answer_token(model.tokenizer, "The word is", f" {word}"))
    return tokens
