"""Compare the certified top 10 with brute force on every prompt that the bundled models answer.

    python -m benchmarks.certificates [--every N]

Brute force scores every neuron in float64, in a few lines of its own; nothing is bounded, nothing left out. About
twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean

import torch
from torch import Tensor
from tqdm.auto import tqdm

import attribution as at
from attribution.engine.batching import batches_of
from attribution.engine.importance import Candidates
from attribution.engine.methods import method_named
from attribution.engine.questions import question_of
from attribution.engine.ranking import all_candidates
from attribution.engine.top_k import top_k
from attribution.engine.vectors import vector_table
from attribution.models.registry import registry
from attribution.records import NEURON_UNITS, Unit

K = 10
# Rows of one block; 512 x 2,560 float64 numbers stay in the processor's cache.
BLOCK = 512


def brute_force(candidates: Candidates, projected: list[Tensor]) -> Tensor:
    """Score every neuron by Eq. 13: bs(v)_w - log sum_t p_t exp(bs(v)_t), plainly.

    Args:
        candidates: The neurons.
        projected: Per sublayer, the logits of each bare vector for a scale of 1, (rows, vocabulary).
    """
    table, scores = candidates.table, torch.empty(len(candidates), dtype=torch.float64)
    readout = table.readout
    centred = (
        candidates.streams.states - candidates.streams.states.mean(-1, keepdim=True)
        if readout.norm.centred
        else candidates.streams.states
    )
    probabilities = (centred * readout.norm.weight / candidates.scale) @ readout.unembedding.double().T
    probabilities = probabilities.softmax(-1)
    for sublayer_index in range(len(table.sublayers)):
        for block in (candidates.sublayer_index == sublayer_index).nonzero()[:, 0].split(BLOCK):
            update = projected[sublayer_index][candidates.row[block]]
            update *= (candidates.coefficient[block] / candidates.scale)[:, None]
            answer = update[:, candidates.answer].clone()
            scores[block] = answer - (update.exp_() @ probabilities[sublayer_index]).log()
    return scores


def compare(name: str, every: int) -> bool:
    """Print a line per unit, and say whether all rankings agreed."""
    model, knowledge = at.load(name), at.load_knowledge()
    readout = model.anatomy.readout
    prompts = at.known_prompts(model, knowledge.prompts, knowledge.words)[::every]
    questions = [question_of(model, prompt.text, prompt.answer) for prompt in prompts]
    method = method_named("log_prob_increase", "ffn")
    projected: dict[Unit, list[Tensor]] = {}
    for unit in NEURON_UNITS:
        table = vector_table(model, unit)
        assert table is not None
        vectors = [each.double() for each in table.vectors]
        if readout.norm.centred:
            vectors = [each - each.mean(-1, keepdim=True) for each in vectors]
        projected[unit] = [(each * readout.norm.weight) @ readout.unembedding.double().T for each in vectors]
    scored: dict[Unit, list[int]] = {unit: [] for unit in NEURON_UNITS}
    total: dict[Unit, list[int]] = {unit: [] for unit in NEURON_UNITS}
    equal: dict[Unit, int] = dict.fromkeys(NEURON_UNITS, 0)
    worst = 0.0
    with tqdm(total=len(questions), desc=name, unit="prompt") as bar:
        for rows, batch in batches_of(model, questions):
            part, wanted = [questions[row] for row in rows], {unit: [method] for unit in NEURON_UNITS}
            for by_unit in all_candidates(model, part, batch, wanted, seed=0, steps=1):
                for unit, candidates in by_unit.items():
                    found = top_k(candidates, method, K)
                    expected = brute_force(candidates, projected[unit])
                    best = expected.argsort(descending=True, stable=True)[:K]
                    equal[unit] += found.indices.tolist() == best.tolist()
                    worst = max(worst, float((found.scores - expected[found.indices]).abs().max()))
                    scored[unit].append(found.certificate.scored)
                    total[unit].append(found.certificate.total)
                bar.update()
    for unit in NEURON_UNITS:
        print(
            f"{name:<14} {unit:<10} top {K} equals brute force on {equal[unit]} of {len(questions)} prompts; "
            f"{mean(scored[unit]):.2f} of {mean(total[unit]):,.0f} neurons scored (most: {max(scored[unit])})"
        )
    print(f"{name:<14} largest difference of a score: {worst:.1e} nats")
    return all(number == len(questions) for number in equal.values())


def main() -> int:
    """Compare on both bundled models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, help="only every N-th prompt")
    every = parser.parse_args().every
    agreed = [compare(name, every) for name, entry in registry().items() if entry.bundled]
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
