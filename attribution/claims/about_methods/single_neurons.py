"""What a method says about single neurons, and what ablating each of them alone does.

For every prompt a stratified sample of FFN neurons is drawn by the judged method's own rank: the top 10, and 10 each
from ranks 11 to 100, from 101 to a quarter of all, and from the rest. Drawn uniformly, nearly all would be neurons
without effect. The correlations are those of the sample, which has more of the best neurons than the model has.

The total effect of a neuron is the fall of log p(w) after a rerun with that neuron alone zeroed at all positions. The
direct effect is the fall when what it writes at the last position is taken out of the final residual stream and
nothing else changes: later layers do not react, but the final norm does. What they differ by is what later layers
make of the loss; where they make up for it, the total effect is the smaller one (self-repair, McGrath et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attribution.claims.about_methods.common import BASELINES, NO_FFN, rank_correlation
from attribution.claims.bench import Workbench, measured_once
from attribution.claims.measured import Effects, NotApplicable
from attribution.claims.sample import SCORED_IN_FULL
from attribution.engine.ablation import outcomes
from attribution.engine.all_scores import at_each
from attribution.engine.importance import Candidates
from attribution.engine.methods import METHODS, method_named, score_candidates
from attribution.engine.metrics import by_metric
from attribution.engine.projection import model_logits
from attribution.models.norms import frozen_scale
from attribution.records import Component

__all__ = [
    "COMPARED",
    "EFFECTS",
    "PROMPTS",
    "TOP",
    "SampledNeurons",
    "correlations",
    "direct_effects",
    "repaired",
    "sampled_ranks",
    "samples",
]

COMPARED = (*BASELINES, "random")
"""The scores that are reported beside the judged method's."""

EFFECTS = ("total", "direct")
"""The effects of a neuron that are measured, see the top of this module."""

TOP = 10
"""How many of the best neurons are in the sample."""
# The same number from each lower stratum.
_DRAWN = 10
PROMPTS = SCORED_IN_FULL["ffn"]
"""All neurons of a prompt have to be scored to know their ranks, and 40 reruns follow."""


@dataclass(frozen=True)
class SampledNeurons:
    """The neurons drawn for one prompt, in order of rank.

    Attributes:
        records: The neurons.
        scores: What the judged method and those of :data:`COMPARED` give each, (n,), by name.
        total: Total effect of each, (n,), in nats.
        direct: Direct effect of each, (n,), in nats.
        lowest: The neurons with the lowest scores of all by the judged method, lowest first: the top of the method
            with its sign flipped.
    """

    records: tuple[Component, ...]
    scores: Mapping[str, npt.NDArray[np.float64]]
    total: npt.NDArray[np.float64]
    direct: npt.NDArray[np.float64]
    lowest: tuple[Component, ...]

    def effect(self, name: str) -> npt.NDArray[np.float64]:
        """Return one of :data:`EFFECTS`."""
        return self.total if name == "total" else self.direct


