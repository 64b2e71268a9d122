"""Attribution of a prompt: its neurons, heads or layers, ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from attribution.engine.all_scores import worth_brackets
from attribution.engine.batching import batches_of, map_batches
from attribution.engine.gradients import Effects, read_effects
from attribution.engine.importance import Candidates, TracedPrompt, candidates_of, seen_together
from attribution.engine.methods import Method, check_blocks, method_named, score_candidates
from attribution.engine.progress import Progress
from attribution.engine.questions import Question, prompts_with_answers, question_of
from attribution.engine.search import Together
from attribution.engine.top_k import Certificate, TopK, top_k_together
from attribution.engine.trace import read_activations
from attribution.engine.vectors import VectorTable, vector_table
from attribution.models.model import Model
from attribution.models.running import run_where_weights_are
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import TokenBatch, pad
from attribution.records import SUBLAYERS, Component, FFNNeuron, SublayerKind, Unit, unit_named

if TYPE_CHECKING:
    import pandas as pd

# Probabilities of states that are held at a time, of several prompts: 2**26 float32 numbers are 256 MiB.
_HELD_NUMBERS = 2**26

__all__ = [
    "Ranking",
    "Search",
    "all_candidates",
    "attribute",
    "candidates_of_each",
    "rank_all",
    "rank_batch",
    "scores_of",
]

NAMES: dict[Unit, str] = {
    "ffn": "ffn neurons",
    "attention": "attention neurons",
    "neuron": "ffn and attention neurons",
    "head": "heads",
    "head_position": "heads at one position",
    "layer": "layers",
}


@dataclass(frozen=True, eq=False)
class Ranking:
    """What was attributed for one prompt, best first.

    Attributes:
        prompt: The prompt.
        answer: The answer, with its leading space.
        answer_id: Its token id, for :func:`attribution.measure`.
        unit: What was ranked.
        method: Name of the method.
        neurons: Records, best first; ties fall in the order of records. Heads and layers are records too.
        scores: Their scores, float64, aligned with ``neurons``; nats for ``log_prob_increase``.
        exact: Why this top k is that of scoring everything.
        tokens: The prompt's tokens as text, to name source positions.
        first_order: Of ``log_prob_increase``, the first-order term <e_w - p, bs(v)> of each score, in nats; ``None``
            for other methods.
    """

    prompt: str
    answer: str
    answer_id: int
    unit: Unit
    method: str
    neurons: list[Component]
    scores: Tensor
    exact: Certificate
    tokens: tuple[str, ...]
    first_order: Tensor | None = None

    def __len__(self) -> int:
        return len(self.neurons)

    def first(self, k: int) -> Ranking:
        """Return the k best of them: as a search for k would, as none left out is tied with any found."""
        terms = None if self.first_order is None else self.first_order[:k]
        return replace(self, neurons=self.neurons[:k], scores=self.scores[:k], first_order=terms)

    @property
    def kl(self) -> Tensor | None:
        """KL(p || p') of each neuron, in nats: what it spends on the rest of the distribution, score = first - KL."""
        return None if self.first_order is None else self.first_order - self.scores

    def to_frame(self) -> pd.DataFrame:
        """Return one row per record, best first, indexed by rank from 1."""
        # A machine that holds the weights makes rankings too, and need not have pandas.
        import pandas as pd

        columns: dict[str, list[object]] = {}
        for number, record in enumerate(self.neurons):
            for name, value in _columns(record, self.unit).items():
                columns.setdefault(name, [None] * len(self.neurons))[number] = value
        frame = pd.DataFrame(columns)
        if self.unit == "neuron":
            # A neuron of one kind lacks the other kind's fields.
            whole = [name for name in ("index", "head", "dim", "position") if name in frame]
            frame[whole] = frame[whole].astype("Int64")
        if "position" in frame:
            tokens = [None if pd.isna(position) else self.tokens[int(position)] for position in frame["position"]]
            frame["token"] = pd.array(tokens, dtype="string")
        frame[self.method] = self.scores.tolist()
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="rank")
        return frame

    def _heading(self) -> str:
        return (
            f"Ranking of {len(self)} {NAMES[self.unit]} by {self.method} for {self.prompt!r} -> {self.answer!r}, "
            f"{self.exact.scored:,} of {self.exact.total:,} scored"
        )

    def __repr__(self) -> str:
        return f"{self._heading()}\n{self.to_frame().to_string(max_rows=20)}"

    def _repr_html_(self) -> str:
        """Return it as notebooks show it."""
        return f"<p>{escape(self._heading())}</p>\n{self.to_frame().to_html(max_rows=20)}"


def _columns(record: Component, unit: Unit) -> dict[str, object]:
    fields: dict[str, object] = asdict(record)
    if unit == "neuron":
        return {"layer": fields.pop("layer"), "kind": "ffn" if isinstance(record, FFNNeuron) else "attention", **fields}
    return fields


