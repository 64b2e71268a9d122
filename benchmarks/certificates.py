"""Compare the certified top 10 with brute force on prompts that models answer.

    python -m benchmarks.certificates                           # all known prompts of the bundled models; 20 minutes
    python -m benchmarks.certificates --prompts 20 smollm2      # 20 known prompts of a real model

Brute force scores every neuron in float64, in a few lines of its own; nothing is bounded, nothing left out. FFN and
attention neurons are scored once, and the top 10 of both together is put together from these.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor
from tqdm.auto import tqdm

import attribution as at
from attribution.engine.importance import Candidates
from attribution.engine.methods import method_named
from attribution.engine.questions import question_of
from attribution.engine.ranking import Search, candidates_of_each
from attribution.engine.top_k import top_k_together
from attribution.models.registry import registry
from attribution.records import NEURON_UNITS, Component, Unit

K = 10
# Prompts that are compared at a time.
TOGETHER = 32
# Rows of one block; their logits are held in float64, and exponentials of a few at a time stay in a cache.
BLOCK, FEW = 256, 16


def brute_force(candidates: Sequence[Candidates]) -> list[Tensor]:
    """Score every neuron of several prompts by Eq. 13: bs(v)_w - log sum_t p_t exp(bs(v)_t), plainly.

    Args:
        candidates: The neurons of each prompt; all write the same vectors.
    """
    table, readout = candidates[0].table, candidates[0].table.readout
    unembedding = readout.unembedding.double()

    def seen(vectors: Tensor) -> Tensor:
        centred = vectors - vectors.mean(-1, keepdim=True) if readout.norm.centred else vectors
        weighted = centred if readout.norm.weight is None else centred * readout.norm.weight.double()
        return weighted @ unembedding.T * readout.logit_scale

    scores = [torch.empty(len(each), dtype=torch.float64) for each in candidates]
    for sublayer_index in tqdm(range(len(table.sublayers)), desc=table.unit, unit="sublayer", leave=False):
        states = torch.stack([each.streams.states[sublayer_index] / each.scale for each in candidates])
        probabilities = seen(states).softmax(-1)
        vectors = table.vectors[sublayer_index].double()
        if (post_weight := table.post_weights[sublayer_index]) is not None:
            vectors = vectors * post_weight.double()
        for start in range(0, len(vectors), BLOCK):
            logits = seen(vectors[start : start + BLOCK])
            for each, own, probability in zip(candidates, scores, probabilities, strict=True):
                here = (each.sublayer_index == sublayer_index) & (each.row >= start) & (each.row < start + BLOCK)
                for few in here.nonzero()[:, 0].split(FEW):
                    update = logits[each.row[few] - start] * (each.coefficient[few] / each.scale)[:, None]
                    answer = update[:, each.answer].clone()
                    own[few] = answer - (update.exp_() @ probability).log()
    return scores


def compare(name: str, every: int, prompts: int | None) -> bool:
    """Print a line per unit, and say whether all rankings agreed."""
    model, knowledge = at.load(name), at.load_knowledge()
    known = at.known_prompts(model, knowledge.prompts, knowledge.words)[::every]
    if prompts is not None:
        known = known[:: max(1, len(known) // prompts)][:prompts]
    questions = [question_of(model, prompt) for prompt in known]
    method = method_named("log_prob_increase", "ffn")
    equal, scored, total = Counter[Unit](), dict[Unit, list[int]](), dict[Unit, list[int]]()
    worst = 0.0
    for start in tqdm(range(0, len(questions), TOGETHER), desc=name, unit="group"):
        part = questions[start : start + TOGETHER]
        truth: list[dict[Component, float]] = [{} for _ in part]
        for unit in NEURON_UNITS:
            found = candidates_of_each(model, part, {unit: [method]}, Search())
            candidates = [each[unit] for each in found]
            records = [each.records(torch.arange(len(each))) for each in candidates]
            if unit != "neuron":
                for own, named, scores in zip(truth, records, brute_force(candidates), strict=True):
                    own.update(zip(named, scores.tolist(), strict=True))
            best = top_k_together(candidates, method, K, exact_scores=True)
            for own, named, top in zip(truth, records, best, strict=True):
                expected = torch.tensor([own[record] for record in named], dtype=torch.float64)
                equal[unit] += top.indices.tolist() == expected.argsort(descending=True, stable=True)[:K].tolist()
                worst = max(worst, float((top.scores - expected[top.indices]).abs().max()))
                scored.setdefault(unit, []).append(top.certificate.scored)
                total.setdefault(unit, []).append(top.certificate.total)
    for unit in NEURON_UNITS:
        print(
            f"{name:<14} {unit:<10} top {K} equals brute force on {equal[unit]} of {len(questions)} prompts; "
            f"{mean(scored[unit]):.2f} of {mean(total[unit]):,.0f} neurons scored (most: {max(scored[unit])})"
        )
    print(f"{name:<14} largest difference of a score: {worst:.1e} nats", flush=True)
    return all(number == len(questions) for number in equal.values())


def main() -> int:
    """Compare on the models named, or on the bundled ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="names of the registry; the bundled models when left out")
    parser.add_argument("--every", type=int, default=1, help="only every N-th prompt")
    parser.add_argument(
        "--prompts", type=int, help="compare on this many known prompts, evenly spaced; on all of them when left out"
    )
    options = parser.parse_args()
    models = options.models or [name for name, entry in registry().items() if entry.bundled]
    agreed = [compare(name, options.every, options.prompts) for name in models]
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
