"""Simulate how often the gate is red: after harmless changes, where it must not be, and after harmful ones.

    python -m benchmarks.false_alarms    # print two tables; about half an hour on two cores

A harmless change moves some of 300 facts, up as often as down. A harmful one moves them as much, nearly all down. The
facts that it moves, the sizes and the signs are drawn again in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import numpy.typing as npt

from attribution.claims.judge import Claim, Evidence, Status, Verdict
from attribution.gate.comparison import compare
from attribution.gate.stored_run import StoredRun
from attribution.models.fingerprint import ModelFacts

FACTS = 300
CHANGED = (1, 3, 5, 6, 8, 12, 30, 300)
# How many changes of each kind, by number of claims: many claims take long.
RUNS = {1: 200, 21: 100, 162: 40}
PROMPTS = tuple(f"fact {number:03}" for number in range(FACTS))
SIZES: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]]] = {
    "alike": lambda rng, number: np.ones(number),
    "normal": lambda rng, number: np.abs(rng.normal(size=number)),
    "a few large": lambda rng, number: rng.pareto(1.5, size=number),
}
# Of ten changes that a harmful change makes, nine are for the worse.
HARM = 0.9


def _run(effects: npt.NDArray[np.float64]) -> StoredRun:
    """Return a run that measured claims, (facts, claims)."""
    facts = ModelFacts("sha256:0", None, "float32", "cpu")
    verdicts = []
    for number, column in enumerate(effects.T):
        claim = Claim(f"claim {number:03}", "a sentence", "ours", "effect", "above", 0.0, "none", method="simulated")
        evidence = Evidence(PROMPTS, PROMPTS, tuple(column.tolist()), None)
        mean = float(column.mean())
        verdicts.append(Verdict(claim, "model", Status.SUPPORTED, mean, mean, mean, FACTS, FACTS, None, None, evidence))
    return StoredRun({"model": facts}, tuple(verdicts), "now", {})


def red(seed: int, *, changed: int, claims: int, sizes: str, together: bool, worse: float) -> bool:
    """Say whether one change of a run is red.

    Args:
        seed: Of all that is drawn.
        changed: How many facts the change moves.
        claims: How many claims are measured.
        sizes: How much it moves them, one of :data:`SIZES`.
        together: Whether all claims move alike, as metrics of one rerun do; else each by itself.
        worse: The chance that a fact moves for the worse.
    """
    rng = np.random.default_rng([seed, changed, claims])
    before = rng.normal(size=(FACTS, claims))
    move = np.zeros((FACTS, claims))
    rows = rng.choice(FACTS, size=changed, replace=False)
    for column in range(1 if together else claims):
        signs = np.where(rng.random(changed) < worse, -1.0, 1.0)
        move[rows, column] = signs * SIZES[sizes](rng, changed)
    if together:
        move = np.repeat(move[:, :1], claims, axis=1) * rng.uniform(0.5, 2.0, size=claims)
    comparison = compare(_run(before), _run(before + move))
    return bool(comparison.of_kind("regressed", asserted=True))


def _share(claims: int, together: bool, sizes: str, worse: float, changed: int) -> float:
    """Return the share of runs that are red."""
    runs = RUNS[claims]
    found = (
        red(seed, changed=changed, claims=claims, sizes=sizes, together=together, worse=worse) for seed in range(runs)
    )
    return sum(found) / runs


def tables() -> Iterator[str]:
    """Yield the lines of both tables."""
    shapes = [(claims, together) for claims in RUNS for together in ((True, False) if claims > 1 else (True,))]
    rows = [(*shape, sizes) for shape in shapes for sizes in SIZES]
    with ProcessPoolExecutor() as pool:
        for title, worse in (("Harmless", 0.5), ("Harmful", HARM)):
            shares = {row: [pool.submit(_share, *row, worse, changed) for changed in CHANGED] for row in rows}
            yield f"{title}: share of runs that are red, in per cent, by how many of {FACTS} facts changed."
            yield ""
            yield f"| claims | runs | sizes | {' | '.join(map(str, CHANGED))} |"
            yield f"|---|---:|---|{'---:|' * len(CHANGED)}"
            for (claims, together, sizes), found in shares.items():
                named = f"{claims}{'' if claims == 1 else ', alike' if together else ', each by itself'}"
                cells = " | ".join(f"{100 * each.result():.1f}" for each in found)
                yield f"| {named} | {RUNS[claims]} | {sizes} | {cells} |"
            yield ""


if __name__ == "__main__":
    for line in tables():
        print(line, flush=True)