def sampled_ranks(total: int, seed: int) -> list[int]:
    """Return the ranks, from 0 and rising, of a stratified sample of ``total`` neurons.

    Args:
        total: How many neurons are ranked; fewer than a stratum needs make it smaller, or empty.
        seed: Seed of the draw.
    """
    edges = [min(edge, total) for edge in (TOP, 100, max(100, total // 4), total)]
    generator = torch.Generator().manual_seed(seed)
    ranks = list(range(edges[0]))
    for first, end in pairwise(edges):
        ranks += sorted((first + torch.randperm(end - first, generator=generator)[:_DRAWN]).tolist())
    return ranks


def direct_effects(candidates: Candidates, resid_final: Tensor) -> Tensor:
    """Return log p(w|h) - log p(w|h - v) for what each candidate writes at the last position, by the model's readout.

    All later layers are frozen, and so is the scale of a norm that follows the candidate's own sublayer. The final
    norm is not: its scale is that of h - v. Biases and the soft cap of the logits are the model's own.

    Args:
        candidates: Candidates of one prompt.
        resid_final: h^{L-1} of the prompt at the last position, (width,).

    Returns:
        (n,), float64, in nats.
    """
    table = candidates.table
    written = torch.empty(len(candidates), len(resid_final), dtype=torch.float64, device=resid_final.device)
    for sublayer_index in candidates.sublayer_index.unique().tolist():
        there = candidates.sublayer_index == sublayer_index
        written[there] = candidates.coefficient[there, None] * table.written(sublayer_index, candidates.row[there])
    state = resid_final.double()
    states = torch.cat([state[None], state - written])
    logits = model_logits(states, frozen_scale(states, table.readout.norm), table.readout)
    log_probs = logits.log_softmax(-1)[:, candidates.answer]
    return log_probs[0] - log_probs[1:]


@measured_once
def samples(bench: Workbench, method: str) -> list[SampledNeurons]:
    """Return the sample of each prompt of ``bench.sample.subset(PROMPTS)``."""
    model, indices = bench.model, bench.sample.subset(PROMPTS)
    if not indices:
        return []
    questions = [bench.sample.questions[place] for place in indices]
    compared = [method_named(name, "ffn") for name in (method, *COMPARED)]
    every = bench.all_scores(method, "ffn", indices)
    total = len(every[0].values)
    # Not the seed of the random method's scores, so that the sample does not depend on them.
    drawn_ranks = [sampled_ranks(total, scores.candidates.seed + 1) for scores in every]
    lowest = [total - 1 - place for place in range(min(TOP, total))]
    found = at_each(every, [[*ranks, *lowest] for ranks in drawn_ranks])
    drawn: list[SampledNeurons] = []
    for scores, ranks, ranked, state in zip(every, drawn_ranks, found, bench.final_states(questions), strict=True):
        chosen = scores.candidates.afresh().take(ranked[: len(ranks)])
        drawn.append(
            SampledNeurons(
                records=tuple(chosen.records(torch.arange(len(chosen)))),
                scores={each.name: score_candidates(each, chosen).numpy(force=True) for each in compared},
                total=np.empty(0),
                direct=direct_effects(chosen, state).numpy(force=True),
                lowest=tuple(scores.candidates.records(ranked[len(ranks) :])),
            )
        )
    # All prompts together: the reruns of one would not fill a forward pass.
    jobs = [(row, record) for row in range(len(questions)) for record in drawn[row].records]
    bar = bench.bar("neurons one by one")
    after, _ = outcomes(model, [questions[row] for row, _ in jobs], [[record] for _, record in jobs], progress=bar)
    sizes = [len(drawn[row].records) for row in range(len(questions))]
    left = np.split(by_metric(after)["logp"], np.cumsum(sizes)[:-1])
    before = bench.before["logp"]
    return [
        replace(drawn[row], total=before[place] - logp)
        for row, (place, logp) in enumerate(zip(indices, left, strict=True))
    ]


def correlations(bench: Workbench, method: str, effect: str, *, scored_by: str) -> Effects | NotApplicable:
    """Measure how alike scores and effects order the sampled neurons of each prompt.

    Args:
        bench: The model with its prompts.
        method: The judged method, by whose ranks the sample is drawn.
        effect: One of :data:`EFFECTS`.
        scored_by: The method whose scores are compared: the judged one or one of :data:`COMPARED`. All of them share
            the judged method's sample, because a sample of its own would need its own reruns.

    Returns:
        Spearman's rank correlations, -1 to 1.
    """
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    found = [rank_correlation(each.scores[scored_by], each.effect(effect)) for each in samples(bench, method)]
    return Effects(found, indices=bench.sample.subset(PROMPTS), seed=bench.seed)


def repaired(bench: Workbench, method: str, *, k: int) -> Effects | NotApplicable:
    """Measure on which prompts later layers make up for a part of what the top k write: 1 there, 0 on the others.

    There the direct effects of the top k add up to more than the total ones.

    Args:
        bench: The model with its prompts.
        method: The judged method.
        k: How many neurons, at most :data:`TOP`.
    """
    if "ffn" not in METHODS[method].units:
        return NO_FFN
    found = samples(bench, method)
    direct, total = (np.array([each.effect(name)[:k].mean() for each in found]) for name in ("direct", "total"))
    note = f"direct {direct.mean():.2g}, total {total.mean():.2g} nats a neuron" if found else ""
    return Effects(direct > total, indices=bench.sample.subset(PROMPTS), seed=bench.seed, note=note)
