"""What is left of the answer when a method's best neurons are kept and all others are set to their mean.

A method gives an order of neurons, and its first ones are kept until they fill a share of what can be ablated: FFN
neurons, and dimensions of heads. As wherever attention neurons are ablated, one of any source position stands for its
dimension, so a dimension is kept as soon as the first of its neurons is. Their scores are not added up: not every score
can be, and a sum would need all of them where the first ones need a few.

The others are set to their mean at every position, not to zero: a model without nineteen of twenty coefficients is far
from anything it was trained on, and one whose coefficients are ordinary but say nothing about the prompt is closer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attribution.claims.about_methods.common import METRIC_NAMES
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Effects, NotApplicable
from attribution.claims.sample import SCORED_IN_FULL
from attribution.engine.ablation import Means, reference_of
from attribution.engine.all_scores import first_vectors_of_each
from attribution.engine.batching import batches_of
from attribution.engine.methods import METHODS
from attribution.engine.metrics import by_metric, measure_each
from attribution.engine.questions import Question
from attribution.engine.trace import Edits, rerun
from attribution.records import Unit

__all__ = ["PROMPTS", "lead_over_random_neurons", "share_left", "units_kept"]

PROMPTS = SCORED_IN_FULL["attention"]
"""All neurons have to be scored, which takes many times longer than finding the first few hundred."""

_UNITS: tuple[Unit, ...] = ("attention", "ffn")
_NO_NEURONS = NotApplicable("the method does not score neurons")


def _kept(
    bench: Workbench, questions: Sequence[Question], units: Sequence[Unit], method: str, shares: Sequence[float]
) -> dict[Unit, Tensor]:
    """Return what each variant keeps: per prompt the method's shares, then random ones of the same sizes.

    Returns:
        Unit to (prompts, 2, shares, vectors).
    """
    kept: dict[Unit, Tensor] = {}
    for unit in units:
        every = bench.all_scores(method, unit, bench.sample.subset(PROMPTS))
        total = sum(every[0].candidates.table.sizes)
        numbers = [round(share * total) for share in shares]
        kept[unit] = torch.zeros(len(questions), 2, len(shares), total, dtype=torch.bool)
        firsts = first_vectors_of_each(every, numbers)
        for row, (own, question) in enumerate(zip(firsts, questions, strict=True)):
            order = np.random.default_rng([question.seed(bench.seed), _UNITS.index(unit)]).permutation(total)
            for place, (number, first) in enumerate(zip(numbers, own, strict=True)):
                kept[unit][row, 0, place, first.cpu()] = True
                kept[unit][row, 1, place, order[:number]] = True
    return kept


def _all_but(kept: dict[Unit, Tensor], means: Means, layers: int) -> Edits:
    """Return the edits that set every coefficient which is not kept to its mean."""
    edits = {}
    for unit, values in (("ffn", means.coefficients), ("attention", means.mixed_values)):
        if unit in kept:
            lost = ~kept[unit].unflatten(1, (layers, -1)).to(values.device)
            edits[unit] = {layer: (lost[:, layer, None], values[layer]) for layer in range(layers)}
    return Edits(coefficients=edits.get("ffn", {}), mixed_values=edits.get("attention", {}))


@measured_once
def _left(
    bench: Workbench, method: str, units: tuple[Unit, ...], shares: tuple[float, ...]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return what is left of each metric, (prompts, 2, shares): the method's neurons kept, and random ones."""
    questions = [bench.sample.questions[place] for place in bench.sample.subset(PROMPTS)]
    shape = (len(questions), 2, len(shares))
    left = {metric: np.zeros(shape) for metric in METRIC_NAMES}
    if not questions:
        return left
    means = reference_of(bench.model, "mean", [question.ids for question in bench.sample.questions])
    assert isinstance(means, Means)
    variants = _kept(bench, questions, units, method, shares)
    each = 2 * len(shares)
    for rows, batch in batches_of(bench.model, questions, variants=each):
        part = [questions[row] for row in rows]
        kept = {unit: own[rows].flatten(0, 2) for unit, own in variants.items()}
        repeated = torch.arange(len(rows), device=batch.ids.device).repeat_interleave(each)
        edits = _all_but(kept, means, bench.model.anatomy.layers)
        logits = rerun(bench.model, batch.repeat_rows(repeated), edits)
        answers = [question.answer_id for question in part for _ in range(each)]
        for metric, values in by_metric(measure_each(logits, answers)).items():
            left[metric][rows] = values.reshape(len(rows), *shape[1:])
    return left


def units_kept(method: str) -> tuple[Unit, ...]:
    """Return the units of which a share is kept: those that the method scores. The others stay whole."""
    return tuple(unit for unit in _UNITS if unit in METHODS[method].units)


def lead_over_random_neurons(
    bench: Workbench, method: str, metric: str, *, shares: Sequence[float]
) -> Effects | NotApplicable:
    """Measure how much more of a metric a method's neurons keep than random ones, averaged over the shares."""
    if not units_kept(method):
        return _NO_NEURONS
    kept, random = _left(bench, method, units_kept(method), tuple(shares))[metric].mean(-1).T
    return Effects(kept - random, indices=bench.sample.subset(PROMPTS), seed=bench.seed)


def share_left(bench: Workbench, method: str, metric: str, *, shares: Sequence[float]) -> Effects | NotApplicable:
    """Measure which share of a metric a method's neurons keep, averaged over the shares of neurons.

    The note is the whole curve: what each share of the neurons keeps, by the method and at random.
    """
    if not units_kept(method):
        return _NO_NEURONS
    indices = bench.sample.subset(PROMPTS)
    before = bench.before[metric][indices]
    left = _left(bench, method, units_kept(method), tuple(shares))[metric]
    # A share of the mean, not a mean of shares: the judge divides sums.
    curve = left.sum(0) / before.sum() if indices else np.zeros(left.shape[1:])
    note = "kept, at random: " + "; ".join(
        f"{share:.0%} of neurons {own:.2f}, {drawn:.2f}" for share, own, drawn in zip(shares, *curve, strict=True)
    )
    return Effects(left[:, 0].mean(-1), baselines=before, indices=indices, seed=bench.seed, note=note)
