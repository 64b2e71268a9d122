"""What the engine's work costs beside the least that it could cost: ratios within one run, on all cores.

    python -m benchmarks.goals            # print the table; a quarter of an hour on two cores
    python -m benchmarks.goals --write    # and put it into benchmarks/README.md
    python -m benchmarks.goals --only rank

Every figure is a median over rounds; in each round what is measured runs right behind its yardstick. All of it is
measured twice: with the machine to itself, and beside one process that keeps a core busy. Nothing passes or fails by
time. A real model whose package is not installed is left out, and its rows say so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

import attribution as at
from attribution.claims.about_methods.common import METHOD
from attribution.engine.all_scores import score_all, score_parts
from attribution.engine.methods import method_named
from attribution.engine.ranking import Search, candidates_of_each
from attribution.engine.ranks import levels_of
from attribution.engine.vectors import vector_table
from attribution.errors import AttributionError
from attribution.prompts.tokens import answer_tokens
from attribution.records import Unit
from benchmarks import memory
from benchmarks.cost import between
from benchmarks.growth import SIZES, save
from benchmarks.random_models import random_model
from benchmarks.timing import VARIANTS, Asked, K, Thing, words_asked

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- goals: begin, written by python -m benchmarks.goals --write -->", "<!-- goals: end -->"

ROUNDS = 7
# A row whose first round takes longer than PATIENCE seconds is measured in FEWER rounds.
PATIENCE, FEWER = 10.0, 3
SMOLLM2, GEMMA = "smollm2", "gemma3_270m"
# Prompts of the rows about many prompts, and about all scores.
MANY, SCORED, PARTS = 100, 30, 8
# Knowledge prompts for the selection rule.
SELECTED = 500

Pair = tuple[Thing, Thing]
"""What is measured, and its yardstick."""


@dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
        what: What is measured.
        yardstick: What it is divided by.
        goal: The ratio that is aimed at.
        make: Makes the pair.
        times: How many of the yardstick one of what is measured corresponds to.
    """

    what: str
    yardstick: str
    goal: float
    make: Callable[[], Pair]
    times: float = 1


@cache
def loaded(name: str) -> at.Model:
    """Return a model, loaded once."""
    return at.load(name)


@cache
def gpt2_small() -> Asked:
    """Return a random model of GPT-2-small size, asked one prompt of 12 words."""
    model = random_model(SIZES[-1])
    return Asked(model, words_asked(model, 1))


