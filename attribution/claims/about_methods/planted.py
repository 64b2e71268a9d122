"""Planted truth: neurons of a copy are made to write a chosen answer; attribution must find them, ablation undo them.

:mod:`attribution.claims.about_methods.plants` says what is planted and what a strength is. To first order a neuron's
importance is its output's inner product with one gradient, so at strength s no natural neuron of median loudness can
win unless that gradient is more than arccos(1/s) away from the direction planted: 60 degrees at the greatest strength,
2. Each further strength is half the one before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import BASELINES, METHOD, not_applicable
from attribution.claims.about_methods.plants import Kind, Task, planting_of, task_of
from attribution.claims.bench import STEPS, Workbench
from attribution.claims.judge import Claim, Verdict, judge_exact
from attribution.engine.ablation import outcomes
from attribution.engine.decomposition import rounding
from attribution.engine.methods import METHODS
from attribution.engine.projection import largest_row_norm
from attribution.engine.queries import query
from attribution.engine.ranking import Search, attribute, rank_all
from attribution.experiments.planting import displaced, planted
from attribution.models.model import Model
from attribution.prompts.knowledge import Prompt
from attribution.records import AttentionNeuron, Component, Neuron, Unit

__all__ = [
    "STRENGTHS",
    "both_ends_of_a_chain_are_found",
    "chain_breaks_at_its_query_neuron",
    "is_found",
    "is_undone",
    "recovery",
    "unit_of",
]

STRENGTHS = (2.0, 1.0, 0.5, 0.25, 0.125)
"""From where a method has no excuse down to where one neuron among many is not heard. That of a chain is that of its
query neuron; what is behind it stays as it is at strength 1."""

# With fewer than three quarters of the prompts, or of the categories, a share says little.
_MIN_PROMPTS = 48
# Nine of ten prompts, and nine tenths of an effect.
_FOUND = 0.9
_BROKEN = 0.9
# Three kinds are found, a chain at both ends, and it breaks.
_COMPARISONS = 5


def unit_of(kind: Kind) -> Unit:
    """Return the unit of what writes the answer."""
    return "ffn" if kind == "ffn" else "attention"


def _at(bench: Workbench, kind: Kind, strength: float) -> AbstractContextManager[Model]:
    """Give the model with what is planted at a strength; at 0, the model as it is."""
    return planted(bench.model, planting_of(bench, kind).at(strength)) if strength else nullcontext(bench.model)


def _is(record: Component, neuron: Neuron) -> bool:
    """Whether a ranked record is a planted neuron; of attention, at any source position."""
    return (replace(record, position=0) if isinstance(record, AttentionNeuron) else record) == neuron


def _first(bench: Workbench, kind: Kind, method: str) -> npt.NDArray[np.bool_]:
    """Return whether a method ranks what was planted first, (strengths, prompts); a judged one also at strength 0."""
    together = (METHOD, *BASELINES) if method in (METHOD, *BASELINES) else (method,)
    found = bench.once(("planted first", kind, together), partial(_measure_first, bench, kind, together))
    return found[method]


def _measure_first(bench: Workbench, kind: Kind, methods: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    task, values, unit = task_of(bench), planting_of(bench, kind).values, unit_of(kind)
    found: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in methods}
    for strength in (*STRENGTHS, 0.0):
        asked = [name for name in methods if strength or name not in BASELINES]
        for name in asked:
            found[name].append(np.zeros(len(task.questions), dtype=bool))
        with _at(bench, kind, strength) as model:
            ranked = rank_all(model, task.questions, {name: {unit: 1} for name in asked}, Search(0, STEPS))
            for row, best in enumerate(ranked):
                for name in asked:
                    found[name][-1][row] = _is(best[name][unit].neurons[0], values[task.column[row]])
    return {name: np.stack(curve) for name, curve in found.items()}


@dataclass(frozen=True)
class _Ends:
    """Which ends of a chain are found, (strengths and 0, prompts) each.

    Attributes:
        value: The value neuron is ranked first.
        both: And the query neuron first among those that wake it.
    """

    value: npt.NDArray[np.bool_]
    both: npt.NDArray[np.bool_]


def _ends(bench: Workbench, method: str) -> _Ends:
    return bench.once(("planted chain", method), partial(_measure_ends, bench, method))


def _measure_ends(bench: Workbench, method: str) -> _Ends:
    task, planting = task_of(bench), planting_of(bench, "chain")
    prompts = [Prompt(question.text, question.answer) for question in task.questions] if planting.driven else []
    value = np.zeros((len(STRENGTHS) + 1, len(prompts)), dtype=bool)
    both = value.copy()
    for number, strength in enumerate((*STRENGTHS, 0.0) if prompts else ()):
        with _at(bench, "chain", strength) as model:
            rankings = attribute(model, prompts, unit=unit_of("chain"), method=method, k=1)
            for row, ranking in enumerate(rankings):
                value[number, row] = _is(ranking.neurons[0], planting.values[task.column[row]])
            rows = value[number].nonzero()[0].tolist()
            if rows:
                waking = query(
                    model, [prompts[row] for row in rows], value_neurons=[rankings[row] for row in rows], k=1
                )
                for row, found in zip(rows, waking, strict=True):
                    both[number, row] = found.neurons[0] == planting.driven[task.column[row]].neuron
    return _Ends(value, both)


def _logps(model: Model, task: Task, variants: Sequence[Collection[Component]]) -> npt.NDArray[np.float64]:
    """Return the log-probability of what each prompt is asked for, with components ablated, (prompts,)."""
    return np.array([each.logp for each in outcomes(model, task.questions, variants)[0]], dtype=np.float64)


def _judge(bench: Workbench, claim: Claim, found: npt.NDArray[np.bool_], *, mean: bool = False) -> Verdict:
    """Judge the share of prompts at the greatest strength, or its mean over strengths; the note is the whole curve."""
    shares = [
        f"{strength:g}: {row.mean():.2f}" for strength, row in zip((*STRENGTHS, 0), found, strict=False) if len(row)
    ]
    effects = np.asarray(found[: len(STRENGTHS)].mean(0) if mean else found[0], dtype=np.float64)
    # Nothing is found where nothing could be planted.
    places = task_of(bench).places[: len(effects)]
    return bench.judge(claim, effects, places=places, seed=bench.seed, note=", ".join(shares))


_WHAT = {
    "ffn": "a planted FFN neuron",
    "attention": "a planted attention neuron",
    "chain": "the value neuron of a planted chain",
}
_CONTROL = "a second neuron, planted just as loud, that writes another word; and strength 0"


def is_found(bench: Workbench, method: str, kind: Kind) -> Verdict:
    """Judge that a method ranks what writes the answer first, at the greatest strength."""
    claim = Claim(
        id=f"planted {kind}, strength {STRENGTHS[0]:g}: found",
        sentence=f"{method} ranks {_WHAT[kind]} first of all {unit_of(kind)} neurons",
        source="ours",
        effect=f"share of prompts, at strength {STRENGTHS[0]:g}",
        test="above",
        threshold=_FOUND,
        family="planted",
        control=_CONTROL,
        min_prompts=_MIN_PROMPTS,
        method=method,
        comparisons=_COMPARISONS,
        extremes="share",
    )
    if unit_of(kind) not in METHODS[method].units:
        return not_applicable(bench, claim, f"the method does not score {unit_of(kind)} neurons")
    found = _ends(bench, method).value if kind == "chain" else _first(bench, kind, method)
    return _judge(bench, claim, found)


def both_ends_of_a_chain_are_found(bench: Workbench, method: str) -> Verdict:
    """Judge that a method ranks a chain's value neuron first, and the query side then its query neuron."""
    claim = Claim(
        id=f"planted chain, strength {STRENGTHS[0]:g}: both ends found",
        sentence=f"{method} ranks the value neuron of a planted chain first of all attention neurons, and its query "
        "neuron is first of all FFN neurons that wake it",
        source="ours",
        effect=f"share of prompts, at strength {STRENGTHS[0]:g}",
        test="above",
        threshold=_FOUND,
        family="planted",
        control="a second chain, planted just as loud, that writes another word; and strength 0",
        min_prompts=_MIN_PROMPTS,
        method=method,
        comparisons=_COMPARISONS,
        extremes="share",
    )
    if unit_of("chain") not in METHODS[method].units:
        return not_applicable(bench, claim, "the method does not score attention neurons")
    return _judge(bench, claim, _ends(bench, method).both)


