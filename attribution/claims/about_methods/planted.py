"""Planted truth: whether attribution finds neurons that are made to write an answer, and whether ablation undoes them.

:mod:`attribution.claims.about_methods.plants` says what is planted and what a strength is. The strength of a chain is
that of its query neuron; what is behind it stays as it is at strength 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attribution.claims.about_methods.common import BASELINES, METHOD
from attribution.claims.about_methods.plants import Kind, Task, planting_of, task_of
from attribution.claims.bench import STEPS, Workbench, measured_once
from attribution.claims.measured import Effects, Exact, NotApplicable
from attribution.engine.ablation import outcomes
from attribution.engine.decomposition import rounding
from attribution.engine.methods import METHODS
from attribution.engine.projection import largest_row_norm
from attribution.engine.queries import query
from attribution.engine.ranking import Search, attribute, rank_all
from attribution.experiments.planting import displaced, planted
from attribution.models.model import Model
from attribution.records import AttentionNeuron, Component, Neuron, Unit

__all__ = [
    "both_ends_ranked_first",
    "difference_after_ablation",
    "fall_without_query_neuron",
    "ranked_first",
    "ranked_first_over_strengths",
    "unit_of",
]


def unit_of(kind: Kind) -> Unit:
    """Return the unit of what writes the answer."""
    return "ffn" if kind == "ffn" else "attention"


def _at(bench: Workbench, kind: Kind, strength: float) -> AbstractContextManager[Model]:
    """Give the model with what is planted at a strength; at 0, the model as it is."""
    return planted(bench.model, planting_of(bench, kind).at(strength)) if strength else nullcontext(bench.model)


def _is(record: Component, neuron: Neuron) -> bool:
    """Whether a ranked record is a planted neuron; of attention, at any source position."""
    return (replace(record, position=0) if isinstance(record, AttentionNeuron) else record) == neuron


def _first(bench: Workbench, kind: Kind, method: str, strengths: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Return whether a method ranks what was planted first, (strengths, prompts); a judged one also at strength 0."""
    together = (METHOD, *BASELINES) if method in (METHOD, *BASELINES) else (method,)
    return _first_by_method(bench, kind, together, tuple(strengths))[method]


