"""The query side: what activates a prompt's value neurons, component by component and down to single FFN neurons.

A value neuron n of importance S_n fires by the inner product of its subkey k_n with what a norm makes of the residual
stream x. The stream is a sum of components z_c: the embedding and what every sublayer before wrote. With sigma, gamma
and beta the scale, weight and bias of that norm and b the bias of the projection,

    sigma (pre-activation) = sum_c <z_c, k'> + sigma (<beta, k> + b),    k' = gamma k - mean(gamma k)

(without the mean for RMSNorm, and k' = k, sigma = 1, beta = 0 where no norm comes before). Each term's share of the
sum, weighted by importance, is the component's query score (arXiv 2312.12141, normalised as its published code does):

    Q(c) = sum_n S_n <z_c, k'_n> / (sigma_n pre-activation_n)

so the scores of all components and of the biases add up to sum_n S_n. The shares are of the pre-activation, before
the nonlinearity of an FFN and before the clip that some families (OLMo) put on values: a clipped value no longer
follows its inputs, but they are what holds it there. A share may be negative or above one where components cancel;
the closer the denominator is to zero, the larger all shares of that neuron.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import TypeAlias, cast, overload

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attribution.engine.batching import map_batches
from attribution.engine.questions import Question, prompts_with_answers, question_of
from attribution.engine.ranking import Ranking, attribute, scores_of
from attribution.engine.subkeys import SUBKEYS, SubkeyKind, components_of, query_neuron_scores, read_subkeys, shares
from attribution.engine.trace import Activations, read_activations
from attribution.errors import BadInputError
from attribution.models.anatomy import Anatomy
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.prompts.tokens import pad
from attribution.records import AttentionNeuron, FFNNeuron, Neuron, SublayerKind
from attribution.wording import pluralize

__all__ = ["QueryRanking", "query"]

# How many value neurons of each unit the paper takes (its Tables 6 and 14).
_VALUE_NEURONS: dict[SublayerKind, int] = {"ffn": 100, "attention": 200}
# Numbers kept of one forward pass: 2**26 float32 numbers are 256 MiB.
_TRACED_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class QueryRanking:
    """What activates the value neurons of one prompt.

    Attributes:
        prompt: The prompt.
        answer: The answer, with its leading space.
        answer_id: Its token id.
        neurons: Query FFN neurons, best first; ties fall in the order of records. They activate the attention value
            neurons, at whose source positions they fire; empty if there are none above layer 0.
        scores: Their query scores, float64, aligned with ``neurons``; in the unit of the value neurons' scores,
            nats for ``log_prob_increase``.
        candidates: How many query FFN neurons there are: those of every layer below the highest attention value
            neuron.
        layers: Query score of every component: columns ``value_unit`` (``"ffn"`` or ``"attention"``, those that
            have value neurons), ``component`` (``"embedding"``, ``"attention"``, ``"ffn"``, ``"bias"``), ``layer``
            (missing for embedding and bias) and ``query_score``. Zero for layers above all value neurons.
        value_neurons: The value neurons that are explained, in the order given.
        value_scores: Their scores S_n, float64, aligned.
        left_out: Value neurons whose denominator cannot be told from zero, so that they have no shares.
        amplification: Largest sum of |terms| over |denominator| among ``value_neurons``, at least 1. Where it is
            large, components cancel, shares are far outside [0, 1], and one neuron may rule the whole ranking.
        subkey: The subkey of FFN value neurons.
        centring: Whether LayerNorm's centring is included.
        biases: Whether the biases of norms and projections are included.
    """

    prompt: str
    answer: str
    answer_id: int
    neurons: list[FFNNeuron]
    scores: Tensor
    candidates: int
    layers: pd.DataFrame
    value_neurons: list[Neuron]
    value_scores: Tensor
    left_out: list[Neuron]
    amplification: float
    subkey: SubkeyKind
    centring: bool
    biases: bool

    def __len__(self) -> int:
        return len(self.neurons)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per query FFN neuron, best first, indexed by rank from 1."""
        return pd.DataFrame(
            {
                "layer": [neuron.layer for neuron in self.neurons],
                "index": [neuron.index for neuron in self.neurons],
                "query_score": self.scores.tolist(),
            },
            index=pd.RangeIndex(1, len(self) + 1, name="rank"),
        )

    def _heading(self) -> str:
        return (
            f"QueryRanking of {len(self)} of {self.candidates:,} query FFN neurons for {self.prompt!r} -> "
            f"{self.answer!r}, activating {len(self.value_neurons)} value neurons ({len(self.left_out)} left out, "
            f"amplification at most {self.amplification:.3g})"
        )

    def __repr__(self) -> str:
        return f"{self._heading()}\n{self.to_frame()}"

    def _repr_html_(self) -> str:
        """Return it as notebooks show it."""
        return f"<p>{escape(self._heading())}</p>\n{self.to_frame().to_html(max_rows=20)}"


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`query`, checked."""

    k: int | None
    subkey: SubkeyKind
    centring: bool
    biases: bool


ValueNeurons: TypeAlias = Ranking | Sequence[Ranking] | Sequence[Neuron]
"""Value neurons of one prompt: a ranking with its scores, several, or records, which are then scored."""


def _subkey_named(name: str, anatomy: Anatomy) -> SubkeyKind:
    for kind in SUBKEYS:
        if kind == name:
            if kind == "gate" and anatomy.subkeys[0].gate is None:
                raise BadInputError(
                    f"subkey 'gate' needs a gated FFN, which {anatomy.family.model_type} does not have; use "
                    "'first_order'."
                )
            return kind
    raise BadInputError(f"subkey {name!r} is unknown; use one of {', '.join(SUBKEYS)}.")


def _check_inside(neuron: object, anatomy: Anatomy, length: int) -> None:
    if isinstance(neuron, FFNNeuron):
        limits = {"layer": anatomy.layers, "index": anatomy.ffn_neurons}
    elif isinstance(neuron, AttentionNeuron):
        limits = {"layer": anatomy.layers, "head": anatomy.heads, "dim": anatomy.head_dim, "position": length}
    else:
        raise BadInputError(f"{neuron!r} cannot be a value neuron; pass FFNNeuron or AttentionNeuron records.")
    for name, size in limits.items():
        value = getattr(neuron, name)
        if not isinstance(value, int) or not 0 <= value < size:
            owner = "prompt" if name == "position" else "model"
            raise BadInputError(f"{neuron!r} has {name} {value!r}, but the {owner} has {size}; count from 0.")


def _checked(model: Model, question: Question, given: object) -> tuple[list[Neuron], Tensor]:
    """Return one prompt's value neurons and their scores, computed for those that come as records.

    Raises:
        BadInputError: If they cannot be used.
    """
    rankings: list[Ranking] = [given] if isinstance(given, Ranking) else []
    if isinstance(given, list | tuple) and given and all(isinstance(each, Ranking) for each in given):
        rankings = list(given)
    for ranking in rankings:
        if (ranking.prompt, ranking.answer_id) != (question.text, question.answer_id):
            raise BadInputError(
                f"the value neurons were ranked for {ranking.prompt!r} -> {ranking.answer!r}, not for "
                f"{question.text!r} -> {question.answer!r}; pass a ranking of the same prompt and answer."
            )
    if rankings:
        given = [neuron for ranking in rankings for neuron in ranking.neurons]
    if not isinstance(given, list | tuple):
        raise BadInputError(
            f"value_neurons {given!r} is a {type(given).__name__}; pass a Ranking, several of them, or a list of "
            "records for each prompt."
        )
    if not given:
        raise BadInputError(f"the value neurons of prompt {question.text!r} are an empty list; give at least one.")
    for neuron in given:
        _check_inside(neuron, model.anatomy, len(question.ids))
    neurons: list[Neuron] = list(given)
    repeated = [neuron for neuron, times in Counter(neurons).items() if times > 1]
    if repeated:
        raise BadInputError(f"{repeated[0]!r} is a value neuron more than once; give each neuron once.")
    scores = (
        torch.cat([ranking.scores for ranking in rankings])
        if rankings
        else scores_of(model, question.text, question.answer, neurons)
    )
    if scores.shape != (len(neurons),):
        raise BadInputError(
            f"{len(neurons)} value neurons came with scores of shape {tuple(scores.shape)}; give one score for each."
        )
    for neuron, score in zip(neurons, scores.tolist(), strict=True):
        if not isfinite(score):
            raise BadInputError(f"value neuron {neuron!r} has the score {score}; give finite scores.")
    return neurons, scores.double().cpu()


def _checked_k(k: object) -> int | None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
        raise BadInputError(
            f"k = {k!r} is not a whole number above 0; give at most how many query neurons to return, or None for all."
        )
    return None if k is None else int(k)


def _given_value_neurons(
    model: Model, questions: Sequence[Question], given: object
) -> list[tuple[list[Neuron], Tensor]]:
    """Return the value neurons that were given for each prompt, with their importances."""
    if not isinstance(given, list | tuple):
        raise BadInputError(
            f"a list of {pluralize(len(questions), 'prompt')} came with a {type(given).__name__} as value_neurons; "
            "give a list with a Ranking or a list of records for each prompt."
        )
    if len(given) != len(questions):
        raise BadInputError(
            f"{pluralize(len(questions), 'prompt')} came with {pluralize(len(given), 'set')} of value neurons; "
            "give a Ranking or a list of records for each."
        )
    return [_checked(model, question, own) for question, own in zip(questions, given, strict=True)]


def _strongest(model: Model, questions: Sequence[Question]) -> list[tuple[list[Neuron], Tensor]]:
    """Return the paper's numbers of FFN and attention value neurons, by importance; fewer where there are fewer."""
    anatomy = model.anatomy
    chosen: list[list[Ranking]] = [[] for _ in questions]
    for sublayer, number in _VALUE_NEURONS.items():
        sizes = [
            anatomy.layers * anatomy.ffn_neurons
            if sublayer == "ffn"
            else anatomy.layers * anatomy.heads * anatomy.head_dim * len(question.ids)
            for question in questions
        ]
        # Only prompts of a model with fewer neurons than that differ in size.
        for k in sorted({min(number, size) for size in sizes}):
            rows = [row for row, size in enumerate(sizes) if min(number, size) == k]
            prompts = [questions[row].prompt for row in rows]
            for row, ranking in zip(rows, attribute(model, prompts, unit=sublayer, k=k), strict=True):
                chosen[row].append(ranking)
    return [
        (
            [cast(Neuron, neuron) for ranking in both for neuron in ranking.neurons],
            torch.cat([ranking.scores for ranking in both]),
        )
        for both in chosen
    ]


