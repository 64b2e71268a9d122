"""How the time of attribution grows with prompts, neurons and vocabulary, as multiples of plain forward passes.

    python -m benchmarks.growth                  # print the tables; some five minutes on two cores
    python -m benchmarks.growth --write          # and keep them in README.md and docs/scale.md
    python -m benchmarks.growth --peers PYTHON   # with the peers, from an interpreter that has requirements-peers.txt
    python -m benchmarks.growth --device cuda    # the shapes of GPT-2 large and Llama-7B instead, on that device

Nothing passes or fails by time. Before each round of everything stands a plain forward pass of the same prompts in the
same batches, so that a ratio is one of neighbours in time. On a processor one thread is used, and its own time counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import attribution as at
from attribution.models.hub import cause_of
from attribution.prompts.knowledge import Prompt
from benchmarks import growth_report, memory, peers
from benchmarks.cost import GPT2_LARGE, LLAMA_7B, Shape, every_neuron
from benchmarks.random_models import random_model, tokenizer_of
from benchmarks.timing import TOKENS, Asked, Thing, beside, calibrate, peak_reset, peak_since, shape_of, words_asked

SIZES = (
    Shape("small", 3, 192, 3, 3, 64, 768, 50_257),
    Shape("medium", 6, 384, 6, 6, 64, 1_536, 50_257),
    Shape("GPT-2 small", 12, 768, 12, 12, 64, 3_072, 50_257),
)
# Of these, what the peers are asked: some run hundreds of passes.
OF_PEERS = SIZES[1]
SMALL_VOCABULARY = 8_192
BY_PROMPTS = {"bundled:gpt2": (1, 10, 100, 1_000), "bundled:llama": (1, 10, 100, 1_000)}
# Scores of every neuron are left out where they would take minutes: each prompt costs the same, as does each neuron.
MOST_PROMPTS, MOST_OPERATIONS = 100, 1e12
MEMORY_RUNS = 3
# Those of the paper's tables.
TABLE_PROMPTS = 1_350


def by_prompts(name: str, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the points of one bundled model, asked more and more of its prompts."""
    model = at.load(name)
    every = at.load_knowledge().prompts
    for number in numbers:
        # Spread over all categories.
        prompts = list(every[:: max(1, len(every) // number)])[:number]
        yield from Asked(model, prompts).points(shape_of(model), "prompts", every=number <= MOST_PROMPTS)


def by_size(shapes: Sequence[Shape]) -> Iterator[dict[str, Any]]:
    """Yield the points of random models of growing size, asked one prompt."""
    for shape in shapes:
        model = random_model(shape)
        every = every_neuron(shape, TOKENS).flops <= MOST_OPERATIONS
        yield from Asked(model, words_asked(model, 1)).points(shape, "size", every=every)


def save(model: at.Model, folder: str) -> None:
    """Write a model and its tokenizer, as ``save_pretrained`` does."""
    model.network._module.save_pretrained(folder)
    tokenizer_of(model.anatomy.vocabulary).save_pretrained(folder)


def peak_memory(folder: str, prompt: Prompt) -> list[dict[str, float]]:
    """Return megabytes of fresh processes before and at the peak of their first question; nothing without /proc.

    What else is resident differs from one to the next, so there are several.
    """
    if not Path("/proc/self/clear_refs").exists():
        return []
    command = [sys.executable, memory.__file__, folder, prompt.text, prompt.answer]
    return [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(MEMORY_RUNS)
    ]


def ask_peers(python: str, folder: str, prompt: Prompt, model: at.Model) -> list[dict[str, Any]]:
    """Run every peer in a process of an interpreter of its own; what fails says why in place of times."""
    ids = ",".join(map(str, model.tokenizer.encode(prompt.text)))
    answer = model.tokenizer.encode(prompt.answer)[0]
    found = []
    for name in peers.PEERS:
        command = [python, peers.__file__, name, folder, ids, str(answer)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        last = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()[-1:]
        read = json.loads(last[0]) if result.returncode == 0 else {"error": "".join(last)}
        found.append({"peer": name} | read)
    return found


def on_device(shape: Shape, device: torch.device, prompts: int) -> Iterator[dict[str, Any]]:
    """Yield the points of one shape on a device: one prompt, then Tables 2 and 13 whole, with their peak memory.

    The first question of a kind is the one whose memory is measured, so it includes what is computed once per model.

    Args:
        shape: The shape.
        device: The device.
        prompts: Prompts of the tables.
    """
    model = random_model(shape, device)
    asked = Asked(model, words_asked(model, prompts))
    one = Asked(model, asked.prompts[:1])

    def groups() -> Iterator[tuple[Asked, dict[str, Thing]]]:
        yield one, {"plain": one.plain, **one.things()}
        yield asked, {"table 2": asked.table_2, "table 13": asked.table_13}

    for group, things in groups():
        for name, thing in things.items():
            if name == "rerun":
                group.rank()
            before = peak_reset(device)
            thing()
            memory_used = peak_since(device, before)
            (found,) = beside(group.plain, {name: thing}, device)
            yield group.point(shape, "device") | found | {"memory": memory_used}


def hardware(device: torch.device) -> str:
    """Return what this machine is, without its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, of which {torch.get_num_threads()} used"


def conditions(device: torch.device) -> dict[str, Any]:
    """Return where and on what something is measured."""
    names = ("torch", "transformers", "nnsight")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "load": load,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def measure(device: torch.device, python: str) -> dict[str, Any]:
    """Measure everything that has its place on a device.

    Args:
        device: The device.
        python: An interpreter that has the peers.
    """
    found = conditions(device) | {"machine": asdict(calibrate(device)), "points": []}
    if device.type != "cpu":
        for shape in (GPT2_LARGE, LLAMA_7B):
            found["points"] += _shown(on_device(shape, device, TABLE_PROMPTS), shape.name)
        return found
    for name, numbers in BY_PROMPTS.items():
        found["points"] += _shown(by_prompts(name, numbers), name)
    shapes = [replace(shape, vocabulary=size) for shape in SIZES for size in (SMALL_VOCABULARY, shape.vocabulary)]
    found["points"] += _shown(by_size(shapes), "sizes")
    with _saved(SIZES[-1]) as (_, folder, prompt):
        found["memory"] = peak_memory(folder, prompt)
    with _saved(OF_PEERS) as (model, folder, prompt):
        found["peers_shape"] = asdict(OF_PEERS)
        found["peers"] = ask_peers(python, folder, prompt, model)
    return found


@contextmanager
def _saved(shape: Shape) -> Iterator[tuple[at.Model, str, Prompt]]:
    """Give a random model, a folder that holds it, and a prompt."""
    model = random_model(shape)
    (prompt,) = words_asked(model, 1)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        yield model, folder, prompt


def _shown(points: Iterator[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Collect points, with a bar for whoever waits."""
    return list(tqdm(points, desc=name, unit="point"))


def main(arguments: list[str]) -> None:
    """Measure, print, and keep if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where; another than cpu takes the shapes of large models")
    parser.add_argument("--write", action="store_true", help="keep the figures, and put the tables into the pages")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="interpreter that has the peers")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # Each backend complains in its own way.
        parser.error(f"device {options.device!r} is not one that torch has here ({cause_of(error)}); name another.")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"device {options.device!r} is one whose time and memory are not known here; use cpu or cuda.")
    if device.type == "cpu":
        torch.set_num_threads(1)
    found = measure(device, options.peers)
    print(growth_report.device_table(found) if device.type != "cpu" else growth_report.tables(found))
    if options.write:
        growth_report.keep(found, device.type)
        growth_report.write()


if __name__ == "__main__":
    main(sys.argv[1:])