@measured_once
def _first_by_method(
    bench: Workbench, kind: Kind, methods: tuple[str, ...], strengths: tuple[float, ...]
) -> dict[str, npt.NDArray[np.bool_]]:
    task, values, unit = task_of(bench), planting_of(bench, kind).values, unit_of(kind)
    found: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in methods}
    for strength in (*strengths, 0.0):
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
        both: And the query neuron is first among those that activate it.
    """

    value: npt.NDArray[np.bool_]
    both: npt.NDArray[np.bool_]


@measured_once
def _ends(bench: Workbench, method: str, strengths: tuple[float, ...]) -> _Ends:
    task, planting = task_of(bench), planting_of(bench, "chain")
    prompts = [question.prompt for question in task.questions] if planting.driven else []
    value = np.zeros((len(strengths) + 1, len(prompts)), dtype=bool)
    both = value.copy()
    for number, strength in enumerate((*strengths, 0.0) if prompts else ()):
        with _at(bench, "chain", strength) as model:
            rankings = attribute(model, prompts, unit=unit_of("chain"), method=method, k=1)
            for row, ranking in enumerate(rankings):
                value[number, row] = _is(ranking.neurons[0], planting.values[task.column[row]])
            rows = value[number].nonzero()[0].tolist()
            if rows:
                queries = query(
                    model, [prompts[row] for row in rows], value_neurons=[rankings[row] for row in rows], k=1
                )
                for row, found in zip(rows, queries, strict=True):
                    both[number, row] = found.neurons[0] == planting.driven[task.column[row]].neuron
    return _Ends(value, both)


def _logps(model: Model, task: Task, variants: Sequence[Collection[Component]]) -> npt.NDArray[np.float64]:
    """Return the log-probability of what each prompt is asked for, with components ablated, (prompts,)."""
    return np.array([each.logp for each in outcomes(model, task.questions, variants)[0]], dtype=np.float64)


def _effects(
    bench: Workbench, found: npt.NDArray[np.bool_], strengths: Sequence[float], *, mean: bool = False
) -> Effects:
    """Return what is found at the first strength, or its mean over strengths; the note is the whole curve."""
    shares = [
        f"{strength:g}: {row.mean():.2f}" for strength, row in zip((*strengths, 0), found, strict=False) if len(row)
    ]
    effects = np.asarray(found[: len(strengths)].mean(0) if mean else found[0], dtype=np.float64)
    # Nothing is found where nothing could be planted.
    indices = task_of(bench).indices[: len(effects)]
    return Effects(effects, indices=indices, seed=bench.seed, note=", ".join(shares))


def _not_scored(kind: Kind) -> NotApplicable:
    return NotApplicable(f"the method does not score {unit_of(kind)} neurons")


def ranked_first(bench: Workbench, method: str, kind: Kind, strengths: Sequence[float]) -> Effects | NotApplicable:
    """Measure on which prompts a method ranks what writes the answer first, at the first strength: 1 there, else 0.

    The note has the share of prompts at each strength, and at strength 0, where nothing is planted.
    """
    if unit_of(kind) not in METHODS[method].units:
        return _not_scored(kind)
    first = _ends(bench, method, tuple(strengths)).value if kind == "chain" else _first(bench, kind, method, strengths)
    return _effects(bench, first, strengths)


def both_ends_ranked_first(bench: Workbench, method: str, strengths: Sequence[float]) -> Effects | NotApplicable:
    """Measure the same for both ends of a chain: the value neuron, and then its query neuron on the query side."""
    if unit_of("chain") not in METHODS[method].units:
        return _not_scored("chain")
    return _effects(bench, _ends(bench, method, tuple(strengths)).both, strengths)


def ranked_first_over_strengths(
    bench: Workbench, method: str, kind: Kind, strengths: Sequence[float]
) -> Effects | NotApplicable:
    """Measure at which share of the strengths a method ranks what writes the answer first, prompt by prompt.

    Both ends of a chain have to be found. That is measured for judged methods only: baselines rank value neurons, and
    say nothing about what activates them.
    """
    if unit_of(kind) not in METHODS[method].units:
        return _not_scored(kind)
    first = _ends(bench, method, tuple(strengths)).both if kind == "chain" else _first(bench, kind, method, strengths)
    return _effects(bench, first, strengths, mean=True)


def difference_after_ablation(bench: Workbench, kind: Kind, strength: float) -> Exact:
    """Measure what ablating all that was planted leaves of it, against a model without its own neurons in those places.

    Returns:
        The largest difference of log-probabilities over prompts, in units of the rounding bound.
    """
    task, anatomy = task_of(bench), bench.model.anatomy
    plants = planting_of(bench, kind).at(strength)
    indices = task.indices if plants else []
    gone = [displaced(anatomy, [plant.neuron for plant in plants])] * len(task.questions)
    without = _logps(bench.model, task, gone)
    with _at(bench, kind, strength) as model:
        loud, ablated = _logps(model, task, [()] * len(gone)), _logps(model, task, gone)
    # A logit passes through the sums of every projection, and its norm's output is at most sqrt(width) long; the
    # log-probability of one token moves by at most two logits' worth.
    terms = anatomy.width + anatomy.layers * (
        2 * anatomy.width + anatomy.heads * anatomy.head_dim + anatomy.ffn_neurons
    )
    dtype = anatomy.readout.unembedding.dtype
    bound = 2 * rounding(dtype, terms, normed=True) * float(largest_row_norm(anatomy.readout)) * anatomy.width**0.5
    error = float(np.abs(ablated - without).max(initial=0)) / bound
    facts = len({bench.prompts[place].fact for place in indices})
    risen = f"not ablated they raise it by {(loud - without).mean() / bound:.3g} bounds" if indices else ""
    return Exact(error, prompts=len(indices), facts=facts, seed=bench.seed, note=risen)


def fall_without_query_neuron(bench: Workbench, strength: float) -> Effects:
    """Measure how far log p falls without the first end of a chain, relative to the fall without both ends."""
    task, planting = task_of(bench), planting_of(bench, "chain")
    starts, wholes = [], []
    for column in task.column if planting.driven else ():
        start = planting.driven[column].neuron
        starts.append([start])
        wholes.append(displaced(bench.model.anatomy, [start, planting.values[column]]))
    with _at(bench, "chain", strength) as model:
        loud, without_start, without_both = (
            _logps(model, task, variants) for variants in ([()] * len(starts), starts, wholes)
        )
    indices = task.indices if starts else []
    return Effects(loud - without_start, baselines=loud - without_both, indices=indices, seed=bench.seed)