def recovery(bench: Workbench, method: str, kind: Kind, by: str) -> Verdict:
    """Report how a method, or a baseline, loses what was planted as it grows weaker.

    Of a chain both ends have to be found. That is measured by the judged method alone: baselines rank value neurons,
    and say nothing of what wakes them.
    """
    claim = Claim(
        id=f"planted {kind}, recovered by {by}",
        sentence=f"{by} ranks {'both ends' if kind == 'chain' else _WHAT[kind]} first at some strength",
        source="ours",
        effect=f"share of prompts, mean over strengths {', '.join(f'{strength:g}' for strength in STRENGTHS)}",
        test="above",
        threshold=0,
        control=_CONTROL,
        method=method,
        comparisons=1 + len(BASELINES),
        extremes="share",
        asserted=False,
    )
    if unit_of(kind) not in METHODS[by].units:
        return not_applicable(bench, claim, f"the method does not score {unit_of(kind)} neurons")
    return _judge(bench, claim, _ends(bench, by).both if kind == "chain" else _first(bench, kind, by), mean=True)


def is_undone(bench: Workbench, kind: Kind) -> Verdict:
    """Judge that ablating all that was planted leaves the model without its own neurons in those places."""
    task, anatomy = task_of(bench), bench.model.anatomy
    plants = planting_of(bench, kind).at(STRENGTHS[0])
    places = task.places if plants else []
    gone = [displaced(anatomy, [plant.neuron for plant in plants])] * len(task.questions)
    without = _logps(bench.model, task, gone)
    with _at(bench, kind, STRENGTHS[0]) as model:
        loud, ablated = _logps(model, task, [()] * len(gone)), _logps(model, task, gone)
    # A logit passes through the sums of every projection, and its norm's output is at most sqrt(width) long; the
    # log-probability of one token moves by at most two logits' worth.
    terms = anatomy.width + anatomy.layers * (
        2 * anatomy.width + anatomy.heads * anatomy.head_dim + anatomy.ffn_neurons
    )
    dtype = anatomy.readout.unembedding.dtype
    bound = 2 * rounding(dtype, terms, normed=True) * float(largest_row_norm(anatomy.readout)) * anatomy.width**0.5
    claim = Claim(
        id=f"planted {kind}, strength {STRENGTHS[0]:g}: undone",
        sentence=f"ablating the planted {kind} neurons leaves the log-probability that the model has without its own "
        "neurons in their places",
        source="ours",
        effect="largest difference over prompts, in units of the rounding bound",
        test="at_most",
        threshold=1,
        family="planted",
        control="the planted neurons, not ablated",
        min_prompts=_MIN_PROMPTS,
    )
    error = float(np.abs(ablated - without).max(initial=0)) / bound
    facts = len({bench.prompts[place].fact for place in places})
    verdict = judge_exact(claim, model=bench.model.name, effect=error, n=len(places), facts=facts)
    risen = f"not ablated they raise it by {(loud - without).mean() / bound:.3g} bounds" if places else ""
    return replace(verdict, seed=bench.seed, note=risen)


