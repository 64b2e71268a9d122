"""Resident memory of one certified top 10, in a process of its own; run by the benchmark, prints JSON.

    python benchmarks/memory.py FOLDER PROMPT ANSWER

The peak is that of the first question a freshly loaded model is asked, so it includes what is computed once per model.
It needs /proc of Linux, where the peak can be set back after loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import attribution as at


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1])


def main(folder: str, prompt: str, answer: str) -> None:
    """Print resident megabytes (10**6 bytes) of the loaded model, at the peak, and of the weights alone."""
    model = at.load(folder)
    # Weights are mapped from their file and become resident when they are first read.
    with torch.no_grad():
        model.network._module(torch.tensor([model.tokenizer.encode(prompt)]))
    loaded = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to the present
    at.attribute(model, prompt, answer, unit="neuron", k=10)
    weights = sum(parameter.nbytes for parameter in model.network._module.parameters())
    megabyte = {"loaded": loaded, "peak": _kilobytes("VmHWM")}
    print(json.dumps({name: size * 1024 / 1e6 for name, size in megabyte.items()} | {"weights": weights / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:])