def asked(name: str, number: int) -> Asked:
    """Return a model asked some of the knowledge prompts, spread over the categories, whether or not it knows them."""
    model = loaded(name)
    every = [
        each for each in at.load_knowledge().prompts if len(answer_tokens(model.tokenizer, each.text, each.answer)) == 1
    ]
    return Asked(model, every[:: max(1, len(every) // number)][:number])


def top(name: str, number: int = 1, unit: str = "ffn") -> Pair:
    """Return a certified top 10, and plain passes of the same prompts in the same batches."""
    of = asked(name, number)
    return lambda: of.attribute(unit, K), of.plain


def bare(model: at.Model, units: Sequence[Unit]) -> Thing:
    """Return one float32 product of all vectors of some units with the unembedding, sublayer by sublayer."""
    tables = [vector_table(model, unit) for unit in units]
    unembedding = model.anatomy.readout.unembedding.float()
    vectors = [each.float() for table in tables if table is not None for each in table.vectors]
    # Fresh pages for every product would take as long again.
    logits = torch.empty(max(map(len, vectors)), len(unembedding))

    def product() -> None:
        for each in vectors:
            torch.mm(each, unembedding.T, out=logits[: len(each)])

    return product


def first_question(folder: str) -> Pair:
    """Return a top 10 of a model that was never asked before; loading is in neither."""
    prompt = gpt2_small().prompts[0]
    fresh: list[at.Model] = []

    def plain() -> None:
        fresh[:] = [at.load(folder)]
        Asked(fresh[0], [prompt]).plain()
        start = time.perf_counter()
        Asked(fresh[0], [prompt]).plain()
        plain.seconds = time.perf_counter() - start  # type: ignore[attr-defined]

    return lambda: at.attribute(fresh[0], prompt, unit="neuron", k=K), plain


def parts() -> Pair:
    """Return all heads and layers of some prompts, and the bare product of as many vectors."""
    of = asked(SMOLLM2, PARTS)
    method, anatomy = method_named(METHOD, "head"), of.model.anatomy
    vectors = torch.randn(PARTS * anatomy.layers * (anatomy.heads + 2), anatomy.width)

    def scored() -> None:
        found = candidates_of_each(of.model, of.questions, {"head": [method], "layer": [method]}, Search())
        score_parts([list(each.values()) for each in found], method)

    return scored, lambda: vectors @ anatomy.readout.unembedding.T


def every_score() -> Pair:
    """Return all scores of both kinds of neurons on some prompts, and the bare product of all vectors."""
    of = asked(SMOLLM2, SCORED)
    units: tuple[Unit, ...] = ("ffn", "attention")

    def scored() -> None:
        for unit in units:
            method = method_named(METHOD, unit)
            found = candidates_of_each(of.model, of.questions, {unit: [method]}, Search())
            score_all([each[unit] for each in found], method)

    return scored, bare(of.model, units)


def levels() -> Pair:
    """Return the levels that bracket the ranks of all answers, of one sublayer, and its bare product."""
    model = loaded(SMOLLM2)
    table = vector_table(model, "ffn")
    assert table is not None
    vectors, readout = table.every(0).to(table.scan_dtype), table.readout
    return lambda: levels_of(vectors, readout), lambda: vectors @ readout.unembedding.T


def selection() -> Pair:
    """Return the selection rule on a part of all knowledge prompts, and plain passes of these."""
    words = at.load_knowledge().words
    of = asked(SMOLLM2, SELECTED)
    return lambda: at.known_prompts(of.model, of.prompts, words), of.plain


def reruns() -> Pair:
    """Return reruns with a prompt's best neuron zeroed, its two best, up to ten, and as many plain rows."""
    of = asked(SMOLLM2, 20)
    of.rank()
    return of.rerun, of.plain


GOALS = (
    Goal("certified top 10, FFN, GPT-2-small size", "plain pass", 2.0, lambda: _of_random("ffn")),
    Goal("certified top 10, FFN + attention, GPT-2-small size", "plain pass", 2.5, lambda: _of_random("neuron")),
    Goal("certified top 10, FFN, SmolLM2-135M", "plain pass", 2.6, lambda: top(SMOLLM2)),
    Goal("certified top 10, FFN, Gemma 3 270M", "plain pass", 5.5, lambda: top(GEMMA)),
    Goal(f"the same, {MANY} prompts in one call, bundled:gpt2", "plain passes", 2.0, lambda: top("bundled:gpt2", MANY)),
    Goal(f"the same, {MANY} prompts in one call, SmolLM2-135M", "plain passes", 2.0, lambda: top(SMOLLM2, MANY)),
    Goal("first question after loading, FFN + attention, GPT-2-small size", "plain pass", 2.5, lambda: _first()),
    Goal("every FFN neuron of one prompt, SmolLM2-135M", "bare product", 1.3, lambda: _every()),
    Goal(f"all heads and layers of {PARTS} prompts, SmolLM2-135M", "bare product", 1.3, parts),
    Goal(f"all neurons of both kinds for {SCORED} prompts, SmolLM2-135M", "bare product", 3.0, every_score),
    Goal("levels that bracket every rank, once per model, SmolLM2-135M", "bare product", 1.5, levels),
    Goal("selection rule, SmolLM2-135M", "plain passes", 1.2, selection),
    Goal("rerun of one more ablated row, SmolLM2-135M", "plain row", 0.6, reruns, times=VARIANTS),
)


def _of_random(unit: str) -> Pair:
    of = gpt2_small()
    return lambda: of.attribute(unit, K), of.plain


def _every() -> Pair:
    of = asked(SMOLLM2, 1)
    return lambda: of.attribute("ffn", None), bare(of.model, ["ffn"])


_FOLDER = tempfile.TemporaryDirectory()


def _first() -> Pair:
    save(gpt2_small().model, _FOLDER.name)
    return first_question(_FOLDER.name)


@contextmanager
def busy() -> Iterator[None]:
    """Keep one core busy with something else."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(pair: Pair, rounds: int) -> tuple[float, float]:
    """Return the median seconds of what is measured and of its yardstick, run in turn."""
    thing, yardstick = pair
    found: list[tuple[float, float]] = []
    # The first round warms up.
    while len(found) <= rounds:
        start = time.perf_counter()
        yardstick()
        plain = getattr(yardstick, "seconds", time.perf_counter() - start)
        start = time.perf_counter()
        thing()
        found.append((time.perf_counter() - start, plain))
        if found[0][0] > PATIENCE:
            rounds = min(rounds, FEWER)
    return statistics.median(each for each, _ in found[1:]), statistics.median(each for _, each in found[1:])


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def row(goal: Goal, rounds: int) -> str:
    """Return the row of one goal, in Markdown."""
    try:
        pair = goal.make()
    except AttributionError as error:
        return f"| {goal.what} | {goal.yardstick} | {goal.goal:g} | not measured: {error} | | |"
    alone = measure(pair, rounds)
    with busy():
        beside = measure(pair, rounds)
    one, other = (seconds / plain / goal.times for seconds, plain in (alone, beside))
    cells = (
        goal.what,
        goal.yardstick,
        f"{goal.goal:g}",
        f"{one:.2f} ({_seconds(alone[0])})",
        f"{other:.2f} ({_seconds(beside[0])})",
        f"{beside[0] / alone[0]:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def memory_row() -> str:
    """Return the row of peak memory."""
    what = "peak memory above the loaded model, first top 10, FFN + attention, GPT-2-small size"
    if not Path("/proc/self/clear_refs").exists():
        return f"| {what} | | 150 MB | not measured: needs /proc of Linux | | |"
    save(gpt2_small().model, _FOLDER.name)
    prompt = gpt2_small().prompts[0]
    command = [sys.executable, memory.__file__, _FOLDER.name, prompt.text, prompt.answer]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    peak = statistics.median(each["peak"] - each["loaded"] for each in found)
    return f"| {what} | | 150 MB | {peak:.0f} MB | | |"


def table(only: str, rounds: int) -> str:
    """Measure every goal whose row has some words in it, and return the table in Markdown."""
    chosen = [goal for goal in GOALS if only in goal.what]
    lines = [
        "| what | over | goal | alone | beside a busy process | seconds, busy over alone |",
        "|---|---|---:|---:|---:|---:|",
        *(row(goal, rounds) for goal in tqdm(chosen, unit="goal")),
    ]
    return "\n".join([*lines, memory_row()] if not only else lines)


def conditions(rounds: int) -> str:
    """Return where this was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight"))
    return (
        f"{date.today()}. {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads. Python "
        f"{platform.python_version()}, {versions}. Medians of {rounds} rounds, or {FEWER} of what takes over "
        f"{PATIENCE:.0f} s."
    )


def main(arguments: list[str]) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {README.name} as well")
    parser.add_argument("--only", default="", help="rows with these words only")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} when left out")
    options = parser.parse_args(arguments)
    text = f"{conditions(options.rounds)}\n\n{table(options.only, options.rounds)}"
    print(text)
    if options.write:
        between(README, BEGIN, END, text)


if __name__ == "__main__":
    main(sys.argv[1:])