def chain_breaks_at_its_query_neuron(bench: Workbench) -> Verdict:
    """Judge that ablating the first end of a chain takes away nearly all that the whole chain does."""
    claim = Claim(
        id=f"planted chain, strength {STRENGTHS[0]:g}: broken at its query neuron",
        sentence=f"ablating the query neuron of a planted chain takes over {_BROKEN:.0%} of the log-probability that "
        "ablating both its ends takes",
        source="ours",
        effect="fall of mean log-probability without the query neuron, as a share of that without both ends",
        test="above",
        threshold=_BROKEN,
        family="planted",
        control="the second chain, which stays; and the value neuron's own reading of the stream",
        min_prompts=_MIN_PROMPTS,
        comparisons=_COMPARISONS,
    )
    task, planting = task_of(bench), planting_of(bench, "chain")
    starts, wholes = [], []
    for column in task.column if planting.driven else ():
        start = planting.driven[column].neuron
        starts.append([start])
        wholes.append(displaced(bench.model.anatomy, [start, planting.values[column]]))
    with _at(bench, "chain", STRENGTHS[0]) as model:
        loud, without_start, without_both = (
            _logps(model, task, variants) for variants in ([()] * len(starts), starts, wholes)
        )
    places = task.places if starts else []
    return bench.judge(claim, loud - without_start, baselines=loud - without_both, places=places, seed=bench.seed)