def _layers_frame(anatomy: Anatomy, totals: dict[SublayerKind, Tensor], *, biases: bool) -> pd.DataFrame:
    components: list[tuple[str, int | None]] = [("embedding", None)]
    components += [(kind, layer) for layer in range(anatomy.layers) for kind in ("attention", "ffn")]
    components += [("bias", None)] if biases else []
    rows = [
        (value_unit, component, layer, score)
        for value_unit, scores in totals.items()
        for (component, layer), score in zip(components, scores[: len(components)].tolist(), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["value_unit", "component", "layer", "query_score"])
    return frame.astype({"layer": "Int64"})


@dataclass(frozen=True)
class _QuerySide:
    """The query side of one prompt, as computed where the weights are.

    Attributes:
        best: Query FFN neurons, best first, as layer * ffn_neurons + index, (k,).
        scores: Their scores, (k,).
        candidates: How many there were.
        totals: Query score of every component, by the unit of the value neurons.
        kept: Whether each value neuron has shares, (n,).
        amplification: The largest of those that have.
    """

    best: Tensor
    scores: Tensor
    candidates: int
    totals: dict[SublayerKind, Tensor]
    kept: Tensor
    amplification: float


def _query_sides(
    model: Model,
    jobs: Sequence[tuple[Question, tuple[list[Neuron], Tensor]]],
    options: _Options,
) -> list[_QuerySide]:
    """Trace one batch of prompts, at all positions, and return the query side of each."""
    batch = pad([question.ids for question, _ in jobs], device=model.device)
    activations = read_activations(model, batch, positions="all", logits=False)
    return [
        _query_side(model, activations, prompt, question, chosen, options)
        for prompt, (question, chosen) in enumerate(jobs)
    ]


def _query_side(
    model: Model,
    activations: Activations,
    prompt: int,
    question: Question,
    value_neurons: tuple[list[Neuron], Tensor],
    options: _Options,
) -> _QuerySide:
    """Return the query side of one prompt of a traced batch."""
    anatomy, length, dtype = model.anatomy, len(question.ids), activations.resid_pre.dtype
    neurons, importance = value_neurons[0], value_neurons[1].to(model.device)
    readings = read_subkeys(
        anatomy,
        components_of(activations, prompt, length),
        neurons,
        subkey=options.subkey,
        centring=options.centring,
        biases=options.biases,
    )
    divided = shares(readings.terms, readings.counts, torch.finfo(dtype).eps)
    kept = [neuron for neuron, keep in zip(neurons, divided.kept.tolist(), strict=True) if keep]
    if not kept:
        raise BadInputError(
            f"none of the {len(neurons)} value neurons of prompt {question.text!r} has a pre-activation that can be "
            f"told from zero in {str(dtype).removeprefix('torch.')}; give other value neurons, or load the model in a "
            "wider dtype."
        )
    is_ffn = torch.tensor([isinstance(neuron, FFNNeuron) for neuron in neurons], device=importance.device)
    members: dict[SublayerKind, Tensor] = {"ffn": divided.kept & is_ffn, "attention": divided.kept & ~is_ffn}
    readers = [neuron for neuron in kept if isinstance(neuron, AttentionNeuron)]
    attention = members["attention"]
    scores = query_neuron_scores(
        anatomy,
        activations.coefficients[:, prompt, :length],
        activations.ffn_post_scale[:, prompt, :length],
        folded=readings.folded[attention],
        weights=importance[attention] / divided.denominator[attention],
        layers=[neuron.layer for neuron in readers],
        positions=[neuron.position for neuron in readers],
    ).flatten()
    best = torch.argsort(scores, descending=True, stable=True)[: options.k]
    return _QuerySide(
        best=best.cpu(),
        scores=scores[best].cpu(),
        candidates=len(scores),
        totals={unit: (divided.share[:, own] @ importance[own]).cpu() for unit, own in members.items() if own.any()},
        kept=divided.kept.cpu(),
        amplification=float(divided.amplification[divided.kept].max()),
    )


def _query_ranking(
    anatomy: Anatomy,
    question: Question,
    value_neurons: tuple[list[Neuron], Tensor],
    side: _QuerySide,
    options: _Options,
) -> QueryRanking:
    neurons, importance = value_neurons
    kept = side.kept.tolist()
    return QueryRanking(
        prompt=question.text,
        answer=question.answer,
        answer_id=question.answer_id,
        neurons=[FFNNeuron(*divmod(place, anatomy.ffn_neurons)) for place in side.best.tolist()],
        scores=side.scores,
        candidates=side.candidates,
        layers=_layers_frame(anatomy, side.totals, biases=options.biases),
        value_neurons=[neuron for neuron, keep in zip(neurons, kept, strict=True) if keep],
        value_scores=importance[side.kept],
        left_out=[neuron for neuron, keep in zip(neurons, kept, strict=True) if not keep],
        amplification=side.amplification,
        subkey=options.subkey,
        centring=options.centring,
        biases=options.biases,
    )


def _shrink(model: Model) -> int:
    """Return how many times fewer tokens than usual to trace at once, since every position is kept."""
    anatomy = model.anatomy
    per_token = anatomy.layers * (5 * anatomy.width + anatomy.ffn_neurons)
    return 1 + model.batch_tokens * per_token // _TRACED_NUMBERS


@overload
def query(
    model: Model,
    prompt: str | Prompt,
    answer: str | None = None,
    *,
    value_neurons: ValueNeurons | None = None,
    k: int | None = 1000,
    subkey: str = "first_order",
    centring: bool = True,
    biases: bool = True,
) -> QueryRanking: ...


@overload
def query(
    model: Model,
    prompt: list[str] | list[Prompt] | list[str | Prompt],
    answer: str | Sequence[str] | None = None,
    *,
    value_neurons: Sequence[ValueNeurons] | None = None,
    k: int | None = 1000,
    subkey: str = "first_order",
    centring: bool = True,
    biases: bool = True,
) -> list[QueryRanking]: ...


def query(
    model: Model,
    prompt: str | Prompt | list[str] | list[Prompt] | list[str | Prompt],
    answer: str | Sequence[str] | None = None,
    *,
    value_neurons: ValueNeurons | Sequence[ValueNeurons] | None = None,
    k: int | None = 1000,
    subkey: str = "first_order",
    centring: bool = True,
    biases: bool = True,
) -> QueryRanking | list[QueryRanking]:
    """Rank the FFN neurons that activate a prompt's value neurons, and total each layer's part in it.

    ``Q(c) = sum_n S_n <z_c, k'_n> / (sigma_n pre-activation_n)``, as derived at the top of this module. Layers are
    totalled for FFN and for attention value neurons apart; query neurons are ranked for attention value neurons, at
    their source positions, one score per (layer, index) over all of them.

    ``subkey="up"``, ``centring=False`` and ``biases=False`` together are the published code's scores for GPT-2, and
    with ``subkey="down"`` those for Llama.

    Args:
        model: A loaded model.
        prompt: A text that ends right before its answer, a :class:`Prompt`, or a list of either.
        answer: One token with its leading space, or one per prompt; may be left out for :class:`Prompt`.
        value_neurons: What is activated: a :class:`Ranking` of the same prompt, whose scores are the weights, or a list
            of them, such as one of each unit; a list of FFN and attention neurons, weighted by their
            ``log_prob_increase``; for a list of prompts, one of these each. When ``None``, the top 100 FFN and top 200
            attention neurons by ``log_prob_increase``, as in the paper, or all that a smaller model has.
        k: At most how many query neurons to return, all when ``None``: a model with fewer candidates returns those.
        subkey: What an FFN value neuron reads. ``"first_order"``: for a gated FFN, how its coefficient follows its
            input at this prompt; for a plain one, its row. ``"gate"`` and ``"up"``: that row alone. ``"down"``: the
            subvalue, which the notebook published for Llama takes by mistake; only to compare with its numbers.
        centring: Include LayerNorm's centring, which the published code leaves out.
        biases: Include the biases of norms and projections as a component of their own, so that the denominator is
            sigma times what the model computes; the published code leaves them out.

    Returns:
        One :class:`QueryRanking`, or a list of them for a list of prompts. Value neurons whose denominator is not
        above its rounding bound, ``terms * eps * sum |terms|``, have no shares and stand in its ``left_out``.

    Raises:
        BadInputError: If an argument cannot be used, or no value neuron has a denominator that can be told from zero.
    """
    # 1. What is asked of each prompt: its answer and its value neurons with their importances.
    options = _Options(_checked_k(k), _subkey_named(subkey, model.anatomy), centring, biases)
    single = isinstance(prompt, str | Prompt)
    questions = [question_of(model, item) for item in prompts_with_answers(prompt, answer)]
    if value_neurons is None:
        chosen = _strongest(model, questions)
    else:
        chosen = _given_value_neurons(model, questions, [value_neurons] if single else value_neurons)
    asked = list(zip(questions, chosen, strict=True))
    # 2. Where the weights are, batch by batch: shares by component, scores by FFN neuron. Every position is kept, so a
    #    prompt takes more of a pass than its length.
    lengths = [_shrink(model) * len(question.ids) for question in questions]
    sides = map_batches(model, asked, _query_sides, options, lengths=lengths)
    # 3. One record per prompt.
    found = [
        _query_ranking(model.anatomy, question, own, side, options)
        for (question, own), side in zip(asked, sides, strict=True)
    ]
    return found[0] if single else found