def all_candidates(
    model: Model,
    questions: Sequence[Question],
    batch: TokenBatch,
    wanted: Mapping[Unit, Sequence[Method]],
    *,
    seed: int,
    steps: int,
) -> list[dict[Unit, Candidates]]:
    """Trace a batch once and return each prompt's candidates by unit.

    Args:
        model: A loaded model.
        questions: One per row of the batch.
        batch: Their tokens.
        wanted: The methods that each unit is to be scored by; backward passes that they need are run as well.
        seed: Seed for methods that draw random numbers.
        steps: Points on the path of integrated gradients.
    """
    activations = read_activations(model, batch, logits=False)
    answers = torch.tensor([question.answer_id for question in questions], device=batch.ids.device)
    needs: dict[str, set[SublayerKind]] = {}
    for unit, methods in wanted.items():
        for method in methods:
            if method.effects is not None:
                needs.setdefault(method.effects, set()).update(SUBLAYERS[unit])
    effects = {
        kind: read_effects(model, batch, answers, kind, units=tuple(sorted(sublayers)), steps=steps)
        for kind, sublayers in needs.items()
    }
    found: list[dict[Unit, Candidates]] = []
    for row, question in enumerate(questions):
        prompt = TracedPrompt(model.anatomy, activations, row, len(question.ids))
        by_unit = {}
        for unit, methods in wanted.items():
            table = vector_table(model, unit)
            kinds = {method.effects for method in methods if method.effects is not None}
            by_unit[unit] = candidates_of(
                unit,
                prompt,
                table,
                answer=question.answer_id,
                seed=question.seed(seed),
                effects={} if table is None else {kind: _by_sublayer(effects[kind], table, prompt) for kind in kinds},
            )
        found.append(by_unit)
    for unit, methods in wanted.items():
        for method in methods:
            if found and not method.built_in:
                check_blocks(method, found[0][unit])
    return found


def candidates_of_each(
    model: Model, questions: Sequence[Question], wanted: Mapping[Unit, Sequence[Method]], search: Search
) -> list[dict[Unit, Candidates]]:
    """Trace prompts batch by batch, here, and return each one's candidates by unit, see :func:`all_candidates`.

    They are small: what is derived from the states of a prompt is made when it is asked for.
    """
    found: dict[int, dict[Unit, Candidates]] = {}
    for rows, batch in batches_of(model, questions):
        part = [questions[row] for row in rows]
        candidates = all_candidates(model, part, batch, wanted, seed=search.seed, steps=search.steps)
        found.update(zip(rows, candidates, strict=True))
    return [found[row] for row in range(len(questions))]


def _by_sublayer(effects: Effects, table: VectorTable, prompt: TracedPrompt) -> list[Tensor]:
    """Return what one backward pass says of each sublayer's neurons for one prompt."""
    found, row, length = [], prompt.row, prompt.length
    for each in table.sublayers:
        effect = effects.attention if each.kind == "attention" else effects.ffn
        assert effect is not None, "read for the sublayers of the unit"
        found.append(effect[each.layer, row, :, :length] if each.kind == "attention" else effect[each.layer, row])
    return found


@dataclass(frozen=True)
class Search:
    """How neurons are ranked.

    Attributes:
        seed: Seed for methods that draw random numbers.
        steps: Points on the path of integrated gradients.
        with_first_order: Return the first-order terms of the scores as well, of methods that have them.
        exact_scores: Compute all scores of a search in float64, not only those that its order hangs on.
    """

    seed: int = 0
    steps: int = 20
    with_first_order: bool = False
    exact_scores: bool = False


def rank_all(
    model: Model,
    questions: Sequence[Question],
    wanted: Mapping[str, Mapping[Unit, int | None]],
    search: Search,
    *,
    progress: Progress | None = None,
) -> list[dict[str, dict[Unit, Ranking]]]:
    """Return the rankings of each question by method and unit, batch by batch where the weights are.

    Args:
        model: A loaded model.
        questions: The prompts, tokenised.
        wanted: Method to unit to how many; all when ``None``. All share one trace per batch.
        search: How they are ranked.
        progress: The bar.
    """
    lengths = [len(question.ids) for question in questions]
    return map_batches(model, questions, rank_batch, wanted, search, lengths=lengths, progress=progress)


