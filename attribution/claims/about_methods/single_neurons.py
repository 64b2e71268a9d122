"""Importance predicts effect: what a method says of single neurons against what ablating each alone does.

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

from attribution.claims.about_methods.common import BASELINES, NO_FFN, STEPS, not_applicable, rank_correlation
from attribution.claims.bench import Workbench
from attribution.claims.judge import Claim, Verdict
from attribution.engine.ablation import outcomes
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates
from attribution.engine.methods import METHODS, method_named, score_candidates
from attribution.engine.metrics import by_metric
from attribution.engine.projection import model_logits
from attribution.engine.ranking import all_candidates
from attribution.engine.top_k import top_k
from attribution.engine.trace import read_activations
from attribution.models.norms import frozen_scale
from attribution.records import Component

__all__ = [
    "COMPARED",
    "EFFECTS",
    "PROMPTS",
    "TOP",
    "Sample",
    "direct_effects",
    "predicts_effect",
    "sampled_ranks",
    "samples",
    "self_repair",
]

COMPARED = (*BASELINES, "random")
"""The scores that are reported beside the judged method's."""

EFFECTS = {
    "total": "the fall of log p(answer) after a rerun without the neuron",
    "direct": "the fall of log p(answer) when only what the neuron writes into the final state is missing",
}

TOP = 10
# As many from each lower stratum as there are best ones.
_DRAWN = 10
PROMPTS = 100
"""All neurons of a prompt have to be scored to know their ranks, and 40 reruns follow."""
# What is averaged over prompts is a correlation over 40 neurons, whose standard error is about 1 / sqrt(40 - 3): the
# mean of 50 is known to a few hundredths, far less than lies between no correlation and a moderate one.
MIN_PROMPTS = 50
# A moderate correlation by the convention of Cohen 1988.
_MODERATE = 0.3


@dataclass(frozen=True)
class Sample:
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

    All later layers are frozen, and so is the gain of a norm that follows the candidate's own sublayer. The final
    norm is not: its scale is that of h - v. Biases and the soft cap of the logits are the model's own.

    Args:
        candidates: Candidates of one prompt.
        resid_final: h^{L-1} of the prompt at the last position, (width,).

    Returns:
        (n,), float64, in nats.
    """
    table = candidates.table
    written = torch.empty(len(candidates), len(resid_final), dtype=torch.float64, device=resid_final.device)
    for slot in candidates.slot.unique().tolist():
        there = candidates.slot == slot
        written[there] = candidates.coefficient[there, None] * table.written(slot, candidates.row[there])
    state = resid_final.double()
    states = torch.cat([state[None], state - written])
    logits = model_logits(states, frozen_scale(states, table.readout.norm), table.readout)
    log_probs = logits.log_softmax(-1)[:, candidates.answer]
    return log_probs[0] - log_probs[1:]


def samples(bench: Workbench, method: str) -> list[Sample]:
    """Return the sample of each prompt of ``bench.part(PROMPTS)``, measured once."""
    return bench.once(("single neurons", method), lambda: _measured(bench, method))


def _measured(bench: Workbench, method: str) -> list[Sample]:
    model, places = bench.model, bench.part(PROMPTS)
    if not places:
        return []
    questions = [bench.questions[place] for place in places]
    scorer, compared = method_named(method, "ffn"), [method_named(name, "ffn") for name in COMPARED]
    drawn: dict[int, Sample] = {}
    for rows, batch in batches_of(model, questions):
        part = [questions[row] for row in rows]
        ranked = all_candidates(model, part, batch, {"ffn": [scorer]}, seed=bench.seed, steps=STEPS)
        final = read_activations(model, batch, logits=False).resid_final
        for row, by_unit, state in zip(rows, ranked, final, strict=True):
            candidates = by_unit["ffn"]
            order = top_k(candidates, scorer, None).indices
            # Another seed than that of the random scores, which are drawn anew from theirs.
            chosen = candidates.take(order[sampled_ranks(len(order), candidates.seed + 1)])
            drawn[row] = Sample(
                records=tuple(chosen.records(torch.arange(len(chosen)))),
                scores={each.name: score_candidates(each, chosen).numpy(force=True) for each in (scorer, *compared)},
                total=np.empty(0),
                direct=direct_effects(chosen, state).numpy(force=True),
                lowest=tuple(candidates.records(order.flip(0)[:TOP])),
            )
    # All prompts together: the reruns of one would not fill a forward pass.
    jobs = [(row, record) for row in range(len(questions)) for record in drawn[row].records]
    after, _ = outcomes(model, [questions[row] for row, _ in jobs], [[record] for _, record in jobs])
    sizes = [len(drawn[row].records) for row in range(len(questions))]
    left = np.split(by_metric(after)["logp"], np.cumsum(sizes)[:-1])
    before = bench.before["logp"]
    return [
        replace(drawn[row], total=before[place] - logp)
        for row, (place, logp) in enumerate(zip(places, left, strict=True))
    ]


def predicts_effect(bench: Workbench, method: str, effect: str = "total", scored_by: str | None = None) -> Verdict:
    """Judge that scores order single neurons as their effects do.

    The total effect is asserted of the judged method; the direct one, and what other scores predict, are reported.

    Args:
        bench: The model.
        method: The judged method, by whose ranks the sample is drawn.
        effect: One of :data:`EFFECTS`.
        scored_by: Correlate the scores of this method instead, on the judged method's sample: a sample of its own
            would need its own reruns.
    """
    name = scored_by or method
    of_other = "" if scored_by is None else f", by {scored_by}"
    claim = Claim(
        id=f"importance predicts {effect} effect{of_other}",
        sentence=f"scores by {name} order the FFN neurons of a prompt, sampled by their rank by {method}, as "
        f"{EFFECTS[effect]} does",
        source="ours",
        effect="Spearman's rank correlation over the sampled neurons, mean over prompts",
        test="above",
        threshold=_MODERATE,
        family="prediction",
        control="random scores on the same sample, reported as a claim of their own",
        min_prompts=MIN_PROMPTS,
        method=method,
        comparisons=1 if scored_by is None else len(COMPARED),
        extremes="correlation",
        asserted=scored_by is None and effect == "total",
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    found = samples(bench, method)
    correlations = [rank_correlation(each.scores[name], each.effect(effect)) for each in found]
    return bench.judge(claim, correlations, places=bench.part(PROMPTS), seed=bench.seed)


def self_repair(bench: Workbench, method: str) -> Verdict:
    """Report how much of what the top neurons write the later layers make up for when it is missing."""
    claim = Claim(
        id=f"self-repair of the top {TOP}",
        sentence=f"zeroing one of the top {TOP} FFN neurons by {method} takes less than what it writes is worth: later "
        "layers make up for a part",
        source="ours, after McGrath et al. 2023",
        # Of the mean in nats, which few prompts make up, no interval holds: simulated, it errs in up to 29% of samples.
        effect=f"share of prompts in which the direct effects of the top {TOP} add up to more than the total ones",
        test="above",
        threshold=0.5,
        control="below one half where later layers carry the loss on",
        min_prompts=MIN_PROMPTS,
        method=method,
        extremes="share",
        asserted=False,
    )
    if "ffn" not in METHODS[method].units:
        return not_applicable(bench, claim, NO_FFN)
    found = samples(bench, method)
    direct, total = (np.array([each.effect(name)[:TOP].mean() for each in found]) for name in ("direct", "total"))
    note = f"direct {direct.mean():.2g}, total {total.mean():.2g} nats a neuron" if found else ""
    return bench.judge(claim, direct > total, places=bench.part(PROMPTS), seed=bench.seed, note=note)
