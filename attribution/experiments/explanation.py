"""One prompt explained: what its answer comes from, layer by layer down to single neurons, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from attribution.engine.ablation import ablate, outcomes
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates
from attribution.engine.methods import method_named, score_candidates
from attribution.engine.metrics import Outcome, measure
from attribution.engine.queries import QueryRanking, query
from attribution.engine.questions import Question, answer_ids_of, ids_of, prompts_with_answers, question_of
from attribution.engine.ranking import all_candidates
from attribution.engine.top_k import top_k
from attribution.errors import BadInputError
from attribution.experiments.controls import matched
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.records import Component, FFNNeuron, Neuron, Unit

__all__ = [
    "Ablation",
    "Explanation",
    "Prediction",
    "QueryLayer",
    "QueryNeuron",
    "ValueNeuron",
    "explain",
]

_METHOD = "log_prob_increase"
_UNITS: tuple[Unit, ...] = ("layer", "head", "ffn", "attention")
_PREDICTIONS = 10
# How many tokens are named that a neuron raises, and how many that it lowers; the paper's tables name as many.
_TOKENS = 10


@dataclass(frozen=True)
class Prediction:
    """One token that the model may go on with.

    Attributes:
        token: Its text as it continues the prompt.
        id: Its token id.
        prob: Its probability, 0 to 1.
        logp: The natural logarithm of it, in nats.
    """

    token: str
    id: int
    prob: float
    logp: float


@dataclass(frozen=True)
class ValueNeuron:
    """One neuron that makes the answer likely.

    Attributes:
        neuron: Which one.
        source: The token at its source position; ``None`` for FFN neurons, which read the last position.
        score: Its ``log_prob_increase``, in nats.
        first_order: The first-order part <e_w - p, bs(v)>, in nats; ``score = first_order - kl``.
        kl: KL(p || p'), in nats: what it spends on the rest of the distribution.
        coefficient: m of an FFN neuron, alpha * val of an attention neuron, times the scale of a norm that follows.
        raised: The tokens whose logit what it writes raises most, best first. That is the coefficient times the
            vector, so a negative coefficient turns the vector's own order round.
        lowered: Those that it lowers most, the most lowered first.
    """

    neuron: Neuron
    source: str | None
    score: float
    first_order: float
    kl: float
    coefficient: float
    raised: tuple[str, ...]
    lowered: tuple[str, ...]


@dataclass(frozen=True)
class QueryLayer:
    """One component's part in activating the value neurons of one kind.

    Attributes:
        value_unit: Whose, ``"ffn"`` or ``"attention"``.
        component: ``"embedding"``, ``"attention"``, ``"ffn"`` or ``"bias"``.
        layer: Its layer; ``None`` for the embedding and the biases.
        score: Its query score, in nats.
    """

    value_unit: str
    component: str
    layer: int | None
    score: float


@dataclass(frozen=True)
class QueryNeuron:
    """One FFN neuron that activates attention value neurons, with its query score in nats."""

    neuron: FFNNeuron
    score: float


@dataclass(frozen=True)
class Ablation:
    """What is left of the answer when neurons are zeroed, beside others of their layers.

    Attributes:
        name: ``"ffn"`` or ``"attention"`` value neurons, ``"both"``, or ``"query"`` neurons.
        neurons: The zeroed ones. Attention neurons are zeroed as (layer, head, dim), at all positions.
        distinct: How many coefficients that makes: attention neurons of several positions may share one.
        outcome: The answer after it.
        control_neurons: Others of the same layers, each of about the norm of what the one that it stands for writes,
            drawn at random; fewer where a layer has too few.
        control_distinct: How many coefficients those make.
        control: The answer after zeroing those instead.
    """

    name: str
    neurons: tuple[Neuron, ...]
    distinct: int
    outcome: Outcome
    control_neurons: tuple[Neuron, ...]
    control_distinct: int
    control: Outcome


@dataclass(frozen=True)
class Explanation:
    """What one prompt's answer comes from; scores are ``log_prob_increase`` at the last position, in nats.

    Attributes:
        model: The model's name.
        prompt: The prompt.
        answer: The answer, with its leading space.
        answer_id: Its token id.
        answer_given: Whether it was asked for; else it is the model's own first prediction.
        tokens: The prompt's tokens as text.
        outcome: How the model answers.
        predictions: The most likely tokens, best first.
        attention_layers: Score of each attention layer, (layers,).
        ffn_layers: Score of each FFN layer, (layers,).
        heads: Score of each head, (layers, heads).
        ffn_neurons: The best FFN value neurons, best first.
        attention_neurons: The best attention value neurons, best first.
        query_layers: What activates the value neurons, component by component in forward order.
        query_neurons: The FFN neurons that do most to activate attention value neurons, best first; empty if there are
            none below.
        query_value_neurons: How many value neurons those two explain, the paper's 100 + 200 or all there are.
        query_left_out: How many more have an input that cannot be told from zero, and so no shares.
        query_amplification: Largest sum of |terms| over |sum of terms| among them: where it is large, components
            cancel, and a single value neuron may rule the query scores.
        ablations: The effect of zeroing them.
    """

    model: str
    prompt: str
    answer: str
    answer_id: int
    answer_given: bool
    tokens: tuple[str, ...]
    outcome: Outcome
    predictions: tuple[Prediction, ...]
    attention_layers: tuple[float, ...]
    ffn_layers: tuple[float, ...]
    heads: tuple[tuple[float, ...], ...]
    ffn_neurons: tuple[ValueNeuron, ...]
    attention_neurons: tuple[ValueNeuron, ...]
    query_layers: tuple[QueryLayer, ...]
    query_neurons: tuple[QueryNeuron, ...]
    query_value_neurons: int
    query_left_out: int
    query_amplification: float
    ablations: tuple[Ablation, ...]


def explain(model: Model, prompt: str | Prompt, answer: str | None = None, *, k: int = 10) -> Explanation:
    """Explain one prompt: its predictions, and the layers, heads, value and query neurons behind the answer.

    Args:
        model: A loaded model.
        prompt: A text that ends right before its answer, or a :class:`Prompt` with it.
        answer: One token with its leading space; for a text, the model's own first prediction when ``None``.
        k: How many neurons of each kind to name and to zero.

    Raises:
        BadInputError: If an argument cannot be used; the message says which and why.
    """
    text = prompt.text if isinstance(prompt, Prompt) else prompt
    ids = ids_of(model, text)
    logits = ablate(model, text, [])
    given = answer is not None or isinstance(prompt, Prompt)
    (asked,) = prompts_with_answers(prompt, answer) if given else (_first_answer(model, text, ids, logits),)
    question = question_of(model, asked)
    ((_, batch),) = batches_of(model, [question])
    method = method_named(_METHOD, "neuron")
    # One trace serves all units.
    candidates = all_candidates(model, [question], batch, {unit: [method] for unit in _UNITS}, seed=0, steps=1)[0]
    tokens = tuple(model.tokenizer.decode([token]) for token in ids)
    best = {unit: top_k(candidates[unit], method, k, with_first_order=True) for unit in _UNITS[2:]}
    value_neurons = {}
    for unit, selection in best.items():
        assert selection.first_order is not None, "the method has them"
        value_neurons[unit] = _value_neurons(
            model, question, candidates[unit].take(selection.indices), selection.scores, selection.first_order
        )
    # Candidates come in forward order: attention before FFN in every layer, and head after head.
    by_layer = score_candidates(method, candidates["layer"]).view(-1, 2).T.tolist()
    by_head = score_candidates(method, candidates["head"]).view(-1, model.anatomy.heads).tolist()
    queries = query(model, asked, k=k)
    return Explanation(
        model=model.name,
        prompt=text,
        answer=question.answer,
        answer_id=question.answer_id,
        answer_given=given,
        tokens=tokens,
        outcome=measure(logits, question.answer_id),
        predictions=_predictions(model, question, logits),
        attention_layers=tuple(by_layer[0]),
        ffn_layers=tuple(by_layer[1]),
        heads=tuple(map(tuple, by_head)),
        ffn_neurons=value_neurons["ffn"],
        attention_neurons=value_neurons["attention"],
        query_layers=tuple(
            QueryLayer(unit, component, None if pd.isna(layer) else int(layer), score)
            for unit, component, layer, score in queries.layers.itertuples(index=False)
        ),
        query_neurons=tuple(map(QueryNeuron, queries.neurons, queries.scores.tolist())),
        query_value_neurons=len(queries.value_neurons),
        query_left_out=len(queries.left_out),
        query_amplification=queries.amplification,
        ablations=_ablations(
            model, question, candidates, {unit: selection.indices for unit, selection in best.items()}, queries
        ),
    )


def _continued(tokenizer: Any, ids: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """Return each token's text as it continues a prompt: some tokenizers drop a first token's space."""
    before: str = tokenizer.decode(list(ids))
    texts = []
    for token in tokens:
        after: str = tokenizer.decode([*ids, token])
        # Bytes that only make a character together, and tokenizers that clean up punctuation, change what is before.
        texts.append(after[len(before) :] if after.startswith(before) else tokenizer.decode([token]))
    return texts


def _first_answer(model: Model, text: str, ids: Sequence[int], logits: Tensor) -> Prompt:
    """Return a text with the model's first prediction as its answer.

    Raises:
        BadInputError: If its text is not read as that token again, such as a special token's.
    """
    token = int(logits.argmax())
    (answer,) = _continued(model.tokenizer, ids, [token])
    prompt = Prompt(text, answer, joined=True)
    try:
        same = answer_ids_of(model, prompt) == [token]
    except BadInputError:
        same = False
    if not same:
        raise BadInputError(
            f"the model's first prediction for prompt {text!r} is token {token} ({answer!r}), which cannot be given "
            "as an answer; give the answer to explain, such as ' Paris'."
        )
    return prompt


def _predictions(model: Model, question: Question, logits: Tensor) -> tuple[Prediction, ...]:
    tokens = logits.topk(min(_PREDICTIONS, len(logits))).indices.tolist()
    texts = _continued(model.tokenizer, question.ids, tokens)
    measured = [measure(logits, token) for token in tokens]
    return tuple(
        Prediction(text, token, each.prob, each.logp) for text, token, each in zip(texts, tokens, measured, strict=True)
    )


def _value_neurons(
    model: Model, question: Question, chosen: Candidates, scores: Tensor, first_order: Tensor
) -> tuple[ValueNeuron, ...]:
    number = min(_TOKENS, model.anatomy.vocabulary)
    # What is written, so with the coefficient's sign.
    raised = chosen.update.topk(number).indices.tolist()
    lowered = chosen.update.topk(number, largest=False).indices.tolist()
    neurons = cast("list[Neuron]", chosen.records(torch.arange(len(chosen))))
    return tuple(
        ValueNeuron(
            neuron=neuron,
            source=None if isinstance(neuron, FFNNeuron) else model.tokenizer.decode([question.ids[neuron.position]]),
            score=score,
            first_order=first,
            kl=first - score,
            coefficient=coefficient,
            raised=tuple(_continued(model.tokenizer, question.ids, up)),
            lowered=tuple(_continued(model.tokenizer, question.ids, down)),
        )
        for neuron, score, first, coefficient, up, down in zip(
            neurons, scores.tolist(), first_order.tolist(), chosen.coefficient.tolist(), raised, lowered, strict=True
        )
    )


def _ablations(
    model: Model,
    question: Question,
    candidates: dict[Unit, Candidates],
    best: dict[Unit, Tensor],
    queries: QueryRanking,
) -> tuple[Ablation, ...]:
    """Zero value neurons, query neurons and others like them, all in one batch."""
    indices: dict[str, dict[Unit, Tensor]] = {
        "ffn": {"ffn": best["ffn"]},
        "attention": {"attention": best["attention"]},
        "both": {"ffn": best["ffn"], "attention": best["attention"]},
    }
    if queries.neurons:
        indices["query"] = {"ffn": candidates["ffn"].indices_of(queries.neurons)}
    arms: list[tuple[Neuron, ...]] = []
    for of_unit in indices.values():
        controls = {unit: matched(candidates[unit], chosen) for unit, chosen in of_unit.items()}
        for each in (of_unit, controls):
            records: list[Component] = [
                record for unit, chosen in each.items() for record in candidates[unit].records(chosen)
            ]
            arms.append(cast("tuple[Neuron, ...]", tuple(records)))
    after, distinct = outcomes(model, [question] * len(arms), arms)
    return tuple(
        Ablation(
            name=name,
            neurons=arms[row],
            distinct=distinct[row],
            outcome=after[row],
            control_neurons=arms[row + 1],
            control_distinct=distinct[row + 1],
            control=after[row + 1],
        )
        for name, row in zip(indices, range(0, len(arms), 2), strict=True)
    )