def rank_batch(
    model: Model,
    questions: Sequence[Question],
    wanted: Mapping[str, Mapping[Unit, int | None]],
    search: Search,
) -> list[dict[str, dict[Unit, Ranking]]]:
    """Trace prompts once, in one batch, and return the rankings of each by method and unit, see :func:`rank_all`.

    The model's weights are here.
    """
    # 1. One trace, with the backward passes that any of the methods needs.
    batch = pad([question.ids for question in questions], device=model.device)
    methods = {(name, unit): method_named(name, unit) for name, units in wanted.items() for unit in units}
    by_unit: dict[Unit, list[Method]] = {}
    for (_, unit), method in methods.items():
        by_unit.setdefault(unit, []).append(method)
    candidates = all_candidates(model, questions, batch, by_unit, seed=search.seed, steps=search.steps)
    # 2. The best of each prompt, by each method and unit; prompts that fit are seen through the unembedding together.
    found: list[dict[str, dict[Unit, Ranking]]] = [{name: {} for name in wanted} for _ in questions]
    size = _prompts_together(model, candidates[0]) if candidates else 1
    for start in range(0, len(questions), size):
        part = slice(start, start + size)
        seen = {unit: _seen([each[unit] for each in candidates[part]], own) for unit, own in by_unit.items()}
        together = {unit: Together(own) for unit, own in seen.items()}
        for (name, unit), method in methods.items():
            best = top_k_together(
                seen[unit],
                method,
                wanted[name][unit],
                together=together[unit],
                with_first_order=search.with_first_order,
                exact_scores=search.exact_scores,
            )
            for question, own, chosen, into in zip(questions[part], seen[unit], best, found[part], strict=True):
                into[name][unit] = _ranking(model, question, own, chosen, name, unit)
    return found


def _seen(candidates: Sequence[Candidates], methods: Sequence[Method]) -> Sequence[Candidates]:
    """Project the states of several prompts in one product, if any method's scores in float64 follow from them."""
    projected = any(each.rising is not None and not each.rising.uniform for each in methods)
    return seen_together(candidates) if projected and not worth_brackets(candidates[0].table) else candidates


def _prompts_together(model: Model, one: Mapping[Unit, Candidates]) -> int:
    """Return of how many prompts the distributions of all sublayers are held at a time."""
    states = sum(len(candidates.table.sublayers) for candidates in one.values())
    return max(1, _HELD_NUMBERS // (states * len(model.anatomy.readout.unembedding)))


def _ranking(model: Model, question: Question, candidates: Candidates, best: TopK, method: str, unit: Unit) -> Ranking:
    terms = best.first_order
    return Ranking(
        prompt=question.text,
        answer=question.answer,
        answer_id=question.answer_id,
        unit=unit,
        method=method,
        neurons=candidates.records(best.indices),
        scores=best.scores.cpu(),
        exact=best.certificate,
        tokens=tuple(model.tokenizer.decode([token]) for token in question.ids),
        first_order=None if terms is None else terms.cpu(),
    )


def _scores_of(model: Model, question: Question, neurons: Sequence[Component]) -> Tensor:
    method = method_named("log_prob_increase", "neuron")
    batch = pad([question.ids], device=model.device)
    candidates = all_candidates(model, [question], batch, {"neuron": [method]}, seed=0, steps=1)[0]["neuron"]
    return score_candidates(method, candidates.take(candidates.indices_of(neurons))).cpu()


def scores_of(model: Model, prompt: str | Prompt, answer: str | None, neurons: Sequence[Component]) -> Tensor:
    """Return the log-probability increase of chosen neurons of one prompt, (n,), float64, in nats.

    Raises:
        BadInputError: If one is no neuron, or not in the model or the prompt.
    """
    (item,) = prompts_with_answers(prompt, answer)
    return run_where_weights_are(model, _scores_of, question_of(model, item), list(neurons))


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
    steps: int = 20,
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
    steps: int = 20,
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
    steps: int = 20,
) -> Ranking | list[Ranking]:
    """Rank neurons, heads or layers by how much they do for the answer, at the last position of the prompt.

    Args:
        model: A loaded model.
        prompt: A text that ends right before its answer, a :class:`Prompt`, or a list of either.
        answer: One token with its leading space, or one per prompt; may be left out for :class:`Prompt`.
        unit: ``"ffn"`` or ``"attention"`` neurons, ``"neuron"`` for both together, ``"head"``, ``"head_position"`` (one
            head, one source position), or ``"layer"``.
        method: A registered method.
        k: How many to return; every one when ``None``.
        seed: Seed for methods that draw random numbers.
        steps: Points on the path of integrated gradients.

    Returns:
        One :class:`Ranking`, or a list of them for a list of prompts.

    Raises:
        BadInputError: If an argument cannot be used; the message says which and why.
    """
    # 1. What is asked, checked before anything runs.
    chosen = unit_named(unit)
    method_named(method, chosen)
    # 2. The prompts, each with its tokens and the one token of its answer.
    prompts = prompts_with_answers(prompt, answer)
    questions = [question_of(model, item) for item in prompts]
    # 3. Trace, bound, score and certify, batch by batch where the weights are: see rank_batch.
    search = Search(seed, steps, with_first_order=True, exact_scores=True)
    found = rank_all(model, questions, {method: {chosen: k}}, search)
    rankings = [each[method][chosen] for each in found]
    return rankings[0] if isinstance(prompt, str | Prompt) else rankings
